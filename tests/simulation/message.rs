//! What the processes of the simulation say to each other.

use std::rc::Rc;

use bytes::Bytes;
use domain::StepKey;
use domain::agent::Agent;
use domain::entry::Entry;
use domain::leadership::{LeaderRow, Taken};
use domain::membership::{Beat, Joining, Probe};
use domain::ownership::{FenceResult, OwnerRow, Remembered};
use domain::{
    Epoch, IdempotencyKey, Lsn, Member, ProcessName, Reason, Seq, ShardId, Term, WorkState,
};

use crate::config::Fault;

#[derive(Clone, Debug)]
pub(crate) enum Message {
    Ask {
        id: u64,
        ask: Ask,
    },
    Answer {
        id: u64,
        answer: Answer,
    },
    Join {
        node: usize,
        joining: Joining,
    },
    Joined {
        member: Member,
        term: Term,
    },
    JoinRefused {
        member: Member,
    },
    Beat {
        node: usize,
        beat: Beat,
    },
    BeatAnswer {
        number: u64,
        leader: Option<(usize, Term)>,
        is_member: bool,
    },
    SessionLost(ProcessName),
    Probed {
        member: Member,
        probe: Probe,
    },
    Grant {
        shard: ShardId,
        epoch: Epoch,
        to: Member,
    },
    Dropped {
        shard: ShardId,
        epoch: Epoch,
        reason: Reason,
    },
    Submit(Submit),
    Accepted {
        request: usize,
        work: Lsn,
    },
    Refused,
    Cancel {
        agent: usize,
        work: Lsn,
    },
    Job(Job),
    JobAnswer {
        job: Job,
        output: Bytes,
        node: usize,
    },
    /// A new owner asks a node for the steps of its shard that it has.
    StepsWanted {
        shard: ShardId,
        epoch: Epoch,
        owner: usize,
    },
    StepsHeld {
        shard: ShardId,
        epoch: Epoch,
        jobs: Vec<Job>,
    },
}

impl Answer {
    /// The epoch of the shard at the moment of reading, of answers that only its owner may use.
    pub(crate) fn read_in(&self) -> Option<Epoch> {
        match self {
            Self::Agent { epoch, .. } | Self::History { epoch, .. } => Some(*epoch),
            Self::Recovery { row, .. } => Some(row.epoch),
            _ => None,
        }
    }
}

impl Message {
    pub(crate) fn lost_as(&self) -> Fault {
        match self {
            Self::Ask { ask: Ask::Commit(_), .. } => Fault::CommitLost,
            Self::Answer { answer: Answer::Committed, .. } => Fault::CommitAnswerLost,
            Self::Answer { answer: Answer::Fence(_), .. } => Fault::FenceUnanswered,
            Self::Grant { .. } => Fault::GrantLost,
            _ => Fault::MessageLost,
        }
    }

    pub(crate) fn doubled_as(&self) -> Fault {
        match self {
            Self::Ask { ask: Ask::Commit(_), .. } => Fault::CommitDoubled,
            _ => Fault::MessageDoubled,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Submit {
    pub(crate) request: usize,
    pub(crate) agent: usize,
    pub(crate) key: IdempotencyKey,
    pub(crate) input: Bytes,
}

/// A step for a phase worker.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) owner: usize,
    pub(crate) epoch: Epoch,
    pub(crate) agent: usize,
    pub(crate) work: Lsn,
    pub(crate) step: StepKey,
    pub(crate) attempt: u32,
    pub(crate) input: Bytes,
    pub(crate) findings: Vec<String>,
    /// When it was sent, and until when it may be begun.
    pub(crate) sent_at: u64,
    pub(crate) deadline: u64,
}

/// What the store is asked.
#[derive(Clone, Debug)]
pub(crate) enum Ask {
    Commit(Rc<Group>),
    Position(ShardId),
    Owner(ShardId),
    Fence {
        shard: ShardId,
        expected: Epoch,
        above: Epoch,
        to: Member,
        term: Term,
    },
    Agent {
        shard: ShardId,
        agent: usize,
        key: Option<IdempotencyKey>,
    },
    History {
        shard: ShardId,
        from: Lsn,
        above: Lsn,
    },
    Recover(ShardId),
    Leader,
    Take {
        name: ProcessName,
        term: Term,
        beat: u64,
    },
    RaiseBeat {
        name: ProcessName,
        term: Term,
    },
    Admit {
        name: ProcessName,
        term: Term,
        joining: Joining,
    },
    Bury {
        name: ProcessName,
        term: Term,
        member: Member,
    },
    Remember {
        name: ProcessName,
        term: Term,
        shard: ShardId,
        remembered: Remembered,
    },
    /// What leaders left for their successors.
    Known,
}

#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Committed,
    Fenced { epoch: Epoch },
    HeadMismatch,
    Position { epoch: Epoch, head: Lsn },
    Owner { row: OwnerRow },
    Fence(FenceResult),
    Agent { epoch: Epoch, row: Option<AgentRow>, work: Option<Lsn> },
    History { epoch: Epoch, rows: Vec<Row> },
    Recovery { row: OwnerRow, head: Lsn, recovery: Recovery },
    Leader(LeaderRow),
    Taken(Taken),
    Led,
    NotLeader,
    Known { alive: Vec<Joining>, buried: Vec<Member>, shards: Vec<(ShardId, Remembered)> },
}

#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) lsn: Lsn,
    /// 0: the shard itself.
    pub(crate) agent_row: u64,
    pub(crate) prev: Lsn,
    pub(crate) seq: Seq,
    pub(crate) work: Lsn,
    pub(crate) epoch: Epoch,
    pub(crate) entry: Entry,
}

#[derive(Clone, Debug)]
pub(crate) struct AgentRow {
    pub(crate) id: u64,
    pub(crate) agent: usize,
    pub(crate) head: Lsn,
    pub(crate) snapshot: Agent,
}

/// One commit of a shard.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) shard: ShardId,
    pub(crate) epoch: Epoch,
    /// Which run of which node sent it, and which of its writers.
    pub(crate) by: (Member, u64),
    pub(crate) before: Lsn,
    pub(crate) rows: Vec<Row>,
    pub(crate) agents: Vec<AgentRow>,
    pub(crate) works: Vec<(Lsn, usize)>,
    pub(crate) ends: Vec<(Lsn, WorkState)>,
    pub(crate) keys: Vec<(usize, IdempotencyKey, Lsn)>,
    pub(crate) mark: Option<Mark>,
}

pub(crate) type Mark = (Lsn, Vec<(u64, Lsn)>);

#[derive(Clone, Debug)]
pub(crate) struct Recovery {
    pub(crate) mark: Vec<(u64, Lsn)>,
    pub(crate) tail: Vec<(Lsn, u64)>,
    /// The agents that have open works.
    pub(crate) due: Vec<AgentRow>,
    pub(crate) agent_max: u64,
    /// Which agent a row number means.
    pub(crate) rows: Vec<(u64, usize)>,
}
