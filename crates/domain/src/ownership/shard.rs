//! What the leader knows of one shard.

use std::collections::BTreeMap;

use super::{
    DROPPED_MS, DROPPED_MS_MAX, DROPS_MAX, OwnerRow, Remembered, SHUNNED_MS, STORE_MS,
    ShardStanding,
};
use crate::membership::Held;
use crate::time::Millis;
use crate::{Epoch, Member};

/// How far the leader is with a shard.
#[derive(Clone, Debug)]
pub(super) enum Stage {
    /// Its row is not known, or not known any more.
    Unread {
        again: Millis,
    },
    Reading {
        sent: Millis,
    },
    Known,
    Fencing {
        to: Member,
        sent: Millis,
    },
    /// The store lost commits of it: an operator must look.
    Stopped {
        /// When it is looked whether it was restored.
        again: Millis,
    },
}

#[derive(Debug)]
pub(super) struct Shard {
    pub(super) stage: Stage,
    pub(super) row: Option<OwnerRow>,
    pub(super) granted: Option<Millis>,
    /// The owner reported the row's epoch as held; and as opened.
    pub(super) is_held: bool,
    pub(super) is_open: bool,
    /// The owner had it in this epoch and gave it up.
    pub(super) is_dropped: bool,
    /// The last epoch that was seen, or that earlier leaders had seen.
    pub(super) known: Epoch,
    /// Since when its row is older than that.
    pub(super) older_since: Option<Millis>,
    /// Released by an operator: it is opened in a later epoch than this only, and what was found in earlier ones counts no
    /// more.
    pub(super) above: Epoch,
    /// How often in a row it was given up without having been opened, and when the next owner may come.
    pub(super) drops: u32,
    pub(super) next_owner: Millis,
    /// Who could not open it, each until when it is not moved there.
    pub(super) shunned: BTreeMap<Member, Millis>,
}

impl Shard {
    pub(super) fn unread(now: Millis) -> Self {
        Self {
            stage: Stage::Unread { again: now },
            row: None,
            granted: None,
            is_held: false,
            is_open: false,
            is_dropped: false,
            known: Epoch(0),
            older_since: None,
            above: Epoch(0),
            drops: 0,
            next_owner: now,
            shunned: BTreeMap::new(),
        }
    }

    pub(super) fn remembered(&self) -> Remembered {
        match self.stage {
            Stage::Stopped { .. } => {
                Remembered { epoch: self.last(), standing: ShardStanding::Stopped }
            }
            Stage::Unread { .. } | Stage::Reading { .. } | Stage::Known | Stage::Fencing { .. } => {
                match self.is_released() {
                    true => Remembered { epoch: self.above, standing: ShardStanding::Released },
                    false => Remembered { epoch: self.known, standing: ShardStanding::Served },
                }
            }
        }
    }

    /// The last epoch that anybody may have had.
    pub(super) fn last(&self) -> Epoch {
        self.known.max(self.above)
    }

    /// An operator has released it, and its epoch may have been used before.
    pub(super) fn is_released(&self) -> bool {
        let epoch = self.row.as_ref().map_or(Epoch(0), |row| row.epoch);
        self.above != Epoch(0) && epoch <= self.above
    }

    /// Somebody has, or had, the shard in this epoch. No store has one that is larger than it can keep.
    pub(super) fn saw(&mut self, epoch: Epoch) {
        if i64::try_from(epoch.0).is_err() {
            return;
        }
        match self.is_released() {
            true => self.above = self.above.max(epoch),
            false => self.known = self.known.max(epoch),
        }
    }

    /// It is read anew, whatever its row says; its epochs up to now may have been used and are passed over. So is one more:
    /// what is still said of them is then of an owner long before.
    pub(super) fn release(&mut self, now: Millis) {
        *self = Self { above: self.last().next(), ..Self::unread(now) };
    }

    pub(super) fn stop(&mut self, now: Millis) {
        self.is_open = false;
        self.stage = Stage::Stopped { again: now.plus(STORE_MS) };
    }

    pub(super) fn drop(&mut self, now: Millis) {
        if std::mem::replace(&mut self.is_dropped, true) {
            return;
        }
        // One that was open before may have another owner at once.
        let pause = DROPPED_MS.saturating_mul(1 << self.drops.min(16)).min(DROPPED_MS_MAX);
        self.next_owner = if self.is_open { now } else { now.plus(pause) };
        self.drops += u32::from(!self.is_open);
        if DROPS_MAX <= self.drops
            && let Some(owner) = self.row.as_ref().and_then(|row| row.member.clone())
        {
            self.shunned.retain(|_, until| now < *until);
            self.shunned.insert(owner, now.plus(SHUNNED_MS));
        }
    }

    pub(super) fn shuns(&self, to: &Member, now: Millis) -> bool {
        self.shunned.get(to).is_some_and(|until| now < *until)
    }

    /// Whether a node reports a later epoch than is known here, or ours under another name.
    pub(super) fn is_behind(&self, member: &Member, report: Option<&Held>) -> bool {
        let (Some(row), Some(report)) = (&self.row, report) else { return false };
        let is_other = row.epoch == report.epoch && row.member.as_ref() != Some(member);
        row.epoch < report.epoch || is_other
    }

    pub(super) fn read_again(&mut self, now: Millis) {
        match self.stage {
            Stage::Known => self.stage = Stage::Unread { again: now },
            Stage::Unread { .. }
            | Stage::Reading { .. }
            | Stage::Fencing { .. }
            | Stage::Stopped { .. } => {}
        }
    }
}
