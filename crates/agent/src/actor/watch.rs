//! Who watches which work, and what they are sent: only what is durable, in its order.

use std::time::Duration;

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

use super::State;
use crate::read;
use crate::shard::{Shard, refusal};

/// One subscription of one API server.
#[derive(Clone, Debug)]
pub(crate) struct Watcher {
    pub peer: Peer,
    pub subscription: u64,
    pub mode: WatchMode,
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
        _ = self.wake_known().await;
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
        let watcher = Watcher { peer: from, subscription: call.subscription, mode: call.mode() };
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        if let (Some(turn), WatchMode::All) = (turn, watcher.mode) {
            let past = turn.entries().iter().filter(|(stamp, _)| call.after_seq < stamp.seq.0);
            let past: Vec<_> =
                past.map(|(stamp, entry)| (*stamp, journal::encode(entry))).collect();
            if !past.is_empty() {
                self.send_entries(&watcher, work, &past, None);
            }
        }
        self.watchers.entry(work).or_default().push(watcher);
    }

    pub(super) fn unsubscribe(&mut self, subscription: u64) {
        self.watchers.retain(|_, watchers| {
            watchers.retain(|watcher| watcher.subscription != subscription);
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
        let entries = shown.iter().map(|(stamp, payload)| LogEntry {
            seq: stamp.seq.0,
            lsn: stamp.lsn.0,
            epoch: stamp.epoch.0,
            work: work.0,
            ts_ms: stamp.ts_ms,
            entry: payload.clone(),
        });
        let entries = match (watcher.mode, &ended) {
            (WatchMode::End, Some(_)) => entries.rev().take(1).collect(),
            (WatchMode::All | WatchMode::End | WatchMode::Unspecified, _) => entries.collect(),
        };
        let subscription = watcher.subscription;
        send(
            self.shard(),
            watcher,
            Events { subscription, work: work.0, entries, ended, closed: None },
        )
    }
}

/// Casts events to a watcher. When the link has no room for them, the watcher is told to subscribe anew as soon as it has.
pub(crate) fn send(shard: &Shard, watcher: &Watcher, events: Events) -> bool {
    let (subscription, work) = (events.subscription, events.work);
    let envelope = |events: Events| Envelope {
        kind: kind::EVENTS,
        payload: events.encode_to_vec().into(),
        ..Envelope::default()
    };
    match shard.node.wire.cast(&watcher.peer, envelope(events)) {
        Ok(()) => return true,
        // The API server sees the link go down and subscribes anew by itself.
        Err(error) if !matches!(error, cluster::Error::Overloaded { .. }) => return false,
        Err(_) => {}
    }
    let closed = Some(refusal(Reason::Overloaded, "the link to the watcher is full"));
    let events = Events { subscription, work, entries: Vec::new(), ended: None, closed };
    let (wire, peer) = (shard.node.wire.clone(), watcher.peer.clone());
    tokio::spawn(async move {
        const TRIES: u32 = 200;
        for _ in 0..TRIES {
            tokio::time::sleep(Duration::from_millis(25)).await;
            match wire.cast(&peer, envelope(events.clone())) {
                Err(cluster::Error::Overloaded { .. }) => {}
                Ok(()) | Err(_) => return,
            }
        }
    });
    false
}
