//! One leadership, from the moment when everything is read to its end: the machines of `domain`, and what they want
//! done, done.
//!
//! Never waits: whatever takes time is a task of [`hands`]. Never decides: it asks the machines.

mod admission;
mod answers;
mod facts;
mod hands;
mod load;
mod publish;
mod replicas;
mod reports;
mod roster;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use cluster::Peer;
use domain::brake::Brakes;
use domain::membership::{self, Beat, Held, Joining, Membership};
use domain::ownership::{self, Action, FenceResult, OwnerRow, Ownership, Remembered};
use domain::slot::ShardTable;
use domain::time::Millis;
use domain::view::{MemberInfo, View};
use domain::{AgentId, ClusterId, Epoch, Member, ProcessName, Reason, Role, ShardId, Term};
use proto::link::{AgentFailed, JoinRequest, PutShard, Refusal};
use telemetry::fault::point;
use tokio::task::JoinSet;
use tracing::Instrument;
use tracing::{info, warn};

pub use admission::Admit;
pub use answers::Query;
pub(crate) use answers::api_node;
pub(crate) use hands::{Hands, Outcome, read_held};
pub(crate) use load::{Loaded, load};

use crate::journal::{Journal, Transition};
use crate::links::{malformed, refusal};
use crate::metrics;
use crate::shared::node_peer;
use facts::{DROPPED, Facts, Fencing, GRANTED, STOPPED, UNOWNED, inherited};
use reports::Reports;
use roster::{DEAD, LEFT, Roster, STORELESS, SUSPECT, read_join};

pub(crate) struct Leader {
    hands: Hands,
    journal: Journal,
    tasks: JoinSet<()>,
    cluster_id: ClusterId,
    table: ShardTable,
    membership: Membership,
    ownership: Ownership,
    reports: Reports,
    roster: Roster,
    shards: BTreeMap<ShardId, Facts>,
    /// The rows that were read before we began, until the machine asks for them.
    loaded: BTreeMap<ShardId, OwnerRow>,
    granting: BTreeSet<(ShardId, Epoch)>,
    view: Arc<View>,
    /// The view may differ from the published one.
    is_dirty: bool,
    /// To whom the last view could not be sent.
    behind: BTreeSet<Peer>,
    /// Links to most nodes do not work.
    is_cut_off: bool,
    /// Control replicas that stand by.
    standbys: BTreeMap<ProcessName, MemberInfo>,
    brakes: Brakes,
    successor: Option<ProcessName>,
    began: Millis,
    outranked: Option<Term>,
}

impl Leader {
    pub(crate) fn new(hands: Hands, journal: Journal, loaded: Loaded, now: Millis) -> Self {
        let config = &hands.shared.config;
        let settings = ownership::Settings {
            settle_ms: config.settle_ms,
            nodes_expected: config.nodes_expected as usize,
            moves_max: config.moves_max,
            move_every_ms: config.move_every_ms,
        };
        let facts = |row: PutShard| {
            let id = ShardId(row.shard);
            let owner = loaded.owners.get(&id).cloned();
            let is_owned = owner.as_ref().is_some_and(|owner| owner.member.is_some());
            let state = if is_owned { GRANTED } else { UNOWNED };
            let state = if row.standing == STOPPED { STOPPED } else { state };
            (id, Facts { row, owner, state, reason: None, fence: None })
        };
        let roster = Roster::new(loaded.nodes);
        let mut membership = Membership::new();
        for member in roster.buried() {
            membership.buried(&member);
        }
        for name in roster.cordoned() {
            membership.cordon(&name, true);
        }
        for joining in roster.alive() {
            membership.inherited(joining, config.settle_ms, now);
        }
        for member in roster.storeless() {
            membership.inherited_storeless(&member);
        }
        let version = domain::view::Version { term: hands.term, number: 0 };
        let mut leader = Self {
            view: Arc::new(View::new(version, loaded.table.clone())),
            ownership: Ownership::new(hands.term, loaded.table.shards(), settings, now),
            shards: loaded.shards.into_iter().map(facts).collect(),
            journal,
            tasks: JoinSet::new(),
            cluster_id: loaded.cluster_id,
            table: loaded.table,
            membership,
            reports: Reports::default(),
            roster,
            loaded: loaded.owners,
            granting: BTreeSet::new(),
            is_dirty: true,
            behind: BTreeSet::new(),
            is_cut_off: false,
            standbys: BTreeMap::new(),
            brakes: Brakes::new(),
            successor: None,
            began: now,
            outranked: None,
            hands,
        };
        leader.recall(now);
        leader.inherit(now);
        leader.tick(now);
        leader.publish(None);
        leader.catch_up();
        leader
    }

