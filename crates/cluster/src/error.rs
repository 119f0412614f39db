use std::io;
use std::path::PathBuf;

use domain::{ErrorKind, Reason};
use proto::link::Refusal;

use crate::Peer;

/// What can go wrong between two members of the cluster.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the cookie file {path:?}: check `cookie` in the config of the cluster")]
    Cookie {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the cookie in {path:?} is too short: at least 16 bytes are needed")]
    CookieShort { path: PathBuf },
    #[error("cannot open the listener of {what}")]
    Listen {
        what: &'static str,
        #[source]
        source: net::Error,
    },
    #[error("cannot start {what}: {why}")]
    Start { what: &'static str, why: String },
    /// Nobody said where it is.
    #[error("no address of {peer} is known")]
    NoAddress { peer: Peer },
    /// It could not be reached; nothing was sent.
    #[error("{peer} cannot be reached")]
    Unreachable { peer: Peer },
    /// The link ended before the answer: whether it was done is not known.
    #[error("{peer} went away before it answered")]
    PeerGone { peer: Peer },
    #[error("{peer} did not answer in time")]
    Deadline { peer: Peer },
    #[error("too much is on its way to {peer}: try again in {retry_after_ms} ms")]
    Overloaded { peer: Peer, retry_after_ms: u32 },
    #[error("a message of {bytes} bytes is too large: at most {max} are allowed")]
    TooLarge { bytes: usize, max: usize },
    /// The peer's answer: it did not do it, and says why; of [`Reason::AnswerLost`] alone it is not known whether it did.
    #[error("refused: {} ({})", reason_text(.0), .0.message)]
    Refused(Refusal),
    #[error("this process is shutting down")]
    Closed,
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Cookie { .. } | Self::CookieShort { .. } | Self::TooLarge { .. } => {
                ErrorKind::Invalid
            }
            Self::Listen { source, .. } => source.kind(),
            Self::Start { .. } => ErrorKind::Internal,
            Self::NoAddress { .. }
            | Self::Unreachable { .. }
            | Self::PeerGone { .. }
            | Self::Closed => ErrorKind::Unavailable,
            Self::Deadline { .. } => ErrorKind::Deadline,
            Self::Overloaded { .. } => ErrorKind::Exhausted,
            Self::Refused(refusal) => kind_of(refusal),
        }
    }
}

/// The reason in a refusal, if this version knows it.
pub fn reason_of(refusal: &Refusal) -> Option<Reason> {
    Reason::from_code(u16::try_from(refusal.reason).ok()?)
}

fn reason_text(refusal: &Refusal) -> String {
    reason_of(refusal).map_or_else(|| format!("reason {}", refusal.reason), |it| it.to_string())
}

/// What the caller can do about it. A reason that is not listed is one with which no peer should refuse.
pub fn kind_of(refusal: &Refusal) -> ErrorKind {
    const KINDS: [(Reason, ErrorKind); 30] = [
        (Reason::QueueFull, ErrorKind::Exhausted),
        (Reason::NodeFull, ErrorKind::Exhausted),
        (Reason::Overloaded, ErrorKind::Exhausted),
        (Reason::Moved, ErrorKind::Fenced),
        (Reason::Unowned, ErrorKind::Unavailable),
        (Reason::NoTarget, ErrorKind::Unavailable),
        (Reason::Fenced, ErrorKind::Fenced),
        (Reason::StoreUnavailable, ErrorKind::Unavailable),
        (Reason::StoreRolledBack, ErrorKind::Internal),
        (Reason::KeyReused, ErrorKind::Conflict),
        (Reason::NotFound, ErrorKind::NotFound),
        (Reason::DefinitionMissing, ErrorKind::NotFound),
        (Reason::Malformed, ErrorKind::Invalid),
        (Reason::InputTooLarge, ErrorKind::Invalid),
        (Reason::ClassChanged, ErrorKind::Conflict),
        (Reason::NotAuthorised, ErrorKind::Denied),
        (Reason::ShuttingDown, ErrorKind::Unavailable),
        (Reason::Restarted, ErrorKind::Unavailable),
        (Reason::Quarantined, ErrorKind::Unavailable),
        (Reason::DeadlineExceeded, ErrorKind::Deadline),
        // Of a step that was given to a pool.
        (Reason::NoOffer, ErrorKind::Unavailable),
        (Reason::TooOld, ErrorKind::Unavailable),
        (Reason::AnswerLost, ErrorKind::Unavailable),
        (Reason::WorkerLost, ErrorKind::Unavailable),
        (Reason::ModelUnavailable, ErrorKind::Unavailable),
        (Reason::ToolUnavailable, ErrorKind::Unavailable),
        (Reason::ToolBroke, ErrorKind::Unavailable),
        (Reason::ModelRefused, ErrorKind::Invalid),
        (Reason::NotInDoubt, ErrorKind::Conflict),
        (Reason::Superseded, ErrorKind::Conflict),
    ];
    let reason = reason_of(refusal);
    let found = KINDS.iter().find(|(known, _)| Some(*known) == reason);
    found.map_or(ErrorKind::Internal, |(_, kind)| *kind)
}

pub(crate) fn refusal(reason: Reason, message: impl Into<String>) -> Refusal {
    Refusal {
        reason: u32::from(reason.code()),
        message: message.into(),
        moved_node: String::new(),
        moved_epoch: 0,
        retry_after_ms: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_the_caller_can_do() {
        let check = |reason: Reason, kind| {
            let error = Error::Refused(refusal(reason, "because"));
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(reason.as_str()), "{error}");
        };
        check(Reason::Moved, ErrorKind::Fenced);
        check(Reason::QueueFull, ErrorKind::Exhausted);
        check(Reason::TooManyHops, ErrorKind::Internal);
        let unknown = Refusal { reason: 70_000, ..refusal(Reason::Moved, "") };
        assert_eq!(Error::Refused(unknown).kind(), ErrorKind::Internal);
    }
}
