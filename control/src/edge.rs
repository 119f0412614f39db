//! What a client may ask: each request is checked here, once and whole, before anything is done. A refusal names the
//! field and what is allowed.

use std::str::FromStr;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use domain::definition::BUILT_IN_MODELS;
use domain::entry::Verdict;
use domain::turn::RESULT_BYTES_MAX;
use domain::{
    AgentId, Definition, DefinitionHash, ErrorKind, IdempotencyKey, Reason, Tenant, WorkId,
};
use pbjson_types::Duration as WireDuration;
use proto::convert::{self, Cursor};
use proto::journal;
use proto::link::SignalCall;
use proto::status::Failure;
use proto::v1;
use proto::v1::SignalRequest;
use proto::v1::signal_request::{Resolution, Step};
use telemetry::metrics::{IntCounter, counter};

const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const PAGE_DEFAULT: u32 = 50;
const PAGE_MAX: u32 = 200;

static TOO_LARGE: LazyLock<IntCounter> = LazyLock::new(|| {
    let about = "Submits refused because their input is longer than 1 MiB.";
    counter("stagedoor_control_inputs_too_large_total", about)
});

/// A submit that is in order, as far as that can be known without asking anybody.
#[derive(Clone, Debug)]
pub(crate) struct Submit {
    pub(crate) agent: AgentId,
    pub(crate) input: Bytes,
    pub(crate) key: Option<IdempotencyKey>,
    pub(crate) timeout: Duration,
    pub(crate) definition: Option<DefinitionHash>,
}

pub(crate) fn submit(request: v1::SubmitRequest) -> Result<Submit, Failure> {
    convert::check_input(&request.input).inspect_err(|_| TOO_LARGE.inc())?;
    Ok(Submit {
        agent: convert::agent_id("agent", &request.agent)?,
        key: optional("idempotency_key", &request.idempotency_key)?,
        timeout: timeout(request.timeout)?,
        definition: optional("definition_hash", &request.definition_hash)?,
        input: request.input.into(),
    })
}

fn timeout(timeout: Option<WireDuration>) -> Result<Duration, Failure> {
    let Some(asked) = timeout else { return Ok(TIMEOUT_DEFAULT) };
    let wrong = || {
        let text = "timeout is not valid: more than 0 and at most 24 h are allowed";
        Failure::invalid("timeout", text)
    };
    let seconds = u64::try_from(asked.seconds).map_err(|_| wrong())?;
    let nanos = u32::try_from(asked.nanos).map_err(|_| wrong())?;
    let asked = Duration::from_secs(seconds).saturating_add(Duration::from_nanos(nanos.into()));
    if asked.is_zero() || TIMEOUT_MAX < asked {
        return Err(wrong());
    }
    // The wire counts milliseconds; half of one is not none.
    Ok(asked.max(Duration::from_millis(1)))
}

/// A value that may be left out.
pub(crate) fn optional<T>(field: &str, text: &str) -> Result<Option<T>, Failure>
where
    T: FromStr<Err = domain::Error>,
{
    if text.is_empty() { Ok(None) } else { required(field, text).map(Some) }
}

pub(crate) fn required<T>(field: &str, text: &str) -> Result<T, Failure>
where
    T: FromStr<Err = domain::Error>,
{
    text.parse().map_err(|error: domain::Error| Failure::invalid(field, error.to_string()))
}

pub(crate) fn work_id(text: &str) -> Result<WorkId, Failure> {
    required("id", text)
}

pub(crate) fn tenant(text: &str) -> Result<Tenant, Failure> {
    required("tenant", text)
}

/// The event after which a watch goes on; before the first for the beginning.
pub(crate) fn watch(request: &v1::WatchRequest) -> Result<Cursor, Failure> {
    let work = work_id(&request.id)?;
    if request.cursor.is_empty() {
        return Ok(Cursor::beginning(work));
    }
    let cursor = Cursor::parse(&request.cursor)?;
    if cursor.work != work {
        let text = format!(
            "cursor {:.80?} belongs to work {}, not to {work}",
            request.cursor, cursor.work
        );
        return Err(Failure::invalid("cursor", text));
    }
    Ok(cursor)
}

pub(crate) fn page_size(size: i32) -> Result<u32, Failure> {
    match u32::try_from(size) {
        Ok(0) => Ok(PAGE_DEFAULT),
        Ok(size) if size <= PAGE_MAX => Ok(size),
        Ok(_) | Err(_) => {
            let text = format!(
                "page size {size} is not valid: 1 to {PAGE_MAX} are allowed, 0 means {PAGE_DEFAULT}"
            );
            Err(Failure::invalid("page_size", text))
        }
    }
}

/// The name of a backup, or one made from the time.
pub(crate) fn backup_name(name: &str) -> Result<String, Failure> {
    const CHARS_MAX: usize = 100;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    if name.is_empty() {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        return Ok(format!("backup-{}", since.as_secs()));
    }
    if CHARS_MAX < name.len() || !name.bytes().all(allowed) {
        let text = format!(
            "name {name:.80?} is not valid: 1 to {CHARS_MAX} letters, digits, '-' and '_' are allowed"
        );
        return Err(Failure::invalid("name", text));
    }
    Ok(name.to_owned())
}

