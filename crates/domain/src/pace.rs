//! How long a writer waits between two commits, so that a busy store has fewer and larger ones to make.
//!
//! A commit costs the store about the same whether it has one row or ten, so what is gathered meanwhile is nearly free.
//! Hardly slows an idle store down: what is waited is a part of what commits take longer than fast ones, and than a few
//! milliseconds.

use std::time::Duration;

/// Waited at most.
const PAUSE_MAX: Duration = Duration::from_millis(10);
/// So many rows are enough for a commit: more would make it hardly cheaper.
const ROWS_ENOUGH: usize = 32;
/// What commits usually take is an average in which each has this share.
const SHARE: u32 = 8;
/// A store is busy if commits take so many times what the fastest one took, and longer than this.
const BUSY: u32 = 2;
const BUSY_MIN: Duration = Duration::from_millis(4);
/// The fastest one is forgotten bit by bit: with each commit, this share of what others take longer.
const FORGOTTEN: u32 = 4_096;

/// What the commits of one writer took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    least: Option<Duration>,
    usual: Duration,
}

impl Pace {
    /// A commit was answered after so long.
    pub fn answered(&mut self, took: Duration) {
        match self.least {
            None => (self.least, self.usual) = (Some(took), took),
            Some(least) => {
                self.usual = (self.usual * (SHARE - 1) + took) / SHARE;
                let longer = self.usual.saturating_sub(least) / FORGOTTEN;
                self.least = Some((least + longer).min(took));
            }
        }
    }

    /// From the last answer to the next commit, if so many rows wait for it already.
    pub fn pause(&self, waiting_rows: usize) -> Duration {
        if ROWS_ENOUGH <= waiting_rows {
            return Duration::ZERO;
        }
        let idle = (self.least.unwrap_or_default() * BUSY).max(BUSY_MIN);
        self.usual.saturating_sub(idle).min(self.usual / 2).min(PAUSE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(took: &[u64]) -> u128 {
        let mut pace = Pace::default();
        took.iter().for_each(|ms| pace.answered(Duration::from_millis(*ms)));
        assert_eq!(pace.pause(ROWS_ENOUGH), Duration::ZERO);
        pace.pause(1).as_millis()
    }

    #[test]
    fn an_idle_store_is_not_waited_for() {
        assert_eq!(after(&[]), 0);
        assert_eq!(after(&[5]), 0);
        assert_eq!(after(&[2, 3, 4, 3, 2, 4]), 0);
        assert_eq!(after(&[vec![1], vec![4; 1_000]].concat()), 0, "one was fast by chance");
    }

    #[test]
    fn a_busy_store_is_given_time_up_to_a_limit() {
        let busy = |ms| [vec![1], vec![ms; 100]].concat();
        assert_eq!(after(&busy(6)), 1);
        assert_eq!(after(&busy(8)), 3);
        assert_eq!(after(&busy(100)), 10);
    }

    #[test]
    fn a_store_that_is_slower_for_good_is_not_busy_for_good() {
        assert_eq!(after(&[vec![1], vec![30; 20_000]].concat()), 0);
    }

    #[test]
    fn what_was_slow_once_is_forgotten() {
        assert_eq!(after(&[vec![1, 200], vec![1; 60]].concat()), 0);
    }
}
