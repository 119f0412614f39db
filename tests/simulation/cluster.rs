//! One schedule, from its first event to rest: the processes, their crashes and pauses, and the clients.

use domain::WorkState;
use domain::membership::BEAT_MS;

use crate::config::{Break, Config, Fault, Happened};
use crate::control::Control;
use crate::message::{Message, Submit};
use crate::model::Broken;
use crate::node::{self, Node};
use crate::store::Store;
use crate::world::{Address, Event, Plan, World};
use crate::{TICK_MS, shard_of};

const RETRY_MS: u64 = 400;
/// Much more than anything here waits for.
const REST_MS: u64 = 60_000;

/// A process that can crash and be stopped.
struct Process<P> {
    inner: Option<P>,
    run: u64,
    is_paused: bool,
    /// What came while it was stopped.
    backlog: Vec<Event>,
}

impl<P> Process<P> {
    fn new() -> Self {
        Self { inner: None, run: 0, is_paused: false, backlog: Vec::new() }
    }

    /// What handles an event now, if the process runs.
    fn awake(&mut self, event: Event) -> Option<(&mut P, Event)> {
        let inner = self.inner.as_mut()?;
        if self.is_paused {
            self.backlog.push(event);
            return None;
        }
        Some((inner, event))
    }

    fn crash(&mut self) {
        self.inner = None;
        self.run += 1;
        self.is_paused = false;
        self.backlog.clear();
    }
}

struct Cluster {
    world: World,
    store: Store,
    nodes: Vec<Process<Node>>,
    controls: Vec<Process<Control>>,
}

/// How a schedule went.
pub(crate) struct Outcome {
    pub(crate) broken: Option<Broken>,
    pub(crate) happened: Happened,
    pub(crate) events: u64,
    pub(crate) ended_at: u64,
}

pub(crate) fn run(seed: u64, broken_rule: Option<Break>, is_traced: bool) -> Outcome {
    let world = World::new(seed, broken_rule, is_traced);
    world.trace(|| format!("{:#?}", world.config));
    let mut cluster = Cluster {
        store: Store::new(world.config.shards),
        nodes: (0..world.config.nodes).map(|_| Process::new()).collect(),
        controls: (0..world.config.controls).map(|_| Process::new()).collect(),
        world,
    };
    cluster.begin();
    let events = cluster.run();
    let Cluster { mut world, .. } = cluster;
    if world.model.broken.is_none() {
        world.model.finish();
    }
    if world.model.states().any(|state| state == WorkState::DeadLettered) {
        world.happen(Fault::DeadLettered);
    }
    let (broken, happened) = (world.model.broken.take(), world.happened);
    Outcome { broken, happened, events, ended_at: world.now }
}

impl Cluster {
    fn begin(&mut self) {
        for index in 0..self.controls.len() {
            self.start(Address::Control(index));
        }
        for index in 0..self.nodes.len() {
            self.start(Address::Node(index));
        }
        for request in 0..self.world.config.submits.len() {
            let at = self.world.config.submits[request].at;
            self.world.at(at, Event::Submit(request));
        }
        Config::plan(&mut self.world);
    }

