//! The leader's view of the nodes: who is in, who is suspected, who is dead.
//!
//! A wrong verdict costs time, never safety: what a node that was declared dead still writes, the store refuses. Never
//! compares clocks of two processes; a node's silence is measured here.

mod stores;

use std::collections::{BTreeMap, BTreeSet};

use crate::brake::ASK_MS;
use crate::place::{Admission, Candidate};
use crate::time::Millis;
use crate::{CapabilitySet, Epoch, Incarnation, Member, ProcessName, Reason, ShardId};
use stores::Contact;

pub use stores::{AWAY_MS, STEADY_MS, STORELESS_MS};

/// How often a node beats.
pub const BEAT_MS: u64 = 500;
/// Three missed beats make a suspect.
pub const SUSPECT_MS: u64 = 1_500;
/// So long after its last beat a suspect is dead; where most fall silent, only after the other replicas were asked.
pub const DEAD_MS: u64 = 2_000;
/// A node whose runtime stood still for longer is dead, however well its heartbeat is.
pub const STALLED_MS: u64 = 30_000;
/// A node to which no link worked for so long is dead, however well its heartbeat is: nobody reaches its agents.
pub const UNLINKED_MS: u64 = 30_000;
/// Of so many nodes half fall silent together for the fault that is ours rather than theirs.
const HALF_OF_MIN: usize = 4;
/// Between two attempts to reach such a node: it may not be able to dial us.
const REACH_MS: u64 = 2_000;

/// What a node says of itself when it joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joining {
    pub member: Member,
    pub zone: String,
    /// How much it takes, compared with others; at least 1.
    pub capacity: u32,
    pub capabilities: CapabilitySet,
    /// `host:port` of its cluster listener.
    pub address: String,
}

/// A shard that a node says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub shard: ShardId,
    pub epoch: Epoch,
    /// Its `shard_opened` entry is committed.
    pub is_open: bool,
}

/// How busy a node is with one capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    pub capability: String,
    pub running: u32,
    pub queued: u32,
}

/// One heartbeat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    pub member: Member,
    /// Grows with every beat of an incarnation.
    pub number: u64,
    pub held: Vec<Held>,
    /// Of which it found less in the store than was acknowledged.
    pub rolled_back: Vec<Held>,
    pub loads: Vec<Load>,
    pub hot_agents: u32,
    /// For how long its main runtime has not answered a probe.
    pub runtime_silent_ms: u64,
    /// For how long each store that it had a shard in has not answered it, milliseconds.
    pub stores: BTreeMap<String, u64>,
}

/// What a TCP connect to a node's cluster port gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Nobody listens there: the process is gone.
    Refused,
    Connected,
    /// Timed out or unreachable.
    Failed,
}

/// What follows from an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Try a TCP connect to its cluster port and hand the result to [`Membership::probe_result`].
    Probe {
        member: Member,
    },
    /// No link to it works: send it something, so that it is dialled.
    Reach {
        member: Member,
    },
    Alive {
        member: Member,
        reason: Reason,
    },
    Suspect {
        member: Member,
        reason: Reason,
    },
    /// It does not reach its store, which answers others.
    Storeless {
        member: Member,
    },
    Dead {
        member: Member,
        reason: Reason,
    },
}

/// A join that is refused: this incarnation is dead, or a later one of the same name is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{member} cannot join: incarnation {known} of it was here already; join as a new one")]
pub struct JoinRefused {
    pub member: Member,
    pub known: Incarnation,
}

/// What a node is to the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It beats.
    Answering,
    /// It keeps what it has but gets nothing new.
    Suspect,
    /// It beats and does not reach its store: what it has goes elsewhere.
    Storeless,
}

/// A node that is not dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    pub joining: Joining,
    is_suspect: bool,
    pub admission: Admission,
    pub last_beat: Millis,
    pub beat_number: u64,
    pub held: Vec<Held>,
    pub loads: Vec<Load>,
    pub hot_agents: u32,
    pub runtime_silent_ms: u64,
    /// False: it was in under the leader before us, and has not joined here.
    has_joined: bool,
    /// The result of an [`Effect::Probe`] is awaited.
    pub is_probed: bool,
    /// None while a link to it works.
    unlinked: Option<Unlinked>,
    contact: Contact,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unlinked {
    since: Millis,
    /// When [`Effect::Reach`] last asked to try.
    tried: Option<Millis>,
}

/// Whether so many nodes fell silent at once that the fault is rather ours than theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brake {
    Off,
    /// Half of four or more, or more than half of fewer, fell silent within two seconds. Ask the other replicas: if one sees
    /// more, leadership goes there; if none does, or there is none, fence only onto nodes that answer.
    On {
        silent: usize,
        of: usize,
    },
}

