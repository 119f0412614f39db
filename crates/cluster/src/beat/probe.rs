use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::runtime::Handle;

/// Asks the main runtime to do nothing, and notes for how long it has not.
pub(super) struct Probe {
    runtime: Handle,
    /// When the question was put that is not answered, and where the answer will be.
    asked: Option<(Instant, Arc<AtomicBool>)>,
}

impl Probe {
    pub(super) fn new(runtime: Handle) -> Self {
        Self { runtime, asked: None }
    }

    /// For how long there was no answer, milliseconds. Asks anew if there was.
    pub(super) fn silent_ms(&mut self) -> u64 {
        if let Some((since, answered)) = &self.asked
            && !answered.load(Ordering::Acquire)
        {
            return u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
        }
        let answered = Arc::new(AtomicBool::new(false));
        let answer = answered.clone();
        self.runtime.spawn(async move { answer.store(true, Ordering::Release) });
        self.asked = Some((Instant::now(), answered));
        0
    }
}
