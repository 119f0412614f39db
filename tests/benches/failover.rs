//! What callers notice of a fault: a thousand agents at work, one fault, and how long each agent was out of reach.
//!
//! `cargo bench -p tests --bench failover -- --trials 20 --agents 1000 --fault node-kill --store files` prints one JSON line
//! a fault; without `--fault` it does all of them, and `--store sqld` puts a real sqld behind the cluster. Each trial is a
//! cluster of its own: two control replicas and three nodes, the no-op model. An agent has its next work submitted
//! `--pause-ms` after the last has ended: 0 by default, so that every agent is in the middle of a turn when the fault comes,
//! and the processors are full. The time of an agent is, from the fault on,
//!
//! - of a node that was killed or stopped: until the first acceptance, phase or end that its next owner has journaled;
//! - of a leader that was: until the acceptance of the first work that was submitted after the fault;
//! - of a silent cut: the same. All links go through proxies in the process of the load then, which costs it processor time;
//! - of a drain: the longest between a submit and its acceptance. A full processor would hide it: its pause is two seconds
//!   by default, and `nothing` shows what the same load waits when nothing happens.
//!
//! Every work that was acknowledged is read back. What a killed process had counted and burnt is lost with it, so the sums
//! are of the others, and the line names it.

mod load;

use std::collections::{BTreeMap, VecDeque};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail, ensure};
use domain::{AgentId, Epoch, Position};
use proto::v1::open_response::Response;
use proto::v1::work_event::Event;
use proto::v1::{
    Definition, DrainRequest, ExplainRequest, OpenResponse, OpenWatch, SubmitRequest, Transition,
    WorkState,
};
use rustix::process::Signal;
use serde_json::json;
use tests::harness::{MeshOptions, Options};
use tokio::time::{Instant, sleep_until, timeout};

use load::{Cluster, Counted, ReadBack, argument, percentile};

const PROGRAM: &str = env!("CARGO_BIN_EXE_stagedoor-under-test");
const SHARDS: u32 = 12;
const VICTIM: &str = "node-2";
/// Nothing of this takes longer; a trial that does has failed.
const TRIAL_MAX: Duration = Duration::from_secs(60);
/// For so long waits are looked at, when it is about waiting.
const WAITING: Duration = Duration::from_secs(6);
/// Of a trial that failed so many agents are shown.
const MISSING_SHOWN: usize = 3;
/// So many works an agent before the fault.
const WARM: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    NodeKill,
    NodeStop,
    NodeCut,
    LeaderKill,
    LeaderStop,
    LeaderCut,
    Drain,
    Nothing,
}

impl Fault {
    const ALL: [Self; 8] = [
        Self::NodeKill,
        Self::NodeStop,
        Self::NodeCut,
        Self::LeaderKill,
        Self::LeaderStop,
        Self::LeaderCut,
        Self::Drain,
        Self::Nothing,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::NodeKill => "node-kill",
            Self::NodeStop => "node-stop",
            Self::NodeCut => "node-cut",
            Self::LeaderKill => "leader-kill",
            Self::LeaderStop => "leader-stop",
            Self::LeaderCut => "leader-cut",
            Self::Drain => "drain",
            Self::Nothing => "nothing",
        }
    }

    /// Whether the links of a process that lives are cut.
    fn is_cut(self) -> bool {
        matches!(self, Self::NodeCut | Self::LeaderCut)
    }

    /// Whether others take the agents over whose answers are waited for.
    fn has_successor(self) -> bool {
        matches!(self, Self::NodeKill | Self::NodeStop | Self::NodeCut)
    }

    /// Whether the longest wait of an agent is asked for, and not when it is back.
    fn is_of_waiting(self) -> bool {
        matches!(self, Self::Drain | Self::Nothing)
    }

    /// Whether only the agents of one node are concerned.
    fn is_of_a_node(self) -> bool {
        match self {
            Self::NodeKill | Self::NodeStop | Self::NodeCut | Self::Drain | Self::Nothing => true,
            Self::LeaderKill | Self::LeaderStop | Self::LeaderCut => false,
        }
    }
}

fn main() -> anyhow::Result<ExitCode> {
    load::run(bench())
}

