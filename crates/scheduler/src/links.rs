//! What the scheduler needs of the links to other processes: so much and no more, so that tests can stand in for it.

use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use cluster::Peer;
use domain::Reason;
use proto::link::{Envelope, Refusal};

/// The links, as the scheduler uses them.
#[async_trait]
pub(crate) trait Links: Send + Sync + 'static {
    async fn call(
        &self,
        to: &Peer,
        envelope: Envelope,
        deadline: Instant,
    ) -> Result<Bytes, cluster::Error>;
    fn cast(&self, to: &Peer, envelope: Envelope) -> Result<(), cluster::Error>;
    fn learn(&self, peer: Peer, addresses: Vec<String>);
    fn forget(&self, peer: Peer);
    fn is_linked(&self, peer: &Peer) -> bool;
    /// Where others reach this process.
    fn address(&self) -> String;
}

#[async_trait]
impl Links for cluster::Handle {
    async fn call(
        &self,
        to: &Peer,
        envelope: Envelope,
        deadline: Instant,
    ) -> Result<Bytes, cluster::Error> {
        cluster::Handle::call(self, to, envelope, deadline).await
    }

    fn cast(&self, to: &Peer, envelope: Envelope) -> Result<(), cluster::Error> {
        cluster::Handle::cast(self, to, envelope)
    }

    fn learn(&self, peer: Peer, addresses: Vec<String>) {
        cluster::Handle::learn(self, peer, addresses);
    }

    fn forget(&self, peer: Peer) {
        cluster::Handle::forget(self, peer);
    }

    fn is_linked(&self, peer: &Peer) -> bool {
        cluster::Handle::is_linked(self, peer)
    }

    fn address(&self) -> String {
        cluster::Handle::address(self).to_owned()
    }
}

/// Takes the answer to a request. It is called once; a request that is dropped without is answered by its link.
pub(crate) type Respond = Box<dyn FnOnce(Result<Bytes, Refusal>) + Send>;

/// What another process asks or tells.
pub(crate) struct Request {
    pub(crate) from: Peer,
    pub(crate) envelope: Envelope,
    pub(crate) deadline: Option<Instant>,
    /// None: it expects no answer.
    pub(crate) respond: Option<Respond>,
}

impl Request {
    pub(crate) fn answer(self, answer: Result<Bytes, Refusal>) {
        if let Err(refusal) = &answer {
            let (from, kind) = (&self.from, self.envelope.kind);
            tracing::debug!(%from, kind, reason = refusal.reason, message = refusal.message, "refused");
        }
        if let Some(respond) = self.respond {
            respond(answer);
        }
    }

    pub(crate) fn refuse(self, refusal: Refusal) {
        self.answer(Err(refusal));
    }
}

pub(crate) fn refusal(reason: Reason, message: impl Into<String>) -> Refusal {
    Refusal { reason: reason.code().into(), message: message.into(), ..Refusal::default() }
}

pub(crate) fn malformed(message: impl Into<String>) -> Refusal {
    refusal(Reason::Malformed, message)
}

pub(crate) fn overloaded() -> Refusal {
    Refusal {
        retry_after_ms: 200,
        ..refusal(Reason::Overloaded, "too many messages wait at the leader")
    }
}
