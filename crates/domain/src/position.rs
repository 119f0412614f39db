//! Where in a shard's history an answer was taken, and which answers are too old to be shown.
//!
//! A node that was stopped answers from what it knew before. Whoever has seen a later answer about the same work or agent
//! must not be told the older one.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;

use crate::{AgentId, Epoch, Error, Lsn, WorkId};

/// The ownership under which an answer about a work or an agent was given, and the last committed row that is surely in it. Both only
/// grow, so of two answers about one of them the one with the larger position is not the older. Text is `<epoch>.<lsn>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub epoch: Epoch,
    pub lsn: Lsn,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.lsn)
    }
}

impl FromStr for Position {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let parts = text.split_once('.');
        let parsed = parts.and_then(|(epoch, lsn)| Some((epoch.parse().ok()?, lsn.parse().ok()?)));
        let (epoch, lsn) =
            parsed.ok_or_else(|| Error::malformed("position", text, "<epoch>.<lsn>"))?;
        Ok(Self { epoch: Epoch(epoch), lsn: Lsn(lsn) })
    }
}

/// What an answer is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    Work(WorkId),
    Agent(AgentId),
}

impl From<WorkId> for Subject {
    fn from(work: WorkId) -> Self {
        Self::Work(work)
    }
}

impl From<AgentId> for Subject {
    fn from(agent: AgentId) -> Self {
        Self::Agent(agent)
    }
}

/// The newest position that was shown of each of the last subjects asked for. Forgets the oldest beyond its room, which
/// costs the comparison and nothing else.
#[derive(Debug)]
pub struct Shown {
    positions: HashMap<Subject, Position>,
    /// In the order in which they were first shown.
    order: VecDeque<Subject>,
    subjects_max: usize,
}

impl Shown {
    pub fn new(subjects_max: usize) -> Self {
        let subjects_max = subjects_max.max(1);
        Self { positions: HashMap::new(), order: VecDeque::new(), subjects_max }
    }

    /// Whether an answer about `subject` taken at `position` may be shown; if so it counts as shown.
    pub fn show(&mut self, subject: impl Into<Subject>, position: Position) -> bool {
        let subject = subject.into();
        if let Some(known) = self.positions.get_mut(&subject) {
            let is_new = *known <= position;
            *known = position.max(*known);
            return is_new;
        }
        if self.order.len() == self.subjects_max
            && let Some(oldest) = self.order.pop_front()
        {
            self.positions.remove(&oldest);
        }
        self.positions.insert(subject.clone(), position);
        self.order.push_back(subject);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: u64, lsn: u64) -> Position {
        Position { epoch: Epoch(epoch), lsn: Lsn(lsn) }
    }

    fn work(lsn: u64) -> WorkId {
        format!("w-0-001-{lsn:x}").parse().unwrap()
    }

    #[test]
    fn an_older_answer_about_the_same_work_is_not_shown() {
        let mut shown = Shown::new(8);
        assert!(shown.show(work(1), at(2, 10)));
        assert!(shown.show(work(1), at(2, 10)));
        assert!(!shown.show(work(1), at(2, 9)));
        assert!(!shown.show(work(1), at(1, 99)));
        assert!(shown.show(work(1), at(3, 4)));
        assert!(!shown.show(work(1), at(2, 10)));
    }

    #[test]
    fn works_and_agents_do_not_bear_on_each_other() {
        let agent = |key: &str| format!("default/bench/{key}").parse::<AgentId>().unwrap();
        let mut shown = Shown::new(8);
        assert!(shown.show(work(1), at(2, 10)));
        assert!(shown.show(work(2), at(1, 1)));
        assert!(shown.show(agent("a"), at(3, 1)));
        assert!(shown.show(agent("b"), at(1, 1)));
        assert!(!shown.show(agent("a"), at(2, 1)));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut shown = Shown::new(2);
        for lsn in 1..=3 {
            assert!(shown.show(work(lsn), at(2, 10)));
        }
        assert_eq!((shown.positions.len(), shown.order.len()), (2, 2));
        assert!(shown.show(work(1), at(1, 1)), "it was forgotten");
        assert!(!shown.show(work(3), at(1, 1)));
    }

    #[test]
    fn a_position_reads_back() {
        assert_eq!(at(7, 42).to_string().parse(), Ok(at(7, 42)));
        for text in ["", "7", "7.", ".1", "7.x", "7.1.2"] {
            assert!(text.parse::<Position>().is_err(), "{text}");
        }
    }
}
