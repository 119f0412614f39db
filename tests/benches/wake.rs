//! How long the first submit to an agent that is out of memory takes, against the next one, which finds it there.
//!
//! `cargo bench -p tests --bench wake -- --agents 20000 --probes 1000 --store files` prints one JSON line. Each agent does one
//! work of one step and is evicted; then some of them, spread over all, get two works one after the other, nothing else
//! going on. The time is that from the submit to its acceptance, commit included: what waking costs is the difference. By
//! the nodes' own counts every probed agent was brought into memory once. `resident_kb` is what each node has in memory once
//! all agents are evicted, and `read_back` the works of the probes.

mod load;

use std::process::ExitCode;

use anyhow::ensure;
use proto::v1::Definition;
use serde_json::{Map, json};

use load::stream::{self, Load, Until};
use load::{Cluster, argument, percentile, round};

const NODES: u16 = 3;

fn main() -> anyhow::Result<ExitCode> {
    load::run(bench())
}

async fn bench() -> anyhow::Result<()> {
    let (agents, probes): (usize, usize) = (argument("agents", 20_000), argument("probes", 1_000));
    ensure!((1..=agents).contains(&probes), "--probes are 1 to --agents");
    let mut options = load::options(NODES);
    options.env.push(("STAGEDOOR_NODE__AGENTS__IDLE_MS".to_owned(), "2000".to_owned()));
    let program = env!("CARGO_BIN_EXE_stagedoor-under-test");
    let mut cluster = Cluster::start(program, &options)?;
    let definition = Definition {
        behaviour: "loop".to_owned(),
        model: "noop".to_owned(),
        ..Definition::default()
    };
    cluster.apply(definition).await?;
    let load = |agents: Vec<String>, in_flight| Load {
        agents,
        input: "noop".to_owned(),
        in_flight,
        until: Until::Ended,
    };
    let name = |n: usize| format!("default/bench/{n}");
    let first = stream::run(&cluster.client, load((0..agents).map(name).collect(), 1_024)).await?;
    let nodes: Vec<String> = (1..=NODES).map(|n| format!("node-{n}")).collect();
    cluster.evicted(&nodes).await?;
    let mut resident_kb = Map::new();
    for node in &nodes {
        resident_kb.insert(node.clone(), json!(cluster.resident_kb(node)?));
    }
    cluster.mark()?;
    let woken_before = woken(&cluster, &nodes);
    let twice =
        (0..probes).map(|n| name(n * (agents / probes))).flat_map(|name| [name.clone(), name]);
    let done = stream::run(&cluster.client, load(twice.collect(), 1)).await?;
    let woken = woken(&cluster, &nodes) - woken_before;
    ensure!(woken == probes as f64, "{woken} agents were woken, not {probes}");
    let counted = cluster.since_mark()?;
    let read = load::read_back(&cluster.client, &done.ids, 1).await?;
    ensure!(read.open == 0, "{} works have not ended", read.open);
    let every_other =
        |from: usize| done.accepted_ms.iter().skip(from).step_by(2).copied().collect();
    let of = |mut values: Vec<f64>| {
        let (p50, p95) = (percentile(&mut values, 0.5), percentile(&mut values, 0.95));
        json!({ "p50": p50, "p95": p95, "max": percentile(&mut values, 1.0) })
    };
    let line = json!({
        "bench": "wake", "store": load::store(), "agents": agents, "probes": probes, "woken": woken,
        "cold_ms": of(every_other(0)), "hot_ms": of(every_other(1)),
        "first_works_per_second": round(agents as f64 / first.seconds),
        "resident_kb": resident_kb, "read_back": read.json(),
    });
    load::print_with(line, &counted);
    Ok(())
}

fn woken(cluster: &Cluster, nodes: &[String]) -> f64 {
    let of = |node: &String| cluster.metrics(node).sum("stagedoor_agent_activated_total", &[]);
    nodes.iter().map(of).sum()
}
