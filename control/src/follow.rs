//! One work as a client follows it: what its owner sends becomes events, each once, over however many subscriptions.
//!
//! Pure: entries go in, events come out. Never opens a subscription.

use domain::entry::Entry;
use domain::transcript::{self, Piece, Transcript};
use domain::{Epoch, Lsn, Position, StepKey, WorkId};
use proto::convert::{self, Cursor};
use proto::journal::{self, StepNumbers};
use proto::link::{Events, LogEntry, StepText, WatchMode, WorkInfo};
use proto::v1::{self, work_event};
use tokio::sync::OwnedSemaphorePermit;

/// The cursor of a result whose entry was not seen: behind every entry that a work can have.
const SEQ_LAST: u64 = i64::MAX as u64;

// What has no entry of its own stands behind the entry before it: first that a turn began and, by its length, what is said,
// then that it is void.
const BEGUN: u64 = 1;
const VOID: u64 = 2;

/// A work that is followed.
#[derive(Debug)]
pub(crate) struct Follow {
    /// The client's own name for it, on an open stream.
    pub(crate) tag: i64,
    pub(crate) work: WorkId,
    pub(crate) mode: WatchMode,
    /// Events up to here are known to the client already. They are read all the same: steps are counted.
    known: Cursor,
    /// The last entry that was read.
    last: u64,
    /// The entry of the acceptance; 0 until it was read.
    accepted: u64,
    /// The beginning of its turn was told, or is told no more.
    has_begun: bool,
    /// It was told that earlier events are gone.
    is_reset: bool,
    /// The work as it is, for that.
    whole: Option<Box<WorkInfo>>,
    /// What its models said, as far as it was told. It goes on where the client's cursor says once that is reached.
    transcript: Transcript,
    is_resumed: bool,
    /// Where the last entry that was read stands.
    at: Option<Position>,
    /// Steps so far.
    steps: i32,
    /// Its place among the works that one stream may follow at once.
    _place: Option<OwnedSemaphorePermit>,
}

