//! The view goes out: to the routing map of this process, and as deltas to every member.

use std::sync::Arc;

use bytes::Bytes;
use cluster::Peer;
use domain::Role;
use domain::view::{MemberInfo, Version, View};
use prost::Message as _;
use proto::kind;
use proto::link::Envelope;
use tracing::debug;

use super::Leader;
use crate::metrics;
use crate::shared::{node_peer, whole};
use crate::standby::control_peer;

impl Leader {
    /// Whether there may be something to publish.
    pub(crate) fn is_dirty(&self) -> bool {
        self.is_dirty
    }

    /// Sends out what changed since the last time, if anything did; not to `except`, who gets the whole otherwise.
    pub(crate) fn publish(&mut self, except: Option<&Peer>) {
        if !std::mem::take(&mut self.is_dirty) {
            return;
        }
        let next = self.next_view();
        let is_first = self.view.version.number == 0;
        if !is_first && next.shards == self.view.shards && next.members == self.view.members {
            return;
        }
        let delta = proto::view::to_message(&next.since(&self.view));
        let payload = Bytes::from(delta.encode_to_vec());
        metrics::VIEW.set(next.version.number.cast_signed());
        self.view = Arc::new(next);
        self.hands.shared.views.send_replace(Some(self.view.clone()));
        let nodes = self.membership.nodes().map(|node| node_peer(&node.member().name));
        let peers: Vec<Peer> = nodes.chain(self.standbys.keys().map(control_peer)).collect();
        for peer in peers {
            // Who missed an earlier one gets the whole, and needs no deltas until then.
            if Some(&peer) != except && !self.behind.contains(&peer) {
                self.send_view(peer, payload.clone());
            }
        }
    }

    fn next_view(&self) -> View {
        let version =
            Version { term: self.view.version.term, number: self.view.version.number + 1 };
        let mut view = View::new(version, self.table.clone());
        for (shard, entry) in self.ownership.map() {
            let place = view.shards.entry(shard).or_default();
            (place.owner, place.epoch, place.open) =
                (Some(entry.member), entry.epoch, entry.is_open);
        }
        for (shard, place) in &mut view.shards {
            place.stopped = self.ownership.is_stopped(*shard);
        }
        view.members = self.roster.members.clone();
        let shared = &self.hands.shared;
        let me = MemberInfo {
            role: Role::Control,
            incarnation: shared.me.incarnation,
            address: shared.links.address(),
            beat: shared.beat.clone(),
            offers: [].into(),
        };
        view.members.insert(shared.me.name.clone(), me);
        view.members.extend(self.standbys.clone());
        view
    }

    fn send_view(&mut self, peer: Peer, payload: Bytes) {
        let envelope = Envelope { kind: kind::VIEW, payload, ..Envelope::default() };
        match self.hands.shared.links.cast(&peer, envelope) {
            Ok(()) => drop(self.behind.remove(&peer)),
            Err(error) => {
                debug!(%peer, %error, "cannot send the view; it gets the whole later");
                self.behind.insert(peer);
            }
        }
    }

    /// The link to a member is up again: what was sent before may be lost.
    pub(crate) fn linked(&mut self, peer: &Peer) {
        let is_member = match peer.role {
            Role::Node => self.membership.nodes().any(|node| node.member().name == peer.name),
            Role::Control => self.standbys.contains_key(&peer.name),
            Role::Store | Role::Client => false,
        };
        if is_member {
            self.send_view(peer.clone(), whole(&self.view));
        }
    }

    /// Sends the whole view to those who missed a part.
    pub(crate) fn catch_up(&mut self) {
        // Before its first view is out a leader has nothing to say: an empty one would end links and runs.
        if self.view.version.number == 0 {
            return;
        }
        for peer in self.behind.clone() {
            self.send_view(peer, whole(&self.view));
        }
    }

    pub(crate) fn whole_view(&self) -> Bytes {
        whole(&self.view)
    }
}
