//! Decides which node gets which shard.
//!
//! Pure: the view comes in, a [`Placement`] comes out, the same for the same view in any order. Weighted rendezvous
//! under a load bound: each node ranks each shard by a hash, a shard goes to the best-ranked node with room, and stays
//! where it is while that node has room for it. Never moves anything: that is fencing, decided in
//! [`crate::ownership`].

use std::collections::BTreeMap;

use crate::membership::Standing;
use crate::{Member, ProcessName, Reason, ShardId};

/// A node that may own shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub member: Member,
    pub zone: String,
    /// Its weight: a node of capacity 2 gets twice the shards of one with 1; 0 gets none.
    pub capacity: u32,
    /// A suspect keeps what it has and gets nothing new; one that does not reach its store keeps nothing.
    pub standing: Standing,
    pub admission: Admission,
}

/// Whether an operator lets a node have shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admission {
    #[default]
    Open,
    /// It keeps what it has and gets nothing new, until it is uncordoned.
    Cordoned,
    /// It is about to leave: everything that it has goes elsewhere.
    Draining,
}

impl Admission {
    /// As it is stored; the usual one is nothing.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
        }
    }
}

impl Candidate {
    /// Whether it may get something new.
    pub fn takes(&self) -> bool {
        self.standing == Standing::Answering && self.admission == Admission::Open
    }

    /// Why everything that it has goes elsewhere, if it does.
    pub fn gives_away(&self) -> Option<Reason> {
        match (self.standing, self.admission) {
            (Standing::Storeless, _) => Some(Reason::OwnerStoreless),
            (_, Admission::Draining) => Some(Reason::OwnerDraining),
            (_, Admission::Open | Admission::Cordoned) => None,
        }
    }
}

/// Why a shard goes where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is there, and there is room for it.
    Stays,
    /// The best-ranked node with room in the node and in its zone.
    Ranked,
    /// The best-ranked node with room, though its zone has more than its share.
    ZoneFull,
    /// No node may have it.
    NoTarget,
}

/// Why a node did not get a shard, or did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Chosen,
    /// It had room, but another was chosen.
    Outranked,
    /// It has its share already.
    Full,
    /// Its zone has its share already.
    ZoneFull,
    /// It is suspected: nothing new for it.
    Suspect,
    /// It does not reach its store.
    Storeless,
    /// It is cordoned: nothing new for it.
    Cordoned,
    /// It is about to leave.
    Draining,
}

/// One node's rank for one shard.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    pub node: ProcessName,
    /// Larger is better.
    pub score: f64,
    /// How many shards it had when this one was decided, and how many it may have.
    pub load: u32,
    pub load_max: u32,
    pub verdict: Verdict,
}

/// Where a shard belongs, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub shard: ShardId,
    pub owner: Option<Member>,
    pub why: Why,
    /// Best first.
    pub scores: Vec<Score>,
}

/// Where every shard belongs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Placement {
    pub decisions: BTreeMap<ShardId, Decision>,
}

impl Placement {
    pub fn owner(&self, shard: ShardId) -> Option<&Member> {
        self.decisions.get(&shard)?.owner.as_ref()
    }
}

/// Places `shards` on `candidates`, moving as little as the load bound allows away from `current`.
pub fn place(
    shards: &[ShardId],
    current: &BTreeMap<ShardId, ProcessName>,
    candidates: &[Candidate],
) -> Placement {
    let mut nodes: Vec<Node> = candidates.iter().map(Node::new).collect();
    nodes.sort_by(|a, b| a.candidate.member.cmp(&b.candidate.member));
    let mut shards = shards.to_vec();
    shards.sort_unstable();
    shards.dedup();
    let mut zones = bound(&mut nodes, shards.len());

    let staying = staying(&shards, current, &nodes);
    for index in staying.values() {
        nodes[*index].take(&mut zones);
    }
    let decide = |shard: ShardId| {
        let decision = match staying.get(&shard) {
            Some(index) => stay(shard, *index, &nodes),
            None => choose(shard, &mut nodes, &mut zones),
        };
        (shard, decision)
    };
    Placement { decisions: shards.iter().copied().map(decide).collect() }
}

