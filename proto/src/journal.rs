//! Entries, snapshots and records as they stand on disk. An unknown format or a damaged payload is an error, never a panic.

use bytes::Bytes;
use prost::Message;

use domain::agent::{Agent, Passage};
use domain::chain::PhaseKey;
use domain::entry::{
    Accepted, Ended, Entry, Resolution, Stamp, StepBegan, StepDone, StepDoubted, StepIntended,
    StepResolved, Usage, Verdict,
};
use domain::round::{Returned, Said};
use domain::step::{CallKey, Callee};
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

/// The numbers by which a step is named on disk and on the wire: a phase by itself and its cycle, with round 0; a call of
/// a loop by its round from 1, with index 0 for the model and from 1 for a tool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepNumbers {
    pub phase: u32,
    pub cycle: u32,
    pub round: u32,
    pub index: u32,
}

impl From<StepKey> for StepNumbers {
    fn from(step: StepKey) -> Self {
        match step {
            StepKey::Phase(PhaseKey { cycle, phase }) => {
                Self { phase: phase.code(), cycle, ..Self::default() }
            }
            StepKey::Call(CallKey { round, of }) => {
                let index = match of {
                    Callee::Model => 0,
                    Callee::Tool(index) => index + 1,
                };
                Self { round: round + 1, index, ..Self::default() }
            }
        }
    }
}

impl StepNumbers {
    /// The step of these numbers; none if there is no such step.
    pub fn step(self) -> Option<StepKey> {
        match (self.round, self.index) {
            (0, _) => Some(StepKey::phase(self.cycle, Phase::from_code(self.phase)?)),
            (round, 0) => Some(StepKey::model(round - 1)),
            (round, index) => Some(StepKey::tool(round - 1, index - 1)),
        }
    }
}

fn step(phase: u32, cycle: u32, round: u32, index: u32) -> Result<StepKey, Error> {
    let numbers = StepNumbers { phase, cycle, round, index };
    numbers.step().ok_or_else(|| damaged("an entry", format!("phase {phase} is not known")))
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
        Entry::StepBegan(began) => {
            let StepNumbers { phase, cycle, round, index } = began.step.into();
            let (attempt, reason) = (began.attempt, began.reason.code().into());
            Disk::StepBegan(disk::StepBegan { phase, cycle, attempt, reason, round, index })
        }
        Entry::StepIntended(intended) => {
            let StepNumbers { round, index, .. } = intended.step.into();
            Disk::StepIntended(disk::StepIntended {
                round,
                index,
                attempt: intended.attempt,
                tool: intended.tool.clone(),
                idempotency_key: intended.key.clone(),
                deadline_ms: intended.deadline_ms,
            })
        }
        Entry::StepDoubted(doubted) => {
            let StepNumbers { round, index, .. } = doubted.step.into();
            let (attempt, reason) = (doubted.attempt, doubted.reason.code().into());
            Disk::StepDoubted(disk::StepDoubted { round, index, attempt, reason })
        }
        Entry::StepResolved(resolved) => {
            let StepNumbers { round, index, .. } = resolved.step.into();
            let (attempt, reason) = (resolved.attempt, resolved.verdict.reason().code().into());
            Disk::StepResolved(disk::StepResolved { round, index, attempt, reason })
        }
        Entry::StepDone(done) => {
            let StepNumbers { phase, cycle, round, index } = done.step.into();
            Disk::PhaseDone(disk::PhaseDone {
                phase,
                cycle,
                output: done.output.clone(),
                node: done.node.clone(),
                attempts: done.attempts,
                start_ms: done.start_ms,
                end_ms: done.end_ms,
                calls: done.usage.calls,
                input_tokens: done.usage.input_tokens,
                output_tokens: done.usage.output_tokens,
                round,
                index,
                name: done.name.clone(),
            })
        }
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
            step: step(began.phase, began.cycle, began.round, began.index)?,
            attempt: began.attempt,
            reason: reason(began.reason)?,
        }),
        Disk::StepIntended(intended) => Entry::StepIntended(StepIntended {
            step: step(0, 0, intended.round, intended.index)?,
            attempt: intended.attempt,
            tool: intended.tool,
            key: intended.idempotency_key,
            deadline_ms: intended.deadline_ms,
        }),
        Disk::StepDoubted(doubted) => Entry::StepDoubted(StepDoubted {
            step: step(0, 0, doubted.round, doubted.index)?,
            attempt: doubted.attempt,
            reason: reason(doubted.reason)?,
        }),
        Disk::StepResolved(resolved) => Entry::StepResolved(StepResolved {
            step: step(0, 0, resolved.round, resolved.index)?,
            attempt: resolved.attempt,
            verdict: Verdict::from_reason(reason(resolved.reason)?)
                .ok_or_else(|| damaged("an entry", "its reason is no verdict"))?,
        }),
        Disk::PhaseDone(done) => Entry::StepDone(StepDone {
            step: step(done.phase, done.cycle, done.round, done.index)?,
            name: done.name,
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
        passages: agent.passages().map(passage_to_disk).collect(),
    };
    snapshot.encode_to_vec().into()
}

