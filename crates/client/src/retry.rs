//! When a failure is worth another attempt, and after which pause.

use std::time::Duration;

use rand::RngExt;
use tokio::time::Instant;
use tonic::Code;

use crate::{Error, Timeouts};

/// A cluster that says no with "later" is believed this often in one call; then its word is passed on.
const LATER_MAX: u32 = 8;

/// The attempts of one call, or of one gap in a stream.
#[derive(Debug)]
pub(crate) struct Patience {
    started: Instant,
    timeouts: Timeouts,
    failures: u32,
    later: u32,
}

impl Patience {
    pub(crate) fn new(timeouts: &Timeouts) -> Self {
        Self { started: Instant::now(), timeouts: timeouts.clone(), failures: 0, later: 0 }
    }

    /// When the caller's time is over.
    pub(crate) fn deadline(&self) -> Instant {
        self.started + self.timeouts.call
    }

    /// It works again: the next failure is a first one.
    pub(crate) fn restart(&mut self) {
        *self = Self::new(&self.timeouts);
    }

    /// A stream broke that had run since `since`. After one that had run well this is a first failure; one that
    /// breaks over and over is still the same gap.
    pub(crate) fn lasted(&mut self, since: Instant) {
        if self.timeouts.pause_max < since.elapsed() {
            self.restart();
        }
    }

    /// The pause before the next attempt, or the error if there is to be none.
    pub(crate) fn pause(&mut self, error: Error, reached: bool) -> Result<Duration, Error> {
        if error.is_for_good() || self.is_exhausted(&error, reached) {
            return Err(error);
        }
        self.failures = self.failures.saturating_add(1);
        let pause = asked_for(&error).unwrap_or_else(|| self.jittered());
        match Instant::now() + pause < self.deadline() {
            true => Ok(pause),
            false => Err(error),
        }
    }

    fn is_exhausted(&mut self, error: &Error, reached: bool) -> bool {
        if let Error::Refused { status, .. } = error
            && status.code() != Code::Unavailable
        {
            self.later += 1;
            return LATER_MAX < self.later;
        }
        !reached && self.timeouts.unreached < self.started.elapsed()
    }

    /// Doubles with each failure; at random in its upper half, so that many clients do not come back at once.
    fn jittered(&self) -> Duration {
        let doubled = 1_u32.checked_shl(self.failures.saturating_sub(1)).unwrap_or(u32::MAX);
        let full = self.timeouts.pause_min.saturating_mul(doubled).min(self.timeouts.pause_max);
        full.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

fn asked_for(error: &Error) -> Option<Duration> {
    match error {
        Error::Refused { retry_after, .. } => *retry_after,
        Error::NoCredentials { .. }
        | Error::Credentials { .. }
        | Error::File { .. }
        | Error::NoAddress { .. }
        | Error::Address { .. }
        | Error::NotReached { .. }
        | Error::Deadline { .. }
        | Error::Answer { .. }
        | Error::TagInUse { .. }
        | Error::Ended => None,
    }
}

#[cfg(test)]
mod unit {
    use domain::{ErrorKind, Reason};
    use proto::status::Failure;

    use super::*;

    fn not_reached() -> Error {
        Error::NotReached { addresses: vec!["a:1".to_owned()], source: "refused".into() }
    }

    fn refused(failure: Failure) -> Error {
        Error::refused(failure.into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_for_good_is_passed_on_at_once() {
        let mut patience = Patience::new(&Timeouts::default());
        assert!(patience.pause(refused(Failure::not_found("no work w-0-000-1")), true).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_cluster_never_reached_is_given_up_sooner_than_one_that_was() {
        let mut patience = Patience::new(&Timeouts::default());
        tokio::time::advance(Duration::from_secs(6)).await;
        assert!(patience.pause(not_reached(), true).is_ok());
        assert!(patience.pause(not_reached(), false).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn no_pause_ends_after_the_deadline() {
        let mut patience = Patience::new(&Timeouts::default());
        let later = Failure::new(ErrorKind::Unavailable, Reason::Unowned, "no owner");
        let pause = |patience: &mut Patience, delay: u64| {
            patience.pause(refused(later.clone().retry_after(Duration::from_secs(delay))), true)
        };
        assert_eq!(pause(&mut patience, 20).unwrap(), Duration::from_secs(20));
        tokio::time::advance(Duration::from_secs(20)).await;
        assert!(pause(&mut patience, 20).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_is_tried_again_as_asked_and_not_for_ever() {
        let mut patience = Patience::new(&Timeouts::default());
        let full = || {
            let failure = Failure::new(ErrorKind::Exhausted, Reason::QueueFull, "queue is full");
            refused(failure.retry_after(Duration::from_millis(7)))
        };
        for _ in 0..LATER_MAX {
            assert_eq!(patience.pause(full(), true).unwrap(), Duration::from_millis(7));
        }
        assert!(patience.pause(full(), true).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_to_their_bound() {
        let timeouts = Timeouts::default();
        let mut patience = Patience::new(&timeouts);
        for failure in 0..100 {
            let pause = patience.pause(not_reached(), true).unwrap();
            let full = timeouts.pause_min * (1 << failure.min(16));
            let full = full.min(timeouts.pause_max);
            assert!(full / 2 <= pause && pause <= full, "failure {failure}: {pause:?}");
        }
    }
}
