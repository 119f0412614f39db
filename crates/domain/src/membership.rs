//! The leader's view of the nodes: who is in, who is suspected, who is dead.
//!
//! A wrong verdict costs time, never safety: what a node that was declared dead still writes, the store refuses. Never
//! compares clocks of two processes; a node's silence is measured here.

use std::collections::{BTreeMap, BTreeSet};

use crate::place::Admission;
use crate::time::Millis;
use crate::{CapabilitySet, Epoch, Incarnation, Member, ProcessName, Reason, ShardId};

/// How often a node beats.
pub const BEAT_MS: u64 = 500;
/// Three missed beats make a suspect.
pub const SUSPECT_MS: u64 = 1_500;
/// So long after its last beat a suspect is dead.
pub const DEAD_MS: u64 = 2_000;
/// A node whose runtime stood still for longer is dead, however well its heartbeat is.
pub const STALLED_MS: u64 = 30_000;
/// A node to which no link worked for so long is dead, however well its heartbeat is: nobody reaches its agents.
pub const UNLINKED_MS: u64 = 30_000;
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
    pub loads: Vec<Load>,
    pub hot_agents: u32,
    /// For how long its main runtime has not answered a probe.
    pub runtime_silent_ms: u64,
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
}

/// A node that is not dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    pub joining: Joining,
    pub standing: Standing,
    pub admission: Admission,
    pub last_beat: Millis,
    pub beat_number: u64,
    pub held: Vec<Held>,
    pub loads: Vec<Load>,
    pub hot_agents: u32,
    pub runtime_silent_ms: u64,
    /// The result of an [`Effect::Probe`] is awaited.
    pub is_probed: bool,
    /// None while a link to it works.
    unlinked: Option<Unlinked>,
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
    /// More than half fell silent within two seconds. Ask the other replicas: if one sees more, leadership goes there;
    /// if none does, or there is none, fence only onto nodes that answer.
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
                return Ok(self.heard(&member, now));
            }
            let old = known.joining.member.clone();
            effects.extend(self.bury(&old, Reason::Replaced));
        }
        let mut node = NodeView::new(joining, now);
        if self.cordoned.contains(&member.name) {
            node.admission = Admission::Cordoned;
        }
        self.nodes.insert(member.name.clone(), node);
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
        if STALLED_MS < beat.runtime_silent_ms {
            return Some(self.bury(&member, Reason::RuntimeStalled));
        }
        Some(self.heard(&member, now))
    }

    fn heard(&mut self, member: &Member, now: Millis) -> Vec<Effect> {
        self.silences.retain(|(_, silent)| silent != member);
        let Some(node) = self.node_mut(member) else { return Vec::new() };
        node.last_beat = node.last_beat.max(now);
        match std::mem::replace(&mut node.standing, Standing::Answering) {
            Standing::Answering => Vec::new(),
            Standing::Suspect => {
                vec![Effect::Alive { member: member.clone(), reason: Reason::BeatsAgain }]
            }
        }
    }

    /// The heartbeat session of this process dropped.
    pub fn session_lost(&mut self, name: &ProcessName, now: Millis) -> Vec<Effect> {
        let Some(node) = self.nodes.get(name) else { return Vec::new() };
        let member = node.joining.member.clone();
        self.suspect(&member, Reason::SessionLost, now)
    }

    fn suspect(&mut self, member: &Member, reason: Reason, now: Millis) -> Vec<Effect> {
        let Some(node) = self.node_mut(member) else { return Vec::new() };
        match node.standing {
            Standing::Suspect => Vec::new(),
            Standing::Answering => {
                node.standing = Standing::Suspect;
                self.silences.insert((now, member.clone()));
                let suspect = Effect::Suspect { member: member.clone(), reason };
                std::iter::once(suspect).chain(self.probe(member)).collect()
            }
        }
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
        match (probe, node.standing) {
            (Probe::Refused, Standing::Suspect) => self.bury(member, Reason::PortRefused),
            (Probe::Refused, Standing::Answering) | (Probe::Connected | Probe::Failed, _) => {
                Vec::new()
            }
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
        for (member, silent_ms) in silent {
            effects.extend(self.suspect(&member, Reason::BeatsMissed, now));
            if DEAD_MS <= silent_ms {
                effects.extend(self.bury(&member, Reason::Silent));
            }
        }
        for member in self.suspects() {
            effects.extend(self.probe(&member));
        }
        effects
    }

    /// To which of the nodes a link works now. Called with every tick. If none worked to more than half of them, the fault is
    /// rather ours than theirs, and no verdict follows.
    pub fn links(&mut self, is_linked: impl Fn(&ProcessName) -> bool, now: Millis) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (name, node) in &mut self.nodes {
            if is_linked(name) {
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

    /// Nodes to which no link works, as last seen.
    pub fn unlinked(&self) -> usize {
        self.nodes.values().filter(|node| node.unlinked.is_some()).count()
    }

    fn lost(&self, now: Millis) -> Vec<Member> {
        let is_lost = |node: &&NodeView| {
            node.unlinked.is_some_and(|unlinked| UNLINKED_MS <= now.since(unlinked.since))
        };
        self.nodes.values().filter(is_lost).map(|node| node.joining.member.clone()).collect()
    }

    fn suspects(&self) -> Vec<Member> {
        let suspects = self.nodes.values().filter(|node| node.standing == Standing::Suspect);
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
        if silent.len() * 2 <= of {
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
            standing: Standing::Answering,
            admission: Admission::Open,
            last_beat: now,
            beat_number: 0,
            held: Vec::new(),
            loads: Vec::new(),
            hot_agents: 0,
            runtime_silent_ms: 0,
            is_probed: false,
            unlinked: None,
        }
    }

    pub fn member(&self) -> &Member {
        &self.joining.member
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, incarnation: u64) -> Member {
        Member { name: name.parse().unwrap(), incarnation: Incarnation(incarnation) }
    }

    fn joining(member: &Member) -> Joining {
        Joining {
            member: member.clone(),
            zone: "a".to_owned(),
            capacity: 1,
            capabilities: CapabilitySet::default(),
            address: "127.0.0.1:1".to_owned(),
        }
    }

    fn beat(member: &Member, number: u64, runtime_silent_ms: u64) -> Beat {
        let member = member.clone();
        Beat { member, number, held: vec![], loads: vec![], hot_agents: 0, runtime_silent_ms }
    }

    fn dead(member: &Member, reason: Reason) -> Effect {
        Effect::Dead { member: member.clone(), reason }
    }

    fn suspect(member: &Member, reason: Reason) -> Vec<Effect> {
        let suspect = Effect::Suspect { member: member.clone(), reason };
        vec![suspect, Effect::Probe { member: member.clone() }]
    }

    fn alive(member: &Member, reason: Reason) -> Effect {
        Effect::Alive { member: member.clone(), reason }
    }

    fn with(members: &[&Member]) -> Membership {
        let mut membership = Membership::new();
        for member in members {
            membership.joined(joining(member), Millis(0)).unwrap();
        }
        membership
    }

    #[test]
    fn three_missed_beats_make_a_suspect_and_two_seconds_a_dead_node() {
        let ann = member("ann", 1);
        let mut membership = with(&[&ann]);
        assert_eq!(membership.beat(beat(&ann, 1, 0), Millis(500)), Some(vec![]));
        assert_eq!(membership.tick(Millis(1_999)), []);
        assert_eq!(membership.tick(Millis(2_000)), suspect(&ann, Reason::BeatsMissed));
        assert_eq!(membership.probe_result(&ann, Probe::Connected), []);
        let again = [Effect::Probe { member: ann.clone() }];
        assert_eq!(membership.tick(Millis(2_499)), again);
        assert_eq!(membership.tick(Millis(2_500)), [dead(&ann, Reason::Silent)]);
        assert_eq!(membership.nodes().count(), 0);
    }

    #[test]
    fn a_lost_session_and_a_refused_port_mean_dead_now() {
        let ann = member("ann", 1);
        let mut membership = with(&[&ann]);
        let lost = membership.session_lost(&ann.name, Millis(10));
        assert_eq!(lost, suspect(&ann, Reason::SessionLost));
        let refused = membership.probe_result(&ann, Probe::Refused);
        assert_eq!(refused, [dead(&ann, Reason::PortRefused)]);
    }

    #[test]
    fn a_suspect_is_probed_again_until_its_port_is_closed_too() {
        let ann = member("ann", 1);
        let mut membership = with(&[&ann]);
        membership.session_lost(&ann.name, Millis(10));
        assert_eq!(membership.tick(Millis(60)), [], "one probe at a time");
        assert_eq!(membership.probe_result(&ann, Probe::Connected), []);
        assert_eq!(membership.tick(Millis(110)), [Effect::Probe { member: ann.clone() }]);
        let refused = membership.probe_result(&ann, Probe::Refused);
        assert_eq!(refused, [dead(&ann, Reason::PortRefused)]);
    }

    #[test]
    fn a_refused_port_of_a_node_that_beats_means_nothing() {
        let ann = member("ann", 1);
        let mut membership = with(&[&ann]);
        membership.session_lost(&ann.name, Millis(10));
        let again = membership.beat(beat(&ann, 1, 0), Millis(20));
        assert_eq!(again, Some(vec![alive(&ann, Reason::BeatsAgain)]));
        assert_eq!(membership.probe_result(&ann, Probe::Refused), []);
    }

    #[test]
    fn a_stalled_runtime_is_slow_and_then_dead() {
        let ann = member("ann", 1);
        let mut membership = with(&[&ann]);
        assert_eq!(membership.beat(beat(&ann, 1, 30_000), Millis(500)), Some(vec![]));
        let stalled = membership.beat(beat(&ann, 2, 30_001), Millis(1_000));
        assert_eq!(stalled, Some(vec![dead(&ann, Reason::RuntimeStalled)]));
    }

    #[test]
    fn a_node_that_beats_and_cannot_be_reached_is_dead_in_the_end() {
        let (ann, bob) = (member("ann", 1), member("bob", 1));
        let mut membership = with(&[&ann, &bob]);
        let mut dead_at = |is_linked, ms| {
            let effects = membership.links(|name| is_linked || *name == bob.name, Millis(ms));
            (effects.contains(&dead(&ann, Reason::Unlinked)), membership.unlinked())
        };
        assert_eq!(dead_at(false, 0), (false, 1));
        assert_eq!(dead_at(false, UNLINKED_MS - 1), (false, 1));
        assert_eq!(dead_at(true, UNLINKED_MS), (false, 0), "it worked again in time");
        assert_eq!(dead_at(false, UNLINKED_MS + 500), (false, 1));
        assert_eq!(dead_at(false, 2 * UNLINKED_MS + 499), (false, 1));
        assert_eq!(dead_at(false, 2 * UNLINKED_MS + 500), (true, 0));
        assert_eq!(dead_at(false, 4 * UNLINKED_MS), (false, 0));
    }

    #[test]
    fn a_node_without_a_link_is_tried_at_once_and_then_now_and_again() {
        let (ann, bob) = (member("ann", 1), member("bob", 1));
        let mut membership = with(&[&ann, &bob]);
        let mut tried = Vec::new();
        for ms in (0..5_000).step_by(100) {
            for effect in membership.links(|name| *name == bob.name, Millis(ms)) {
                assert_eq!(effect, Effect::Reach { member: ann.clone() });
                tried.push(ms);
            }
        }
        assert_eq!(tried, [0, 2_000, 4_000]);
    }

    #[test]
    fn who_reaches_less_than_half_of_the_nodes_says_nothing_about_them() {
        let members = ["ann", "bob", "cid"].map(|name| member(name, 1));
        let mut membership = with(&members.each_ref());
        let is_dead = |effect: &Effect| matches!(effect, Effect::Dead { .. });
        let is_cid = |name: &ProcessName| name.as_str() == "cid";
        let late = Millis(2 * UNLINKED_MS);
        assert!(!membership.links(is_cid, Millis(0)).iter().any(is_dead));
        assert!(!membership.is_cut_off(Millis(0)));
        assert!(!membership.links(is_cid, late).iter().any(is_dead));
        assert!(membership.is_cut_off(late));
        let is_not_ann = |name: &ProcessName| name.as_str() != "ann";
        let verdicts = membership.links(is_not_ann, late);
        assert!(verdicts.contains(&dead(&members[0], Reason::Unlinked)), "{verdicts:?}");
        assert!(!membership.is_cut_off(late));
    }

    #[test]
    fn a_dead_incarnation_never_comes_back() {
        let (ann, later) = (member("ann", 2), member("ann", 3));
        let mut membership = with(&[&ann]);
        membership.left(&ann);
        assert_eq!(membership.beat(beat(&ann, 1, 0), Millis(10)), None);
        assert!(membership.joined(joining(&ann), Millis(10)).is_err());
        assert!(membership.joined(joining(&member("ann", 1)), Millis(10)).is_err());
        let joined = membership.joined(joining(&later), Millis(10)).unwrap();
        assert_eq!(joined, [alive(&later, Reason::Joined)]);
    }

    #[test]
    fn what_an_earlier_leader_buried_stays_dead() {
        let ann = member("ann", 2);
        let mut membership = Membership::new();
        membership.buried(&ann);
        assert!(membership.joined(joining(&ann), Millis(0)).is_err());
    }

    #[test]
    fn a_newer_incarnation_replaces_the_older() {
        let (ann, later) = (member("ann", 1), member("ann", 2));
        let mut membership = with(&[&ann]);
        let joined = membership.joined(joining(&later), Millis(10)).unwrap();
        assert_eq!(joined, [dead(&ann, Reason::Replaced), alive(&later, Reason::Joined)]);
        assert!(membership.joined(joining(&ann), Millis(20)).is_err());
        assert_eq!(membership.beat(beat(&ann, 9, 0), Millis(30)), None);
    }

    #[test]
    fn joining_again_is_no_news() {
        let ann = member("ann", 1);
        let mut membership = with(&[&ann]);
        assert_eq!(membership.joined(joining(&ann), Millis(10)).unwrap(), []);
    }

    #[test]
    fn an_overtaken_beat_says_nothing() {
        let ann = member("ann", 1);
        let mut membership = with(&[&ann]);
        membership.beat(beat(&ann, 2, 0), Millis(500));
        assert_eq!(membership.beat(beat(&ann, 1, 0), Millis(510)), None);
    }

    #[test]
    fn the_brake_holds_when_more_than_half_fall_silent_together() {
        let all = ["ann", "bob", "cid", "dan"].map(|name| member(name, 1));
        let check = |silent: &[(usize, u64)], now: u64, expected: Brake| {
            let mut membership = with(&all.each_ref());
            for (index, at) in silent {
                membership.session_lost(&all[*index].name, Millis(*at));
                membership.probe_result(&all[*index], Probe::Refused);
            }
            assert_eq!(membership.brake(Millis(now)), expected, "{silent:?}");
        };
        check(&[(0, 10), (1, 20)], 30, Brake::Off);
        check(&[(0, 10), (1, 20), (2, 30)], 40, Brake::On { silent: 3, of: 4 });
        check(&[(0, 10), (1, 20), (2, 3_000)], 3_010, Brake::Off);
    }

    #[test]
    fn a_cordon_is_by_name_and_outlasts_the_run() {
        let mut membership = Membership::new();
        let admission =
            |membership: &Membership| membership.nodes().next().map(|node| node.admission).unwrap();
        assert!(membership.cordon(&member("ann", 1).name, true));
        assert!(!membership.cordon(&member("ann", 1).name, true), "it is so already");
        membership.joined(joining(&member("ann", 1)), Millis(0)).unwrap();
        assert_eq!(admission(&membership), Admission::Cordoned);
        membership.joined(joining(&member("ann", 2)), Millis(10)).unwrap();
        assert_eq!(admission(&membership), Admission::Cordoned);
        assert!(membership.cordon(&member("ann", 1).name, false));
        assert_eq!(admission(&membership), Admission::Open);
    }

    #[test]
    fn a_drain_is_of_one_run() {
        let mut membership = Membership::new();
        membership.joined(joining(&member("ann", 1)), Millis(0)).unwrap();
        assert!(membership.drain(&member("ann", 1)));
        assert!(!membership.drain(&member("ann", 1)), "it is so already");
        assert!(!membership.drain(&member("ann", 2)), "it is not in");
        membership.cordon(&member("ann", 1).name, true);
        assert_eq!(membership.nodes().next().unwrap().admission, Admission::Draining);
        membership.cordon(&member("ann", 1).name, false);
        membership.joined(joining(&member("ann", 2)), Millis(10)).unwrap();
        assert_eq!(membership.nodes().next().unwrap().admission, Admission::Open);
    }

    #[test]
    fn who_was_not_heard_for_three_beats_is_not_counted() {
        let mut sightings = Sightings::new();
        sightings.heard(&"ann".parse().unwrap(), Millis(0));
        sightings.heard(&"bob".parse().unwrap(), Millis(1_000));
        assert_eq!(sightings.count(Millis(1_499)), 2);
        assert_eq!(sightings.count(Millis(1_500)), 1);
        sightings.lost(&"bob".parse().unwrap());
        assert_eq!(sightings.count(Millis(1_500)), 0);
    }
}
