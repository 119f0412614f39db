//! Who leads: one control replica's part in the row `leader(name, term, beat)`.
//!
//! Compares moments of its own clock only; what two replicas believe at the same time is settled by compare-and-set in
//! the store. A leader's acts are guarded by its term there, so being wrong about leading costs time, never safety.

use crate::time::Millis;
use crate::{ProcessName, Reason, Term};

/// How often a leader raises its beat, and how often a standby looks.
pub const BEAT_MS: u64 = 500;
/// A standby takes over when (term, beat) stood still for so long.
pub const SILENT_MS: u64 = 2_000;
/// A leader that could not write its beat for so long stops acting: before any standby may take over.
pub const UNWRITTEN_MS: u64 = 1_500;

/// The row in the control database. No name: nobody leads since a clean hand-over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaderRow {
    pub name: Option<ProcessName>,
    pub term: Term,
    pub beat: u64,
}

/// What became of a [`Action::Take`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The row is ours now, with the expected term + 1.
    Won,
    /// It was another row than expected: this one.
    Lost(LeaderRow),
    /// No answer. If it was written all the same, the row counts as anybody's: it stands still and is taken again.
    Unknown,
}

/// What the replica is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read the leader row and hand it to [`Leadership::observe`].
    Observe,
    /// Write (our name, expected term + 1, beat 0) if the row has the expected term and beat.
    Take { expected_term: Term, expected_beat: u64, reason: Reason },
    /// Raise the beat where name and term are ours, and hand `sent` to [`Leadership::beat_written`].
    RaiseBeat { term: Term, sent: Millis },
    /// Clear the name where name and term are ours.
    Release { term: Term },
    /// We lead: read everything, then act.
    Began(Term),
    /// We do not lead any more: forget everything, act on nothing.
    Ended(Reason),
}

/// What a standby saw, and since when it has not changed.
#[derive(Debug)]
struct Seen {
    term: Term,
    beat: u64,
    since: Millis,
}

#[derive(Debug)]
enum State {
    /// `not_before`: a free row is another's to take until then.
    Standby {
        seen: Option<Seen>,
        looked: Option<Millis>,
        not_before: Millis,
    },
    Taking {
        expected_term: Term,
        sent: Millis,
    },
    Leading {
        term: Term,
        raised: Millis,
        written: Millis,
    },
    Resigned,
}

/// One control replica's view of the leadership.
#[derive(Debug)]
pub struct Leadership {
    state: State,
}

impl Default for Leadership {
    fn default() -> Self {
        Self { state: State::STANDBY }
    }
}

impl State {
    const STANDBY: Self = Self::Standby { seen: None, looked: None, not_before: Millis(0) };
}

impl Leadership {
    pub fn new() -> Self {
        Self::default()
    }

    /// Our term, if we may act on it now.
    pub fn leads(&self, now: Millis) -> Option<Term> {
        match self.state {
            State::Leading { term, written, .. } if now.since(written) < UNWRITTEN_MS => Some(term),
            State::Leading { .. }
            | State::Standby { .. }
            | State::Taking { .. }
            | State::Resigned => None,
        }
    }

    /// The row as a standby read it; none if nobody ever led.
    ///
    /// Our own name in it means nothing: an earlier run of ours may have written it.
    pub fn observe(&mut self, row: Option<&LeaderRow>, now: Millis) -> Vec<Action> {
        let State::Standby { seen, not_before, .. } = &mut self.state else { return Vec::new() };
        let (term, beat) = row.map_or((Term(0), 0), |row| (row.term, row.beat));
        let is_free = row.is_none_or(|row| row.name.is_none()) && *not_before <= now;
        let known = seen.as_ref().filter(|seen| (seen.term, seen.beat) == (term, beat));
        let silent_ms = known.map_or(0, |seen| now.since(seen.since));
        if is_free {
            return self.take(term, beat, Reason::LeaderFree, now);
        }
        if SILENT_MS <= silent_ms {
            return self.take(term, beat, Reason::LeaderSilent, now);
        }
        if known.is_none() {
            *seen = Some(Seen { term, beat, since: now });
        }
        Vec::new()
    }

    fn take(&mut self, term: Term, beat: u64, reason: Reason, now: Millis) -> Vec<Action> {
        self.state = State::Taking { expected_term: term, sent: now };
        vec![Action::Take { expected_term: term, expected_beat: beat, reason }]
    }

    /// What became of our take-over.
    pub fn taken(&mut self, taken: Taken, now: Millis) -> Vec<Action> {
        let State::Taking { expected_term, sent } = self.state else { return Vec::new() };
        self.state = State::STANDBY;
        match taken {
            Taken::Won if now.since(sent) < UNWRITTEN_MS => {
                let term = expected_term.next();
                self.state = State::Leading { term, raised: sent, written: sent };
                vec![Action::Began(term)]
            }
            // The answer took so long that others may count us silent: the row stands still and is taken again.
            Taken::Won | Taken::Unknown => Vec::new(),
            Taken::Lost(row) => self.observe(Some(&row), now),
        }
    }

