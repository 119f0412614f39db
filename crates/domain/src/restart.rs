//! How often something that fails is started again before it is given up.

use std::collections::VecDeque;

use crate::Reason;

/// At most [`Intensity::RESTARTS_MAX`] failures within [`Intensity::WINDOW_MS`].
#[derive(Clone, Debug, Default)]
pub struct Intensity {
    failures: VecDeque<u64>,
    total: u32,
    /// When it was last woken in quarantine.
    woken_at: Option<u64>,
}

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Start it again after this long.
    Restart { after_ms: u64 },
    /// It failed too often: quarantine.
    Quarantine,
}

impl Verdict {
    /// Under which it is written down.
    pub fn reason(self) -> Reason {
        match self {
            Self::Restart { .. } => Reason::Restarted,
            Self::Quarantine => Reason::Quarantined,
        }
    }
}

impl Intensity {
    pub const RESTARTS_MAX: usize = 5;
    pub const WINDOW_MS: u64 = 60_000;
    const BACKOFF_MS: u64 = 50;
    /// Between two attempts to end what one in quarantine has overdue: it may fail at that, too.
    pub const WAKE_MS: u64 = 10_000;

    /// Whether one in quarantine is woken now, unasked, to end what is overdue.
    pub fn wakes(&mut self, now_ms: u64) -> bool {
        if self.woken_at.is_some_and(|at| now_ms.saturating_sub(at) < Self::WAKE_MS) {
            return false;
        }
        self.woken_at = Some(now_ms);
        true
    }

    /// A failure at `now_ms` of a monotonic clock. `jitter` is random in 0..=1,000 and spreads restarts that many
    /// failures at once would bunch.
    pub fn failed(&mut self, now_ms: u64, jitter: u64) -> Verdict {
        self.total = self.total.saturating_add(1);
        while self.failures.front().is_some_and(|at| *at + Self::WINDOW_MS < now_ms) {
            self.failures.pop_front();
        }
        if self.failures.len() == Self::RESTARTS_MAX {
            return Verdict::Quarantine;
        }
        let base = Self::BACKOFF_MS << self.failures.len();
        self.failures.push_back(now_ms);
        Verdict::Restart { after_ms: base / 2 + base * jitter.min(1_000) / 1_000 }
    }

    /// Failures ever.
    pub fn total(&self) -> u32 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_restarts_for_ever() {
        let mut intensity = Intensity::default();
        let mut last = 0;
        for n in 0..Intensity::RESTARTS_MAX as u64 {
            let Verdict::Restart { after_ms } = intensity.failed(n, 500) else {
                panic!("given up at {n}")
            };
            assert!(last < after_ms, "the backoff grows");
            last = after_ms;
        }
        assert_eq!(intensity.failed(10, 500), Verdict::Quarantine);
    }

    #[test]
    fn rare_failures_restart_again_and_again() {
        let mut intensity = Intensity::default();
        for n in 0..50 {
            let verdict = intensity.failed(n * Intensity::WINDOW_MS, 0);
            assert!(matches!(verdict, Verdict::Restart { .. }));
        }
        assert_eq!(intensity.total(), 50);
    }

    #[test]
    fn one_in_quarantine_is_woken_once_in_a_while() {
        let mut intensity = Intensity::default();
        let woken: Vec<u64> =
            (0..200).map(|tick| tick * 200).filter(|now| intensity.wakes(*now)).collect();
        assert_eq!(woken, [0, 10_000, 20_000, 30_000]);
    }
}
