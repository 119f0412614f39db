//! A simulated control replica: the shell around [`domain::leadership`], [`domain::membership`] and
//! [`domain::ownership`].

use std::collections::{BTreeMap, BTreeSet};

use domain::leadership::{self, LeaderRow, Leadership, Taken};
use domain::membership::{DEAD_MS, Effect, Membership, NodeView, Probe};
use domain::ownership::{self, FenceResult, Ownership, Settings, ShardStanding};
use domain::slot::ShardTable;
use domain::time::Millis;
use domain::{Epoch, Member, ProcessName, Reason, ShardId, Term};

use crate::config::{Break, Fault};
use crate::message::{Answer, Ask, Message};
use crate::model::Promise;
use crate::node;
use crate::world::{Address, World};

const STORE_MS: u64 = 300;

enum Purpose {
    Leader,
    Take,
    Beat { sent: Millis },
    Known { term: Term },
    Note,
    Owner { term: Term, shard: ShardId },
    Fence { term: Term, shard: ShardId },
}

/// What a leader knows; gone when it leads no more.
struct Lead {
    term: Term,
    membership: Membership,
    ownership: Ownership,
    /// It has read who is dead: before, it takes nobody in.
    is_ready: bool,
    granted: BTreeSet<(ShardId, Epoch)>,
}

pub(crate) struct Control {
    index: usize,
    name: ProcessName,
    /// Clocks of processes have nothing in common.
    clock_offset: u64,
    leadership: Leadership,
    lead: Option<Lead>,
    seen: Option<(usize, Term)>,
    asks: BTreeMap<u64, (u64, Purpose)>,
}

fn name_of(index: usize) -> ProcessName {
    format!("control-{index}").parse().unwrap()
}

impl Control {
    pub(crate) fn start(world: &mut World, index: usize) -> Self {
        Self {
            index,
            name: name_of(index),
            clock_offset: world.chance.between(0, 1 << 40),
            leadership: Leadership::new(),
            lead: None,
            seen: None,
            asks: BTreeMap::new(),
        }
    }

    fn clock(&self, world: &World) -> Millis {
        Millis(world.now + self.clock_offset)
    }

    pub(crate) fn believes_to_lead(&self) -> bool {
        self.lead.is_some()
    }

    /// What it may act on now: a leader whose beat is too old may not, whatever it still remembers.
    fn acting(&mut self, world: &World) -> Option<&mut Lead> {
        let term = self.leadership.leads(self.clock(world));
        let is_old = world.breaks(Break::OldLeaderFences);
        self.lead.as_mut().filter(|lead| lead.is_ready && (is_old || term == Some(lead.term)))
    }

    fn ask(&mut self, world: &mut World, ask: Ask, purpose: Purpose) {
        let id = world.number();
        self.asks.insert(id, (world.now, purpose));
        world.send(Address::Control(self.index), Address::Store, Message::Ask { id, ask });
    }

    pub(crate) fn tick(&mut self, world: &mut World) {
        self.time_out(world);
        let now = self.clock(world);
        let actions = self.leadership.tick(now);
        self.lead_on(world, actions);
        if let Some(lead) = self.acting(world) {
            let effects = lead.membership.tick(now);
            self.members_changed(world, effects);
        }
        self.drain(world);
        if let Some(lead) = self.acting(world) {
            let actions = lead.ownership.tick(now);
            self.own(world, actions);
        }
    }

    fn drain(&mut self, world: &mut World) {
        let is_draining = world.is_draining.clone();
        let Some(lead) = self.acting(world) else { return };
        let members = lead.membership.nodes().map(|node| node.member().clone());
        let members: Vec<Member> =
            members.filter(|member| is_draining[node::index_of(member)]).collect();
        let is_news = members.iter().filter(|member| lead.membership.drain(member)).count() != 0;
        if is_news {
            self.candidates_changed(world);
        }
    }

