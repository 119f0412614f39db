//! A node's side of one shard: it opens it, writes it, and reads it back. The shell around [`domain::writer`] and
//! [`domain::heads`].

use std::collections::BTreeMap;
use std::rc::Rc;

use domain::entry::Entry;
use domain::heads::Heads;
use domain::membership::Held;
use domain::writer::{self, Limits, Next, Outcome, Placed, Writer};
use domain::{Epoch, IdempotencyKey, Lsn, Member, Reason, Seq, ShardId, WorkState};

use crate::config::{Break, Fault};
use crate::hot::{Hot, Loading};
use crate::message::{AgentRow, Answer, Ask, Group, Job, Mark, Message, Recovery, Row, Submit};
use crate::model::Promise;
use crate::world::{Address, World};

/// What a node asked the store for, and for which of its shards.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) sent: u64,
    pub(crate) shard: ShardId,
    pub(crate) epoch: Epoch,
    pub(crate) purpose: Purpose,
}

#[derive(Debug)]
pub(crate) enum Purpose {
    Commit,
    Position,
    Recover,
    Lookup { submit: Submit, instance: u64 },
    Row { agent: usize },
    History { agent: usize },
}

/// The questions of one node to the store.
pub(crate) struct Asks {
    pub(crate) from: Address,
    pub(crate) open: BTreeMap<u64, Pending>,
}

/// One append to the shard's log.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    /// None: the shard itself.
    pub(crate) agent: Option<usize>,
    pub(crate) agent_row: u64,
    /// Of the agent in memory that appended this.
    pub(crate) instance: u64,
    /// Used when the heads do not know the agent.
    pub(crate) prev: Lsn,
    /// Work 0: the row's own lsn.
    pub(crate) rows: Vec<(Seq, Lsn, Entry)>,
    pub(crate) save: Option<domain::agent::Agent>,
    pub(crate) ends: Vec<(Lsn, WorkState)>,
    pub(crate) key: Option<IdempotencyKey>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Reading,
    Opening,
    Open,
}

pub(crate) struct Host {
    pub(crate) shard: ShardId,
    pub(crate) epoch: Epoch,
    pub(crate) node: usize,
    pub(crate) member: Member,
    pub(crate) stage: Stage,
    writer: Writer<Item>,
    writer_number: u64,
    sent: Option<Rc<Group>>,
    pub(crate) heads: Heads,
    /// As they were before the group in flight was cut.
    heads_before: Heads,
    rows_since_mark: u64,
    pub(crate) marked: Vec<u64>,
    pub(crate) hot: BTreeMap<usize, Hot>,
    pub(crate) loading: BTreeMap<usize, Loading>,
    /// Reads of an agent's row under way: what they find must not become old unnoticed.
    pub(crate) lookups: BTreeMap<usize, usize>,
    pub(crate) instances: BTreeMap<usize, u64>,
    pub(crate) in_writer: BTreeMap<usize, usize>,
    /// What it read, until its first commit says that it may go on with it.
    recovery: Option<Recovery>,
    pub(crate) agent_max: u64,
    pub(crate) agents: BTreeMap<u64, usize>,
    /// Until then nodes may say which steps of the shard they have.
    pub(crate) asked_until: u64,
    /// Steps that nodes have, of agents that are not in memory yet.
    pub(crate) named: Vec<Job>,
    /// Why it gave up the shard.
    pub(crate) stopped: Option<Reason>,
}

impl Host {
    pub(crate) fn new(shard: ShardId, epoch: Epoch, node: usize, member: Member) -> Self {
        Self {
            shard,
            epoch,
            node,
            member,
            stage: Stage::Reading,
            writer: Writer::new(epoch, Lsn(0), Limits::default()),
            writer_number: 0,
            sent: None,
            heads: Heads::new(),
            heads_before: Heads::new(),
            rows_since_mark: 0,
            marked: Vec::new(),
            hot: BTreeMap::new(),
            loading: BTreeMap::new(),
            lookups: BTreeMap::new(),
            instances: BTreeMap::new(),
            in_writer: BTreeMap::new(),
            recovery: None,
            agent_max: 0,
            agents: BTreeMap::new(),
            asked_until: 0,
            named: Vec::new(),
            stopped: None,
        }
    }

    pub(crate) fn held(&self) -> Held {
        let is_open = self.stage == Stage::Open;
        Held { shard: self.shard, epoch: self.epoch, is_open }
    }

    pub(crate) fn ask(&self, world: &mut World, asks: &mut Asks, ask: Ask, purpose: Purpose) {
        let id = world.number();
        let (shard, epoch) = (self.shard, self.epoch);
        asks.open.insert(id, Pending { sent: world.now, shard, epoch, purpose });
        world.send(asks.from, Address::Store, Message::Ask { id, ask });
    }

    pub(crate) fn begin(&self, world: &mut World, asks: &mut Asks) {
        self.ask(world, asks, Ask::Recover(self.shard), Purpose::Recover);
    }

