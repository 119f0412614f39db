//! The API's messages made from what processes say to each other, and what the API takes in as checked values.

use pbjson_types::Timestamp;
use prost::Message;

use bytes::Bytes;
use domain::chain::PhaseKey;
use domain::definition::{Behaviour, Definition, Policy, ROUNDS_DEFAULT};
use domain::entry::{Entry, Resolution};
use domain::step::{CallKey, Callee};
use domain::transcript::Told;
use domain::{AgentId, DefinitionHash, Epoch, Phase, Reason, StepKey, StepKind, WorkId, WorkState};

use crate::status::Failure;
use crate::{disk, journal, link, v1};

/// What the input of a work may have, in bytes.
pub const INPUT_BYTES_MAX: usize = 1 << 20;

/// # Errors
/// The input of a work is over [`INPUT_BYTES_MAX`].
pub fn check_input(input: &str) -> Result<(), Failure> {
    let len = input.len();
    if len <= INPUT_BYTES_MAX {
        return Ok(());
    }
    let text = format!("input has {len} bytes, at most {INPUT_BYTES_MAX} are allowed");
    Err(Failure { reason: Reason::InputTooLarge, ..Failure::invalid("input", text) })
}

/// Milliseconds since the Unix epoch as a timestamp; 0 is none.
pub fn timestamp(ms: i64) -> Option<Timestamp> {
    let nanos = i32::try_from(ms.rem_euclid(1_000) * 1_000_000).expect("less than a second");
    (ms != 0).then(|| Timestamp { seconds: ms.div_euclid(1_000), nanos })
}

/// A timestamp as milliseconds since the Unix epoch.
pub fn millis(timestamp: &Timestamp) -> i64 {
    timestamp.seconds * 1_000 + i64::from(timestamp.nanos) / 1_000_000
}

fn reason_text(code: u32) -> String {
    let reason = u16::try_from(code).ok().and_then(Reason::from_code);
    reason.map(|reason| reason.to_string()).unwrap_or_default()
}

/// What a step is, and its name.
fn step_text(step: &link::StepInfo) -> (StepKind, String) {
    match (step.round, step.index) {
        (0, _) => {
            let phase = Phase::from_code(step.phase);
            (StepKind::Phase, phase.map(|phase| phase.to_string()).unwrap_or_default())
        }
        (_, 0) => (StepKind::Model, StepKind::Model.as_str().to_owned()),
        (_, _) => (StepKind::Tool, step.name.clone()),
    }
}

/// The work state of the API.
pub fn api_state(state: WorkState) -> v1::WorkState {
    match state {
        WorkState::Accepted => v1::WorkState::Accepted,
        WorkState::Running => v1::WorkState::Running,
        WorkState::Waiting => v1::WorkState::Waiting,
        WorkState::InDoubt => v1::WorkState::InDoubt,
        WorkState::Cancelling => v1::WorkState::Cancelling,
        WorkState::Succeeded => v1::WorkState::Succeeded,
        WorkState::Failed => v1::WorkState::Failed,
        WorkState::Cancelled => v1::WorkState::Cancelled,
        WorkState::DeadLettered => v1::WorkState::DeadLettered,
    }
}

/// The id of a work of which the parts are known.
///
/// # Errors
/// Parts that no work has.
pub fn work_id(class: u32, slot: u32, lsn: u64) -> Result<WorkId, domain::Error> {
    // The text is the one parser that checks all three parts.
    format!("w-{class:x}-{slot:03x}-{lsn:x}").parse()
}

impl From<link::WorkInfo> for v1::Work {
    fn from(info: link::WorkInfo) -> Self {
        let id = work_id(info.class, info.slot, info.lsn).map(|id| id.to_string());
        let state =
            journal::state_from_code(info.state).map_or(v1::WorkState::Unspecified, api_state);
        let usage = v1::Usage {
            calls: info.calls.cast_signed(),
            input_tokens: info.input_tokens.cast_signed(),
            output_tokens: info.output_tokens.cast_signed(),
        };
        let succeeded = state == v1::WorkState::Succeeded;
        let text = String::from_utf8_lossy(&info.result).into_owned();
        let steps = info.steps.into_iter().enumerate().map(|(index, step)| api_step(index, step));
        Self {
            id: id.unwrap_or_default(),
            agent: info.agent,
            state: state.into(),
            reason: reason_text(info.reason),
            definition_hash: hash_text(&info.definition),
            create_time: timestamp(info.create_ms),
            end_time: timestamp(info.end_ms),
            result: succeeded.then_some(v1::WorkResult { text, usage: Some(usage) }),
            steps: steps.collect(),
            detail: info.detail,
        }
    }
}