fn passage_to_disk(passage: Passage) -> disk::Passage {
    let Passage { at_ms, epoch, reason } = passage;
    disk::Passage { at_ms, epoch: epoch.0, reason: reason.code().into() }
}

/// They are for people: one with a reason of a later version is left out, and the agent goes on.
fn passages_from_disk(passages: &[disk::Passage]) -> Vec<Passage> {
    let known = passages.iter().filter_map(|passage| {
        let disk::Passage { at_ms, epoch, reason } = *passage;
        Some(Passage { at_ms, epoch: Epoch(epoch), reason: self::reason(reason).ok()? })
    });
    known.collect()
}

/// How an agent came into memory and left it, from its row.
///
/// # Errors
/// Damage.
pub fn passages_of(state: &Bytes) -> Result<Vec<Passage>, Error> {
    let snapshot = disk::AgentSnapshot::decode(state.clone());
    let snapshot = snapshot.map_err(|error| damaged("the snapshot of an agent", error))?;
    Ok(passages_from_disk(&snapshot.passages))
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
        let (findings, passages, open) = Default::default();
        return Ok(Agent::restore(Seq(0), Lsn(0), last_work, findings, passages, open));
    }
    let snapshot = disk::AgentSnapshot::decode(state).map_err(|error| damaged(WHAT, error))?;
    if snapshot.format != FORMAT {
        return Err(Error::Format { what: WHAT, format: snapshot.format });
    }
    let mut open = Vec::with_capacity(snapshot.open.len());
    for work in snapshot.open {
        open.push(turn_from_disk(work, &limits)?);
    }
    let passages = passages_from_disk(&snapshot.passages);
    let (seq, findings) = (Seq(snapshot.seq), snapshot.findings);
    Ok(Agent::restore(seq, snap_lsn, last_work, findings, passages, open))
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

/// The steps of a turn, folded from its entries: a step that was interrupted and repeated is one. The last may be in
/// doubt.
pub fn steps(turn: &Turn) -> Vec<disk::StepRecord> {
    fold_steps(turn.entries().iter().map(|(stamp, entry)| (stamp.epoch, entry)))
}

