//! What every bench needs: arguments, a cluster in a temporary directory, a connected client, and what the processes
//! counted and burnt meanwhile.

// Each bench uses a part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tests::harness::{Dev, Metrics, Options, Program};

/// The value of `--name`, or `default`.
pub(crate) fn argument<T: std::str::FromStr>(name: &str, default: T) -> T {
    let flag = format!("--{name}");
    let mut arguments = std::env::args().skip_while(|argument| *argument != flag).skip(1);
    arguments.next().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// A cluster of release processes under load.
pub(crate) struct Cluster {
    pub(crate) dev: Dev,
    pub(crate) client: client::Client,
    before: BTreeMap<String, Counts>,
}

/// What one process had counted and burnt at one moment.
struct Counts {
    metrics: Metrics,
    cpu_seconds: f64,
}

impl Cluster {
    pub(crate) fn start(program: &'static str, nodes: u16) -> anyhow::Result<Self> {
        Self::start_with(program, nodes, Vec::new())
    }

    /// `env` sets what is in the config of the roles.
    pub(crate) fn start_with(
        program: &'static str,
        nodes: u16,
        env: Vec<(String, String)>,
    ) -> anyhow::Result<Self> {
        Self::start_with_options(program, &Options { nodes, env, ..Options::default() })
    }

    pub(crate) fn start_with_options(
        program: &'static str,
        options: &Options,
    ) -> anyhow::Result<Self> {
        let dev = Dev::start_with(Program(program), options);
        let mut config = client::Config::new(dev.credentials());
        config.api = client::addresses_of(dev.api());
        config.timeouts.call = Duration::from_secs(120);
        let client = client::Client::connect(&config)?;
        let before = BTreeMap::new();
        Ok(Self { dev, client, before })
    }

    /// Counts from here.
    pub(crate) fn mark(&mut self) -> anyhow::Result<()> {
        self.before = self.counts()?;
        Ok(())
    }

    fn counts(&self) -> anyhow::Result<BTreeMap<String, Counts>> {
        let mut counts = BTreeMap::new();
        for process in self.dev.ready()["processes"].as_array().into_iter().flatten() {
            let name = process["name"].as_str().unwrap_or_default();
            let pid = u32::try_from(process["pid"].as_u64().unwrap_or(0))?;
            let counted =
                Counts { metrics: self.dev.metrics(name), cpu_seconds: cpu_seconds(pid)? };
            counts.insert(name.to_owned(), counted);
        }
        Ok(counts)
    }

    /// What was counted since the mark, over all processes, and the CPU seconds of each.
    pub(crate) fn since_mark(&self) -> anyhow::Result<Map<String, Value>> {
        let now = self.counts()?;
        let sum = |name: &str, labels: &[&str]| -> f64 {
            let of = |counts: &BTreeMap<String, Counts>| -> f64 {
                counts.values().map(|counts| counts.metrics.sum(name, labels)).sum()
            };
            of(&now) - of(&self.before)
        };
        let steps = sum("stagedoor_agent_steps_total", &[]);
        let remote = sum("stagedoor_agent_steps_remote_total", &[]);
        let mut counted = Map::new();
        counted.insert("model_calls".into(), json!(sum("stagedoor_model_calls_total", &[])));
        counted.insert("steps".into(), json!(steps));
        counted.insert("steps_off_owner".into(), json!(remote / steps.max(1.0)));
        counted.insert(
            "steps_begun_early".into(),
            json!(sum("stagedoor_agent_steps_early_total", &[])),
        );
        counted.insert("groups".into(), json!(sum("stagedoor_store_writer_groups_total", &[])));
        counted.insert("rows".into(), json!(sum("stagedoor_store_writer_rows_total", &[])));
        counted.insert(
            "commits_synced".into(),
            json!(sum("stagedoor_store_commits_total", &["outcome=\"committed\""])),
        );
        let mut cpu = Map::new();
        for (name, counts) in &now {
            let before = self.before.get(name).map_or(0.0, |before| before.cpu_seconds);
            cpu.insert(name.clone(), json!(round(counts.cpu_seconds - before)));
        }
        cpu.insert("load".into(), json!(round(cpu_seconds(std::process::id())?)));
        counted.insert("cpu_seconds".into(), Value::Object(cpu));
        Ok(counted)
    }
}

/// User and system time of a process, from the kernel's accounting in ticks of 10 ms.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks =
        |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(11) + ticks(12)) / 100.0)
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
