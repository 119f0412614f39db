//! What leaders tell their successors of a shard, through the control database.

use std::str::FromStr;

use crate::{Epoch, Error};

/// What leaders tell their successors of a shard, beside its owner row: that is as old as its store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remembered {
    /// The last that is known.
    pub epoch: Epoch,
    pub standing: ShardStanding,
}

/// Whether a shard may have an owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShardStanding {
    #[default]
    Served,
    /// Its store lost what was acknowledged: it stays without an owner until an operator releases it, or restores it, which
    /// gives it a later epoch.
    Stopped,
    /// An operator accepted the loss. It is opened in a later epoch than any that was known.
    Released,
}

impl ShardStanding {
    const ALL: [Self; 3] = [Self::Served, Self::Stopped, Self::Released];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Served => "",
            Self::Stopped => "stopped",
            Self::Released => "released",
        }
    }
}

impl FromStr for ShardStanding {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|standing| standing.as_str() == text);
        found
            .ok_or_else(|| Error::malformed("shard standing", text, "stopped, released or nothing"))
    }
}