    /// Takes the nodes of the leader before us for members.
    fn inherit(&mut self, now: Millis) {
        let nodes = self.membership.nodes().map(|node| node.joining.clone());
        for Joining { member, address, .. } in nodes.collect::<Vec<_>>() {
            self.hands.shared.links.learn(node_peer(&member.name), vec![address]);
            // Whose link outlived the leader before us would not know that another term began.
            self.behind.insert(node_peer(&member.name));
            self.drain_on(&member);
        }
        self.candidates_changed(now);
    }

    /// What the leaders before us wrote down of the shards. A standing of a later version is one that is not known.
    fn recall(&mut self, now: Millis) {
        for (shard, facts) in &mut self.shards {
            if let Some(owner) = &facts.owner {
                facts.reason = inherited(&self.journal, *shard, UNOWNED, &facts.row, owner);
            }
            let epoch = Epoch(facts.row.epoch);
            let standing = facts.row.standing.parse().unwrap_or_default();
            self.ownership.recall(*shard, Remembered { epoch, standing }, now);
        }
    }

    pub(crate) fn term(&self) -> Term {
        self.hands.term
    }

    pub(crate) fn cluster_id(&self) -> &ClusterId {
        &self.cluster_id
    }

    /// Another leads in this later term, says an owner row.
    pub(crate) fn outranked(&self) -> Option<Term> {
        self.outranked
    }

    /// Ends the leadership, but for what is in line to be written.
    pub(crate) fn into_journal(self) -> Journal {
        self.journal
    }

    // What comes in.

    pub(crate) fn tick(&mut self, now: Millis) {
        while self.tasks.try_join_next().is_some() {}
        let mut effects = self.membership.tick(now);
        effects.extend(self.look_at_links(now));
        self.carry(effects, now);
        self.brake(now);
        self.tell_drains(now);
        let actions = self.ownership.tick(now);
        self.act(actions, now);
        self.catch_up();
    }

    fn look_at_links(&mut self, now: Millis) -> Vec<membership::Effect> {
        let links = &self.hands.shared.links;
        let effects = self.membership.links(|name| links.is_linked(&node_peer(name)), now);
        let unlinked = self.membership.unlinked();
        metrics::UNLINKED.set(i64::try_from(unlinked).unwrap_or(i64::MAX));
        let is_cut_off = self.membership.is_cut_off(now);
        match (std::mem::replace(&mut self.is_cut_off, is_cut_off), is_cut_off) {
            (false, true) => {
                warn!(unlinked, "no link works to most nodes: none is taken for dead for that");
            }
            (true, false) => info!(unlinked, "links to most nodes work again"),
            (false, false) | (true, true) => {}
        }
        effects
    }

    pub(crate) fn join(
        &mut self,
        from: &Peer,
        request: JoinRequest,
        now: Millis,
    ) -> Result<Bytes, Refusal> {
        check_sender(from, &request.name)?;
        let joined = read_join(request)?;
        let member = joined.joining.member.clone();
        let effects = self.membership.joined(joined.joining.clone(), now);
        let effects = effects.map_err(|refused| Refusal {
            // Whoever is still alive comes back as the run after this one.
            moved_epoch: refused.known.0,
            ..refusal(Reason::Replaced, refused.to_string())
        })?;
        let is_dead =
            |effect: &membership::Effect| matches!(effect, membership::Effect::Dead { .. });
        let (replaced, rest): (Vec<_>, Vec<_>) = effects.into_iter().partition(is_dead);
        self.carry(replaced, now);
        self.roster.joined(&joined);
        self.drain_on(&member);
        self.hands.shared.links.learn(node_peer(&member.name), vec![joined.joining.address]);
        // It said so over its link, which may be older than this run of it.
        self.hands.shared.set_linked(member.name.clone(), Some(member.incarnation));
        self.carry(rest, now);
        self.candidates_changed(now);
        self.is_dirty = true;
        let peer = node_peer(&member.name);
        self.behind.remove(&peer);
        self.publish(Some(&peer));
        Ok(self.welcome())
    }

