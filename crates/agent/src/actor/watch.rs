//! Who watches which work, and what they are sent: what is durable, in its order, and behind it what the attempt that runs
//! says.

use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use ractor::ActorProcessingErr;

use cluster::{Peer, Reply};
use domain::entry::Stamp;
use domain::{Class, Lsn, Reason, Slot};
use proto::link::{
    Envelope, Events, LogEntry, SubmitCall, SubscribeAnswer, SubscribeCall, WatchMode, WorkInfo,
};
use proto::{journal, kind};

use super::{Began, State};
use crate::shard::{Shard, refusal};
use crate::{clock, read};

/// One subscription of one API server.
#[derive(Clone, Debug)]
pub(crate) struct Watcher {
    pub peer: Peer,
    pub subscription: u64,
    pub mode: WatchMode,
    /// Bytes of what the attempt that runs has said, which it was sent.
    pub heard: usize,
    /// When the link had no room for that.
    pub refused: Option<Instant>,
}

impl Watcher {
    pub(crate) fn new(peer: Peer, subscription: u64, mode: WatchMode) -> Self {
        Self { peer, subscription, mode, heard: 0, refused: None }
    }
}

/// The most watchers of one work; more are refused.
const WATCHERS_MAX: usize = 1_024;

/// What a submit that wants to be watched subscribes to.
pub(super) fn call_of(
    submit: &SubmitCall,
    work: Lsn,
    slot: Slot,
    class: Class,
) -> Option<SubscribeCall> {
    (submit.subscription != 0).then(|| SubscribeCall {
        subscription: submit.subscription,
        work: work.0,
        slot: slot.get().into(),
        class: class.0.into(),
        after_seq: 0,
        mode: submit.mode,
    })
}

impl State {
    pub(super) async fn subscribe(
        &mut self,
        call: SubscribeCall,
        from: Peer,
        reply: Reply,
    ) -> Result<(), ActorProcessingErr> {
        if let Err(error) = self.wake_known().await {
            self.refuse(reply, error.reason(), &error.to_string());
            return Ok(());
        }
        let work = Lsn(call.work);
        let is_open = self.fold.as_ref().is_some_and(|fold| fold.turn(work).is_some());
        if !is_open {
            let shard = self.shard().clone();
            tokio::spawn(async move { read::subscribe(&shard, call, from, reply).await });
            return Ok(());
        }
        if self.watchers.get(&work).is_some_and(|watchers| WATCHERS_MAX <= watchers.len()) {
            self.refuse(reply, Reason::Overloaded, "too many watch this work");
            return Ok(());
        }
        reply.send(SubscribeAnswer {}.encode_to_vec().into());
        self.watch_open(&call, from);
        Ok(())
    }

    /// Sends what an open work has come to after the cursor, and whatever comes.
    pub(super) fn watch_open(&mut self, call: &SubscribeCall, from: Peer) {
        let work = Lsn(call.work);
        let mut watcher = Watcher::new(from, call.subscription, call.mode());
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        if let (Some(turn), WatchMode::All) = (turn, watcher.mode) {
            let past = turn.entries().iter().filter(|(stamp, _)| call.after_seq < stamp.seq.0);
            let past: Vec<_> =
                past.map(|(stamp, entry)| (*stamp, journal::encode(entry))).collect();
            if !past.is_empty() && !self.send_entries(&watcher, work, &past, None) {
                // It asks again from its cursor; live entries must not come before those that it lacks.
                return;
            }
            let told = self.turn_began(work);
            if told.began_ms != 0 {
                let subscription = watcher.subscription;
                send(self.shard(), &watcher, Events { subscription, ..told });
            }
            if !self.say(&mut watcher, work) {
                return;
            }
        }
        self.watchers.entry(work).or_default().push(watcher);
    }

    /// The turn of `work` came: those who want all of it are told, though it has no entry of its own.
    pub(super) fn began(&mut self, work: Lsn) {
        self.began = Some(Box::new(Began { work, at_ms: clock::now_ms(), span: None }));
        let Some(watchers) = self.watchers.get(&work) else { return };
        let told = self.turn_began(work);
        for watcher in watchers.iter().filter(|watcher| watcher.mode == WatchMode::All) {
            // One that misses it sees it in the first step.
            let subscription = watcher.subscription;
            send(self.shard(), watcher, Events { subscription, ..told.clone() });
        }
    }

    fn turn_began(&self, work: Lsn) -> Events {
        let began = self.began.as_ref().filter(|began| began.work == work);
        let began_ms = began.map_or(0, |began| began.at_ms);
        Events { work: work.0, began_ms, ..Events::default() }
    }

    pub(super) fn unsubscribe(&mut self, peer: &Peer, subscription: u64) {
        self.watchers.retain(|_, watchers| {
            watchers.retain(|it| it.subscription != subscription || it.peer != *peer);
            !watchers.is_empty()
        });
    }

    /// Shows entries that are durable now to those who want all of them.
    pub(super) fn show_watchers(&mut self, work: Lsn, shown: &[(Stamp, Bytes)]) {
        let Some(watchers) = self.watchers.remove(&work) else { return };
        let (all, ends): (Vec<_>, Vec<_>) =
            watchers.into_iter().partition(|watcher| watcher.mode == WatchMode::All);
        let mut kept = ends;
        for watcher in all {
            if self.send_entries(&watcher, work, shown, None) {
                kept.push(watcher);
            }
        }
        if !kept.is_empty() {
            self.watchers.insert(work, kept);
        }
    }

