//! What every bench needs: arguments, a cluster in a temporary directory, a connected client, what the processes counted
//! and burnt meanwhile, and works read back.

// Each bench uses a part of this.
#![allow(dead_code)]

pub(crate) mod stream;
pub(crate) mod syncs;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use proto::v1::{ApplyDefinitionRequest, Definition, Work, WorkState};
use rustix::process::Signal;
use serde_json::{Map, Value, json};
use tests::harness::{Dev, Fault, Mesh, MeshOptions, Metrics, Options, Program, Sqld};

/// The value of `--name`, or `default`. What cannot be read ends the bench: its figures would be of something else.
pub(crate) fn argument<T: std::str::FromStr>(name: &str, default: T) -> T {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let flag = format!("--{name}");
    let is_it = |argument: &String| argument.split('=').next() == Some(&*flag);
    let Some(at) = arguments.iter().position(is_it) else { return default };
    let value = match arguments[at].split_once('=') {
        Some((_, value)) => Some(value),
        None => arguments.get(at + 1).map(String::as_str),
    };
    let read = value.and_then(|value| value.parse().ok());
    read.unwrap_or_else(|| panic!("{flag} cannot be read: {value:?}"))
}

/// Runs a bench, with every sync of it and of all processes that it starts counted.
pub(crate) fn run(bench: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<ExitCode> {
    if let Some(code) = syncs::counting()? {
        return Ok(code);
    }
    tokio::runtime::Runtime::new()?.block_on(bench)?;
    Ok(ExitCode::SUCCESS)
}

/// Where the data of the cluster is: `--store files` or `--store sqld`.
pub(crate) fn store() -> String {
    argument("store", "files".to_owned())
}

/// None: in files.
fn sqld() -> anyhow::Result<Option<Sqld>> {
    match store().as_str() {
        "files" => Ok(None),
        "sqld" => Ok(Some(Sqld::start().context("there is no sqld here")?)),
        other => bail!("--store is files or sqld, not {other}"),
    }
}

pub(crate) fn options(nodes: u16) -> Options {
    Options { nodes, ..Options::default() }
}

/// A cluster of release processes under load.
pub(crate) struct Cluster {
    /// None only while it is dropped.
    processes: Option<Processes>,
    /// What has its databases, if that is a server; it ends after them.
    sqld: Option<Sqld>,
    pub(crate) client: client::Client,
    before: Mark,
}

enum Processes {
    /// Those of `dev`, and its own id.
    Dev(Box<Dev>, u32),
    /// Behind proxies, which are in this process.
    Mesh(Box<Mesh>),
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // It waits for its processes.
        tokio::task::block_in_place(|| drop(self.processes.take()));
    }
}

impl Processes {
    fn metrics(&self, name: &str) -> Metrics {
        match self {
            Self::Dev(dev, _) => dev.metrics(name),
            Self::Mesh(mesh) => mesh.metrics(name).expect("it lives, and tells its metrics"),
        }
    }

    fn signal(&self, name: &str, signal: Signal) {
        match self {
            Self::Dev(dev, _) => dev.signal(name, signal),
            Self::Mesh(mesh) => mesh.signal(name, signal),
        }
    }

    /// Those that count, as they were started.
    fn pids(&self) -> Vec<(String, u32)> {
        let dev = match self {
            Self::Dev(dev, _) => dev,
            Self::Mesh(mesh) => return mesh.pids().into_iter().collect(),
        };
        let processes = dev.ready()["processes"].as_array().into_iter().flatten();
        let pid = |process: &Value| {
            let name = process["name"].as_str().unwrap_or_default();
            let pid = process["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            (name.to_owned(), pid.expect("the ready line names it"))
        };
        processes.map(pid).collect()
    }
}

/// What had been counted and burnt at one moment. Before a cluster starts, its processes have done nothing.
struct Mark {
    processes: BTreeMap<String, Counts>,
    load_cpu_seconds: f64,
    syncs: u64,
}

struct Counts {
    metrics: Option<Metrics>,
    cpu_seconds: f64,
}

impl Mark {
    fn of_nothing() -> anyhow::Result<Self> {
        let load_cpu_seconds = cpu_seconds(std::process::id())?;
        Ok(Self { processes: BTreeMap::new(), load_cpu_seconds, syncs: syncs::count()? })
    }
}

impl Cluster {
    /// With its data where `--store` says.
    pub(crate) fn start(program: &'static str, options: &Options) -> anyhow::Result<Self> {
        let (before, sqld) = (Mark::of_nothing()?, sqld()?);
        let mut options = options.clone();
        options.args.extend(sqld.as_ref().map(Sqld::dev_args).unwrap_or_default());
        let mut dev = Dev::start_with(Program(program), &options);
        let dev_pid = dev.child().pid();
        let mut config = client::Config::new(dev.credentials());
        config.api = client::addresses_of(dev.api());
        config.timeouts.call = Duration::from_secs(120);
        let client = client::Client::connect(&config)?;
        let processes = Some(Processes::Dev(Box::new(dev), dev_pid));
        Ok(Self { processes, sqld, client, before })
    }

