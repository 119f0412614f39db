//! The rules of `domain` under every kind of fault, in thousands of seeded schedules, against a reference model.
//!
//! `SEED=n` replays one schedule and prints what happens in it, `RULE=name` with one rule broken; `SCHEDULES=n` sets
//! how many are run. Nothing here touches a socket, a file or a clock.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "all of this is a test")]
#![allow(clippy::wildcard_enum_match_arm, reason = "each process hears only some of the messages")]

mod cluster;
mod config;
mod control;
mod doubts;
mod host;
mod hot;
mod message;
mod model;
mod node;
mod phases;
mod store;
mod turns;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use domain::slot::ShardTable;
use domain::{AgentId, Class, ShardId};

use crate::cluster::Outcome;
use crate::config::{Break, Fault, Happened};
use crate::model::{Broken, Promise};

pub(crate) const TICK_MS: u64 = 100;
const AGENTS_MAX: usize = 4;
const SCHEDULES: u64 = 10_000;
/// A fault that happens in fewer schedules than one in a hundred is not tested.
const FAULT_SHARE: u64 = 100;

/// The shard that an agent belongs to, by the frozen hash.
pub(crate) fn shard_of(agent: usize, shards: u16) -> ShardId {
    static SHARDS: LazyLock<Vec<Vec<ShardId>>> = LazyLock::new(|| {
        let table = |count| ShardTable::single(count).unwrap();
        let shard = |agent: usize, count: u16| {
            let id: AgentId = format!("acme/chain/user-{agent}").parse().unwrap();
            table(count).shard_of(Class(0), id.slot()).unwrap()
        };
        (0..AGENTS_MAX).map(|agent| (1..4).map(|count| shard(agent, count)).collect()).collect()
    });
    SHARDS[agent][usize::from(shards) - 1]
}

fn number_from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a whole number"))
}

fn schedules() -> u64 {
    number_from_env("SCHEDULES").unwrap_or(SCHEDULES)
}

/// A failed assertion of the code under test is a broken promise, too.
fn run(seed: u64, rule: Option<Break>, is_traced: bool) -> Outcome {
    catch_unwind(AssertUnwindSafe(|| cluster::run(seed, rule, is_traced))).unwrap_or_else(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let detail = text.unwrap_or_else(|| "see above".to_owned());
        let broken = Some(Broken { promise: Promise::NoPanic, detail });
        Outcome { broken, happened: Happened::default(), events: 0, ended_at: 0 }
    })
}

/// What came of many schedules.
#[derive(Default)]
struct Summary {
    broken: Option<(u64, Broken)>,
    faults: Vec<u64>,
    schedules: u64,
    events: u64,
    simulated_ms: u64,
}

/// Runs seeds from 0 on all cores until one breaks a promise. The lowest of those that did is kept.
fn explore(count: u64, rule: Option<Break>) -> Summary {
    let next = AtomicU64::new(0);
    let is_over = AtomicBool::new(false);
    let worker = || {
        let mut summary = Summary { faults: vec![0; Fault::ALL.len()], ..Summary::default() };
        while !is_over.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if count <= seed {
                break;
            }
            let outcome = run(seed, rule, false);
            summary.schedules += 1;
            summary.events += outcome.events;
            summary.simulated_ms += outcome.ended_at;
            for fault in Fault::ALL {
                summary.faults[*fault as usize] += u64::from(outcome.happened.has(*fault));
            }
            if let Some(broken) = outcome.broken {
                summary.broken = Some((seed, broken));
                is_over.store(true, Ordering::Relaxed);
            }
        }
        summary
    };
    let cores = thread::available_parallelism().map_or(2, |cores| cores.get());
    let summaries: Vec<Summary> = thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    summaries.into_iter().fold(Summary::default(), Summary::and)
}

impl Summary {
    fn and(mut self, other: Self) -> Self {
        self.faults.resize(Fault::ALL.len(), 0);
        self.faults.iter_mut().zip(&other.faults).for_each(|(sum, more)| *sum += more);
        self.schedules += other.schedules;
        self.events += other.events;
        self.simulated_ms += other.simulated_ms;
        let broken = self.broken.into_iter().chain(other.broken);
        self.broken = broken.min_by_key(|(seed, _)| *seed);
        self
    }
}

/// `SEED=n`, with `RULE=name` if a rule is to be broken.
fn replay() -> Option<u64> {
    let seed = number_from_env("SEED")?;
    let name = std::env::var("RULE").ok();
    let rule = name.map(|name| {
        let named = Break::ALL.into_iter().find(|rule| format!("{rule:?}") == name);
        named.expect("the name of a rule, as the simulation prints it")
    });
    let outcome = run(seed, rule, true);
    println!("seed {seed}: {} events, {} ms", outcome.events, outcome.ended_at);
    if let Some(broken) = outcome.broken {
        panic!("seed {seed} broke a promise: {broken}");
    }
    Some(seed)
}

#[test]
fn every_schedule_keeps_every_promise() {
    if replay().is_some() {
        return;
    }
    let (count, start) = (schedules(), Instant::now());
    let summary = explore(count, None);
    if let Some((seed, broken)) = &summary.broken {
        panic!("SEED={seed} broke a promise: {broken}");
    }
    let Summary { schedules, events, simulated_ms, .. } = summary;
    let (took, simulated_s) = (start.elapsed(), simulated_ms / 1_000);
    println!("{schedules} schedules, {events} events, {simulated_s} s simulated in {took:.1?}");
    for fault in Fault::ALL {
        println!("{:>8} schedules with {fault:?}", summary.faults[*fault as usize]);
    }
    let rare =
        Fault::ALL.iter().filter(|fault| summary.faults[**fault as usize] < count / FAULT_SHARE);
    let rare: Vec<&Fault> = rare.collect();
    assert!(rare.is_empty(), "too rare to be tested: {rare:?}");
}

#[test]
fn every_broken_rule_is_found() {
    if number_from_env("SEED").is_some() {
        return;
    }
    for rule in Break::ALL {
        let summary = explore(SCHEDULES, Some(rule));
        let Some((seed, broken)) = summary.broken else { panic!("{rule:?} was not found") };
        println!("{rule:?} found in schedule {seed}: {broken}");
        assert!(rule.breaks().contains(&broken.promise), "{rule:?}, seed {seed}, broke {broken}");
    }
}

#[test]
fn a_seed_is_one_schedule() {
    for seed in 0..20 {
        let [first, second] = [run(seed, None, false), run(seed, None, false)];
        assert_eq!((first.events, first.ended_at), (second.events, second.ended_at), "seed {seed}");
    }
}
