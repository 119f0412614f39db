//! The works of a shard that ended last, as they are told. When an API server dies, all that was watched through it is asked
//! for elsewhere at once, and much of it has ended meanwhile: that needs no store.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use domain::Lsn;
use domain::turn::Turn;
use proto::journal;
use proto::link::{Events, LogEntry, SubscribeCall, WatchMode, WorkInfo};

use crate::actor::watch::log_entry;
use crate::shard::lock;

/// What the works of a shard may weigh; the oldest go first.
const BYTES_MAX: usize = 1 << 20;
/// Of a work, and of each of its entries, beside what they carry.
const WORK_BYTES: usize = 512;
const ENTRY_BYTES: usize = 96;

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
    entries: Vec<LogEntry>,
    info: WorkInfo,
    bytes: usize,
}

impl Recent {
    /// A work that ended now, and what is told of it.
    pub(crate) fn put(&self, turn: &Turn, info: WorkInfo) {
        let work = turn.id();
        // Encoded anew: what came in a message would hold all of that message.
        let entries = turn.entries().iter();
        let entries: Vec<_> =
            entries.map(|(stamp, entry)| log_entry(stamp, work, journal::encode(entry))).collect();
        let info = WorkInfo { result: Bytes::copy_from_slice(&info.result), ..info };
        let carried = entries.iter().map(|entry| ENTRY_BYTES + entry.entry.len()).sum::<usize>();
        let bytes = WORK_BYTES + carried + info.result.len();
        let mut inner = lock(&self.inner);
        inner.bytes += bytes;
        match inner.works.insert(work, Arc::new(Ended { entries, info, bytes })) {
            Some(before) => inner.bytes -= before.bytes,
            None => inner.order.push_back(work),
        }
        while BYTES_MAX < inner.bytes {
            let Some(oldest) = inner.order.pop_front() else { return };
            inner.bytes -= inner.works.remove(&oldest).map_or(0, |ended| ended.bytes);
        }
    }

    /// Whether it is one of them.
    pub(crate) fn has(&self, work: Lsn) -> bool {
        lock(&self.inner).works.contains_key(&work)
    }

    /// All that a subscription to a work wants, if it is one of them.
    pub(crate) fn events(&self, call: &SubscribeCall) -> Option<Events> {
        let ended = lock(&self.inner).works.get(&Lsn(call.work))?.clone();
        let all = &ended.entries;
        let wanted = match call.mode() {
            WatchMode::End => &all[all.len().saturating_sub(1)..],
            WatchMode::All | WatchMode::Unspecified => all,
        };
        let entries = wanted.iter().filter(|entry| call.after_seq < entry.seq).cloned().collect();
        let (subscription, work) = (call.subscription, call.work);
        let ended = Some(ended.info.clone());
        Some(Events { subscription, work, entries, ended, ..Events::default() })
    }
}

#[cfg(test)]
mod tests {
    use domain::entry::{Accepted, Entry, Stamp};
    use domain::turn::{self, Limits};
    use domain::{AgentId, Class, DefinitionHash, Epoch, Reason, Seq, Slot, WorkState};

    use super::*;
    use crate::info;

    fn put(recent: &Recent, turn: &Turn) {
        let agent: AgentId = "acme/support/a".parse().unwrap();
        recent.put(turn, info::of_ended(&agent, turn));
    }

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
        put(&recent, &turn(10, 3));
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
        let is_there = |lsn| recent.events(&call(lsn, 0, WatchMode::End)).is_some();
        for lsn in [10, 20, 30] {
            put(&recent, &turn(lsn, BYTES_MAX / 2 - 1_000));
        }
        assert_eq!([10, 20, 30].map(is_there), [false, true, true]);
        put(&recent, &turn(40, BYTES_MAX));
        assert_eq!([20, 30, 40].map(is_there), [false; 3]);
        assert_eq!(lock(&recent.inner).bytes, 0);
        put(&recent, &turn(50, 1));
        let weight = lock(&recent.inner).bytes;
        put(&recent, &turn(50, 1));
        assert!(is_there(50) && recent.has(Lsn(50)) && !recent.has(Lsn(40)));
        assert_eq!(lock(&recent.inner).bytes, weight, "it weighs once");
    }
}