/// The leader's view of all nodes.
#[derive(Debug, Default)]
pub struct Membership {
    nodes: BTreeMap<ProcessName, NodeView>,
    /// Nodes that an operator cordoned, by name: also what joins under it later.
    cordoned: BTreeSet<ProcessName>,
    /// The latest dead incarnation of each name: it and all before it never come back.
    dead: BTreeMap<ProcessName, Incarnation>,
    /// When nodes fell silent, for the brake; also of those that are dead since.
    silences: BTreeSet<(Millis, Member)>,
    /// Since when each store answers most of the nodes that have asked it.
    steady: BTreeMap<String, Millis>,
}

impl Membership {
    pub fn new() -> Self {
        Self::default()
    }

    /// An earlier leader declared it dead.
    pub fn buried(&mut self, member: &Member) {
        let dead = self.dead.entry(member.name.clone()).or_default();
        *dead = (*dead).max(member.incarnation);
    }

    /// A node that was in under the leader before us. It keeps what it has, as long as it beats here; it gets nothing new
    /// until it joins. Until it is heard for the first time it has `patience_ms`, if that is more than others have.
    pub fn inherited(&mut self, joining: Joining, patience_ms: u64, now: Millis) {
        let member = joining.member.clone();
        let is_dead = |dead: &Incarnation| member.incarnation <= *dead;
        if self.dead.get(&member.name).is_some_and(is_dead) {
            return;
        }
        let mut node = self.new_node(joining, now);
        node.has_joined = false;
        node.last_beat = now.plus(patience_ms.saturating_sub(DEAD_MS));
        self.nodes.insert(member.name, node);
    }

    /// The leader before us knew that it does not reach its store.
    pub fn inherited_storeless(&mut self, member: &Member) {
        if let Some(node) = self.node_mut(member) {
            node.contact.is_storeless = true;
        }
    }

    fn new_node(&self, joining: Joining, now: Millis) -> NodeView {
        let mut node = NodeView::new(joining, now);
        if self.cordoned.contains(&node.member().name) {
            node.admission = Admission::Cordoned;
        }
        node
    }

    /// A node joins, or joins again at a new leader.
    ///
    /// # Errors
    /// It is dead or replaced: it must come as a new incarnation.
    pub fn joined(&mut self, joining: Joining, now: Millis) -> Result<Vec<Effect>, JoinRefused> {
        let member = joining.member.clone();
        let refuse = |known| JoinRefused { member: member.clone(), known };
        if let Some(dead) = self.dead.get(&member.name).filter(|dead| member.incarnation <= **dead)
        {
            return Err(refuse(*dead));
        }
        let mut effects = Vec::new();
        if let Some(known) = self.nodes.get_mut(&member.name) {
            let incarnation = known.joining.member.incarnation;
            if member.incarnation < incarnation {
                return Err(refuse(incarnation));
            }
            if member.incarnation == incarnation {
                known.joining = joining;
                let is_new = !std::mem::replace(&mut known.has_joined, true);
                let storeless = known.still_storeless();
                let effects = self.heard(&member, now);
                let joined = Effect::Alive { member, reason: Reason::Joined };
                // Whoever joins is written down as alive first.
                return Ok(match (is_new, effects.is_empty()) {
                    (true, _) => std::iter::once(joined).chain(storeless).collect(),
                    (false, true) => storeless.into_iter().collect(),
                    (false, false) => effects,
                });
            }
            let old = known.joining.member.clone();
            effects.extend(self.bury(&old, Reason::Replaced));
        }
        self.nodes.insert(member.name.clone(), self.new_node(joining, now));
        effects.push(Effect::Alive { member, reason: Reason::Joined });
        Ok(effects)
    }

    /// A beat. None: it is not a living member's, or a later one was heard already; what it says does not count.
    pub fn beat(&mut self, beat: Beat, now: Millis) -> Option<Vec<Effect>> {
        let member = beat.member.clone();
        let node = self.node_mut(&member).filter(|node| node.beat_number < beat.number)?;
        node.beat_number = beat.number;
        node.held = beat.held;
        node.loads = beat.loads;
        node.hot_agents = beat.hot_agents;
        node.runtime_silent_ms = beat.runtime_silent_ms;
        node.contact.silent_ms = beat.stores;
        if STALLED_MS < beat.runtime_silent_ms {
            return Some(self.bury(&member, Reason::RuntimeStalled));
        }
        Some(self.heard(&member, now))
    }

    fn heard(&mut self, member: &Member, now: Millis) -> Vec<Effect> {
        self.silences.retain(|(_, silent)| silent != member);
        let Some(node) = self.node_mut(member) else { return Vec::new() };
        node.last_beat = now;
        if !std::mem::take(&mut node.is_suspect) {
            return Vec::new();
        }
        let again = Effect::Alive { member: member.clone(), reason: Reason::BeatsAgain };
        std::iter::once(again).chain(node.still_storeless()).collect()
    }

