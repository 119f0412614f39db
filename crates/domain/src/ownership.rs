//! Which node owns which shard: what a leader reads, fences and grants, and when.
//!
//! The owner row in the shard's own database is the truth, and what is known here a cache of it; so a leader may die
//! between any two steps, and the next one finds out and goes on. Never acts for a shard whose row it has not read, never
//! has two fences of a shard in flight, and moves a shard away from a node that lives only to a better place, a few at a
//! time.

mod moves;
mod shard;
mod standing;

use std::collections::{BTreeMap, BTreeSet};

use crate::membership::Held;
use crate::membership::Standing;
use crate::place::{Candidate, Decision, Placement, place};
use crate::time::Millis;
use crate::{Epoch, Member, ProcessName, Reason, ShardId, Term};
use shard::{Shard, Stage};

pub use standing::{Remembered, ShardStanding};

/// How often a grant is repeated until its node reports the shard as held.
pub const GRANT_MS: u64 = 200;
/// How long an answer of the store is waited for before its row is read again.
pub const STORE_MS: u64 = 5_000;
/// How long after a failure the row is read again.
pub const RETRY_MS: u64 = 200;
/// How long a row that is older than what is known is read again. An answer that was overtaken is not that old; after this
/// the store went back.
pub const OLDER_MS: u64 = 2 * STORE_MS;
/// How long the next owner of a shard that was given up without having been opened is waited with, doubled each time.
pub const DROPPED_MS: u64 = 200;
pub const DROPPED_MS_MAX: u64 = 30_000;
/// So often given up in a row, a shard goes to another node, if there is one.
const DROPS_MAX: u32 = 2;
/// So long it is not moved back to the node that could not open it.
const SHUNNED_MS: u64 = 600_000;

/// The owner row of a shard. No member: nobody has owned it yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnerRow {
    pub epoch: Epoch,
    pub member: Option<Member>,
    pub term: Term,
}

/// What became of a [`Action::Fence`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FenceResult {
    /// It is done; the row as it is now.
    Fenced(OwnerRow),
    /// The row was another than expected: this one.
    Lost(OwnerRow),
    /// No answer, or an error: it may be done or not.
    Failed,
}

/// What the leader is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read the owner row, creating the shard's database if it is missing, and hand it to [`Ownership::owner_read`].
    ReadOwner { shard: ShardId },
    /// Set the owner row to (the epoch after the larger of expected and above, to, term) if its epoch is the expected one and
    /// its term not later.
    Fence {
        shard: ShardId,
        expected_epoch: Epoch,
        above: Epoch,
        to: Member,
        term: Term,
        reason: Reason,
    },
    /// Tell the node that the shard is its own.
    Grant { shard: ShardId, epoch: Epoch, to: Member },
    /// Write this down for the next leader.
    Remember { shard: ShardId, remembered: Remembered },
    /// The map changed: send it out.
    MapChanged { version: u64 },
    /// An owner row names a later term: somebody else leads. Hand this to [`crate::leadership`].
    Outranked { term: Term },
}

/// Limits and waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long owners that have not joined may still come, after a new leader began or the first node joined.
    pub settle_ms: u64,
    /// Shards that were never owned are placed as soon as so many nodes are in.
    pub nodes_expected: usize,
    /// How many shards may be on their way from one live node to another.
    pub moves_max: usize,
    /// How long after one move the next may begin.
    pub move_every_ms: u64,
}

/// Who owns a shard, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub epoch: Epoch,
    pub member: Member,
    /// Its owner has opened it and answers for it.
    pub is_open: bool,
}

/// The leader's machine over all shards, from the begin of its term to its end.
#[derive(Debug)]
pub struct Ownership {
    term: Term,
    settings: Settings,
    began: Millis,
    first_join: Option<Millis>,
    shards: BTreeMap<ShardId, Shard>,
    view: BTreeMap<ProcessName, Candidate>,
    /// Members that were in the view and are not any more.
    gone: BTreeSet<Member>,
    version: u64,
    is_changed: bool,
    /// Shards of which the next leader has to know something else.
    unwritten: BTreeSet<ShardId>,
    outranked: Option<Term>,
    /// Nothing is fenced: see [`crate::brake`].
    is_held: bool,
    /// Some shard may have a better place than the one where it is.
    may_move: bool,
    last_move: Option<Millis>,
}