fn fold_steps<'a>(entries: impl Iterator<Item = (Epoch, &'a Entry)>) -> Vec<disk::StepRecord> {
    let mut steps = Vec::new();
    let (mut intent, mut doubt, mut verdict) = (None, None, None);
    for (epoch, entry) in entries {
        match entry {
            Entry::StepIntended(intended) => intent = Some(intended),
            Entry::StepDoubted(doubted) => (doubt, verdict) = (Some((epoch, doubted)), None),
            Entry::StepResolved(resolved) => {
                verdict = Some(resolved.verdict);
                doubt = doubt.filter(|_| resolved.verdict.resolution() == Resolution::Fail);
            }
            Entry::StepDone(done) => {
                // How a doubt about it was resolved says more than that it was completed.
                let reason = verdict.map_or(Reason::Completed, Verdict::reason).code().into();
                steps.push(disk::StepRecord { reason, ..step_record(epoch, done) });
                (intent, doubt, verdict) = (None, None, None);
            }
            Entry::ShardOpened(_)
            | Entry::Accepted(_)
            | Entry::StepBegan(_)
            | Entry::Waiting(_)
            | Entry::Resumed(_)
            | Entry::CancelRequested(_)
            | Entry::Ended(_) => {}
        }
    }
    steps.extend(doubt.map(|(epoch, doubted)| {
        let StepNumbers { round, index, .. } = doubted.step.into();
        let intended = intent.filter(|intent| intent.step == doubted.step);
        disk::StepRecord {
            round,
            index,
            name: intended.map(|intent| intent.tool.clone()).unwrap_or_default(),
            epoch: epoch.0,
            attempts: doubted.attempt,
            reason: verdict.map_or(Reason::InDoubt, Verdict::reason).code().into(),
            summary: intended.map(|intent| format!("key {}", intent.key)).unwrap_or_default(),
            ..disk::StepRecord::default()
        }
    }));
    steps
}

/// A step that was done under `epoch`.
pub fn step_record(epoch: Epoch, done: &StepDone) -> disk::StepRecord {
    let StepNumbers { phase, cycle, round, index } = done.step.into();
    disk::StepRecord {
        phase,
        cycle,
        round,
        index,
        name: done.name.clone(),
        node: done.node.clone(),
        epoch: epoch.0,
        attempts: done.attempts,
        start_ms: done.start_ms,
        end_ms: done.end_ms,
        reason: Reason::Completed.code().into(),
        summary: summary(done),
    }
}

/// What a step found, in one line.
pub fn summary(done: &StepDone) -> String {
    let summary = match done.step {
        StepKey::Phase(key) => {
            domain::chain::Output::parse(key.phase, &done.output).map(|output| output.summary())
        }
        StepKey::Call(CallKey { of: Callee::Model, .. }) => {
            Said::parse(&done.output).map(|said| said.summary())
        }
        StepKey::Call(CallKey { of: Callee::Tool(_), .. }) => {
            Returned::parse(&done.output).map(|returned| returned.summary())
        }
    };
    summary.unwrap_or_default()
}