    /// The heartbeat session of this process dropped.
    pub fn session_lost(&mut self, name: &ProcessName, now: Millis) -> Vec<Effect> {
        let Some(node) = self.nodes.get(name) else { return Vec::new() };
        let member = node.joining.member.clone();
        self.suspect(&member, Reason::SessionLost, now)
    }

    fn suspect(&mut self, member: &Member, reason: Reason, now: Millis) -> Vec<Effect> {
        let Some(node) = self.node_mut(member) else { return Vec::new() };
        if std::mem::replace(&mut node.is_suspect, true) {
            return Vec::new();
        }
        self.silences.insert((now, member.clone()));
        let suspect = Effect::Suspect { member: member.clone(), reason };
        std::iter::once(suspect).chain(self.probe(member)).collect()
    }

    fn probe(&mut self, member: &Member) -> Option<Effect> {
        let node = self.node_mut(member)?;
        let is_due = !std::mem::replace(&mut node.is_probed, true);
        is_due.then(|| Effect::Probe { member: member.clone() })
    }

    /// What came of an [`Effect::Probe`]. Only a refusal says something: nobody listens, so the process is gone. After
    /// anything else a suspect is probed again with the next tick: a process that dies closes one socket after another.
    pub fn probe_result(&mut self, member: &Member, probe: Probe) -> Vec<Effect> {
        let Some(node) = self.node_mut(member) else { return Vec::new() };
        node.is_probed = false;
        match probe {
            Probe::Refused if node.is_suspect => self.bury(member, Reason::PortRefused),
            Probe::Refused | Probe::Connected | Probe::Failed => Vec::new(),
        }
    }

    /// An operator keeps new shards from a node, or lets it have them again. False: it is so already, or it is leaving.
    pub fn cordon(&mut self, name: &ProcessName, is_cordoned: bool) -> bool {
        let is_news = match is_cordoned {
            true => self.cordoned.insert(name.clone()),
            false => self.cordoned.remove(name),
        };
        let node = self.nodes.get_mut(name);
        if let Some(node) = node.filter(|node| node.admission != Admission::Draining) {
            node.admission = if is_cordoned { Admission::Cordoned } else { Admission::Open };
        }
        is_news
    }

    /// This run of a node is about to leave: it gives everything away. False: it is known already, or not in.
    pub fn drain(&mut self, member: &Member) -> bool {
        let node = self.node_mut(member);
        node.is_some_and(|node| {
            std::mem::replace(&mut node.admission, Admission::Draining) != Admission::Draining
        })
    }

    /// It said that it leaves.
    pub fn left(&mut self, member: &Member) -> Vec<Effect> {
        self.bury(member, Reason::Left)
    }

    /// Called at least every 100 ms.
    pub fn tick(&mut self, now: Millis) -> Vec<Effect> {
        self.silences.retain(|(since, _)| now.since(*since) < DEAD_MS);
        let silent: Vec<(Member, u64)> = self
            .nodes
            .values()
            .map(|node| (node.joining.member.clone(), now.since(node.last_beat)))
            .filter(|(_, silent_ms)| SUSPECT_MS <= *silent_ms)
            .collect();
        let mut effects = Vec::new();
        for (member, _) in &silent {
            effects.extend(self.suspect(member, Reason::BeatsMissed, now));
        }
        // A verdict cannot be taken back: whoever hears more of them leads by then.
        let dead_ms = match self.brake(now) {
            Brake::Off => DEAD_MS,
            Brake::On { .. } => DEAD_MS + ASK_MS,
        };
        for (member, _) in silent.iter().filter(|(_, silent_ms)| dead_ms <= *silent_ms) {
            effects.extend(self.bury(member, Reason::Silent));
        }
        for member in self.suspects() {
            effects.extend(self.probe(&member));
        }
        effects.extend(self.judge_stores(now));
        effects
    }