    pub(crate) fn answered(
        &mut self,
        world: &mut World,
        asks: &mut Asks,
        purpose: Purpose,
        answer: Answer,
    ) {
        // What a later owner wrote is not for an earlier one to act on: reads are guarded like writes.
        let is_stale = answer.read_in().is_some_and(|epoch| epoch != self.epoch);
        if is_stale && !world.breaks(Break::SkipReadGuard) {
            world.happen(Fault::StaleReadRefused);
            self.stopped = Some(Reason::Fenced);
            return;
        }
        match (purpose, answer) {
            (Purpose::Recover, Answer::Recovery { row, head, recovery }) => {
                if row.epoch != self.epoch || row.member.as_ref() != Some(&self.member) {
                    self.stopped = Some(Reason::Fenced);
                    return;
                }
                self.recovery = Some(recovery);
                self.open(world, asks, head);
            }
            (Purpose::Commit, Answer::Committed) => self.settle(world, asks, Outcome::Committed),
            (Purpose::Commit, Answer::Fenced { epoch }) => {
                self.settle(world, asks, Outcome::Fenced { epoch });
            }
            (Purpose::Commit, Answer::HeadMismatch) => {
                self.settle(world, asks, Outcome::HeadMismatch);
            }
            (Purpose::Position, Answer::Position { epoch, head }) => {
                self.settle(world, asks, Outcome::Position { epoch, head });
            }
            (Purpose::Lookup { submit, instance }, Answer::Agent { row, work, .. }) => {
                self.looked_up(world, asks, submit, instance, row, work);
            }
            (Purpose::Row { agent }, Answer::Agent { row, .. }) => {
                self.row_read(world, asks, agent, row);
            }
            (Purpose::History { agent }, Answer::History { rows, .. }) => {
                self.history_read(world, asks, agent, rows);
            }
            (purpose, answer) => unreachable!("{answer:?} answers {purpose:?}"),
        }
    }

    /// No answer came in time.
    pub(crate) fn unanswered(&mut self, world: &mut World, asks: &mut Asks, purpose: Purpose) {
        match purpose {
            Purpose::Commit | Purpose::Position => self.settle(world, asks, Outcome::Unknown),
            Purpose::Recover => self.begin(world, asks),
            Purpose::Lookup { submit, instance } => self.lookup_lost(&submit, instance),
            Purpose::Row { agent } => self.read_row(world, asks, agent),
            Purpose::History { agent } => self.read_history(world, asks, agent),
        }
    }

    /// The first act of an owner is a guarded commit: nobody has written since it read.
    fn open(&mut self, world: &mut World, asks: &mut Asks, head: Lsn) {
        self.stage = Stage::Opening;
        let waiting_rows_max = world.config.waiting_rows_max;
        let limits = Limits { waiting_rows_max, ..Limits::default() };
        self.writer = Writer::new(self.epoch, head, limits);
        self.writer_number = world.number();
        let opened = (Seq(0), Lsn(0), Entry::ShardOpened(self.member.clone()));
        let item = Item {
            agent: None,
            agent_row: 0,
            instance: 0,
            prev: Lsn(0),
            rows: vec![opened],
            save: None,
            ends: Vec::new(),
            key: None,
        };
        assert!(self.writer.begin(item.rows.len(), 0, item).is_ok(), "it has just begun");
        self.flush(world, asks);
    }

    /// Whether there was room for `item`.
    pub(crate) fn push(&mut self, world: &mut World, item: Item) -> bool {
        let agent = item.agent;
        if self.writer.push(item.rows.len(), 0, item).is_err() {
            world.happen(Fault::WriterFull);
            return false;
        }
        if let Some(agent) = agent {
            *self.in_writer.entry(agent).or_default() += 1;
        }
        true
    }

    pub(crate) fn flush(&mut self, world: &mut World, asks: &mut Asks) {
        if self.sent.is_some() {
            return;
        }
        let before = self.heads.clone();
        let Some(group) = self.writer.cut() else { return };
        self.heads_before = before;
        self.rows_since_mark += group.items.iter().map(|placed| placed.rows as u64).sum::<u64>();
        let mut built = Group {
            shard: self.shard,
            epoch: self.epoch,
            by: (self.member.clone(), self.writer_number),
            before: group.before,
            rows: Vec::new(),
            agents: Vec::new(),
            works: Vec::new(),
            ends: Vec::new(),
            keys: Vec::new(),
            mark: None,
        };
        build(&mut built, &mut self.heads, group, world.breaks(Break::ForgetHeadTooEarly));
        if world.config.mark_rows <= self.rows_since_mark {
            self.rows_since_mark = 0;
            built.mark = Some(self.mark(world, group_last(&built)));
        }
        self.sent = Some(Rc::new(built));
        self.send(world, asks);
    }

    fn mark(&self, world: &World, lsn: Lsn) -> Mark {
        let mut heads = self.heads.snapshot();
        if world.breaks(Break::ForgetIdleAgents) {
            let has_work = |row: &u64| {
                let hot = self.agents.get(row).and_then(|agent| self.hot.get(agent));
                hot.is_some_and(|hot| 0 < hot.agent.open_len())
            };
            heads.retain(|(row, _)| has_work(row));
        }
        (lsn, heads)
    }