/// The record of a work that ends with `entries`, which are journaled in one batch; the last is its end.
pub fn encode_record(turn: &Turn, epoch: Epoch, entries: &[Entry], ended: &Ended) -> Bytes {
    let before = turn.entries().iter().map(|(stamp, entry)| (stamp.epoch, entry));
    let steps = fold_steps(before.chain(entries.iter().map(|entry| (epoch, entry))));
    let mut usage = turn.usage();
    for entry in entries {
        if let Entry::StepDone(done) = entry {
            usage += done.usage;
        }
    }
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
        Limits::chain(1, 3)
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

    fn done() -> StepDone {
        StepDone {
            step: StepKey::phase(0, Phase::Action),
            name: String::new(),
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
        let step = StepKey::phase(1, Phase::Yield);
        let call = StepKey::tool(2, 3);
        for entry in [
            Entry::ShardOpened(Member {
                name: "node-1".parse().unwrap(),
                incarnation: Incarnation(4),
            }),
            Entry::Accepted(accepted()),
            Entry::StepBegan(StepBegan { step, attempt: 2, reason: Reason::OwnerDied }),
            Entry::StepDone(done()),
            Entry::StepDone(StepDone { step: call, name: "count".into(), ..done() }),
            Entry::StepDone(StepDone { step: StepKey::model(0), ..done() }),
            Entry::StepIntended(StepIntended {
                step: call,
                attempt: 2,
                tool: "count".into(),
                key: "w-0-000-1/2/tool-3".into(),
                deadline_ms: 7,
            }),
            Entry::StepDoubted(StepDoubted { step: call, attempt: 2, reason: Reason::OwnerDied }),
            Entry::StepResolved(StepResolved {
                step: call,
                attempt: 2,
                verdict: Verdict::PersonDone,
            }),
            Entry::Waiting(Reason::NoOffer),
            Entry::Resumed(Reason::OfferAppeared),
            Entry::CancelRequested(Reason::CancelRequested),
            Entry::Ended(ended(WorkState::Failed, Reason::CycleLimit)),
        ] {
            assert_eq!(decode(encode(&entry)).unwrap(), entry);
        }
    }

    /// As the version before loops wrote it.
    #[test]
    fn a_phase_reads_back_without_the_fields_of_loops() {
        let old = [8, 1, 34, 29, 8, 1, 26, 13];
        let rest = b"{\"draft\":\"d\"}\"\x06node-1(\x018\x02";
        let bytes: Vec<u8> = old.iter().chain(rest).copied().collect();
        let read = decode(bytes.into()).unwrap();
        let usage = Usage::default();
        assert_eq!(read, Entry::StepDone(StepDone { start_ms: 0, end_ms: 2, usage, ..done() }));
    }

    #[test]
    fn a_step_in_doubt_is_the_last_and_says_how_the_doubt_ended() {
        let step = StepKey::tool(0, 0);
        let intended = StepIntended {
            step,
            attempt: 1,
            tool: "count".into(),
            key: "w-0-000-1/0/tool-0".into(),
            deadline_ms: 7,
        };
        let doubted = StepDoubted { step, attempt: 1, reason: Reason::OwnerDied };
        let resolved = |verdict| Entry::StepResolved(StepResolved { step, attempt: 1, verdict });
        let check = |more: Vec<Entry>, expected: &[Reason]| {
            let mut entries =
                vec![Entry::StepIntended(intended.clone()), Entry::StepDoubted(doubted.clone())];
            entries.extend(more);
            let steps = fold_steps(entries.iter().map(|entry| (Epoch(1), entry)));
            let reasons: Vec<_> = steps.iter().map(|step| reason(step.reason).unwrap()).collect();
            assert_eq!(reasons, expected);
            assert!(steps.iter().all(|step| step.name == "count" && step.index == 1));
        };
        let done = || Entry::StepDone(StepDone { step, name: "count".into(), ..done() });
        check(vec![], &[Reason::InDoubt]);
        check(vec![resolved(Verdict::PersonFail)], &[Reason::SignalledFail]);
        check(vec![resolved(Verdict::PersonRetry)], &[]);
        check(vec![resolved(Verdict::PersonRetry), done()], &[Reason::SignalledRetry]);
        check(vec![resolved(Verdict::ToolDone), done()], &[Reason::ReconciledDone]);
        check(vec![done()], &[Reason::Completed]);
    }

    #[test]
    fn an_agent_reads_back_with_its_open_works() {
        let mut agent = Agent::default();
        agent.apply(Lsn(0), Entry::Accepted(accepted()), stamp(1), limits).unwrap();
        agent.apply(Lsn(10), Entry::StepDone(done()), stamp(2), limits).unwrap();
        agent.pass(Passage { at_ms: 5, epoch: Epoch(2), reason: Reason::Activated });
        assert_eq!(passages_of(&encode_agent(&agent)).unwrap().len(), 1);
        let read = decode_agent(encode_agent(&agent), agent.head, agent.last_work, limits).unwrap();
        assert_eq!(read, agent);
    }

    #[test]
    fn an_agent_reads_back_although_a_later_version_told_of_it() {
        let known = disk::Passage { at_ms: 1, epoch: 1, reason: Reason::Idle.code().into() };
        let later = disk::Passage { at_ms: 2, epoch: 1, reason: 60_000 };
        let passages = vec![known, later];
        let snapshot =
            disk::AgentSnapshot { format: FORMAT, seq: 3, passages, ..Default::default() };
        let state = Bytes::from(snapshot.encode_to_vec());
        let read = decode_agent(state, Lsn(9), Lsn(1), limits).unwrap();
        let reasons: Vec<_> = read.passages().map(|passage| passage.reason).collect();
        assert_eq!((read.seq, reasons), (Seq(3), vec![Reason::Idle]));
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
