//! What callers notice of a fault: a thousand agents at work, one fault, and how long each agent was out of reach.
//!
//! `cargo bench -p tests --bench failover -- --trials 20 --agents 1000 --fault node-kill` prints one JSON line a fault; without
//! `--fault` it does all of them. Each trial is a cluster of its own: two control replicas and three nodes, the no-op
//! model, every agent with one work in flight all the time. For an agent that the fault concerns, the time is from the
//! fault to the acceptance of the first work that was submitted after it; of a drain it is the longest time between a
//! submit and its acceptance.
//!
//! Every work that was acknowledged is read back. What a killed process had counted and burnt is lost with it, so the sums
//! are of the others, and the line names it.

mod load;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use domain::AgentId;
use proto::v1::open_response::Response;
use proto::v1::work_event::Event;
use proto::v1::{DrainRequest, OpenWatch, SubmitRequest, WorkState};
use rustix::process::Signal;
use serde_json::json;
use tests::harness::Options;
use tokio::time::timeout;

use load::{Cluster, Counted, ReadBack, argument, percentile};

const PROGRAM: &str = env!("CARGO_BIN_EXE_stagedoor-under-test");
const SHARDS: u32 = 12;
const VICTIM: &str = "node-2";
/// Nothing of this takes longer; a trial that does has failed.
const TRIAL_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    NodeKill,
    NodeStop,
    LeaderKill,
    LeaderStop,
    Drain,
}

impl Fault {
    const ALL: [Self; 5] =
        [Self::NodeKill, Self::NodeStop, Self::LeaderKill, Self::LeaderStop, Self::Drain];

