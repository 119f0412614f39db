//! Entries, snapshots and records as they stand on disk. An unknown format or a damaged payload is an error, never a panic.

use bytes::Bytes;
use prost::Message;

use domain::agent::Agent;
use domain::entry::{Accepted, Ended, Entry, PhaseDone, Stamp, StepBegan, Usage};
use domain::turn::{Limits, Turn};
use domain::{
    Class, DefinitionHash, Epoch, Incarnation, Lsn, Member, Phase, Reason, Seq, Slot, StepKey,
    WorkState,
};

use crate::disk;

/// The format that this version writes, and the only one that it reads.
pub const FORMAT: u32 = 1;

/// The most bytes that the steps of a finished work take in its row.
const STEPS_BYTES_MAX: usize = 16 * 1024;

/// Why something on disk cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{what} has format {format}, this version reads format {FORMAT}; use the version that wrote it"
    )]
    Format { what: &'static str, format: u32 },
    #[error("{what} is damaged: {why}")]
    Damaged { what: &'static str, why: String },
}

fn damaged(what: &'static str, why: impl ToString) -> Error {
    Error::Damaged { what, why: why.to_string() }
}

fn reason(code: u32) -> Result<Reason, Error> {
    let known = u16::try_from(code).ok().and_then(Reason::from_code);
    known.ok_or_else(|| damaged("an entry", format!("reason {code} is not known")))
}

fn phase(code: u32) -> Result<Phase, Error> {
    Phase::from_code(code).ok_or_else(|| damaged("an entry", format!("phase {code} is not known")))
}

/// The number of a work state, as on the wire.
pub fn state_code(state: WorkState) -> u32 {
    state as u32 + 1
}

/// The work state of a number.
pub fn state_from_code(code: u32) -> Option<WorkState> {
    WorkState::ALL.into_iter().find(|state| state_code(*state) == code)
}

fn state(code: u32) -> Result<WorkState, Error> {
    state_from_code(code)
        .ok_or_else(|| damaged("an entry", format!("work state {code} is not known")))
}

/// An entry as it is stored.
pub fn encode(entry: &Entry) -> Bytes {
    disk::Entry { format: FORMAT, entry: Some(to_disk(entry)) }.encode_to_vec().into()
}

/// Reads a stored entry.
///
/// # Errors
/// Another format, or damage.
pub fn decode(payload: Bytes) -> Result<Entry, Error> {
    let entry = disk::Entry::decode(payload).map_err(|error| damaged("an entry", error))?;
    from_disk(entry)
}

fn to_disk(entry: &Entry) -> disk::entry::Entry {
    use disk::entry::Entry as Disk;
    match entry {
        Entry::ShardOpened(member) => Disk::ShardOpened(disk::ShardOpened {
            node: member.name.to_string(),
            incarnation: member.incarnation.0,
        }),
        Entry::Accepted(accepted) => Disk::Accepted(accepted_to_disk(accepted)),
        Entry::StepBegan(began) => Disk::StepBegan(disk::StepBegan {
            phase: began.step.phase.code(),
            cycle: began.step.cycle,
            attempt: began.attempt,
            reason: began.reason.code().into(),
        }),
        Entry::PhaseDone(done) => Disk::PhaseDone(disk::PhaseDone {
            phase: done.step.phase.code(),
            cycle: done.step.cycle,
            output: done.output.clone(),
            node: done.node.clone(),
            attempts: done.attempts,
            start_ms: done.start_ms,
            end_ms: done.end_ms,
            calls: done.usage.calls,
            input_tokens: done.usage.input_tokens,
            output_tokens: done.usage.output_tokens,
        }),
        Entry::Waiting(reason) => Disk::Waiting(disk::Waiting { reason: reason.code().into() }),
        Entry::Resumed(reason) => Disk::Resumed(disk::Resumed { reason: reason.code().into() }),
        Entry::CancelRequested(reason) => {
            Disk::CancelRequested(disk::CancelRequested { reason: reason.code().into() })
        }
        Entry::Ended(ended) => Disk::Ended(disk::Ended {
            state: state_code(ended.state),
            reason: ended.reason.code().into(),
            result: ended.result.clone(),
            detail: ended.detail.clone(),
        }),
    }
}

fn accepted_to_disk(accepted: &Accepted) -> disk::Accepted {
    disk::Accepted {
        definition: Bytes::copy_from_slice(accepted.definition.as_bytes()),
        input: accepted.input.clone(),
        idempotency_key: accepted.key.to_string(),
        deadline_ms: accepted.deadline_ms,
        traceparent: accepted.traceparent.clone().unwrap_or_default(),
        slot: accepted.slot.get().into(),
        class: accepted.class.0.into(),
    }
}

fn accepted_from_disk(accepted: disk::Accepted) -> Result<Accepted, Error> {
    let wrong = |error: domain::Error| damaged("an acceptance", error);
    let slot = u16::try_from(accepted.slot).ok().and_then(Slot::new);
    Ok(Accepted {
        definition: DefinitionHash::try_from(&accepted.definition[..]).map_err(wrong)?,
        input: accepted.input,
        key: accepted.idempotency_key.parse().map_err(wrong)?,
        deadline_ms: accepted.deadline_ms,
        traceparent: Some(accepted.traceparent).filter(|text| !text.is_empty()),
        class: Class(
            u16::try_from(accepted.class).map_err(|error| damaged("an acceptance", error))?,
        ),
        slot: slot.ok_or_else(|| damaged("an acceptance", "there is no such slot"))?,
    })
}

fn from_disk(entry: disk::Entry) -> Result<Entry, Error> {
    use disk::entry::Entry as Disk;
    if entry.format != FORMAT {
        return Err(Error::Format { what: "an entry", format: entry.format });
    }
    let Some(entry) = entry.entry else {
        return Err(damaged("an entry", "it is of a kind that this version does not know"));
    };
    Ok(match entry {
        Disk::ShardOpened(opened) => Entry::ShardOpened(Member {
            name: opened.node.parse().map_err(|error| damaged("an entry", error))?,
            incarnation: Incarnation(opened.incarnation),
        }),
        Disk::Accepted(accepted) => Entry::Accepted(accepted_from_disk(accepted)?),
        Disk::StepBegan(began) => Entry::StepBegan(StepBegan {
            step: StepKey { cycle: began.cycle, phase: phase(began.phase)? },
            attempt: began.attempt,
            reason: reason(began.reason)?,
        }),
        Disk::PhaseDone(done) => Entry::PhaseDone(PhaseDone {
            step: StepKey { cycle: done.cycle, phase: phase(done.phase)? },
            output: done.output,
            node: done.node,
            attempts: done.attempts,
            start_ms: done.start_ms,
            end_ms: done.end_ms,
            usage: Usage {
                calls: done.calls,
                input_tokens: done.input_tokens,
                output_tokens: done.output_tokens,
            },
        }),
        Disk::Waiting(waiting) => Entry::Waiting(reason(waiting.reason)?),
        Disk::Resumed(resumed) => Entry::Resumed(reason(resumed.reason)?),
        Disk::CancelRequested(cancel) => Entry::CancelRequested(reason(cancel.reason)?),
        Disk::Ended(ended) => Entry::Ended(Ended {
            state: state(ended.state)?,
            reason: reason(ended.reason)?,
            result: ended.result,
            detail: ended.detail,
        }),
    })
}

/// The fold of an agent as it stands in its row.
pub fn encode_agent(agent: &Agent) -> Bytes {
    let open = agent.open().map(|turn| disk::OpenWork {
        lsn: turn.id().0,
        accepted: Some(accepted_to_disk(turn.accepted())),
        create_ms: turn.create_ms(),
        entries: turn.entries().iter().map(stamped_to_disk).collect(),
    });
    let snapshot = disk::AgentSnapshot {
        format: FORMAT,
        seq: agent.seq.0,
        findings: agent.findings().map(str::to_owned).collect(),
        open: open.collect(),
    };
    snapshot.encode_to_vec().into()
}

fn stamped_to_disk((stamp, entry): &(Stamp, Entry)) -> disk::Stamped {
    // The acceptance stands beside the list already, with its input.
    let is_acceptance = matches!(entry, Entry::Accepted(_));
    let entry =
        (!is_acceptance).then(|| disk::Entry { format: FORMAT, entry: Some(to_disk(entry)) });
    let Stamp { seq, lsn, epoch, ts_ms } = *stamp;
    disk::Stamped { seq: seq.0, lsn: lsn.0, epoch: epoch.0, ts_ms, entry }
}

/// The definitions that the open works in a snapshot pin: they have to be known before it is read.
///
/// # Errors
/// Damage.
pub fn definitions_of(state: &Bytes) -> Result<Vec<DefinitionHash>, Error> {
    const WHAT: &str = "the snapshot of an agent";
    let snapshot =
        disk::AgentSnapshot::decode(state.clone()).map_err(|error| damaged(WHAT, error))?;
    let pinned = snapshot.open.iter().filter_map(|work| work.accepted.as_ref());
    pinned
        .map(|accepted| accepted.definition[..].try_into().map_err(|error| damaged(WHAT, error)))
        .collect()
}

/// Reads the fold of an agent from its row: `snap_lsn` is the lsn up to which it was folded.
///
/// # Errors
/// Another format, or damage.
pub fn decode_agent(
    state: Bytes,
    snap_lsn: Lsn,
    last_work: Lsn,
    limits: impl Fn(&DefinitionHash) -> Limits,
) -> Result<Agent, Error> {
    const WHAT: &str = "the snapshot of an agent";
    if state.is_empty() {
        return Ok(Agent::restore(Seq(0), Lsn(0), last_work, Vec::new(), Vec::new()));
    }
    let snapshot = disk::AgentSnapshot::decode(state).map_err(|error| damaged(WHAT, error))?;
    if snapshot.format != FORMAT {
        return Err(Error::Format { what: WHAT, format: snapshot.format });
    }
    let mut open = Vec::with_capacity(snapshot.open.len());
    for work in snapshot.open {
        open.push(turn_from_disk(work, &limits)?);
    }
    Ok(Agent::restore(Seq(snapshot.seq), snap_lsn, last_work, snapshot.findings, open))
}

fn turn_from_disk(
    work: disk::OpenWork,
    limits: impl Fn(&DefinitionHash) -> Limits,
) -> Result<Turn, Error> {
    const WHAT: &str = "the snapshot of a work";
    let accepted = work.accepted.ok_or_else(|| damaged(WHAT, "it has no acceptance"))?;
    let accepted = accepted_from_disk(accepted)?;
    let mut entries = work.entries.into_iter();
    let first = entries.next().ok_or_else(|| damaged(WHAT, "it has no entries"))?;
    let limits = limits(&accepted.definition);
    let mut turn = Turn::accept(accepted, stamp_of(&first), limits);
    for stamped in entries {
        let stamp = stamp_of(&stamped);
        let entry = stamped.entry.ok_or_else(|| damaged(WHAT, "an entry is empty"))?;
        turn.apply(from_disk(entry)?, stamp).map_err(|error| damaged(WHAT, error))?;
    }
    Ok(turn)
}

fn stamp_of(stamped: &disk::Stamped) -> Stamp {
    Stamp {
        seq: Seq(stamped.seq),
        lsn: Lsn(stamped.lsn),
        epoch: Epoch(stamped.epoch),
        ts_ms: stamped.ts_ms,
    }
}

/// The steps of a turn, folded from its entries: a phase that was interrupted and repeated is one step.
pub fn steps(turn: &Turn) -> Vec<disk::StepRecord> {
    turn.phases()
        .map(|(stamp, done)| disk::StepRecord {
            phase: done.step.phase.code(),
            cycle: done.step.cycle,
            node: done.node.clone(),
            epoch: stamp.epoch.0,
            attempts: done.attempts,
            start_ms: done.start_ms,
            end_ms: done.end_ms,
            reason: Reason::Completed.code().into(),
            summary: summary(done),
        })
        .collect()
}

/// What a phase found, in one line.
pub fn summary(done: &PhaseDone) -> String {
    let output = domain::chain::Output::parse(done.step.phase, &done.output);
    output.map(|output| output.summary()).unwrap_or_default()
}

/// The record of a work that ended, for its row.
pub fn encode_record(turn: &Turn, ended: &Ended) -> Bytes {
    record(steps(turn), ended, turn.usage())
}

/// The record of a work that ends in the same batch as its last phase `done`.
pub fn encode_record_with(turn: &Turn, stamp: Epoch, done: &PhaseDone, ended: &Ended) -> Bytes {
    let mut steps = steps(turn);
    steps.push(disk::StepRecord {
        phase: done.step.phase.code(),
        cycle: done.step.cycle,
        node: done.node.clone(),
        epoch: stamp.0,
        attempts: done.attempts,
        start_ms: done.start_ms,
        end_ms: done.end_ms,
        reason: Reason::Completed.code().into(),
        summary: summary(done),
    });
    let mut usage = turn.usage();
    usage += done.usage;
    record(steps, ended, usage)
}

fn record(mut steps: Vec<disk::StepRecord>, ended: &Ended, usage: Usage) -> Bytes {
    // A long chain keeps its newest steps whole; the summaries of the oldest go first.
    let mut bytes: usize = steps.iter().map(Message::encoded_len).sum();
    for step in &mut steps {
        if bytes <= STEPS_BYTES_MAX {
            break;
        }
        bytes -= step.encoded_len();
        step.summary.clear();
        bytes += step.encoded_len();
    }
    let record = disk::WorkRecord {
        format: FORMAT,
        result: ended.result.clone(),
        detail: ended.detail.clone(),
        steps,
        calls: usage.calls,
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
    };
    record.encode_to_vec().into()
}

/// Reads the record of an ended work.
///
/// # Errors
/// Another format, or damage.
pub fn decode_record(record: Bytes) -> Result<disk::WorkRecord, Error> {
    const WHAT: &str = "the record of a work";
    let record = disk::WorkRecord::decode(record).map_err(|error| damaged(WHAT, error))?;
    if record.format != FORMAT {
        return Err(Error::Format { what: WHAT, format: record.format });
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::turn::ended;

    fn limits(_: &DefinitionHash) -> Limits {
        Limits { cycles_max: 1, attempts_max: 3 }
    }

    fn stamp(n: u64) -> Stamp {
        Stamp { seq: Seq(n), lsn: Lsn(n * 10), epoch: Epoch(3), ts_ms: 5 }
    }

    fn accepted() -> Accepted {
        Accepted {
            definition: DefinitionHash([7; 32]),
            input: Bytes::from_static("tëxt".as_bytes()),
            key: "key".parse().unwrap(),
            deadline_ms: 99,
            traceparent: Some("00-1-2-01".into()),
            class: Class(0),
            slot: Slot::new(12).unwrap(),
        }
    }

    fn done() -> PhaseDone {
        PhaseDone {
            step: StepKey::FIRST,
            output: Bytes::from_static(br#"{"draft":"d"}"#),
            node: "node-1".into(),
            attempts: 1,
            start_ms: 1,
            end_ms: 2,
            usage: Usage { calls: 1, input_tokens: 2, output_tokens: 3 },
        }
    }

    #[test]
    fn every_entry_reads_back() {
        let step = StepKey { cycle: 1, phase: Phase::Yield };
        for entry in [
            Entry::ShardOpened(Member {
                name: "node-1".parse().unwrap(),
                incarnation: Incarnation(4),
            }),
            Entry::Accepted(accepted()),
            Entry::StepBegan(StepBegan { step, attempt: 2, reason: Reason::OwnerDied }),
            Entry::PhaseDone(done()),
            Entry::Waiting(Reason::NoOffer),
            Entry::Resumed(Reason::OfferAppeared),
            Entry::CancelRequested(Reason::CancelRequested),
            Entry::Ended(ended(WorkState::Failed, Reason::CycleLimit)),
        ] {
            assert_eq!(decode(encode(&entry)).unwrap(), entry);
        }
    }

    #[test]
    fn an_agent_reads_back_with_its_open_works() {
        let mut agent = Agent::default();
        agent.apply(Lsn(0), Entry::Accepted(accepted()), stamp(1), limits).unwrap();
        agent.apply(Lsn(10), Entry::PhaseDone(done()), stamp(2), limits).unwrap();
        let read = decode_agent(encode_agent(&agent), agent.head, agent.last_work, limits).unwrap();
        assert_eq!(read, agent);
    }

    #[test]
    fn rubbish_and_other_formats_are_errors() {
        assert!(matches!(decode(Bytes::from_static(&[0xff; 9])), Err(Error::Damaged { .. })));
        let newer = disk::Entry { format: 2, entry: None }.encode_to_vec();
        assert!(matches!(decode(newer.into()), Err(Error::Format { format: 2, .. })));
        let unknown = disk::Entry { format: 1, entry: None }.encode_to_vec();
        assert!(matches!(decode(unknown.into()), Err(Error::Damaged { .. })));
    }
}
