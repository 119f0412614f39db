//! How long a writer waits between two commits, so that a busy store has fewer and larger ones to make.
//!
//! A commit costs the store about the same whether it has one row or ten, so what is gathered meanwhile is nearly free.
//! Never slows an idle store down: what is waited is a part of what commits take longer than the fastest one did.

use std::time::Duration;

/// Waited at most.
const PAUSE_MAX: Duration = Duration::from_millis(10);
/// So many rows are enough for a commit: more would make it hardly cheaper.
const ROWS_ENOUGH: usize = 32;
/// What commits usually take is an average in which each has this share.
const SHARE: u32 = 8;
/// A store is busy if commits take so many times what the fastest one took.
const BUSY: u32 = 2;

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
                self.least = Some(least.min(took));
                self.usual = (self.usual * (SHARE - 1) + took) / SHARE;
            }
        }
    }

    /// From the last answer to the next commit, if so many rows wait for it already.
    pub fn pause(&self, waiting_rows: usize) -> Duration {
        if ROWS_ENOUGH <= waiting_rows {
            return Duration::ZERO;
        }
        let least = self.least.unwrap_or_default();
        self.usual.saturating_sub(least * BUSY).min(self.usual / 2).min(PAUSE_MAX)
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
    }

    #[test]
    fn a_busy_store_is_given_time_up_to_a_limit() {
        let busy = |ms| [vec![1], vec![ms; 100]].concat();
        assert_eq!(after(&busy(6)), 2);
        assert_eq!(after(&busy(8)), 3);
        assert_eq!(after(&busy(100)), 10);
    }

    #[test]
    fn what_was_slow_once_is_forgotten() {
        assert_eq!(after(&[vec![1, 200], vec![1; 60]].concat()), 0);
    }
}
