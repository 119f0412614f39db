//! A simulated node: it joins, beats, takes grants, works as a phase worker and hosts shards.

use std::collections::BTreeMap;

use domain::membership::{BEAT_MS, Beat, Joining};
use domain::{CapabilitySet, Epoch, Incarnation, Member, Reason, ShardId, Term};

use crate::config::{Break, Fault};
use crate::host::{Asks, Host};
use crate::message::{Job, Message};
use crate::world::{Address, World};
use crate::{TICK_MS, phases, shard_of};

const STORE_MS: u64 = 300;
const JOIN_MS: u64 = 300;
/// How long an answer is kept after it was given.
const KEPT_MS: u64 = 3_000;

pub(crate) struct Node {
    index: usize,
    member: Member,
    leader: Option<(usize, Term)>,
    /// The term whose leader took it in, and the number of its last beat before that.
    joined: Option<(Term, u64)>,
    join_sent: u64,
    beat_number: u64,
    beat_sent: u64,
    asks: Asks,
    hosts: BTreeMap<ShardId, Host>,
    /// The last epoch of each shard that it opened: it opens none twice.
    used: BTreeMap<ShardId, Epoch>,
    /// Since when it runs: what was sent to a run before it finds a link that is gone.
    started_at: u64,
    /// Steps that its workers took, and when each is answered.
    jobs: Vec<(Job, u64)>,
}

pub(crate) fn name_of(index: usize) -> domain::ProcessName {
    format!("node-{index}").parse().unwrap()
}

pub(crate) fn index_of(member: &Member) -> usize {
    member.name.as_str()["node-".len()..].parse().unwrap()
}

impl Node {
    pub(crate) fn start(world: &mut World, index: usize) -> Self {
        Self {
            index,
            member: Member { name: name_of(index), incarnation: Incarnation(world.number()) },
            leader: None,
            joined: None,
            join_sent: 0,
            beat_number: 0,
            beat_sent: 0,
            asks: Asks { from: Address::Node(index), open: BTreeMap::new() },
            hosts: BTreeMap::new(),
            used: BTreeMap::new(),
            started_at: world.now,
            jobs: Vec::new(),
        }
    }

    fn address(&self) -> Address {
        Address::Node(self.index)
    }

    pub(crate) fn hosts_any(&self) -> bool {
        !self.hosts.is_empty()
    }

    /// Whether a shard that it holds has another owner by now.
    pub(crate) fn is_zombie(&self, world: &World) -> bool {
        self.hosts.keys().any(|shard| world.model.owner(*shard) != Some(&self.member))
    }

    pub(crate) fn tick(&mut self, world: &mut World) {
        self.time_out(world);
        if let Some((leader, term)) = self.leader
            && self.joined.is_none_or(|(joined, _)| joined < term)
            && JOIN_MS <= world.now - self.join_sent
        {
            self.join_sent = world.now;
            let message = Message::Join { node: self.index, joining: self.joining() };
            world.send(self.address(), Address::Control(leader), message);
        }
        if self.beat_number == 0 || BEAT_MS <= world.now - self.beat_sent + TICK_MS / 2 {
            self.beat(world);
        }
        self.each_host(world, |host, world, asks| host.tick(world, asks));
    }

    fn joining(&self) -> Joining {
        Joining {
            member: self.member.clone(),
            zone: "z".to_owned(),
            capacity: 1,
            capabilities: CapabilitySet::default(),
            address: String::new(),
        }
    }

    fn beat(&mut self, world: &mut World) {
        self.beat_number += 1;
        self.beat_sent = world.now;
        let beat = Beat {
            member: self.member.clone(),
            number: self.beat_number,
            held: self.hosts.values().map(Host::held).collect(),
            rolled_back: Vec::new(),
            loads: Vec::new(),
            hot_agents: 0,
            runtime_silent_ms: 0,
            stores: BTreeMap::new(),
        };
        for control in 0..world.config.controls {
            let message = Message::Beat { node: self.index, beat: beat.clone() };
            world.send(self.address(), Address::Control(control), message);
        }
    }

