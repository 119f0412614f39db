//! The clock in which our deadlines are absolute, and how far that of a peer is from it.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a measured offset counts. Two clocks drift apart by milliseconds in this time.
const WINDOW: Duration = Duration::from_secs(60);

/// Milliseconds since the Unix epoch as this process counts them: read once, then only counted on, so that a clock
/// that somebody sets does not move the deadlines of what is under way.
pub(crate) fn now_ms() -> i64 {
    at_ms(Instant::now())
}

pub(crate) fn at_ms(at: Instant) -> i64 {
    static START: LazyLock<(Instant, i64)> = LazyLock::new(|| {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        (Instant::now(), i64::try_from(unix.as_millis()).unwrap_or(i64::MAX))
    });
    let (start, unix_ms) = *START;
    match at.checked_duration_since(start) {
        Some(since) => unix_ms.saturating_add(millis(since)),
        None => unix_ms.saturating_sub(millis(start.duration_since(at))),
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// What to add to a time of the peer to have it in our clock.
///
/// A frame is never received before it is sent, so the smallest difference seen is the offset and the shortest way.
/// A backlog that a stopped process finds on waking is older than that, and so counts as late.
#[derive(Debug, Default)]
pub(crate) struct Offset {
    /// The smallest difference of the last whole window, and of the one that began at the instant.
    before: Option<i64>,
    current: Option<(Instant, i64)>,
}

impl Offset {
    pub(crate) fn observe(&mut self, sent_ms: i64, received_ms: i64, now: Instant) {
        let difference = received_ms.saturating_sub(sent_ms);
        match &mut self.current {
            Some((since, smallest)) if now.duration_since(*since) < WINDOW => {
                *smallest = difference.min(*smallest);
            }
            current => {
                self.before = current.map(|(_, smallest)| smallest);
                *current = Some((now, difference));
            }
        }
    }

    pub(crate) fn get(&self) -> i64 {
        let current = self.current.map(|(_, smallest)| smallest);
        match (self.before, current) {
            (Some(before), Some(current)) => before.min(current),
            (one, other) => one.or(other).unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skewed_clock_makes_nothing_late() {
        let (mut offset, now) = (Offset::default(), Instant::now());
        offset.observe(1_000, 900_007, now);
        offset.observe(1_010, 900_012, now);
        offset.observe(1_020, 900_050, now);
        assert_eq!(offset.get(), 899_002);
    }

    #[test]
    fn the_backlog_of_a_stopped_process_is_late() {
        let (mut offset, start) = (Offset::default(), Instant::now());
        offset.observe(0, 5, start);
        // It slept for 65 seconds, and reads now what was sent meanwhile.
        let awake = start + Duration::from_secs(65);
        offset.observe(100, 65_105, awake);
        offset.observe(200, 65_106, awake);
        assert_eq!(offset.get(), 5);
    }

    #[test]
    fn a_drift_is_followed() {
        let (mut offset, start) = (Offset::default(), Instant::now());
        for minute in 0..10 {
            offset.observe(0, minute * 3, start + WINDOW * u32::try_from(minute).unwrap());
        }
        assert_eq!(offset.get(), 24);
    }

    #[test]
    fn our_clock_counts_on() {
        assert!(1_600_000_000_000 < now_ms());
        let now = Instant::now();
        assert_eq!(at_ms(now + Duration::from_secs(1)) - at_ms(now), 1_000);
    }
}