fn hash_text(hash: &[u8]) -> String {
    DefinitionHash::try_from(hash).map(|hash| hash.to_string()).unwrap_or_default()
}

fn api_step(index: usize, step: link::StepInfo) -> v1::Step {
    let (kind, name) = step_text(&step);
    v1::Step {
        sequence: i32::try_from(index + 1).unwrap_or(i32::MAX),
        kind: kind.as_str().to_owned(),
        name,
        node: step.node,
        epoch: step.epoch.cast_signed(),
        attempts: step.attempts.cast_signed(),
        start_time: timestamp(step.start_ms),
        end_time: timestamp(step.end_ms),
        reason: reason_text(step.reason),
        // One of the two is 0.
        cycle: step.cycle.max(step.round.saturating_sub(1)).cast_signed(),
        summary: step.summary,
    }
}

impl From<disk::StepRecord> for link::StepInfo {
    fn from(step: disk::StepRecord) -> Self {
        Self {
            phase: step.phase,
            cycle: step.cycle,
            node: step.node,
            epoch: step.epoch,
            attempts: step.attempts,
            start_ms: step.start_ms,
            end_ms: step.end_ms,
            reason: step.reason,
            summary: step.summary,
            round: step.round,
            index: step.index,
            name: step.name,
        }
    }
}

/// A bookmark in the events of a work: the seq of the last entry that was seen, and how far what has no entry of its own
/// was seen after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub work: WorkId,
    pub seq: u64,
    pub offset: u64,
    /// Bytes of what the attempt that runs has said, and of what the steps before it said; see [`domain::transcript`].
    pub told: u64,
    pub committed: u64,
}

impl Cursor {
    pub fn to_text(self) -> String {
        let Self { work, seq, offset, told, committed } = self;
        match (offset, told, committed) {
            (0, 0, 0) => format!("{work}.{seq:x}"),
            (_, 0, 0) => format!("{work}.{seq:x}.{offset:x}"),
            (_, _, _) => format!("{work}.{seq:x}.{offset:x}.{told:x}.{committed:x}"),
        }
    }

    /// Before the first event of a work.
    pub fn beginning(work: WorkId) -> Self {
        Self { work, seq: 0, offset: 0, told: 0, committed: 0 }
    }

    /// # Errors
    /// Text that no event carried.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let wrong = || {
            Failure::invalid(
                "cursor",
                format!("cursor {text:.80?} is not one that an event carried"),
            )
        };
        let mut parts = text.split('.');
        let work = parts.next().and_then(|work| work.parse().ok()).ok_or_else(wrong)?;
        let mut number = |or: Option<u64>| match parts.next() {
            Some(part) => u64::from_str_radix(part, 16).map_err(|_| wrong()),
            None => or.ok_or_else(wrong),
        };
        let (seq, offset) = (number(None)?, number(Some(0))?);
        let (told, committed) = (number(Some(0))?, number(Some(0))?);
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self { work, seq, offset, told, committed })
    }
}

