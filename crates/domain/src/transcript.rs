//! What the models of a work say, as one who follows the work is told it: each byte once, and what came to nothing is
//! taken back.
//!
//! The journal says which attempt runs and what each step said in the end; pieces of the attempt that runs come beside
//! it and are not durable.

use crate::entry::Entry;
use crate::round::Said;
use crate::step::{CallKey, Callee, StepKey};

/// What one follower was told of one work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// Bytes that the steps in the journal said.
    committed: u64,
    /// Bytes of the attempt that runs, which were told.
    told: u64,
    /// The round whose model call is due or runs.
    round: u32,
    /// The attempt of it that the journal says was begun; 0 for the first, which it need not say.
    begun: u32,
}

/// What is to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    Text {
        offset: u64,
        text: String,
        /// Bytes of its attempt that are told with it: what a bookmark keeps.
        told: u64,
    },
    /// Whatever was told from there on is void.
    Superseded { offset: u64 },
}

/// A piece of what an attempt at a model's call says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    pub round: u32,
    pub attempt: u32,
    /// Where it begins in all that the attempt says.
    pub offset: u64,
    pub text: &'a str,
}

impl Transcript {
    /// Bytes of the attempt that runs, which were told: a bookmark says so.
    pub fn told(&self) -> u64 {
        self.told
    }

    /// Bytes that the steps before it said.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// The follower was told so much of the attempt that runs by the entries that were read so far.
    pub fn resume(&mut self, told: u64) {
        self.told = told;
    }

    /// The same, where the entries of earlier steps are gone, which said `committed` bytes.
    pub fn resume_after(&mut self, committed: u64, told: u64) {
        (self.committed, self.told) = (committed, told);
    }

    /// Reads the next entry of the work.
    pub fn read(&mut self, entry: &Entry) -> Option<Told> {
        match entry {
            Entry::StepBegan(began) => {
                self.begun = model_call(began.step).map_or(self.begun, |_| began.attempt);
                self.take_back()
            }
            Entry::StepDone(done) => {
                let round = model_call(done.step)?;
                // What cannot be read was never folded either.
                let text = Said::parse(&done.output).map(|said| said.text).unwrap_or_default();
                self.done(round, text)
            }
            Entry::Ended(_) => self.take_back(),
            Entry::ShardOpened(_)
            | Entry::Accepted(_)
            | Entry::StepIntended(_)
            | Entry::StepDoubted(_)
            | Entry::StepResolved(_)
            | Entry::Waiting(_)
            | Entry::Resumed(_)
            | Entry::CancelRequested(_) => None,
        }
    }

    /// What of `piece` is news. A piece with a gap before it is not told: the commit tells all of it.
    pub fn hear(&mut self, piece: Piece<'_>) -> Option<Told> {
        let is_running = (piece.round, piece.attempt) == (self.round, self.begun.max(1));
        let text = is_running.then(|| news(self.told, piece.offset, piece.text)).flatten()?;
        self.tell(text.to_owned())
    }

    fn done(&mut self, round: u32, text: String) -> Option<Told> {
        let len = text.len() as u64;
        let rest = usize::try_from(self.told).ok().and_then(|told| text.get(told..));
        let told = self.tell(rest.unwrap_or_default().to_owned());
        self.committed = self.committed.saturating_add(len);
        (self.told, self.round, self.begun) = (0, round + 1, 0);
        told
    }

    fn tell(&mut self, text: String) -> Option<Told> {
        if text.is_empty() {
            return None;
        }
        let offset = self.committed.saturating_add(self.told);
        self.told = self.told.saturating_add(text.len() as u64);
        Some(Told::Text { offset, text, told: self.told })
    }

    fn take_back(&mut self) -> Option<Told> {
        let is_void = 0 < std::mem::take(&mut self.told);
        is_void.then_some(Told::Superseded { offset: self.committed })
    }
}

/// What of the piece `text`, which begins at `offset`, is not among the `known` bytes before it. None: it leaves a gap.
pub fn news(known: u64, offset: u64, text: &str) -> Option<&str> {
    let overlap = usize::try_from(known.checked_sub(offset)?).ok()?;
    match overlap < text.len() {
        true => text.get(overlap..),
        false => Some(""),
    }
}