/// A number of something that is at least none.
pub(crate) fn count(field: &str, number: i32) -> Result<u32, Failure> {
    u32::try_from(number)
        .map_err(|_| Failure::invalid(field, format!("{field} {number} is below 0")))
}

/// A definition whose model no node has would never run.
pub(crate) fn known_model(definition: Definition) -> Result<Definition, Failure> {
    if BUILT_IN_MODELS.contains(&definition.model.as_str()) {
        return Ok(definition);
    }
    let (model, known) = (&definition.model, BUILT_IN_MODELS.join(" or "));
    let text = format!("model {model:.80?} does not exist: {known} is allowed");
    Err(Failure::invalid("definition.model", text))
}

/// The number of a state by which works are listed; 0: all of them.
pub(crate) fn open_state(state: i32) -> Result<u32, Failure> {
    let known = u32::try_from(state).ok().filter(|state| *state != 0);
    match known.map(journal::state_from_code) {
        None if state == 0 => Ok(0),
        Some(Some(found)) if !found.is_final() => Ok(journal::state_code(found)),
        None | Some(_) => {
            let text = "only the states that are not final can be asked for";
            Err(Failure::invalid("state", text))
        }
    }
}

/// What a person says about a step, for the owner of its work.
pub(crate) fn signal(id: WorkId, request: SignalRequest) -> Result<SignalCall, Failure> {
    let (sequence, name) = match request.step {
        None => (0, String::new()),
        Some(Step::Sequence(sequence)) => match u32::try_from(sequence) {
            Ok(sequence) if 0 < sequence => (sequence, String::new()),
            Ok(_) | Err(_) => {
                return Err(Failure::invalid("sequence", "steps are numbered from 1"));
            }
        },
        Some(Step::Name(name)) if name.is_empty() => {
            return Err(Failure::invalid("name", "the name of the step is missing"));
        }
        Some(Step::Name(name)) => (0, name),
    };
    let attempt = u32::try_from(request.attempt)
        .map_err(|_| Failure::invalid("attempt", "attempts are numbered from 1"))?;
    let (verdict, output) = match request.resolution {
        Some(Resolution::Done(done)) if RESULT_BYTES_MAX < done.output.len() => {
            let text = format!("the output has at most {RESULT_BYTES_MAX} bytes");
            return Err(Failure::invalid("done.output", text));
        }
        Some(Resolution::Done(done)) => (Verdict::PersonDone, done.output),
        Some(Resolution::Retry(_)) => (Verdict::PersonRetry, String::new()),
        Some(Resolution::Fail(_)) => (Verdict::PersonFail, String::new()),
        None => {
            return Err(Failure::invalid("resolution", "one of done, retry and fail is needed"));
        }
    };
    let reason = verdict.reason().code().into();
    Ok(SignalCall { work: id.lsn.0, sequence, name, reason, output, attempt })
}

