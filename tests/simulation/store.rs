//! The simulated store: what the real one promises, and nothing more.
//!
//! It answers each ask at one moment, whole or not at all. What it holds survives its restarts.

use std::collections::BTreeMap;

use domain::leadership::{LeaderRow, Taken};
use domain::membership::Joining;
use domain::ownership::{FenceResult, OwnerRow, Remembered};
use domain::{Epoch, IdempotencyKey, Lsn, Member, ProcessName, ShardId, Term, WorkState};

use crate::config::{Break, Fault};
use crate::message::{AgentRow, Answer, Ask, Group, Mark, Message, Recovery, Row};
use crate::world::{Address, World};

#[derive(Default)]
struct Shard {
    epoch: Epoch,
    owner: Option<Member>,
    term: Term,
    log: BTreeMap<Lsn, Row>,
    agents: BTreeMap<u64, AgentRow>,
    works: BTreeMap<Lsn, (usize, WorkState)>,
    keys: BTreeMap<(usize, IdempotencyKey), Lsn>,
    mark: Mark,
}

pub(crate) struct Store {
    shards: Vec<Shard>,
    leader: LeaderRow,
    alive: BTreeMap<ProcessName, Joining>,
    buried: Vec<Member>,
    remembered: BTreeMap<ShardId, Remembered>,
    pub(crate) is_down: bool,
}

impl Store {
    pub(crate) fn new(shards: u16) -> Self {
        let shards = (0..shards).map(|_| Shard::default()).collect();
        let (leader, alive, buried, remembered) = Default::default();
        Self { shards, leader, alive, buried, remembered, is_down: false }
    }

    pub(crate) fn handle(&mut self, world: &mut World, from: Address, id: u64, ask: Ask) {
        if self.is_down {
            return world.trace(|| format!("store is down for {from:?}"));
        }
        let answer = self.answer(world, ask);
        world.send(Address::Store, from, Message::Answer { id, answer });
    }

    fn answer(&mut self, world: &mut World, ask: Ask) -> Answer {
        match ask {
            Ask::Commit(group) => self.commit(world, &group),
            Ask::Position(shard) => {
                let shard = self.shard(shard);
                Answer::Position { epoch: shard.epoch, head: shard.head() }
            }
            Ask::Owner(shard) => {
                let shard = self.shard(shard);
                Answer::Owner { row: shard.owner_row() }
            }
            Ask::Fence { shard, expected, above, to, term } => {
                self.fence(world, shard, (expected, above), to, term)
            }
            Ask::Agent { shard, agent, key } => {
                let shard = self.shard(shard);
                let row = shard.agents.values().find(|row| row.agent == agent).cloned();
                let work = key.and_then(|key| shard.keys.get(&(agent, key)).copied());
                Answer::Agent { epoch: shard.epoch, row, work }
            }
            Ask::History { shard, from, above } => {
                let shard = self.shard(shard);
                Answer::History { epoch: shard.epoch, rows: shard.history(from, above) }
            }
            Ask::Recover(shard) => {
                let shard = self.shard(shard);
                let (row, head) = (shard.owner_row(), shard.head());
                Answer::Recovery { row, head, recovery: shard.recovery() }
            }
            Ask::Leader => Answer::Leader(self.leader.clone()),
            Ask::Take { name, term, beat } => {
                if (self.leader.term, self.leader.beat) != (term, beat) {
                    return Answer::Taken(Taken::Lost(self.leader.clone()));
                }
                if term != Term(0) {
                    world.happen(Fault::LeaderChanged);
                }
                self.leader = LeaderRow { name: Some(name), term: term.next(), beat: 0 };
                Answer::Taken(Taken::Won)
            }
            Ask::RaiseBeat { name, term } => self.lead(&name, term, |store| store.leader.beat += 1),
            Ask::Admit { name, term, joining } => self.lead(&name, term, |store| {
                store.alive.insert(joining.member.name.clone(), joining);
            }),
            Ask::Bury { name, term, member } => self.lead(&name, term, |store| {
                store.alive.retain(|_, joining| joining.member != member);
                store.buried.push(member);
            }),
            Ask::Remember { name, term, shard, remembered } => self.lead(&name, term, |store| {
                store.remembered.insert(shard, remembered);
            }),
            Ask::Known => {
                let shards = self.remembered.iter().map(|(shard, it)| (*shard, *it)).collect();
                let alive = self.alive.values().cloned().collect();
                Answer::Known { alive, buried: self.buried.clone(), shards }
            }
        }
    }