    /// To which of the nodes a link works now; to one that has not joined over it none does. Called with every tick. If none
    /// worked to more than half of them, the fault is rather ours than theirs, and no verdict follows.
    pub fn links(&mut self, is_linked: impl Fn(&ProcessName) -> bool, now: Millis) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (name, node) in &mut self.nodes {
            if node.has_joined && is_linked(name) {
                node.unlinked = None;
                continue;
            }
            let unlinked = node.unlinked.get_or_insert(Unlinked { since: now, tried: None });
            if unlinked.tried.is_none_or(|tried| REACH_MS <= now.since(tried)) {
                unlinked.tried = Some(now);
                effects.push(Effect::Reach { member: node.joining.member.clone() });
            }
        }
        if !self.is_cut_off(now) {
            let lost = self.lost(now);
            effects.extend(lost.iter().flat_map(|member| self.bury(member, Reason::Unlinked)));
        }
        effects
    }

    /// Whether no link has worked for long to more than half of the nodes.
    pub fn is_cut_off(&self, now: Millis) -> bool {
        self.nodes.len() < self.lost(now).len() * 2
    }

    /// Nodes that joined and to which no link works, as last seen.
    pub fn unlinked(&self) -> usize {
        self.nodes.values().filter(|node| node.has_joined && node.unlinked.is_some()).count()
    }

    fn lost(&self, now: Millis) -> Vec<Member> {
        let is_lost = |node: &&NodeView| {
            node.unlinked.is_some_and(|unlinked| UNLINKED_MS <= now.since(unlinked.since))
        };
        self.nodes.values().filter(is_lost).map(|node| node.joining.member.clone()).collect()
    }

    fn suspects(&self) -> Vec<Member> {
        let suspects = self.nodes.values().filter(|node| node.is_suspect);
        suspects.map(|node| node.joining.member.clone()).collect()
    }

    fn bury(&mut self, member: &Member, reason: Reason) -> Vec<Effect> {
        if self.node_mut(member).is_none() {
            return Vec::new();
        }
        self.nodes.remove(&member.name);
        self.buried(member);
        vec![Effect::Dead { member: member.clone(), reason }]
    }

    fn node_mut(&mut self, member: &Member) -> Option<&mut NodeView> {
        self.nodes.get_mut(&member.name).filter(|node| node.joining.member == *member)
    }

    /// All nodes that are not dead, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeView> {
        self.nodes.values()
    }

    /// This incarnation, if it is in and not dead.
    pub fn node(&self, member: &Member) -> Option<&NodeView> {
        self.nodes.get(&member.name).filter(|node| node.joining.member == *member)
    }

    /// How many of the nodes fell silent in the last two seconds.
    pub fn brake(&self, now: Millis) -> Brake {
        let fresh = self.silences.iter().filter(|(since, _)| now.since(*since) < DEAD_MS);
        let silent: BTreeSet<&ProcessName> = fresh.map(|(_, member)| &member.name).collect();
        let gone = silent.iter().filter(|name| !self.nodes.contains_key(**name)).count();
        let of = self.nodes.len() + gone;
        // Where there are few, half is one, and one may just have died.
        let enough = if of < HALF_OF_MIN { of / 2 + 1 } else { of.div_ceil(2) };
        if silent.len() < enough {
            return Brake::Off;
        }
        Brake::On { silent: silent.len(), of }
    }
}

/// Which nodes a replica that does not lead hears: what a leader asks for when most of its own fall silent.
#[derive(Debug, Default)]
pub struct Sightings(BTreeMap<ProcessName, Millis>);

impl Sightings {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn heard(&mut self, name: &ProcessName, now: Millis) {
        self.0.insert(name.clone(), now);
    }

    pub fn lost(&mut self, name: &ProcessName) {
        self.0.remove(name);
    }

    /// How many beat at `now`. Forgets the others.
    pub fn count(&mut self, now: Millis) -> usize {
        self.0.retain(|_, heard| now.since(*heard) < SUSPECT_MS);
        self.0.len()
    }
}

impl NodeView {
    fn new(joining: Joining, now: Millis) -> Self {
        Self {
            joining,
            is_suspect: false,
            admission: Admission::Open,
            last_beat: now,
            beat_number: 0,
            held: Vec::new(),
            loads: Vec::new(),
            hot_agents: 0,
            runtime_silent_ms: 0,
            has_joined: true,
            is_probed: false,
            unlinked: None,
            contact: Contact::default(),
        }
    }

    pub fn member(&self) -> &Member {
        &self.joining.member
    }

    /// What was said of it and still holds, after it was said that it lives.
    fn still_storeless(&self) -> Option<Effect> {
        let storeless = Effect::Storeless { member: self.member().clone() };
        self.contact.is_storeless.then_some(storeless)
    }

    /// False: it is known from the leader before us only.
    pub fn has_joined(&self) -> bool {
        self.has_joined
    }

    /// Who has not joined yet is suspected, however well it beats.
    pub fn standing(&self) -> Standing {
        match self.contact.is_storeless {
            _ if !self.has_joined || self.is_suspect => Standing::Suspect,
            true => Standing::Storeless,
            false => Standing::Answering,
        }
    }

    /// Whether it beats here.
    pub fn is_heard(&self) -> bool {
        !self.is_suspect && (self.has_joined || 0 < self.beat_number)
    }

    /// What whoever places shards is to know of it.
    pub fn candidate(&self) -> Candidate {
        Candidate {
            member: self.member().clone(),
            zone: self.joining.zone.clone(),
            capacity: self.joining.capacity,
            standing: self.standing(),
            admission: self.admission,
        }
    }
}

#[cfg(test)]
mod tests;
