//! The links to other members, as the agents of a node see them: a seam for tests.

use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;

use cluster::Peer;
use domain::{Attempt, Epoch};
use proto::journal::StepNumbers;
use proto::link::{Envelope, StepAttempt, StepJob};

/// Calls and casts to peers.
pub trait Wire: Send + Sync + 'static {
    /// Ends by `deadline`, with an answer or a typed error.
    fn call(
        &self,
        to: Peer,
        envelope: Envelope,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes, cluster::Error>>;

    /// Queues a message; it arrives at most once.
    ///
    /// # Errors
    /// No such peer, or too much is on its way to it.
    fn cast(&self, to: &Peer, envelope: Envelope) -> Result<(), cluster::Error>;

    /// Whether a call goes out at once.
    fn is_linked(&self, to: &Peer) -> bool;
}

impl Wire for cluster::Handle {
    fn call(
        &self,
        to: Peer,
        envelope: Envelope,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes, cluster::Error>> {
        let handle = self.clone();
        Box::pin(async move { handle.call(&to, envelope, deadline).await })
    }

    fn cast(&self, to: &Peer, envelope: Envelope) -> Result<(), cluster::Error> {
        cluster::Handle::cast(self, to, envelope)
    }

    fn is_linked(&self, to: &Peer) -> bool {
        cluster::Handle::is_linked(self, to)
    }
}

/// An attempt as other processes are told of it.
pub(crate) fn attempt(attempt: &Attempt) -> StepAttempt {
    let StepNumbers { phase, cycle, round, index } = attempt.step.into();
    StepAttempt {
        work: attempt.work.to_string(),
        phase,
        cycle,
        round,
        index,
        epoch: attempt.epoch.0,
        attempt: attempt.number,
    }
}

/// None if no attempt is named so.
pub(crate) fn read_attempt(message: &StepAttempt) -> Option<Attempt> {
    let StepAttempt { phase, cycle, round, index, .. } = *message;
    Some(Attempt {
        work: message.work.parse().ok()?,
        step: StepNumbers { phase, cycle, round, index }.step()?,
        epoch: Epoch(message.epoch),
        number: message.attempt,
    })
}

/// The attempt that a job is.
pub(crate) fn attempt_of(job: &StepJob) -> Option<Attempt> {
    let StepJob { phase, cycle, round, index, .. } = *job;
    Some(Attempt {
        work: job.work.parse().ok()?,
        step: StepNumbers { phase, cycle, round, index }.step()?,
        epoch: Epoch(job.epoch),
        number: job.attempt,
    })
}
