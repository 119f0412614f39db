//! A work as other processes are told of it.

use bytes::Bytes;

use domain::turn::Turn;
use domain::{AgentId, WorkState};
use proto::journal;
use proto::link::{AgentRow, WorkInfo, WorkRow};

use crate::Error;

/// An open work, from its owner's memory.
pub(crate) fn of_turn(agent: &AgentId, turn: &Turn) -> WorkInfo {
    let accepted = turn.accepted();
    let usage = turn.usage();
    WorkInfo {
        lsn: turn.id().0,
        slot: accepted.slot.get().into(),
        class: accepted.class.0.into(),
        agent: agent.to_string(),
        state: journal::state_code(turn.state()),
        reason: turn.reason().code().into(),
        definition: Bytes::copy_from_slice(accepted.definition.as_bytes()),
        create_ms: turn.create_ms(),
        steps: journal::steps(turn).into_iter().map(Into::into).collect(),
        calls: usage.calls,
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
        ..WorkInfo::default()
    }
}

/// A work that has just been accepted: nothing has happened to it yet, whatever has by the time of the answer.
pub(crate) fn of_accepted(agent: &AgentId, turn: &Turn) -> WorkInfo {
    let state = journal::state_code(WorkState::Accepted);
    let reason = domain::Reason::Submitted.code().into();
    WorkInfo { state, reason, ..of_turn(agent, turn) }
}

/// A work that ended now.
pub(crate) fn of_ended(agent: &AgentId, turn: &Turn) -> WorkInfo {
    let mut info = of_turn(agent, turn);
    if let Some((stamp, ended)) = turn.ended() {
        info.end_ms = stamp.ts_ms;
        info.result = ended.result.clone();
        info.detail = ended.detail.clone();
    }
    info
}

/// A work that ended before, from its rows.
pub(crate) fn of_rows(class: u32, work: &WorkRow, agent: &AgentRow) -> Result<WorkInfo, Error> {
    let id = format!("{}/{}/{}", agent.tenant, agent.name, agent.key);
    let mut info = WorkInfo {
        lsn: work.id,
        slot: work.slot,
        class,
        agent: id.clone(),
        state: work.state,
        reason: work.reason,
        definition: work.definition.clone(),
        create_ms: work.create_ms,
        end_ms: work.end_ms,
        ..WorkInfo::default()
    };
    if work.record.is_empty() {
        return Ok(info);
    }
    let record = journal::decode_record(work.record.clone())
        .map_err(|source| Error::Journal { agent: id, source })?;
    info.result = record.result;
    info.detail = record.detail;
    info.steps = record.steps.into_iter().map(Into::into).collect();
    info.calls = record.calls;
    info.input_tokens = record.input_tokens;
    info.output_tokens = record.output_tokens;
    Ok(info)
}
