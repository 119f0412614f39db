//! What can come of a call. "Not reached" and "refused" are different things to whoever asked.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use domain::{ErrorKind, Reason};
use proto::v1;
use tonic::{Code, Status};
use tonic_types::StatusExt;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("credentials folder {path} does not exist")]
    NoCredentials { path: PathBuf },
    #[error("the credentials cannot be used")]
    Credentials {
        #[source]
        source: net::Error,
    },
    #[error("cannot read {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no address of an API server in {origin}")]
    NoAddress { origin: String },
    #[error("address {address:?} is not valid: host:port is allowed")]
    Address { address: String },
    /// Nobody answered who counts.
    #[error("no API server reached at {}", addresses.join(", "))]
    NotReached {
        addresses: Vec<String>,
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The cluster answered, and said no. `status` is the answer; for a certificate that was refused in the TLS
    /// handshake it is UNAUTHENTICATED.
    #[error("{}", status.message())]
    Refused { status: Box<Status>, reason: Option<Reason>, retry_after: Option<Duration> },
    /// The caller's time is over.
    #[error("no answer within {} ms", after.as_millis())]
    Deadline { after: Duration },
    #[error(
        "the answer of the cluster lacks its {what}; client and cluster are of different versions"
    )]
    Answer { what: &'static str },
    /// A request on an open stream that was not sent, because its tag is that of an unfinished one.
    #[error("tag {tag} is in use on this stream; choose another")]
    TagInUse { tag: i64 },
    /// The open stream has ended; its last answer said why.
    #[error("the stream has ended")]
    Ended,
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoCredentials { .. }
            | Self::Credentials { .. }
            | Self::File { .. }
            | Self::NoAddress { .. }
            | Self::Address { .. } => ErrorKind::Invalid,
            Self::TagInUse { .. } => ErrorKind::Conflict,
            Self::NotReached { .. } | Self::Ended => ErrorKind::Unavailable,
            Self::Refused { status, .. } => kind_of(status.code()),
            Self::Deadline { .. } => ErrorKind::Deadline,
            Self::Answer { .. } => ErrorKind::Internal,
        }
    }

    /// Whether the cluster itself said no.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Answer { .. })
    }

    /// Whether only the API server that was asked does not reach who could answer.
    pub(crate) fn is_owner_unreached(&self) -> bool {
        matches!(self, Self::Refused { reason: Some(Reason::OwnerUnreached), .. })
    }

    /// The cluster's own word.
    pub fn refused(status: Status) -> Self {
        let reason = proto::status::reason_of(&status);
        let retry_after = proto::status::retry_after_of(&status);
        Self::Refused { status: Box::new(status), reason, retry_after }
    }

    /// The same for a request on an open stream.
    pub fn of_refused(refused: v1::Refused) -> Self {
        Self::refused(refused.into())
    }

    /// The field of the request that is wrong, if the cluster named one.
    pub fn field(&self) -> Option<String> {
        let Self::Refused { status, .. } = self else { return None };
        let violations = status.get_error_details().bad_request()?.field_violations.clone();
        violations.into_iter().map(|violation| violation.field).find(|field| !field.is_empty())
    }

    /// What a failed attempt to connect means, once every address was tried.
    pub(crate) fn of_connect(addresses: &[String], source: tonic::transport::Error) -> Self {
        let refused = net::Error::find(&source)
            .filter(|error| matches!(error, net::Error::Refused { .. }))
            .map(|error| Status::unauthenticated(error.to_string()));
        match refused {
            Some(status) => {
                let status = Box::new(status);
                Self::Refused { status, reason: Some(Reason::NotAuthorised), retry_after: None }
            }
            None => Self::NotReached { addresses: addresses.to_vec(), source: source.into() },
        }
    }

    /// Whether trying again can help before somebody acts: no, if whoever answered is not of our cluster.
    pub(crate) fn is_for_good(&self) -> bool {
        match self {
            Self::NotReached { source, .. } => net::Error::find(source.as_ref())
                .is_some_and(|error| error.kind() == ErrorKind::Denied),
            Self::Refused { status, retry_after, .. } => {
                status.code() != Code::Unavailable && retry_after.is_none()
            }
            Self::NoCredentials { .. }
            | Self::Credentials { .. }
            | Self::File { .. }
            | Self::NoAddress { .. }
            | Self::Address { .. }
            | Self::Deadline { .. }
            | Self::Answer { .. }
            | Self::TagInUse { .. }
            | Self::Ended => true,
        }
    }
}

fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::InvalidArgument | Code::OutOfRange => ErrorKind::Invalid,
        Code::NotFound | Code::Unimplemented => ErrorKind::NotFound,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => ErrorKind::Conflict,
        Code::PermissionDenied | Code::Unauthenticated => ErrorKind::Denied,
        Code::ResourceExhausted => ErrorKind::Exhausted,
        Code::DeadlineExceeded | Code::Cancelled => ErrorKind::Deadline,
        Code::Unavailable => ErrorKind::Unavailable,
        Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => ErrorKind::Internal,
    }
}

/// Whether a status was made on our side, because the connection broke, and is no answer of the cluster.
pub(crate) fn is_transport(status: &Status) -> bool {
    // What the peer sends has no source; what hyper and h2 report has one, but for a channel that is gone altogether.
    status.source().is_some() || status.message().starts_with("Service was not ready")
}