    pub(crate) fn leave(
        &mut self,
        from: &Peer,
        request: JoinRequest,
        now: Millis,
    ) -> Result<Bytes, Refusal> {
        check_sender(from, &request.name)?;
        let effects = self.membership.left(&read_join(request)?.joining.member);
        self.carry(effects, now);
        Ok(Bytes::new())
    }

    pub(crate) fn beat(&mut self, beat: Beat, now: Millis) {
        let member = beat.member.clone();
        let (held, rolled_back) = (beat.held.clone(), beat.rolled_back.clone());
        let Some(effects) = self.membership.beat(beat, now) else {
            // It lives, and takes itself for a member: the view tells it that it is none, and it joins anew.
            if self.membership.node(&member).is_none() {
                self.behind.insert(node_peer(&member.name));
            }
            return;
        };
        self.carry(effects, now);
        if self.membership.node(&member).is_some() {
            // Before it is missed among what is held: it was not simply given up.
            for found in rolled_back {
                self.rolled_back(&member, found, now);
            }
            let held = self.reports.beat(&member, &held, now);
            let actions = self.ownership.held(&member, &held, now);
            self.act(actions, now);
        }
    }

    pub(crate) fn session_lost(&mut self, name: &ProcessName, now: Millis) {
        let effects = self.membership.session_lost(name, now);
        self.carry(effects, now);
    }

    /// A node opened a shard; the next beat says so, too, but callers wait for it now.
    pub(crate) fn opened(
        &mut self,
        from: &Peer,
        held: Held,
        now: Millis,
    ) -> Result<Bytes, Refusal> {
        let member = self.member_at(from)?;
        self.granted(&member, Some(held), now);
        Ok(Bytes::new())
    }

    /// The node that `from` is.
    fn member_at(&self, from: &Peer) -> Result<Member, Refusal> {
        let node = self.membership.nodes().find(|node| node.member().name == from.name);
        let member = node.filter(|_| from.role == Role::Node).map(|node| node.member().clone());
        member.ok_or_else(|| {
            refusal(Reason::NotAuthorised, format!("{from} is no member: join first"))
        })
    }

    pub(crate) fn dropped(
        &mut self,
        from: &Peer,
        held: Held,
        reason: Reason,
        now: Millis,
    ) -> Result<Bytes, Refusal> {
        let member = self.member_at(from)?;
        self.reports.dropped(&member, held.shard);
        if reason == Reason::StoreRolledBack {
            self.rolled_back(&member, held, now);
            return Ok(Bytes::new());
        }
        let owner =
            self.shards.get_mut(&held.shard).filter(|facts| facts.is_owned_by(&member, held.epoch));
        if let Some(facts) = owner {
            warn!(shard = %held.shard, epoch = %held.epoch, %member, %reason, "node gave up a shard");
            let from = std::mem::replace(&mut facts.state, DROPPED);
            facts.reason = Some(reason);
            self.journal.transition(Transition {
                subject: format!("shard/{}", held.shard),
                from,
                to: DROPPED,
                reason,
                cause: format!("said by {member}"),
                epoch: held.epoch,
                node: member.name.to_string(),
            });
            let actions = self.ownership.dropped(held.shard, held.epoch, reason, now);
            self.act(actions, now);
        }
        Ok(Bytes::new())
    }

    fn rolled_back(&mut self, member: &Member, found: Held, now: Millis) {
        let Held { shard, epoch, .. } = found;
        let was_stopped = self.ownership.is_stopped(shard);
        let actions = self.ownership.dropped(shard, epoch, Reason::StoreRolledBack, now);
        if !was_stopped && self.ownership.is_stopped(shard) {
            warn!(%shard, %epoch, %member, "node found less in the store than was acknowledged");
        }
        self.act(actions, now);
    }

