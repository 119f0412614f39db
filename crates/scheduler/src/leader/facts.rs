//! What is known of each shard beside its owner, and how it came about: for people.

use domain::ownership::OwnerRow;
use domain::{Epoch, Member, Reason, ShardId};
use proto::link::PutShard;
use tracing::info;

use super::Leader;
use crate::journal::Transition;

pub(super) const UNOWNED: &str = "unowned";
pub(super) const GRANTED: &str = "granted";
pub(super) const OPEN: &str = "open";
pub(super) const DROPPED: &str = "dropped";

/// A shard, as people see it.
pub(super) struct Facts {
    pub(super) row: PutShard,
    pub(super) owner: Option<OwnerRow>,
    pub(super) state: &'static str,
    pub(super) reason: Option<Reason>,
    /// The fence that is on its way, until the owner row says what became of it.
    pub(super) fence: Option<Fencing>,
}

pub(super) struct Fencing {
    pub(super) expected: Epoch,
    pub(super) to: Member,
    pub(super) reason: Reason,
    pub(super) cause: String,
}

impl Leader {
    /// Writes down what an owner row says of the fence that was on its way, and keeps the newest row.
    pub(super) fn note_owner(&mut self, shard: ShardId, row: &OwnerRow) {
        let Some(facts) = self.shards.get_mut(&shard) else { return };
        if facts.owner.as_ref().is_some_and(|known| row.epoch <= known.epoch) {
            return;
        }
        let fence = facts.fence.take_if(|fence| fence.expected < row.epoch);
        let is_ours = |fence: &Fencing| {
            row.epoch == fence.expected.next() && row.member.as_ref() == Some(&fence.to)
        };
        let state = if row.member.is_some() { GRANTED } else { UNOWNED };
        let from = std::mem::replace(&mut facts.state, state);
        if let Some(fence) = fence.filter(is_ours) {
            facts.reason = Some(fence.reason);
            info!(%shard, epoch = %row.epoch, to = %fence.to, reason = %fence.reason, "fenced shard");
            self.journal.transition(Transition {
                subject: format!("shard/{shard}"),
                from,
                to: GRANTED,
                reason: fence.reason,
                cause: fence.cause,
                epoch: row.epoch,
                node: fence.to.name.to_string(),
            });
        }
        facts.owner = Some(row.clone());
    }

    pub(super) fn map_changed(&mut self) {
        self.is_dirty = true;
        let term = self.hands.term;
        for (shard, entry) in self.ownership.map() {
            let Some(facts) = self.shards.get_mut(&shard) else { continue };
            if !entry.is_open {
                facts.state = if facts.state == OPEN { GRANTED } else { facts.state };
                continue;
            }
            let from = std::mem::replace(&mut facts.state, OPEN);
            if from == OPEN {
                continue;
            }
            facts.reason = Some(Reason::ShardOpened);
            info!(%shard, epoch = %entry.epoch, member = %entry.member, "grant opened");
            self.journal.transition(Transition {
                subject: format!("shard/{shard}"),
                from,
                to: OPEN,
                reason: Reason::ShardOpened,
                // An earlier leader granted it, and may have written down this opening already.
                cause: if facts.owner.as_ref().is_some_and(|owner| owner.term < term) {
                    format!("read by a new leader: said by {}", entry.member)
                } else {
                    format!("said by {}", entry.member)
                },
                epoch: entry.epoch,
                node: entry.member.name.to_string(),
            });
        }
        self.count_shards();
    }
}

impl Facts {
    pub(super) fn is_owned_by(&self, member: &Member, epoch: Epoch) -> bool {
        let owner = self.owner.as_ref().filter(|owner| owner.epoch == epoch);
        owner.is_some_and(|owner| owner.member.as_ref() == Some(member))
    }
}
