//! Where an agent lives: its slot, for ever, and the shard that owns the slot now.
//!
//! The hash is frozen: data on disk depends on it. Nothing outside this module knows how slots map onto shards.

use std::fmt;
use std::str::FromStr;

use crate::{AgentId, Error};

/// How many slots there are, in every cluster, for ever.
pub const SLOTS: u16 = 4096;

/// A 4096th part of all agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u16);

impl Slot {
    pub fn new(number: u16) -> Option<Self> {
        (number < SLOTS).then_some(Self(number))
    }

    pub fn get(self) -> u16 {
        self.0
    }
}

/// A placement class, by its number in the control database. 0 is the class `{}` of agents that need nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class(pub u16);

/// The unit of ownership, writing, recovery and backup. Numbered across all classes; text is the number.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct ShardId(pub u32);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for ShardId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        text.parse().map(Self).map_err(|_| Error::malformed("shard", text, "a whole number from 0"))
    }
}

/// blake3 over the length-prefixed (u32, little endian) tenant, name and key; the first 8 bytes as a little-endian
/// number, modulo [`SLOTS`].
pub(crate) fn slot_of(agent: &AgentId) -> Slot {
    let mut hasher = blake3::Hasher::new();
    for part in [agent.tenant.as_str(), agent.name.as_str(), agent.key.as_str()] {
        let len = u32::try_from(part.len()).expect("ids are at most 256 bytes long");
        hasher.update(&len.to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let number = u64::from_le_bytes(first) % u64::from(SLOTS);
    Slot(u16::try_from(number).expect("less than 4096"))
}

/// How the slots of each class are cut into shards: shard `first + i` of a class owns an equal run of slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardTable {
    /// Sorted by class: (class, number of its first shard, how many shards it has).
    ranges: Vec<ShardRange>,
}

/// The shards of one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardRange {
    pub class: Class,
    pub first: ShardId,
    pub count: u16,
}

impl ShardTable {
    /// # Errors
    /// A class with no shards, or with more shards than slots.
    pub fn new(mut ranges: Vec<ShardRange>) -> Result<Self, Error> {
        ranges.sort_by_key(|range| range.class);
        for range in &ranges {
            if range.count == 0 || SLOTS < range.count {
                let count = range.count.to_string();
                return Err(Error::malformed("number of shards", &count, "1 to 4096 for a class"));
            }
        }
        Ok(Self { ranges })
    }

    /// The table of a cluster that has only the class `{}`, with `count` shards numbered from 0.
    pub fn single(count: u16) -> Result<Self, Error> {
        Self::new(vec![ShardRange { class: Class(0), first: ShardId(0), count }])
    }

    /// The shard that owns `slot` of `class`, or none if there is no such class.
    pub fn shard_of(&self, class: Class, slot: Slot) -> Option<ShardId> {
        let range = self.ranges.iter().find(|range| range.class == class)?;
        let index = u32::from(slot.0) * u32::from(range.count) / u32::from(SLOTS);
        Some(ShardId(range.first.0 + index))
    }

    /// Every shard of every class, ascending within a class.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + '_ {
        self.ranges.iter().flat_map(|range| {
            let first = range.first.0;
            (first..first + u32::from(range.count)).map(ShardId)
        })
    }

    pub fn ranges(&self) -> &[ShardRange] {
        &self.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_frozen() {
        let check = |agent: &str, slot: u16| {
            let agent: AgentId = agent.parse().unwrap();
            assert_eq!(agent.slot().get(), slot, "{agent}");
        };
        check("default/postchain/a", 2572);
        check("acme/support/user-42", 994);
        check("acme/support/user/42", 961);
        check("a/bc/d", 3099);
        check("ab/c/d", 1291);
    }

    #[test]
    fn every_slot_has_one_shard_and_shards_are_even() {
        for count in [1, 3, 12, 64, 4096] {
            let table = ShardTable::single(count).unwrap();
            let mut sizes = vec![0u32; usize::from(count)];
            for slot in 0..SLOTS {
                let shard = table.shard_of(Class(0), Slot(slot)).unwrap();
                sizes[shard.0 as usize] += 1;
            }
            let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
            assert!(most - least <= 1, "{count} shards: {least} to {most} slots");
        }
    }

    #[test]
    fn a_class_without_shards_is_refused() {
        assert!(ShardTable::single(0).is_err());
        assert!(ShardTable::single(4097).is_err());
        assert_eq!(ShardTable::single(12).unwrap().shard_of(Class(1), Slot(0)), None);
    }
}
