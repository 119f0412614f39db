//! The two clocks: a monotonic one for decisions, the wall clock for what people read.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use domain::time::Millis;

/// Monotonic time since this replica started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(self) -> Millis {
        self.at(Instant::now())
    }

    pub(crate) fn at(self, instant: Instant) -> Millis {
        let since = instant.saturating_duration_since(self.0).as_millis();
        Millis(u64::try_from(since).unwrap_or(u64::MAX))
    }
}

/// Milliseconds since the Unix epoch, for people.
pub(crate) fn wall_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Waits between attempts: doubled each time up to a second, with jitter.
pub(crate) struct Backoff {
    next_ms: u64,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next_ms: 25 }
    }

    pub(crate) async fn wait(&mut self) {
        let wait_ms = rand::random_range(self.next_ms / 2..=self.next_ms);
        self.next_ms = (self.next_ms * 2).min(1_000);
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
    }
}
