//! The cluster as its leader describes it: who is there, what each offers, who owns which shard.
//!
//! A cache: the owner row in a shard's database is the truth. A view travels as versioned deltas; one that does not
//! fit on what is held is refused, and the whole is asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::slot::ShardTable;
use crate::{
    AgentId, Capability, CapabilityQuery, Class, Epoch, Incarnation, Member, ProcessName, Role,
    ShardId, Slot, Term,
};

/// Versions of one leadership count up; a later leadership's are newer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    pub term: Term,
    pub number: u64,
}

/// Who owns a shard, as the leader knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub owner: Option<Member>,
    pub epoch: Epoch,
    /// The owner has opened it and takes work.
    pub open: bool,
    /// Its store lost what was acknowledged: nobody serves it until an operator has looked.
    pub stopped: bool,
}

/// A capability with how many jobs its pool takes at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    pub capability: Capability,
    pub capacity: u32,
}

/// One live process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberInfo {
    pub role: Role,
    pub incarnation: Incarnation,
    /// host:port of its cluster listener.
    pub address: String,
    /// host:port of its heartbeat listener, if it has one.
    pub beat: String,
    pub offers: Arc<[Offer]>,
}

/// The cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub version: Version,
    pub table: ShardTable,
    pub shards: BTreeMap<ShardId, Place>,
    pub members: BTreeMap<ProcessName, MemberInfo>,
}

/// What changed from one version to another; from nothing when `base` is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta {
    pub base: Option<Version>,
    pub version: Version,
    /// Only in a whole view.
    pub table: Option<ShardTable>,
    pub shards: Vec<(ShardId, Place)>,
    pub members: Vec<(ProcessName, MemberInfo)>,
    pub gone: Vec<ProcessName>,
}

/// What became of a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    Changed,
    /// It is older than what is held, or the same.
    Old,
    /// It rests on a version that is not held: ask for the whole.
    Gap,
}

impl View {
    /// A view of which only the shards are known.
    pub fn new(version: Version, table: ShardTable) -> Self {
        let shards = table.shards().map(|shard| (shard, Place::default())).collect();
        Self { version, table, shards, members: BTreeMap::new() }
    }

    /// Everything, as a delta from nothing.
    pub fn whole(&self) -> Delta {
        Delta {
            base: None,
            version: self.version,
            table: Some(self.table.clone()),
            shards: self.shards.iter().map(|(shard, place)| (*shard, place.clone())).collect(),
            members: self.members.iter().map(|(name, info)| (name.clone(), info.clone())).collect(),
            gone: Vec::new(),
        }
    }

    /// What leads from `older` to this view.
    pub fn since(&self, older: &Self) -> Delta {
        let shards =
            self.shards.iter().filter(|(shard, place)| older.shards.get(shard) != Some(place));
        let members =
            self.members.iter().filter(|(name, info)| older.members.get(*name) != Some(info));
        let gone = older.members.keys().filter(|name| !self.members.contains_key(*name));
        Delta {
            base: Some(older.version),
            version: self.version,
            table: None,
            shards: shards.map(|(shard, place)| (*shard, place.clone())).collect(),
            members: members.map(|(name, info)| (name.clone(), info.clone())).collect(),
            gone: gone.cloned().collect(),
        }
    }

    /// Applies `delta` to what is held.
    pub fn apply(held: &mut Option<Self>, delta: Delta) -> Applied {
        if held.as_ref().is_some_and(|held| delta.version <= held.version) {
            return Applied::Old;
        }
        match (delta.base, delta.table, held.as_mut()) {
            (None, Some(table), _) => {
                *held = Some(Self {
                    version: delta.version,
                    table,
                    shards: delta.shards.into_iter().collect(),
                    members: delta.members.into_iter().collect(),
                });
                Applied::Changed
            }
            (Some(base), None, Some(view)) if base == view.version => {
                view.version = delta.version;
                view.shards.extend(delta.shards);
                view.members.extend(delta.members);
                for name in delta.gone {
                    view.members.remove(&name);
                }
                Applied::Changed
            }
            _ => Applied::Gap,
        }
    }

    /// The shard of an agent of class `{}`.
    pub fn shard_of(&self, agent: &AgentId) -> Option<ShardId> {
        self.table.shard_of(Class(0), agent.slot())
    }

    pub fn shard_at(&self, class: Class, slot: Slot) -> Option<ShardId> {
        self.table.shard_of(class, slot)
    }

