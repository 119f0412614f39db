//! From nothing to work: `dev` until its first work is accepted, `demo` until its first phase is shown.
//!
//! `cargo bench -p tests --bench startup -- --rounds 5` prints one JSON line. The first work is read back
//! when it has ended, and the demo has to show six phases and a success; neither is in the time. CPU seconds are sums over
//! all rounds from the start of each cluster; those of `demo` are of all its processes together, since they end with it.

mod load;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use domain::Phase;
use serde_json::json;

use load::{Cluster, Counted, ReadBack, argument, percentile, round};

const PROGRAM: &str = env!("CARGO_BIN_EXE_stagedoor-under-test");

fn main() -> anyhow::Result<ExitCode> {
    load::run(bench())
}

async fn bench() -> anyhow::Result<()> {
    let rounds: usize = argument("rounds", 5);
    let (mut accepted, mut shown) = (Vec::new(), Vec::new());
    let (mut counted, mut read, mut demo_cpu) = (Counted::default(), ReadBack::default(), 0.0);
    for _ in 0..rounds {
        let first = dev().await?;
        accepted.push(first.seconds);
        counted.add(first.counted);
        read.add(&first.read);
        let (seconds, cpu) = tokio::task::spawn_blocking(demo).await??;
        shown.push(seconds);
        demo_cpu += cpu;
    }
    let worst = |values: &[f64]| round(values.iter().copied().fold(0.0, f64::max));
    let line = json!({
        "bench": "startup", "rounds": rounds,
        "dev_to_accepted_seconds": { "max": worst(&accepted), "p50": percentile(&mut accepted, 0.5) },
        "demo_to_first_phase_seconds": { "max": worst(&shown), "p50": percentile(&mut shown, 0.5) },
        "read_back": read.json(), "demos_with_six_phases": shown.len(), "demo_cpu_seconds": round(demo_cpu),
    });
    load::print_with(line, &counted);
    Ok(())
}

struct First {
    seconds: f64,
    counted: Counted,
    read: ReadBack,
}

async fn dev() -> anyhow::Result<First> {
    let begin = Instant::now();
    let cluster = Cluster::start(PROGRAM, &load::options(3))?;
    let request = proto::v1::SubmitRequest {
        agent: "default/postchain/first".to_owned(),
        input: "What is first?".to_owned(),
        ..proto::v1::SubmitRequest::default()
    };
    let id = cluster.client.submit(request).await?.id;
    let seconds = begin.elapsed().as_secs_f64();
    let patience = Instant::now() + Duration::from_secs(60);
    while cluster.client.get(&id).await?.end_time.is_none() {
        ensure!(Instant::now() < patience, "{id} does not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let read = load::read_back(&cluster.client, &[id], 6).await?;
    Ok(First { seconds, counted: cluster.since_mark()?, read })
}

/// Its output is read line by line; the first that names a phase counts. Answers the CPU seconds, too.
fn demo() -> anyhow::Result<(f64, f64)> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(b"The copper valve turns. Who turns the copper valve?")?;
    let (begin, cpu_before) = (Instant::now(), load::cpu_seconds_of_ended_children()?);
    let mut child =
        Command::new(PROGRAM).arg("demo").arg(file.path()).stdout(Stdio::piped()).spawn()?;
    let output = BufReader::new(child.stdout.take().context("its output is piped")?);
    let (mut first, mut phases, mut has_succeeded) = (None, Vec::new(), false);
    for line in output.lines() {
        let line = line?;
        has_succeeded |= line.starts_with("succeeded ");
        let word = line.split_whitespace().next().unwrap_or_default();
        let phase = Phase::ALL.into_iter().find(|phase| phase.as_str() == word);
        if let Some(phase) = phase.filter(|_| line.starts_with("  ")) {
            first = first.or_else(|| Some(begin.elapsed().as_secs_f64()));
            phases.push(phase);
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "demo ended with {status}");
    ensure!(has_succeeded && phases == Phase::ALL, "demo showed {phases:?}");
    let cpu = load::cpu_seconds_of_ended_children()? - cpu_before;
    Ok((first.context("demo showed no phase")?, cpu))
}