/// The event of one entry of a work, written in `epoch`. None for entries that no client sees. `steps` counts the steps
/// seen so far.
pub fn event(entry: Entry, epoch: Epoch, steps: &mut i32) -> Option<v1::work_event::Event> {
    use v1::work_event::{Event, StateChange};
    let change = |state: WorkState, reason: Reason| {
        Event::StateChange(StateChange {
            state: api_state(state).into(),
            reason: reason.to_string(),
        })
    };
    Some(match entry {
        Entry::Accepted(_) => change(WorkState::Accepted, Reason::Submitted),
        Entry::Waiting(reason) => change(WorkState::Waiting, reason),
        Entry::Resumed(reason) => change(WorkState::Running, reason),
        Entry::CancelRequested(reason) => change(WorkState::Cancelling, reason),
        Entry::StepDoubted(doubted) => change(WorkState::InDoubt, doubted.reason),
        // What ends the work is told by its end.
        Entry::StepResolved(resolved) if resolved.verdict.resolution() == Resolution::Fail => {
            return None;
        }
        Entry::StepResolved(resolved) => change(WorkState::Running, resolved.verdict.reason()),
        Entry::StepDone(done) => {
            let step = journal::step_record(epoch, &done);
            *steps += 1;
            let index = usize::try_from(*steps - 1).unwrap_or(0);
            let kind = done.step.kind();
            let step = api_step(index, step.into());
            if kind == StepKind::Phase { Event::Phase(step) } else { Event::Step(step) }
        }
        // The last event carries the whole work instead; it is made from the work's own answer.
        Entry::Ended(_) | Entry::ShardOpened(_) | Entry::StepBegan(_) | Entry::StepIntended(_) => {
            return None;
        }
    })
}

/// The event of a turn that began. It has no entry of its own and stands after the acceptance.
pub fn began() -> v1::work_event::Event {
    v1::work_event::Event::StateChange(v1::work_event::StateChange {
        state: v1::WorkState::Running.into(),
        reason: Reason::TurnBegan.to_string(),
    })
}

/// What the models of a work said, or that it is void.
pub fn told(told: Told) -> v1::work_event::Event {
    use v1::work_event::{Event, Superseded, Text};
    match told {
        Told::Text { offset, text, .. } => Event::Text(Text { offset: offset.cast_signed(), text }),
        Told::Superseded { offset } => {
            Event::Superseded(Superseded { offset: offset.cast_signed() })
        }
    }
}

/// When the turn of a work had begun at the latest, if this entry, written at `ts_ms`, shows that it had.
pub fn shows_turn(entry: &Entry, ts_ms: i64) -> Option<i64> {
    match entry {
        Entry::StepDone(done) => Some(done.start_ms),
        Entry::StepBegan(_)
        | Entry::StepIntended(_)
        | Entry::StepDoubted(_)
        | Entry::StepResolved(_)
        | Entry::Waiting(_)
        | Entry::Resumed(_) => Some(ts_ms),
        Entry::Accepted(_)
        | Entry::CancelRequested(_)
        | Entry::Ended(_)
        | Entry::ShardOpened(_) => None,
    }
}

/// The content of an entry as JSON, for people.
///
/// # Errors
/// A payload that cannot be read.
pub fn entry_json(payload: Bytes) -> Result<(&'static str, String), journal::Error> {
    let entry = journal::decode(payload)?;
    let name = entry.name();
    let value = match entry {
        Entry::ShardOpened(member) => serde_json::json!({ "member": member.to_string() }),
        Entry::Accepted(accepted) => serde_json::json!({
            "definitionHash": accepted.definition.to_string(),
            "idempotencyKey": accepted.key.as_str(),
            "inputBytes": accepted.input.len(),
            "deadline": timestamp(accepted.deadline_ms),
        }),
        Entry::StepBegan(began) => with_step(
            began.step,
            serde_json::json!({
                "attempt": began.attempt, "reason": began.reason.as_str(),
            }),
        ),
        Entry::StepIntended(intended) => with_step(
            intended.step,
            serde_json::json!({
                "attempt": intended.attempt, "tool": intended.tool, "idempotencyKey": intended.key,
                "deadline": timestamp(intended.deadline_ms),
            }),
        ),
        Entry::StepDoubted(doubted) => with_step(
            doubted.step,
            serde_json::json!({
                "attempt": doubted.attempt, "reason": doubted.reason.as_str(),
            }),
        ),
        Entry::StepResolved(resolved) => with_step(
            resolved.step,
            serde_json::json!({
                "attempt": resolved.attempt, "reason": resolved.verdict.reason().as_str(),
            }),
        ),
        Entry::StepDone(done) => with_step(
            done.step,
            serde_json::json!({
                "node": done.node, "attempts": done.attempts, "tool": done.name,
                "output": serde_json::from_slice::<serde_json::Value>(&done.output).unwrap_or_default(),
            }),
        ),
        Entry::Waiting(reason) | Entry::Resumed(reason) | Entry::CancelRequested(reason) => {
            serde_json::json!({ "reason": reason.as_str() })
        }
        Entry::Ended(ended) => serde_json::json!({
            "state": ended.state.as_str(), "reason": ended.reason.as_str(), "resultBytes": ended.result.len(),
            "detail": ended.detail,
        }),
    };
    Ok((name, value.to_string()))
}