    fn name(self) -> &'static str {
        match self {
            Self::NodeKill => "node-kill",
            Self::NodeStop => "node-stop",
            Self::LeaderKill => "leader-kill",
            Self::LeaderStop => "leader-stop",
            Self::Drain => "drain",
        }
    }

    /// Whether only the agents of one node are concerned.
    fn is_of_a_node(self) -> bool {
        match self {
            Self::NodeKill | Self::NodeStop | Self::Drain => true,
            Self::LeaderKill | Self::LeaderStop => false,
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let trials: usize = argument("trials", 20);
    let agents: usize = argument("agents", 1_000);
    let only: String = argument("fault", String::new());
    for fault in Fault::ALL.into_iter().filter(|fault| only.is_empty() || fault.name() == only) {
        let mut all = Vec::new();
        for _ in 0..trials {
            all.push(Box::pin(trial(fault, agents)).await?);
        }
        report(fault, agents, all);
    }
    Ok(())
}

/// What one trial showed.
#[derive(Default)]
struct Trial {
    /// Of each agent that the fault concerns.
    out_ms: Vec<f64>,
    /// Until the first acceptance of anything that was submitted after the fault.
    first_ms: f64,
    refused: usize,
    /// Works that did not succeed.
    failed: usize,
    /// Every work that was acknowledged: those that have ended have six steps.
    read_back: ReadBack,
    /// From the first submit on.
    counted: Counted,
}

fn report(fault: Fault, agents: usize, mut trials: Vec<Trial>) {
    let spread = |values: Vec<f64>| {
        let mut values = values;
        let (least, most) = (percentile(&mut values, 0.0), percentile(&mut values, 1.0));
        json!({ "median": percentile(&mut values, 0.5), "min": least, "max": most })
    };
    let of = |trials: &mut Vec<Trial>, share: f64| {
        trials.iter_mut().map(|trial| percentile(&mut trial.out_ms, share)).collect::<Vec<_>>()
    };
    let (mut counted, mut read) = (Counted::default(), ReadBack::default());
    for trial in &mut trials {
        counted.add(std::mem::take(&mut trial.counted));
        read.add(&trial.read_back);
    }
    let line = json!({
        "bench": "failover", "fault": fault.name(), "trials": trials.len(), "agents": agents,
        "concerned": trials.iter().map(|trial| trial.out_ms.len()).min(),
        "p50_ms": spread(of(&mut trials, 0.5)), "p99_ms": spread(of(&mut trials, 0.99)),
        "longest_ms": spread(of(&mut trials, 1.0)),
        "first_ms": spread(trials.iter().map(|trial| trial.first_ms).collect()),
        "refused": trials.iter().map(|trial| trial.refused).sum::<usize>(),
        "failed": trials.iter().map(|trial| trial.failed).sum::<usize>(),
        "read_back": read.json(),
    });
    load::print_with(line, &counted);
}

async fn trial(fault: Fault, agents: usize) -> anyhow::Result<Trial> {
    let options = Options { nodes: 3, controls: 2, ..Options::default() };
    let mut cluster = Cluster::start_with_options(PROGRAM, &options)?;
    let definition = proto::v1::Definition {
        name: "bench".to_owned(),
        model: "noop".to_owned(),
        ..proto::v1::Definition::default()
    };
    let (tenant, definition) = ("default".to_owned(), Some(definition));
    cluster.client.apply(proto::v1::ApplyDefinitionRequest { tenant, definition }).await?;
    let names = concerned(&cluster, fault, agents).await?;
    cluster.mark()?;
    Box::pin(run(&cluster, fault, &names)).await
}

/// Agents that the fault concerns: those of the victim, or just any.
async fn concerned(cluster: &Cluster, fault: Fault, count: usize) -> anyhow::Result<Vec<String>> {
    let shards = cluster.client.shards().await?.shards;
    let owners: BTreeMap<u32, String> =
        shards.into_iter().map(|shard| (shard.id.unsigned_abs(), shard.node)).collect();
    ensure!(owners.len() == SHARDS as usize, "a cluster of {} shards", owners.len());
    let mut names = Vec::with_capacity(count);
    for number in 0_u64.. {
        let name = format!("default/bench/{number}");
        let agent: AgentId = name.parse()?;
        let shard = u32::from(agent.slot().get()) * SHARDS / u32::from(domain::slot::SLOTS);
        if !fault.is_of_a_node() || owners[&shard] == VICTIM {
            names.push(name);
        }
        if names.len() == count {
            break;
        }
    }
    Ok(names)
}

/// One agent and what it is about.
struct Agent {
    submitted: Instant,
    /// Its first acceptance of something that was submitted after the fault, since the fault.
    back_ms: Option<f64>,
    longest_ms: f64,
}

async fn run(cluster: &Cluster, fault: Fault, names: &[String]) -> anyhow::Result<Trial> {
    const WARM: usize = 3;
    let (sender, mut responses) = cluster.client.open().split();
    let submit = async |index: usize| {
        let agent = names[index].clone();
        let request = SubmitRequest { agent, input: "noop".to_owned(), ..SubmitRequest::default() };
        sender.submit(index as i64, request, OpenWatch::End).await
    };
    let mut agents: Vec<Agent> = names
        .iter()
        .map(|_| Agent { submitted: Instant::now(), back_ms: None, longest_ms: 0.0 })
        .collect();
    for (index, agent) in agents.iter_mut().enumerate() {
        agent.submitted = Instant::now();
        submit(index).await?;
    }
    let mut trial = Trial::default();
    let (mut ended, mut struck, mut ids) = (0_usize, None::<(Instant, String)>, Vec::new());
    let begun = Instant::now();
    while agents.iter().any(|agent| agent.back_ms.is_none()) {
        ensure!(begun.elapsed() < TRIAL_MAX, "{} took too long", fault.name());
        if struck.is_none() && WARM * names.len() <= ended {
            let victim = strike(cluster, fault).await?;
            struck = Some((Instant::now(), victim));
        }
        let response = timeout(TRIAL_MAX, responses.next()).await.context("no response")?;
        let response = response.context("the stream ended")??;
        let index = usize::try_from(response.tag)?;
        match response.response.context("an empty response")? {
            Response::Accepted(work) => {
                let agent = &mut agents[index];
                let waited = agent.submitted.elapsed().as_secs_f64() * 1_000.0;
                if let Some((struck, _)) = &struck {
                    agent.longest_ms = agent.longest_ms.max(waited);
                    if *struck <= agent.submitted && agent.back_ms.is_none() {
                        let back = struck.elapsed().as_secs_f64() * 1_000.0;
                        agent.back_ms = Some(back);
                        trial.first_ms =
                            if trial.out_ms.is_empty() { back } else { trial.first_ms };
                        trial.out_ms.push(back);
                    }
                }
                ids.push(work.id);
            }
            Response::Event(event) => {
                let Some(Event::Result(work)) = event.event else { continue };
                trial.failed += usize::from(work.state() != WorkState::Succeeded);
                ended += 1;
                agents[index].submitted = Instant::now();
                submit(index).await?;
            }
            Response::Refused(_) => {
                trial.refused += 1;
                agents[index].submitted = Instant::now();
                submit(index).await?;
            }
        }
    }
    if fault == Fault::Drain {
        trial.out_ms = agents.iter().map(|agent| agent.longest_ms).collect();
    }
    drop((sender, responses));
    trial.read_back = load::read_back(&cluster.client, &ids).await?;
    if let (Fault::NodeStop | Fault::LeaderStop, Some((_, victim))) = (fault, struck) {
        // What stands still does not say what it counted.
        cluster.dev.signal(&victim, Signal::CONT);
    }
    trial.counted = cluster.since_mark()?;
    let early = trial.counted.number("steps_begun_early");
    ensure!(early == 0.0, "{early} steps began before the commit of what they rest on");
    Ok(trial)
}

/// Answers the name of the process that it concerned.
async fn strike(cluster: &Cluster, fault: Fault) -> anyhow::Result<String> {
    let victim = if fault.is_of_a_node() {
        VICTIM.to_owned()
    } else {
        let status = cluster.client.status().await?;
        status.leader.map(|leader| leader.name).context("nobody leads")?
    };
    match fault {
        Fault::NodeKill | Fault::LeaderKill => cluster.dev.signal(&victim, Signal::KILL),
        Fault::NodeStop | Fault::LeaderStop => cluster.dev.signal(&victim, Signal::STOP),
        Fault::Drain => {
            cluster.client.drain(DrainRequest { name: victim.clone() }).await?;
        }
    }
    Ok(victim)
}