    /// A node says that one of its agents failed.
    pub(crate) fn agent_failed(
        &mut self,
        from: &Peer,
        failed: AgentFailed,
    ) -> Result<Bytes, Refusal> {
        let member = self.member_at(from)?;
        let agent: AgentId =
            failed.agent.parse().map_err(|error: domain::Error| malformed(error.to_string()))?;
        let (reason, to) = match u16::try_from(failed.reason).ok().and_then(Reason::from_code) {
            Some(reason @ Reason::Restarted) => (reason, "restarting"),
            Some(reason @ Reason::Quarantined) => (reason, "quarantined"),
            _ => return Err(malformed("an agent that failed is restarted or quarantined")),
        };
        let AgentFailed { shard, epoch, failures, detail, .. } = failed;
        self.journal.transition(Transition {
            subject: format!("agent/{agent}"),
            from: "running",
            to,
            reason,
            cause: format!("failure {failures} in shard {shard}: {detail}"),
            epoch: Epoch(epoch),
            node: member.name.to_string(),
        });
        Ok(Bytes::new())
    }

    pub(crate) fn done(&mut self, outcome: Outcome, now: Millis) {
        match outcome {
            Outcome::Loaded(_) => {}
            Outcome::Sighted(heard) => self.sighted(&heard),
            Outcome::OwnerRead(shard, Some(row)) => {
                let actions = self.owner_read(shard, row, now);
                self.act(actions, now);
            }
            Outcome::OwnerRead(shard, None) => self.ownership.owner_unread(shard, now),
            Outcome::Fenced(shard, result) => self.fenced(shard, result, now),
            Outcome::Granted(member, shard, epoch, held) => {
                self.granting.remove(&(shard, epoch));
                self.granted(&member, held, now);
            }
            Outcome::Probed(member, probe) => {
                let effects = self.membership.probe_result(&member, probe);
                self.carry(effects, now);
            }
        }
    }

    fn owner_read(&mut self, shard: ShardId, row: OwnerRow, now: Millis) -> Vec<Action> {
        self.note_owner(shard, &row);
        self.ownership.owner_read(shard, row, now)
    }

    fn fenced(&mut self, shard: ShardId, result: FenceResult, now: Millis) {
        if matches!(result, FenceResult::Fenced(_)) {
            point("leader-fenced");
        }
        let outcome = match &result {
            FenceResult::Fenced(row) | FenceResult::Lost(row) => {
                self.note_owner(shard, row);
                if matches!(result, FenceResult::Fenced(_)) { "fenced" } else { "lost" }
            }
            FenceResult::Failed => "failed",
        };
        metrics::FENCES.with_label_values(&[outcome]).inc();
        let actions = self.ownership.fence_result(shard, result, now);
        self.act(actions, now);
    }

    fn granted(&mut self, member: &Member, held: Option<Held>, now: Millis) {
        let outcome = if held.is_some() { "held" } else { "unanswered" };
        metrics::GRANTS.with_label_values(&[outcome]).inc();
        let Some(held) = held.filter(|_| self.membership.node(member).is_some()) else { return };
        let held = self.reports.answered(member, held, now);
        let actions = self.ownership.held(member, &held, now);
        self.act(actions, now);
    }

    // What follows from it.

    fn carry(&mut self, effects: Vec<membership::Effect>, now: Millis) {
        let mut is_changed = false;
        for effect in effects {
            match effect {
                membership::Effect::Probe { member } => self.probe(member),
                membership::Effect::Reach { member } => {
                    self.behind.insert(node_peer(&member.name));
                }
                membership::Effect::Alive { member, reason } => {
                    info!(%member, %reason, "node is alive");
                    self.record(&member, roster::ALIVE, reason);
                    is_changed = true;
                }
                membership::Effect::Suspect { member, reason } => {
                    warn!(%member, %reason, "node is suspected");
                    self.record(&member, SUSPECT, reason);
                    is_changed = true;
                }
                membership::Effect::Storeless { member } => {
                    warn!(%member, "node does not reach its store, which answers others");
                    self.record(&member, STORELESS, Reason::Storeless);
                    is_changed = true;
                }
                membership::Effect::Dead { member, reason } => {
                    self.bury(&member, reason);
                    is_changed = true;
                }
            }
        }
        if is_changed {
            self.candidates_changed(now);
        }
    }

