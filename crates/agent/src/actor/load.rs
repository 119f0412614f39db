//! Into memory and out of it: one read wakes an agent, its row is written before it goes.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ractor::ActorProcessingErr;
use tracing::Instrument;

use domain::agent::{Agent as Fold, Passage};
use domain::entry::{Entry, Stamp};
use domain::{AgentId, DefinitionHash, Epoch, IdempotencyKey, Lsn, Reason, Seq};
use proto::journal;
use proto::link::{AgentRow, DedupRow, LogRow, ReadAgent, ReadHistory};

use store::writer::Event;
use telemetry::fault::point;

use super::{AgentMessage, Pending, State};
use crate::host::HostMessage;
use crate::recovering::{Due, Share};
use crate::{Error, clock, metrics};

/// Entries after which the row is written again when no work is open: one work of six steps has as many. The row is small
/// then, and what a new owner has to read of an agent is its open works: reading more is what a takeover of many agents
/// takes its time for.
const SNAPSHOT_IDLE_EVERY: u64 = 8;
/// The same while works are open.
const SNAPSHOT_EVERY: u64 = 200;
/// A fold that is larger is not written: one commit carries at most 8 MiB.
const ROW_BYTES_MAX: usize = 2 << 20;
const HISTORY_PAGE: u32 = 200;
const RECOVER_AGAIN: Duration = Duration::from_millis(200);

impl State {
    /// Reads its row, and `key` in the same read, unless it is in memory already.
    pub(super) async fn wake(&mut self, key: &IdempotencyKey) -> Result<Option<DedupRow>, Error> {
        if self.fold.is_some() {
            return Ok(None);
        }
        let read = ReadAgent {
            tenant: self.args.id.tenant.to_string(),
            name: self.args.id.name.to_string(),
            key: self.args.id.key.to_string(),
            idempotency_key: key.to_string(),
            id: 0,
        };
        let shard = self.shard().clone();
        let answer = shard
            .store
            .agent(&shard.database, &read)
            .await
            .map_err(|source| self.unread(source))?;
        self.check_owned(answer.epoch)?;
        match answer.agent {
            Some(row) => self.load(row, Vec::new(), None).await?,
            None => {
                self.row = shard.next_row();
                self.keys_complete = true;
                self.fold = Some(Fold::default());
                self.pass(Reason::Activated);
            }
        }
        Ok(answer.dedup)
    }

    /// Into memory, when it is known to exist.
    pub(super) async fn wake_known(&mut self) -> Result<(), Error> {
        let none = "-".parse().expect("a valid key");
        self.wake(&none).await.map(|_| ())
    }

    /// The inputs of works that were accepted before take room, too: as much as there is, because they are here to stay.
    fn take_room(&mut self, fold: &Fold) {
        let inputs = &self.args.shard.node.inputs;
        for turn in fold.open() {
            let mut wanted = u32::try_from(turn.accepted().input.len()).unwrap_or(u32::MAX);
            // Others take and give meanwhile.
            while 0 < wanted {
                if let Ok(room) = inputs.clone().try_acquire_many_owned(wanted) {
                    self.rooms.insert(turn.id(), room);
                    break;
                }
                let left = u32::try_from(inputs.available_permits()).unwrap_or(u32::MAX);
                wanted = (wanted - 1).min(left);
            }
        }
    }

    /// What a later owner wrote is not ours to act on: a node that wakes must not go on where that one is.
    fn check_owned(&self, epoch: u64) -> Result<(), Error> {
        if Epoch(epoch) == self.shard().epoch {
            return Ok(());
        }
        _ = self.args.host.cast(HostMessage::Writer(Event::Stopped(Reason::Fenced)));
        Err(Error::Fenced { shard: self.shard().id })
    }

    fn unread(&self, source: store::Error) -> Error {
        Error::Read { agent: self.args.id.to_string(), source: Box::new(source) }
    }