    fn run(&mut self) -> u64 {
        let mut events = 0;
        while self.world.model.broken.is_none() && self.world.now < REST_MS {
            if !self.world.is_faulty() && self.world.model.is_at_rest() {
                break;
            }
            let Some(event) = self.world.pop() else { break };
            events += 1;
            self.step(event);
        }
        events
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Deliver { to: Address::Store, from, number, message } => {
                self.world.arrive(from, Address::Store, number);
                let Message::Ask { id, ask } = message else { unreachable!("the store is asked") };
                self.store.handle(&mut self.world, from, id, ask);
            }
            Event::Deliver { to: Address::Clients, message, .. } => self.told(message),
            Event::Submit(request) => self.submit(request),
            Event::Plan(plan) => self.plan(plan),
            Event::Deliver { to: Address::Node(index), .. }
            | Event::Tick { who: Address::Node(index), .. } => self.node(index, event),
            Event::Deliver { to: Address::Control(index), .. }
            | Event::Tick { who: Address::Control(index), .. } => self.control(index, event),
            Event::Tick { .. } => {}
        }
    }

    fn node(&mut self, index: usize, event: Event) {
        let world = &mut self.world;
        let run = self.nodes[index].run;
        let Some((node, event)) = self.nodes[index].awake(event) else { return };
        match event {
            Event::Tick { who, run: of } if of == run => {
                node.tick(world);
                world.after(TICK_MS, Event::Tick { who, run });
            }
            Event::Deliver { from, to, number, message } => {
                world.arrive(from, to, number);
                node.handle(world, message);
            }
            Event::Tick { .. } | Event::Submit(_) | Event::Plan(_) => {}
        }
    }

    fn control(&mut self, index: usize, event: Event) {
        let world = &mut self.world;
        let run = self.controls[index].run;
        let Some((control, event)) = self.controls[index].awake(event) else { return };
        match event {
            Event::Tick { who, run: of } if of == run => {
                control.tick(world);
                world.after(TICK_MS, Event::Tick { who, run });
            }
            Event::Deliver { from, to, number, message } => {
                world.arrive(from, to, number);
                control.handle(world, message);
            }
            Event::Tick { .. } | Event::Submit(_) | Event::Plan(_) => {}
        }
    }

    fn start(&mut self, who: Address) {
        let world = &mut self.world;
        let run = match who {
            Address::Node(index) if self.nodes[index].inner.is_none() => {
                world.is_up[index] = true;
                self.nodes[index].inner = Some(Node::start(world, index));
                self.nodes[index].run
            }
            Address::Control(index) if self.controls[index].inner.is_none() => {
                self.controls[index].inner = Some(Control::start(world, index));
                self.controls[index].run
            }
            Address::Node(_) | Address::Control(_) | Address::Store | Address::Clients => return,
        };
        world.trace(|| format!("START {who:?}"));
        let phase = world.chance.between(0, TICK_MS);
        world.after(phase, Event::Tick { who, run });
    }

    fn plan(&mut self, plan: Plan) {
        self.world.trace(|| format!("PLAN {plan:?}"));
        match plan {
            Plan::Crash(who) => self.crash(who),
            Plan::Start(who) => self.start(who),
            Plan::Pause(who, ms) => self.pause(who, ms),
            Plan::Resume(who, run) => self.resume(who, run),
            Plan::StoreDown => {
                self.store.is_down = true;
                self.world.happen(Fault::StoreRestarted);
            }
            Plan::StoreUp => self.store.is_down = false,
            Plan::SessionReset(index) => {
                self.world.happen(Fault::SessionReset);
                self.session_lost(index);
            }
            Plan::Drain(index) => self.world.is_draining[index] = true,
            Plan::AgentCrash(index) => {
                if let Some(node) = &mut self.nodes[index].inner {
                    node.crash_agent(&mut self.world);
                }
            }
            Plan::ShardCrash(index) => {
                if let Some(node) = &mut self.nodes[index].inner {
                    node.crash_shard(&mut self.world);
                }
            }
        }
    }

    fn session_lost(&mut self, index: usize) {
        for control in 0..self.world.config.controls {
            let lost = Message::SessionLost(node::name_of(index));
            self.world.tell(Address::Node(index), Address::Control(control), lost);
        }
    }

    fn crash(&mut self, who: Address) {
        match who {
            Address::Node(index) => {
                let process = &mut self.nodes[index];
                if process.inner.as_ref().is_some_and(Node::hosts_any) {
                    self.world.happen(Fault::NodeCrashed);
                }
                process.crash();
                self.world.is_up[index] = false;
                self.world.is_draining[index] = false;
                self.session_lost(index);
            }
            Address::Control(index) => {
                let process = &mut self.controls[index];
                if process.inner.as_ref().is_some_and(Control::believes_to_lead) {
                    self.world.happen(Fault::LeaderCrashed);
                }
                process.crash();
                self.world.is_leading[index] = false;
            }
            Address::Store | Address::Clients => {}
        }
    }

    fn pause(&mut self, who: Address, ms: u64) {
        let run = match who {
            Address::Node(index) => {
                let process = &mut self.nodes[index];
                process.is_paused = process.inner.is_some();
                if process.inner.as_ref().is_some_and(Node::hosts_any) && BEAT_MS < ms {
                    self.world.happen(Fault::NodePaused);
                }
                process.run
            }
            Address::Control(index) => {
                let process = &mut self.controls[index];
                process.is_paused = process.inner.is_some();
                if process.inner.as_ref().is_some_and(Control::believes_to_lead) && BEAT_MS < ms {
                    self.world.happen(Fault::LeaderPaused);
                }
                process.run
            }
            Address::Store | Address::Clients => return,
        };
        self.world.after(ms, Event::Plan(Plan::Resume(who, run)));
    }

    fn resume(&mut self, who: Address, run: u64) {
        let backlog = match who {
            Address::Node(index) if self.nodes[index].run == run => {
                let process = &mut self.nodes[index];
                process.is_paused = false;
                let is_zombie = process.inner.as_ref().is_some_and(|n| n.is_zombie(&self.world));
                if is_zombie && !process.backlog.is_empty() {
                    self.world.happen(Fault::ZombieWoke);
                }
                std::mem::take(&mut process.backlog)
            }
            Address::Control(index) if self.controls[index].run == run => {
                let process = &mut self.controls[index];
                process.is_paused = false;
                std::mem::take(&mut process.backlog)
            }
            Address::Node(_) | Address::Control(_) | Address::Store | Address::Clients => return,
        };
        for event in backlog {
            self.world.after(0, event);
        }
    }

    /// A client tries, and tries again until it is answered.
    fn submit(&mut self, request: usize) {
        if self.world.model.is_acknowledged(request) {
            return;
        }
        let submit = self.world.config.submits[request].clone();
        let message = Message::Submit(Submit {
            request,
            agent: submit.agent,
            key: submit.key.parse().unwrap(),
            input: submit.input.into(),
        });
        let to = self.owner_of(submit.agent);
        self.world.send(Address::Clients, to, message);
        self.world.after(RETRY_MS, Event::Submit(request));
    }

    /// Whom a client asks: mostly the owner, now and then somebody else.
    fn owner_of(&mut self, agent: usize) -> Address {
        let owner = self.world.model.owner(shard_of(agent, self.world.config.shards));
        let index = owner.map(node::index_of);
        let is_stale = self.world.chance.permille(100);
        let other = self.world.chance.index(self.world.config.nodes);
        Address::Node(index.filter(|_| !is_stale).unwrap_or(other))
    }

    fn told(&mut self, message: Message) {
        match message {
            Message::Accepted { request, work } => {
                self.world.trace(|| format!("TOLD request {request} is work {work}"));
                let is_news = !self.world.model.is_acknowledged(request);
                self.world.model.acknowledged(request, work);
                let submit = &self.world.config.submits[request];
                let (agent, is_cancelled) = (submit.agent, submit.is_cancelled);
                if is_news && is_cancelled {
                    let to = self.owner_of(agent);
                    self.world.send(Address::Clients, to, Message::Cancel { agent, work });
                }
            }
            Message::Refused => {}
            other => unreachable!("a client got {other:?}"),
        }
    }
}