async fn bench() -> anyhow::Result<()> {
    let trials: usize = argument("trials", 20);
    let only: String = argument("fault", String::new());
    let is_wanted = |fault: &Fault| only.is_empty() || fault.name() == only;
    let is_known = only.is_empty() || Fault::ALL.iter().any(|fault| fault.name() == only);
    ensure!(is_known, "there is no fault {only:?}");
    for fault in Fault::ALL.into_iter().filter(is_wanted) {
        let pause_ms = argument("pause-ms", if fault.is_of_waiting() { 2_000 } else { 0 });
        let agents = argument("agents", 1_000);
        ensure!(
            (1..=1_000).contains(&agents),
            "an open stream has 1,024 works: --agents 1 to 1000"
        );
        let setup = Setup { fault, agents, pause: Duration::from_millis(pause_ms) };
        let mut all = Vec::new();
        for _ in 0..trials {
            all.push(Box::pin(trial(&setup)).await?);
        }
        report(&setup, all);
    }
    Ok(())
}

struct Setup {
    fault: Fault,
    agents: usize,
    pause: Duration,
}

/// What one trial showed.
#[derive(Default)]
struct Trial {
    /// Of each agent that the fault concerns.
    out_ms: Vec<f64>,
    /// Until the leader took the victim for dead, and until its last shard was open elsewhere, by the cluster's own record; of
    /// faults of a node.
    dead_ms: Option<f64>,
    open_ms: Option<f64>,
    /// By reason.
    refused: BTreeMap<String, usize>,
    /// Works that did not succeed.
    failed: usize,
    /// Every work that was acknowledged: those that have ended have six steps.
    read_back: ReadBack,
    /// From the first submit on.
    counted: Counted,
}

fn report(setup: &Setup, mut trials: Vec<Trial>) {
    let spread = |values: Vec<f64>| {
        let mut values = values;
        let (least, most) = (percentile(&mut values, 0.0), percentile(&mut values, 1.0));
        json!({ "median": percentile(&mut values, 0.5), "min": least, "max": most })
    };
    let of = |trials: &mut Vec<Trial>, share: f64| {
        trials.iter_mut().map(|trial| percentile(&mut trial.out_ms, share)).collect::<Vec<_>>()
    };
    let (mut counted, mut read) = (Counted::default(), ReadBack::default());
    let mut refused = BTreeMap::<String, usize>::new();
    for trial in &mut trials {
        counted.add(std::mem::take(&mut trial.counted));
        read.add(&trial.read_back);
        for (reason, count) in std::mem::take(&mut trial.refused) {
            *refused.entry(reason).or_default() += count;
        }
    }
    let line = json!({
        "bench": "failover", "fault": setup.fault.name(), "store": load::store(), "trials": trials.len(),
        "agents": setup.agents, "pause_ms": setup.pause.as_millis() as u64,
        "concerned": trials.iter().map(|trial| trial.out_ms.len()).min(),
        "p50_ms": spread(of(&mut trials, 0.5)), "p99_ms": spread(of(&mut trials, 0.99)),
        "longest_ms": spread(of(&mut trials, 1.0)),
        "dead_ms": trials.iter().map(|trial| trial.dead_ms).collect::<Option<_>>().map(spread),
        "open_ms": trials.iter().map(|trial| trial.open_ms).collect::<Option<_>>().map(spread),
        "refused": refused,
        "failed": trials.iter().map(|trial| trial.failed).sum::<usize>(),
        "read_back": read.json(),
    });
    load::print_with(line, &counted);
}

async fn trial(setup: &Setup) -> anyhow::Result<Trial> {
    let mut cluster = start(setup.fault)?;
    let noop = Definition { model: "noop".to_owned(), ..Definition::default() };
    cluster.apply(noop).await?;
    let names = concerned(&cluster, setup.fault, setup.agents).await?;
    cluster.mark()?;
    Box::pin(run(&cluster, setup, names)).await
}

/// Two control replicas and three nodes.
fn start(fault: Fault) -> anyhow::Result<Cluster> {
    if fault.is_cut() {
        let options = MeshOptions { nodes: 3, controls: 2, ..MeshOptions::default() };
        return Cluster::start_behind_proxies(PROGRAM, options);
    }
    Cluster::start(PROGRAM, &Options { controls: 2, ..load::options(3) })
}

/// Who owns which shard, once each node has a third of them.
async fn balanced(cluster: &Cluster) -> anyhow::Result<BTreeMap<u32, String>> {
    let patience = Instant::now() + TRIAL_MAX;
    loop {
        let shards = cluster.client.shards().await?.shards;
        let mut counts = BTreeMap::<&str, u32>::new();
        for shard in shards.iter().filter(|shard| shard.state == "open") {
            *counts.entry(&shard.node).or_default() += 1;
        }
        if counts.len() == 3 && counts.values().all(|count| *count == SHARDS / 3) {
            let owners = shards.into_iter().map(|shard| (shard.id.unsigned_abs(), shard.node));
            return Ok(owners.collect());
        }
        ensure!(Instant::now() < patience, "the shards are not spread evenly: {counts:?}");
        sleep_until(Instant::now() + Duration::from_millis(20)).await;
    }
}

