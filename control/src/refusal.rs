//! What an owner's refusal means to the caller of the API: a closed mapping from reasons to kinds.
//!
//! Decides nothing about trying again beyond [`is_elsewhere`]; the router does.

use std::time::Duration;

use domain::{ErrorKind, Reason};
use proto::convert::INPUT_BYTES_MAX;
use proto::link;
use proto::status::Failure;
use tonic::{Code, Status};

/// What a caller waits when the one who refused gave no advice.
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(200);

/// The kind of a reason for which a request was refused.
pub(crate) fn kind(reason: Reason) -> ErrorKind {
    match reason {
        Reason::Malformed
        | Reason::InputTooLarge
        | Reason::ResultTooLarge
        | Reason::TooManyHops
        | Reason::ModelRefused => ErrorKind::Invalid,
        Reason::NotFound | Reason::DefinitionMissing => ErrorKind::NotFound,
        Reason::KeyReused | Reason::ClassChanged | Reason::NotInDoubt => ErrorKind::Conflict,
        Reason::NotAuthorised => ErrorKind::Denied,
        Reason::QueueFull | Reason::NodeFull | Reason::Overloaded => ErrorKind::Exhausted,
        Reason::DeadlineExceeded => ErrorKind::Deadline,
        // Restarted: the agent folds its journal again, and is there in a moment. Answer lost: every request may be repeated.
        Reason::Moved
        | Reason::Unowned
        | Reason::Fenced
        | Reason::ShuttingDown
        | Reason::AnswerLost
        | Reason::Restarted => ErrorKind::Fenced,
        Reason::StoreUnavailable
        | Reason::OwnerUnreached
        | Reason::ModelUnavailable
        | Reason::NoOffer
        | Reason::NoTarget
        | Reason::Quarantined
        | Reason::WorkerLost
        | Reason::LeaderFree
        | Reason::LeaderSilent
        | Reason::BeatUnwritten
        | Reason::HearsFewer => ErrorKind::Unavailable,
        // Only an operator can mend it.
        Reason::StoreRolledBack => ErrorKind::Internal,
        // Nobody refuses a request for one of these; whoever does has a bug.
        Reason::ModelAnswerInvalid
        | Reason::InDoubt
        | Reason::StepInDoubt
        | Reason::ReconciledDone
        | Reason::ReconciledNotDone
        | Reason::RetriedByPolicy
        | Reason::FailedByPolicy
        | Reason::SignalledDone
        | Reason::SignalledRetry
        | Reason::SignalledFail
        | Reason::RoundLimit
        | Reason::ToolUnavailable
        | Reason::ToolBroke
        | Reason::Superseded
        | Reason::TooOld
        | Reason::CycleLimit
        | Reason::Submitted
        | Reason::TurnBegan
        | Reason::OfferAppeared
        | Reason::Completed
        | Reason::CancelRequested
        | Reason::Joined
        | Reason::Left
        | Reason::SessionLost
        | Reason::BeatsMissed
        | Reason::PortRefused
        | Reason::Silent
        | Reason::RuntimeStalled
        | Reason::Unlinked
        | Reason::Storeless
        | Reason::StoreAnswers
        | Reason::Replaced
        | Reason::BeatsAgain
        | Reason::DrainRequested
        | Reason::Cordoned
        | Reason::Uncordoned
        | Reason::FirstPlacement
        | Reason::OwnerDied
        | Reason::OwnerDropped
        | Reason::ShardOpened
        | Reason::Rebalanced
        | Reason::OwnerDraining
        | Reason::OwnerStoreless
        | Reason::Released
        | Reason::Inherited
        | Reason::Restored
        | Reason::Activated
        | Reason::Idle => ErrorKind::Internal,
    }
}

/// Whether the refusal only says that it is not the time or the place: whoever owns the shard next may take the request.
pub(crate) fn is_elsewhere(reason: Reason) -> bool {
    kind(reason) == ErrorKind::Fenced
}

/// The reason of a refusal; a code of a later version is ours to complain about.
pub(crate) fn reason(refusal: &link::Refusal) -> Option<Reason> {
    u16::try_from(refusal.reason).ok().and_then(Reason::from_code)
}

