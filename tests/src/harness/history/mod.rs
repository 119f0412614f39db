//! Checks what clients were told against what the journals say afterwards.
//!
//! Knows nothing of how it came about: any run, with any faults, must leave journals in which nothing is found here.

mod calls;
mod clients;
mod events;
mod file;
mod journal;
#[cfg(test)]
mod planted;
mod shards;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use proto::v1::HistoryEntry;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use file::Title;
pub use journal::check;
pub use told::{End, Said, Shown, Told};

/// The promise that a run breaks, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A work was acknowledged and is in no journal.
    Lost { work: String },
    /// A work was accepted and has no end.
    Unfinished { work: String },
    /// A work that was never accepted has entries.
    Unknown { work: String },
    /// A work was accepted a second time.
    AcceptedTwice { work: String },
    /// Something was journaled of a work that had ended.
    AfterTheEnd { work: String, kind: String },
    /// A phase was committed and then run again.
    Repeated { work: String, phase: String },
    /// A work succeeded without all of its phases, or not in their order.
    Incomplete { work: String, phases: Vec<String> },
    /// The numbers of an agent's entries have a gap or a twin.
    Gap { agent: String, after: i64 },
    /// An entry was written under an older epoch than the one before it.
    OldEpoch { agent: String, seq: i64 },
    /// A work began while another one of the same agent had not ended.
    Interleaved { agent: String, seq: i64 },
    /// A work did not succeed, and nobody had asked for that.
    Failed { work: String, state: String, reason: String },
    /// Two works were accepted, or acknowledged, for one idempotency key of an agent.
    TwoForOneKey { agent: String, key: String, works: BTreeSet<String> },
    /// A client was told another end than the journal has.
    ToldOtherwise { work: String, told: String, journaled: String },
    /// A client was told an event a second time, or after a later one.
    ToldAgain { work: String, seq: i64 },
    /// A client that wanted every event was not told this one.
    Untold { work: String, seq: i64 },
    /// What a client was told that models said is not what is in the journal up to this event.
    SaidOtherwise { work: String, seq: i64 },
    /// A client was told of a step that is not in the journal.
    MadeUp { work: String, seq: i64 },
    /// Of two works that one stream submitted to an agent, the later one was accepted first.
    Reordered { agent: String, first: String, second: String },
    /// A work began before one that was accepted before it.
    OutOfTurn { agent: String, work: String },
    /// A shard had two owners in one epoch.
    TwoOwners { shard: u32, epoch: i64, nodes: BTreeSet<String> },
    /// A shard's log has an entry of an older epoch than the entry before it, whosever it is.
    StaleWrite { shard: u32, lsn: i64 },
    /// Two entries of a shard have one place in its log.
    TwoInOnePlace { shard: u32, lsn: i64 },
    /// A call that must not be made twice was made so often.
    CalledTwice { key: String, calls: u64 },
    /// The journal has other calls of a work than were made.
    Uncalled { work: String, made: u64, journaled: u64 },
    /// Less was counted than the journals show, or more calls than they have attempts, or something that never happens.
    Miscounted { what: String, counted: u64, journaled: u64 },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A node that owned a shard under an epoch, as far as that is stored.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Owner {
    pub shard: u32,
    pub epoch: i64,
    pub node: String,
}

/// What processes counted, if none of those that count was started again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub model_calls: Option<u64>,
    /// Rows of logs that were committed.
    pub rows: Option<u64>,
    /// Steps that were begun before the commit of the one they rest on.
    pub steps_early: u64,
}

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    pub shards: u16,
    /// Each answer to a submit, in the order in which they came.
    pub told: Vec<Told>,
    /// Of each agent its entries, oldest first.
    pub journals: BTreeMap<String, Vec<HistoryEntry>>,
    pub owners: BTreeSet<Owner>,
    pub counters: Counters,
    /// Of each idempotency key how often the counting tool was called under it.
    pub calls: BTreeMap<String, u64>,
}

impl History {
    /// Everything that is wrong with it.
    pub fn check(&self) -> BTreeSet<Fault> {
        let acknowledged = self.told.iter().map(|told| told.work.clone()).collect();
        let mut faults = check(&acknowledged, &self.journals);
        faults.extend(clients::check(self));
        faults.extend(events::check(self));
        faults.extend(shards::check(self));
        faults.extend(calls::check(self));
        faults.extend(self.miscounted());
        faults
    }

    fn miscounted(&self) -> Vec<Fault> {
        let entries = || self.journals.values().flatten();
        let steps = entries().filter(|entry| is_model_call(entry)).count() as u64;
        let least = [
            ("model calls", self.counters.model_calls, steps),
            ("rows", self.counters.rows, entries().count() as u64),
        ];
        let least = least.into_iter().filter_map(|(what, counted, journaled)| {
            let counted = counted.filter(|counted| *counted < journaled)?;
            Some(Fault::Miscounted { what: what.to_owned(), counted, journaled })
        });
        let early = Some(self.counters.steps_early).filter(|early| 0 < *early);
        let early = early.map(|counted| Fault::Miscounted {
            what: "steps begun early".to_owned(),
            counted,
            journaled: 0,
        });
        least.chain(early).collect()
    }
}

impl History {
    /// What is committed is read by later owners and not run again: every call of a model is of an attempt that a journal
    /// knows. For histories that hold every work of their cluster.
    pub fn more_calls_than_attempts(&self) -> Option<Fault> {
        let (counted, attempts) = (self.counters.model_calls?, self.model_attempts());
        let what = "model calls, more than attempts".to_owned();
        (attempts < counted).then_some(Fault::Miscounted { what, counted, journaled: attempts })
    }

    /// How often models may have been asked for what is journaled: each attempt of a step asks once.
    fn model_attempts(&self) -> u64 {
        let steps = self.journals.values().flatten().filter(|entry| is_model_call(entry));
        let attempts = steps.map(|entry| {
            let content: Value = serde_json::from_str(&entry.content).unwrap_or_default();
            content["attempts"].as_u64().unwrap_or(1)
        });
        attempts.sum()
    }
}

/// A phase makes one call, and so does each round of a loop.
fn is_model_call(entry: &HistoryEntry) -> bool {
    matches!(entry.kind.as_str(), "phase_done" | "model_done")
}