    fn lead(
        &mut self,
        name: &domain::ProcessName,
        term: Term,
        act: impl FnOnce(&mut Self),
    ) -> Answer {
        if self.leader.term != term || self.leader.name.as_ref() != Some(name) {
            return Answer::NotLeader;
        }
        act(self);
        Answer::Led
    }

    fn shard(&mut self, shard: ShardId) -> &mut Shard {
        &mut self.shards[shard.0 as usize]
    }

    fn commit(&mut self, world: &mut World, group: &Group) -> Answer {
        let shard = self.shard(group.shard);
        if shard.epoch != group.epoch && !world.breaks(Break::SkipFencedGuard) {
            world.happen(Fault::StaleWriteRefused);
            return Answer::Fenced { epoch: shard.epoch };
        }
        if shard.head() != group.before && !world.breaks(Break::SkipHeadGuard) {
            world.happen(Fault::WrongHeadRefused);
            return Answer::HeadMismatch;
        }
        world.trace(|| {
            let last = group.rows.last().map_or(group.before, |row| row.lsn);
            let what: Vec<String> =
                group.rows.iter().map(|row| format!("{} {}", row.lsn, row.entry.name())).collect();
            format!("COMMIT shard {} epoch {} to {last}: {what:?}", group.shard, group.epoch)
        });
        world.model.committed(group);
        shard.apply(group);
        Answer::Committed
    }

    fn fence(
        &mut self,
        world: &mut World,
        id: ShardId,
        (expected, above): (Epoch, Epoch),
        to: Member,
        term: Term,
    ) -> Answer {
        let shard = self.shard(id);
        let is_old = term < shard.term && !world.breaks(Break::OldLeaderFences);
        if shard.epoch != expected || is_old {
            world.happen(Fault::FenceLost);
            return Answer::Fence(FenceResult::Lost(shard.owner_row()));
        }
        if shard.owner.is_some() {
            world.happen(Fault::ShardMoved);
        }
        shard.epoch = expected.max(above).next();
        shard.owner = Some(to.clone());
        shard.term = term;
        let epoch = shard.epoch;
        world.trace(|| format!("FENCE shard {id} epoch {epoch} to {to} term {term}"));
        world.model.fenced(id, epoch, to, term);
        Answer::Fence(FenceResult::Fenced(self.shard(id).owner_row()))
    }
}

impl Shard {
    fn head(&self) -> Lsn {
        self.log.keys().next_back().copied().unwrap_or_default()
    }

    fn owner_row(&self) -> OwnerRow {
        OwnerRow { epoch: self.epoch, member: self.owner.clone(), term: self.term }
    }

    fn apply(&mut self, group: &Group) {
        self.log.extend(group.rows.iter().map(|row| (row.lsn, row.clone())));
        self.agents.extend(group.agents.iter().map(|row| (row.id, row.clone())));
        let accepted = group.works.iter();
        self.works.extend(accepted.map(|(id, agent)| (*id, (*agent, WorkState::Accepted))));
        for (work, state) in &group.ends {
            if let Some(row) = self.works.get_mut(work) {
                row.1 = *state;
            }
        }
        self.keys.extend(group.keys.iter().map(|(agent, key, id)| ((*agent, key.clone()), *id)));
        if let Some(mark) = &group.mark {
            self.mark = mark.clone();
        }
    }

    /// Follows `prev`, newest first.
    fn history(&self, from: Lsn, above: Lsn) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut at = from;
        while above < at {
            let Some(row) = self.log.get(&at) else { break };
            rows.push(row.clone());
            at = row.prev;
        }
        rows
    }

    fn recovery(&self) -> Recovery {
        let is_due = |row: &&AgentRow| {
            self.works.values().any(|(agent, state)| *agent == row.agent && !state.is_final())
        };
        let (lsn, mark) = self.mark.clone();
        Recovery {
            mark,
            tail: self.log.range(lsn.next()..).map(|(lsn, row)| (*lsn, row.agent_row)).collect(),
            due: self.agents.values().filter(is_due).cloned().collect(),
            agent_max: self.agents.keys().next_back().copied().unwrap_or(0),
            rows: self.agents.iter().map(|(id, row)| (*id, row.agent)).collect(),
        }
    }
}
