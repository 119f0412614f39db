//! What an agent costs in memory: the growth of a node's resident set over many agents that have each done one work.
//!
//! `cargo bench -p tests --bench memory -- --agents 100000 --cold 20000` prints one JSON line: the growth, how many agents
//! were in memory by the node's own count, by how much it grows once more when each of them does a second work (its state:
//! what a work leaves behind), their works as they were read back, and what the processes counted and burnt.

mod load;

use std::process::ExitCode;

use anyhow::ensure;
use proto::v1::Definition;
use serde_json::json;

use load::stream::{self, Load, Until};
use load::{Cluster, argument, round};

const PROGRAM: &str = env!("CARGO_BIN_EXE_stagedoor-under-test");
const NODE: &str = "node-1";
const STEPS: usize = 6;

fn main() -> anyhow::Result<ExitCode> {
    load::run(bench())
}

async fn bench() -> anyhow::Result<()> {
    let agents: usize = argument("agents", 100_000);
    let out_of_memory: usize = argument("cold", agents / 5);
    // Nobody is evicted before the end is measured.
    let mut cluster = start(3_600_000)?;
    cluster.apply(noop()).await?;
    // The first agents pay for what all share: caches, connections, the allocator's arenas.
    let warm = agents / 10;
    run(&cluster, 0, warm).await?;
    let (before_kb, hot_before) = (cluster.resident_kb(NODE)?, hot(&cluster));
    cluster.mark()?;
    let ids = run(&cluster, warm, warm + agents).await?;
    let (after_kb, hot_after) = (cluster.resident_kb(NODE)?, hot(&cluster));
    let grown = hot_after - hot_before;
    ensure!(grown == agents as f64, "{grown} agents came into memory, not {agents}");
    let counted = cluster.since_mark()?;
    // One more work leaves what one work leaves behind: a finding, and its idempotency key.
    let mut more = run(&cluster, warm, warm + agents).await?;
    let again_kb = cluster.resident_kb(NODE)?;
    more.extend(ids);
    let read = load::read_back(&cluster.client, &more, STEPS).await?;
    ensure!(read.with_all_steps == 2 * agents, "{} works have not ended", read.open);
    drop(cluster);
    let cold = cold(out_of_memory).await?;
    let line = json!({
        "bench": "memory", "agents": agents, "hot_before": hot_before, "hot_after": hot_after,
        "resident_kb_before": before_kb, "resident_kb_after": after_kb,
        "kb_per_hot_agent": round((after_kb - before_kb) / grown),
        "kb_of_a_work": round((again_kb - after_kb) / grown), "cold": cold,
        "read_back": read.json(),
    });
    load::print_with(line, &counted);
    Ok(())
}

/// Agents that work and are evicted, twice as many the second time: what the second lot leaves behind in memory.
async fn cold(agents: usize) -> anyhow::Result<serde_json::Value> {
    let mut cluster = start(500)?;
    cluster.apply(noop()).await?;
    run(&cluster, 0, agents).await?;
    cluster.evicted(&[NODE.to_owned()]).await?;
    let (before_kb, evicted_before) = (cluster.resident_kb(NODE)?, gone(&cluster));
    cluster.mark()?;
    let ids = run(&cluster, agents, 3 * agents).await?;
    cluster.evicted(&[NODE.to_owned()]).await?;
    let after_kb = cluster.resident_kb(NODE)?;
    let (evicted, hot) = (gone(&cluster) - evicted_before, hot(&cluster));
    let counted = cluster.since_mark()?;
    let read = load::read_back(&cluster.client, &ids, STEPS).await?;
    ensure!(read.with_all_steps == 2 * agents, "{} works have not ended", read.open);
    Ok(json!({
        "agents": 2 * agents, "evicted": evicted, "hot": hot,
        "read_back": read.json(), "counted": counted.json(),
        "resident_kb_before": before_kb, "resident_kb_after": after_kb,
        "kb_per_cold_agent": round((after_kb - before_kb) / (2 * agents).max(1) as f64),
    }))
}

/// One node, which evicts agents that have been idle for so long.
fn start(idle_ms: u32) -> anyhow::Result<Cluster> {
    let mut options = load::options(1);
    options.env.push(("STAGEDOOR_NODE__AGENTS__IDLE_MS".to_owned(), idle_ms.to_string()));
    Cluster::start(PROGRAM, &options)
}

fn noop() -> Definition {
    Definition { model: "noop".to_owned(), ..Definition::default() }
}

fn gone(cluster: &Cluster) -> f64 {
    cluster.metrics(NODE).sum("stagedoor_agent_evicted_total", &[])
}

fn hot(cluster: &Cluster) -> f64 {
    cluster.metrics(NODE).sum("stagedoor_agent_hot", &[])
}

/// Answers the ids of the works.
async fn run(cluster: &Cluster, from: usize, to: usize) -> anyhow::Result<Vec<String>> {
    let load = Load {
        agents: (from..to).map(|n| format!("default/bench/{n}")).collect(),
        input: "noop".to_owned(),
        in_flight: 1_024,
        until: Until::Ended,
    };
    Ok(stream::run(&cluster.client, load).await?.ids)
}