struct Node<'a> {
    candidate: &'a Candidate,
    load: u32,
    load_max: u32,
}

#[derive(Default)]
struct Zone {
    capacity: u64,
    load: u32,
    load_max: u32,
}

type Zones<'a> = BTreeMap<&'a str, Zone>;

impl<'a> Node<'a> {
    fn new(candidate: &'a Candidate) -> Self {
        Self { candidate, load: 0, load_max: 0 }
    }

    fn has_room(&self) -> bool {
        self.load < self.load_max
    }

    fn take(&mut self, zones: &mut Zones<'a>) {
        self.load += 1;
        if let Some(zone) = zones.get_mut(self.candidate.zone.as_str()) {
            zone.load += 1;
        }
    }

    /// Weighted rendezvous: with `h` uniform in (0, 1), `-weight / ln h` is largest for a node as often as its share of
    /// the weights. By name, so that a node that comes back as a new incarnation gets its shards back.
    fn score(&self, shard: ShardId) -> f64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&shard.0.to_le_bytes());
        hasher.update(self.candidate.member.name.as_str().as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        // 53 bits are what an f64 holds exactly; the half keeps it off 0 and 1.
        let uniform = ((u64::from_le_bytes(first) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        -f64::from(self.candidate.capacity) / uniform.ln()
    }
}

/// Sets every node's bound, its share rounded up, and gives the zones with theirs.
///
/// Shares are of the nodes that may get something: rounded up they add up to at least all shards, so that there is always
/// a node with room while there is one.
fn bound<'a>(nodes: &mut [Node<'a>], shards: usize) -> Zones<'a> {
    let takers = nodes.iter().filter(|node| node.candidate.takes());
    let total: u64 = takers.map(|node| u64::from(node.candidate.capacity)).sum();
    let share = |capacity: u64| {
        let share = (shards as u64 * capacity).div_ceil(total.max(1));
        u32::try_from(share).unwrap_or(u32::MAX)
    };
    let mut zones = Zones::new();
    for node in nodes {
        let capacity = u64::from(node.candidate.capacity);
        node.load_max = match node.candidate.admission {
            _ if node.candidate.gives_away().is_some() => 0,
            Admission::Open | Admission::Draining => share(capacity),
            Admission::Cordoned => u32::MAX,
        };
        zones.entry(node.candidate.zone.as_str()).or_default().capacity += capacity;
    }
    for zone in zones.values_mut() {
        zone.load_max = share(zone.capacity);
    }
    zones
}