    fn send(&self, world: &mut World, asks: &mut Asks) {
        if let Some(group) = &self.sent {
            self.ask(world, asks, Ask::Commit(Rc::clone(group)), Purpose::Commit);
        }
    }

    fn settle(&mut self, world: &mut World, asks: &mut Asks, outcome: Outcome) {
        let is_position = matches!(outcome, Outcome::Position { .. });
        match self.writer.settle(outcome) {
            Next::Acknowledge(group) => {
                if is_position {
                    world.happen(Fault::UnknownWasCommitted);
                }
                self.sent = None;
                self.committed(world, asks, group);
                self.flush(world, asks);
            }
            Next::ReadPosition => {
                self.ask(world, asks, Ask::Position(self.shard), Purpose::Position);
            }
            Next::SendAgain => {
                world.happen(Fault::UnknownWasSentAgain);
                if world.breaks(Break::RecutUnknownGroup) {
                    return self.cut_again(world, asks);
                }
                self.send(world, asks);
            }
            Next::Stop(reason) => {
                if reason == Reason::StoreRolledBack {
                    let (shard, epoch) = (self.shard, self.epoch);
                    world.model.breach(Promise::NoFalseAlarm, || {
                        format!("shard {shard} epoch {epoch} stopped as rolled back")
                    });
                }
                self.stopped = Some(reason);
            }
        }
    }

    /// What must never be done: the group whose outcome is unknown, and everything that came since, as a new group.
    fn cut_again(&mut self, world: &mut World, asks: &mut Asks) {
        let items = self.writer.drain();
        self.writer = Writer::new(self.epoch, self.writer.head(), Limits::default());
        for item in items {
            let rows = item.rows.len();
            assert!(self.writer.push(rows, 0, item).is_ok(), "there is room");
        }
        self.heads = self.heads_before.clone();
        self.sent = None;
        self.flush(world, asks);
    }

    fn committed(&mut self, world: &mut World, asks: &mut Asks, group: writer::Group<Item>) {
        for Placed { first, item, .. } in group.items {
            let Some(agent) = item.agent else {
                if let Some(recovery) = self.recovery.take() {
                    self.recover(world, asks, recovery);
                }
                continue;
            };
            if let Some(count) = self.in_writer.get_mut(&agent) {
                *count -= 1;
            }
            self.item_committed(world, agent, first, item);
            self.settled(world, asks, agent);
        }
        let agents: Vec<usize> = self.hot.keys().copied().collect();
        for agent in agents {
            self.drive(world, asks, agent);
        }
        self.save_stale(world, asks);
    }

    fn recover(&mut self, world: &mut World, asks: &mut Asks, recovery: Recovery) {
        self.heads = Heads::recover(&recovery.mark, recovery.tail.iter().copied());
        let marked = recovery.mark.iter().map(|(row, _)| *row);
        self.marked = marked.filter(|row| !recovery.tail.iter().any(|(_, r)| r == row)).collect();
        self.agent_max = recovery.agent_max;
        self.agents = recovery.rows.into_iter().collect();
        self.stage = Stage::Open;
        if !recovery.due.is_empty() {
            self.ask_workers(world, asks);
        }
        world
            .trace(|| format!("OPEN shard {} epoch {} at {}", self.shard, self.epoch, self.member));
        for row in recovery.due {
            let agent = row.agent;
            self.loading.insert(agent, Loading { row: Some(row), waiting: vec![], is_due: true });
            self.read_history(world, asks, agent);
        }
    }
}

fn group_last(group: &Group) -> Lsn {
    group.rows.last().map_or(group.before, |row| row.lsn)
}

/// Turns items into rows. Heads move on with every row, also of what is not committed yet: a group that does not get
/// through ends its writer.
fn build(built: &mut Group, heads: &mut Heads, group: &writer::Group<Item>, forgets: bool) {
    for Placed { first, item, .. } in &group.items {
        let mut last = item.prev;
        for (index, (seq, work, entry)) in item.rows.iter().enumerate() {
            let lsn = Lsn(first.0 + index as u64);
            let prev = heads.get(item.agent_row).unwrap_or_default().max(item.prev);
            let work = if *work == Lsn(0) { *first } else { *work };
            let (agent_row, seq, epoch) = (item.agent_row, *seq, built.epoch);
            let entry = entry.clone();
            built.rows.push(Row { lsn, agent_row, prev, seq, work, epoch, entry });
            heads.note(item.agent_row, lsn);
            last = lsn;
        }
        let Some(agent) = item.agent else { continue };
        if let Some(snapshot) = &item.save {
            let snapshot = snapshot.clone();
            built.agents.push(AgentRow { id: item.agent_row, agent, head: last, snapshot });
            // An append that brings entries and the row does not take the agent out of the heads: an entry of it that
            // waits already knows no other `prev` than theirs.
            if item.rows.is_empty() || forgets {
                heads.saved(item.agent_row, last);
            }
        }
        built.ends.extend(item.ends.iter().copied());
        if let Some(key) = &item.key {
            built.works.push((*first, agent));
            built.keys.push((agent, key.clone(), *first));
        }
    }
}