    /// Folds its snapshot and every entry after it, of which `ahead` was read already.
    async fn load(
        &mut self,
        row: AgentRow,
        ahead: Vec<LogRow>,
        mut share: Option<&mut Share>,
    ) -> Result<(), Error> {
        if let Some(share) = share.as_deref_mut() {
            share.take(row.state.len()).await;
        }
        let shard = self.shard().clone();
        let head = shard.writer.head_of(row.id).unwrap_or(Lsn(row.head));
        let agent = self.args.id.to_string();
        let damaged = |source| Error::Journal { agent: agent.clone(), source };
        let mut entries = Vec::new();
        for row in self.tail(head, Lsn(row.snap_lsn), ahead, share).await? {
            let (seq, lsn, epoch) = (Seq(row.seq), Lsn(row.lsn), Epoch(row.epoch));
            let stamp = Stamp { seq, lsn, epoch, ts_ms: row.ts_ms };
            let entry = journal::decode(row.payload).map_err(damaged)?;
            if let Entry::Accepted(accepted) = &entry {
                shard.definition(accepted.definition).await?;
            }
            entries.push((Lsn(row.work), entry, stamp));
        }
        for hash in journal::definitions_of(&row.state).map_err(damaged)? {
            shard.definition(hash).await?;
        }
        let limits = |hash: &DefinitionHash| shard.node.definitions.limits(hash);
        let (snap, last) = (Lsn(row.snap_lsn), Lsn(row.last_work));
        let mut fold = journal::decode_agent(row.state, snap, last, limits).map_err(damaged)?;
        let saved_seq = fold.seq;
        for (work, entry, stamp) in entries {
            fold.apply(work, entry, stamp, limits)
                .map_err(|source| Error::Fold { agent: agent.clone(), source })?;
        }
        // Whoever drove these works before is gone.
        fold.interrupt();
        for turn in fold.open() {
            shard.opened(turn.id(), AgentId::clone(&self.args.id), turn.deadline_ms());
        }
        self.row = row.id;
        self.row_stored = true;
        self.saved = snap;
        self.saved_seq = saved_seq;
        self.seq = fold.seq;
        self.take_room(&fold);
        self.fold = Some(fold);
        self.pass(Reason::Activated);
        self.take_over();
        // Whoever woke it, its works go on.
        _ = self.me.cast(AgentMessage::Drive);
        Ok(())
    }

    /// Its entries after `above` up to `head`, oldest first. `ahead` are the newest of them, as far as they are known.
    async fn tail(
        &mut self,
        head: Lsn,
        above: Lsn,
        ahead: Vec<LogRow>,
        mut share: Option<&mut Share>,
    ) -> Result<Vec<LogRow>, Error> {
        let shard = self.shard().clone();
        let mut rows: Vec<LogRow> = Vec::new();
        let mut from = head;
        for row in ahead {
            if from <= above || Lsn(row.lsn) != from {
                break;
            }
            from = Lsn(row.prev);
            rows.push(row);
        }
        while above < from {
            let read = ReadHistory { from: from.0, above: above.0, limit: HISTORY_PAGE };
            let page = shard
                .store
                .history(&shard.database, &read)
                .await
                .map_err(|source| self.unread(source))?;
            self.check_owned(page.epoch)?;
            let Some(last) = page.rows.last() else { break };
            from = Lsn(last.prev);
            if let Some(share) = share.as_deref_mut() {
                share.take(page.rows.iter().map(|row| row.payload.len()).sum()).await;
            }
            rows.extend(page.rows);
        }
        rows.reverse();
        Ok(rows)
    }

    /// Takes up what its last owner left.
    pub(super) async fn recover(&mut self, due: Due) -> Result<(), ActorProcessingErr> {
        let Due { row, ahead, mut share } = due;
        if self.fold.is_none() {
            let (agent, shard) = (self.args.id.clone(), self.shard().id);
            let span = tracing::info_span!("recover", %agent, %shard);
            let loading = self.load(row.clone(), ahead, Some(&mut share));
            if let Err(error) = loading.instrument(span).await {
                return self.recover_later(row, share, error);
            }
            metrics::RECOVERED.inc();
        }
        point("agent-recovered");
        drop(share);
        self.drive()
    }

    /// As [`State::recover`], for an agent whose host has no row of it.
    pub(super) async fn resume(&mut self) -> Result<(), ActorProcessingErr> {
        match self.wake_known().await {
            Ok(()) => self.drive(),
            Err(error) if error.kind().is_retryable() => {
                self.me.send_after(RECOVER_AGAIN, || AgentMessage::Resume);
                Ok(())
            }
            Err(error) => Err(Box::new(error)),
        }
    }