    /// Who owns a shard now, if somebody does.
    pub fn owner(&self, shard: ShardId) -> Option<(&Member, Epoch)> {
        let place = self.shards.get(&shard)?;
        Some((place.owner.as_ref()?, place.epoch))
    }

    /// Whether this very run of a process is among the live.
    pub fn is_live(&self, member: &Member) -> bool {
        self.members.get(&member.name).is_some_and(|info| info.incarnation == member.incarnation)
    }

    /// What this view says to a run that joined with the view `joined_at`.
    pub fn word_to(&self, member: &Member, joined_at: Version) -> Word {
        if self.version < joined_at {
            return Word::Nothing;
        }
        match (self.is_live(member), joined_at.term < self.version.term) {
            (false, _) => Word::Dead,
            (true, true) => Word::JoinAgain,
            (true, false) => Word::Nothing,
        }
    }

    /// Every live offer that meets `query`, by process name.
    pub fn offers<'a>(
        &'a self,
        query: &'a CapabilityQuery,
    ) -> impl Iterator<Item = (&'a ProcessName, &'a Offer)> + Clone {
        self.members.iter().flat_map(move |(name, info)| {
            info.offers
                .iter()
                .filter(|offer| offer.capability.meets(query))
                .map(move |offer| (name, offer))
        })
    }
}

/// What a view says to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// All is as it was, or the view is older than what is known.
    Nothing,
    /// Another leadership began: whoever does not come gets nothing new.
    JoinAgain,
    /// It was declared dead.
    Dead,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(term: u64, number: u64) -> Version {
        Version { term: Term(term), number }
    }

    fn view(number: u64) -> View {
        View::new(version(1, number), ShardTable::single(4).unwrap())
    }

    fn info(incarnation: u64) -> MemberInfo {
        let incarnation = Incarnation(incarnation);
        let (role, offers) = (Role::Node, [].into());
        MemberInfo { role, incarnation, address: "host:1".into(), beat: String::new(), offers }
    }

    #[test]
    fn a_delta_leads_from_its_base_to_the_new_view() {
        let mut first = view(1);
        first.members.insert("node-1".parse().unwrap(), info(1));
        let mut second = first.clone();
        second.version = version(1, 2);
        second.members.clear();
        second.members.insert("node-2".parse().unwrap(), info(1));
        let owner = Some(Member { name: "node-2".parse().unwrap(), incarnation: Incarnation(1) });
        second.shards.insert(ShardId(3), Place { owner, epoch: Epoch(1), ..Place::default() });
        let mut held = None;
        assert_eq!(View::apply(&mut held, first.whole()), Applied::Changed);
        let delta = second.since(&first);
        assert_eq!((delta.shards.len(), delta.members.len(), delta.gone.len()), (1, 1, 1));
        assert_eq!(View::apply(&mut held, delta), Applied::Changed);
        assert_eq!(held, Some(second));
    }

    #[test]
    fn a_member_of_an_earlier_term_is_asked_to_join_again_unless_it_is_dead() {
        let node = |incarnation| Member {
            name: "node-1".parse().unwrap(),
            incarnation: Incarnation(incarnation),
        };
        let mut view = view(5);
        view.version = version(2, 5);
        view.members.insert(node(1).name, info(1));
        let check = |incarnation, joined_at, word| {
            assert_eq!(view.word_to(&node(incarnation), joined_at), word);
        };
        check(1, version(1, 9), Word::JoinAgain);
        check(1, version(2, 5), Word::Nothing);
        check(1, version(2, 6), Word::Nothing);
        check(2, version(1, 9), Word::Dead);
        check(2, version(2, 5), Word::Dead);
        check(2, version(2, 6), Word::Nothing);
        check(2, version(3, 1), Word::Nothing);
    }

    #[test]
    fn a_delta_on_another_base_is_a_gap_and_an_old_one_is_nothing() {
        let mut held = None;
        assert_eq!(View::apply(&mut held, view(2).since(&view(1))), Applied::Gap);
        View::apply(&mut held, view(2).whole());
        assert_eq!(View::apply(&mut held, view(4).since(&view(3))), Applied::Gap);
        assert_eq!(View::apply(&mut held, view(2).whole()), Applied::Old);
        assert_eq!(View::apply(&mut held, view(1).whole()), Applied::Old);
        assert_eq!(held, Some(view(2)));
    }

    #[test]
    fn a_later_leadership_is_newer() {
        assert!(version(1, 99) < version(2, 1));
    }
}
