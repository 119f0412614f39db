//! From a submit to an acceptance: nothing is answered before it is durable.

use bytes::Bytes;
use prost::Message;
use ractor::ActorProcessingErr;
use tokio::sync::OwnedSemaphorePermit;

use cluster::Reply;
use domain::entry::{Accepted, Entry, Stamp, fingerprint};
use domain::turn::Turn;
use domain::{AgentId, Epoch, Lsn, Position, Reason};
use proto::journal;
use proto::link::{
    AgentRow, CancelAnswer, DedupRow, DefinitionRow, GetAnswer, ReadAgent, SubmitAnswer, WatchMode,
    WorkInfo, WorkRow,
};
use store::writer::{Append, Committed, NewRow};
use telemetry::fault::point;

use super::{AgentMessage, Pending, State, Submit, watch};
use crate::definitions::Known;
use crate::{Error, clock, info, metrics, read};

/// How long an idempotency key is kept.
const KEY_RETENTION_MS: i64 = 24 * 3_600 * 1_000;

impl State {
    pub(super) async fn deliver(
        &mut self,
        submit: Box<Submit>,
        permit: OwnedSemaphorePermit,
    ) -> Result<(), ActorProcessingErr> {
        // First, because its journal may be what it fails of.
        if self.quarantined {
            let message = "the agent failed too often; see `stagedoor why agent`";
            self.refuse(submit.reply, Reason::Quarantined, message);
            return Ok(());
        }
        let found = match self.wake(&submit.key).await {
            Ok(found) => found,
            Err(error) => {
                self.refuse_for(submit, &error);
                return Ok(());
            }
        };
        if let Some(found) = found {
            self.duplicate(submit, Lsn(found.work), hash_of(&found));
            return Ok(());
        }
        // It would stand behind one whose commit is waited for; asked again, it is found if it is that one.
        if self.is_accepting() && self.shard().writer.is_away() {
            self.refuse_while_away(submit);
            return Ok(());
        }
        self.queue.push_back((submit, permit));
        self.accept_next().await
    }

    fn refuse_while_away(&self, submit: Box<Submit>) {
        let why = "the store does not take what is written now";
        self.refuse(submit.reply, Reason::StoreUnavailable, why);
    }

    fn refuse_for(&self, submit: Box<Submit>, error: &Error) {
        tracing::warn!(agent = %self.args.id, error = error as &dyn std::error::Error, "cannot take a work");
        self.refuse(submit.reply, error.reason(), &error.to_string());
    }

    fn is_accepting(&self) -> bool {
        self.pending.iter().any(|pending| matches!(pending, Pending::Accept { .. }))
    }

    /// Journals the acceptance of the next submit that waits. One at a time: each names the one before it.
    pub(super) async fn accept_next(&mut self) -> Result<(), ActorProcessingErr> {
        while !self.is_accepting() {
            let Some((submit, permit)) = self.queue.pop_front() else { return Ok(()) };
            match self.earlier(&submit).await {
                Ok(Some((work, hash))) => self.duplicate(submit, work, hash),
                Ok(None) => self.admit(submit, permit).await,
                Err(error) => self.refuse_for(submit, &error),
            }
        }
        Ok(())
    }

    /// The work that was submitted under the same key before, with the fingerprint of its input.
    async fn earlier(&mut self, submit: &Submit) -> Result<Option<(Lsn, [u8; 32])>, Error> {
        if submit.call.key_is_fresh {
            return Ok(None);
        }
        let open = self.fold.as_ref().and_then(|fold| fold.submitted_as(&submit.key));
        if let Some(turn) = open {
            return Ok(Some((turn.id(), turn.accepted().fingerprint())));
        }
        if let Some(known) = self.keys.get(&submit.key) {
            return Ok(Some(known));
        }
        if self.keys_complete && !self.keys.is_full() {
            return Ok(None);
        }
        let shard = self.shard().clone();
        let read = ReadAgent {
            id: self.row,
            idempotency_key: submit.key.to_string(),
            ..ReadAgent::default()
        };
        let answer = shard.store.agent(&shard.database, &read).await;
        let agent = self.args.id.to_string();
        let answer = answer.map_err(|source| Error::Read { agent, source: Box::new(source) })?;
        Ok(answer.dedup.map(|found| (Lsn(found.work), hash_of(&found))))
    }