impl Ownership {
    pub fn new(
        term: Term,
        shards: impl IntoIterator<Item = ShardId>,
        settings: Settings,
        now: Millis,
    ) -> Self {
        Self {
            term,
            settings,
            began: now,
            first_join: None,
            shards: shards.into_iter().map(|id| (id, Shard::unread(now))).collect(),
            view: BTreeMap::new(),
            gone: BTreeSet::new(),
            version: 0,
            is_changed: false,
            unwritten: BTreeSet::new(),
            outranked: None,
            is_held: false,
            may_move: false,
            last_move: None,
        }
    }

    /// What the leaders before wrote down. Before anything is read.
    pub fn recall(&mut self, shard: ShardId, remembered: Remembered, now: Millis) {
        let Some(shard) = self.shards.get_mut(&shard) else { return };
        shard.known = remembered.epoch;
        match remembered.standing {
            ShardStanding::Served => {}
            ShardStanding::Stopped => {
                shard.stage = Stage::Stopped { again: now };
                self.is_changed = true;
            }
            ShardStanding::Released => shard.release(now),
        }
    }

    /// An operator accepts that what the store lost of a stopped shard is lost. None: it is not stopped.
    pub fn release(&mut self, id: ShardId, now: Millis) -> Option<Vec<Action>> {
        let shard = self.shards.get_mut(&id)?;
        if !matches!(shard.stage, Stage::Stopped { .. }) {
            return None;
        }
        shard.release(now);
        self.is_changed = true;
        self.unwritten.insert(id);
        Some(self.advance(now))
    }

    pub fn is_stopped(&self, shard: ShardId) -> bool {
        self.shards.get(&shard).is_some_and(|shard| matches!(shard.stage, Stage::Stopped { .. }))
    }

    /// Fences nothing from now on, or again.
    pub fn hold(&mut self, is_held: bool) {
        self.is_held = is_held;
    }

    /// Everybody who is not dead, on every change of that.
    pub fn view(&mut self, members: Vec<Candidate>, now: Millis) -> Vec<Action> {
        let before: Vec<Member> = self.view.values().map(|seen| seen.member.clone()).collect();
        self.view = members.into_iter().map(|seen| (seen.member.name.clone(), seen)).collect();
        self.gone.extend(before.into_iter().filter(|member| !is_in(&self.view, member)));
        if self.first_join.is_none() && 0 < self.answering() {
            self.first_join = Some(now);
        }
        self.may_move = true;
        self.advance(now)
    }

    /// The owner row as it was read.
    pub fn owner_read(&mut self, shard: ShardId, row: OwnerRow, now: Millis) -> Vec<Action> {
        self.adopt(shard, row, now);
        self.advance(now)
    }

    /// The owner row could not be read.
    pub fn owner_unread(&mut self, shard: ShardId, now: Millis) {
        if let Some(Shard { stage: stage @ Stage::Reading { .. }, .. }) =
            self.shards.get_mut(&shard)
        {
            *stage = Stage::Unread { again: now.plus(RETRY_MS) };
        }
    }

    pub fn fence_result(
        &mut self,
        shard: ShardId,
        result: FenceResult,
        now: Millis,
    ) -> Vec<Action> {
        match result {
            FenceResult::Fenced(row) | FenceResult::Lost(row) => self.adopt(shard, row, now),
            // Done or not: only the row can tell.
            FenceResult::Failed => self.forget(shard, now.plus(RETRY_MS)),
        }
        self.advance(now)
    }

