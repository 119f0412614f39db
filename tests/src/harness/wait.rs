//! Waiting for conditions, the only way in which a test may wait.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Looks until `probe` has an answer, and gives it back.
///
/// # Panics
/// There was none within the time; the message has what was seen last.
pub fn eventually<T, E: Display>(
    within: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<T, E>,
) -> T {
    let began = Instant::now();
    loop {
        match probe() {
            Ok(found) => return found,
            Err(last) if within < began.elapsed() => {
                panic!("not within {within:?}: {what}; the last look found {last}")
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// The same for a condition that holds or does not.
///
/// # Panics
/// It did not hold within the time.
pub fn eventually_true(within: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    eventually(within, what, || if holds() { Ok(()) } else { Err("that it does not hold") });
}
