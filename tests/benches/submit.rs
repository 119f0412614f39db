//! Durable submits of works of one step, on one `Open` stream from this process: until they are accepted, and until the
//! result of their step is back.
//!
//! `cargo bench -p tests --bench submit -- --works 40000 --agents 10000 --rounds 3 --store files` prints one JSON line for
//! each of 64 and 1,024 in flight, and for each of the two answers; `--in-flight` and `--until accepted|ended` choose one,
//! and `--store sqld` puts a real sqld behind the cluster. An accepted work is run at once: with `accepted` the
//! processors are shared with the steps of those that were accepted before, and the time ends with the last acceptance.
//! Afterwards every work is
//! waited for and read back: each has succeeded, with one step.

mod load;

use std::process::ExitCode;

use anyhow::ensure;
use proto::v1::Definition;
use serde_json::json;

use load::stream::{self, Load, Until};
use load::{Cluster, argument, percentile, round};

fn main() -> anyhow::Result<ExitCode> {
    load::run(bench())
}

async fn bench() -> anyhow::Result<()> {
    let works: usize = argument("works", 40_000);
    let (only, until) = (argument("in-flight", 0_usize), argument("until", String::new()));
    let answers = [("accepted", Until::Accepted), ("ended", Until::Ended)];
    ensure!(
        until.is_empty() || answers.iter().any(|(name, _)| *name == until),
        "--until is accepted or ended, not {until}"
    );
    for in_flight in
        [64, 1_024].into_iter().filter(|_| only == 0).chain((only != 0).then_some(only))
    {
        for (name, answer) in answers.iter().filter(|(name, _)| until.is_empty() || *name == until)
        {
            one(works, in_flight, name, *answer).await?;
        }
    }
    Ok(())
}

/// A cluster of its own, warmed up with as many agents.
async fn one(works: usize, in_flight: usize, name: &str, until: Until) -> anyhow::Result<()> {
    let agents: usize = argument("agents", 10_000);
    let program = env!("CARGO_BIN_EXE_stagedoor-under-test");
    let mut cluster = Cluster::start(program, &load::options(3))?;
    let definition = Definition {
        behaviour: "loop".to_owned(),
        model: "noop".to_owned(),
        ..Definition::default()
    };
    cluster.apply(definition).await?;
    let load = |works: usize, until| Load {
        agents: (0..works).map(|n| format!("default/bench/{}", n % agents)).collect(),
        input: "noop".to_owned(),
        in_flight,
        until,
    };
    stream::run(&cluster.client, load(agents, Until::Ended)).await?;
    cluster.mark()?;
    let (mut rates, mut latencies, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..argument("rounds", 3) {
        let mut done = stream::run(&cluster.client, load(works, until)).await?;
        rates.push(works as f64 / done.seconds);
        latencies.append(match until {
            Until::Accepted => &mut done.accepted_ms,
            Until::Ended => &mut done.ended_ms,
        });
        load::ended(&cluster.client, &done.ids).await?;
        ids.append(&mut done.ids);
    }
    let counted = cluster.since_mark()?;
    let read = load::read_back(&cluster.client, &ids, 1).await?;
    ensure!(read.open == 0, "{} works have not ended", read.open);
    let line = json!({
        "bench": "submit", "until": name, "store": load::store(), "agents": agents, "in_flight": in_flight,
        "works": ids.len(), "rounds": rates.len(), "works_per_second": {
            "p50": percentile(&mut rates, 0.5), "min": percentile(&mut rates, 0.0), "max": percentile(&mut rates, 1.0),
        },
        "ms": { "p50": percentile(&mut latencies, 0.5), "p99": percentile(&mut latencies, 0.99) },
        "read_back": read.json(), "steps_per_work": round(counted.number("steps") / ids.len() as f64),
    });
    load::print_with(line, &counted);
    Ok(())
}
