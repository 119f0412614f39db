//! One work as a client follows it: what its owner sends becomes events, each once, over however many subscriptions.
//!
//! Pure: entries go in, events come out. Never opens a subscription.

use domain::{Epoch, Lsn, Position, WorkId};
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
    /// Events up to here, seq and offset, are known to the client already. They are read all the same: steps are counted.
    known: (u64, u64),
    /// The last entry that was read.
    last: u64,
    /// The entry of the acceptance; 0 until it was read.
    accepted: u64,
    /// The beginning of its turn was told, or is told no more.
    has_begun: bool,
    /// It was told that earlier events are gone.
    is_reset: bool,
    /// Where the last entry that was read stands.
    at: Option<Position>,
    /// Steps so far.
    steps: i32,
    /// Its place among the works that one stream may follow at once.
    _place: Option<OwnedSemaphorePermit>,
}

/// An event for the client.
#[derive(Debug, PartialEq)]
pub(crate) struct Told {
    pub(crate) event: v1::WorkEvent,
    /// Where its entry stands; none for an event without one.
    pub(crate) position: Option<Position>,
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
    /// Follows a work from its beginning.
    pub(crate) fn new(tag: i64, work: WorkId, mode: WatchMode) -> Self {
        let (known, last, accepted, at, steps) = ((0, 0), 0, 0, None, 0);
        let (has_begun, is_reset, place) = (false, false, None);
        Self {
            tag,
            work,
            mode,
            known,
            last,
            accepted,
            has_begun,
            is_reset,
            at,
            steps,
            _place: place,
        }
    }

    /// Follows a work from after the event that `cursor` marks.
    pub(crate) fn after(tag: i64, cursor: Cursor) -> Self {
        let known = (cursor.seq, cursor.offset);
        Self { known, ..Self::new(tag, cursor.work, WatchMode::All) }
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
        out: &mut Vec<Told>,
    ) -> Result<Next, proto::journal::Error> {
        for entry in &events.entries {
            if entry.seq <= self.last {
                continue;
            }
            self.last = entry.seq;
            self.at = Some(Position { epoch: Epoch(entry.epoch), lsn: Lsn(entry.lsn) });
            if self.mode == WatchMode::End {
                continue;
            }
            if entry.lsn == self.work.lsn.0 {
                self.accepted = entry.seq;
            }
            if self.accepted == 0 {
                out.extend(self.reset(entry.seq));
            }
            if let Some(at_ms) = convert::shows_turn(entry)? {
                out.extend(self.begin(at_ms));
            }
            let mut event = convert::event(self.work, entry, &mut self.steps)?;
            if self.accepted == 0 {
                event.iter_mut().for_each(forget_sequence);
            }
            let event = event.filter(|_| self.known < (entry.seq, 0));
            out.extend(event.map(|event| Told { event, position: self.at }));
        }
        if events.began_ms != 0 && self.mode == WatchMode::All {
            out.extend(self.begin(events.began_ms));
        }
        if let Some(ended) = events.ended {
            if self.last == 0 && self.mode == WatchMode::All {
                out.extend(self.reset(SEQ_LAST));
            }
            out.extend(self.result(ended));
            return Ok(Next::End);
        }
        Ok(if events.closed.is_some() { Next::Again } else { Next::More })
    }

    /// Its turn began. That has no entry of its own, so it stands after the acceptance, whoever shows it first.
    fn begin(&mut self, at_ms: i64) -> Option<Told> {
        let is_news = !std::mem::replace(&mut self.has_begun, true) && self.accepted != 0;
        let event = || convert::began(self.work, self.accepted, at_ms);
        (is_news && self.known < (self.accepted, 1))
            .then(|| Told { event: event(), position: None })
    }

    /// What came before the entry `next` was deleted. If the client may not have seen all of it, it is told so, once.
    fn reset(&mut self, next: u64) -> Option<Told> {
        let is_news = !std::mem::replace(&mut self.is_reset, true);
        let seq = next.saturating_sub(1);
        (is_news && self.known.0 < seq).then(|| {
            let cursor = Cursor { work: self.work, seq, offset: 0 }.to_text();
            let event = Some(work_event::Event::Reset(work_event::Reset {}));
            let event = v1::WorkEvent { work: self.work.to_string(), cursor, time: None, event };
            Told { event, position: None }
        })
    }

    /// The last event, unless the client has it.
    fn result(&self, ended: WorkInfo) -> Option<Told> {
        let seq = if self.last == 0 { SEQ_LAST } else { self.last };
        if (seq, 0) <= self.known {
            return None;
        }
        let time = convert::timestamp(ended.end_ms);
        let event = v1::WorkEvent {
            work: self.work.to_string(),
            cursor: Cursor { work: self.work, seq, offset: 0 }.to_text(),
            time,
            event: Some(work_event::Event::Result(without_steps(ended))),
        };
        Some(Told { event, position: self.at })
    }
}