/// Agents that the fault concerns: those of the victim, or just any.
async fn concerned(cluster: &Cluster, fault: Fault, count: usize) -> anyhow::Result<Vec<String>> {
    let owners = balanced(cluster).await?;
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
    name: String,
    submitted: Instant,
    /// The last under which something of it was journaled before the fault.
    epoch: Epoch,
    /// It answered after the fault.
    is_back: bool,
    longest_ms: f64,
}

/// All agents under load, and what was seen of them.
struct Run {
    agents: Vec<Agent>,
    /// Who has its next work submitted when.
    due: VecDeque<(Instant, usize)>,
    struck: Option<Instant>,
    ended: usize,
    ids: Vec<String>,
    trial: Trial,
}

async fn run(cluster: &Cluster, setup: &Setup, names: Vec<String>) -> anyhow::Result<Trial> {
    let (sender, mut responses) = cluster.client.open().split();
    let (begun, count) = (Instant::now(), u32::try_from(names.len())?);
    let due = (0..count).map(|n| (begun + setup.pause / count * n, n as usize)).collect();
    let agent =
        |name| Agent { name, submitted: begun, epoch: Epoch(0), is_back: false, longest_ms: 0.0 };
    let agents: Vec<Agent> = names.into_iter().map(agent).collect();
    let mut run =
        Run { agents, due, struck: None, ended: 0, ids: Vec::new(), trial: Trial::default() };
    let (mut victim, mut struck_ms) = (None, 0.0);
    let watch = if setup.fault.has_successor() { OpenWatch::All } else { OpenWatch::End };
    while !run.agents.iter().all(|agent| agent.is_back) {
        if TRIAL_MAX < begun.elapsed() {
            bail!("{} took too long: {}", setup.fault.name(), run.missing(cluster).await);
        }
        if run.struck.is_none() && WARM * run.agents.len() <= run.ended {
            victim = Some(strike(cluster, setup.fault).await?);
            run.struck = Some(Instant::now());
            struck_ms = clock_ms();
        }
        let next = run.due.front().copied();
        let wait = sleep_until(next.map_or(begun + TRIAL_MAX, |(due, _)| due));
        tokio::select! {
            biased;
            () = wait => {
                let Some((_, index)) = run.due.pop_front() else { continue };
                run.agents[index].submitted = Instant::now();
                let (agent, input) = (run.agents[index].name.clone(), "noop".to_owned());
                let request = SubmitRequest { agent, input, ..SubmitRequest::default() };
                sender.submit(index as i64, request, watch).await?;
            }
            response = timeout(TRIAL_MAX, responses.next()) => {
                let response = response.context("no response")?.context("the stream ended")??;
                run.heard(response, setup)?;
            }
        }
    }
    drop((sender, responses));
    let Run { agents, ids, mut trial, .. } = run;
    if setup.fault.is_of_waiting() {
        trial.out_ms = agents.iter().map(|agent| agent.longest_ms).collect();
    }
    if setup.fault == Fault::Drain {
        let left = cluster.client.shards().await?.shards;
        ensure!(left.iter().all(|shard| shard.node != VICTIM), "{VICTIM} is not drained");
    }
    if setup.fault.is_of_a_node() && setup.fault != Fault::Nothing {
        trial.dead_ms = Some(dead_ms(cluster).await? - struck_ms);
        trial.open_ms = Some(open_ms(cluster, struck_ms).await? - struck_ms);
    }
    trial.read_back = load::read_back(&cluster.client, &ids, 6).await?;
    if let (Fault::NodeStop | Fault::LeaderStop, Some(victim)) = (setup.fault, victim) {
        // What stands still does not say what it counted.
        cluster.signal(&victim, Signal::CONT);
    }
    trial.counted = cluster.since_mark()?;
    ensure!(trial.failed == 0, "{} works failed", trial.failed);
    let early = trial.counted.number("steps_begun_early");
    ensure!(early == 0.0, "{early} steps began before the commit of what they rest on");
    Ok(trial)
}

