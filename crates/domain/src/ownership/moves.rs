//! Shards that leave a node that lives: because it is about to go, or because another has fewer than its share.

use super::{Action, OwnerRow, Ownership, Shard, Stage, is_in};
use crate::membership::Standing;
use crate::place::Admission;
use crate::time::Millis;
use crate::{Member, Reason, ShardId};

impl Ownership {
    /// The fences of the moves that may begin now.
    ///
    /// A move is a fence like any other: the old owner's writes are refused from then on, and what it was doing is taken
    /// up by the new one. So few are under way at once, and each waits until the one before it is open again.
    pub(super) fn move_some(&mut self, now: Millis) -> Vec<Action> {
        let is_early =
            self.last_move.is_some_and(|last| now.since(last) < self.settings.move_every_ms);
        let room = self.settings.moves_max.saturating_sub(self.under_way());
        let is_calm = self.is_calm();
        let is_somebody_leaving = self.view.values().any(|seen| seen.gives_away().is_some());
        if !self.may_move || is_early || room == 0 || !(is_calm || is_somebody_leaving) {
            return Vec::new();
        }
        let wanted = self.wanted(is_calm, now);
        let is_shunned = |shard: &Shard| shard.shunned.values().any(|until| now < *until);
        self.may_move = !wanted.is_empty() || self.shards.values().any(is_shunned);
        let mut actions = Vec::new();
        // One at a time, so that they are spread over time and not bunched at its beginning.
        for (id, to, reason) in wanted.into_iter().take(1) {
            let Some(Shard { stage, row: Some(row), above, .. }) = self.shards.get_mut(&id) else {
                continue;
            };
            *stage = Stage::Fencing { to: to.clone(), sent: now };
            self.last_move = Some(now);
            let (expected_epoch, above, term) = (row.epoch, *above, self.term);
            actions.push(Action::Fence { shard: id, expected_epoch, above, to, term, reason });
        }
        actions
    }

    /// Shards that nobody serves at this moment, though somebody will.
    fn under_way(&self) -> usize {
        let is_between = |shard: &&Shard| match shard.stage {
            Stage::Fencing { .. } => true,
            Stage::Known => {
                // One that nobody can open just now is in nobody's way, nor is one that cannot be opened where it is.
                let owner = shard.row.as_ref().and_then(|row| row.member.as_ref());
                let is_owned = owner.is_some_and(|owner| !self.is_storeless(owner));
                is_owned && !shard.is_open && !shard.is_dropped
            }
            Stage::Unread { .. } | Stage::Reading { .. } | Stage::Stopped { .. } => false,
        };
        self.shards.values().filter(is_between).count()
    }

    /// Every shard that has a better place, those of a node that is about to go first.
    fn wanted(&self, is_calm: bool, now: Millis) -> Vec<(ShardId, Member, Reason)> {
        let placement = self.placement();
        let mut wanted: Vec<(ShardId, Member, Reason)> = Vec::new();
        for (id, shard) in &self.shards {
            let (Stage::Known, Some(OwnerRow { member: Some(owner), .. })) =
                (&shard.stage, &shard.row)
            else {
                continue;
            };
            let Some(to) = placement.owner(*id).filter(|to| to.name != owner.name) else {
                continue;
            };
            // Who does not reach its store does not open it either.
            let is_movable = shard.is_open || self.is_storeless(owner);
            if !is_movable || !is_in(&self.view, owner) || !self.answers(to) {
                continue;
            }
            let Some(seen) = self.view.get(&owner.name) else { continue };
            if let Some(reason) = seen.gives_away() {
                let other = shard.shuns(to, now).then(|| self.elsewhere(*id, now)).flatten();
                let to = other.unwrap_or_else(|| to.clone());
                wanted.push((*id, to, reason));
                continue;
            }
            // To a node that could not open it, it would only come back from there.
            if is_calm && seen.admission == Admission::Open && !shard.shuns(to, now) {
                wanted.push((*id, to.clone(), Reason::Rebalanced));
            }
        }
        wanted.sort_by_key(|(id, _, reason)| (*reason == Reason::Rebalanced, *id));
        wanted
    }

    fn is_storeless(&self, member: &Member) -> bool {
        let seen = self.view.get(&member.name).filter(|seen| seen.member == *member);
        seen.is_some_and(|seen| seen.standing == Standing::Storeless)
    }

    /// Nobody is suspected and every shard is served: only then is anything moved that could as well stay.
    fn is_calm(&self) -> bool {
        let is_served = |shard: &Shard| match shard.stage {
            Stage::Known => shard.is_open,
            Stage::Stopped { .. } => true,
            Stage::Unread { .. } | Stage::Reading { .. } | Stage::Fencing { .. } => false,
        };
        self.view.values().all(|seen| seen.standing != Standing::Suspect)
            && self.shards.values().all(is_served)
    }
}
