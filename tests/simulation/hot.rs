//! The agents of a shard that are in memory: they are looked up, loaded, fed, saved and evicted. The shell around
//! [`domain::agent`].

use std::collections::BTreeMap;

use domain::StepKey;
use domain::agent::Agent;
use domain::entry::{Accepted, Entry, Stamp};
use domain::turn::Turn;
use domain::{Class, IdempotencyKey, Lsn, Seq, Slot};

use crate::config::{Break, Fault};
use crate::host::{Asks, Host, Item, Purpose, Stage};
use crate::message::{AgentRow, Ask, Message, Row, Submit};
use crate::model::Promise;
use crate::phases;
use crate::world::{Address, World};

const IDLE_MS: u64 = 250;

/// An agent in memory.
pub(crate) struct Hot {
    row: u64,
    /// Its row is committed or on its way.
    is_stored: bool,
    instance: u64,
    pub(crate) agent: Agent,
    /// The last number that was given to an entry.
    pub(crate) seq: Seq,
    accepting: BTreeMap<IdempotencyKey, Vec<usize>>,
    /// Keys of works that were accepted since it is in memory: a read that began before does not know them.
    keys: BTreeMap<IdempotencyKey, Lsn>,
    /// The step that is being run: work, step, attempt, since when.
    pub(crate) job: Option<(Lsn, StepKey, u32, u64)>,
    /// An entry of its turn is on its way into the journal.
    pub(crate) is_journaling: bool,
    is_saving: bool,
    pub(crate) resumes_at: u64,
    /// Until then its workers may say that they have a step of it.
    pub(crate) settles_at: u64,
    /// The intent that was journaled last, and when its commit was sent.
    pub(crate) intended: Option<(StepKey, u32, u64)>,
    /// Since when a person is asked about a step in doubt.
    pub(crate) asked_at: Option<u64>,
    idle_since: u64,
}

/// An agent on its way into memory. Without a row: what the writer still has of it is waited for.
pub(crate) struct Loading {
    pub(crate) row: Option<AgentRow>,
    pub(crate) waiting: Vec<Submit>,
    /// It may have been in the middle of a turn.
    pub(crate) is_due: bool,
}

impl Host {
    pub(crate) fn submit(&mut self, world: &mut World, asks: &mut Asks, submit: Submit) {
        if self.stage != Stage::Open {
            return world.send(asks.from, Address::Clients, Message::Refused);
        }
        let (shard, agent) = (self.shard, submit.agent);
        *self.lookups.entry(agent).or_default() += 1;
        let key = Some(submit.key.clone());
        let instance = self.instance(agent);
        let purpose = Purpose::Lookup { submit, instance };
        self.ask(world, asks, Ask::Agent { shard, agent, key }, purpose);
    }

    fn instance(&self, agent: usize) -> u64 {
        self.instances.get(&agent).copied().unwrap_or_default()
    }

    pub(crate) fn lookup_lost(&mut self, submit: &Submit, instance: u64) {
        if instance == self.instance(submit.agent)
            && let Some(count) = self.lookups.get_mut(&submit.agent)
        {
            *count -= 1;
        }
    }

    pub(crate) fn looked_up(
        &mut self,
        world: &mut World,
        asks: &mut Asks,
        submit: Submit,
        instance: u64,
        row: Option<AgentRow>,
        work: Option<Lsn>,
    ) {
        // Answers for an agent that was restarted since are void.
        if instance != self.instance(submit.agent) {
            return;
        }
        self.lookup_lost(&submit, instance);
        let agent = submit.agent;
        if let Some(work) = work {
            return accepted(world, asks, submit.request, work);
        }
        if self.hot.contains_key(&agent) {
            return self.accept(world, asks, submit);
        }
        if let Some(loading) = self.loading.get_mut(&agent) {
            return loading.waiting.push(submit);
        }
        match row {
            Some(row) => {
                world.happen(Fault::AgentWoken);
                let loading = Loading { row: Some(row), waiting: vec![submit], is_due: false };
                self.loading.insert(agent, loading);
                self.read_history(world, asks, agent);
            }
            None => {
                self.agent_max += 1;
                let hot = Hot::new(self.agent_max, false, instance, Agent::default(), world.now);
                self.agents.insert(self.agent_max, agent);
                self.hot.insert(agent, hot);
                self.accept(world, asks, submit);
            }
        }
    }

    pub(crate) fn read_row(&self, world: &mut World, asks: &mut Asks, agent: usize) {
        let ask = Ask::Agent { shard: self.shard, agent, key: None };
        self.ask(world, asks, ask, Purpose::Row { agent });
    }

    pub(crate) fn row_read(
        &mut self,
        world: &mut World,
        asks: &mut Asks,
        agent: usize,
        row: Option<AgentRow>,
    ) {
        let Some(loading) = self.loading.get_mut(&agent) else { return };
        loading.row = row;
        self.read_history(world, asks, agent);
    }