impl Run {
    fn heard(&mut self, response: OpenResponse, setup: &Setup) -> anyhow::Result<()> {
        let index = usize::try_from(response.tag)?;
        self.journaled(index, &response.position, setup.fault)?;
        match response.response.context("an empty response")? {
            Response::Accepted(work) => {
                self.accepted(index, setup.fault);
                self.ids.push(work.id);
            }
            Response::Event(event) => {
                let Some(Event::Result(work)) = event.event else { return Ok(()) };
                self.trial.failed += usize::from(work.state() != WorkState::Succeeded);
                self.ended += 1;
                self.due.push_back((Instant::now() + setup.pause, index));
            }
            Response::Refused(refused) => {
                *self.trial.refused.entry(refused.reason).or_default() += 1;
                self.due.push_back((Instant::now() + setup.pause, index));
            }
        }
        Ok(())
    }

    fn journaled(&mut self, index: usize, position: &str, fault: Fault) -> anyhow::Result<()> {
        if !fault.has_successor() || position.is_empty() {
            return Ok(());
        }
        let (agent, position) = (&mut self.agents[index], position.parse::<Position>()?);
        match self.struck {
            Some(struck) if agent.epoch < position.epoch => self.back(index, struck),
            Some(_) => {}
            None => agent.epoch = position.epoch,
        }
        Ok(())
    }

    fn accepted(&mut self, index: usize, fault: Fault) {
        let (agent, Some(struck)) = (&mut self.agents[index], self.struck) else { return };
        let waited_ms = agent.submitted.elapsed().as_secs_f64() * 1_000.0;
        agent.longest_ms = agent.longest_ms.max(waited_ms);
        let is_early = fault.is_of_waiting() && struck.elapsed() < WAITING;
        if !is_early && !fault.has_successor() && struck <= agent.submitted {
            self.back(index, struck);
        }
    }

    /// What the cluster says of the agents that have not answered.
    async fn missing(&self, cluster: &Cluster) -> String {
        let missing: Vec<_> = self.agents.iter().filter(|agent| !agent.is_back).collect();
        let mut text = format!(
            "{} agents have not answered, {} works ended, refused {:?}",
            missing.len(),
            self.ended,
            self.trial.refused
        );
        for agent in missing.iter().take(MISSING_SHOWN) {
            let (waits_ms, epoch) = (agent.submitted.elapsed().as_millis(), agent.epoch);
            let told = match transitions(cluster, "agent", &agent.name).await {
                Ok(told) => format!("{told:?}"),
                Err(error) => format!("{error:#}"),
            };
            text += &format!(
                "\n{}, last submitted {waits_ms} ms ago, last seen in epoch {epoch}: {told}",
                agent.name
            );
        }
        text
    }

    fn back(&mut self, index: usize, struck: Instant) {
        if !std::mem::replace(&mut self.agents[index].is_back, true) {
            self.trial.out_ms.push(struck.elapsed().as_secs_f64() * 1_000.0);
        }
    }
}

/// The time of day: what the cluster writes down has no other, and all of it runs on this machine.
fn clock_ms() -> f64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64() * 1_000.0
}

async fn transitions(cluster: &Cluster, kind: &str, id: &str) -> anyhow::Result<Vec<Transition>> {
    let request = ExplainRequest { kind: kind.to_owned(), id: id.to_owned() };
    Ok(cluster.client.explain(request).await?.transitions)
}

fn time_ms(transition: &Transition) -> f64 {
    transition.time.as_ref().map_or(0.0, |time| proto::convert::millis(time) as f64)
}

/// When the victim was taken for dead, or left.
async fn dead_ms(cluster: &Cluster) -> anyhow::Result<f64> {
    let told = transitions(cluster, "node", VICTIM).await?;
    let dead = told.iter().rev().find(|told| told.to == "dead" || told.to == "left");
    Ok(time_ms(dead.context("nobody took the victim for dead")?))
}

/// When the last shard was opened after the fault.
async fn open_ms(cluster: &Cluster, struck_ms: f64) -> anyhow::Result<f64> {
    let mut last = struck_ms;
    for shard in 0..SHARDS {
        let told = transitions(cluster, "shard", &shard.to_string()).await?;
        let open = told.iter().filter(|told| told.to == "open").map(time_ms);
        last = open.fold(last, f64::max);
    }
    Ok(last)
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
        Fault::NodeKill | Fault::LeaderKill => cluster.signal(&victim, Signal::KILL),
        Fault::NodeStop | Fault::LeaderStop => cluster.signal(&victim, Signal::STOP),
        Fault::NodeCut | Fault::LeaderCut => cluster.cut(&victim)?,
        Fault::Drain => {
            cluster.client.drain(DrainRequest { name: victim.clone() }).await?;
        }
        Fault::Nothing => {}
    }
    Ok(victim)
}