/// The shards that stay: on each node up to its bound, those that it ranks highest.
fn staying(
    shards: &[ShardId],
    current: &BTreeMap<ShardId, ProcessName>,
    nodes: &[Node<'_>],
) -> BTreeMap<ShardId, usize> {
    let mut staying = BTreeMap::new();
    for (index, node) in nodes.iter().enumerate() {
        let name = &node.candidate.member.name;
        let mut held: Vec<ShardId> =
            shards.iter().copied().filter(|shard| current.get(shard) == Some(name)).collect();
        held.sort_by(|a, b| node.score(*b).total_cmp(&node.score(*a)).then(a.cmp(b)));
        let kept = held.into_iter().take(node.load_max as usize);
        staying.extend(kept.map(|shard| (shard, index)));
    }
    staying
}

/// Node indices, best first, with their scores for `shard`.
fn ranking(shard: ShardId, nodes: &[Node<'_>]) -> Vec<(usize, f64)> {
    let scored = nodes.iter().enumerate().map(|(index, node)| (index, node.score(shard)));
    let mut ranking: Vec<(usize, f64)> = scored.collect();
    ranking.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    ranking
}

fn stay(shard: ShardId, owner: usize, nodes: &[Node<'_>]) -> Decision {
    let verdict = |index: usize| match index == owner {
        true => Verdict::Chosen,
        false => Verdict::Outranked,
    };
    let scores = ranking(shard, nodes)
        .into_iter()
        .map(|(index, score)| nodes[index].scored(score, verdict(index)))
        .collect();
    let owner = Some(nodes[owner].candidate.member.clone());
    Decision { shard, owner, why: Why::Stays, scores }
}

fn choose<'a>(shard: ShardId, nodes: &mut [Node<'a>], zones: &mut Zones<'a>) -> Decision {
    let ranking = ranking(shard, nodes);
    let verdicts: Vec<Verdict> =
        ranking.iter().map(|(index, _)| nodes[*index].verdict(zones)).collect();
    let first = |wanted: Verdict| verdicts.iter().position(|verdict| *verdict == wanted);
    let (chosen, why) = match (first(Verdict::Outranked), first(Verdict::ZoneFull)) {
        (Some(place), _) => (Some(place), Why::Ranked),
        (None, Some(place)) => (Some(place), Why::ZoneFull),
        (None, None) => (None, Why::NoTarget),
    };
    let scored =
        ranking.iter().zip(verdicts).enumerate().map(|(place, ((index, score), other))| {
            let verdict = if Some(place) == chosen { Verdict::Chosen } else { other };
            nodes[*index].scored(*score, verdict)
        });
    let scores = scored.collect();
    let chosen = chosen.map(|place| ranking[place].0);
    if let Some(index) = chosen {
        nodes[index].take(zones);
    }
    let owner = chosen.map(|index| nodes[index].candidate.member.clone());
    Decision { shard, owner, why, scores }
}

impl Node<'_> {
    /// What speaks against this node, if it is not simply outranked.
    fn verdict(&self, zones: &Zones<'_>) -> Verdict {
        match (self.candidate.standing, self.candidate.admission) {
            (Standing::Suspect, _) => return Verdict::Suspect,
            (Standing::Storeless, _) => return Verdict::Storeless,
            (Standing::Answering, Admission::Cordoned) => return Verdict::Cordoned,
            (Standing::Answering, Admission::Draining) => return Verdict::Draining,
            (Standing::Answering, Admission::Open) => {}
        }
        if !self.has_room() {
            return Verdict::Full;
        }
        match zones.get(self.candidate.zone.as_str()) {
            Some(zone) if zone.load_max <= zone.load => Verdict::ZoneFull,
            Some(_) | None => Verdict::Outranked,
        }
    }

    fn scored(&self, score: f64, verdict: Verdict) -> Score {
        let node = self.candidate.member.name.clone();
        Score { node, score, load: self.load, load_max: self.load_max, verdict }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Incarnation;

    fn candidate(name: usize, zone: usize, capacity: u32) -> Candidate {
        let name = format!("node-{name}").parse().unwrap();
        let member = Member { name, incarnation: Incarnation(1) };
        let (standing, admission) = (Standing::Answering, Admission::Open);
        Candidate { member, zone: format!("z{zone}"), capacity, standing, admission }
    }

    fn shards(count: u32) -> Vec<ShardId> {
        (0..count).map(ShardId).collect()
    }

    fn owners(placement: &Placement) -> BTreeMap<ShardId, ProcessName> {
        let owned = placement.decisions.iter();
        owned.filter_map(|(shard, d)| Some((*shard, d.owner.as_ref()?.name.clone()))).collect()
    }

    fn load(placement: &Placement, candidate: &Candidate) -> usize {
        owners(placement).values().filter(|name| **name == candidate.member.name).count()
    }

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        proptest::collection::vec((0..3usize, 1..5u32), 1..8).prop_map(|nodes| {
            let nodes = nodes.into_iter().enumerate();
            nodes.map(|(name, (zone, capacity))| candidate(name, zone, capacity)).collect()
        })
    }

    proptest! {
        #[test]
        fn when_one_of_equal_nodes_leaves_only_its_shards_move(
            nodes in 2..9usize, zones in 1..4usize, count in 1..100u32, leaver in 0..9usize,
        ) {
            let leaver = leaver % nodes;
            let all: Vec<Candidate> = (0..nodes).map(|n| candidate(n, n % zones, 1)).collect();
            let before = owners(&place(&shards(count), &BTreeMap::new(), &all));
            let rest: Vec<Candidate> =
                all.iter().filter(|c| c.member != all[leaver].member).cloned().collect();
            let after = owners(&place(&shards(count), &before, &rest));
            for (shard, owner) in &before {
                if *owner != all[leaver].member.name {
                    prop_assert_eq!(&after[shard], owner, "shard {} moved", shard);
                }
            }
            prop_assert_eq!(after.len(), count as usize);
        }

        #[test]
        fn the_load_bound_always_holds(
            all in candidates(), count in 1..100u32, current in proptest::collection::vec(0..9usize, 100),
        ) {
            let current = shards(count).into_iter().zip(current);
            let current = current.map(|(s, n)| (s, candidate(n, 0, 1).member.name)).collect();
            let placement = place(&shards(count), &current, &all);
            let total: u32 = all.iter().map(|candidate| candidate.capacity).sum();
            for candidate in &all {
                let bound = (count * candidate.capacity).div_ceil(total) as usize;
                prop_assert!(load(&placement, candidate) <= bound);
            }
            prop_assert_eq!(owners(&placement).len(), count as usize);
        }

        #[test]
        fn the_order_of_nodes_does_not_matter(
            all in candidates().prop_shuffle(), count in 1..50u32,
        ) {
            let mut sorted = all.clone();
            sorted.sort_by(|a, b| a.member.cmp(&b.member));
            let placed = |nodes: &[Candidate]| place(&shards(count), &BTreeMap::new(), nodes);
            prop_assert_eq!(placed(&all), placed(&sorted));
        }
    }

    #[test]
    fn capacity_is_the_share() {
        let all = [candidate(0, 0, 1), candidate(1, 0, 3), candidate(2, 0, 0)];
        let placement = place(&shards(400), &BTreeMap::new(), &all);
        assert_eq!(all.each_ref().map(|node| load(&placement, node)), [100, 300, 0]);
    }

    #[test]
    fn few_shards_are_spread_over_zones() {
        let all = [candidate(0, 0, 1), candidate(1, 0, 1), candidate(2, 1, 1), candidate(3, 1, 1)];
        for first in 0..50 {
            let two = [ShardId(first), ShardId(first + 1)];
            let placement = place(&two, &BTreeMap::new(), &all);
            let zone = |shard| {
                let owner = placement.owner(shard).unwrap();
                &all.iter().find(|candidate| candidate.member == *owner).unwrap().zone
            };
            assert_ne!(zone(two[0]), zone(two[1]));
        }
    }

    #[test]
    fn a_suspect_keeps_what_it_has_and_gets_nothing_new() {
        let mut all = [candidate(0, 0, 1), candidate(1, 0, 1)];
        all[1].standing = Standing::Suspect;
        let current = BTreeMap::from([(ShardId(0), all[1].member.name.clone())]);
        let placement = place(&shards(4), &current, &all);
        assert_eq!(placement.owner(ShardId(0)), Some(&all[1].member));
        assert_eq!(load(&placement, &all[1]), 1);
    }

    #[test]
    fn who_does_not_reach_its_store_keeps_nothing_if_another_does() {
        let mut all = [candidate(0, 0, 1), candidate(1, 0, 1)];
        all[1].standing = Standing::Storeless;
        let current = shards(4).into_iter().map(|shard| (shard, all[1].member.name.clone()));
        let current: BTreeMap<ShardId, ProcessName> = current.collect();
        assert_eq!(load(&place(&shards(4), &current, &all), &all[0]), 4);
        let alone = place(&shards(4), &current, &all[1..]);
        assert_eq!(alone.decisions[&ShardId(0)].why, Why::NoTarget);
    }

    #[test]
    fn nobody_is_no_target() {
        let placement = place(&shards(1), &BTreeMap::new(), &[]);
        assert_eq!(placement.decisions[&ShardId(0)].why, Why::NoTarget);
    }

    #[test]
    fn every_candidate_is_named_with_why_it_was_not_chosen() {
        let all = [candidate(0, 0, 1), candidate(1, 1, 1), candidate(2, 2, 1)];
        let placement = place(&shards(3), &BTreeMap::new(), &all);
        for decision in placement.decisions.values() {
            let chosen = decision.scores.iter().filter(|score| score.verdict == Verdict::Chosen);
            assert_eq!(chosen.count(), 1);
            assert_eq!(decision.scores.len(), 3);
            assert!(decision.scores.is_sorted_by(|a, b| b.score <= a.score));
        }
    }
}