    pub(crate) fn read_history(&self, world: &mut World, asks: &mut Asks, agent: usize) {
        let row = self.loading.get(&agent).and_then(|loading| loading.row.as_ref());
        let Some(row) = row else { return };
        let known = self.heads.get(row.id);
        if known.is_some_and(|head| row.head < head) && self.marked.contains(&row.id) {
            world.happen(Fault::HeadKnownByMark);
        }
        let from = known.unwrap_or_default().max(row.head);
        let ask = Ask::History { shard: self.shard, from, above: row.snapshot.head };
        self.ask(world, asks, ask, Purpose::History { agent });
    }

    pub(crate) fn history_read(
        &mut self,
        world: &mut World,
        asks: &mut Asks,
        agent: usize,
        rows: Vec<Row>,
    ) {
        let Some(Loading { row: Some(row), waiting, is_due }) = self.loading.remove(&agent) else {
            return;
        };
        let mut folded = row.snapshot;
        for Row { lsn, seq, work, epoch, entry, .. } in rows.into_iter().rev() {
            let stamp = Stamp { seq, lsn, epoch, ts_ms: 0 };
            fold(world, &mut folded, work, entry, stamp);
        }
        if is_due {
            folded.interrupt();
        }
        let instance = self.instance(agent);
        let mut hot = Hot::new(row.id, true, instance, folded, world.now);
        hot.settles_at = self.asked_until;
        self.hot.insert(agent, hot);
        if is_due {
            self.take_over(world, asks, agent);
        }
        for submit in waiting {
            self.accept(world, asks, submit);
        }
        if is_due && world.breaks(Break::RunCommittedStepAgain) {
            self.run_again(world, asks, agent);
        }
        self.drive(world, asks, agent);
    }

    fn accept(&mut self, world: &mut World, asks: &mut Asks, submit: Submit) {
        let Some(hot) = self.hot.get_mut(&submit.agent) else { return };
        let open = hot.agent.submitted_as(&submit.key).map(Turn::id);
        if let Some(work) = open.or(hot.keys.get(&submit.key).copied()) {
            return accepted(world, asks, submit.request, work);
        }
        if let Some(requests) = hot.accepting.get_mut(&submit.key) {
            return requests.push(submit.request);
        }
        if hot.agent.admit(hot.accepting.len()).is_err() {
            return world.send(asks.from, Address::Clients, Message::Refused);
        }
        let definition = phases::definition(&String::from_utf8_lossy(&submit.input));
        let entry = Entry::Accepted(Accepted {
            definition,
            input: submit.input,
            key: submit.key.clone(),
            deadline_ms: i64::MAX,
            traceparent: None,
            class: Class(0),
            slot: Slot::new(0).unwrap(),
        });
        let mut item = hot.item(submit.agent, vec![(Lsn(0), entry)]);
        item.key = Some(submit.key.clone());
        if !hot.is_stored {
            item.save = Some(Agent::default());
        }
        if !self.push(world, item) {
            return world.send(asks.from, Address::Clients, Message::Refused);
        }
        if world.breaks(Break::AcknowledgeBeforeCommit) {
            accepted(world, asks, submit.request, Lsn(0));
        }
        let Some(hot) = self.hot.get_mut(&submit.agent) else { return };
        hot.is_stored = true;
        hot.seq = hot.seq.next();
        hot.accepting.insert(submit.key, vec![submit.request]);
        self.flush(world, asks);
    }

    /// Folds what was committed, unless the agent was restarted since: then it is read back from the store.
    pub(crate) fn item_committed(
        &mut self,
        world: &mut World,
        agent: usize,
        first: Lsn,
        item: Item,
    ) {
        let hot = self.hot.get_mut(&agent).filter(|hot| hot.instance == item.instance);
        let Some(hot) = hot else { return };
        if item.rows.is_empty() {
            hot.is_saving = false;
            return;
        }
        let is_turn = item.key.is_none();
        for (index, (seq, work, entry)) in item.rows.into_iter().enumerate() {
            let lsn = Lsn(first.0 + index as u64);
            let stamp = Stamp { seq, lsn, epoch: self.epoch, ts_ms: 0 };
            fold(world, &mut hot.agent, work, entry, stamp);
        }
        hot.idle_since = world.now;
        if is_turn {
            hot.is_journaling = false;
        }
        if let Some(key) = item.key {
            let requests = hot.accepting.remove(&key).unwrap_or_default();
            hot.keys.insert(key, first);
            for request in requests {
                let told = Message::Accepted { request, work: first };
                world.send(Address::Node(self.node), Address::Clients, told);
            }
        }
    }

    pub(crate) fn tick(&mut self, world: &mut World, asks: &mut Asks) {
        let agents: Vec<usize> = self.hot.keys().copied().collect();
        for agent in agents {
            self.give_up_job(world, asks, agent);
            self.drive(world, asks, agent);
            self.evict(world, asks, agent);
        }
    }

