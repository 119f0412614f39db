//! The only place of this crate that reads a wall clock: for people, for deadlines, never for safety.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// When the wall clock will show `deadline_ms`, as far as it runs evenly until then.
pub(crate) fn instant_at(deadline_ms: i64) -> Instant {
    let left = u64::try_from(deadline_ms - now_ms()).unwrap_or(0);
    Instant::now() + Duration::from_millis(left)
}

/// How long until the wall clock shows `at_ms`.
pub(crate) fn until(at_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(at_ms.saturating_sub(now_ms())).unwrap_or(0))
}
