//! Where in a shard's history an answer was taken, and which answers are too old to be shown.
//!
//! A node that was stopped answers from what it knew before. Whoever has seen a later answer about the same work must
//! not be told the older one.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::str::FromStr;

use crate::{Epoch, Error, Lsn, WorkId};

/// The ownership under which an answer about a work was given, and the last committed row that is surely in it. Both only
/// grow, so of two answers about one work the one with the larger position is not the older. Text is `<epoch>.<lsn>`.
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

/// The newest position that was shown of each of the last works asked for. Forgets the oldest beyond its room, which
/// costs the comparison and nothing else.
#[derive(Debug)]
pub struct Shown {
    positions: HashMap<WorkId, Position>,
    /// In the order in which the works were first shown.
    order: VecDeque<WorkId>,
    works_max: usize,
}

impl Shown {
    pub fn new(works_max: usize) -> Self {
        Self { positions: HashMap::new(), order: VecDeque::new(), works_max: works_max.max(1) }
    }

    /// Whether an answer about `work` taken at `position` may be shown; if so it counts as shown.
    pub fn show(&mut self, work: WorkId, position: Position) -> bool {
        if let Some(known) = self.positions.get_mut(&work) {
            let is_new = *known <= position;
            *known = position.max(*known);
            return is_new;
        }
        if self.order.len() == self.works_max
            && let Some(oldest) = self.order.pop_front()
        {
            self.positions.remove(&oldest);
        }
        self.positions.insert(work, position);
        self.order.push_back(work);
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
    fn works_do_not_bear_on_each_other() {
        let mut shown = Shown::new(8);
        assert!(shown.show(work(1), at(2, 10)));
        assert!(shown.show(work(2), at(1, 1)));
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
