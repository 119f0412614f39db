//! Who wins when a cancel, a deadline and an answer want something of the same work at once.
//!
//! The record of a work holds everything that it did, so what is on its way into the journal comes first; after that the
//! first who asked wins, and who comes later is told how the work ended.

/// What is under way of a work, beside its fold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Underway {
    /// Its end is on its way into the journal.
    pub is_ending: bool,
    /// Something of it is on its way into the journal.
    pub is_journaling: bool,
    /// Somebody waits for that, to end it then.
    pub is_end_wanted: bool,
}

/// What to do with a request to end the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToEnd {
    Journal,
    /// As soon as what is being journaled is folded, unless that is its end.
    AfterJournaling,
    /// Another end was first: say how the work ended.
    TooLate,
    /// Another end waits already: whoever asks again is told how it ended.
    Busy,
}

/// What to do with an answer of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfAnswer {
    Journal,
    /// Nobody waits for it: its step is done, its attempt was given up, or its work ends.
    PassOver,
    /// Something of the work is being journaled; then it is known which.
    AskAgain,
}

/// A cancel, a deadline or a quarantine wants the work to end.
pub fn to_end(underway: Underway) -> ToEnd {
    match underway {
        Underway { is_ending: true, .. } => ToEnd::TooLate,
        Underway { is_journaling: true, is_end_wanted: false, .. } => ToEnd::AfterJournaling,
        Underway { is_journaling: true, is_end_wanted: true, .. } => ToEnd::Busy,
        Underway { is_journaling: false, .. } => ToEnd::Journal,
    }
}

/// An answer came. `is_taken`: its attempt is the one that the turn waits for.
pub fn of_answer(is_taken: bool, underway: Underway) -> OfAnswer {
    match underway {
        Underway { is_ending: true, .. } => OfAnswer::PassOver,
        _ if !is_taken => OfAnswer::PassOver,
        Underway { is_journaling: true, .. } => OfAnswer::AskAgain,
        Underway { is_journaling: false, .. } => OfAnswer::Journal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOURNALING: Underway =
        Underway { is_ending: false, is_journaling: true, is_end_wanted: false };

    #[test]
    fn an_end_on_its_way_beats_every_later_end_and_answer() {
        let underway = Underway { is_ending: true, ..JOURNALING };
        assert_eq!(to_end(underway), ToEnd::TooLate);
        assert_eq!(of_answer(true, underway), OfAnswer::PassOver);
    }

    #[test]
    fn what_is_being_journaled_comes_before_an_end() {
        assert_eq!(to_end(JOURNALING), ToEnd::AfterJournaling);
        assert_eq!(to_end(Underway::default()), ToEnd::Journal);
    }

    #[test]
    fn the_first_of_two_ends_wins() {
        assert_eq!(to_end(Underway { is_end_wanted: true, ..JOURNALING }), ToEnd::Busy);
    }

    #[test]
    fn an_answer_that_nobody_waits_for_is_passed_over() {
        assert_eq!(of_answer(false, Underway::default()), OfAnswer::PassOver);
        assert_eq!(of_answer(true, Underway::default()), OfAnswer::Journal);
        assert_eq!(of_answer(true, JOURNALING), OfAnswer::AskAgain);
    }
}