    /// The same, all links through this process, so that they can be cut.
    pub(crate) fn start_behind_proxies(
        program: &'static str,
        mut options: MeshOptions,
    ) -> anyhow::Result<Self> {
        let (before, sqld) = (Mark::of_nothing()?, sqld()?);
        options.hrana = sqld.as_ref().map(Sqld::target);
        let mesh = tokio::task::block_in_place(|| Mesh::start(Program(program), &options));
        let client = mesh.client();
        Ok(Self { processes: Some(Processes::Mesh(Box::new(mesh))), sqld, client, before })
    }

    /// Under the name `bench`.
    pub(crate) async fn apply(&self, definition: Definition) -> anyhow::Result<()> {
        let definition = Some(Definition { name: "bench".to_owned(), ..definition });
        let request = ApplyDefinitionRequest { tenant: "default".to_owned(), definition };
        self.client.apply(request).await?;
        Ok(())
    }

    /// Waits until no agent is in the memory of `nodes`.
    pub(crate) async fn evicted(&self, nodes: &[String]) -> anyhow::Result<()> {
        let hot = |node: &String| self.metrics(node).sum("stagedoor_agent_hot", &[]);
        for _ in 0..600 {
            if nodes.iter().map(hot).sum::<f64>() == 0.0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("agents are in memory a minute after their last work")
    }

    /// The resident set of a process.
    pub(crate) fn resident_kb(&self, name: &str) -> anyhow::Result<f64> {
        let pid = self.pid(name).with_context(|| format!("there is no {name}"))?.to_string();
        let status = std::fs::read_to_string(Path::new("/proc").join(pid).join("status"))?;
        let line =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    fn processes(&self) -> &Processes {
        self.processes.as_ref().expect("it is not dropped yet")
    }

    pub(crate) fn signal(&self, name: &str, signal: Signal) {
        self.processes().signal(name, signal);
    }

    /// Whatever the process says or is told gets lost, and nobody notices by his connection.
    pub(crate) fn cut(&self, name: &str) -> anyhow::Result<()> {
        let Processes::Mesh(mesh) = self.processes() else { bail!("it has no proxies") };
        mesh.isolate(name, Fault::HALF_OPEN);
        Ok(())
    }

    pub(crate) fn metrics(&self, name: &str) -> Metrics {
        self.processes().metrics(name)
    }

    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        self.processes().pids().into_iter().find(|(of, _)| of == name).map(|(_, pid)| pid)
    }

    /// Counts from here, and no longer from the start.
    pub(crate) fn mark(&mut self) -> anyhow::Result<()> {
        self.before = self.now()?;
        Ok(())
    }

    /// The processes that live.
    fn now(&self) -> anyhow::Result<Mark> {
        let mut mark = Mark::of_nothing()?;
        if let Processes::Dev(_, pid) = self.processes() {
            let dev = Counts { metrics: None, cpu_seconds: cpu_seconds(*pid)? };
            mark.processes.insert("dev".to_owned(), dev);
        }
        for (name, pid) in self.processes().pids().into_iter().filter(|(_, pid)| lives(*pid)) {
            let metrics = Some(self.metrics(&name));
            mark.processes.insert(name, Counts { metrics, cpu_seconds: cpu_seconds(pid)? });
        }
        if let Some(sqld) = &self.sqld {
            let counts = Counts { metrics: None, cpu_seconds: cpu_seconds(sqld.pid())? };
            mark.processes.insert("sqld".to_owned(), counts);
        }
        Ok(mark)
    }

    /// What was counted since the mark by the processes that live, and the CPU seconds of each and of the load.
    pub(crate) fn since_mark(&self) -> anyhow::Result<Counted> {
        let now = self.now()?;
        let mut counted = Counted::default();
        for (key, name, labels) in COUNTED {
            counted.numbers.insert(key, since(&self.before, &now, name, labels)?);
        }
        counted.numbers.insert("syncs", (now.syncs - self.before.syncs) as f64);
        for (name, counts) in &now.processes {
            let before = self.before.processes.get(name);
            let before = before.map_or(0.0, |before| before.cpu_seconds);
            counted.cpu_seconds.insert(name.clone(), counts.cpu_seconds - before);
        }
        let load = now.load_cpu_seconds - self.before.load_cpu_seconds;
        counted.cpu_seconds.insert("load".to_owned(), load);
        let gone = self.processes().pids().into_iter().map(|(name, _)| name);
        counted.gone = gone.filter(|name| !now.processes.contains_key(name)).collect();
        Ok(counted)
    }
}

/// What benches print, the series that it is, and the labels that count.
const COUNTED: [(&str, &str, &[&str]); 7] = [
    ("model_calls", "stagedoor_model_calls_total", &[]),
    ("steps", "stagedoor_agent_steps_total", &[]),
    ("steps_remote", "stagedoor_agent_steps_remote_total", &[]),
    ("steps_begun_early", "stagedoor_agent_steps_early_total", &[]),
    ("groups", "stagedoor_store_writer_groups_total", &[]),
    ("rows", "stagedoor_store_writer_rows_total", &[]),
    ("commits", "stagedoor_store_commits_total", &["outcome=\"committed\""]),
];

/// By how much a series grew, over all processes that have it: some do, or nothing was counted.
fn since(before: &Mark, now: &Mark, name: &str, labels: &[&str]) -> anyhow::Result<f64> {
    let of = |counts: &Counts| counts.metrics.as_ref().and_then(|all| all.find(name, labels));
    let grown = now.processes.iter().filter_map(|(process, counts)| {
        let was = before.processes.get(process).and_then(of).unwrap_or(0.0);
        Some(of(counts)? - was)
    });
    grown.reduce(|sum, more| sum + more).with_context(|| format!("no process counts {name}"))
}

/// What processes counted and burnt within one measurement, or several.
#[derive(Default)]
pub(crate) struct Counted {
    numbers: BTreeMap<&'static str, f64>,
    cpu_seconds: BTreeMap<String, f64>,
    /// Processes that were killed meanwhile: what they counted and burnt is not in the sums.
    gone: BTreeSet<String>,
}

impl Counted {
    pub(crate) fn number(&self, key: &str) -> f64 {
        self.numbers.get(key).copied().unwrap_or_else(|| panic!("{key} is not counted"))
    }