/// How many steps were before this one is not known: their entries are gone.
fn forget_sequence(event: &mut v1::WorkEvent) {
    if let Some(work_event::Event::Phase(step) | work_event::Event::Step(step)) = &mut event.event {
        step.sequence = 0;
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
    use domain::entry::{Accepted, Entry, StepDone, Usage};
    use domain::turn;
    use domain::{Class, DefinitionHash, Phase, Slot, StepKey, WorkState};
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

    pub(crate) fn accepted(seq: u64) -> LogEntry {
        let accepted = Accepted {
            definition: DefinitionHash([0; 32]),
            input: Bytes::new(),
            key: "k".parse().unwrap(),
            deadline_ms: 1,
            traceparent: None,
            class: Class(0),
            slot: Slot::new(1).unwrap(),
        };
        LogEntry { lsn: 1, ..entry(seq, &Entry::Accepted(accepted)) }
    }

    pub(crate) fn last(seq: u64) -> LogEntry {
        entry(seq, &Entry::Ended(turn::ended(WorkState::Succeeded, Reason::Completed)))
    }

    fn entry(seq: u64, entry: &Entry) -> LogEntry {
        let lsn = 100 + seq;
        LogEntry { seq, lsn, epoch: 1, work: 1, ts_ms: 5, entry: journal::encode(entry) }
    }

    pub(crate) fn ended() -> Option<WorkInfo> {
        let state = journal::state_code(WorkState::Succeeded);
        Some(WorkInfo { lsn: 1, slot: 1, state, end_ms: 9, ..WorkInfo::default() })
    }

    /// How a test writes an event: the seq of its cursor and the number of its step; 0 for the result, -1 for a reset. What
    /// only tells of the acceptance is left out.
    pub(crate) fn short(event: &v1::WorkEvent) -> Option<(u64, i32)> {
        let seq = Cursor::parse(&event.cursor).unwrap().seq;
        match &event.event {
            Some(work_event::Event::Phase(step)) => Some((seq, step.sequence)),
            Some(work_event::Event::Result(work)) => {
                assert!(work.steps.is_empty());
                Some((seq, 0))
            }
            Some(work_event::Event::Reset(_)) => Some((seq, -1)),
            Some(work_event::Event::StateChange(_)) => None,
            other => panic!("{other:?}"),
        }
    }

    fn read(follow: &mut Follow, events: Events) -> (Vec<(u64, i32)>, Next) {
        let mut out = Vec::new();
        let next = follow.read(events, &mut out).unwrap();
        (out.iter().filter_map(|told| short(&told.event)).collect(), next)
    }

    fn after(seq: u64, offset: u64) -> Follow {
        Follow::after(0, Cursor { work: work(), seq, offset })
    }

    fn sent(entries: Vec<LogEntry>) -> Events {
        Events { entries, ..Events::default() }
    }

    /// What comes after the acceptance, which comes again with it.
    fn rest(mut entries: Vec<LogEntry>) -> Events {
        entries.insert(0, accepted(1));
        sent(entries)
    }

    #[test]
    fn what_was_deleted_is_told_of_once() {
        let last_phase = || sent(vec![phase(7, Phase::Understanding), phase(8, Phase::Yield)]);
        let mut follow = Follow::new(0, work(), WatchMode::All);
        let told = read(&mut follow, last_phase());
        assert_eq!(told, (vec![(6, -1), (7, 0), (8, 0)], Next::More));
        assert_eq!(
            read(&mut follow, sent(vec![phase(9, Phase::Yield)])),
            (vec![(9, 0)], Next::More)
        );
        // Who has seen all up to there misses nothing.
        assert_eq!(read(&mut after(6, 0), last_phase()).0, [(7, 0), (8, 0)]);
        assert_eq!(read(&mut after(5, 0), last_phase()).0, [(6, -1), (7, 0), (8, 0)]);
        let mut end = Follow::new(0, work(), WatchMode::End);
        assert_eq!(read(&mut end, last_phase()).0, []);
    }

    #[test]
    fn no_entry_is_told_twice() {
        let mut follow = Follow::new(0, work(), WatchMode::All);
        let first = rest(vec![phase(2, Phase::Action), phase(4, Phase::Experience)]);
        assert_eq!(read(&mut follow, first.clone()), (vec![(2, 1), (4, 2)], Next::More));
        assert_eq!(read(&mut follow, first), (vec![], Next::More));
        let again = rest(vec![phase(4, Phase::Experience), phase(5, Phase::Intention)]);
        assert_eq!(read(&mut follow, again), (vec![(5, 3)], Next::More));
    }

    #[test]
    fn the_result_is_the_last_event_and_has_a_cursor() {
        let mut follow = Follow::new(0, work(), WatchMode::All);
        let events = Events { ended: ended(), ..rest(vec![phase(7, Phase::Yield), last(8)]) };
        assert_eq!(read(&mut follow, events), (vec![(7, 1), (8, 0)], Next::End));
    }

    #[test]
    fn a_watch_that_goes_on_counts_the_steps_that_it_does_not_tell() {
        let mut follow = after(4, 0);
        let events = rest(vec![
            phase(2, Phase::Action),
            phase(4, Phase::Experience),
            phase(5, Phase::Intention),
        ]);
        assert_eq!(read(&mut follow, events), (vec![(5, 3)], Next::More));
        let events = Events { ended: ended(), ..rest(vec![last(8)]) };
        assert_eq!(read(&mut follow, events), (vec![(8, 0)], Next::End));
    }

    #[test]
    fn after_the_result_there_is_nothing() {
        let mut follow = after(8, 0);
        let events = Events { ended: ended(), ..rest(vec![phase(7, Phase::Yield), last(8)]) };
        assert_eq!(read(&mut follow, events), (vec![], Next::End));
    }

    #[test]
    fn a_work_whose_entries_are_gone_still_has_its_result() {
        let mut follow = after(5, 0);
        let events = Events { ended: ended(), ..Events::default() };
        let told = read(&mut follow, events.clone());
        assert_eq!(told, (vec![(SEQ_LAST - 1, -1), (SEQ_LAST, 0)], Next::End));
        assert_eq!(read(&mut after(SEQ_LAST - 1, 0), events).0, [(SEQ_LAST, 0)]);
    }

    #[test]
    fn who_wants_the_end_is_told_the_end() {
        let mut follow = Follow::new(0, work(), WatchMode::End);
        let events = Events { ended: ended(), ..rest(vec![phase(7, Phase::Yield), last(8)]) };
        assert_eq!(read(&mut follow, events), (vec![(8, 0)], Next::End));
    }

    #[test]
    fn the_beginning_of_a_turn_is_told_once_whoever_shows_it() {
        let begun = |follow: &mut Follow, events: Events| {
            let mut out = Vec::new();
            follow.read(events, &mut out).unwrap();
            out.into_iter().map(|told| told.event.cursor).collect::<Vec<_>>()
        };
        let at = |seq: u64, offset: u64| Cursor { work: work(), seq, offset }.to_text();
        let live = || Events { began_ms: 7, ..Events::default() };
        let first = || sent(vec![accepted(2)]);
        let phases = || sent(vec![accepted(2), phase(4, Phase::Action)]);
        let mut follow = Follow::new(0, work(), WatchMode::All);
        assert_eq!(begun(&mut follow, first()), [at(2, 0)]);
        assert_eq!(begun(&mut follow, live()), [at(2, 1)]);
        assert_eq!(begun(&mut follow, live()), [""; 0]);
        assert_eq!(begun(&mut follow, phases()), [at(4, 0)]);
        // Without the owner's word the first step shows it.
        let mut late = Follow::new(0, work(), WatchMode::All);
        assert_eq!(begun(&mut late, phases()), [at(2, 0), at(2, 1), at(4, 0)]);
        assert_eq!(begun(&mut after(2, 0), phases()), [at(2, 1), at(4, 0)]);
        assert_eq!(begun(&mut after(2, 1), phases()), [at(4, 0)]);
        assert_eq!(begun(&mut after(4, 0), phases()), [""; 0]);
    }

    #[test]
    fn an_event_stands_where_its_entry_does_and_the_result_at_the_end() {
        let mut follow = Follow::new(0, work(), WatchMode::All);
        let events =
            Events { ended: ended(), ..sent(vec![accepted(2), phase(4, Phase::Yield), last(5)]) };
        let mut out = Vec::new();
        follow.read(events, &mut out).unwrap();
        let positions: Vec<_> = out
            .iter()
            .map(|told| told.position.map(|position| position.to_string()).unwrap_or_default())
            .collect();
        assert_eq!(positions, ["1.1", "", "1.104", "1.105"]);
    }

    #[test]
    fn a_closed_subscription_is_made_anew() {
        let mut follow = Follow::new(0, work(), WatchMode::All);
        let closed =
            Events { closed: Some(Refusal::default()), ..rest(vec![phase(2, Phase::Action)]) };
        assert_eq!(read(&mut follow, closed), (vec![(2, 1)], Next::Again));
        assert_eq!(follow.last(), 2);
    }
}
