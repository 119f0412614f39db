//! The rows that the tests write, and what they ask of answers.

use bytes::Bytes;
use proto::link::{AgentRow, ControlAnswer, Fence, Group, LeaderRow, LogRow, Provision, WorkRow};
use store::ControlOutcome;

pub(crate) const CLUSTER: &str = "cluster-1";
pub(crate) const SHARD: &str = "shard-3";

pub(crate) fn provision() -> Provision {
    Provision { cluster_id: CLUSTER.to_owned(), shard: 3 }
}

pub(crate) fn fence(expected: u64, incarnation: u64, term: u64) -> Fence {
    Fence { expected, node: "node-1".to_owned(), incarnation, term, above: 0 }
}

/// A group of epoch 1 with these rows: (agent, prev), numbered after `head`.
pub(crate) fn group(head: u64, rows: &[(u64, u64)]) -> Group {
    let row = |(lsn, (agent, prev)): (u64, &(u64, u64))| LogRow {
        lsn,
        agent: *agent,
        prev: *prev,
        seq: lsn,
        work: 0,
        kind: 1,
        ts_ms: 1_000 + lsn as i64,
        payload: Bytes::from(format!("entry {lsn}")),
        epoch: 1,
    };
    let rows = (head + 1..).zip(rows).map(row).collect();
    Group { epoch: 1, head, rows, ..Group::default() }
}

pub(crate) fn agent(id: u64, head: u64, snap_lsn: u64) -> AgentRow {
    AgentRow {
        id,
        tenant: "acme".to_owned(),
        name: "support".to_owned(),
        key: format!("user-{id}"),
        head,
        snap_lsn,
        last_work: 0,
        state: Bytes::from(format!("state of {id} at {snap_lsn}")),
    }
}

pub(crate) fn work(id: u64, agent: u64, prev_work: u64, state: u32) -> WorkRow {
    WorkRow {
        id,
        agent,
        prev_work,
        state,
        reason: 1,
        create_ms: 1_000 + id as i64,
        end_ms: if state < 6 { 0 } else { 2_000 + id as i64 },
        definition: Bytes::from_static(&[7; 32]),
        slot: 99,
        record: Bytes::from(format!("record of {id}")),
    }
}

pub(crate) fn done(outcome: ControlOutcome) -> ControlAnswer {
    match outcome {
        ControlOutcome::Done(answer) => answer,
        ControlOutcome::NotLeader(row) => panic!("{row:?} leads"),
    }
}

pub(crate) fn not_leader(outcome: ControlOutcome) -> LeaderRow {
    match outcome {
        ControlOutcome::Done(answer) => panic!("done: {answer:?}"),
        ControlOutcome::NotLeader(row) => row,
    }
}