    /// The beat of the [`Action::RaiseBeat`] that carried `sent` is written. It counts from when it was sent: a standby
    /// cannot have seen it earlier.
    pub fn beat_written(&mut self, sent: Millis) {
        if let State::Leading { written, .. } = &mut self.state {
            *written = (*written).max(sent);
        }
    }

    /// The store said that the row is not ours any more, or an owner row names a later term.
    pub fn deposed(&mut self) -> Vec<Action> {
        match self.state {
            State::Leading { .. } => self.end(Reason::Fenced),
            State::Standby { .. } | State::Taking { .. } | State::Resigned => Vec::new(),
        }
    }

    fn end(&mut self, reason: Reason) -> Vec<Action> {
        self.state = State::STANDBY;
        vec![Action::Ended(reason)]
    }

    /// Called at least every 100 ms.
    pub fn tick(&mut self, now: Millis) -> Vec<Action> {
        match &mut self.state {
            State::Standby { looked, .. } => {
                if looked.is_some_and(|looked| now.since(looked) < BEAT_MS) {
                    return Vec::new();
                }
                *looked = Some(now);
                vec![Action::Observe]
            }
            State::Taking { sent, .. } => {
                if SILENT_MS <= now.since(*sent) {
                    self.state = State::STANDBY;
                }
                Vec::new()
            }
            State::Leading { term, raised, written } => {
                if UNWRITTEN_MS <= now.since(*written) {
                    return self.end(Reason::BeatUnwritten);
                }
                if now.since(*raised) < BEAT_MS {
                    return Vec::new();
                }
                *raised = now;
                vec![Action::RaiseBeat { term: *term, sent: now }]
            }
            State::Resigned => Vec::new(),
        }
    }

    /// Another replica is in a better place to lead: the row is freed for it, and not taken back at once.
    pub fn step_back(&mut self, now: Millis) -> Vec<Action> {
        let State::Leading { term, .. } = self.state else { return Vec::new() };
        let not_before = now.plus(2 * SILENT_MS);
        self.state = State::Standby { seen: None, looked: Some(now), not_before };
        vec![Action::Ended(Reason::HearsFewer), Action::Release { term }]
    }

    /// The leader steps back in favour of this replica: it looks at once instead of when it is due.
    pub fn invited(&mut self) -> Vec<Action> {
        match &mut self.state {
            State::Standby { .. } => vec![Action::Observe],
            State::Taking { .. } | State::Leading { .. } | State::Resigned => Vec::new(),
        }
    }

    /// A clean hand-over: whoever looks next takes it at once. For good; a replica that resigned is on its way out.
    pub fn resign(&mut self) -> Vec<Action> {
        let state = std::mem::replace(&mut self.state, State::Resigned);
        match state {
            State::Leading { term, .. } => {
                vec![Action::Ended(Reason::ShuttingDown), Action::Release { term }]
            }
            State::Standby { .. } | State::Taking { .. } | State::Resigned => Vec::new(),
        }
    }
}