/// `value` with what names `step`.
fn with_step(step: StepKey, mut value: serde_json::Value) -> serde_json::Value {
    match step {
        StepKey::Phase(PhaseKey { cycle, phase }) => {
            value["phase"] = phase.as_str().into();
            value["cycle"] = cycle.into();
        }
        StepKey::Call(CallKey { round, of }) => {
            value["round"] = round.into();
            if let Callee::Tool(index) = of {
                value["index"] = index.into();
            }
        }
    }
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|_, field| field != "");
    }
    value
}

/// Checks a definition that a client sent.
///
/// # Errors
/// The field that is wrong, and how.
pub fn definition(message: &v1::Definition) -> Result<Definition, Failure> {
    let wrong = |field: &str, why: String| Failure::invalid(&format!("definition.{field}"), why);
    let behaviour = match message.behaviour.as_str() {
        "" | "chain" => Behaviour::Chain,
        "loop" => Behaviour::Loop,
        other => {
            let why = format!("behaviour {other:.40?} is not known: chain or loop is allowed");
            return Err(wrong("behaviour", why));
        }
    };
    let postchain = Definition::postchain();
    if behaviour == Behaviour::Loop && !message.phases.is_empty() {
        return Err(wrong("phases", "only a chain has phases".to_owned()));
    }
    if !message.phases.is_empty()
        && !message.phases.iter().map(String::as_str).eq(Phase::ALL.map(Phase::as_str))
    {
        let why = "only the six phases of the PostChain in their order are allowed".to_owned();
        return Err(wrong("phases", why));
    }
    let or = |text: &str, default: &str| {
        if text.is_empty() { default.to_owned() } else { text.to_owned() }
    };
    let count = |field: &str, number: i32| {
        u32::try_from(number).map_err(|_| wrong(field, format!("{number} is below 0")))
    };
    let attempts_max = match count("attempts_max", message.attempts_max)? {
        0 => postchain.attempts_max,
        n => n,
    };
    let rounds_max = match (count("rounds_max", message.rounds_max)?, behaviour) {
        (0, Behaviour::Loop) => ROUNDS_DEFAULT,
        (n, _) => n,
    };
    let in_doubt = match message.in_doubt.as_str() {
        "" => Policy::default(),
        text => {
            text.parse().map_err(|error: domain::Error| wrong("in_doubt", error.to_string()))?
        }
    };
    let checked = Definition {
        name: message
            .name
            .parse()
            .map_err(|error: domain::Error| wrong("name", error.to_string()))?,
        behaviour,
        model: or(&message.model, &postchain.model),
        instructions: message.instructions.clone(),
        modality: or(&message.modality, &postchain.modality),
        cycles_max: count("cycles_max", message.cycles_max)?,
        attempts_max,
        tools: message.tools.clone(),
        rounds_max,
        in_doubt,
    };
    checked.check().map_err(|invalid| wrong(invalid.field, invalid.why))
}

impl From<&Definition> for v1::Definition {
    fn from(definition: &Definition) -> Self {
        let is_loop = definition.behaviour == Behaviour::Loop;
        let phases = Phase::ALL.iter().map(Phase::to_string).filter(|_| !is_loop);
        Self {
            name: definition.name.to_string(),
            behaviour: if is_loop { "loop" } else { "chain" }.to_owned(),
            model: definition.model.clone(),
            instructions: definition.instructions.clone(),
            phases: phases.collect(),
            cycles_max: definition.cycles_max.cast_signed(),
            modality: definition.modality.clone(),
            attempts_max: definition.attempts_max.cast_signed(),
            tools: definition.tools.clone(),
            rounds_max: definition.rounds_max.cast_signed(),
            // A chain has no such step: its encoding is as it was before there were loops.
            in_doubt: if is_loop { definition.in_doubt.as_str() } else { "" }.to_owned(),
        }
    }
}