    fn time_out(&mut self, world: &mut World) {
        let is_late = |sent: &u64| *sent + STORE_MS <= world.now;
        let late: Vec<u64> =
            self.asks.iter().filter(|(_, (sent, _))| is_late(sent)).map(|(id, _)| *id).collect();
        for id in late {
            let Some((_, purpose)) = self.asks.remove(&id) else { continue };
            let now = self.clock(world);
            match purpose {
                Purpose::Leader | Purpose::Beat { .. } | Purpose::Note => {}
                Purpose::Take => {
                    let actions = self.leadership.taken(Taken::Unknown, now);
                    self.lead_on(world, actions);
                }
                Purpose::Known { term } => self.ask(world, Ask::Known, Purpose::Known { term }),
                Purpose::Owner { term, shard } => {
                    if let Some(lead) = self.acting(world).filter(|lead| lead.term == term) {
                        lead.ownership.owner_unread(shard, now);
                    }
                }
                Purpose::Fence { term, shard } => {
                    world.happen(Fault::FenceUnanswered);
                    self.fence_result(world, term, shard, FenceResult::Failed);
                }
            }
        }
    }

    pub(crate) fn handle(&mut self, world: &mut World, message: Message) {
        let now = self.clock(world);
        match message {
            Message::Answer { id, answer } => {
                if let Some((_, purpose)) = self.asks.remove(&id) {
                    self.answered(world, purpose, answer);
                }
            }
            Message::Join { node, joining } => {
                let member = joining.member.clone();
                let Some(lead) = self.acting(world) else { return };
                let term = lead.term;
                let (answer, effects) = match lead.membership.joined(joining, now) {
                    Ok(effects) => (Message::Joined { member, term }, effects),
                    Err(_) => (Message::JoinRefused { member }, Vec::new()),
                };
                world.send(Address::Control(self.index), Address::Node(node), answer);
                self.members_changed(world, effects);
            }
            Message::Beat { node, beat } => {
                let (member, number, held) = (beat.member.clone(), beat.number, beat.held.clone());
                let mut is_member = true;
                let mut effects = None;
                if let Some(lead) = self.acting(world) {
                    is_member = lead.membership.node(&member).is_some();
                    effects = lead.membership.beat(beat, now);
                }
                let leader = self.leader(world);
                let answer = Message::BeatAnswer { number, leader, is_member };
                world.send(Address::Control(self.index), Address::Node(node), answer);
                let Some(effects) = effects else { return };
                self.members_changed(world, effects);
                if let Some(lead) = self.acting(world) {
                    let actions = lead.ownership.held(&member, &held, now);
                    self.own(world, actions);
                }
            }
            Message::SessionLost(name) => {
                let Some(lead) = self.acting(world) else { return };
                let effects = lead.membership.session_lost(&name, now);
                self.members_changed(world, effects);
            }
            Message::Probed { member, probe } => {
                let Some(lead) = self.acting(world) else { return };
                let effects = lead.membership.probe_result(&member, probe);
                self.members_changed(world, effects);
            }
            Message::Dropped { shard, epoch, reason } => {
                let Some(lead) = self.acting(world) else { return };
                let actions = lead.ownership.dropped(shard, epoch, reason, now);
                self.own(world, actions);
            }
            other => unreachable!("a control replica got {other:?}"),
        }
    }

    /// Who leads, as far as this replica knows.
    fn leader(&mut self, world: &World) -> Option<(usize, Term)> {
        let index = self.index;
        self.acting(world).map(|lead| (index, lead.term)).or(self.seen)
    }