    /// Whether `watcher` was sent them. One that cannot be sent to now is told to subscribe anew.
    pub(super) fn send_entries(
        &self,
        watcher: &Watcher,
        work: Lsn,
        shown: &[(Stamp, Bytes)],
        ended: Option<WorkInfo>,
    ) -> bool {
        let entries = shown.iter().map(|(stamp, payload)| log_entry(stamp, work, payload.clone()));
        let entries = match (watcher.mode, &ended) {
            (WatchMode::End, Some(_)) => entries.rev().take(1).collect(),
            (WatchMode::All | WatchMode::End | WatchMode::Unspecified, _) => entries.collect(),
        };
        let subscription = watcher.subscription;
        send(
            self.shard(),
            watcher,
            Events { subscription, work: work.0, entries, ended, ..Events::default() },
        )
    }
}

pub(crate) fn log_entry(stamp: &Stamp, work: Lsn, entry: Bytes) -> LogEntry {
    LogEntry {
        seq: stamp.seq.0,
        lsn: stamp.lsn.0,
        epoch: stamp.epoch.0,
        work: work.0,
        ts_ms: stamp.ts_ms,
        entry,
    }
}

/// The most that one message of events carries, unless one entry is larger.
const EVENTS_BYTES_MAX: usize = 1 << 20;

/// Casts events to a watcher, in pieces. When the link has no room for one, the watcher is told to subscribe anew as soon
/// as it has, and the rest is not sent.
pub(crate) fn send(shard: &Shard, watcher: &Watcher, events: Events) -> bool {
    let work = Lsn(events.work);
    for piece in pieces(events) {
        match shard.node.wire.cast(&watcher.peer, envelope(&piece)) {
            Ok(()) => {}
            Err(cluster::Error::Overloaded { .. } | cluster::Error::TooLarge { .. }) => {
                close(shard, watcher, work);
                return false;
            }
            // The API server sees the link go down and subscribes anew by itself.
            Err(_) => return false,
        }
    }
    true
}

/// # Errors
/// The link has no room for it, or there is none.
pub(super) fn try_send(
    shard: &Shard,
    watcher: &Watcher,
    events: &Events,
) -> Result<(), cluster::Error> {
    shard.node.wire.cast(&watcher.peer, envelope(events))
}

fn envelope(events: &Events) -> Envelope {
    Envelope { kind: kind::EVENTS, payload: events.encode_to_vec().into(), ..Envelope::default() }
}

/// The entries in runs of at most [`EVENTS_BYTES_MAX`]; what stands for those that are gone comes with the first, the end with
/// the last.
fn pieces(mut events: Events) -> Vec<Events> {
    let mut whole = events.whole.take();
    let mut runs = vec![Vec::new()];
    let mut bytes = 0;
    for entry in std::mem::take(&mut events.entries) {
        let size = entry.encoded_len();
        if EVENTS_BYTES_MAX < bytes + size && bytes != 0 {
            runs.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        runs.last_mut().expect("one at least").push(entry);
    }
    let last = runs.len() - 1;
    let (subscription, work) = (events.subscription, events.work);
    let piece = |(index, entries)| {
        let whole = whole.take();
        match index == last {
            true => Events { entries, whole, ..events.clone() },
            false => Events { subscription, work, entries, whole, ..Events::default() },
        }
    };
    runs.into_iter().enumerate().map(piece).collect()
}

/// Tells a watcher to subscribe anew, as soon as the link has room for that.
pub(crate) fn close(shard: &Shard, watcher: &Watcher, work: Lsn) {
    let closed = Some(refusal(Reason::Restarted, "the subscription ended: subscribe anew"));
    let subscription = watcher.subscription;
    let events = Events { subscription, work: work.0, closed, ..Events::default() };
    let (wire, peer) = (shard.node.wire.clone(), watcher.peer.clone());
    let full = |result| matches!(result, Err(cluster::Error::Overloaded { .. }));
    if !full(wire.cast(&peer, envelope(&events))) {
        return;
    }
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    // A link that stays full is given up by the cluster, which ends the subscription, too.
    runtime.spawn(async move {
        while full(wire.cast(&peer, envelope(&events))) {
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_entries_go_in_pieces_and_the_end_with_the_last() {
        let entry = LogEntry { entry: Bytes::from(vec![0; 400 << 10]), ..LogEntry::default() };
        let (ended, whole) = (Some(WorkInfo::default()), Some(WorkInfo::default()));
        let entries = vec![entry; 5];
        let events = Events { subscription: 7, entries, ended, whole, ..Events::default() };
        let pieces = pieces(events);
        let whole: Vec<bool> = pieces.iter().map(|piece| piece.whole.is_some()).collect();
        assert_eq!(whole, [true, false, false]);
        let sizes: Vec<usize> = pieces.iter().map(|piece| piece.entries.len()).collect();
        let ends: Vec<bool> = pieces.iter().map(|piece| piece.ended.is_some()).collect();
        assert_eq!((sizes, ends), (vec![2, 2, 1], vec![false, false, true]));
    }
}