/// The agent is of a definition that nobody applied, or of a version of it that nobody did.
pub(crate) fn no_definition(agent: &AgentId, hash: Option<DefinitionHash>) -> Failure {
    let AgentId { tenant, name, .. } = agent;
    let text = match hash {
        None => format!(
            "agent {agent}: tenant {tenant} has no definition {name:?}; \
             store one with `stagedoor apply -f FILE`, or use \"postchain\"",
            name = name.as_str()
        ),
        Some(hash) => format!(
            "agent {agent}: definition {name:?} of tenant {tenant} has no version {hash}; \
             `stagedoor definitions` lists them, `stagedoor apply -f FILE` stores one",
            name = name.as_str()
        ),
    };
    let field = if hash.is_some() { "definition_hash" } else { "agent" };
    Failure {
        field: Some(field.to_owned()),
        ..Failure::new(ErrorKind::NotFound, Reason::NotFound, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::convert::INPUT_BYTES_MAX;

    fn request() -> v1::SubmitRequest {
        v1::SubmitRequest {
            agent: "default/postchain/a".into(),
            input: "text".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_submit_in_order_has_its_defaults() {
        let submit = submit(request()).unwrap();
        assert_eq!(submit.timeout, TIMEOUT_DEFAULT);
        assert_eq!((submit.key, submit.definition), (None, None));
        assert_eq!(&submit.input[..], b"text");
    }

    #[test]
    fn a_submit_out_of_order_names_its_field() {
        let check = |change: fn(&mut v1::SubmitRequest), field: &str, contained: &str| {
            let mut request = request();
            change(&mut request);
            let failure = submit(request).unwrap_err();
            assert_eq!((failure.kind, failure.field.as_deref()), (ErrorKind::Invalid, Some(field)));
            assert!(failure.message.contains(contained), "{}", failure.message);
        };
        let wire = |seconds, nanos| Some(WireDuration { seconds, nanos });
        assert_eq!(timeout(wire(0, 1)).unwrap(), Duration::from_millis(1));
        check(|r| r.agent = "postchain".into(), "agent", "tenant/name/key");
        check(|r| r.agent = "A/postchain/k".into(), "agent", "a-z");
        check(|r| r.input = "x".repeat(INPUT_BYTES_MAX + 1), "input", "1048577");
        check(|r| r.idempotency_key = "a\nb".into(), "idempotency_key", "printable");
        check(|r| r.idempotency_key = "k".repeat(257), "idempotency_key", "256");
        check(|r| r.definition_hash = "12".into(), "definition_hash", "64 hexadecimal");
        check(|r| r.timeout = Some(WireDuration { seconds: 0, nanos: 0 }), "timeout", "24 h");
        check(|r| r.timeout = Some(WireDuration { seconds: -1, nanos: 0 }), "timeout", "24 h");
        check(|r| r.timeout = Some(WireDuration { seconds: 86_400, nanos: 1 }), "timeout", "24 h");
        check(
            |r| r.timeout = Some(WireDuration { seconds: i64::MAX, nanos: i32::MAX }),
            "timeout",
            "24 h",
        );
    }

    #[test]
    fn an_input_over_the_limit_has_its_own_reason() {
        let largest = v1::SubmitRequest { input: "x".repeat(INPUT_BYTES_MAX), ..request() };
        assert!(submit(largest).is_ok());
        let larger = v1::SubmitRequest { input: "x".repeat(INPUT_BYTES_MAX + 1), ..request() };
        assert_eq!(submit(larger).unwrap_err().reason, Reason::InputTooLarge);
    }

    #[test]
    fn a_cursor_of_another_work_is_refused() {
        let watched = |id: &str, cursor: &str| {
            watch(&v1::WatchRequest { id: id.to_owned(), cursor: cursor.to_owned() })
        };
        assert_eq!(watched("w-0-001-1", "").unwrap().seq, 0);
        assert_eq!(watched("w-0-001-1", "w-0-001-1.1f").unwrap().seq, 31);
        let field = |result: Result<Cursor, Failure>| result.unwrap_err().field;
        assert_eq!(field(watched("w-0-001-1", "w-0-001-2.1f")).as_deref(), Some("cursor"));
        assert_eq!(field(watched("w-0-001-1", "rubbish")).as_deref(), Some("cursor"));
        assert_eq!(field(watched("w-1", "")).as_deref(), Some("id"));
    }

    #[test]
    fn a_page_has_a_size_that_can_be_had() {
        assert_eq!(page_size(0).unwrap(), PAGE_DEFAULT);
        assert_eq!(page_size(200).unwrap(), 200);
        assert_eq!(page_size(-1).unwrap_err().field.as_deref(), Some("page_size"));
        assert!(page_size(201).unwrap_err().message.contains("1 to 200"));
    }

    #[test]
    fn a_model_that_no_node_has_is_refused_with_the_known_ones() {
        for model in BUILT_IN_MODELS {
            let definition = Definition { model: model.to_owned(), ..Definition::postchain() };
            assert!(known_model(definition).is_ok(), "{model}");
        }
        let definition = Definition { model: "oracle".to_owned(), ..Definition::postchain() };
        let failure = known_model(definition).unwrap_err();
        assert_eq!(failure.field.as_deref(), Some("definition.model"));
        let text = failure.message;
        assert!(text.contains("oracle") && text.contains("noop or script"), "{text}");
    }

    #[test]
    fn a_signal_names_a_step_and_says_what_became_of_it() {
        let id: WorkId = "w-0-001-7".parse().unwrap();
        let request =
            |step, resolution| SignalRequest { id: id.to_string(), step, attempt: 0, resolution };
        let retry = || Some(Resolution::Retry(Default::default()));
        let call = signal(id, request(Some(Step::Sequence(2)), retry())).unwrap();
        assert_eq!((call.work, call.sequence), (7, 2));
        assert_eq!(call.reason, u32::from(Reason::SignalledRetry.code()));
        let field = |request| signal(id, request).unwrap_err().field;
        assert_eq!(field(request(None, None)).as_deref(), Some("resolution"));
        assert_eq!(field(request(Some(Step::Sequence(0)), retry())).as_deref(), Some("sequence"));
        assert_eq!(field(request(Some(Step::Name("".into())), retry())).as_deref(), Some("name"));
    }

    #[test]
    fn works_are_listed_by_the_states_that_are_not_final() {
        assert_eq!(open_state(0).unwrap(), 0);
        let in_doubt = proto::v1::WorkState::InDoubt;
        assert_eq!(
            open_state(in_doubt.into()).unwrap(),
            journal::state_code(domain::WorkState::InDoubt)
        );
        for state in [proto::v1::WorkState::Failed.into(), 99, -1] {
            assert_eq!(open_state(state).unwrap_err().field.as_deref(), Some("state"));
        }
    }

    #[test]
    fn a_missing_definition_is_named_with_the_remedy() {
        let failure = no_definition(&"acme/support/k".parse().unwrap(), None);
        assert_eq!(failure.kind, ErrorKind::NotFound);
        assert!(failure.message.contains("\"support\"") && failure.message.contains("apply"));
    }
}
