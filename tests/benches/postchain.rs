//! PostChain works through a cluster of processes over mutual TLS, on one `Open` stream from this process.
//!
//! `cargo bench -p tests --bench postchain -- --works 20000 --in-flight 1024 --agents 10000 --model noop --bytes 100`
//! prints one JSON line: the rate, latencies, and what was counted and read back.

mod load;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use proto::v1::open_response::Response;
use proto::v1::{OpenWatch, SubmitRequest, WorkState, work_event::Event};
use serde_json::json;
use tokio::sync::Semaphore;

use load::{Cluster, argument, percentile, round};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let works: usize = argument("works", 20_000);
    let in_flight: usize = argument("in-flight", 1_024);
    let agents: usize = argument("agents", works);
    let bytes: usize = argument("bytes", 100);
    let model: String = argument("model", "noop".to_owned());
    let mut cluster =
        Cluster::start(env!("CARGO_BIN_EXE_stagedoor-under-test"), argument("nodes", 3))?;
    let definition = proto::v1::Definition {
        name: "bench".to_owned(),
        model: model.clone(),
        ..proto::v1::Definition::default()
    };
    let request = proto::v1::ApplyDefinitionRequest {
        tenant: "default".to_owned(),
        definition: Some(definition),
    };
    cluster.client.apply(request).await?;
    run(&cluster, works.min(500), in_flight, agents, bytes, "warm").await?;
    cluster.mark()?;
    let mut done = run(&cluster, works, in_flight, agents, bytes, "run").await?;
    let counted = cluster.since_mark()?;
    let early = counted.get("steps_begun_early").and_then(serde_json::Value::as_f64);
    ensure!(early == Some(0.0), "steps began before the commit of the one they rest on");
    let read_back = read_back(&cluster, &done.ids).await?;
    let mut line = json!({
        "bench": "postchain", "model": model, "works": works, "in_flight": in_flight, "agents": agents,
        "input_bytes": bytes, "seconds": round(done.seconds),
        "works_per_second": round(works as f64 / done.seconds),
        "accepted_ms": { "p50": percentile(&mut done.accepted_ms, 0.5), "p99": percentile(&mut done.accepted_ms, 0.99) },
        "ended_ms": { "p50": percentile(&mut done.ended_ms, 0.5), "p99": percentile(&mut done.ended_ms, 0.99) },
        "read_back": read_back,
    });
    line.as_object_mut().context("an object")?.extend(counted);
    load::print(&line);
    Ok(())
}

struct Done {
    ids: Vec<String>,
    seconds: f64,
    accepted_ms: Vec<f64>,
    ended_ms: Vec<f64>,
}

async fn run(
    cluster: &Cluster,
    works: usize,
    in_flight: usize,
    agents: usize,
    bytes: usize,
    name: &str,
) -> anyhow::Result<Done> {
    let (sender, mut responses) = cluster.client.open().split();
    let room = Arc::new(Semaphore::new(in_flight));
    let started = Arc::new(std::sync::Mutex::new(HashMap::with_capacity(works)));
    let input = "noop ".repeat(bytes / 5 + 1)[..bytes].to_owned();
    let begin = Instant::now();
    let (times, turns, name) = (started.clone(), room.clone(), name.to_owned());
    let submitting = tokio::spawn(async move {
        for n in 0..works {
            turns.acquire().await?.forget();
            let agent = format!("default/bench/{name}-{}", n % agents);
            let request = SubmitRequest { agent, input: input.clone(), ..SubmitRequest::default() };
            times.lock().expect("no panic").insert(n as i64, Instant::now());
            sender.submit(n as i64, request, OpenWatch::End).await?;
        }
        anyhow::Ok(sender)
    });
    let mut done = Done {
        ids: Vec::with_capacity(works),
        seconds: 0.0,
        accepted_ms: vec![],
        ended_ms: vec![],
    };
    while done.ended_ms.len() < works {
        let response = tokio::time::timeout(Duration::from_secs(60), responses.next()).await;
        let response =
            response.context("no response for a minute")?.context("the stream ended")??;
        let since = started.lock().expect("no panic").get(&response.tag).map(Instant::elapsed);
        let ms = since.context("a response to nothing")?.as_secs_f64() * 1_000.0;
        match response.response.context("an empty response")? {
            Response::Accepted(work) => {
                done.accepted_ms.push(ms);
                done.ids.push(work.id);
            }
            Response::Event(event) => {
                let Some(Event::Result(work)) = event.event else { continue };
                ensure!(
                    work.state() == WorkState::Succeeded,
                    "{} is {:?}: {}",
                    work.id,
                    work.state(),
                    work.reason
                );
                done.ended_ms.push(ms);
                room.add_permits(1);
            }
            Response::Refused(refused) => {
                anyhow::bail!("refused: {} {}", refused.reason, refused.message)
            }
        }
    }
    done.seconds = begin.elapsed().as_secs_f64();
    drop(submitting.await??);
    Ok(done)
}

/// Every work, asked of the cluster again: six steps each, in the order of the phases, each begun after the one before.
async fn read_back(cluster: &Cluster, ids: &[String]) -> anyhow::Result<serde_json::Value> {
    let mut six = 0;
    let mut in_order = 0;
    for chunk in ids.chunks(64) {
        let asked = chunk.iter().map(|id| cluster.client.get(id));
        for work in futures::future::join_all(asked).await {
            let work = work?;
            let millis =
                |time: &Option<pbjson_types::Timestamp>| time.as_ref().map(proto::convert::millis);
            six += usize::from(work.steps.len() == 6);
            let ordered = work
                .steps
                .windows(2)
                .all(|pair| millis(&pair[0].end_time) <= millis(&pair[1].start_time));
            in_order += usize::from(ordered);
        }
    }
    ensure!(six == ids.len(), "{} works have not six steps", ids.len() - six);
    ensure!(in_order == ids.len(), "{} works have steps out of order", ids.len() - in_order);
    Ok(json!({ "works": ids.len(), "with_six_steps": six, "steps_in_order": in_order }))
}
