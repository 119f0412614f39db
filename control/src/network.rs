//! What the services need of the rest of the cluster, so that they can be tested without sockets.
//!
//! Implemented for the real cluster in [`crate::dispatch`]; never decides where a call goes.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use domain::view::View;
use domain::{DefinitionHash, DefinitionName, ProcessName, Tenant};
use proto::link;
use proto::status::Failure;
use tokio::sync::watch;
use tokio::time::Instant;

/// The view as it changes; none until the first one is there.
pub(crate) type Views = watch::Receiver<Option<Arc<View>>>;

/// Reaches nodes by their names, and knows the view.
#[async_trait]
pub(crate) trait Network: Send + Sync + 'static {
    async fn call(
        &self,
        node: &ProcessName,
        envelope: link::Envelope,
        deadline: Instant,
    ) -> Result<Bytes, Missed>;
    /// Best effort: whoever relies on it asks again.
    fn cast(&self, node: &ProcessName, envelope: link::Envelope);
    fn views(&self) -> Views;
}

/// Why a call has no answer.
#[derive(Debug)]
pub(crate) enum Missed {
    /// The node cannot be reached now, or went away before it answered.
    Gone(String),
    /// Too much is on its way to the node already.
    Overloaded(String),
    Deadline,
    Refused(link::Refusal),
}

/// Knows the definitions.
#[async_trait]
pub(crate) trait Catalog: Send + Sync + 'static {
    /// The newest version of a definition, or the one with that hash.
    async fn definition(
        &self,
        tenant: &Tenant,
        name: &DefinitionName,
        hash: Option<DefinitionHash>,
    ) -> Result<Option<DefinitionHash>, Failure>;
}