    /// A store that does not answer is waited for; a journal that cannot be folded is a failure of this agent.
    fn recover_later(
        &self,
        row: AgentRow,
        share: Share,
        error: Error,
    ) -> Result<(), ActorProcessingErr> {
        if !error.kind().is_retryable() {
            return Err(Box::new(error));
        }
        tracing::warn!(agent = %self.args.id, error = &error as &dyn std::error::Error, "cannot recover yet");
        // Others whose store answers are not kept waiting by it.
        drop(share);
        let (room, me) = (self.shard().node.recovering.clone(), self.me.clone());
        tokio::spawn(async move {
            tokio::time::sleep(RECOVER_AGAIN).await;
            if let Some(share) = room.begin_one().await {
                let due = Box::new(Due { row, ahead: Vec::new(), share });
                _ = me.cast(AgentMessage::Recover(due));
            }
        });
        Ok(())
    }

    /// Writes its row when its entries since the last time are many.
    pub(super) fn snapshot_if_due(&mut self) {
        let Some(fold) = &self.fold else { return };
        let every = if fold.open_len() == 0 { SNAPSHOT_IDLE_EVERY } else { SNAPSHOT_EVERY };
        if self.saved_seq.0 + every <= fold.seq.0 && self.pending.is_empty() {
            self.write_row();
        }
    }

    /// Appends its row as it is now. Only when no entry of it is under way: the row must be the fold of a prefix.
    fn write_row(&mut self) {
        let Some(fold) = &self.fold else { return };
        let row = AgentRow {
            id: self.row,
            tenant: self.args.id.tenant.to_string(),
            name: self.args.id.name.to_string(),
            key: self.args.id.key.to_string(),
            head: fold.head.0,
            snap_lsn: fold.head.0,
            last_work: fold.last_work.0,
            state: journal::encode_agent(fold),
        };
        if ROW_BYTES_MAX < row.state.len() {
            // Its open works are large: the journal holds them, and the row is written when they have ended.
            return;
        }
        let pending = Pending::Row { head: fold.head, seq: fold.seq };
        let mut append = self.new_append(tracing::Span::none());
        append.agents.push(row);
        self.append(append, pending);
    }

    /// Writes its row because too many rows of the shard are old.
    pub(super) async fn persist(&mut self) -> Result<(), ActorProcessingErr> {
        match self.wake_known().await {
            Ok(()) => {}
            // The writer asks again with its next mark. What is in quarantine has said why, and goes on saying it.
            Err(error) if self.quarantined || error.kind().is_retryable() => return Ok(()),
            Err(error) => return Err(Box::new(error)),
        }
        let head = self.fold.as_ref().map_or(Lsn(0), |fold| fold.head);
        if self.pending.is_empty() && self.saved < head {
            self.write_row();
        }
        Ok(())
    }

    /// Into memory, or out of it: told with its row.
    fn pass(&mut self, reason: Reason) {
        let passage = Passage { at_ms: clock::now_ms(), epoch: self.shard().epoch, reason };
        self.passage_saved = false;
        if reason == Reason::Activated {
            self.args.glance.since_ms.store(passage.at_ms, Ordering::Relaxed);
        }
        if let Some(fold) = &mut self.fold {
            fold.pass(passage);
        }
    }

    /// Leaves memory if there is nothing to do: first its row, then itself.
    pub(super) fn passivate(&mut self) {
        if self.is_busy() {
            if let Some(fold) = &mut self.fold {
                fold.stay();
            }
            _ = self.args.host.cast(HostMessage::Stayed(AgentId::clone(&self.args.id)));
            return;
        }
        if self.is_row_due() {
            self.write_row();
            if !self.pending.is_empty() {
                // The host has stopped sending; this comes round again once the row is durable.
                let me = self.me.clone();
                let writer = self.shard().writer.clone();
                tokio::spawn(async move {
                    writer.settled().await;
                    _ = me.cast(AgentMessage::Passivate);
                });
                return;
            }
            // It is too large to be written; it stays cold without its snapshot.
        }
        metrics::EVICTED.inc();
        self.me.stop(Some(Reason::Idle.to_string()));
    }

    /// Whether its row has to be written before it leaves: it holds the fold, and that the agent left.
    fn is_row_due(&mut self) -> bool {
        // One that has nothing but its name has no row.
        let Some(fold) = self.fold.as_ref().filter(|fold| fold.head != Lsn(0)) else {
            return false;
        };
        let is_behind = self.saved < fold.head;
        if fold.passages().last().is_none_or(|last| last.reason != Reason::Idle) {
            self.pass(Reason::Idle);
        }
        is_behind || !self.passage_saved
    }
}