    async fn admit(&mut self, submit: Box<Submit>, permit: OwnedSemaphorePermit) {
        if self.fold.as_ref().is_some_and(|fold| fold.admit(0).is_err()) {
            return self.refuse(submit.reply, Reason::QueueFull, "the queue of the agent is full");
        }
        if self.shard().writer.is_away() {
            return self.refuse_while_away(submit);
        }
        match self.shard().clone().definition(submit.definition).await {
            Ok(known) => self.accept(submit, permit, &known),
            Err(error) => self.refuse_for(submit, &error),
        }
    }

    fn accept(&mut self, submit: Box<Submit>, permit: OwnedSemaphorePermit, known: &Known) {
        let shard = self.shard().clone();
        let now_ms = clock::now_ms();
        let timeout_ms = i64::try_from(submit.call.timeout_ms).unwrap_or(i64::MAX);
        let accepted = Accepted {
            definition: submit.definition,
            input: submit.call.input.clone(),
            key: submit.key.clone(),
            deadline_ms: now_ms.saturating_add(timeout_ms),
            traceparent: Some(submit.traceparent.clone()).filter(|text| !text.is_empty()),
            class: shard.class,
            slot: submit.slot,
        };
        let hash = Bytes::copy_from_slice(submit.definition.as_bytes());
        let entry = Entry::Accepted(accepted.clone());
        let payload = journal::encode(&entry);
        let before = (self.seq, self.row_stored);
        let row = self.next_row(&entry, Lsn(0), payload.clone(), now_ms);
        let mut append = self.new_append(commit_span_of(&submit));
        append.rows.push(row);
        append.works.push(WorkRow {
            id: 0,
            agent: self.row,
            prev_work: self.fold.as_ref().map_or(0, |fold| fold.last_work.0),
            state: journal::state_code(domain::WorkState::Accepted),
            reason: Reason::Submitted.code().into(),
            create_ms: now_ms,
            end_ms: 0,
            definition: hash.clone(),
            slot: submit.slot.get().into(),
            record: Bytes::new(),
        });
        append.dedups.push(DedupRow {
            agent: self.row,
            key: submit.key.to_string(),
            work: 0,
            input_hash: Bytes::copy_from_slice(&accepted.fingerprint()),
            expires_ms: now_ms.saturating_add(KEY_RETENTION_MS),
        });
        if shard.needs_definition(&submit.definition) {
            append.definitions.push(DefinitionRow { hash, body: known.body.clone() });
        }
        self.first_row(&mut append);
        point("accept-before-append");
        if let Err(reason) = self.append_acceptance(append) {
            // As if it had never come; its room and its place in the queue go with it.
            (self.seq, self.row_stored) = before;
            let message = if reason == Reason::Overloaded {
                "too many entries wait for the journal of the shard"
            } else {
                "the shard moved"
            };
            return self.refuse(submit.reply, reason, message);
        }
        let pending = Pending::Accept { submit, accepted, payload, ts_ms: now_ms, permit };
        self.pending.push_back(pending);
    }

    /// An agent's first entry brings its row, so that its name is known.
    fn first_row(&mut self, append: &mut Append) {
        if self.row_stored {
            return;
        }
        append.agents.push(AgentRow {
            id: self.row,
            tenant: self.args.id.tenant.to_string(),
            name: self.args.id.name.to_string(),
            key: self.args.id.key.to_string(),
            ..AgentRow::default()
        });
        self.row_stored = true;
    }

    pub(super) fn next_row(
        &mut self,
        entry: &Entry,
        work: Lsn,
        payload: Bytes,
        ts_ms: i64,
    ) -> NewRow {
        self.seq = self.seq.next();
        NewRow { seq: self.seq.0, work: work.0, kind: entry.kind(), ts_ms, payload }
    }

