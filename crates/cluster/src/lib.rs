//! The cluster: finds peers, keeps links to them over mutual TLS, and carries messages with answers and limits.
//!
//! ractor_cluster is the link protocol between the gateways of two processes, over connections that this crate accepts
//! and dials itself. [`spawn`] joins, [`Handle`] calls and casts, [`Service`] hears; [`beat`] is the failure detector's
//! own connection, on a thread of its own.
//!
//! Never interprets a message, never decides who lives, and never queues without a bound: who cannot be served is told
//! so at once, and every call ends by its deadline.

pub mod beat;

mod accept;
mod channel;
mod clock;
mod config;
mod error;
mod gateway;
mod handle;
mod hub;
mod link;
mod links;
mod metrics;
mod name;
mod outbox;
mod peer;
mod reply;
mod server;
mod transport;
mod window;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use domain::Incarnation;
use proto::link::Envelope;

pub use config::Config;
pub use error::{Error, kind_of, reason_of};
pub use handle::{Handle, spawn};
pub use peer::Peer;
pub use reply::Reply;

/// What a process needs to take part in the cluster.
pub struct Args {
    pub config: Config,
    pub identity: net::Identity,
    /// Larger than that of any earlier run under this name.
    pub incarnation: Incarnation,
    pub service: Arc<dyn Service>,
}

/// Who hears what comes in. Both are called in the gateway, and must not block: nothing else comes in meanwhile.
pub trait Service: Send + Sync + 'static {
    fn handle(&self, incoming: Incoming);
    /// Called before the first message of a link, and once after its last.
    fn link(&self, event: LinkEvent);
}

/// A message of a peer.
#[derive(Debug)]
pub struct Incoming {
    /// By the certificate of the link on which it came; nothing in the message can change that.
    pub from: Peer,
    /// `hops` counts this link too. A payload is a slice of the frame that it came in.
    pub envelope: Envelope,
    /// In our clock. Casts have none.
    pub deadline: Option<Instant>,
    /// `None`: a cast.
    pub reply: Option<Reply>,
}

/// A link came up or went down. A `Down` follows each `Up`, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    Up { peer: Peer, incarnation: Incarnation },
    Down { peer: Peer },
}

impl fmt::Display for LinkEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { peer, incarnation } => write!(f, "{peer}#{incarnation} is up"),
            Self::Down { peer } => write!(f, "{peer} is down"),
        }
    }
}
