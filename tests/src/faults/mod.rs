//! Random faults from a seed: clients submit, processes and links fail, and in the end the history must be sound.
//!
//! The seed decides which faults come when. What they hit is decided by the machine, so a seed makes a failure likely
//! again, not certain.

mod chaos;
mod report;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;

pub use report::Report;

use self::chaos::Chaos;
use crate::harness::history::History;
use crate::harness::{Clients, Load, Mesh, MeshOptions, Program};

/// After the last fault, for everything that was acknowledged.
const REST_MAX: Duration = Duration::from_secs(240);

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

impl Options {
    pub fn new(seed: u64, seconds: u64) -> Self {
        let (seed, seconds) = (seed.to_string(), seconds.to_string());
        Self::parse_from(["faults", "--seed", &seed, "--seconds", &seconds])
    }
}

/// Runs it to its end.
///
/// # Errors
/// What was asked for cannot be written.
pub fn run(program: Program, options: &Options) -> anyhow::Result<Report> {
    let (controls, nodes) = (options.controls, options.nodes);
    let mesh = MeshOptions { controls, nodes, ..MeshOptions::default() };
    let mut mesh = Mesh::start(program, &mesh);
    let load = Load {
        seed: options.seed,
        clients: options.clients,
        agents: options.agents,
        ..Load::default()
    };
    let clients = Clients::start(&mesh, &load);
    let mut chaos = Chaos::new(options.seed, options.only.clone(), &mesh);
    let began = Instant::now();
    chaos.run(&mut mesh, Duration::from_secs(options.seconds));
    let broken = chaos.broken();
    let heard = clients.finish(&mesh, if broken.is_none() { REST_MAX } else { Duration::ZERO });
    if let (Some(path), true) = (&options.keep, broken.is_some()) {
        mesh.keep_logs(path)?;
    }
    // A cluster that is not whole does not tell its journals.
    let history = match &broken {
        None => mesh.record(&heard, chaos.spared_nodes()),
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
        exits: chaos.exits(),
        timeline: chaos.timeline(),
        broken,
        faults: history.check(),
        unheard,
        heard,
        entries: history.journals,
    };
    if let (Some(path), false) = (&options.keep, report.is_sound()) {
        mesh.keep_logs(path)?;
    }
    Ok(report)
}