    pub(crate) fn add(&mut self, more: Self) {
        for (key, number) in more.numbers {
            *self.numbers.entry(key).or_default() += number;
        }
        for (name, seconds) in more.cpu_seconds {
            *self.cpu_seconds.entry(name).or_default() += seconds;
        }
        self.gone.extend(more.gone);
    }

    pub(crate) fn json(&self) -> Map<String, Value> {
        let numbers = self.numbers.iter().map(|(key, number)| ((*key).to_owned(), json!(number)));
        let mut object: Map<String, Value> = numbers.collect();
        let off_owner = self.number("steps_remote") / self.number("steps").max(1.0);
        object.insert("steps_off_owner".into(), json!(round(off_owner)));
        let cpu =
            self.cpu_seconds.iter().map(|(name, seconds)| (name.clone(), json!(round(*seconds))));
        object.insert("cpu_seconds".into(), Value::Object(cpu.collect()));
        if !self.gone.is_empty() {
            object.insert("killed_and_not_counted".into(), json!(self.gone));
        }
        object
    }
}

/// What works came to, asked of the cluster again after a run.
#[derive(Default)]
pub(crate) struct ReadBack {
    pub(crate) works: usize,
    /// Of those, the ones that have succeeded with all their steps.
    pub(crate) with_all_steps: usize,
    /// And those that have not ended.
    pub(crate) open: usize,
}

impl ReadBack {
    pub(crate) fn json(&self) -> Value {
        let Self { works, with_all_steps, open } = self;
        json!({ "works": works, "with_all_steps": with_all_steps, "open": open })
    }

