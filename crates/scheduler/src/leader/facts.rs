//! What is known of each shard beside its owner, and how it came about: for people.

use domain::ownership::{OwnerRow, Remembered, ShardStanding};
use domain::time::Millis;
use domain::{Epoch, Member, Reason, ShardId};
use proto::link::control_write::Write;
use proto::link::{PutAudit, PutShard};
use proto::v1;
use tracing::{error, info};

use super::Leader;
use crate::Error;
use crate::clock::wall_ms;
use crate::journal::{Journal, Transition};

pub(super) const UNOWNED: &str = "unowned";
pub(super) const GRANTED: &str = "granted";
pub(super) const OPEN: &str = "open";
pub(super) const DROPPED: &str = "dropped";
pub(super) const STOPPED: &str = "stopped";

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
    pub(super) above: Epoch,
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
            row.epoch == fence.expected.max(fence.above).next()
                && row.member.as_ref() == Some(&fence.to)
        };
        let state = match row.member {
            // Until it is remembered otherwise.
            _ if facts.row.standing == STOPPED => STOPPED,
            Some(_) => GRANTED,
            None => UNOWNED,
        };
        let from = std::mem::replace(&mut facts.state, state);
        let fence = fence.filter(is_ours);
        if fence.is_none() {
            facts.reason = inherited(&self.journal, shard, from, &facts.row, row).or(facts.reason);
        }
        if let Some(fence) = fence {
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

    /// Keeps for the leaders after this one what cannot be read from the shard's own database.
    pub(super) fn remember(&mut self, shard: ShardId, remembered: Remembered) {
        let Some(facts) = self.shards.get_mut(&shard) else { return };
        let standing = remembered.standing.as_str().to_owned();
        let before = std::mem::replace(&mut facts.row.standing, standing);
        facts.row.epoch = remembered.epoch.0;
        self.journal.put(Write::Shard(facts.row.clone()));
        if before == facts.row.standing {
            return;
        }
        let (to, reason, cause) = match remembered.standing {
            ShardStanding::Served if before == ShardStanding::Stopped.as_str() => {
                (UNOWNED, Reason::Restored, "its store has a later epoch without an owner")
            }
            ShardStanding::Served => return,
            ShardStanding::Stopped => {
                error!(%shard, epoch = %remembered.epoch, "the store of a shard lost what was acknowledged: the shard is stopped until it is restored or released");
                (STOPPED, Reason::StoreRolledBack, "its store is older than what was acknowledged")
            }
            ShardStanding::Released => {
                (UNOWNED, Reason::Released, "what its store lost is given up")
            }
        };
        facts.reason = Some(reason);
        let from = std::mem::replace(&mut facts.state, to);
        self.journal.transition(Transition {
            subject: format!("shard/{shard}"),
            from,
            to,
            reason,
            cause: cause.to_owned(),
            epoch: remembered.epoch,
            node: String::new(),
        });
        self.count_shards();
    }

    /// Gives a stopped shard an owner again.
    pub(crate) fn release(
        &mut self,
        actor: String,
        shard: ShardId,
        now: Millis,
    ) -> Result<v1::Shard, Error> {
        let subject = format!("shard/{shard}");
        if !self.shards.contains_key(&shard) {
            return Err(Error::UnknownSubject { subject });
        }
        let Some(actions) = self.ownership.release(shard, now) else {
            return Err(Error::NotStopped { shard: shard.0 });
        };
        info!(%shard, actor, "released shard");
        let (action, term) = ("ReleaseShard".to_owned(), self.term().0);
        self.journal.put(Write::Audit(PutAudit { at_ms: wall_ms(), actor, action, subject, term }));
        self.act(actions, now);
        let found = self.shards().into_iter().find(|found| found.id == shard.0.cast_signed());
        found.ok_or(Error::Silent)
    }
}

/// Whoever fenced a shard wrote down its epoch together with why. If he could not, that it has the owner `row` is written
/// down now.
pub(super) fn inherited(
    journal: &Journal,
    shard: ShardId,
    from: &str,
    known: &PutShard,
    row: &OwnerRow,
) -> Option<Reason> {
    // 0: written by a leader that kept no epochs.
    let is_unwritten = known.epoch != 0 && known.epoch < row.epoch.0;
    let to = row.member.as_ref().filter(|_| is_unwritten)?;
    journal.transition(Transition {
        subject: format!("shard/{shard}"),
        from,
        to: GRANTED,
        reason: Reason::Inherited,
        cause: format!("fenced by the leader of term {}", row.term),
        epoch: row.epoch,
        node: to.name.to_string(),
    });
    Some(Reason::Inherited)
}

impl Facts {
    pub(super) fn is_owned_by(&self, member: &Member, epoch: Epoch) -> bool {
        let owner = self.owner.as_ref().filter(|owner| owner.epoch == epoch);
        owner.is_some_and(|owner| owner.member.as_ref() == Some(member))
    }
}
