//! What can be wrong with a value that comes from outside, and the kinds of failure that callers tell apart.

/// What a caller can do about a failure. Every crate's `Error` maps onto these nine; `proto::status` maps them onto
/// gRPC codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request itself is wrong; sending it again changes nothing.
    Invalid,
    /// What was named does not exist.
    NotFound,
    /// It contradicts what exists already.
    Conflict,
    /// Asked of a process that no longer owns it; ask the owner.
    Fenced,
    /// The caller is not allowed.
    Denied,
    /// A limit is reached; later there is room again.
    Exhausted,
    /// The caller's deadline passed.
    Deadline,
    /// Something that this needs is not reachable now.
    Unavailable,
    /// Ours: a bug, or a broken promise of the store.
    Internal,
}

impl ErrorKind {
    /// Whether the same request may succeed when it is sent again.
    pub fn is_retryable(self) -> bool {
        match self {
            Self::Fenced | Self::Exhausted | Self::Unavailable => true,
            Self::Invalid
            | Self::NotFound
            | Self::Conflict
            | Self::Denied
            | Self::Deadline
            | Self::Internal => false,
        }
    }
}

/// A value from outside that is not what it should be. Each text says what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{what} {value:?} is not valid: {allowed}")]
    Malformed { what: &'static str, value: String, allowed: &'static str },
    #[error("{what} is too long: {len} bytes, at most {max} are allowed")]
    TooLong { what: &'static str, len: usize, max: usize },
    /// A journal entry that no rule lets follow the ones before it: the journal is damaged or the code has a bug.
    #[error("entry {entry} cannot follow: {why}")]
    Sequence { entry: &'static str, why: &'static str },
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Malformed { .. } | Self::TooLong { .. } => ErrorKind::Invalid,
            Self::Sequence { .. } => ErrorKind::Internal,
        }
    }

    /// `value` is cut so that a megabyte of rubbish does not travel on in an error text.
    pub(crate) fn malformed(what: &'static str, value: &str, allowed: &'static str) -> Self {
        const SHOWN_CHARS_MAX: usize = 80;
        let value = value.chars().take(SHOWN_CHARS_MAX).collect();
        Self::Malformed { what, value, allowed }
    }
}