    pub(crate) fn add(&mut self, more: &Self) {
        self.works += more.works;
        self.with_all_steps += more.with_all_steps;
        self.open += more.open;
    }
}

/// Asks for every one of these works; those that have ended must have succeeded, with so many steps.
pub(crate) async fn read_back(
    client: &client::Client,
    ids: &[String],
    steps: usize,
) -> anyhow::Result<ReadBack> {
    let mut read = ReadBack::default();
    for work in works(client, ids).await? {
        read.works += 1;
        if work.end_time.is_none() {
            read.open += 1;
            continue;
        }
        let (id, state, taken) = (&work.id, work.state(), work.steps.len());
        ensure!(
            state == WorkState::Succeeded && taken == steps,
            "{id} is {state:?}, {taken} steps"
        );
        read.with_all_steps += 1;
    }
    Ok(read)
}

/// Waits until each of these works has ended.
pub(crate) async fn ended(client: &client::Client, ids: &[String]) -> anyhow::Result<()> {
    let patience = tokio::time::Instant::now() + Duration::from_secs(60);
    let mut open = ids.to_vec();
    while !open.is_empty() {
        ensure!(tokio::time::Instant::now() < patience, "{} works do not end", open.len());
        tokio::time::sleep(Duration::from_millis(100)).await;
        let asked = works(client, &open).await?;
        open =
            asked.into_iter().filter(|work| work.end_time.is_none()).map(|work| work.id).collect();
    }
    Ok(())
}

/// Every one of these works, without what it came to.
pub(crate) async fn works(client: &client::Client, ids: &[String]) -> anyhow::Result<Vec<Work>> {
    let mut works = Vec::with_capacity(ids.len());
    for chunk in ids.chunks(64) {
        let asked = chunk.iter().map(|id| client.get(id));
        for work in futures::future::join_all(asked).await {
            works.push(Work { result: None, ..work? });
        }
    }
    Ok(works)
}

/// The fields of a process after its name, by the kernel's accounting.
fn stat(pid: u32) -> std::io::Result<Vec<String>> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))?;
    let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    Ok(after_name.split_whitespace().map(str::to_owned).collect())
}

fn lives(pid: u32) -> bool {
    stat(pid).is_ok_and(|fields| fields.first().is_some_and(|state| state != "Z"))
}

/// Two fields that stand side by side, in ticks of 10 ms.
fn seconds(pid: u32, first: usize) -> anyhow::Result<f64> {
    let fields = stat(pid)?;
    let ticks = fields.get(first..first + 2).context("a line of /proc is too short")?;
    let ticks: Result<Vec<f64>, _> = ticks.iter().map(|field| field.parse()).collect();
    Ok(ticks?.iter().sum::<f64>() / 100.0)
}

/// User and system time of a process.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    seconds(pid, 11)
}

/// User and system time of the children of this process that have ended, and of theirs.
pub(crate) fn cpu_seconds_of_ended_children() -> anyhow::Result<f64> {
    seconds(std::process::id(), 13)
}

pub(crate) fn round(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

/// The value below which `share` of the sorted `values` lie.
pub(crate) fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() as f64 * share) as usize;
    values.get(index.min(values.len().saturating_sub(1))).copied().map_or(0.0, round)
}

/// One JSON document on a line of its own: what a bench is run for.
#[allow(clippy::print_stdout)]
pub(crate) fn print(line: &Value) {
    println!("{line}");
}

/// The same with what was counted.
pub(crate) fn print_with(mut line: Value, counted: &Counted) {
    line.as_object_mut().expect("a line is an object").extend(counted.json());
    print(&line);
}