/// The refusal as the caller sees it.
pub(crate) fn failure(refusal: link::Refusal) -> Failure {
    let Some(reason) = reason(&refusal) else {
        let text = format!(
            "the owner refused with the unknown reason {}: {}",
            refusal.reason, refusal.message
        );
        return Failure::new(ErrorKind::Internal, Reason::Malformed, text);
    };
    let kind = kind(reason);
    let message =
        if refusal.message.is_empty() { format!("refused: {reason}") } else { refusal.message };
    let failure = Failure::new(kind, reason, message);
    match (kind.is_retryable(), refusal.retry_after_ms) {
        (true, 0) => failure.retry_after(RETRY_AFTER),
        (true, ms) => failure.retry_after(Duration::from_millis(ms.into())),
        (false, _) => failure,
    }
}

/// A limit between here and the owner is reached.
pub(crate) fn overloaded(message: String) -> Failure {
    Failure::new(ErrorKind::Exhausted, Reason::Overloaded, message).retry_after(RETRY_AFTER)
}

/// A message from another process that cannot be read.
pub(crate) fn unreadable(what: &str, error: &impl std::fmt::Display) -> Failure {
    Failure::new(
        ErrorKind::Internal,
        Reason::Malformed,
        format!("{what} of the owner cannot be read: {error}"),
    )
}

/// A request that is no message of ours, as its sender is told. Anything else is the connection's own end.
pub(crate) fn unread(status: Status) -> Status {
    if status.code() == Code::OutOfRange {
        return too_large();
    }
    if status.code() == Code::Internal {
        let text = format!("the request cannot be read: {}", status.message());
        return Failure::invalid("request", text).into();
    }
    status
}

/// A request that tonic has not taken in.
pub(crate) fn too_large() -> Status {
    let text = format!(
        "the request is larger than a message may be: the input of a work has at most {INPUT_BYTES_MAX} bytes"
    );
    Failure { reason: Reason::InputTooLarge, ..Failure::invalid("request", text) }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(reason: Reason, retry_after_ms: u32) -> Failure {
        failure(link::Refusal {
            reason: reason.code().into(),
            retry_after_ms,
            ..link::Refusal::default()
        })
    }

    #[test]
    fn every_reason_has_a_kind_and_keeps_its_name() {
        for &reason in Reason::ALL {
            let failure = refused(reason, 0);
            assert_eq!((failure.kind, failure.reason), (kind(reason), reason));
            assert_eq!(failure.retry_after.is_some(), failure.kind.is_retryable(), "{reason}");
            assert!(!failure.message.is_empty());
        }
    }

    #[test]
    fn what_callers_tell_apart_is_told_apart() {
        let check = |reason, expected| assert_eq!(kind(reason), expected, "{reason}");
        check(Reason::KeyReused, ErrorKind::Conflict);
        check(Reason::NotFound, ErrorKind::NotFound);
        check(Reason::Malformed, ErrorKind::Invalid);
        check(Reason::InputTooLarge, ErrorKind::Invalid);
        check(Reason::QueueFull, ErrorKind::Exhausted);
        check(Reason::NodeFull, ErrorKind::Exhausted);
        check(Reason::Overloaded, ErrorKind::Exhausted);
        check(Reason::StoreUnavailable, ErrorKind::Unavailable);
        check(Reason::NotAuthorised, ErrorKind::Denied);
        let elsewhere: Vec<_> =
            Reason::ALL.iter().filter(|reason| is_elsewhere(**reason)).collect();
        let expected = [
            Reason::Moved,
            Reason::Unowned,
            Reason::Fenced,
            Reason::ShuttingDown,
            Reason::AnswerLost,
            Reason::Restarted,
        ];
        assert!(elsewhere.into_iter().eq(&expected));
    }

    #[test]
    fn the_owners_advice_is_passed_on() {
        assert_eq!(refused(Reason::QueueFull, 70).retry_after, Some(Duration::from_millis(70)));
        assert_eq!(refused(Reason::KeyReused, 70).retry_after, None);
    }

    #[test]
    fn an_unknown_reason_is_an_internal_error() {
        let failure = failure(link::Refusal { reason: 9_999, ..link::Refusal::default() });
        assert_eq!(failure.kind, ErrorKind::Internal);
        assert!(failure.message.contains("9999"));
    }
}