    fn is_settled(&self, agent: usize) -> bool {
        self.in_writer.get(&agent).is_none_or(|count| *count == 0)
    }

    fn evict(&mut self, world: &mut World, asks: &mut Asks, agent: usize) {
        let Some(hot) = self.hot.get(&agent) else { return };
        let is_needed = 0 < hot.agent.open_len()
            || self.lookups.get(&agent).is_some_and(|count| 0 < *count)
            || world.now < hot.idle_since + IDLE_MS;
        if is_needed || !self.is_settled(agent) {
            return;
        }
        if self.heads.get(hot.row).is_none() {
            world.happen(Fault::AgentEvicted);
            self.hot.remove(&agent);
            return;
        }
        self.save(world, asks, agent);
    }

    /// Writes the agent's row.
    fn save(&mut self, world: &mut World, asks: &mut Asks, agent: usize) {
        let Some(hot) = self.hot.get(&agent).filter(|hot| !hot.is_saving) else { return };
        let item = Item { save: Some(hot.agent.clone()), ..hot.item(agent, Vec::new()) };
        if self.push(world, item)
            && let Some(hot) = self.hot.get_mut(&agent)
        {
            hot.is_saving = true;
        }
        self.flush(world, asks);
    }

    /// Too many rows are older than their agents: the oldest are written, cold ones after they are loaded.
    pub(crate) fn save_stale(&mut self, world: &mut World, asks: &mut Asks) {
        for row in self.heads.overflow(world.config.stale_agents_max) {
            let Some(agent) = self.agents.get(&row).copied() else { continue };
            if self.hot.contains_key(&agent) {
                if self.is_settled(agent) {
                    world.happen(Fault::StaleRowWritten);
                    self.save(world, asks, agent);
                }
            } else if !self.loading.contains_key(&agent) && self.stage == Stage::Open {
                let loading = Loading { row: None, waiting: vec![], is_due: false };
                self.loading.insert(agent, loading);
                self.read_row(world, asks, agent);
            }
        }
    }

    /// An agent fails and is started again: first everything of it in the writer has to be settled.
    pub(crate) fn crash_agent(&mut self, world: &mut World, asks: &mut Asks) {
        let agents: Vec<usize> = self.hot.keys().copied().collect();
        if agents.is_empty() {
            return;
        }
        let agent = agents[world.chance.index(agents.len())];
        let Some(hot) = self.hot.remove(&agent) else { return };
        world.happen(Fault::AgentCrashed);
        world.trace(|| format!("CRASH agent {agent} of shard {}", self.shard));
        *self.instances.entry(agent).or_default() += 1;
        self.lookups.remove(&agent);
        if hot.is_stored {
            self.loading.insert(agent, Loading { row: None, waiting: vec![], is_due: true });
            self.settled(world, asks, agent);
        }
    }

    /// An agent that waits for its entries to be settled may be read back.
    pub(crate) fn settled(&mut self, world: &mut World, asks: &mut Asks, agent: usize) {
        let is_waited_for =
            self.loading.get(&agent).is_some_and(|loading| loading.row.is_none() && loading.is_due);
        if is_waited_for && self.is_settled(agent) {
            self.read_row(world, asks, agent);
        }
    }
}

impl Hot {
    fn new(row: u64, is_stored: bool, instance: u64, agent: Agent, now: u64) -> Self {
        Self {
            row,
            is_stored,
            instance,
            seq: agent.seq,
            agent,
            accepting: BTreeMap::new(),
            keys: BTreeMap::new(),
            job: None,
            is_journaling: false,
            is_saving: false,
            resumes_at: 0,
            settles_at: 0,
            intended: None,
            asked_at: None,
            idle_since: now,
        }
    }

    /// An append of these entries, numbered on from the last.
    pub(crate) fn item(&self, agent: usize, entries: Vec<(Lsn, Entry)>) -> Item {
        let numbered = entries.into_iter().zip(self.seq.0 + 1..);
        Item {
            agent: Some(agent),
            agent_row: self.row,
            instance: self.instance,
            prev: self.agent.head,
            rows: numbered.map(|((work, entry), seq)| (Seq(seq), work, entry)).collect(),
            save: None,
            ends: Vec::new(),
            key: None,
        }
    }
}

fn fold(world: &mut World, agent: &mut Agent, work: Lsn, entry: Entry, stamp: Stamp) {
    let config = &world.config;
    if let Err(error) = agent.apply(work, entry, stamp, |hash| config.limits(hash)) {
        world.model.breach(Promise::NothingIsForgotten, || {
            format!("entry {} of work {work} was refused by the fold: {error}", stamp.lsn)
        });
    }
}

fn accepted(world: &mut World, asks: &Asks, request: usize, work: Lsn) {
    if work != Lsn(0) {
        world.happen(Fault::DuplicateSubmit);
    }
    world.send(asks.from, Address::Clients, Message::Accepted { request, work });
}
