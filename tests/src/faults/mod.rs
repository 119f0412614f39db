//! Random faults from a seed: clients submit, processes and links fail, and in the end the history must be sound.
//!
//! The seed decides which faults come when. What they hit is decided by the machine, so a seed makes a failure likely
//! again, not certain.

mod chaos;
mod report;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::{Parser, ValueEnum};

use proto::v1::{ApplyDefinitionRequest, Definition};
pub use report::Report;

use self::chaos::Chaos;
use crate::harness::history::History;
use crate::harness::{Clients, Load, Mesh, MeshOptions, Program, Sqld};

/// After the last fault, for everything that was acknowledged.
const REST_MAX: Duration = Duration::from_secs(240);

const DAY_SECONDS: u64 = 24 * 3_600;

/// The agents whose works call the tool.
const CLERK: &str = "clerk";

/// A run.
#[derive(Clone, Debug, Parser)]
#[command(name = "faults", about = "Runs a cluster under random faults and checks what came of it")]
pub struct Options {
    /// Which faults come when.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// For how long there are faults.
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// What keeps the data.
    #[arg(long, value_enum, default_value_t = Store::Files)]
    pub store: Store,
    #[arg(long, default_value_t = 3)]
    pub controls: usize,
    #[arg(long, default_value_t = 3)]
    pub nodes: usize,
    #[arg(long, default_value_t = 8)]
    pub clients: usize,
    #[arg(long, default_value_t = 300)]
    pub agents: usize,
    /// Only faults whose names contain one of these.
    #[arg(long)]
    pub only: Vec<String>,
    /// Where the history goes, as lines of JSON.
    #[arg(long)]
    pub record: Option<PathBuf>,
    /// Where the logs of all processes go if something is wrong.
    #[arg(long)]
    pub keep: Option<PathBuf>,
}

/// What keeps the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Store {
    /// A store process.
    Files,
    /// A real sqld.
    Sqld,
}

impl Options {
    pub fn new(store: Store, seed: u64, seconds: u64) -> Self {
        let (seed, seconds) = (seed.to_string(), seconds.to_string());
        let options = Self::parse_from(["faults", "--seed", &seed, "--seconds", &seconds]);
        Self { store, ..options }
    }

    /// As the environment says: another seed every run, as what is rare is found in the end, and `usual` seconds.
    ///
    /// # Panics
    /// `SEED` or `FAULT_SECONDS` is no number.
    pub fn from_env(store: Store, usual: u64) -> Self {
        let number = |name: &str, usual: u64| {
            let given = std::env::var(name).ok();
            given.map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
        };
        // On one store nodes are killed, on the other they are spared and what they count is compared; tomorrow the other way round.
        let today = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let parity = (today / DAY_SECONDS + u64::from(store == Store::Sqld)) % 2;
        let seed = number("SEED", 2 * u64::from(std::process::id()) + parity);
        eprintln!("seed {seed}; SEED={seed} runs it again");
        Self::new(store, seed, number("FAULT_SECONDS", usual))
    }
}

/// Runs it to its end.
///
/// # Errors
/// What was asked for cannot be written, or there is no sqld.
pub fn run(program: Program, options: &Options) -> anyhow::Result<Report> {
    let (controls, nodes) = (options.controls, options.nodes);
    let folder = tempfile::Builder::new().prefix("stagedoor-calls-").tempdir()?;
    let ledger = folder.path().join("calls");
    let sqld = match options.store {
        Store::Files => None,
        Store::Sqld => Some(Sqld::start().context("sqld cannot be had")?),
    };
    let hrana = sqld.as_ref().map(Sqld::target);
    let env = tools(&ledger);
    let mesh = MeshOptions { controls, nodes, env, hrana, ..MeshOptions::default() };
    let mut mesh = Mesh::start(program, &mesh);
    mesh.block_on(mesh.client().apply(clerk()))?;
    let load = Load {
        seed: options.seed,
        clients: options.clients,
        agents: options.agents,
        clerk: Some(CLERK.to_owned()),
        ..Load::default()
    };
    let clients = Clients::start(&mesh, &load);
    let mut chaos = Chaos::new(options.seed, options.only.clone(), &mesh, sqld);
    let began = Instant::now();
    chaos.run(&mut mesh, Duration::from_secs(options.seconds));
    let broken = chaos.broken();
    let heard = clients.finish(&mesh, if broken.is_none() { REST_MAX } else { Duration::ZERO });
    if let (Some(path), true) = (&options.keep, broken.is_some()) {
        mesh.keep_logs(path)?;
    }
    // A cluster that is not whole does not tell its journals.
    let history = match &broken {
        None => {
            let mut recorded = mesh.record(&heard, chaos.spared_nodes());
            // A commit whose answer was lost, and whose writer was fenced meanwhile, is counted by nobody.
            recorded.counters.rows = None;
            History { calls: calls(&ledger)?, ..recorded }
        }
        Some(_) => History::default(),
    };
    if let Some(path) = &options.record {
        history.write(path, &format!("recorded with seed {}", options.seed))?;
    }
    let unheard = heard.told.iter().filter(|told| told.end.is_none() && broken.is_none());
    let unheard = unheard.cloned().collect();
    let report = Report {
        options: options.clone(),
        took: began.elapsed(),
        happened: chaos.happened(),
        had_all: chaos.had_all(),
        exits: chaos.exits(),
        timeline: chaos.timeline(),
        broken,
        faults: history.check().into_iter().chain(history.more_calls_than_attempts()).collect(),
        calls: history.calls.len(),
        unheard,
        heard,
        entries: history.journals,
    };
    if let (Some(path), false) = (&options.keep, report.is_sound()) {
        mesh.keep_logs(path)?;
    }
    // Before its store.
    drop(mesh);
    Ok(report)
}

/// The nodes have a tool that must not be called twice, which takes long enough to be hit in the middle of a call, and not
/// so long that its doubts are.
fn tools(ledger: &Path) -> Vec<(String, String)> {
    let set = |name: &str, value: String| (format!("STAGEDOOR_NODE__{name}"), value);
    vec![
        set("TOOLS__COUNT__FILE", ledger.display().to_string()),
        set("TOOLS__COUNT__RECONCILE", true.to_string()),
        set("TOOLS__COUNT__DELAY_BEFORE_MS", 20.to_string()),
        set("TOOLS__COUNT__DELAY_MS", 20.to_string()),
        set("AGENTS__TOOL_TIMEOUT_MS", 5_000.to_string()),
        set("PHASES__WORKERS", 16.to_string()),
    ]
}

/// What the works do that call it.
fn clerk() -> ApplyDefinitionRequest {
    let definition = Definition {
        name: CLERK.to_owned(),
        behaviour: "loop".to_owned(),
        model: "script".to_owned(),
        tools: vec!["count".to_owned()],
        ..Definition::default()
    };
    let tenant = "default".to_owned();
    ApplyDefinitionRequest { tenant, definition: Some(definition) }
}

/// How often a call under each key counted.
fn calls(ledger: &Path) -> anyhow::Result<BTreeMap<String, u64>> {
    let text = match std::fs::read_to_string(ledger) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        text => text?,
    };
    let mut calls = BTreeMap::new();
    for called in tool::calls(&text).into_iter().filter(|called| called.is_made) {
        *calls.entry(called.key).or_default() += 1;
    }
    Ok(calls)
}