/// The canonical encoding of a definition, and its hash: what a work pins.
pub fn canonical(definition: &Definition) -> (DefinitionHash, Bytes) {
    // Fields are written in the order of their numbers and there is no map among them, so equal means equal bytes.
    let body = v1::Definition::from(definition).encode_to_vec();
    (DefinitionHash::of(&body), body.into())
}

/// Reads a canonical encoding.
///
/// # Errors
/// Bytes that are not one.
pub fn definition_from_body(body: &[u8]) -> Result<Definition, Failure> {
    let message = v1::Definition::decode(body).map_err(|error| {
        Failure::invalid("definition", format!("a stored definition is damaged: {error}"))
    })?;
    definition(&message)
}

/// Parses the agent id of a request.
///
/// # Errors
/// The field and what is allowed.
pub fn agent_id(field: &str, text: &str) -> Result<AgentId, Failure> {
    text.parse().map_err(|error: domain::Error| Failure::invalid(field, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_has_one_hash() {
        let (hash, body) = canonical(&Definition::postchain());
        let read = definition_from_body(&body).unwrap();
        assert_eq!(read, Definition::postchain());
        assert_eq!(canonical(&read).0, hash);
    }

    #[test]
    fn the_hash_of_a_chain_is_as_it_was_before_there_were_loops() {
        let message = v1::Definition::from(&Definition::postchain());
        let before = (message.tools.len(), message.rounds_max, message.in_doubt.as_str());
        assert_eq!(before, (0, 0, ""), "fields that are not set are not encoded");
    }

    #[test]
    fn a_loop_reads_back() {
        let message = v1::Definition {
            name: "clerk".into(),
            behaviour: "loop".into(),
            model: "script".into(),
            tools: vec!["count".into()],
            ..v1::Definition::default()
        };
        let read = definition(&message).unwrap();
        assert_eq!((read.rounds_max, read.in_doubt), (ROUNDS_DEFAULT, Policy::Ask));
        let (hash, body) = canonical(&read);
        assert_eq!(canonical(&definition_from_body(&body).unwrap()).0, hash);
    }

    #[test]
    fn a_wrong_definition_names_its_field() {
        let check = |change: fn(&mut v1::Definition), field: &str| {
            let mut message = v1::Definition::from(&Definition::postchain());
            change(&mut message);
            assert_eq!(definition(&message).unwrap_err().field.as_deref(), Some(field));
        };
        check(|m| m.name = "A".into(), "definition.name");
        check(|m| m.cycles_max = -1, "definition.cycles_max");
        check(|m| m.cycles_max = 101, "definition.cycles_max");
        check(|m| m.behaviour = "ring".into(), "definition.behaviour");
        check(|m| m.behaviour = "loop".into(), "definition.phases");
        check(|m| m.tools = vec!["count".into()], "definition.tools");
        check(|m| m.rounds_max = 3, "definition.rounds_max");
        check(|m| m.in_doubt = "hope".into(), "definition.in_doubt");
        check(|m| m.phases = vec!["yield".into()], "definition.phases");
        check(|m| m.instructions = "x".repeat(1 << 20), "definition.instructions");
    }

    #[test]
    fn a_cursor_reads_back() {
        let all = [(0, 0, 0), (1, 0, 0), (0, 300, 0), (1, 300, 0), (0, 0, 7), (1, 300, 7)];
        for (offset, told, committed) in all {
            let work = "w-0-0ff-1c2".parse().unwrap();
            let cursor = Cursor { work, seq: 17, offset, told, committed };
            assert_eq!(Cursor::parse(&cursor.to_text()), Ok(cursor));
        }
        for text in ["", "w-0-0ff-1c2", "w-0-0ff-1c2.", "w-0-0ff-1c2.1.1.1.1.1", "w-0-0ff-1c2.x"] {
            assert!(Cursor::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_time_reads_back() {
        for ms in [1, 999, 1_700_000_000_123] {
            assert_eq!(timestamp(ms).as_ref().map(millis), Some(ms));
        }
        assert_eq!(timestamp(0), None);
    }
}
