//! Time, chance and the network of one schedule.
//!
//! Everything that happens is an event in one queue, and everything random comes from one seed: the same seed is the
//! same schedule, event for event.

use std::collections::BTreeMap;

use crate::config::{Break, Config, Fault, Happened};
use crate::message::Message;
use crate::model::Model;

/// Who sends and receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Address {
    Store,
    Clients,
    Control(usize),
    Node(usize),
}

impl Address {
    const MAX: usize = 8;

    fn index(self) -> usize {
        match self {
            Self::Store => 0,
            Self::Clients => 1,
            Self::Control(index) => 2 + index,
            Self::Node(index) => 4 + index,
        }
    }
}

/// What can happen next.
#[derive(Debug)]
pub(crate) enum Event {
    Deliver {
        from: Address,
        to: Address,
        number: u64,
        message: Message,
    },
    /// A process looks at its clock. `run` is the run of it that asked.
    Tick {
        who: Address,
        run: u64,
    },
    /// A client tries a submit, or tries it again.
    Submit(usize),
    Plan(Plan),
}

/// A planned fault, or the end of one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Plan {
    Crash(Address),
    Start(Address),
    /// For so many milliseconds.
    Pause(Address, u64),
    /// Unless it crashed meanwhile and runs anew.
    Resume(Address, u64),
    StoreDown,
    StoreUp,
    SessionReset(usize),
    /// An operator wants the node to give everything away, until it has ended.
    Drain(usize),
    AgentCrash(usize),
    ShardCrash(usize),
}

/// splitmix64: enough chance for schedules, and a seed means the same schedule for ever.
#[derive(Clone, Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x51a6_ed00)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        (self.next() % len as u64) as usize
    }

    pub(crate) fn permille(&mut self, of: u64) -> bool {
        self.next() % 1_000 < of
    }
}

/// What every part of the simulation shares.
pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) chance: Chance,
    pub(crate) config: Config,
    pub(crate) broken_rule: Option<Break>,
    pub(crate) happened: Happened,
    pub(crate) model: Model,
    /// Which node processes exist: what a TCP connect to their port finds.
    pub(crate) is_up: Vec<bool>,
    /// Which nodes are told to give everything away.
    pub(crate) is_draining: Vec<bool>,
    pub(crate) is_leading: [bool; 2],
    queue: BTreeMap<(u64, u64), Event>,
    numbers: u64,
    arrived: [[u64; Address::MAX]; Address::MAX],
    is_traced: bool,
}

impl World {
    pub(crate) fn new(seed: u64, broken_rule: Option<Break>, is_traced: bool) -> Self {
        let mut chance = Chance::new(seed);
        let config = Config::sample(&mut chance);
        Self {
            now: 0,
            model: Model::new(&config),
            is_up: vec![false; config.nodes],
            is_draining: vec![false; config.nodes],
            is_leading: [false; 2],
            chance,
            config,
            broken_rule,
            happened: Happened::default(),
            queue: BTreeMap::new(),
            numbers: 0,
            arrived: [[0; Address::MAX]; Address::MAX],
            is_traced,
        }
    }

    /// A number that nothing else in this schedule has.
    pub(crate) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    pub(crate) fn breaks(&self, rule: Break) -> bool {
        self.broken_rule == Some(rule)
    }

    pub(crate) fn is_faulty(&self) -> bool {
        self.now < self.config.faults_until
    }

    pub(crate) fn happen(&mut self, fault: Fault) {
        self.happened.note(fault);
    }

    pub(crate) fn trace(&self, text: impl FnOnce() -> String) {
        if self.is_traced {
            println!("{:>6} {}", self.now, text());
        }
    }

    pub(crate) fn at(&mut self, time: u64, event: Event) {
        let number = self.number();
        self.queue.insert((time, number), event);
    }

    pub(crate) fn after(&mut self, ms: u64, event: Event) {
        self.at(self.now + ms, event);
    }

    pub(crate) fn pop(&mut self) -> Option<Event> {
        let ((time, _), event) = self.queue.pop_first()?;
        self.now = time;
        Some(event)
    }

    /// Sends `message`. While faults last it may be lost, late, doubled or overtaken.
    pub(crate) fn send(&mut self, from: Address, to: Address, message: Message) {
        let number = self.number();
        let latency = self.chance.between(1, 4);
        if !self.is_faulty() {
            return self.deliver(latency, from, to, number, message);
        }
        let (lost, late, doubled) = self.config.network;
        if self.chance.permille(lost) {
            self.happen(message.lost_as());
            return self.trace(|| format!("LOST {from:?} -> {to:?} {message:?}"));
        }
        if self.chance.permille(doubled) {
            self.happen(message.doubled_as());
            let latency = latency + self.chance.between(0, 2_500);
            self.deliver(latency, from, to, number, message.clone());
        }
        let is_late = self.chance.permille(late);
        let extra = if is_late { self.chance.between(50, 2_500) } else { 0 };
        if is_late {
            self.happen(Fault::MessageLate);
        }
        self.deliver(latency + extra, from, to, number, message);
    }

    /// Sends `message` once `ms` have passed, from a process that may be gone by then.
    pub(crate) fn send_after(&mut self, ms: u64, from: Address, to: Address, message: Message) {
        let now = self.now;
        self.now += ms;
        self.send(from, to, message);
        self.now = now;
    }

    fn deliver(&mut self, ms: u64, from: Address, to: Address, number: u64, message: Message) {
        self.after(ms, Event::Deliver { from, to, number, message });
    }

    /// Something that the operating system tells, without the network.
    pub(crate) fn tell(&mut self, from: Address, to: Address, message: Message) {
        let number = self.number();
        let latency = self.chance.between(1, 3);
        self.deliver(latency, from, to, number, message);
    }

    /// Notes that a message arrived, to see which ones were overtaken.
    pub(crate) fn arrive(&mut self, from: Address, to: Address, number: u64) {
        let last = &mut self.arrived[from.index()][to.index()];
        if number < *last {
            self.happened.note(Fault::MessageOvertaken);
        }
        *last = number.max(*last);
    }
}
