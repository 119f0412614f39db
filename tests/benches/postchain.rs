//! PostChain works through a cluster of processes over mutual TLS, on one `Open` stream from this process.
//!
//! `cargo bench -p tests --bench postchain -- --works 20000 --in-flight 1024 --agents 10000 --model noop --bytes 100`
//! (and `--store sqld` for a real sqld behind the cluster) prints one JSON line: the rate, latencies, and what was counted and read back.
//!
//! Which entries were committed together is not kept anywhere, so it is not read. That the steps of a work are in
//! separate commits is derived: `steps_begun_early` counts the steps that began before the store had acknowledged the
//! entries that they rest on, and has to be 0; and a step's own entry is made after it began.

mod load;

use std::collections::{BTreeSet, HashMap};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use proto::v1::{Definition, HistoryEntry, Work};
use serde_json::json;

use load::stream::{self, Load, Until};
use load::{Cluster, argument, percentile, round};

/// How it is known that no commit has two steps of one work.
const SEPARATE: &str = "derived, not read: each step began after the store had acknowledged the commit of the entries it rests on (steps_begun_early counts the others), and its own entry was made after that";

/// What the works are about; a model that reads it finds sentences, terms and a question.
const TEXT: &str = "A journal keeps what an agent has done. Who owns the shard writes the journal. \
                    What becomes of a step whose owner died? The next owner reads the journal and goes on. ";

fn main() -> anyhow::Result<ExitCode> {
    load::run(bench())
}

async fn bench() -> anyhow::Result<()> {
    let works: usize = argument("works", 20_000);
    let in_flight: usize = argument("in-flight", 1_024);
    let agents: usize = argument("agents", works);
    let bytes: usize = argument("bytes", 100);
    let model: String = argument("model", "noop".to_owned());
    let options = load::options(argument("nodes", 3));
    let mut cluster = Cluster::start(env!("CARGO_BIN_EXE_stagedoor-under-test"), &options)?;
    cluster.apply(Definition { model: model.clone(), ..Definition::default() }).await?;
    let load = |works: usize, name: &str| Load {
        agents: (0..works).map(|n| format!("default/bench/{name}-{}", n % agents)).collect(),
        input: TEXT.repeat(bytes / TEXT.len() + 1)[..bytes].to_owned(),
        in_flight,
        until: Until::Ended,
    };
    stream::run(&cluster.client, load(works.min(500), "warm")).await?;
    cluster.mark()?;
    let mut done = stream::run(&cluster.client, load(works, "run")).await?;
    let counted = cluster.since_mark()?;
    let (early, steps) = (counted.number("steps_begun_early"), counted.number("steps"));
    ensure!(early == 0.0, "{early} steps began before the commit of what they rest on");
    ensure!(steps == 6.0 * works as f64, "{works} works took {steps} steps");
    let read_back = read_back(&cluster, &done.ids).await?;
    let line = json!({
        "bench": "postchain", "store": load::store(), "model": model, "works": works, "in_flight": in_flight, "agents": agents,
        "input_bytes": bytes, "seconds": round(done.seconds),
        "works_per_second": round(works as f64 / done.seconds),
        "accepted_ms": { "p50": percentile(&mut done.accepted_ms, 0.5), "p99": percentile(&mut done.accepted_ms, 0.99) },
        "ended_ms": { "p50": percentile(&mut done.ended_ms, 0.5), "p99": percentile(&mut done.ended_ms, 0.99) },
        "read_back": read_back, "separate_commits": SEPARATE,
    });
    load::print_with(line, &counted);
    Ok(())
}

/// Every work, asked of the cluster again, and the journal of every agent: six steps each, in the order of the phases, each
/// of which began after the entry of the one before had been made, and that entry stands before its own in the log.
async fn read_back(cluster: &Cluster, ids: &[String]) -> anyhow::Result<serde_json::Value> {
    let works = load::works(&cluster.client, ids).await?;
    let agents: BTreeSet<&str> = works.iter().map(|work| work.agent.as_str()).collect();
    let agents: Vec<&str> = agents.into_iter().collect();
    let mut entries: HashMap<String, Vec<HistoryEntry>> = HashMap::with_capacity(ids.len());
    for chunk in agents.chunks(64) {
        let read = chunk.iter().map(|agent| steps_of(cluster, agent));
        for entry in futures::future::try_join_all(read).await?.into_iter().flatten() {
            entries.entry(entry.work.clone()).or_default().push(entry);
        }
    }
    for work in &works {
        let journaled = entries.get(&work.id).context("a work that is in no journal")?;
        check(work, journaled).with_context(|| format!("{} is not as it must be", work.id))?;
    }
    let steps = works.iter().map(|work| work.steps.len()).sum::<usize>();
    Ok(
        json!({ "works": works.len(), "with_six_steps_in_order": works.len(), "step_entries": steps }),
    )
}

/// The entries of all steps of an agent, oldest first.
async fn steps_of(cluster: &Cluster, agent: &str) -> anyhow::Result<Vec<HistoryEntry>> {
    let mut history = cluster.client.history(agent, 0);
    let mut entries = Vec::new();
    while let Some(entry) = history.next().await {
        entries.push(entry?);
    }
    entries.retain(|entry| entry.kind == "phase_done");
    entries.reverse();
    Ok(entries)
}

fn check(work: &Work, journaled: &[HistoryEntry]) -> anyhow::Result<()> {
    let millis = |time: &Option<pbjson_types::Timestamp>| time.as_ref().map(proto::convert::millis);
    ensure!(work.steps.len() == 6, "it has {} steps", work.steps.len());
    ensure!(journaled.len() == 6, "its journal has {} steps", journaled.len());
    let names: Vec<&str> = work.steps.iter().map(|step| step.name.as_str()).collect();
    ensure!(names == domain::Phase::ALL.map(domain::Phase::as_str), "its phases are {names:?}");
    for (pair, next) in journaled.windows(2).zip(&work.steps[1..]) {
        ensure!(pair[0].lsn < pair[1].lsn, "its entries are out of order");
        ensure!(millis(&pair[0].time) <= millis(&next.start_time), "{} began too early", next.name);
    }
    Ok(())
}
