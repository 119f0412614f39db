//! One work as a client follows it: what its owner sends becomes events, each once, over however many subscriptions.
//!
//! Pure: entries go in, events come out. Never opens a subscription.

use domain::WorkId;
use proto::convert::{self, Cursor};
use proto::link::{Events, WatchMode, WorkInfo};
use proto::v1::{self, work_event};
use tokio::sync::OwnedSemaphorePermit;

/// The cursor of a result whose entry was not seen: behind every entry that a work can have.
const SEQ_LAST: u64 = i64::MAX as u64;

/// A work that is followed.
#[derive(Debug)]
pub(crate) struct Follow {
    /// The client's own name for it, on an open stream.
    pub(crate) tag: i64,
    pub(crate) work: WorkId,
    pub(crate) mode: WatchMode,
    /// Events up to here are known to the client already. They are read all the same: steps are counted.
    known: u64,
    /// The last entry that was read.
    last: u64,
    /// Steps so far.
    steps: i32,
    /// Its place among the works that one stream may follow at once.
    _place: Option<OwnedSemaphorePermit>,
}

/// What comes after some events.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    More,
    /// Subscribe anew after [`Follow::last`].
    Again,
    /// That was the last one.
    End,
}

impl Follow {
    /// Follows a work from after the entry `known`; 0: from its beginning.
    pub(crate) fn new(tag: i64, work: WorkId, mode: WatchMode, known: u64) -> Self {
        Self { tag, work, mode, known, last: 0, steps: 0, _place: None }
    }

    pub(crate) fn with_place(self, place: OwnedSemaphorePermit) -> Self {
        Self { _place: Some(place), ..self }
    }

    /// Where a new subscription begins.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// Reads what the owner sent. Events that the client has not seen are added to `out`.
    ///
    /// # Errors
    /// An entry that this version cannot read.
    pub(crate) fn read(
        &mut self,
        events: Events,
        out: &mut Vec<v1::WorkEvent>,
    ) -> Result<Next, proto::journal::Error> {
        for entry in &events.entries {
            if entry.seq <= self.last {
                continue;
            }
            self.last = entry.seq;
            if self.mode == WatchMode::End {
                continue;
            }
            let event = convert::event(self.work, entry, &mut self.steps)?;
            out.extend(event.filter(|_| self.known < entry.seq));
        }
        if let Some(ended) = events.ended {
            out.extend(self.result(ended));
            return Ok(Next::End);
        }
        Ok(if events.closed.is_some() { Next::Again } else { Next::More })
    }

    /// The last event, unless the client has it.
    fn result(&self, ended: WorkInfo) -> Option<v1::WorkEvent> {
        let seq = if self.last == 0 { SEQ_LAST } else { self.last };
        if seq <= self.known {
            return None;
        }
        let time = convert::timestamp(ended.end_ms);
        Some(v1::WorkEvent {
            work: self.work.to_string(),
            cursor: Cursor { work: self.work, seq }.to_text(),
            time,
            event: Some(work_event::Event::Result(without_steps(ended))),
        })
    }
}

