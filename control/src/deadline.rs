//! How long a call of the API may take: what its caller said, else the default, never longer than the cap.

use std::time::Duration;

use tokio::time::Instant;
use tonic::metadata::MetadataMap;

const DEFAULT: Duration = Duration::from_secs(30);
const CAP: Duration = Duration::from_secs(5 * 60);
/// Kept for the answer itself: one that says what was missing is worth more than the caller's own clock running out.
const ANSWER_SHARE: u32 = 10;
const ANSWER_MAX: Duration = Duration::from_millis(100);

/// When the call has to be answered.
pub(crate) fn of(metadata: &MetadataMap) -> Instant {
    Instant::now() + allowed(metadata)
}

/// When a request on an open stream has to be answered, whose metadata belong to the whole stream.
pub(crate) fn by_default() -> Instant {
    Instant::now() + DEFAULT
}

fn allowed(metadata: &MetadataMap) -> Duration {
    let text = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
    let Some(asked) = text.and_then(parse) else { return DEFAULT };
    let asked = asked.min(CAP);
    asked - (asked / ANSWER_SHARE).min(ANSWER_MAX)
}

/// At most 8 digits and a unit, as gRPC writes it. Anything else was not meant as a timeout.
fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || 8 < digits.len() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3_600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_ends_a_little_before_its_caller_gives_up() {
        let check = |text: &'static str, expected: Duration| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            assert_eq!(allowed(&metadata), expected, "{text}");
        };
        check("2S", Duration::from_millis(1_900));
        check("200m", Duration::from_millis(180));
        check("1000000u", Duration::from_millis(900));
        check("10H", CAP - ANSWER_MAX);
        check("10", DEFAULT);
        check("S", DEFAULT);
        check("-1S", DEFAULT);
        check("999999999S", DEFAULT);
        assert_eq!(allowed(&MetadataMap::new()), DEFAULT);
    }
}
