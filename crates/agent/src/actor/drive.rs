//! The turn: asks the fold what is next, journals it, and only then does it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::ActorProcessingErr;

use cluster::Reply;
use domain::chain::Output;
use domain::entry::{Ended, Entry, PhaseDone, Stamp, Usage};
use domain::turn::{self, Failure, Next, Turn};
use domain::view::View;
use domain::{DefinitionHash, ErrorKind, Lsn, Reason, StepKey, WorkState};
use proto::journal;
use proto::link::{PhaseAnswer, PhaseJob, WorkEnd};
use store::writer::Committed;

use super::{AgentMessage, Answer, Pending, Running, State, WantedEnd};
use crate::dispatch::{Outcome, Target};
use crate::{clock, info, metrics, read};

impl State {
    /// Does what is next, unless something that it rests on is still on its way.
    pub(super) fn drive(&mut self) -> Result<(), ActorProcessingErr> {
        self.snapshot_if_due();
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.current()) else {
            self.span = None;
            self.shrink();
            return Ok(());
        };
        let work = turn.id();
        let is_open = !self.ending.contains(&work);
        if is_open && self.began.is_none_or(|(of, _)| of != work) {
            self.began(work);
        }
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return Ok(()) };
        if turn.accepted().deadline_ms <= clock::now_ms() {
            return self.overdue(work);
        }
        let waits = self.running.is_some() || self.is_journaling(work);
        if waits || self.hold_until.is_some_and(|until| Instant::now() < until) {
            return Ok(());
        }
        match turn.next() {
            Next::Run { step, attempt } => self.run(work, step, attempt),
            Next::Begin(began) => self.journal(work, vec![Entry::StepBegan(began)], None),
            Next::End(ended) => self.journal(work, vec![Entry::Ended(ended)], None),
            Next::Nothing => {}
        }
        Ok(())
    }

    fn is_journaling(&self, work: Lsn) -> bool {
        self.pending.iter().any(|pending| match pending {
            Pending::Entries { work: other, .. } => *other == work,
            Pending::Accept { .. } | Pending::Row { .. } => false,
        })
    }

    /// Sends a step to a pool, or says in the journal that nobody offers it.
    fn run(&mut self, work: Lsn, step: StepKey, attempt: u32) {
        let shard = self.shard().clone();
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return };
        let hash = turn.accepted().definition;
        let Some(known) = shard.node.definitions.get(&hash) else { return self.fetch(hash) };
        let modality = known.definition.modality.clone();
        let view = shard.node.view.load_full();
        let target = shard.node.dispatcher.target(view.as_deref(), step.phase, &modality);
        let is_waiting = turn.state() == WorkState::Waiting;
        match target {
            Target::Nowhere if is_waiting => self.wait_for_offer(view.as_ref()),
            Target::Nowhere => self.journal(work, vec![Entry::Waiting(Reason::NoOffer)], None),
            Target::Later => self.again_after(Duration::from_millis(50)),
            Target::Here | Target::There(_) if is_waiting => {
                self.journal(work, vec![Entry::Resumed(Reason::OfferAppeared)], None);
            }
            Target::Here | Target::There(_) => {
                let job = self.job(work, step, attempt, &known.definition);
                self.send(work, step, attempt, target, job);
            }
        }
    }

    /// Gets a definition that was crowded out of memory, then looks again. Until the deadline: it may come from a control
    /// replica that is away now.
    fn fetch(&self, hash: DefinitionHash) {
        let (shard, me) = (self.shard().clone(), self.me.clone());
        tokio::spawn(async move {
            if shard.definition(hash).await.is_err() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            _ = me.cast(AgentMessage::Drive);
        });
    }

    /// Is woken by the next view; if that came while this one was looked at, looks again at once.
    fn wait_for_offer(&self, seen: Option<&Arc<View>>) {
        let shard = self.shard();
        shard.waits(self.args.id.clone());
        let now = shard.node.view.load_full();
        let is_same = match (seen, &now) {
            (Some(seen), Some(now)) => Arc::ptr_eq(seen, now),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if !is_same {
            _ = self.me.cast(AgentMessage::Drive);
        }
    }

    fn job(
        &self,
        work: Lsn,
        step: StepKey,
        attempt: u32,
        definition: &domain::Definition,
    ) -> PhaseJob {
        let fold = self.fold.as_ref();
        let turn = fold.and_then(|fold| fold.turn(work)).expect("the work that is driven is open");
        let accepted = turn.accepted();
        let findings = match step.phase {
            domain::Phase::Experience => {
                fold.map(|fold| fold.findings().map(str::to_owned).collect())
            }
            domain::Phase::Action
            | domain::Phase::Intention
            | domain::Phase::Observation
            | domain::Phase::Understanding
            | domain::Phase::Yield => None,
        };
        let id = domain::WorkId { class: accepted.class, slot: accepted.slot, lsn: work };
        PhaseJob {
            work: id.to_string(),
            phase: step.phase.code(),
            cycle: step.cycle,
            attempt,
            model: definition.model.clone(),
            modality: definition.modality.clone(),
            instructions: definition.instructions.clone(),
            input: accepted.input.clone(),
            earlier: turn.phases().map(|(_, done)| done.output.clone()).collect(),
            findings: findings.unwrap_or_default(),
        }
    }

    fn send(&mut self, work: Lsn, step: StepKey, attempt: u32, target: Target, job: PhaseJob) {
        if self.is_journaling(work) {
            metrics::STEPS_EARLY.inc();
        }
        let here = target == Target::Here;
        self.running = Some(Running { work, step, attempt, here });
        let traceparent = self.traceparent(work);
        let shard = self.shard().clone();
        let me = self.me.clone();
        let deadline = self.step_deadline(work);
        tokio::spawn(async move {
            let outcome = shard.node.dispatcher.run(target, job, traceparent, deadline).await;
            _ = me.cast(AgentMessage::Answered(Answer { work, step, attempt, outcome }));
        });
    }

    fn step_deadline(&self, work: Lsn) -> Instant {
        let timeout = Duration::from_millis(self.shard().node.config.phase_timeout_ms);
        let latest = Instant::now() + timeout;
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        turn.map_or(latest, |turn| clock::instant_at(turn.accepted().deadline_ms).min(latest))
    }

    /// The trace context of the turn's span, made when the turn begins; empty when nobody traces.
    fn traceparent(&mut self, work: Lsn) -> String {
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let Some(parent) = turn.and_then(|turn| turn.accepted().traceparent.clone()) else {
            return String::new();
        };
        if self.span.as_ref().is_none_or(|(of, _)| *of != work) {
            let node = self.shard().node.name.as_str();
            let span = tracing::info_span!("turn", agent = %self.args.id, work = work.0, node);
            telemetry::set_parent(&span, Some(&parent));
            self.span = Some((work, span));
        }
        let span = self.span.as_ref().map(|(_, span)| span.clone());
        span.and_then(|span| span.in_scope(telemetry::current_traceparent)).unwrap_or(parent)
    }

    /// Journals what came of a step; an answer that nobody waits for is dropped.
    pub(super) fn answered(&mut self, answer: Answer) -> Result<(), ActorProcessingErr> {
        let Answer { work, step, attempt, outcome } = answer;
        let expected = self.running.filter(|running| {
            (running.work, running.step, running.attempt) == (work, step, attempt)
        });
        let Some(running) = expected else {
            metrics::STEPS_LATE.inc();
            return Ok(());
        };
        self.running = None;
        if self.ending.contains(&work) {
            metrics::STEPS_LATE.inc();
            return self.drive();
        }
        match outcome {
            Outcome::Done(answer) => self.done(running, answer),
            Outcome::NotRun { after } => self.again_after(after),
            Outcome::Failed(failure) => {
                let failure =
                    Failure { kind: failure.kind, reason: failure.reason, detail: failure.detail };
                self.step_failed(work, attempt, failure);
            }
        }
        Ok(())
    }

    fn done(&mut self, running: Running, answer: PhaseAnswer) {
        let Running { work, step, attempt, here } = running;
        if let Err(error) = Output::parse(step.phase, &answer.output) {
            let failure = Failure {
                kind: ErrorKind::Invalid,
                reason: Reason::ModelAnswerInvalid,
                detail: error.to_string(),
            };
            return self.step_failed(work, attempt, failure);
        }
        metrics::STEPS.inc();
        if !here {
            metrics::STEPS_REMOTE.inc();
        }
        let done = PhaseDone {
            step,
            output: answer.output,
            node: answer.node,
            attempts: attempt,
            start_ms: answer.start_ms,
            end_ms: answer.end_ms,
            usage: Usage {
                calls: answer.calls,
                input_tokens: answer.input_tokens,
                output_tokens: answer.output_tokens,
            },
        };
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let ended = turn.and_then(|turn| turn.end_after(&done));
        let mut entries = vec![Entry::PhaseDone(done)];
        entries.extend(ended.map(Entry::Ended));
        self.journal(work, entries, None);
    }

    fn step_failed(&mut self, work: Lsn, attempt: u32, failure: Failure) {
        tracing::warn!(agent = %self.args.id, work = work.0, attempt, reason = %failure.reason, "a step failed");
        if failure.reason == Reason::ModelUnavailable {
            let backoff = Duration::from_millis(100 << attempt.min(6));
            self.hold_until = Some(Instant::now() + backoff);
            self.again_after(backoff);
        }
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        if let Some(entry) = turn.map(|turn| turn.failed(attempt, failure)) {
            self.journal(work, vec![entry], None);
        }
    }

    /// Appends entries of `work`, in one batch; if they end it, its row is ended in the same batch.
    pub(super) fn journal(&mut self, work: Lsn, entries: Vec<Entry>, reply: Option<Reply>) {
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return };
        let ts_ms = clock::now_ms();
        let end = end_of(self.shard().epoch, turn, &entries, ts_ms);
        let entries: Vec<_> = entries
            .into_iter()
            .map(|entry| {
                let payload = journal::encode(&entry);
                (entry, payload)
            })
            .collect();
        let mut append = self.new_append();
        for (entry, payload) in &entries {
            let row = self.next_row(entry, work, payload.clone(), ts_ms);
            append.rows.push(row);
        }
        if let Some(end) = end {
            append.ends.push(end);
            self.ending.insert(work);
        }
        self.append(append, Pending::Entries { work, entries, ts_ms, reply });
    }

    /// Entries of `work` are durable: fold them, tell who watches.
    pub(super) fn journaled(
        &mut self,
        work: Lsn,
        entries: Vec<(Entry, bytes::Bytes)>,
        ts_ms: i64,
        committed: Committed,
        reply: Option<Reply>,
    ) -> Result<(), ActorProcessingErr> {
        let shard = self.shard().clone();
        let fold = self.fold.as_mut().ok_or("entries before the first read")?;
        let limits = |hash: &_| shard.node.definitions.limits(hash);
        let mut ended = None;
        let mut shown = Vec::with_capacity(entries.len());
        for (lsn, (entry, payload)) in (committed.first.0..).zip(entries) {
            let stamp = Stamp { seq: fold.seq.next(), lsn: Lsn(lsn), epoch: shard.epoch, ts_ms };
            let over = fold.apply(work, entry, stamp, limits)?;
            ended = ended.or(over);
            shown.push((stamp, payload));
        }
        match ended {
            Some(turn) => self.ended(work, &turn, &shown, reply),
            None => self.show_watchers(work, &shown),
        }
        Ok(())
    }

    fn ended(
        &mut self,
        work: Lsn,
        turn: &Turn,
        shown: &[(Stamp, bytes::Bytes)],
        reply: Option<Reply>,
    ) {
        let shard = self.shard().clone();
        let info = info::of_ended(&self.args.id, turn);
        metrics::ENDED.with_label_values(&[turn.state().as_str(), turn.reason().as_str()]).inc();
        self.ending.remove(&work);
        self.hold_until = None;
        self.rooms.remove(&work);
        shard.ended(work);
        if let Some(reply) = reply {
            super::accept::answer_cancel(reply, info.clone(), shard.position());
        }
        for watcher in self.watchers.remove(&work).unwrap_or_default() {
            self.send_entries(&watcher, work, shown, Some(info.clone()));
        }
        if self.running.is_some_and(|running| running.work == work) {
            // Its answer finds nobody.
            self.running = None;
        }
    }

    /// Ends an open work because a client asked for it.
    pub(super) async fn cancel(
        &mut self,
        work: Lsn,
        reply: Reply,
    ) -> Result<(), ActorProcessingErr> {
        if let Err(error) = self.wake_known().await {
            self.refuse(reply, error.reason(), &error.to_string());
            return Ok(());
        }
        let open = self.fold.as_ref().is_some_and(|fold| fold.turn(work).is_some());
        if !open || self.ending.contains(&work) {
            let shard = self.shard().clone();
            let writer = shard.writer.clone();
            tokio::spawn(async move {
                writer.settled().await;
                read::cancelled(&shard, work, reply).await;
            });
            return Ok(());
        }
        let reason = Reason::CancelRequested;
        let ended = turn::ended(WorkState::Cancelled, reason);
        let entries = vec![Entry::CancelRequested(reason), Entry::Ended(ended)];
        self.end(WantedEnd { work, entries, reply: Some(reply) });
        Ok(())
    }

    /// Fails a work whose deadline passed.
    pub(super) fn overdue(&mut self, work: Lsn) -> Result<(), ActorProcessingErr> {
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let late = turn.is_some_and(|turn| turn.accepted().deadline_ms <= clock::now_ms());
        if late && !self.ending.contains(&work) {
            let ended = turn::ended(WorkState::Failed, Reason::DeadlineExceeded);
            self.end(WantedEnd { work, entries: vec![Entry::Ended(ended)], reply: None });
        }
        Ok(())
    }

    /// Ends a work now, or once what is being journaled of it is folded: its record holds everything that it did.
    fn end(&mut self, wanted: WantedEnd) {
        if !self.is_journaling(wanted.work) {
            return self.journal(wanted.work, wanted.entries, wanted.reply);
        }
        if self.wanted.is_none() {
            self.wanted = Some(wanted);
            return;
        }
        // The first of a cancel and another end wins; who comes later asks again and is told how it ended.
        if let Some(reply) = wanted.reply {
            self.refuse(reply, Reason::Overloaded, "the work is being ended");
        }
    }

    pub(super) fn end_wanted(&mut self) {
        let work = self.wanted.as_ref().map(|wanted| wanted.work);
        if work.is_none_or(|work| self.is_journaling(work)) {
            return;
        }
        let Some(WantedEnd { work, entries, reply }) = self.wanted.take() else { return };
        let is_open = self.fold.as_ref().is_some_and(|fold| fold.turn(work).is_some());
        match (is_open, reply) {
            (true, reply) => self.journal(work, entries, reply),
            (false, Some(reply)) => {
                let shard = self.shard().clone();
                tokio::spawn(async move { read::cancelled(&shard, work, reply).await });
            }
            (false, None) => {}
        }
    }

    /// Ends every open work: this agent failed too often to be trusted with them.
    pub(super) async fn quarantine(&mut self) -> Result<(), ActorProcessingErr> {
        self.quarantined = true;
        if let Err(error) = self.wake_known().await {
            // Nothing can be appended to a journal that cannot be folded: its works stay open for an operator.
            let is_retryable = error.kind().is_retryable();
            let error = &error as &dyn std::error::Error;
            tracing::error!(agent = %self.args.id, error, "the works of this agent cannot be ended");
            if is_retryable {
                self.me.send_after(Duration::from_secs(1), || AgentMessage::Quarantine);
            }
            return Ok(());
        }
        let open: Vec<Lsn> = self.fold.iter().flat_map(|fold| fold.open().map(Turn::id)).collect();
        for work in open {
            let ended = turn::ended(WorkState::DeadLettered, Reason::Quarantined);
            self.journal(work, vec![Entry::Ended(ended)], None);
        }
        Ok(())
    }
}

/// The end of a work's row, if `entries` end the work.
fn end_of(epoch: domain::Epoch, turn: &Turn, entries: &[Entry], ts_ms: i64) -> Option<WorkEnd> {
    let Some(Entry::Ended(ended)) = entries.last() else { return None };
    let done = entries.iter().find_map(|entry| match entry {
        Entry::PhaseDone(done) => Some(done),
        Entry::ShardOpened(_)
        | Entry::Accepted(_)
        | Entry::StepBegan(_)
        | Entry::Waiting(_)
        | Entry::Resumed(_)
        | Entry::CancelRequested(_)
        | Entry::Ended(_) => None,
    });
    let Ended { state, reason, .. } = ended;
    Some(WorkEnd {
        id: turn.id().0,
        state: journal::state_code(*state),
        reason: reason.code().into(),
        end_ms: ts_ms,
        record: info::record(turn, epoch, done, ended),
    })
}
