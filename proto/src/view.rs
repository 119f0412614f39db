//! The view as it travels.

use std::sync::Arc;

use domain::slot::{ShardRange, ShardTable};
use domain::view::{Delta, MemberInfo, Offer, Place, Version};
use domain::{Capability, Class, Epoch, Error, Incarnation, Member, ShardId, Term};

use crate::link;

/// A delta as a message.
pub fn to_message(delta: &Delta) -> link::View {
    let ranges = delta.table.iter().flat_map(|table| table.ranges());
    link::View {
        term: delta.version.term.0,
        number: delta.version.number,
        base: delta.base.map_or(0, |base| base.number),
        base_term: delta.base.map_or(0, |base| base.term.0),
        shards: delta.shards.iter().map(|(shard, place)| shard_to_message(*shard, place)).collect(),
        members: delta
            .members
            .iter()
            .map(|(name, info)| member_to_message(name.to_string(), info))
            .collect(),
        gone: delta.gone.iter().map(ToString::to_string).collect(),
        ranges: ranges
            .map(|range| link::ShardRange {
                class: range.class.0.into(),
                first: range.first.0,
                count: range.count.into(),
            })
            .collect(),
    }
}

fn shard_to_message(shard: ShardId, place: &Place) -> link::ShardView {
    let owner = place.owner.as_ref();
    link::ShardView {
        shard: shard.0,
        node: owner.map(|owner| owner.name.to_string()).unwrap_or_default(),
        incarnation: owner.map_or(0, |owner| owner.incarnation.0),
        epoch: place.epoch.0,
        open: place.open,
        stopped: place.stopped,
    }
}

fn member_to_message(name: String, info: &MemberInfo) -> link::MemberView {
    link::MemberView {
        name,
        incarnation: info.incarnation.0,
        role: info.role.to_string(),
        address: info.address.clone(),
        capabilities: info.offers.iter().map(offer_to_message).collect(),
        loads: Vec::new(),
        beat: info.beat.clone(),
    }
}

/// An offer as a message.
pub fn offer_to_message(offer: &Offer) -> link::CapabilityOffer {
    link::CapabilityOffer {
        name: offer.capability.name.to_string(),
        version: offer.capability.version,
        attributes: offer.capability.attributes.clone().into_iter().collect(),
        capacity: offer.capacity,
    }
}

/// # Errors
/// A name that no capability has.
pub fn offer_from_message(offer: link::CapabilityOffer) -> Result<Offer, Error> {
    let capability = Capability {
        name: offer.name.parse()?,
        version: offer.version,
        attributes: offer.attributes.into_iter().collect(),
    };
    Ok(Offer { capability, capacity: offer.capacity })
}

/// Reads a delta.
///
/// # Errors
/// A name, role or range that is not valid.
pub fn from_message(view: link::View) -> Result<Delta, Error> {
    let version = Version { term: Term(view.term), number: view.number };
    let base =
        (view.base != 0).then_some(Version { term: Term(view.base_term), number: view.base });
    let table = match base {
        Some(_) => None,
        None => Some(table(&view.ranges)?),
    };
    let mut delta =
        Delta { base, version, table, shards: Vec::new(), members: Vec::new(), gone: Vec::new() };
    for shard in view.shards {
        delta.shards.push((ShardId(shard.shard), place(shard)?));
    }
    for member in view.members {
        let offers: Result<Vec<Offer>, Error> =
            member.capabilities.into_iter().map(offer_from_message).collect();
        let info = MemberInfo {
            role: member.role.parse()?,
            incarnation: Incarnation(member.incarnation),
            address: member.address,
            beat: member.beat,
            offers: Arc::from(offers?),
        };
        delta.members.push((member.name.parse()?, info));
    }
    for name in view.gone {
        delta.gone.push(name.parse()?);
    }
    Ok(delta)
}

fn place(shard: link::ShardView) -> Result<Place, Error> {
    let owner = match shard.node.as_str() {
        "" => None,
        name => Some(Member { name: name.parse()?, incarnation: Incarnation(shard.incarnation) }),
    };
    Ok(Place { owner, epoch: Epoch(shard.epoch), open: shard.open, stopped: shard.stopped })
}

fn table(ranges: &[link::ShardRange]) -> Result<ShardTable, Error> {
    let narrow = |number: u32| {
        u16::try_from(number).map_err(|_| Error::Malformed {
            what: "shard range",
            value: number.to_string(),
            allowed: "numbers up to 65535",
        })
    };
    let ranges: Result<Vec<ShardRange>, Error> = ranges
        .iter()
        .map(|range| {
            Ok(ShardRange {
                class: Class(narrow(range.class)?),
                first: ShardId(range.first),
                count: narrow(range.count)?,
            })
        })
        .collect();
    ShardTable::new(ranges?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::Role;
    use domain::view::View;

    #[test]
    fn whole_views_and_deltas_read_back() {
        let version = |number| Version { term: Term(3), number };
        let mut first = View::new(version(1), ShardTable::single(12).unwrap());
        let offer = Offer {
            capability: Capability {
                name: "phase/action".parse().unwrap(),
                version: 1,
                attributes: [("modality".to_owned(), "text".to_owned())].into(),
            },
            capacity: 4,
        };
        let info = MemberInfo {
            role: Role::Node,
            incarnation: Incarnation(9),
            address: "host:1".into(),
            beat: "host:2".into(),
            offers: [offer].into(),
        };
        first.members.insert("node-1".parse().unwrap(), info);
        let whole = first.whole();
        assert_eq!(from_message(to_message(&whole)), Ok(whole));
        let mut second = first.clone();
        second.version = version(2);
        let owner = Some(Member { name: "node-1".parse().unwrap(), incarnation: Incarnation(9) });
        second
            .shards
            .insert(ShardId(1), Place { owner, epoch: Epoch(2), open: true, stopped: false });
        let stopped = Place { stopped: true, ..Place::default() };
        second.shards.insert(ShardId(2), stopped);
        let delta = second.since(&first);
        assert_eq!(from_message(to_message(&delta)), Ok(delta));
    }
}