    fn bury(&mut self, member: &Member, reason: Reason) {
        warn!(%member, %reason, "node is dead");
        self.record(member, if reason == Reason::Left { LEFT } else { DEAD }, reason);
        self.roster.remove(member);
        self.reports.forget(member);
        self.behind.remove(&node_peer(&member.name));
        self.is_dirty = true;
        // Its successor has the same name, and speaks over the same link already.
        if reason != Reason::Replaced {
            self.hands.shared.links.forget(node_peer(&member.name));
        }
        // Before what it had is granted: a new owner asks the nodes of its view what they run, and waits for them.
        self.publish(None);
    }

    fn candidates_changed(&mut self, now: Millis) {
        // Before anything is fenced.
        self.brake(now);
        self.count_members();
        let candidates = self.membership.nodes().map(membership::NodeView::candidate).collect();
        let actions = self.ownership.view(candidates, now);
        self.act(actions, now);
    }

    fn probe(&mut self, member: Member) {
        let Some(node) = self.membership.node(&member) else { return };
        let address = node.joining.address.clone();
        self.tasks.spawn(self.hands.clone().probe(member, address));
    }

    /// Writes down what a node is now.
    fn record(&mut self, member: &Member, state: &str, reason: Reason) {
        let Some((row, before)) = self.roster.set(member, state, reason) else { return };
        self.journal.node(row);
        self.journal.transition(Transition {
            subject: format!("node/{}", member.name),
            from: if reason == Reason::Joined { "" } else { &before },
            to: state,
            reason,
            cause: format!("incarnation {}", member.incarnation),
            epoch: Epoch(0),
            node: member.name.to_string(),
        });
    }

    fn act(&mut self, actions: Vec<Action>, now: Millis) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                Action::ReadOwner { shard } => match self.loaded.remove(&shard) {
                    Some(row) => actions.extend(self.owner_read(shard, row, now)),
                    None => self.read_owner(shard),
                },
                Action::Fence { shard, expected_epoch, above, to, term: _, reason } => {
                    self.fence(shard, expected_epoch, above, to, reason);
                }
                Action::Grant { shard, epoch, to } => self.grant(shard, epoch, to),
                Action::Remember { shard, remembered } => self.remember(shard, remembered),
                Action::MapChanged { version: _ } => self.map_changed(),
                Action::Outranked { term } => self.outranked = self.outranked.max(Some(term)),
            }
        }
    }

    fn read_owner(&mut self, shard: ShardId) {
        let Some(facts) = self.shards.get(&shard) else { return };
        let cluster_id = self.cluster_id.to_string();
        self.tasks.spawn(self.hands.clone().read_owner(cluster_id, facts.row.clone()));
    }

    fn fence(&mut self, shard: ShardId, expected: Epoch, above: Epoch, to: Member, reason: Reason) {
        let Some(facts) = self.shards.get_mut(&shard) else { return };
        let owner = facts.owner.as_ref().and_then(|owner| owner.member.as_ref());
        let cause = owner.map(|owner| self.roster.fate(owner)).unwrap_or_default();
        facts.fence = Some(Fencing { expected, above, to: to.clone(), reason, cause });
        point("leader-before-fence");
        let span = tracing::info_span!("place", %shard, %to, %reason);
        let fencing = self.hands.clone().fence(facts.row.clone(), expected, above, to);
        self.tasks.spawn(fencing.instrument(span));
    }

    fn grant(&mut self, shard: ShardId, epoch: Epoch, to: Member) {
        // A later run of that name must not take this for its own.
        let has_joined = self.membership.node(&to).is_some_and(membership::NodeView::has_joined);
        if !has_joined || self.hands.shared.is_linked_to_another(&to) {
            return;
        }
        let Some(facts) = self.shards.get(&shard) else { return };
        if self.granting.insert((shard, epoch)) {
            self.tasks.spawn(self.hands.clone().grant(facts.row.clone(), epoch, to));
        }
    }
}

/// A node speaks for itself only.
fn check_sender(from: &Peer, name: &str) -> Result<(), Refusal> {
    if from.role == Role::Node && from.name.as_str() == name {
        return Ok(());
    }
    let message =
        format!("{from} may not speak for node {name:.80?}: its certificate names another");
    Err(refusal(Reason::NotAuthorised, message))
}