    /// What a beat says that its node holds. Beats of one node must come here in order: see
    /// [`crate::membership::Membership::beat`].
    pub fn held(&mut self, member: &Member, held: &[Held], now: Millis) -> Vec<Action> {
        let held: BTreeMap<ShardId, Held> = held.iter().map(|held| (held.shard, *held)).collect();
        for (id, shard) in &mut self.shards {
            let report = held.get(id);
            if shard.is_behind(member, report) {
                shard.saw(report.map_or(Epoch(0), |report| report.epoch));
                shard.read_again(now);
                continue;
            }
            let Some(row) = shard.row.as_ref().filter(|row| row.member.as_ref() == Some(member))
            else {
                continue;
            };
            match report.filter(|report| report.epoch == row.epoch) {
                Some(report) => {
                    self.is_changed |= shard.is_open != report.is_open;
                    self.may_move |= shard.is_open != report.is_open;
                    shard.is_held = true;
                    shard.is_open = report.is_open;
                    if shard.is_open {
                        shard.drops = 0;
                    }
                }
                // It had it, and now it has not: an epoch is opened once, so it takes another one.
                None if shard.is_held => shard.drop(now),
                None => {}
            }
        }
        self.advance(now)
    }

    /// A node says that it gave up a shard.
    pub fn dropped(
        &mut self,
        shard: ShardId,
        epoch: Epoch,
        reason: Reason,
        now: Millis,
    ) -> Vec<Action> {
        if let Some(state) = self.shards.get_mut(&shard) {
            let epoch_known = state.row.as_ref().map(|row| row.epoch);
            // A fence may have been on its way: the epoch after that of the owner who found it is of the same store.
            let is_near = epoch_known.is_none_or(|known| known <= epoch.next());
            if reason == Reason::StoreRolledBack && is_near && state.above < epoch {
                if matches!(state.stage, Stage::Stopped { .. }) {
                    state.saw(epoch);
                    return self.advance(now);
                }
                state.saw(epoch);
                state.stop(now);
                self.is_changed = true;
                self.unwritten.insert(shard);
            } else if epoch_known == Some(epoch) {
                state.drop(now);
                self.is_changed |= std::mem::take(&mut state.is_open);
            }
        }
        self.advance(now)
    }

    /// Called at least every 100 ms.
    pub fn tick(&mut self, now: Millis) -> Vec<Action> {
        for shard in self.shards.values_mut() {
            if let Stage::Reading { sent } | Stage::Fencing { sent, .. } = shard.stage
                && STORE_MS <= now.since(sent)
            {
                shard.stage = Stage::Unread { again: now };
            }
        }
        self.advance(now)
    }

    fn forget(&mut self, shard: ShardId, again: Millis) {
        if let Some(state) = self.shards.get_mut(&shard)
            && !matches!(state.stage, Stage::Stopped { .. })
        {
            state.stage = Stage::Unread { again };
        }
    }

    /// An answer may have been overtaken by a later one; epochs only grow, so the larger one is the newer. If no newer one
    /// comes, the store went back.
    fn adopt(&mut self, id: ShardId, row: OwnerRow, now: Millis) {
        let Some(shard) = self.shards.get_mut(&id) else { return };
        if self.term < row.term {
            self.outranked = self.outranked.max(Some(row.term));
        }
        // A shard that was restored has a later epoch and no owner. Any other later epoch is of a fence that was on its way.
        let is_restored = row.member.is_none() && shard.last() < row.epoch;
        if matches!(shard.stage, Stage::Stopped { .. }) && !is_restored {
            shard.known = shard.known.max(row.epoch);
            return;
        }
        if row.epoch < shard.known {
            let since = *shard.older_since.get_or_insert(now);
            if now.since(since) < OLDER_MS {
                shard.stage = Stage::Unread { again: now.plus(RETRY_MS) };
                return;
            }
            shard.stop(now);
            self.is_changed = true;
            self.unwritten.insert(id);
            return;
        }
        shard.older_since = None;
        self.is_changed |= matches!(shard.stage, Stage::Stopped { .. });
        // A fence that came to nothing may be of a move that is still to be made.
        self.may_move |= !matches!(shard.stage, Stage::Known);
        shard.stage = Stage::Known;
        if shard.row.as_ref().is_some_and(|known| row.epoch <= known.epoch) {
            return;
        }
        self.is_changed |= row.member.is_some();
        self.may_move = true;
        if shard.known < row.epoch {
            shard.known = row.epoch;
            self.unwritten.insert(id);
        }
        (shard.row, shard.granted) = (Some(row), None);
        (shard.is_held, shard.is_open, shard.is_dropped) = (false, false, false);
    }

