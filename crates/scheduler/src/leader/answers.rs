//! What people and other parts of the control plane ask the leader.

use std::collections::BTreeMap;

use domain::membership::{NodeView, Standing};
use domain::place::{Decision, Verdict, Why};
use domain::{Capability, Member, ProcessName, Reason, ShardId};
use proto::link::PutNode;
use proto::v1;

use super::Leader;
use super::facts::{DROPPED, Facts, GRANTED, OPEN, STOPPED, UNOWNED};
use super::roster::{ALIVE, STORELESS, SUSPECT, is_in};
use crate::metrics;

/// Which offers are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Empty for all names; a trailing `*` stands for every name that begins so.
    pub name: String,
    pub version_min: u32,
    pub attributes: BTreeMap<String, String>,
}

impl Query {
    fn is_met_by(&self, offer: &Capability) -> bool {
        let is_named = match self.name.strip_suffix('*') {
            Some(prefix) => offer.name.as_str().starts_with(prefix),
            None => self.name.is_empty() || self.name == offer.name.as_str(),
        };
        is_named && offer.has(self.version_min, &self.attributes)
    }
}

fn signed(number: impl TryInto<i32>) -> i32 {
    number.try_into().unwrap_or(i32::MAX)
}

impl Leader {
    pub(crate) fn nodes(&self) -> Vec<v1::Node> {
        let mut shards: BTreeMap<Member, Vec<i32>> = BTreeMap::new();
        for (shard, entry) in self.ownership.map() {
            shards.entry(entry.member).or_default().push(signed(shard.0));
        }
        let alive: BTreeMap<&ProcessName, &NodeView> =
            self.membership.nodes().map(|node| (&node.member().name, node)).collect();
        let node = |(name, row): (&ProcessName, &PutNode)| {
            let alive = alive.get(name);
            let shards = alive.and_then(|node| shards.get(node.member())).cloned();
            api_node(row, alive.copied(), shards.unwrap_or_default())
        };
        self.roster.rows.iter().map(node).collect()
    }

    pub(crate) fn shards(&self) -> Vec<v1::Shard> {
        let map = self.ownership.map();
        let shard = |(id, facts): (&ShardId, &Facts)| {
            let entry = map.get(id);
            let state = match entry {
                _ if self.ownership.is_stopped(*id) => STOPPED,
                Some(entry) if entry.is_open => OPEN,
                Some(_) => GRANTED,
                None => UNOWNED,
            };
            v1::Shard {
                id: signed(id.0),
                state: state.to_owned(),
                node: entry.map(|entry| entry.member.name.to_string()).unwrap_or_default(),
                incarnation: entry.map_or(0, |entry| entry.member.incarnation.0.cast_signed()),
                epoch: entry.map_or(0, |entry| entry.epoch.0.cast_signed()),
                reason: facts.reason.map(|reason| reason.to_string()).unwrap_or_default(),
                location: format!("{}/{}", facts.row.store, facts.row.database),
            }
        };
        self.shards.iter().map(shard).collect()
    }

    /// Every offer of a member that meets `query`, with how busy its node is with it.
    pub(crate) fn find(&self, query: &Query) -> Vec<v1::Capability> {
        let mut found = Vec::new();
        for (name, info) in &self.roster.members {
            let member = Member { name: name.clone(), incarnation: info.incarnation };
            let node = self.membership.node(&member);
            for offer in info.offers.iter().filter(|offer| query.is_met_by(&offer.capability)) {
                let Capability { name: capability, version, attributes } = &offer.capability;
                let mut loads = node.iter().flat_map(|node| &node.loads);
                let load = loads.find(|load| load.capability == capability.as_str());
                found.push(v1::Capability {
                    name: capability.to_string(),
                    version: signed(*version),
                    attributes: attributes.clone().into_iter().collect(),
                    node: name.to_string(),
                    incarnation: info.incarnation.0.cast_signed(),
                    load: load.map_or(0, |load| signed(load.running.saturating_add(load.queued))),
                    capacity: signed(offer.capacity),
                });
            }
        }
        found
    }