/// The round, if `step` is a model's call of a loop.
pub fn model_call(step: StepKey) -> Option<u32> {
    match step {
        StepKey::Call(CallKey { round, of: Callee::Model }) => Some(round),
        StepKey::Call(CallKey { of: Callee::Tool(_), .. }) | StepKey::Phase(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{StepBegan, StepDone, Usage};
    use crate::{Reason, WorkState, turn};

    fn piece(round: u32, attempt: u32, offset: u64, text: &str) -> Piece<'_> {
        Piece { round, attempt, offset, text }
    }

    fn done(round: u32, text: &str) -> Entry {
        let said = Said { text: text.to_owned(), calls: Vec::new() };
        Entry::StepDone(StepDone {
            step: StepKey::model(round),
            name: String::new(),
            output: said.to_json().into(),
            node: "node-1".to_owned(),
            attempts: 1,
            start_ms: 1,
            end_ms: 2,
            usage: Usage::default(),
        })
    }

    fn began(round: u32, attempt: u32) -> Entry {
        let (step, reason) = (StepKey::model(round), Reason::OwnerDied);
        Entry::StepBegan(StepBegan { step, attempt, reason })
    }

    fn ended() -> Entry {
        Entry::Ended(turn::ended(WorkState::Cancelled, Reason::CancelRequested))
    }

    fn text(offset: u64, text: &str, told: u64) -> Option<Told> {
        Some(Told::Text { offset, text: text.to_owned(), told })
    }

    #[test]
    fn pieces_are_told_once_and_the_commit_tells_the_rest() {
        let mut transcript = Transcript::default();
        assert_eq!(transcript.hear(piece(0, 1, 0, "on")), text(0, "on", 2));
        assert_eq!(transcript.hear(piece(0, 1, 0, "on")), None);
        assert_eq!(transcript.hear(piece(0, 1, 0, "one t")), text(2, "e t", 5));
        assert_eq!(transcript.hear(piece(0, 1, 6, "o")), None, "there is a gap before it");
        assert_eq!(transcript.read(&done(0, "one two")), text(5, "wo", 7));
        assert_eq!(transcript.hear(piece(0, 1, 0, "one two")), None, "it is over");
        assert_eq!(transcript.hear(piece(1, 1, 0, "x")), text(7, "x", 1));
        assert_eq!(transcript.read(&done(1, "x")), None, "all of it was told");
        assert_eq!(transcript.read(&ended()), None);
    }

    #[test]
    fn what_came_in_one_piece_is_told_with_its_commit() {
        let mut transcript = Transcript::default();
        assert_eq!(transcript.read(&done(0, "")), None);
        assert_eq!(transcript.read(&done(1, "all")), text(0, "all", 3));
        assert_eq!(transcript.read(&done(2, "more")), text(3, "more", 4));
    }

    #[test]
    fn what_an_attempt_said_that_came_to_nothing_is_taken_back() {
        let mut transcript = Transcript::default();
        transcript.read(&done(0, "abc"));
        transcript.hear(piece(1, 1, 0, "de"));
        assert_eq!(transcript.read(&began(1, 2)), Some(Told::Superseded { offset: 3 }));
        assert_eq!(transcript.hear(piece(1, 1, 0, "def")), None, "a late piece of the old one");
        assert_eq!(transcript.read(&began(1, 3)), None, "nothing was told of it");
        assert_eq!(transcript.hear(piece(1, 3, 0, "x")), text(3, "x", 1));
        assert_eq!(transcript.read(&ended()), Some(Told::Superseded { offset: 3 }));
        assert_eq!(transcript.read(&ended()), None);
    }

    #[test]
    fn who_was_told_a_part_goes_on_from_there() {
        let mut transcript = Transcript::default();
        transcript.read(&done(0, "abc"));
        transcript.resume(2);
        assert_eq!(transcript.told(), 2);
        let mut other = transcript.clone();
        assert_eq!(transcript.hear(piece(1, 1, 0, "def")), text(5, "f", 3));
        assert_eq!(other.read(&began(1, 2)), Some(Told::Superseded { offset: 3 }));
    }

    #[test]
    fn a_bookmark_that_nobody_gave_out_breaks_nothing() {
        for told in [2, 9, u64::MAX] {
            let mut transcript = Transcript::default();
            transcript.resume(told);
            assert_eq!(transcript.hear(piece(0, 1, 0, "\u{e9}\u{e9}")).is_some(), told == 2);
            let mut transcript = Transcript::default();
            transcript.resume(told - 1);
            assert_eq!(transcript.hear(piece(0, 1, 0, "\u{e9}")), None, "in a character");
            assert_eq!(transcript.read(&done(0, "\u{e9}")), None);
        }
    }
}