    /// Everything that can be done now.
    fn advance(&mut self, now: Millis) -> Vec<Action> {
        if let Some(term) = self.outranked {
            return vec![Action::Outranked { term }];
        }
        let mut actions = self.read(now);
        if !self.is_held {
            let homeless = self.homeless(now);
            if !homeless.is_empty() {
                actions.extend(self.fence(&homeless, now));
            }
            actions.extend(self.move_some(now));
        }
        actions.extend(self.grant(now));
        for shard in std::mem::take(&mut self.unwritten) {
            let remembered = self.shards.get(&shard).map(Shard::remembered);
            actions.extend(remembered.map(|remembered| Action::Remember { shard, remembered }));
        }
        if std::mem::take(&mut self.is_changed) {
            self.version += 1;
            actions.push(Action::MapChanged { version: self.version });
        }
        actions
    }

    fn read(&mut self, now: Millis) -> Vec<Action> {
        let mut actions = Vec::new();
        for (id, shard) in &mut self.shards {
            match &mut shard.stage {
                Stage::Unread { again } if *again <= now => {
                    shard.stage = Stage::Reading { sent: now };
                }
                Stage::Stopped { again } if *again <= now => {
                    *again = now.plus(STORE_MS);
                    // What was written down before may have got lost.
                    self.unwritten.insert(*id);
                }
                Stage::Unread { .. }
                | Stage::Stopped { .. }
                | Stage::Reading { .. }
                | Stage::Known
                | Stage::Fencing { .. } => continue,
            }
            actions.push(Action::ReadOwner { shard: *id });
        }
        actions
    }

    /// How many nodes may get something.
    fn answering(&self) -> usize {
        self.view.values().filter(|seen| seen.standing == Standing::Answering).count()
    }

    /// The shards that need an owner, and why.
    fn homeless(&self, now: Millis) -> Vec<(ShardId, Reason)> {
        let known = self.shards.iter().filter(|(_, shard)| matches!(shard.stage, Stage::Known));
        known.filter_map(|(id, shard)| Some((*id, self.need(shard, now)?))).collect()
    }

    fn need(&self, shard: &Shard, now: Millis) -> Option<Reason> {
        let row = shard.row.as_ref()?;
        if shard.is_released() {
            return Some(Reason::Released);
        }
        let settled = |since: Millis| self.settings.settle_ms <= now.since(since);
        let Some(owner) = &row.member else {
            let is_complete = self.settings.nodes_expected <= self.answering();
            let is_ready = is_complete || self.first_join.is_some_and(settled);
            return is_ready.then_some(Reason::FirstPlacement);
        };
        if is_in(&self.view, owner) {
            let is_due = shard.is_dropped && shard.next_owner <= now;
            return is_due.then_some(Reason::OwnerDropped);
        }
        // Whoever was here and left, or came back as another, is dead. Whoever was not here yet may still come.
        let is_replaced = self
            .view
            .get(&owner.name)
            .is_some_and(|seen| owner.incarnation < seen.member.incarnation);
        let is_dead = is_replaced || self.gone.contains(owner) || settled(self.began);
        is_dead.then_some(Reason::OwnerDied)
    }

