//! Between the gateway of this process and its parts: what comes in goes to the scheduler or the watch hub, and calls
//! go out to nodes.

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use cluster::beat::BeatEvent;
use cluster::{Incoming, LinkEvent, Peer};
use domain::{DefinitionHash, DefinitionName, ProcessName, Reason, Role, Tenant, Term};
use prost::Message;
use proto::kind;
use proto::link::{Envelope, Events, Refusal};
use proto::status::Failure;
use tokio::time::Instant;

use crate::hub::Hub;
use crate::network::{Catalog, Missed, Network, Views};
use crate::refusal;

/// Parts that exist only after the gateway does.
#[derive(Clone)]
struct Parts {
    scheduler: scheduler::Handle,
    hub: Arc<Hub>,
}

/// What the gateway and the heartbeat listener call.
#[derive(Default)]
pub(crate) struct Dispatch(OnceLock<Parts>);

impl Dispatch {
    /// From now on what comes in has somewhere to go.
    pub(crate) fn start(&self, scheduler: scheduler::Handle, hub: Arc<Hub>) {
        // It is started once; a second time would change nothing.
        let _ = self.0.set(Parts { scheduler, hub });
    }

    pub(crate) fn beat(&self, event: BeatEvent) {
        if let Some(parts) = self.0.get() {
            parts.scheduler.beat(event);
        }
    }

    pub(crate) fn leader(&self) -> (Option<ProcessName>, Term) {
        let Some(parts) = self.0.get() else { return (None, Term(0)) };
        parts.scheduler.beat_answer()
    }
}

impl cluster::Service for Dispatch {
    fn handle(&self, incoming: Incoming) {
        let Some(parts) = self.0.get() else {
            return refuse(incoming, Reason::ShuttingDown, "this process is starting".to_owned());
        };
        match incoming.envelope.kind {
            kind::EVENTS if incoming.from.role == Role::Node => {
                match Events::decode(incoming.envelope.payload) {
                    Ok(events) => parts.hub.events(&incoming.from.name, events),
                    Err(error) => {
                        tracing::warn!(from = %incoming.from, %error, "events cannot be read")
                    }
                }
            }
            // It refuses what is for nobody.
            _ => parts.scheduler.incoming(incoming),
        }
    }

    fn link(&self, event: LinkEvent) {
        let Some(parts) = self.0.get() else { return };
        if let LinkEvent::Down { peer } = &event {
            parts.hub.link_down(peer.role, &peer.name);
        }
        parts.scheduler.link(event);
    }
}

fn refuse(incoming: Incoming, reason: Reason, message: String) {
    if let Some(reply) = incoming.reply {
        reply.refuse(Refusal { reason: reason.code().into(), message, ..Refusal::default() });
    }
}

/// The cluster as the services see it.
pub(crate) struct Links {
    pub(crate) cluster: cluster::Handle,
    pub(crate) scheduler: scheduler::Handle,
}

#[async_trait]
impl Network for Links {
    async fn call(
        &self,
        node: &ProcessName,
        envelope: Envelope,
        deadline: Instant,
    ) -> Result<Bytes, Missed> {
        let peer = Peer::new(Role::Node, node.clone());
        let answer = self.cluster.call(&peer, envelope, deadline.into_std()).await;
        answer.map_err(missed)
    }

    fn cast(&self, node: &ProcessName, envelope: Envelope) {
        let peer = Peer::new(Role::Node, node.clone());
        if let Err(error) = self.cluster.cast(&peer, envelope) {
            tracing::debug!(%peer, %error, "cast not sent");
        }
    }

    fn views(&self) -> Views {
        self.scheduler.views()
    }
}

fn missed(error: cluster::Error) -> Missed {
    match error {
        cluster::Error::Refused(refused) => Missed::Refused(refused),
        cluster::Error::Deadline { .. } => Missed::Deadline,
        cluster::Error::Overloaded { .. } => Missed::Overloaded(error.to_string()),
        cluster::Error::NoAddress { .. }
        | cluster::Error::Unreachable { .. }
        | cluster::Error::PeerGone { .. } => Missed::Gone(error.to_string()),
        cluster::Error::TooLarge { .. } => {
            let reason = Reason::InputTooLarge.code().into();
            Missed::Refused(Refusal { reason, message: error.to_string(), ..Refusal::default() })
        }
        cluster::Error::Closed
        | cluster::Error::Cookie { .. }
        | cluster::Error::CookieShort { .. }
        | cluster::Error::Listen { .. }
        | cluster::Error::Start { .. } => Missed::Gone(error.to_string()),
    }
}

/// The definitions as the scheduler has them.
pub(crate) struct Definitions(pub(crate) scheduler::Handle);

#[async_trait]
impl Catalog for Definitions {
    async fn definition(
        &self,
        tenant: &Tenant,
        name: &DefinitionName,
        hash: Option<DefinitionHash>,
    ) -> Result<Option<DefinitionHash>, Failure> {
        let found = self.0.definition(tenant.clone(), name.clone(), hash).await?;
        let hash = found.map(|found| DefinitionHash::try_from(&found.hash[..])).transpose();
        hash.map_err(|error| refusal::unreadable("a definition", &error))
    }
}
