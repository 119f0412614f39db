//! What an agent costs in memory: the growth of a node's resident set over many agents that have each done one work.
//!
//! `cargo bench -p tests --bench memory -- --agents 100000` prints one JSON line: the growth, how many agents
//! were in memory by the node's own count, by how much it grows once more when each of them does a second work (its state:
//! what a work leaves behind), their works as they were read back, and what the processes counted and burnt.

mod load;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use proto::v1::open_response::Response;
use proto::v1::{OpenWatch, SubmitRequest, work_event::Event};
use serde_json::json;
use tokio::sync::Semaphore;

use load::{Cluster, argument, round};

const PROGRAM: &str = env!("CARGO_BIN_EXE_stagedoor-under-test");

fn main() -> anyhow::Result<ExitCode> {
    load::run(bench())
}

async fn bench() -> anyhow::Result<()> {
    let agents: usize = argument("agents", 100_000);
    // Nobody is evicted before the end is measured.
    let env = [("STAGEDOOR_NODE__AGENTS__IDLE_MS".to_owned(), "3600000".to_owned())];
    let mut cluster = Cluster::start_with(PROGRAM, 1, env.into())?;
    apply(&cluster).await?;
    // The first agents pay for what all share: caches, connections, the allocator's arenas.
    let warm = agents / 10;
    run(&cluster, 0, warm).await?;
    let (before_kb, hot_before) = (resident_kb(&cluster)?, hot(&cluster));
    cluster.mark()?;
    let ids = run(&cluster, warm, warm + agents).await?;
    let (after_kb, hot_after) = (resident_kb(&cluster)?, hot(&cluster));
    let grown = hot_after - hot_before;
    ensure!(grown == agents as f64, "{grown} agents came into memory, not {agents}");
    let counted = cluster.since_mark()?;
    // One more work leaves what one work leaves behind: a finding, and its idempotency key.
    let mut more = run(&cluster, warm, warm + agents).await?;
    let again_kb = resident_kb(&cluster)?;
    more.extend(ids);
    let read = load::read_back(&cluster.client, &more).await?;
    ensure!(read.with_six_steps == 2 * agents, "{} works have not ended", read.open);
    drop(cluster);
    let cold = cold(agents / 5).await?;
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
    let env = [("STAGEDOOR_NODE__AGENTS__IDLE_MS".to_owned(), "500".to_owned())];
    let mut cluster = Cluster::start_with(PROGRAM, 1, env.into())?;
    apply(&cluster).await?;
    run(&cluster, 0, agents).await?;
    evicted(&cluster).await?;
    let (before_kb, evicted_before) = (resident_kb(&cluster)?, gone(&cluster));
    cluster.mark()?;
    let ids = run(&cluster, agents, 3 * agents).await?;
    evicted(&cluster).await?;
    let after_kb = resident_kb(&cluster)?;
    let (evicted, hot) = (gone(&cluster) - evicted_before, hot(&cluster));
    let counted = cluster.since_mark()?;
    let read = load::read_back(&cluster.client, &ids).await?;
    ensure!(read.with_six_steps == 2 * agents, "{} works have not ended", read.open);
    Ok(json!({
        "agents": 2 * agents, "evicted": evicted, "hot": hot,
        "read_back": read.json(), "counted": counted.json(),
        "resident_kb_before": before_kb, "resident_kb_after": after_kb,
        "kb_per_cold_agent": round((after_kb - before_kb) / (2 * agents).max(1) as f64),
    }))
}

async fn evicted(cluster: &Cluster) -> anyhow::Result<()> {
    for _ in 0..600 {
        if hot(cluster) == 0.0 {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("agents are in memory a minute after their last work")
}

async fn apply(cluster: &Cluster) -> anyhow::Result<()> {
    let definition = proto::v1::Definition {
        name: "bench".to_owned(),
        model: "noop".to_owned(),
        ..proto::v1::Definition::default()
    };
    let request = proto::v1::ApplyDefinitionRequest {
        tenant: "default".to_owned(),
        definition: Some(definition),
    };
    cluster.client.apply(request).await?;
    Ok(())
}

fn gone(cluster: &Cluster) -> f64 {
    cluster.metrics("node-1").sum("stagedoor_agent_evicted_total", &[])
}

fn hot(cluster: &Cluster) -> f64 {
    cluster.metrics("node-1").sum("stagedoor_agent_hot", &[])
}

fn resident_kb(cluster: &Cluster) -> anyhow::Result<f64> {
    let pid = cluster.pid("node-1").context("there is no node-1")?.to_string();
    let status = std::fs::read_to_string(Path::new("/proc").join(pid).join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Answers the ids of the works.
async fn run(cluster: &Cluster, from: usize, to: usize) -> anyhow::Result<Vec<String>> {
    let (sender, mut responses) = cluster.client.open().split();
    let room = Arc::new(Semaphore::new(1_024));
    let turns = room.clone();
    let submitting = tokio::spawn(async move {
        for n in from..to {
            turns.acquire().await?.forget();
            let (agent, input) = (format!("default/bench/{n}"), "noop".to_owned());
            let request = SubmitRequest { agent, input, ..SubmitRequest::default() };
            sender.submit(n as i64, request, OpenWatch::End).await?;
        }
        anyhow::Ok(sender)
    });
    let mut ids = Vec::with_capacity(to - from);
    let mut open: BTreeSet<i64> = (from as i64..to as i64).collect();
    while !open.is_empty() {
        let response = tokio::time::timeout(Duration::from_secs(60), responses.next()).await;
        let response =
            response.context("no response for a minute")?.context("the stream ended")??;
        match response.response {
            Some(Response::Event(event)) if matches!(event.event, Some(Event::Result(_))) => {
                open.remove(&response.tag);
                room.add_permits(1);
            }
            Some(Response::Refused(refused)) => {
                bail!("refused: {} {}", refused.reason, refused.message)
            }
            Some(Response::Accepted(work)) => ids.push(work.id),
            Some(Response::Event(_)) | None => {}
        }
    }
    drop(submitting.await??);
    Ok(ids)
}
