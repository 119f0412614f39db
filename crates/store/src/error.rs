//! What can go wrong with a store, in the terms of what a caller does next.

use std::error::Error as StdError;
use std::path::PathBuf;

use domain::ErrorKind;
use proto::link::StoreFailure;
use proto::status::Failure;

type Cause = Box<dyn StdError + Send + Sync>;

/// The same failure is the same variant whether the store is in this process or behind the network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Certainly not done; try again.
    #[error("store is not available: {what}")]
    Unavailable {
        what: String,
        #[source]
        source: Option<Cause>,
    },
    /// The answer to a write was lost: it is done, or not, or on its way. Read what it would have changed.
    #[error("the outcome of a write is not known: {what}")]
    Unknown { what: String },
    /// Certainly not done: too much waits already.
    #[error("store is overloaded: {what}")]
    Overloaded { what: String },
    /// The write named an epoch that is not the owner row's.
    #[error("fenced: the epoch is {epoch} now")]
    Fenced { epoch: u64 },
    #[error("{what} does not exist in this store")]
    NotFound { what: String },
    #[error("{what}")]
    ForeignCluster { what: String },
    #[error("{what}; start a newer version of stagedoor on it")]
    NewerSchema { what: String },
    #[error(
        "data directory {directory} is in use by the store with pid {pid}; stop it or choose another directory"
    )]
    Locked { directory: PathBuf, pid: String },
    #[error("{what} is damaged; restore it from a backup")]
    Corrupt { what: String },
    #[error("no space is left for {what}; free some")]
    Full { what: String },
    /// Refused by the store because of who we are.
    #[error("{what}")]
    Denied { what: String },
    #[error("{what}")]
    Invalid { what: String },
    /// Commits would not survive a power cut.
    #[error("{what}")]
    NotDurable { what: String },
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{what} failed: {detail}")]
    Internal { what: String, detail: String },
    #[error("store cannot use the network")]
    Net(#[from] net::Error),
    #[error("store cannot serve its admin address")]
    Telemetry(#[from] telemetry::Error),
    #[error("store server failed")]
    Serve(#[source] tonic::transport::Error),
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unavailable { .. } | Self::Unknown { .. } | Self::Full { .. } => {
                ErrorKind::Unavailable
            }
            Self::Overloaded { .. } => ErrorKind::Exhausted,
            Self::Fenced { .. } => ErrorKind::Fenced,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::ForeignCluster { .. } | Self::Locked { .. } => ErrorKind::Conflict,
            Self::Denied { .. } => ErrorKind::Denied,
            Self::Invalid { .. } | Self::NewerSchema { .. } | Self::NotDurable { .. } => {
                ErrorKind::Invalid
            }
            Self::Corrupt { .. } | Self::File { .. } | Self::Internal { .. } | Self::Serve(_) => {
                ErrorKind::Internal
            }
            Self::Net(error) => error.kind(),
            Self::Telemetry(error) => error.kind(),
        }
    }

    /// Whether a write that failed so certainly left nothing, and may succeed when it is sent again.
    pub fn is_certainly_not_done(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Overloaded { .. } | Self::Full { .. })
    }

    pub(crate) fn unavailable(what: impl Into<String>) -> Self {
        Self::Unavailable { what: what.into(), source: None }
    }

    pub(crate) fn unavailable_because(what: impl Into<String>, cause: impl Into<Cause>) -> Self {
        Self::Unavailable { what: what.into(), source: Some(cause.into()) }
    }

    pub(crate) fn unknown(what: impl Into<String>) -> Self {
        Self::Unknown { what: what.into() }
    }

    /// What went wrong before a write was sent leaves no doubt about the write.
    pub(crate) fn before_the_write(self) -> Self {
        if let Self::Unknown { what } = self { Self::unavailable(what) } else { self }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    pub(crate) fn internal(what: impl Into<String>, detail: impl ToString) -> Self {
        Self::Internal { what: what.into(), detail: detail.to_string() }
    }

    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
        source: std::io::Error,
    ) -> Self {
        Self::File { action, path: path.into(), source }
    }

    /// What SQLite's refusal means. `what` is the database.
    pub(crate) fn of_sqlite(what: &str, error: libsql::Error) -> Self {
        let what = what.to_owned();
        let libsql::Error::SqliteFailure(code, detail) = error else {
            return Self::Internal { what, detail: error.to_string() };
        };
        match code & 0xff {
            5 | 6 => Self::unavailable(format!("{what} is locked")),
            11 | 26 => Self::Corrupt { what },
            13 => Self::Full { what },
            _ => Self::Internal { what, detail: format!("{detail} (SQLite code {code})") },
        }
    }

    /// As it travels. The number of a variant is never reused.
    pub(crate) fn to_wire(&self) -> StoreFailure {
        let (code, message) = match self {
            Self::Unavailable { what, .. } => (1, what.clone()),
            Self::Unknown { what } => (2, what.clone()),
            Self::Overloaded { what } => (3, what.clone()),
            Self::Fenced { epoch } => (4, epoch.to_string()),
            Self::NotFound { what } => (5, what.clone()),
            Self::ForeignCluster { what } => (6, what.clone()),
            Self::NewerSchema { what } => (7, what.clone()),
            Self::Corrupt { what } => (8, what.clone()),
            Self::Full { what } => (9, what.clone()),
            Self::Denied { what } => (10, what.clone()),
            Self::Invalid { what } => (11, what.clone()),
            Self::NotDurable { what } => (12, what.clone()),
            Self::Internal { what, detail } => (13, format!("{what}: {detail}")),
            Self::Locked { .. }
            | Self::File { .. }
            | Self::Net(_)
            | Self::Telemetry(_)
            | Self::Serve(_) => (13, self.to_string()),
        };
        StoreFailure { code, message }
    }

    pub(crate) fn from_wire(failure: StoreFailure) -> Self {
        let what = failure.message;
        match failure.code {
            1 => Self::unavailable(what),
            2 => Self::Unknown { what },
            3 => Self::Overloaded { what },
            4 => Self::Fenced { epoch: what.parse().unwrap_or(0) },
            5 => Self::NotFound { what },
            6 => Self::ForeignCluster { what },
            7 => Self::NewerSchema { what },
            8 => Self::Corrupt { what },
            9 => Self::Full { what },
            10 => Self::Denied { what },
            11 => Self::Invalid { what },
            12 => Self::NotDurable { what },
            _ => Self::Internal { what: "store".to_owned(), detail: what },
        }
    }

    /// What a call that brought no answer means. Nothing was changed by it, or it was a read.
    pub(crate) fn of_status(status: tonic::Status) -> Self {
        if let Some(refused) = net::Error::find(&status)
            && refused.kind() == ErrorKind::Denied
        {
            return Self::Denied { what: refused.to_string() };
        }
        let what = status.message().to_owned();
        if status.code() == tonic::Code::PermissionDenied {
            return Self::Denied { what };
        }
        if status.code() == tonic::Code::InvalidArgument {
            return Self::Invalid { what };
        }
        Self::unavailable_because(what, status)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        use domain::Reason;
        let reason = match error.kind() {
            ErrorKind::Invalid | ErrorKind::Conflict => Reason::Malformed,
            ErrorKind::NotFound => Reason::NotFound,
            ErrorKind::Fenced => Reason::Fenced,
            ErrorKind::Denied => Reason::NotAuthorised,
            ErrorKind::Exhausted => Reason::Overloaded,
            ErrorKind::Deadline | ErrorKind::Unavailable | ErrorKind::Internal => {
                Reason::StoreUnavailable
            }
        };
        Self::new(error.kind(), reason, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_same_after_it_travelled() {
        let what = || "shard-3".to_owned();
        let errors = [
            Error::unavailable(what()),
            Error::Unknown { what: what() },
            Error::Overloaded { what: what() },
            Error::Fenced { epoch: 7 },
            Error::NotFound { what: what() },
            Error::ForeignCluster { what: what() },
            Error::NewerSchema { what: what() },
            Error::Corrupt { what: what() },
            Error::Full { what: what() },
            Error::Denied { what: what() },
            Error::Invalid { what: what() },
            Error::NotDurable { what: what() },
        ];
        for error in errors {
            let text = error.to_string();
            let back = Error::from_wire(error.to_wire());
            assert_eq!((back.to_string(), back.kind()), (text, error.kind()));
        }
    }
}