    fn answered(&mut self, world: &mut World, purpose: Purpose, answer: Answer) {
        let now = self.clock(world);
        match (purpose, answer) {
            (Purpose::Leader, Answer::Leader(row)) => {
                self.see(&row);
                let row = Some(&row).filter(|row| row.term != Term(0));
                let actions = self.leadership.observe(row, now);
                self.lead_on(world, actions);
            }
            (Purpose::Take, Answer::Taken(taken)) => {
                if let Taken::Lost(row) = &taken {
                    self.see(row);
                }
                let actions = self.leadership.taken(taken, now);
                self.lead_on(world, actions);
            }
            (Purpose::Beat { sent }, Answer::Led) => self.leadership.beat_written(sent),
            (Purpose::Note, Answer::Led) => {}
            (Purpose::Beat { .. } | Purpose::Note, Answer::NotLeader) => self.depose(world),
            (Purpose::Known { term }, Answer::Known { alive, buried, shards }) => {
                let Some(lead) = self.lead.as_mut().filter(|lead| lead.term == term) else {
                    return;
                };
                for member in &buried {
                    lead.membership.buried(member);
                }
                for joining in alive {
                    lead.membership.inherited(joining, DEAD_MS, now);
                }
                for (shard, remembered) in shards {
                    lead.ownership.recall(shard, remembered, now);
                }
                lead.is_ready = true;
                self.candidates_changed(world);
            }
            (Purpose::Owner { term, shard }, Answer::Owner { mut row }) => {
                let is_blind = world.breaks(Break::OldLeaderFences);
                let Some(lead) = self.acting(world).filter(|lead| lead.term == term) else {
                    return;
                };
                if is_blind {
                    row.term = row.term.min(lead.term);
                }
                let actions = lead.ownership.owner_read(shard, row, now);
                self.own(world, actions);
            }
            (Purpose::Fence { term, shard }, Answer::Fence(mut result)) => {
                if world.breaks(Break::OldLeaderFences)
                    && let FenceResult::Lost(row) = &mut result
                {
                    row.term = row.term.min(term);
                }
                self.fence_result(world, term, shard, result);
            }
            (_, answer) => unreachable!("a control replica was answered {answer:?}"),
        }
    }

    fn see(&mut self, row: &LeaderRow) {
        let index = (0..2).find(|index| row.name == Some(name_of(*index)));
        self.seen = index.map(|index| (index, row.term));
    }

    fn fence_result(&mut self, world: &mut World, term: Term, shard: ShardId, result: FenceResult) {
        let now = self.clock(world);
        let Some(lead) = self.acting(world).filter(|lead| lead.term == term) else { return };
        let actions = lead.ownership.fence_result(shard, result, now);
        self.own(world, actions);
    }

    fn depose(&mut self, world: &mut World) {
        let actions = self.leadership.deposed();
        self.lead_on(world, actions);
    }

    fn lead_on(&mut self, world: &mut World, actions: Vec<leadership::Action>) {
        for action in actions {
            match action {
                leadership::Action::Observe => self.ask(world, Ask::Leader, Purpose::Leader),
                leadership::Action::Take { expected_term, expected_beat, .. } => {
                    let (term, beat) = (expected_term, expected_beat);
                    let ask = Ask::Take { name: self.name.clone(), term, beat };
                    self.ask(world, ask, Purpose::Take);
                }
                leadership::Action::RaiseBeat { term, sent } => {
                    let ask = Ask::RaiseBeat { name: self.name.clone(), term };
                    self.ask(world, ask, Purpose::Beat { sent });
                }
                leadership::Action::Began(term) => self.begin(world, term),
                leadership::Action::Ended(reason) => self.end(world, reason),
                leadership::Action::Release { .. } => {}
            }
        }
    }

    fn begin(&mut self, world: &mut World, term: Term) {
        // With the rule broken the old leader goes on, and does not notice that it might lead again.
        if world.breaks(Break::OldLeaderFences) && self.lead.is_some() {
            return;
        }
        world.trace(|| format!("LEADS {} term {term}", self.name));
        world.is_leading[self.index] = true;
        if world.is_leading == [true, true] {
            world.happen(Fault::TwoLeaders);
        }
        let table = ShardTable::single(world.config.shards).unwrap();
        let nodes_expected = world.config.nodes;
        let settings =
            Settings { settle_ms: 1_500, nodes_expected, moves_max: 2, move_every_ms: 50 };
        let ownership = Ownership::new(term, table.shards(), settings, self.clock(world));
        let (membership, granted) = (Membership::new(), BTreeSet::new());
        self.lead = Some(Lead { term, membership, ownership, is_ready: false, granted });
        self.ask(world, Ask::Known, Purpose::Known { term });
    }

