//! The turn: asks the fold what is next, journals it, and only then does it.

use std::time::{Duration, Instant};

use ractor::ActorProcessingErr;

use cluster::Reply;
use domain::contest::{self, ToEnd, Underway};
use domain::entry::{Entry, Stamp};
use domain::turn::{Next, Stop, Turn};
use domain::{Lsn, Reason};
use proto::journal;
use proto::link::{WorkEnd, WorkInfo};
use store::writer::Committed;
use telemetry::fault::point;

use super::{AgentMessage, Pending, State, Told, WantedEnd, accept, doubt};
use crate::{clock, info, metrics, read};

impl State {
    /// Does what is next, unless something that it rests on is still on its way.
    pub(super) fn drive(&mut self) -> Result<(), ActorProcessingErr> {
        self.snapshot_if_due();
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.current()) else {
            self.began = None;
            self.shrink();
            return Ok(());
        };
        let work = turn.id();
        let is_open = !self.ending.contains(&work);
        if is_open && self.began.as_ref().is_none_or(|began| began.work != work) {
            self.began(work);
        }
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return Ok(()) };
        if turn.deadline_ms() <= clock::now_ms() {
            return self.overdue(work);
        }
        let waits = self.running.is_some() || self.is_journaling(work);
        if waits || self.hold_until.is_some_and(|until| Instant::now() < until) {
            return Ok(());
        }
        let next = turn.next();
        if let Next::Run { not_before_ms, .. } | Next::Settle { not_before_ms, .. } = next {
            let shard = self.shard();
            let held = Duration::from_millis(turn.hold_after_opening_ms(shard.epoch));
            // Who made the call goes by its own clock, too.
            let left = match held.is_zero() {
                true => clock::until(not_before_ms),
                false => held.saturating_sub(shard.started.elapsed()),
            };
            if !left.is_zero() {
                self.hold(left);
                return Ok(());
            }
        }
        match next {
            Next::Run { step, attempt, .. } => self.run(work, step, attempt),
            Next::Settle { step, attempt, .. } => self.settle(work, step, attempt),
            Next::Begin(began) => self.journal(work, vec![Entry::StepBegan(began)], None),
            Next::Doubt(doubted) => self.doubt(work, doubted),
            Next::End(ended) => self.journal(work, vec![Entry::Ended(ended)], None),
            Next::Nothing => {}
        }
        Ok(())
    }

    /// What is under way of a work, beside its fold.
    pub(super) fn underway(&self, work: Lsn) -> Underway {
        Underway {
            is_ending: self.ending.contains(&work),
            is_journaling: self.is_journaling(work),
            is_end_wanted: self.wanted.is_some(),
        }
    }

    pub(super) fn is_journaling(&self, work: Lsn) -> bool {
        self.pending.iter().any(|pending| match pending {
            Pending::Entries { work: other, .. } => *other == work,
            Pending::Accept { .. } | Pending::Row { .. } => false,
        })
    }

    /// Appends entries of `work`, in one batch; if they end it, its row is ended in the same batch.
    pub(super) fn journal(&mut self, work: Lsn, entries: Vec<Entry>, told: Option<Told>) {
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
        let mut append = self.new_append(self.commit_span(work));
        for (entry, payload) in &entries {
            let row = self.next_row(entry, work, payload.clone(), ts_ms);
            append.rows.push(row);
        }
        if let Some(end) = end {
            append.ends.push(end);
            self.ending.insert(work);
        }
        self.append(append, Pending::Entries { work, entries, ts_ms, told });
    }

    /// Entries of `work` are durable: fold them, tell who watches.
    pub(super) fn journaled(
        &mut self,
        work: Lsn,
        entries: Vec<(Entry, bytes::Bytes)>,
        ts_ms: i64,
        committed: Committed,
        told: Option<Told>,
    ) -> Result<(), ActorProcessingErr> {
        let shard = self.shard().clone();
        let fold = self.fold.as_mut().ok_or("entries before the first read")?;
        let limits = |hash: &_| shard.node.definitions.limits(hash);
        let mut ended = None;
        let mut shown = Vec::with_capacity(entries.len());
        if let Some((entry, _)) = entries.first() {
            point(journaled(entry));
        }
        self.spoken.take_if(|spoken| spoken.is_over(work, entries.iter().map(|(entry, _)| entry)));
        for (lsn, (entry, payload)) in (committed.first.0..).zip(entries) {
            let stamp = Stamp { seq: fold.seq.next(), lsn: Lsn(lsn), epoch: shard.epoch, ts_ms };
            let over = fold.apply(work, entry, stamp, limits)?;
            ended = ended.or(over);
            shown.push((stamp, payload));
        }
        let info = match &ended {
            Some(turn) => Some(self.ended(work, turn, &shown)),
            None => {
                self.show_watchers(work, &shown);
                None
            }
        };
        if let (Some(turn), Some(info)) = (&ended, &info) {
            shard.recent.put(turn, info.clone());
        }
        self.tell(work, told, info);
        Ok(())
    }

    /// Tells who waited for entries of `work`; `info` is the work, if they ended it.
    fn tell(&self, work: Lsn, told: Option<Told>, info: Option<WorkInfo>) {
        let shard = self.shard();
        let info = || {
            let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
            info.or_else(|| turn.map(|turn| info::of_turn(&self.args.id, turn))).unwrap_or_default()
        };
        match told {
            Some(Told::Cancel(reply)) => accept::answer_cancel(reply, info(), self.position()),
            Some(Told::Signal(reply)) => doubt::answer_signal(reply, info(), self.position()),
            Some(Told::Worker(reply)) => reply.send(bytes::Bytes::new()),
            Some(Told::Pool(place, attempt)) => shard.node.dispatcher.kept(&place, attempt),
            None => {}
        }
    }

    fn ended(&mut self, work: Lsn, turn: &Turn, shown: &[(Stamp, bytes::Bytes)]) -> WorkInfo {
        let shard = self.shard().clone();
        let info = info::of_ended(&self.args.id, turn);
        metrics::ENDED.with_label_values(&[turn.state().as_str(), turn.reason().as_str()]).inc();
        point("turn-ended");
        self.ending.remove(&work);
        (self.hold_until, self.intended, self.asked) = (None, None, None);
        self.rooms.remove(&work);
        shard.ended(work);
        for watcher in self.watchers.remove(&work).unwrap_or_default() {
            self.send_entries(&watcher, work, shown, Some(info.clone()));
        }
        if self.running.as_ref().is_some_and(|running| running.work.lsn == work) {
            // Its answer finds nobody.
            self.running = None;
        }
        info
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
        if !open || contest::to_end(self.underway(work)) == ToEnd::TooLate {
            let shard = self.shard().clone();
            let writer = shard.writer.clone();
            tokio::spawn(async move {
                writer.settled().await;
                read::cancelled(&shard, work, reply).await;
            });
            return Ok(());
        }
        self.end(WantedEnd { work, stop: Stop::Cancel, reply: Some(reply) });
        Ok(())
    }

    /// Fails a work whose deadline passed.
    pub(super) fn overdue(&mut self, work: Lsn) -> Result<(), ActorProcessingErr> {
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        if turn.is_some_and(|turn| turn.deadline_ms() <= clock::now_ms()) {
            self.end(WantedEnd { work, stop: Stop::Deadline, reply: None });
        }
        Ok(())
    }

    fn end(&mut self, wanted: WantedEnd) {
        let WantedEnd { work, stop, reply } = wanted;
        match contest::to_end(self.underway(work)) {
            ToEnd::Journal => self.stop(work, stop, reply),
            ToEnd::AfterJournaling => {
                self.wanted = Some(Box::new(WantedEnd { work, stop, reply }));
            }
            ToEnd::TooLate | ToEnd::Busy => {
                if let Some(reply) = reply {
                    self.refuse(reply, Reason::Overloaded, "the work is being ended");
                }
            }
        }
    }

    fn stop(&mut self, work: Lsn, stop: Stop, reply: Option<Reply>) {
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let entries = turn.map(|turn| turn.stopped(stop)).unwrap_or_default();
        if entries.iter().any(|entry| matches!(entry, Entry::StepDoubted(_))) {
            metrics::DOUBTS.inc();
        }
        if !entries.is_empty() {
            self.journal(work, entries, reply.map(Told::Cancel));
        }
    }

    pub(super) fn end_wanted(&mut self) {
        let work = self.wanted.as_ref().map(|wanted| wanted.work);
        if work.is_none_or(|work| self.is_journaling(work)) {
            return;
        }
        let Some(wanted) = self.wanted.take() else { return };
        let WantedEnd { work, stop, reply } = *wanted;
        let is_open = self.fold.as_ref().is_some_and(|fold| fold.turn(work).is_some());
        match (is_open, reply) {
            (true, reply) => self.stop(work, stop, reply),
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
        let open = self.fold.iter().flat_map(|fold| fold.open().map(Turn::id));
        let open: Vec<Lsn> = open.filter(|work| !self.ending.contains(work)).collect();
        for work in open {
            self.stop(work, Stop::Quarantine, None);
        }
        Ok(())
    }
}

/// The place at which an entry is durable and not folded yet.
fn journaled(entry: &Entry) -> &'static str {
    match entry {
        Entry::StepIntended(_) => "intent-journaled",
        Entry::StepDone(done) if done.step.is_tool() => "call-journaled",
        Entry::StepDone(_) => "step-journaled",
        Entry::StepDoubted(_) => "doubt-journaled",
        Entry::StepResolved(_) => "doubt-resolved",
        Entry::ShardOpened(_)
        | Entry::Accepted(_)
        | Entry::StepBegan(_)
        | Entry::Waiting(_)
        | Entry::Resumed(_)
        | Entry::CancelRequested(_)
        | Entry::Ended(_) => "turn-journaled",
    }
}

/// The end of a work's row, if `entries` end the work.
fn end_of(epoch: domain::Epoch, turn: &Turn, entries: &[Entry], ts_ms: i64) -> Option<WorkEnd> {
    let Some(Entry::Ended(ended)) = entries.last() else { return None };
    Some(WorkEnd {
        id: turn.id().0,
        state: journal::state_code(ended.state),
        reason: ended.reason.code().into(),
        end_ms: ts_ms,
        record: journal::encode_record(turn, epoch, entries, ended),
    })
}
