//! The entries of a journal: everything that ever happens to an agent, in the order in which it became durable.

use bytes::Bytes;

use crate::chain::StepKey;
use crate::{
    Class, DefinitionHash, Epoch, IdempotencyKey, Lsn, Member, Reason, Seq, Slot, WorkState,
};

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The first act of a new owner. Belongs to the shard, not to an agent.
    ShardOpened(Member),
    Accepted(Accepted),
    /// A step is begun again. The first attempt needs no entry: it is known from what was done before it.
    StepBegan(StepBegan),
    PhaseDone(PhaseDone),
    Waiting(Reason),
    Resumed(Reason),
    CancelRequested(Reason),
    Ended(Ended),
}

/// A work that was accepted. Its id is the lsn of this entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub definition: DefinitionHash,
    /// UTF-8.
    pub input: Bytes,
    pub key: IdempotencyKey,
    /// Milliseconds since the Unix epoch.
    pub deadline_ms: i64,
    pub traceparent: Option<String>,
    pub class: Class,
    pub slot: Slot,
}

impl Accepted {
    /// What tells two inputs under one idempotency key apart.
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.definition, &self.input)
    }
}

/// See [`Accepted::fingerprint`].
pub fn fingerprint(definition: &DefinitionHash, input: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(definition.as_bytes());
    hasher.update(input);
    *hasher.finalize().as_bytes()
}

/// The attempt `attempt` of a step, from 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepBegan {
    pub step: StepKey,
    pub attempt: u32,
    /// Why the attempt before it came to nothing.
    pub reason: Reason,
}

/// What a model call cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub calls: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.input_tokens += other.input_tokens;
        self.output_tokens += other.output_tokens;
    }
}

/// A phase that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhaseDone {
    pub step: StepKey,
    /// The phase's typed state as JSON; see [`crate::chain::Output`].
    pub output: Bytes,
    /// The node whose pool ran it.
    pub node: String,
    /// How often it was begun.
    pub attempts: u32,
    pub start_ms: i64,
    pub end_ms: i64,
    pub usage: Usage,
}

/// The last entry of a work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// A final one.
    pub state: WorkState,
    pub reason: Reason,
    /// UTF-8; empty unless it succeeded.
    pub result: Bytes,
    pub detail: String,
}

/// What stands beside an entry in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub seq: Seq,
    pub lsn: Lsn,
    pub epoch: Epoch,
    /// Milliseconds since the Unix epoch, by the owner's clock; for people.
    pub ts_ms: i64,
}

impl Entry {
    /// The number of its kind in `log.kind`.
    pub fn kind(&self) -> u32 {
        match self {
            Self::ShardOpened(_) => 1,
            Self::Accepted(_) => 2,
            Self::PhaseDone(_) => 3,
            Self::Waiting(_) => 4,
            Self::Resumed(_) => 5,
            Self::CancelRequested(_) => 6,
            Self::Ended(_) => 7,
            Self::StepBegan(_) => 8,
        }
    }

    /// Its name, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ShardOpened(_) => "shard_opened",
            Self::Accepted(_) => "accepted",
            Self::PhaseDone(_) => "phase_done",
            Self::Waiting(_) => "waiting",
            Self::Resumed(_) => "resumed",
            Self::CancelRequested(_) => "cancel_requested",
            Self::Ended(_) => "ended",
            Self::StepBegan(_) => "step_began",
        }
    }
}
