//! The works of a shard that ended last, as they are told. When an API server dies, all that was watched through it is asked
//! for elsewhere at once, and much of it has ended meanwhile: that needs no store.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use domain::entry::Entry;
use domain::turn::Turn;
use domain::{AgentId, Lsn};
use proto::journal;
use proto::link::{Events, SubscribeCall, WatchMode};

use crate::actor::watch::log_entry;
use crate::info;
use crate::shard::lock;

/// What the works of a shard may weigh; the oldest go first.
const BYTES_MAX: usize = 1 << 20;
/// Beside what an entry carries.
const ENTRY_BYTES: usize = 160;

#[derive(Default)]
pub(crate) struct Recent {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    works: HashMap<Lsn, Arc<Ended>>,
    order: VecDeque<Lsn>,
    bytes: usize,
}

struct Ended {
    agent: Arc<AgentId>,
    turn: Turn,
    bytes: usize,
}

impl Recent {
    pub(crate) fn put(&self, agent: Arc<AgentId>, turn: Turn) {
        let (work, bytes) = (turn.id(), weight(&turn));
        let mut inner = lock(&self.inner);
        inner.bytes += bytes;
        inner.order.push_back(work);
        inner.works.insert(work, Arc::new(Ended { agent, turn, bytes }));
        while BYTES_MAX < inner.bytes {
            let Some(oldest) = inner.order.pop_front() else { return };
            inner.bytes -= inner.works.remove(&oldest).map_or(0, |ended| ended.bytes);
        }
    }

    /// All that a subscription to a work wants, if it is one of them.
    pub(crate) fn events(&self, call: &SubscribeCall) -> Option<Events> {
        let ended = lock(&self.inner).works.get(&Lsn(call.work))?.clone();
        let all = ended.turn.entries();
        let wanted = match call.mode() {
            WatchMode::End => &all[all.len().saturating_sub(1)..],
            WatchMode::All | WatchMode::Unspecified => all,
        };
        let wanted = wanted.iter().filter(|(stamp, _)| call.after_seq < stamp.seq.0);
        let work = Lsn(call.work);
        let entries = wanted.map(|(stamp, entry)| log_entry(stamp, work, journal::encode(entry)));
        Some(Events {
            subscription: call.subscription,
            work: call.work,
            entries: entries.collect(),
            ended: Some(info::of_ended(&ended.agent, &ended.turn)),
            ..Events::default()
        })
    }
}

fn weight(turn: &Turn) -> usize {
    let carried = turn.entries().iter().map(|(_, entry)| match entry {
        Entry::Accepted(accepted) => accepted.input.len(),
        Entry::StepDone(done) => done.output.len() + done.name.len() + done.node.len(),
        Entry::Ended(ended) => ended.result.len() + ended.detail.len(),
        Entry::ShardOpened(_)
        | Entry::StepBegan(_)
        | Entry::StepIntended(_)
        | Entry::StepDoubted(_)
        | Entry::StepResolved(_)
        | Entry::Waiting(_)
        | Entry::Resumed(_)
        | Entry::CancelRequested(_) => 0,
    });
    carried.map(|bytes| ENTRY_BYTES + bytes).sum()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use domain::entry::{Accepted, Stamp};
    use domain::turn::{self, Limits};
    use domain::{Class, DefinitionHash, Epoch, Reason, Seq, Slot, WorkState};

    use super::*;

    fn turn(lsn: u64, input: usize) -> Turn {
        let stamp = |n| Stamp { seq: Seq(n), lsn: Lsn(lsn + n - 1), epoch: Epoch(1), ts_ms: 5 };
        let accepted = Accepted {
            definition: DefinitionHash([0; 32]),
            input: Bytes::from(vec![0; input]),
            key: "k".parse().unwrap(),
            deadline_ms: 1,
            traceparent: None,
            class: Class(0),
            slot: Slot::new(1).unwrap(),
        };
        let mut turn = Turn::accept(accepted, stamp(1), Limits::chain(0, 1));
        let ended = turn::ended(WorkState::Succeeded, Reason::Completed);
        turn.apply(Entry::Ended(ended), stamp(2)).unwrap();
        turn
    }

    fn call(work: u64, after_seq: u64, mode: WatchMode) -> SubscribeCall {
        let mode = mode.into();
        SubscribeCall { subscription: 7, work, after_seq, mode, ..SubscribeCall::default() }
    }

    #[test]
    fn what_ended_last_is_told_as_it_was() {
        let recent = Recent::default();
        recent.put(Arc::new("acme/support/a".parse().unwrap()), turn(10, 3));
        let seqs = |after_seq, mode| {
            let events = recent.events(&call(10, after_seq, mode)).unwrap();
            assert_eq!((events.subscription, events.work), (7, 10));
            assert_eq!(events.ended.unwrap().agent, "acme/support/a");
            events.entries.into_iter().map(|entry| (entry.seq, entry.lsn)).collect::<Vec<_>>()
        };
        assert_eq!(seqs(0, WatchMode::All), [(1, 10), (2, 11)]);
        assert_eq!(seqs(1, WatchMode::All), [(2, 11)]);
        assert_eq!(seqs(0, WatchMode::End), [(2, 11)]);
        assert_eq!(seqs(2, WatchMode::End), []);
        assert_eq!(recent.events(&call(11, 0, WatchMode::All)), None);
    }

    #[test]
    fn the_oldest_go_first_and_what_is_too_heavy_at_once() {
        let recent = Recent::default();
        let agent = || Arc::new("acme/support/a".parse().unwrap());
        let is_there = |lsn| recent.events(&call(lsn, 0, WatchMode::End)).is_some();
        for lsn in [10, 20, 30] {
            recent.put(agent(), turn(lsn, BYTES_MAX / 2 - 1_000));
        }
        assert_eq!([10, 20, 30].map(is_there), [false, true, true]);
        recent.put(agent(), turn(40, BYTES_MAX));
        assert_eq!([20, 30, 40].map(is_there), [false; 3]);
        assert_eq!(lock(&recent.inner).bytes, 0);
        recent.put(agent(), turn(50, 1));
        assert!(is_there(50));
    }
}
