//! The links to other members, as the agents of a node see them: a seam for tests.

use std::time::Instant;

use bytes::Bytes;
use futures::future::BoxFuture;

use cluster::Peer;
use proto::link::Envelope;

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
}
