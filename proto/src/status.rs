//! Errors as gRPC statuses with details, and back.

use std::collections::HashMap;
use std::time;

use domain::{ErrorKind, Reason};
use pbjson_types::Duration;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::v1::Refused;

/// The domain of our `ErrorInfo`.
pub const DOMAIN: &str = "stagedoor.local";

/// Response metadata with the [`domain::Position`] at which an answer about one work was taken. The messages of a stream
/// carry it as a field. Lists, agents and histories are not of one work and have none.
pub const POSITION: &str = "stagedoor-position";

/// What a refusal says: its kind, its reason code, a text for people, and when to try again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub kind: ErrorKind,
    pub reason: Reason,
    pub message: String,
    pub retry_after: Option<time::Duration>,
    /// The field of the request that is wrong, if one is.
    pub field: Option<String>,
}

impl Failure {
    pub fn new(kind: ErrorKind, reason: Reason, message: impl Into<String>) -> Self {
        Self { kind, reason, message: message.into(), retry_after: None, field: None }
    }

    /// A request whose `field` is wrong.
    pub fn invalid(field: &str, message: impl Into<String>) -> Self {
        let failure = Self::new(ErrorKind::Invalid, Reason::Malformed, message);
        Self { field: Some(field.to_owned()), ..failure }
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, Reason::NotFound, message)
    }

    pub fn retry_after(self, delay: time::Duration) -> Self {
        Self { retry_after: Some(delay), ..self }
    }
}

/// The gRPC code of a kind.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::Conflict => Code::AlreadyExists,
        ErrorKind::Fenced | ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Denied => Code::PermissionDenied,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Deadline => Code::DeadlineExceeded,
        ErrorKind::Internal => Code::Internal,
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        Refused::from(failure).into()
    }
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        // The one refusal for which the state of what was named is to blame, and not the request.
        let code = match failure.reason == Reason::NotInDoubt {
            true => Code::FailedPrecondition,
            false => code(failure.kind),
        };
        Self {
            code: code.into(),
            reason: failure.reason.to_string(),
            message: failure.message,
            retry_delay: failure.retry_after.map(|delay| Duration {
                seconds: delay.as_secs().cast_signed(),
                nanos: delay.subsec_nanos().cast_signed(),
            }),
            field: failure.field.unwrap_or_default(),
        }
    }
}

/// A refusal on an open stream says what the status of a call would.
impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let Refused { code, reason, message, retry_delay, field } = refused;
        let code = Code::from(code);
        let mut details = ErrorDetails::with_error_info(reason.as_str(), DOMAIN, HashMap::new());
        if let Some(delay) = retry_delay.and_then(|delay| delay.try_into().ok()) {
            details.set_retry_info(Some(delay));
        }
        if !field.is_empty() {
            details.add_bad_request_violation(field, message.clone());
        }
        if code == Code::ResourceExhausted {
            details.add_quota_failure_violation(reason, message.clone());
        }
        Status::with_error_details(code, message, details)
    }
}

/// The reason code that a status of ours carries.
pub fn reason_of(status: &Status) -> Option<Reason> {
    status.get_error_details().error_info()?.reason.parse().ok()
}

/// When a status of ours says to try again.
pub fn retry_after_of(status: &Status) -> Option<time::Duration> {
    status.get_error_details().retry_info()?.retry_delay
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_reads_back_from_its_status() {
        let failure =
            Failure::new(ErrorKind::Exhausted, Reason::QueueFull, "queue of a/b/c is full")
                .retry_after(time::Duration::from_millis(200));
        let status = Status::from(failure);
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(reason_of(&status), Some(Reason::QueueFull));
        assert_eq!(retry_after_of(&status), Some(time::Duration::from_millis(200)));
        assert_eq!(
            status.get_error_details().quota_failure().map(|quota| quota.violations.len()),
            Some(1)
        );
    }

    #[test]
    fn a_wrong_field_is_named() {
        let status = Status::from(Failure::invalid("agent", "agent id \"x\" is not valid"));
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "agent");
    }
}
