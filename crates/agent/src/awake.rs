//! Notices when this process stood still: stopped, or starved of its processor.
//!
//! What was about to be begun before that may have been begun elsewhere since, so whoever begins something asks here
//! first. By the clock that runs on while a machine sleeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::metrics;

/// For how long an intent is young, and a process may be silent without having stood still.
pub(crate) const YOUNG_MS: u64 = 1_000;
const TICK: Duration = Duration::from_millis(100);

/// Milliseconds since the machine was started.
pub(crate) fn boot_ms() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned());
    seconds.saturating_mul(1_000).saturating_add(nanos / 1_000_000)
}

/// Since when this process has run without standing still.
#[derive(Debug)]
pub(crate) struct Awake {
    seen_ms: AtomicU64,
    stood_until_ms: AtomicU64,
}

impl Awake {
    /// Looks at the clock from now on, until the last handle is gone.
    pub(crate) fn spawn() -> Arc<Self> {
        let awake = Arc::new(Self::at(boot_ms()));
        let weak = Arc::downgrade(&awake);
        tokio::spawn(async move {
            while let Some(awake) = weak.upgrade() {
                awake.look(boot_ms());
                drop(awake);
                tokio::time::sleep(TICK).await;
            }
        });
        awake
    }

    fn at(now_ms: u64) -> Self {
        Self { seen_ms: AtomicU64::new(now_ms), stood_until_ms: AtomicU64::new(0) }
    }

    fn look(&self, now_ms: u64) {
        let seen_ms = self.seen_ms.fetch_max(now_ms, Ordering::AcqRel);
        if seen_ms + YOUNG_MS < now_ms {
            metrics::STOOD_STILL.inc();
            tracing::warn!(ms = now_ms - seen_ms, "this process stood still");
            self.stood_until_ms.fetch_max(now_ms, Ordering::AcqRel);
        }
    }

    /// As if it had stood still until now.
    #[cfg(test)]
    pub(crate) fn pretend_stop(&self) {
        self.stood_until_ms.store(boot_ms() + 1, Ordering::Release);
    }

    /// Whether this process stood still after `at_ms`.
    pub(crate) fn stood_still_since(&self, at_ms: u64) -> bool {
        // Who comes first after a stop notices it, whoever that is.
        self.look(boot_ms());
        at_ms < self.stood_until_ms.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_older_than_a_stop_is_old() {
        let now_ms = boot_ms();
        let awake = Awake::at(now_ms);
        awake.look(now_ms + YOUNG_MS);
        assert!(!awake.stood_still_since(now_ms));
        let awake = Awake::at(now_ms.saturating_sub(YOUNG_MS + 5));
        assert!(awake.stood_still_since(now_ms.saturating_sub(1)), "whoever asks notices");
        assert!(!awake.stood_still_since(boot_ms() + 1));
    }
}