    /// The acceptance is durable: answer, and go on.
    pub(super) fn accepted(
        &mut self,
        submit: Box<Submit>,
        accepted: Accepted,
        payload: Bytes,
        ts_ms: i64,
        committed: Committed,
    ) -> Result<(), ActorProcessingErr> {
        point("accept-committed");
        let shard = self.shard().clone();
        let work = committed.first;
        let deadline_ms = accepted.deadline_ms;
        let hash = accepted.fingerprint();
        let fold = self.fold.as_mut().ok_or("an acceptance before the first read")?;
        let stamp = Stamp { seq: fold.seq.next(), lsn: work, epoch: shard.epoch, ts_ms };
        let limits = |hash: &_| shard.node.definitions.limits(hash);
        fold.apply(Lsn(0), Entry::Accepted(accepted), stamp, limits)?;
        shard.has_definition(submit.definition);
        shard.opened(work, AgentId::clone(&self.args.id), deadline_ms);
        metrics::ACCEPTED.inc();
        let Submit { call, key, from, reply, room, .. } = *submit;
        self.rooms.insert(work, room);
        self.keys.insert(key, work, hash);
        let turn = self
            .fold
            .as_ref()
            .and_then(|fold| fold.turn(work))
            .ok_or("the work was just opened")?;
        let position = position_of_acceptance(turn);
        answer_submit(reply, info::of_accepted(&self.args.id, turn), false, position);
        if call.subscription != 0 {
            let watcher = watch::Watcher::new(from, call.subscription, call.mode());
            let is_told = watcher.mode != WatchMode::All
                || self.send_entries(&watcher, work, &[(stamp, payload)], None);
            if is_told {
                self.watchers.entry(work).or_default().push(watcher);
            }
        }
        if !self.queue.is_empty() {
            _ = self.me.cast(AgentMessage::AcceptNext);
        }
        Ok(())
    }

    /// The key was used before: the same work for the same input, a refusal for another.
    fn duplicate(&mut self, submit: Box<Submit>, work: Lsn, hash: [u8; 32]) {
        metrics::DUPLICATES.inc();
        if fingerprint(&submit.definition, &submit.call.input) != hash {
            let message = format!(
                "idempotency key {} of {} was used with another input or definition: use another key",
                submit.key, self.args.id
            );
            return self.refuse(submit.reply, Reason::KeyReused, &message);
        }
        let shard = self.shard().clone();
        let call = watch::call_of(&submit.call, work, submit.slot, shard.class);
        let Submit { from, reply, .. } = *submit;
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        if let Some(turn) = turn {
            let position = position_of_acceptance(turn);
            answer_submit(reply, info::of_accepted(&self.args.id, turn), true, position);
            if let Some(call) = call {
                self.watch_open(&call, from);
            }
            return;
        }
        tokio::spawn(async move {
            match read::ended(&shard, work).await {
                Ok((info, position)) => answer_submit(reply, info, true, position),
                Err(refusal) => return reply.refuse(refusal),
            }
            if let Some(call) = call {
                read::watch_ended(&shard, call, from).await;
            }
        });
    }

    /// A work as it is: an open one from memory, an ended one from its row.
    pub(super) async fn get(&mut self, work: Lsn, reply: Reply) -> Result<(), ActorProcessingErr> {
        if let Err(error) = self.wake_known().await {
            self.refuse(reply, error.reason(), &error.to_string());
            return Ok(());
        }
        let shard = self.shard().clone();
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        match turn.map(|turn| info::of_turn(&self.args.id, turn)) {
            Some(info) => answer_get(reply, info, self.position()),
            None => _ = tokio::spawn(async move { read::get(&shard, work, reply).await }),
        }
        Ok(())
    }
}

fn commit_span_of(submit: &Submit) -> tracing::Span {
    if submit.traceparent.is_empty() {
        return tracing::Span::none();
    }
    let span = tracing::info_span!("commit");
    telemetry::set_parent(&span, Some(&submit.traceparent));
    span
}

/// What a submit answers is the acceptance, whatever has happened since, and so it stands where that does.
fn position_of_acceptance(turn: &Turn) -> Position {
    let epoch = turn.entries().first().map_or(Epoch(0), |(stamp, _)| stamp.epoch);
    Position { epoch, lsn: turn.id() }
}

fn hash_of(found: &DedupRow) -> [u8; 32] {
    found.input_hash.as_ref().try_into().unwrap_or([0; 32])
}

fn answer_submit(reply: Reply, work: WorkInfo, duplicate: bool, position: Position) {
    let Position { epoch, lsn } = position;
    let answer = SubmitAnswer { work: Some(work), duplicate, lsn: lsn.0, epoch: epoch.0 };
    reply.send(answer.encode_to_vec().into());
}

pub(crate) fn answer_get(reply: Reply, work: WorkInfo, position: Position) {
    let Position { epoch, lsn } = position;
    let answer = GetAnswer { work: Some(work), lsn: lsn.0, epoch: epoch.0 };
    reply.send(answer.encode_to_vec().into());
}

pub(crate) fn answer_cancel(reply: Reply, work: WorkInfo, position: Position) {
    let Position { epoch, lsn } = position;
    let answer = CancelAnswer { work: Some(work), lsn: lsn.0, epoch: epoch.0 };
    reply.send(answer.encode_to_vec().into());
}