    fn end(&mut self, world: &mut World, reason: Reason) {
        world.trace(|| format!("ENDS {} {reason}", self.name));
        if !world.breaks(Break::OldLeaderFences) {
            self.lead = None;
            world.is_leading[self.index] = false;
        }
    }

    fn members_changed(&mut self, world: &mut World, effects: Vec<Effect>) {
        if effects.is_empty() {
            return;
        }
        let from = Address::Control(self.index);
        for effect in effects {
            world.trace(|| format!("{} says {effect:?}", self.name));
            match effect {
                // Links of the simulation are there, or the message is lost.
                Effect::Reach { .. } => {}
                Effect::Probe { member } => {
                    let is_up = world.is_up[node::index_of(&member)];
                    let probe = if is_up { Probe::Connected } else { Probe::Refused };
                    world.tell(from, from, Message::Probed { member, probe });
                }
                Effect::Dead { member, .. } => self.bury(world, member),
                Effect::Alive { member, reason: Reason::Joined } => self.admit(world, &member),
                Effect::Alive { reason: Reason::BeatsAgain, .. } => {
                    world.happen(Fault::SuspectCameBack);
                }
                Effect::Alive { .. } | Effect::Suspect { .. } | Effect::Storeless { .. } => {}
            }
        }
        self.candidates_changed(world);
    }

    fn candidates_changed(&mut self, world: &mut World) {
        let now = self.clock(world);
        let Some(lead) = self.acting(world) else { return };
        let candidates = lead.membership.nodes().map(NodeView::candidate).collect();
        let actions = lead.ownership.view(candidates, now);
        self.own(world, actions);
    }

    fn admit(&mut self, world: &mut World, member: &Member) {
        let Some(lead) = &self.lead else { return };
        let Some(node) = lead.membership.node(member) else { return };
        let (name, term, joining) = (self.name.clone(), lead.term, node.joining.clone());
        self.ask(world, Ask::Admit { name, term, joining }, Purpose::Note);
    }

    fn bury(&mut self, world: &mut World, member: Member) {
        if let Some(lead) = &self.lead {
            let term = lead.term;
            let ask = Ask::Bury { name: self.name.clone(), term, member };
            self.ask(world, ask, Purpose::Note);
        }
    }

    fn own(&mut self, world: &mut World, actions: Vec<ownership::Action>) {
        for action in actions {
            let Some(lead) = &mut self.lead else { return };
            let term = lead.term;
            match action {
                ownership::Action::ReadOwner { shard } => {
                    self.ask(world, Ask::Owner(shard), Purpose::Owner { term, shard });
                }
                ownership::Action::Fence { shard, expected_epoch, above, to, term, reason } => {
                    match reason {
                        Reason::OwnerDraining => world.happen(Fault::ShardDrained),
                        Reason::Rebalanced => world.happen(Fault::ShardRebalanced),
                        _ => {}
                    }
                    let ask = Ask::Fence { shard, expected: expected_epoch, above, to, term };
                    self.ask(world, ask, Purpose::Fence { term, shard });
                }
                ownership::Action::Grant { shard, epoch, to } => {
                    let is_first = lead.granted.insert((shard, epoch));
                    if !is_first {
                        world.happen(Fault::GrantRepeated);
                    }
                    if is_first || !world.breaks(Break::GrantOnce) {
                        let node = Address::Node(node::index_of(&to));
                        let grant = Message::Grant { shard, epoch, to };
                        world.send(Address::Control(self.index), node, grant);
                    }
                }
                ownership::Action::Remember { shard, remembered } => {
                    if remembered.standing == ShardStanding::Stopped {
                        world.model.breach(Promise::NoFalseAlarm, || {
                            format!("shard {shard} is stopped in epoch {}", remembered.epoch)
                        });
                    }
                    let name = self.name.clone();
                    let ask = Ask::Remember { name, term, shard, remembered };
                    self.ask(world, ask, Purpose::Note);
                }
                ownership::Action::MapChanged { .. } => {}
                ownership::Action::Outranked { .. } => self.depose(world),
            }
        }
    }
}
