//! Waiting for conditions, the only way in which a test may wait.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// How late a thread of this program was at most when it wanted to run: on a machine that is too busy for beats, it is late,
/// too.
#[derive(Debug)]
pub struct Lateness {
    is_over: Arc<AtomicBool>,
    longest_ms: Arc<AtomicU64>,
}

impl Lateness {
    const PAUSE: Duration = Duration::from_millis(50);

    pub fn watch() -> Self {
        let late = Self { is_over: Arc::default(), longest_ms: Arc::default() };
        let (is_over, longest_ms) = (late.is_over.clone(), late.longest_ms.clone());
        std::thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                let began = Instant::now();
                std::thread::sleep(Self::PAUSE);
                let late = began.elapsed().saturating_sub(Self::PAUSE).as_millis();
                let late_ms = u64::try_from(late).unwrap_or(u64::MAX);
                longest_ms.fetch_max(late_ms, Ordering::Relaxed);
            }
        });
        late
    }

    /// Until now.
    pub fn longest(&self) -> Duration {
        Duration::from_millis(self.longest_ms.load(Ordering::Relaxed))
    }
}

impl Drop for Lateness {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}
