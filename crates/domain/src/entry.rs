//! The entries of a journal: everything that ever happens to an agent, in the order in which it became durable.

use bytes::Bytes;

use crate::step::{StepKey, StepKind};
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
    /// A call that must not be made twice is about to be made.
    StepIntended(StepIntended),
    /// Whether a call that was intended was made is not known.
    StepDoubted(StepDoubted),
    /// What became of a doubt.
    StepResolved(StepResolved),
    StepDone(StepDone),
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

/// Of a call that is no longer idempotent once it is made: acted on only while it is young.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepIntended {
    pub step: StepKey,
    pub attempt: u32,
    pub tool: String,
    /// Under which the tool knows the call, whatever the attempt.
    pub key: String,
    /// Until when its answer is waited for, in milliseconds since the Unix epoch.
    pub deadline_ms: i64,
}

/// The result of attempt `attempt` is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepDoubted {
    pub step: StepKey,
    pub attempt: u32,
    /// Why it is missing.
    pub reason: Reason,
}

/// A doubt about attempt `attempt` is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepResolved {
    pub step: StepKey,
    pub attempt: u32,
    pub verdict: Verdict,
}

/// Who says what becomes of a step in doubt, and what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    ToolDone,
    ToolNotDone,
    PolicyRetry,
    PolicyFail,
    PersonDone,
    PersonRetry,
    PersonFail,
}

/// What becomes of a step in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It was done; its result follows.
    Done,
    /// It is run again, under the same key.
    Retry,
    /// Its work fails.
    Fail,
}

impl Verdict {
    pub const ALL: [Self; 7] = [
        Self::ToolDone,
        Self::ToolNotDone,
        Self::PolicyRetry,
        Self::PolicyFail,
        Self::PersonDone,
        Self::PersonRetry,
        Self::PersonFail,
    ];

    pub fn resolution(self) -> Resolution {
        match self {
            Self::ToolDone | Self::PersonDone => Resolution::Done,
            Self::ToolNotDone | Self::PolicyRetry | Self::PersonRetry => Resolution::Retry,
            Self::PolicyFail | Self::PersonFail => Resolution::Fail,
        }
    }

    /// Under which it is stored.
    pub fn reason(self) -> Reason {
        match self {
            Self::ToolDone => Reason::ReconciledDone,
            Self::ToolNotDone => Reason::ReconciledNotDone,
            Self::PolicyRetry => Reason::RetriedByPolicy,
            Self::PolicyFail => Reason::FailedByPolicy,
            Self::PersonDone => Reason::SignalledDone,
            Self::PersonRetry => Reason::SignalledRetry,
            Self::PersonFail => Reason::SignalledFail,
        }
    }

    pub fn from_reason(reason: Reason) -> Option<Self> {
        Self::ALL.into_iter().find(|verdict| verdict.reason() == reason)
    }
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

/// A step that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepDone {
    pub step: StepKey,
    /// Of a tool's call: the tool. Else empty.
    pub name: String,
    /// As JSON: a phase's [`crate::chain::Output`], what a model [`crate::round::Said`], what a tool
    /// [`crate::round::Returned`].
    pub output: Bytes,
    /// The node whose pool ran it; empty if a person said what it came to.
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
            Self::StepDone(_) => 3,
            Self::Waiting(_) => 4,
            Self::Resumed(_) => 5,
            Self::CancelRequested(_) => 6,
            Self::Ended(_) => 7,
            Self::StepBegan(_) => 8,
            Self::StepIntended(_) => 9,
            Self::StepDoubted(_) => 10,
            Self::StepResolved(_) => 11,
        }
    }

    /// Its name, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ShardOpened(_) => "shard_opened",
            Self::Accepted(_) => "accepted",
            Self::StepDone(done) => match done.step.kind() {
                StepKind::Phase => "phase_done",
                StepKind::Model => "model_done",
                StepKind::Tool => "tool_done",
            },
            Self::Waiting(_) => "waiting",
            Self::Resumed(_) => "resumed",
            Self::CancelRequested(_) => "cancel_requested",
            Self::Ended(_) => "ended",
            Self::StepBegan(_) => "step_began",
            Self::StepIntended(_) => "step_intended",
            Self::StepDoubted(_) => "step_doubted",
            Self::StepResolved(_) => "step_resolved",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_stored_as_a_reason_of_its_own() {
        for verdict in Verdict::ALL {
            assert_eq!(Verdict::from_reason(verdict.reason()), Some(verdict));
        }
        assert_eq!(Verdict::from_reason(Reason::Completed), None);
    }
}