    /// Where a shard belongs now, and why: one line for the choice and one for each node.
    pub(crate) fn placement(&self, shard: ShardId) -> Vec<String> {
        self.ownership.explain(shard).as_ref().map(lines).unwrap_or_default()
    }

    pub(super) fn count_members(&self) {
        let of =
            |standing| self.membership.nodes().filter(|node| node.standing() == standing).count();
        let standings = [
            (ALIVE, Standing::Answering),
            (SUSPECT, Standing::Suspect),
            (STORELESS, Standing::Storeless),
        ];
        for (state, standing) in standings {
            metrics::MEMBERS.with_label_values(&[state]).set(signed(of(standing)).into());
        }
    }

    pub(super) fn count_shards(&self) {
        for state in [OPEN, GRANTED, DROPPED, STOPPED, UNOWNED] {
            let count = self.shards.values().filter(|facts| facts.state == state).count();
            metrics::SHARDS.with_label_values(&[state]).set(signed(count).into());
        }
    }
}

/// A node as its row says, and as its beats say if it is in.
pub(crate) fn api_node(row: &PutNode, alive: Option<&NodeView>, shards: Vec<i32>) -> v1::Node {
    // It was alive under the leader before this one, and has not come yet.
    let is_awaited = is_in(row) && alive.is_none_or(|node| !node.has_joined());
    let reason = u16::try_from(row.reason).ok().and_then(Reason::from_code).filter(|_| !is_awaited);
    v1::Node {
        name: row.name.clone(),
        incarnation: row.incarnation.cast_signed(),
        state: if is_awaited { SUSPECT.to_owned() } else { row.state.clone() },
        reason: reason.map(|reason| reason.to_string()).unwrap_or_default(),
        zone: row.zone.clone(),
        address: row.address.clone(),
        capacity: signed(row.capacity),
        hot_agents: alive.map_or(0, |node| signed(node.hot_agents)),
        shards,
        admission: row.admission.clone(),
    }
}

fn lines(decision: &Decision) -> Vec<String> {
    let shard = decision.shard;
    let owner = decision.owner.as_ref().map_or("no node".to_owned(), ToString::to_string);
    let why = match decision.why {
        Why::Stays => "stays where it is",
        Why::Ranked => "best-ranked node with room",
        Why::ZoneFull => "best-ranked node with room, though its zone has its share",
        Why::NoTarget => "no node may have it",
    };
    let mut lines = vec![format!("shard {shard} belongs to {owner}: {why}")];
    lines.extend(decision.scores.iter().map(|score| {
        let verdict = match score.verdict {
            Verdict::Chosen => "chosen",
            Verdict::Outranked => "another was chosen",
            Verdict::Full => "has its share of shards",
            Verdict::ZoneFull => "its zone has its share of shards",
            Verdict::Suspect => "suspected: gets nothing new",
            Verdict::Storeless => "does not reach its store: gives everything away",
            Verdict::Cordoned => "cordoned: gets nothing new",
            Verdict::Draining => "draining: gives everything away",
        };
        let (node, load, max) = (&score.node, score.load, score.load_max);
        format!("{node}: score {:.3}, {load} of {max} shards, {verdict}", score.score)
    }));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_are_found_by_name_prefix_version_and_attributes() {
        let offer = Capability {
            name: "phase/action".parse().unwrap(),
            version: 2,
            attributes: [("modality".to_owned(), "text".to_owned())].into(),
        };
        let check = |name: &str, version_min, modality: Option<&str>, expected| {
            let attributes = modality.map(|m| ("modality".to_owned(), m.to_owned()));
            let attributes = attributes.into_iter().collect();
            let query = Query { name: name.to_owned(), version_min, attributes };
            assert_eq!(query.is_met_by(&offer), expected, "{query:?}");
        };
        check("", 0, None, true);
        check("phase/*", 2, Some("text"), true);
        check("phase/action", 0, None, true);
        check("phase/act", 0, None, false);
        check("tool/*", 0, None, false);
        check("", 3, None, false);
        check("", 0, Some("image"), false);
    }
}