/// The work as everything but Get shows it.
pub(crate) fn without_steps(mut info: WorkInfo) -> v1::Work {
    info.steps.clear();
    info.into()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use bytes::Bytes;
    use domain::Reason;
    use domain::entry::{Entry, StepDone, Usage};
    use domain::turn;
    use domain::{Phase, StepKey, WorkState};
    use proto::journal;
    use proto::link::{LogEntry, Refusal};

    pub(crate) fn work() -> WorkId {
        "w-0-001-1".parse().unwrap()
    }

    pub(crate) fn phase(seq: u64, phase: Phase) -> LogEntry {
        let done = StepDone {
            step: StepKey::phase(0, phase),
            name: String::new(),
            output: Bytes::from_static(b"{}"),
            node: "node-1".into(),
            attempts: 1,
            start_ms: 1,
            end_ms: 2,
            usage: Usage::default(),
        };
        entry(seq, &Entry::StepDone(done))
    }

    pub(crate) fn last(seq: u64) -> LogEntry {
        entry(seq, &Entry::Ended(turn::ended(WorkState::Succeeded, Reason::Completed)))
    }

    fn entry(seq: u64, entry: &Entry) -> LogEntry {
        LogEntry { seq, lsn: seq, epoch: 1, work: 1, ts_ms: 5, entry: journal::encode(entry) }
    }

    pub(crate) fn ended() -> Option<WorkInfo> {
        let state = journal::state_code(WorkState::Succeeded);
        Some(WorkInfo { lsn: 1, slot: 1, state, end_ms: 9, ..WorkInfo::default() })
    }

    /// How a test writes an event: the seq of its cursor and the number of its step; 0 for the result.
    pub(crate) fn short(event: &v1::WorkEvent) -> (u64, i32) {
        let seq = Cursor::parse(&event.cursor).unwrap().seq;
        match &event.event {
            Some(work_event::Event::Phase(step)) => (seq, step.sequence),
            Some(work_event::Event::Result(work)) => {
                assert!(work.steps.is_empty());
                (seq, 0)
            }
            other => panic!("{other:?}"),
        }
    }

    fn read(follow: &mut Follow, events: Events) -> (Vec<(u64, i32)>, Next) {
        let mut out = Vec::new();
        let next = follow.read(events, &mut out).unwrap();
        (out.iter().map(short).collect(), next)
    }

    fn sent(entries: Vec<LogEntry>) -> Events {
        Events { entries, ..Events::default() }
    }

    #[test]
    fn no_entry_is_told_twice() {
        let mut follow = Follow::new(0, work(), WatchMode::All, 0);
        let first = sent(vec![phase(2, Phase::Action), phase(4, Phase::Experience)]);
        assert_eq!(read(&mut follow, first.clone()), (vec![(2, 1), (4, 2)], Next::More));
        assert_eq!(read(&mut follow, first), (vec![], Next::More));
        let again = sent(vec![phase(4, Phase::Experience), phase(5, Phase::Intention)]);
        assert_eq!(read(&mut follow, again), (vec![(5, 3)], Next::More));
    }

    #[test]
    fn the_result_is_the_last_event_and_has_a_cursor() {
        let mut follow = Follow::new(0, work(), WatchMode::All, 0);
        let events = Events { ended: ended(), ..sent(vec![phase(7, Phase::Yield), last(8)]) };
        assert_eq!(read(&mut follow, events), (vec![(7, 1), (8, 0)], Next::End));
    }

    #[test]
    fn a_watch_that_goes_on_counts_the_steps_that_it_does_not_tell() {
        let mut follow = Follow::new(0, work(), WatchMode::All, 4);
        let events = sent(vec![
            phase(2, Phase::Action),
            phase(4, Phase::Experience),
            phase(5, Phase::Intention),
        ]);
        assert_eq!(read(&mut follow, events), (vec![(5, 3)], Next::More));
        let events = Events { ended: ended(), ..sent(vec![last(8)]) };
        assert_eq!(read(&mut follow, events), (vec![(8, 0)], Next::End));
    }

    #[test]
    fn after_the_result_there_is_nothing() {
        let mut follow = Follow::new(0, work(), WatchMode::All, 8);
        let events = Events { ended: ended(), ..sent(vec![phase(7, Phase::Yield), last(8)]) };
        assert_eq!(read(&mut follow, events), (vec![], Next::End));
    }

    #[test]
    fn a_work_whose_entries_are_gone_still_has_its_result() {
        let mut follow = Follow::new(0, work(), WatchMode::All, 5);
        let events = Events { ended: ended(), ..Events::default() };
        assert_eq!(read(&mut follow, events), (vec![(SEQ_LAST, 0)], Next::End));
    }

    #[test]
    fn who_wants_the_end_is_told_the_end() {
        let mut follow = Follow::new(0, work(), WatchMode::End, 0);
        let events = Events { ended: ended(), ..sent(vec![phase(7, Phase::Yield), last(8)]) };
        assert_eq!(read(&mut follow, events), (vec![(8, 0)], Next::End));
    }

    #[test]
    fn a_closed_subscription_is_made_anew() {
        let mut follow = Follow::new(0, work(), WatchMode::All, 0);
        let closed =
            Events { closed: Some(Refusal::default()), ..sent(vec![phase(2, Phase::Action)]) };
        assert_eq!(read(&mut follow, closed), (vec![(2, 1)], Next::Again));
        assert_eq!(follow.last(), 2);
    }
}