    fn fence(&mut self, homeless: &[(ShardId, Reason)], now: Millis) -> Vec<Action> {
        let placement = self.placement();
        let mut actions = Vec::new();
        for (id, reason) in homeless {
            let is_failing = self.shards.get(id).is_some_and(|shard| DROPS_MAX <= shard.drops);
            let other = is_failing.then(|| self.elsewhere(*id, now)).flatten();
            let target = other.or_else(|| placement.owner(*id).cloned());
            let Some(to) = target.filter(|to| self.answers(to)) else { continue };
            let Some(shard) = self.shards.get_mut(id) else { continue };
            let Some(row) = &shard.row else { continue };
            shard.stage = Stage::Fencing { to: to.clone(), sent: now };
            actions.push(Action::Fence {
                shard: *id,
                expected_epoch: row.epoch,
                above: shard.above,
                to,
                term: self.term,
                reason: *reason,
            });
        }
        actions
    }

    /// The best node for a shard other than its owner: one that has not failed to open it lately, if there is one.
    fn elsewhere(&self, id: ShardId, now: Millis) -> Option<Member> {
        let shard = self.shards.get(&id)?;
        let owner = shard.row.as_ref()?.member.as_ref()?;
        let mut others: Vec<Candidate> =
            self.view.values().filter(|seen| seen.member.name != owner.name).cloned().collect();
        let is_able = |seen: &Candidate| seen.takes() && !shard.shuns(&seen.member, now);
        if others.iter().any(is_able) {
            others.retain(is_able);
        }
        place(&[id], &BTreeMap::new(), &others).owner(id).filter(|to| self.answers(to)).cloned()
    }

    fn answers(&self, member: &Member) -> bool {
        let seen = self.view.get(&member.name).filter(|seen| seen.member == *member);
        seen.is_some_and(Candidate::takes)
    }

    fn grant(&mut self, now: Millis) -> Vec<Action> {
        let mut actions = Vec::new();
        for (id, shard) in &mut self.shards {
            let Some(OwnerRow { epoch, member: Some(to), .. }) = &shard.row else { continue };
            let is_due = shard.granted.is_none_or(|granted| GRANT_MS <= now.since(granted));
            let is_open_question = matches!(shard.stage, Stage::Known)
                && !shard.is_held
                && !shard.is_dropped
                && !shard.is_released()
                && is_in(&self.view, to);
            if is_open_question && is_due {
                shard.granted = Some(now);
                actions.push(Action::Grant { shard: *id, epoch: *epoch, to: to.clone() });
            }
        }
        actions
    }

    /// Where every shard belongs now. A shard belongs first of all where it is, or is being sent.
    pub fn placement(&self) -> Placement {
        let shards: Vec<ShardId> = self.shards.keys().copied().collect();
        let current = self.shards.iter().filter_map(|(id, shard)| {
            let member = match &shard.stage {
                Stage::Fencing { to, .. } => Some(to),
                Stage::Unread { .. }
                | Stage::Reading { .. }
                | Stage::Known
                | Stage::Stopped { .. } => shard.row.as_ref()?.member.as_ref(),
            };
            Some((*id, member?.name.clone()))
        });
        let candidates: Vec<Candidate> = self.view.values().cloned().collect();
        place(&shards, &current.collect(), &candidates)
    }

    /// Where this shard belongs now, and why.
    pub fn explain(&self, shard: ShardId) -> Option<Decision> {
        self.placement().decisions.remove(&shard)
    }

    /// Every shard that has an owner.
    pub fn map(&self) -> BTreeMap<ShardId, Entry> {
        let entry = |shard: &Shard| {
            let row = shard.row.as_ref()?;
            let member = row.member.clone()?;
            Some(Entry { epoch: row.epoch, member, is_open: shard.is_open })
        };
        self.shards.iter().filter_map(|(id, shard)| Some((*id, entry(shard)?))).collect()
    }

    /// The number of the map within this term.
    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn term(&self) -> Term {
        self.term
    }
}

fn is_in(view: &BTreeMap<ProcessName, Candidate>, member: &Member) -> bool {
    view.get(&member.name).is_some_and(|seen| seen.member == *member)
}

#[cfg(test)]
mod tests;
