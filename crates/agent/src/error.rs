//! What can fail on the node side.

use domain::{ErrorKind, Reason, ShardId};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("config has {field} = {value}: write 1 to {most}")]
    Config { field: &'static str, value: u64, most: u64 },
    #[error("cannot start {what}")]
    Spawn {
        what: String,
        #[source]
        source: ractor::SpawnErr,
    },
    #[error("cannot open shard {shard}")]
    Open {
        shard: ShardId,
        #[source]
        source: Box<store::Error>,
    },
    #[error("shard {shard} is owned under another epoch")]
    Fenced { shard: ShardId },
    #[error("cannot open shard {shard}: {reason}")]
    NotOpened { shard: ShardId, reason: Reason },
    #[error("cannot read agent {agent}")]
    Read {
        agent: String,
        #[source]
        source: Box<store::Error>,
    },
    #[error("the journal of agent {agent} is damaged")]
    Journal {
        agent: String,
        #[source]
        source: proto::journal::Error,
    },
    #[error("the journal of agent {agent} cannot be folded")]
    Fold {
        agent: String,
        #[source]
        source: domain::Error,
    },
    #[error("definition {hash} cannot be had")]
    Definition { hash: String, reason: Reason },
    #[error("the cluster link failed")]
    Cluster(#[from] Box<cluster::Error>),
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } => ErrorKind::Invalid,
            Self::Spawn { .. } | Self::Journal { .. } | Self::Fold { .. } => ErrorKind::Internal,
            Self::Open { source, .. } | Self::Read { source, .. } => source.kind(),
            Self::Fenced { .. } | Self::NotOpened { .. } => ErrorKind::Fenced,
            Self::Definition { .. } => ErrorKind::Unavailable,
            Self::Cluster(error) => error.kind(),
        }
    }

    /// The reason code with which a caller is refused.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Open { .. } | Self::Read { .. } => Reason::StoreUnavailable,
            Self::Fenced { .. } => Reason::Fenced,
            Self::Definition { reason, .. } | Self::NotOpened { reason, .. } => *reason,
            Self::Spawn { .. } | Self::Journal { .. } | Self::Fold { .. } => Reason::Quarantined,
            Self::Config { .. } => Reason::Malformed,
            Self::Cluster(_) => Reason::Overloaded,
        }
    }
}
