//! What becomes of a work: its states, and why it is in one.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// `accepted → running ⇄ waiting | in_doubt → cancelling →` one of the four final states.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkState {
    Accepted,
    Running,
    Waiting,
    InDoubt,
    Cancelling,
    Succeeded,
    /// Its own fault or limit; final.
    Failed,
    Cancelled,
    /// Ours or the world's fault; kept for Retry.
    DeadLettered,
}

impl WorkState {
    pub const ALL: [Self; 9] = [
        Self::Accepted,
        Self::Running,
        Self::Waiting,
        Self::InDoubt,
        Self::Cancelling,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
        Self::DeadLettered,
    ];

    pub fn is_final(self) -> bool {
        match self {
            Self::Succeeded | Self::Failed | Self::Cancelled | Self::DeadLettered => true,
            Self::Accepted | Self::Running | Self::Waiting | Self::InDoubt | Self::Cancelling => {
                false
            }
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::InDoubt => "in_doubt",
            Self::Cancelling => "cancelling",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::DeadLettered => "dead_lettered",
        }
    }
}

/// Declares the closed list of reason codes with the numbers under which they are stored; a number is never reused.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal $text:literal,)*) => {
        /// Why a state was entered, a request refused, or a thing given up. A closed list: nothing happens without one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u16)]
        pub enum Reason {
            $($(#[$doc])* $name = $code,)*
        }

        impl Reason {
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The text that people and programs see, e.g. `no_offer`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    // Works.
    /// Accepted: a client submitted it.
    Submitted = 1 "submitted",
    /// Running: its turn came.
    TurnBegan = 2 "turn_began",
    /// Waiting: nobody offers the phase that is next.
    NoOffer = 3 "no_offer",
    /// Running again: somebody offers it now.
    OfferAppeared = 4 "offer_appeared",
    /// Succeeded: the turn ended with a result.
    Completed = 5 "completed",
    /// Cancelling or cancelled: a client asked for it.
    CancelRequested = 6 "cancel_requested",
    /// Failed: its deadline passed.
    DeadlineExceeded = 7 "deadline_exceeded",
    /// Failed: the model refused the request.
    ModelRefused = 8 "model_refused",
    /// Dead-lettered: the model could not be reached often enough.
    ModelUnavailable = 9 "model_unavailable",
    /// Failed: the model's answer is not what the phase needs.
    ModelAnswerInvalid = 10 "model_answer_invalid",
    /// Failed: the result is over its limit.
    ResultTooLarge = 11 "result_too_large",
    /// Failed: the chain went back to Action more often than its definition allows.
    CycleLimit = 12 "cycle_limit",
    /// Dead-lettered: its agent failed over and over.
    Quarantined = 13 "quarantined",
    /// Dead-lettered: the definition that it pins is gone.
    DefinitionMissing = 14 "definition_missing",
    /// A step ran out of attempts because its workers died.
    WorkerLost = 15 "worker_lost",
    /// Of a step: whether it was done is not known.
    InDoubt = 16 "in_doubt",
    /// Failed: nobody knows whether a step was done, and its definition or a person lets the work fail.
    StepInDoubt = 17 "step_in_doubt",
    /// Running again: the tool says that the step in doubt was done.
    ReconciledDone = 18 "reconciled_done",
    /// Running again: the tool says that the step in doubt was not done.
    ReconciledNotDone = 19 "reconciled_not_done",
    /// Running again: the definition lets a step in doubt be run again.
    RetriedByPolicy = 20 "retried_by_policy",
    /// The definition lets the work fail over a step in doubt.
    FailedByPolicy = 21 "failed_by_policy",
    /// Running again: a person says that the step in doubt was done.
    SignalledDone = 22 "signalled_done",
    /// Running again: a person lets the step in doubt be run again.
    SignalledRetry = 23 "signalled_retry",
    /// A person lets the work fail over a step in doubt.
    SignalledFail = 24 "signalled_fail",
    /// Failed: the model was asked as often as its definition allows, and has not answered.
    RoundLimit = 25 "round_limit",
    /// A tool could not do it, and did nothing.
    ToolUnavailable = 26 "tool_unavailable",
    /// A tool broke off: it may have done it.
    ToolBroke = 27 "tool_broke",

    // Refusals.
    /// The agent's queue is full.
    QueueFull = 30 "queue_full",
    /// The node's queued inputs are at their limit.
    NodeFull = 31 "node_full",
    /// The peer or writer has too much unacknowledged.
    Overloaded = 32 "overloaded",
    /// The shard is owned by somebody else.
    Moved = 33 "moved",
    /// The shard has no owner now.
    Unowned = 34 "unowned",
    /// The epoch is older than the owner row's.
    Fenced = 35 "fenced",
    /// The store does not answer.
    StoreUnavailable = 36 "store_unavailable",
    /// Same idempotency key, other input.
    KeyReused = 37 "key_reused",
    /// No such agent, work or definition.
    NotFound = 38 "not_found",
    /// The request is malformed.
    Malformed = 39 "malformed",
    /// The input is over its limit.
    InputTooLarge = 40 "input_too_large",
    /// The message made too many hops.
    TooManyHops = 41 "too_many_hops",
    /// A version of a definition would change its placement class.
    ClassChanged = 42 "class_changed",
    /// The caller's certificate may not do this.
    NotAuthorised = 43 "not_authorised",
    /// This process is shutting down.
    ShuttingDown = 44 "shutting_down",
    /// The work is not in doubt on that step.
    NotInDoubt = 45 "not_in_doubt",
    /// The answer is of an attempt after which another was begun, or of a step that is done.
    Superseded = 46 "superseded",
    /// The process stood still since it took the job, or the job is too old to be begun.
    TooOld = 47 "too_old",
    /// It was asked, and its answer got lost: whether it did it is not known.
    AnswerLost = 48 "answer_lost",
    /// No word of this API server gets to the shard's owner, which goes on owning it: another may reach it.
    OwnerUnreached = 49 "owner_unreached",

    // Nodes.
    Joined = 60 "joined",
    Left = 61 "left",
    /// Suspected: its session dropped.
    SessionLost = 62 "session_lost",
    /// Suspected: three beats missed.
    BeatsMissed = 63 "beats_missed",
    /// Dead: its port refuses connections.
    PortRefused = 64 "port_refused",
    /// Dead: two seconds after its last beat.
    Silent = 65 "silent",
    /// Dead: its runtime did not answer for 30 seconds.
    RuntimeStalled = 66 "runtime_stalled",
    /// Dead: a newer incarnation of it joined.
    Replaced = 67 "replaced",
    /// Alive again before the verdict.
    BeatsAgain = 68 "beats_again",
    /// Draining: an operator asked for it, or the process was told to end.
    DrainRequested = 69 "drain_requested",
    /// It gets no new shards: an operator asked for it.
    Cordoned = 70 "cordoned",
    /// It gets shards again.
    Uncordoned = 71 "uncordoned",
    /// Dead: it beats, but no link to it worked for 30 seconds.
    Unlinked = 72 "unlinked",
    /// It does not reach its store, which answers others: what it has goes to those.
    Storeless = 73 "storeless",
    /// It reaches its store again, and gets shards.
    StoreAnswers = 74 "store_answers",

    // Shards.
    /// Granted for the first time.
    FirstPlacement = 80 "first_placement",
    /// Moved because its node died.
    OwnerDied = 81 "owner_died",
    /// Its owner said that it had dropped it.
    OwnerDropped = 82 "owner_dropped",
    /// Opened by its owner.
    ShardOpened = 83 "shard_opened",
    /// The head is below what was acknowledged: the store lost commits.
    StoreRolledBack = 84 "store_rolled_back",
    /// No live node may have it.
    NoTarget = 85 "no_target",
    /// Moved to a node that has fewer than its share.
    Rebalanced = 86 "rebalanced",
    /// Moved because its node is about to leave.
    OwnerDraining = 87 "owner_draining",
    /// Given an owner again: an operator accepted what the store lost.
    Released = 88 "released",
    /// Granted by an earlier leader, of whose reason nothing was written down.
    Inherited = 89 "inherited",
    /// Restored from a backup after it was stopped.
    Restored = 90 "restored",
    /// Moved because its node does not reach the store.
    OwnerStoreless = 91 "owner_storeless",

    // Agents.
    Activated = 100 "activated",
    /// Evicted: idle for ten seconds.
    Idle = 101 "idle",
    /// Restarted after a failure.
    Restarted = 102 "restarted",

    // Leadership.
    /// Nobody led.
    LeaderFree = 120 "leader_free",
    /// The leader's beat stood still for two seconds.
    LeaderSilent = 121 "leader_silent",
    /// It could not write its beat for 1.5 seconds.
    BeatUnwritten = 122 "beat_unwritten",
    /// Handed over to a replica that hears more nodes.
    HearsFewer = 123 "hears_fewer",
}

impl Reason {
    /// The number under which it is stored.
    pub fn code(self) -> u16 {
        self as u16
    }

    pub fn from_code(code: u16) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.code() == code)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Reason {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().copied().find(|reason| reason.as_str() == text);
        found.ok_or_else(|| Error::malformed("reason", text, "a reason code of this version"))
    }
}

impl fmt::Display for WorkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for WorkState {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().copied().find(|state| state.as_str() == text);
        found.ok_or_else(|| {
            Error::malformed("work state", text, "accepted, running, waiting, … or dead_lettered")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_codes_and_texts_are_unique_and_read_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(reason.code()), Some(*reason));
            assert_eq!(reason.as_str().parse(), Ok(*reason));
        }
    }
}
