use domain::{ErrorKind, ProcessName};

/// Why a control process cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("config has no store {name:?}: add [stores.{name}]")]
    NoStore { name: &'static str },
    #[error(
        "config names this process {name}, its certificate {id}: give it the certificate of control/{name}"
    )]
    Name { name: ProcessName, id: String },
    #[error("controls has {text:?}: write name=host:port")]
    Replica { text: String },
    #[error("cannot serve the API")]
    Listen(#[source] net::Error),
    #[error(transparent)]
    Net(#[from] net::Error),
    #[error(transparent)]
    Telemetry(#[from] telemetry::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Cluster(#[from] cluster::Error),
    #[error(transparent)]
    Scheduler(#[from] scheduler::Error),
    #[error("cannot describe the API for reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
    #[error("the API server ended")]
    Serve(#[source] tonic::transport::Error),
    #[error("a database cannot be used: {why}")]
    Unusable { why: String },
    /// Without it this process is of no use.
    #[error("{what} of this process has failed; start it again")]
    Ended { what: &'static str },
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoStore { .. }
            | Self::Name { .. }
            | Self::Replica { .. }
            | Self::Unusable { .. } => ErrorKind::Invalid,
            Self::Net(source) | Self::Listen(source) => source.kind(),
            Self::Telemetry(source) => source.kind(),
            Self::Store(source) => source.kind(),
            Self::Cluster(source) => source.kind(),
            Self::Scheduler(source) => source.kind(),
            Self::Reflection(_) | Self::Serve(_) | Self::Ended { .. } => ErrorKind::Internal,
        }
    }
}