/// Whether who trusts the authorities `ours` belongs to the cluster of a store that names `theirs`: two clusters on one
/// store would take its leadership from each other. A store that names none has no cluster yet.
pub fn is_of_cluster(ours: &[String], theirs: &[String]) -> bool {
    theirs.is_empty() || theirs.iter().any(|authority| ours.contains(authority))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(term: u64, beat: u64) -> LeaderRow {
        LeaderRow { name: Some("control-1".parse().unwrap()), term: Term(term), beat }
    }

    fn free(term: u64, beat: u64) -> LeaderRow {
        LeaderRow { name: None, term: Term(term), beat }
    }

    fn take(term: u64, beat: u64, reason: Reason) -> Vec<Action> {
        vec![Action::Take { expected_term: Term(term), expected_beat: beat, reason }]
    }

    fn leading() -> Leadership {
        let mut replica = Leadership::new();
        assert_eq!(replica.observe(None, Millis(0)), take(0, 0, Reason::LeaderFree));
        assert_eq!(replica.taken(Taken::Won, Millis(10)), [Action::Began(Term(1))]);
        replica
    }

    #[test]
    fn a_standby_looks_every_half_second() {
        let mut replica = Leadership::new();
        let check = |replica: &mut Leadership, now, looks: bool| {
            let expected = if looks { vec![Action::Observe] } else { vec![] };
            assert_eq!(replica.tick(Millis(now)), expected, "at {now}");
        };
        check(&mut replica, 0, true);
        check(&mut replica, 499, false);
        check(&mut replica, 500, true);
    }

    #[test]
    fn a_leader_is_replaced_after_two_seconds_without_a_beat() {
        let mut replica = Leadership::new();
        assert_eq!(replica.observe(Some(&row(4, 1)), Millis(0)), []);
        assert_eq!(replica.observe(Some(&row(4, 1)), Millis(1_500)), []);
        assert_eq!(replica.observe(Some(&row(4, 2)), Millis(1_900)), []);
        assert_eq!(replica.observe(Some(&row(4, 2)), Millis(3_899)), []);
        let silent = take(4, 2, Reason::LeaderSilent);
        assert_eq!(replica.observe(Some(&row(4, 2)), Millis(3_900)), silent);
    }

    #[test]
    fn a_free_row_is_taken_at_once() {
        let mut replica = Leadership::new();
        assert_eq!(replica.observe(Some(&free(4, 9)), Millis(0)), take(4, 9, Reason::LeaderFree));
    }

    #[test]
    fn who_loses_the_race_watches_the_winner() {
        let mut replica = Leadership::new();
        replica.observe(None, Millis(0));
        assert_eq!(replica.taken(Taken::Lost(row(1, 0)), Millis(10)), []);
        assert_eq!(replica.leads(Millis(10)), None);
        let silent = take(1, 0, Reason::LeaderSilent);
        assert_eq!(replica.observe(Some(&row(1, 0)), Millis(2_010)), silent);
    }

    #[test]
    fn a_leader_raises_its_beat_every_half_second() {
        let mut replica = leading();
        assert_eq!(replica.tick(Millis(400)), []);
        let raise = Action::RaiseBeat { term: Term(1), sent: Millis(500) };
        assert_eq!(replica.tick(Millis(500)), [raise]);
        assert_eq!(replica.tick(Millis(600)), []);
        replica.beat_written(Millis(500));
        assert_eq!(replica.leads(Millis(1_999)), Some(Term(1)));
    }

    #[test]
    fn a_leader_that_cannot_write_its_beat_stops_acting() {
        let mut replica = leading();
        replica.tick(Millis(500));
        replica.beat_written(Millis(500));
        assert_eq!(replica.leads(Millis(2_000)), None);
        assert_eq!(replica.tick(Millis(2_000)), [Action::Ended(Reason::BeatUnwritten)]);
        assert_eq!(replica.tick(Millis(2_000)), [Action::Observe]);
    }

    #[test]
    fn a_leader_that_learns_of_another_ends() {
        let mut replica = leading();
        assert_eq!(replica.deposed(), [Action::Ended(Reason::Fenced)]);
        assert_eq!(replica.deposed(), []);
        assert_eq!(replica.leads(Millis(20)), None);
    }

    #[test]
    fn an_unknown_take_over_counts_as_anybodys() {
        let mut replica = Leadership::new();
        replica.observe(None, Millis(0));
        assert_eq!(replica.taken(Taken::Unknown, Millis(900)), []);
        assert_eq!(replica.observe(Some(&row(1, 0)), Millis(1_000)), []);
        let silent = take(1, 0, Reason::LeaderSilent);
        assert_eq!(replica.observe(Some(&row(1, 0)), Millis(3_000)), silent);
    }

    #[test]
    fn a_take_over_that_took_too_long_is_none() {
        let mut replica = Leadership::new();
        replica.observe(None, Millis(0));
        assert_eq!(replica.taken(Taken::Won, Millis(1_500)), []);
        assert_eq!(replica.leads(Millis(1_500)), None);
    }

    #[test]
    fn who_steps_back_leaves_the_row_to_another_for_a_while() {
        let mut replica = leading();
        let expected = [Action::Ended(Reason::HearsFewer), Action::Release { term: Term(1) }];
        assert_eq!(replica.step_back(Millis(1_000)), expected);
        assert_eq!(replica.observe(Some(&free(1, 3)), Millis(1_600)), []);
        // Nobody took it: then it is better led from here than from nowhere.
        assert_eq!(
            replica.observe(Some(&free(1, 3)), Millis(5_000)),
            take(1, 3, Reason::LeaderFree)
        );
    }

    #[test]
    fn who_is_invited_looks_at_once() {
        let mut replica = Leadership::new();
        replica.tick(Millis(0));
        assert_eq!(replica.invited(), [Action::Observe]);
        assert_eq!(leading().invited(), []);
    }

    #[test]
    fn who_resigns_frees_the_row_and_never_leads_again() {
        let mut replica = leading();
        let expected = [Action::Ended(Reason::ShuttingDown), Action::Release { term: Term(1) }];
        assert_eq!(replica.resign(), expected);
        assert_eq!(replica.observe(None, Millis(5_000)), []);
        assert_eq!(replica.tick(Millis(5_000)), []);
    }

    #[test]
    fn a_store_is_of_the_cluster_that_shares_an_authority_with_it() {
        let of = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let check = |ours: &[&str], theirs: &[&str], expected| {
            assert_eq!(is_of_cluster(&of(ours), &of(theirs)), expected, "{ours:?} {theirs:?}");
        };
        check(&["a"], &[], true);
        check(&["a"], &["a"], true);
        check(&["a", "b"], &["a"], true);
        check(&["b"], &["a", "b"], true);
        check(&["b"], &["a"], false);
        check(&[], &["a"], false);
    }
}
