use std::sync::Arc;

use domain::{ErrorKind, Reason};
use proto::status::Failure;

/// What can go wrong with the scheduler.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("scheduler config: {field} = {value} is not valid: {allowed} is allowed")]
    Config { field: &'static str, value: String, allowed: &'static str },
    #[error("cannot start the scheduler")]
    Start(#[source] Box<ractor::SpawnErr>),
    /// Only the leader does this. Empty: nobody leads now.
    #[error("this replica does not lead: ask {}", or_later(.leader))]
    NotLeader { leader: String },
    #[error("definition {name} is built in and cannot be changed; apply yours under another name")]
    BuiltIn { name: String },
    #[error("{kind:?} cannot be explained here: node, shard and leader can")]
    UnknownKind { kind: String },
    #[error("{subject} is not known: nothing is stored of it")]
    UnknownSubject { subject: String },
    #[error("node {node} is {state}: only a node that runs can drain")]
    NotRunning { node: String, state: String },
    #[error("shard {shard} is not stopped: there is nothing to release")]
    NotStopped { shard: u32 },
    #[error("node {node} is draining: it gets no shards, and ends when it has none")]
    Draining { node: String },
    /// The leader, asked over its link, said no.
    #[error("{}", .0.message)]
    Refused(Box<proto::link::Refusal>),
    #[error("scheduler does not answer; try again")]
    Silent,
    #[error("cannot {action}")]
    Store {
        action: &'static str,
        /// Of a read that several share.
        #[source]
        source: Arc<store::Error>,
    },
    #[error(transparent)]
    Value(#[from] domain::Error),
}

fn or_later(leader: &str) -> &str {
    if leader.is_empty() { "again, nobody leads now" } else { leader }
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config { .. } | Self::UnknownKind { .. } => ErrorKind::Invalid,
            Self::Start(_) => ErrorKind::Internal,
            Self::NotLeader { .. } | Self::Silent => ErrorKind::Unavailable,
            Self::BuiltIn { .. }
            | Self::NotRunning { .. }
            | Self::NotStopped { .. }
            | Self::Draining { .. } => ErrorKind::Conflict,
            Self::Refused(refusal) => cluster::kind_of(refusal),
            Self::UnknownSubject { .. } => ErrorKind::NotFound,
            Self::Store { source, .. } => source.kind(),
            Self::Value(error) => error.kind(),
        }
    }

    pub(crate) fn store(action: &'static str) -> impl FnOnce(store::Error) -> Self {
        move |source| Self::Store { action, source: Arc::new(source) }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let reason = match &error {
            Error::Config { .. }
            | Error::BuiltIn { .. }
            | Error::UnknownKind { .. }
            | Error::NotRunning { .. }
            | Error::NotStopped { .. }
            | Error::Draining { .. }
            | Error::Value(_) => Reason::Malformed,
            Error::Refused(refusal) => cluster::reason_of(refusal).unwrap_or(Reason::Overloaded),
            Error::Start(_) | Error::Silent => Reason::Overloaded,
            Error::NotLeader { .. } => Reason::Moved,
            Error::UnknownSubject { .. } => Reason::NotFound,
            // A request that the store refuses is not mended by trying again.
            Error::Store { source, .. } if source.kind() == ErrorKind::Invalid => Reason::Malformed,
            Error::Store { .. } => Reason::StoreUnavailable,
        };
        let message = match &error {
            // The text of a cause is not part of an error's own, but it is what a caller needs to see.
            Error::Store { source, .. } => format!("{error}: {source}"),
            Error::Config { .. }
            | Error::Start(_)
            | Error::NotLeader { .. }
            | Error::BuiltIn { .. }
            | Error::UnknownKind { .. }
            | Error::UnknownSubject { .. }
            | Error::NotRunning { .. }
            | Error::NotStopped { .. }
            | Error::Draining { .. }
            | Error::Refused(_)
            | Error::Silent
            | Error::Value(_) => error.to_string(),
        };
        Self::new(error.kind(), reason, message)
    }
}