    fn time_out(&mut self, world: &mut World) {
        let late: Vec<u64> = self
            .asks
            .open
            .iter()
            .filter(|(_, pending)| pending.sent + STORE_MS <= world.now)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            let Some(pending) = self.asks.open.remove(&id) else { continue };
            if let Some(host) = self.hosts.get_mut(&pending.shard)
                && host.epoch == pending.epoch
            {
                host.unanswered(world, &mut self.asks, pending.purpose);
            }
        }
        self.drop_stopped(world);
    }

    fn each_host(&mut self, world: &mut World, act: impl Fn(&mut Host, &mut World, &mut Asks)) {
        for host in self.hosts.values_mut() {
            act(host, world, &mut self.asks);
        }
        self.drop_stopped(world);
    }

    fn drop_stopped(&mut self, world: &mut World) {
        let stopped = self.hosts.values().filter_map(|host| Some((host.shard, host.stopped?)));
        for (shard, reason) in stopped.collect::<Vec<_>>() {
            self.drop_shard(world, shard, reason);
        }
    }

    fn drop_shard(&mut self, world: &mut World, shard: ShardId, reason: Reason) {
        let Some(host) = self.hosts.remove(&shard) else { return };
        world.happen(Fault::ShardDropped);
        world.trace(|| {
            format!("DROP shard {shard} epoch {} at {}: {reason}", host.epoch, self.member)
        });
        self.say_dropped(world, shard, host.epoch, reason);
    }

    fn say_dropped(&self, world: &mut World, shard: ShardId, epoch: Epoch, reason: Reason) {
        if let Some((leader, _)) = self.leader {
            let message = Message::Dropped { shard, epoch, reason };
            world.send(self.address(), Address::Control(leader), message);
        }
    }

    pub(crate) fn handle(&mut self, world: &mut World, message: Message) {
        match message {
            Message::Answer { id, answer } => {
                let Some(pending) = self.asks.open.remove(&id) else { return };
                if let Some(host) = self.hosts.get_mut(&pending.shard)
                    && host.epoch == pending.epoch
                {
                    host.answered(world, &mut self.asks, pending.purpose, answer);
                }
                self.drop_stopped(world);
            }
            Message::Joined { member, term } => {
                if member == self.member && self.joined.is_none_or(|(joined, _)| joined < term) {
                    self.joined = Some((term, self.beat_number));
                }
            }
            Message::JoinRefused { member } if member == self.member => self.rejoin(world),
            Message::JoinRefused { .. } => {}
            Message::BeatAnswer { number, leader, is_member } => {
                self.hear_leader(leader);
                let is_told =
                    |(term, beats)| leader.is_some_and(|(_, t)| t == term) && beats < number;
                if !is_member && self.joined.is_some_and(is_told) {
                    self.rejoin(world);
                }
            }
            Message::Grant { shard, epoch, to } => self.grant(world, shard, epoch, &to),
            Message::Submit(submit) => {
                match self.hosts.get_mut(&shard_of(submit.agent, world.config.shards)) {
                    Some(host) => host.submit(world, &mut self.asks, submit),
                    None => world.send(self.address(), Address::Clients, Message::Refused),
                }
            }
            Message::Cancel { agent, work } => {
                if let Some(host) = self.hosts.get_mut(&shard_of(agent, world.config.shards)) {
                    host.cancel(world, &mut self.asks, agent, work);
                }
            }
            Message::Job(job) => self.work(world, job),
            Message::JobAnswer { job, output, node } => {
                let shard = shard_of(job.agent, world.config.shards);
                if let Some(host) = self.hosts.get_mut(&shard) {
                    host.job_answered(world, &mut self.asks, &job, output, node);
                }
            }
            Message::StepsWanted { shard, epoch, owner } => {
                self.steps_wanted(world, shard, epoch, owner);
            }
            Message::StepsHeld { shard, epoch, jobs } => {
                if let Some(host) = self.hosts.get_mut(&shard).filter(|host| host.epoch == epoch) {
                    host.steps_held(world, &mut self.asks, jobs);
                }
            }
            other => unreachable!("a node got {other:?}"),
        }
    }

    fn hear_leader(&mut self, leader: Option<(usize, Term)>) {
        let Some((_, term)) = leader else { return };
        if self.leader.is_none_or(|(_, known)| known < term) {
            self.leader = leader;
        }
    }

    /// It was declared dead: what it held is not its own any more, and it comes as a new incarnation.
    fn rejoin(&mut self, world: &mut World) {
        world.happen(Fault::NodeRejoined);
        self.hosts.clear();
        self.member.incarnation = Incarnation(world.number());
        world.trace(|| format!("REJOIN as {}", self.member));
        self.joined = None;
        self.join_sent = 0;
        self.beat_number = 0;
    }

    fn grant(&mut self, world: &mut World, shard: ShardId, epoch: Epoch, to: &Member) {
        if *to != self.member {
            return;
        }
        if let Some(host) = self.hosts.get(&shard)
            && epoch <= host.epoch
        {
            return;
        }
        let is_used = self.used.get(&shard).is_some_and(|used| epoch <= *used);
        if is_used && !world.breaks(Break::OpenEpochAgain) {
            return self.say_dropped(world, shard, epoch, Reason::Fenced);
        }
        self.used.insert(shard, epoch);
        let host = Host::new(shard, epoch, self.index, self.member.clone());
        host.begin(world, &mut self.asks);
        self.hosts.insert(shard, host);
    }

    /// A worker: does each job once, and none that is too old. Answers to whoever owns the agent by now, as far as it knows.
    fn work(&mut self, world: &mut World, job: Job) {
        if job.deadline < world.now || job.sent_at < self.started_at {
            return world.happen(Fault::JobTooLate);
        }
        let is_same = |known: &Job| {
            (known.agent, known.work, known.step) == (job.agent, job.work, job.step)
                && (known.epoch, known.attempt) == (job.epoch, job.attempt)
        };
        if self.jobs.iter().any(|(known, _)| is_same(known)) {
            return world.happen(Fault::JobTwice);
        }
        world.model.made(&job);
        let mut to = job.owner;
        if world.chance.permille(500)
            && let Some(owner) = world.model.owner(shard_of(job.agent, world.config.shards))
        {
            to = index_of(owner);
        }
        let ms = world.chance.between(5, world.config.job_ms_max);
        self.jobs.retain(|(_, done_at)| world.now < done_at + KEPT_MS);
        self.jobs.push((job.clone(), world.now + ms));
        self.answer(world, job, ms, to);
    }

    fn answer(&self, world: &mut World, job: Job, ms: u64, to: usize) {
        let output = phases::output(job.step, &String::from_utf8_lossy(&job.input));
        let message = Message::JobAnswer { job, output, node: self.index };
        world.send_after(ms, self.address(), Address::Node(to), message);
    }

    /// A new owner is told which steps of its shard are here, and sent their answers, now or when there are any.
    fn steps_wanted(&self, world: &mut World, shard: ShardId, epoch: Epoch, owner: usize) {
        let is_wanted =
            |job: &Job| shard_of(job.agent, world.config.shards) == shard && job.epoch < epoch;
        let wanted = self.jobs.iter().filter(|(job, _)| is_wanted(job));
        let wanted: Vec<(Job, u64)> = wanted.cloned().collect();
        let jobs = wanted.iter().map(|(job, _)| job.clone()).collect();
        let message = Message::StepsHeld { shard, epoch, jobs };
        world.send(self.address(), Address::Node(owner), message);
        for (job, done_at) in wanted {
            // The answer comes after the word that there will be one.
            let ms = done_at.saturating_sub(world.now).max(10);
            self.answer(world, job, ms, owner);
        }
    }

    pub(crate) fn crash_agent(&mut self, world: &mut World) {
        self.each_host(world, |host, world, asks| host.crash_agent(world, asks));
    }

    pub(crate) fn crash_shard(&mut self, world: &mut World) {
        let shards: Vec<ShardId> = self.hosts.keys().copied().collect();
        if !shards.is_empty() {
            let shard = shards[world.chance.index(shards.len())];
            self.drop_shard(world, shard, Reason::Restarted);
        }
    }
}
