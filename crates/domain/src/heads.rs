//! The rule of `mark`: which agents' rows are older than their last entry, and where those entries are.
//!
//! Without it a recovery would scan the whole log; with it, only what came after the mark. Holds heads, never entries.

use std::collections::{BTreeMap, BTreeSet};

use crate::Lsn;

/// Agents whose rows may lag, at most, before the oldest are written.
pub const STALE_AGENTS_MAX: usize = 20_000;
const MARK_ROWS: u64 = 20_000;
const MARK_MS: u64 = 10_000;

/// The last entry of every agent whose row is older than it. Agents by their row number; the shard itself (0) has no
/// row and is never in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heads {
    by_agent: BTreeMap<u64, Lsn>,
    by_head: BTreeSet<(Lsn, u64)>,
}

impl Heads {
    pub fn new() -> Self {
        Self::default()
    }

    /// What a writer that died knew: the heads of the last mark and every (lsn, agent) of the log after it. Agents
    /// whose rows were written since then are in it, too, which costs a row but loses nothing.
    pub fn recover(mark: &[(u64, Lsn)], tail: impl Iterator<Item = (Lsn, u64)>) -> Self {
        let mut heads = Self::new();
        let marked = mark.iter().map(|(agent, head)| (*head, *agent));
        for (lsn, agent) in marked.chain(tail) {
            heads.note(agent, lsn);
        }
        heads
    }

    /// Entry `lsn` of this agent was appended.
    pub fn note(&mut self, agent_row: u64, lsn: Lsn) {
        let known = self.get(agent_row);
        if agent_row == 0 || known.is_some_and(|known| lsn <= known) {
            return;
        }
        if let Some(known) = self.by_agent.insert(agent_row, lsn) {
            self.by_head.remove(&(known, agent_row));
        }
        self.by_head.insert((lsn, agent_row));
    }

    /// The agent's row was written with this head. If an entry came after it, the row is old already and stays.
    pub fn saved(&mut self, agent_row: u64, head: Lsn) {
        if self.get(agent_row).is_some_and(|known| known <= head) {
            let known = self.by_agent.remove(&agent_row).expect("it was just found");
            self.by_head.remove(&(known, agent_row));
        }
    }

    /// The agent's last entry, if its row does not know it.
    pub fn get(&self, agent_row: u64) -> Option<Lsn> {
        self.by_agent.get(&agent_row).copied()
    }

    pub fn len(&self) -> usize {
        self.by_agent.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_agent.is_empty()
    }

    /// The agents whose rows must be written so that at most `max` lag, those with the oldest heads first.
    pub fn overflow(&self, max: usize) -> Vec<u64> {
        let count = self.len().saturating_sub(max);
        self.by_head.iter().take(count).map(|(_, agent)| *agent).collect()
    }

    /// What the mark must hold, by agent.
    pub fn snapshot(&self) -> Vec<(u64, Lsn)> {
        self.by_agent.iter().map(|(agent, head)| (*agent, *head)).collect()
    }
}

/// Whether it is time to write the mark: so many rows, or so much time with at least one row, since the last one.
pub fn due(rows_since: u64, ms_since: u64) -> bool {
    MARK_ROWS <= rows_since || (0 < rows_since && MARK_MS <= ms_since)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(noted: &[(u64, u64)]) -> Heads {
        Heads::recover(&[], noted.iter().map(|(lsn, agent)| (Lsn(*lsn), *agent)))
    }

    #[test]
    fn an_agent_leaves_when_its_row_has_caught_up() {
        let mut heads = heads(&[(1, 7), (2, 8), (3, 7)]);
        heads.saved(7, Lsn(1));
        assert_eq!(heads.get(7), Some(Lsn(3)));
        heads.saved(7, Lsn(3));
        assert_eq!(heads.get(7), None);
        assert_eq!(heads.snapshot(), [(8, Lsn(2))]);
    }

    #[test]
    fn the_oldest_rows_are_written_first() {
        let heads = heads(&[(1, 7), (2, 8), (3, 9), (4, 7)]);
        assert_eq!(heads.overflow(1), [8, 9]);
        assert_eq!(heads.overflow(3), [0; 0]);
    }

    #[test]
    fn mark_and_tail_give_what_was_known() {
        let mut before = heads(&[(1, 7), (2, 8), (3, 9)]);
        before.saved(8, Lsn(2));
        let mark = before.snapshot();
        let tail = [(Lsn(4), 7), (Lsn(5), 0), (Lsn(6), 10)];
        let after = Heads::recover(&mark, tail.into_iter());
        assert_eq!(after.snapshot(), [(7, Lsn(4)), (9, Lsn(3)), (10, Lsn(6))]);
    }

    #[test]
    fn a_mark_is_due_by_rows_or_by_time() {
        let check = |rows, ms, expected| assert_eq!(due(rows, ms), expected, "{rows} {ms}");
        check(0, 1 << 40, false);
        check(1, 9_999, false);
        check(1, 10_000, true);
        check(20_000, 0, true);
    }
}