/// An event for the client.
#[derive(Clone, Debug, PartialEq)]
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
        Self {
            tag,
            work,
            mode,
            known: Cursor::beginning(work),
            last: 0,
            accepted: 0,
            has_begun: false,
            is_reset: false,
            whole: None,
            transcript: Transcript::default(),
            is_resumed: false,
            at: None,
            steps: 0,
            _place: None,
        }
    }

    /// Follows a work from after the event that `cursor` marks.
    pub(crate) fn after(tag: i64, cursor: Cursor) -> Self {
        Self { known: cursor, ..Self::new(tag, cursor.work, WatchMode::All) }
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
    ) -> Result<Next, journal::Error> {
        if let Some(whole) = events.whole {
            self.cut(whole, events.entries.is_empty());
        }
        for entry in events.entries {
            if self.last < entry.seq {
                self.entry(entry, out)?;
            }
        }
        if self.mode == WatchMode::All {
            if events.began_ms != 0 {
                out.extend(self.begin(events.began_ms));
            }
            if let Some(text) = events.text {
                out.extend(self.begin(text.at_ms));
                out.extend(self.hear(&text));
            }
        }
        if let Some(ended) = events.ended {
            if self.last == 0 && self.mode == WatchMode::All {
                self.whole = Some(Box::new(ended.clone()));
                out.extend(self.reset(SEQ_LAST));
            }
            out.extend(self.result(ended));
            return Ok(Next::End);
        }
        Ok(if events.closed.is_some() { Next::Again } else { Next::More })
    }

    /// Entries before those that come now were deleted.
    fn cut(&mut self, whole: WorkInfo, is_empty: bool) {
        self.whole = Some(Box::new(whole));
        if self.accepted != 0 {
            // They were not when it began: what comes now is told as if it began here.
            (self.accepted, self.is_reset) = (0, false);
            self.transcript = Transcript::default();
        }
        if is_empty {
            self.last = 0;
        }
    }

    fn entry(&mut self, log: LogEntry, out: &mut Vec<Told>) -> Result<(), journal::Error> {
        let before = std::mem::replace(&mut self.last, log.seq);
        self.at = Some(Position { epoch: Epoch(log.epoch), lsn: Lsn(log.lsn) });
        if self.mode == WatchMode::End {
            return Ok(());
        }
        if log.lsn == self.work.lsn.0 {
            self.accepted = log.seq;
        }
        if self.accepted == 0 {
            out.extend(self.reset(log.seq));
        }
        let entry = journal::decode(log.entry)?;
        if let Some(at_ms) = convert::shows_turn(&entry, log.ts_ms) {
            out.extend(self.begin(at_ms));
        }
        // What came before it may have been deleted.
        let before = before.max(if self.accepted == 0 { log.seq.saturating_sub(1) } else { 0 });
        out.extend(self.said(&entry, before, log.seq, log.ts_ms));
        let mut event = convert::event(entry, Epoch(log.epoch), &mut self.steps);
        if self.accepted == 0 {
            event.iter_mut().for_each(forget_sequence);
        }
        let event = event.filter(|_| self.is_news(log.seq, 0));
        out.extend(event.map(|event| {
            let cursor = self.cursor(log.seq, 0);
            self.tell(cursor, log.ts_ms, event, self.at)
        }));
        Ok(())
    }

    fn is_news(&self, seq: u64, offset: u64) -> bool {
        (self.known.seq, self.known.offset) < (seq, offset)
    }

    fn cursor(&self, seq: u64, offset: u64) -> Cursor {
        let (told, committed) = (self.transcript.told(), self.transcript.committed());
        Cursor { work: self.work, seq, offset, told, committed }
    }

    fn tell(
        &self,
        cursor: Cursor,
        at_ms: i64,
        event: work_event::Event,
        position: Option<Position>,
    ) -> Told {
        let (work, cursor) = (self.work.to_string(), cursor.to_text());
        let (time, event) = (convert::timestamp(at_ms), Some(event));
        Told { event: v1::WorkEvent { work, cursor, time, event }, position }
    }

    /// Its turn began. That has no entry of its own, so it stands after the acceptance, whoever shows it first.
    fn begin(&mut self, at_ms: i64) -> Option<Told> {
        let is_news = !std::mem::replace(&mut self.has_begun, true) && self.accepted != 0;
        (is_news && self.is_news(self.accepted, BEGUN))
            .then(|| self.tell(self.cursor(self.accepted, BEGUN), at_ms, convert::began(), None))
    }

    /// What `entry`, which has the number `seq`, makes of what was said after the entry `before`.
    fn said(&mut self, entry: &Entry, before: u64, seq: u64, at_ms: i64) -> Option<Told> {
        if self.known.seq < seq {
            self.resume();
        }
        let committed = self.transcript.committed();
        let told = self.transcript.read(entry)?;
        let (seq_told, offset, of_attempt) = match (&told, entry) {
            (transcript::Told::Text { told, .. }, _) => (before, BEGUN, *told),
            // It has no other event.
            (transcript::Told::Superseded { .. }, Entry::StepBegan(_)) => (seq, 0, 0),
            (transcript::Told::Superseded { .. }, _) => (before, VOID, 0),
        };
        // It stands before the step, if the entry is one.
        let cursor = Cursor { told: of_attempt, committed, ..self.cursor(seq_told, offset) };
        self.is_news(seq, 0).then(|| self.tell(cursor, at_ms, convert::told(told), None))
    }

    /// What the attempt that runs says. An owner that has less in its journal than the client was told is none any more.
    fn hear(&mut self, said: &StepText) -> Option<Told> {
        let is_void = self.last == self.known.seq && self.known.offset == VOID;
        if self.accepted == 0 || self.last < self.known.seq || is_void {
            return None;
        }
        self.resume();
        let attempt = said.attempt.as_ref()?;
        let round = transcript::model_call(step_of(attempt)?)?;
        let (attempt, offset, text) = (attempt.attempt, said.offset, said.text.as_str());
        let told = self.transcript.hear(Piece { round, attempt, offset, text })?;
        Some(self.tell(self.cursor(self.last, BEGUN), said.at_ms, convert::told(told), None))
    }

    /// All entries that the client knows were read, and none after them.
    fn resume(&mut self) {
        if std::mem::replace(&mut self.is_resumed, true) {
            return;
        }
        let Cursor { told, committed, .. } = self.known;
        match self.accepted {
            0 => self.transcript.resume_after(committed, told),
            _ => self.transcript.resume(told),
        }
    }

    /// What came before the entry `next` was deleted. If the client may not have seen all of it, it is told so, once.
    fn reset(&mut self, next: u64) -> Option<Told> {
        let is_news = !std::mem::replace(&mut self.is_reset, true);
        let seq = next.saturating_sub(1);
        (is_news && self.known.seq < seq).then(|| {
            // It has nothing of what was said any more.
            self.is_resumed = true;
            let work = self.whole.take().map(|whole| (*whole).into());
            let event = work_event::Event::Reset(work_event::Reset { work });
            self.tell(self.cursor(seq, 0), 0, event, None)
        })
    }

    /// The last event, unless the client has it.
    fn result(&self, ended: WorkInfo) -> Option<Told> {
        let seq = if self.last == 0 { SEQ_LAST } else { self.last };
        if !self.is_news(seq, 0) {
            return None;
        }
        let at_ms = ended.end_ms;
        let event = work_event::Event::Result(without_steps(ended));
        Some(self.tell(self.cursor(seq, 0), at_ms, event, self.at))
    }
}

fn step_of(attempt: &proto::link::StepAttempt) -> Option<StepKey> {
    let proto::link::StepAttempt { phase, cycle, round, index, .. } = *attempt;
    StepNumbers { phase, cycle, round, index }.step()
}

/// How many steps were before this one is not known: their entries are gone.
fn forget_sequence(event: &mut work_event::Event) {
    if let work_event::Event::Phase(step) | work_event::Event::Step(step) = event {
        step.sequence = 0;
    }
}

/// The work as everything but Get shows it.
pub(crate) fn without_steps(mut info: WorkInfo) -> v1::Work {
    info.steps.clear();
    info.into()
}

#[cfg(test)]
#[path = "follow_tests.rs"]
pub(crate) mod tests;
