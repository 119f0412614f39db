//! Whom a node asks to take it in, and when: every control replica at once, each with one question open at most. One that was
//! stopped keeps its links and answers nobody, and must not keep a node from those that do.

use std::collections::BTreeMap;

use crate::time::Millis;
use crate::{ProcessName, Term};

/// After a question that failed; doubled with each, up to 32 times: a refusal or a flapping link must not become a storm.
pub const PAUSE_MIN_MS: u64 = 50;
const DOUBLINGS_MAX: u32 = 5;

#[derive(Debug, Default)]
struct Asked {
    is_open: bool,
    failures: u32,
    not_before: Millis,
}

/// The questions of a node that is no member. Has as many entries as there are control replicas.
#[derive(Debug, Default)]
pub struct Joins {
    asked: BTreeMap<ProcessName, Asked>,
    term: Term,
}

impl Joins {
    /// Whether this replica, which is linked, is asked now; then its question is open.
    pub fn ask(&mut self, replica: &ProcessName, now: Millis) -> bool {
        let asked = self.asked.entry(replica.clone()).or_default();
        let is_due = !asked.is_open && asked.not_before <= now;
        asked.is_open |= is_due;
        is_due
    }

    /// This replica did not take the node in.
    pub fn failed(&mut self, replica: &ProcessName, now: Millis) {
        let asked = self.asked.entry(replica.clone()).or_default();
        asked.is_open = false;
        asked.not_before = now.plus(PAUSE_MIN_MS << asked.failures.min(DOUBLINGS_MAX));
        asked.failures = asked.failures.saturating_add(1);
    }

    /// Somebody leads in this term. If it is a later one than was known, whoever did not take the node in may do so now.
    pub fn led(&mut self, term: Term) {
        if self.term < term {
            self.term = term;
            self.asked.values_mut().for_each(|asked| asked.not_before = Millis(0));
        }
    }

    /// What is open is not answered any more: it was asked by the run before.
    pub fn withdrawn(&mut self) {
        self.asked.values_mut().for_each(|asked| asked.is_open = false);
    }

    /// The node is a member: nothing is open any more, and the next time it begins anew.
    pub fn welcomed(&mut self) {
        self.asked.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> ProcessName {
        format!("control-{number}").parse().unwrap()
    }

    #[test]
    fn one_that_does_not_answer_keeps_nobody_from_asking_the_others() {
        let mut joins = Joins::default();
        assert!(joins.ask(&name(1), Millis(0)));
        assert!(joins.ask(&name(2), Millis(0)));
        assert!(!joins.ask(&name(1), Millis(60_000)), "its question is open");
        joins.failed(&name(2), Millis(10));
        assert!(!joins.ask(&name(2), Millis(59)));
        assert!(joins.ask(&name(2), Millis(60)));
    }

    #[test]
    fn pauses_double_up_to_32_times() {
        let mut joins = Joins::default();
        for pause in [50, 100, 200, 400, 800, 1_600, 1_600, 1_600] {
            joins.failed(&name(1), Millis(0));
            assert!(!joins.ask(&name(1), Millis(pause - 1)));
            assert!(joins.ask(&name(1), Millis(pause)));
        }
        joins.welcomed();
        assert!(joins.ask(&name(1), Millis(0)));
        joins.failed(&name(1), Millis(0));
        assert!(joins.ask(&name(1), Millis(50)), "it begins anew");
    }

    #[test]
    fn a_later_leader_is_asked_at_once() {
        let mut joins = Joins::default();
        joins.led(Term(3));
        for _ in 0..10 {
            joins.failed(&name(1), Millis(0));
        }
        joins.led(Term(3));
        joins.led(Term(2));
        assert!(!joins.ask(&name(1), Millis(1_000)));
        joins.led(Term(4));
        assert!(joins.ask(&name(1), Millis(1_000)));
        joins.led(Term(5));
        assert!(!joins.ask(&name(1), Millis(1_000)), "its question is open");
        joins.withdrawn();
        assert!(joins.ask(&name(1), Millis(1_000)));
    }
}
