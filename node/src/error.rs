//! Why a node cannot run.

use domain::{ErrorKind, ProcessName};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "config names this process {name}, its certificate {id}: give it the certificate of node/{name}"
    )]
    Name { name: ProcessName, id: String },
    #[error("controls has {text:?}: write name=host:port")]
    Control {
        text: String,
        #[source]
        source: Option<domain::Error>,
    },
    #[error("config names no control replica: add controls = [\"name=host:port\"]")]
    NoControl,
    #[error("config names no store: add [stores.main]")]
    NoStore,
    #[error("capacity is 0: at least 1 is needed, 1 unless this node is larger than the others")]
    Capacity,
    #[error("cannot use this node's identity")]
    Identity(#[from] net::Error),
    #[error("cannot serve health and metrics")]
    Admin(#[from] telemetry::Error),
    #[error("cannot use the store")]
    Store(#[from] store::Error),
    #[error("cannot take part in the cluster")]
    Cluster(#[from] cluster::Error),
    #[error("cannot host agents")]
    Agents(#[from] agent::Error),
    #[error("the cluster refuses this node: {why}")]
    Refused { why: String },
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Name { .. }
            | Self::Control { .. }
            | Self::NoControl
            | Self::NoStore
            | Self::Capacity => ErrorKind::Invalid,
            Self::Identity(error) => error.kind(),
            Self::Admin(error) => error.kind(),
            Self::Store(error) => error.kind(),
            Self::Cluster(error) => error.kind(),
            Self::Agents(error) => error.kind(),
            Self::Refused { .. } => ErrorKind::Denied,
        }
    }
}
