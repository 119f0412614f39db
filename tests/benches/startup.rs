//! From nothing to work: `dev` until its first work is accepted, `demo` until its first phase is shown.
//!
//! `cargo bench -p tests --bench startup -- --rounds 5` prints one JSON line.

mod load;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::json;

use load::{Cluster, argument, percentile, round};

const PROGRAM: &str = env!("CARGO_BIN_EXE_stagedoor-under-test");

fn main() -> anyhow::Result<()> {
    let rounds: usize = argument("rounds", 5);
    let runtime = tokio::runtime::Runtime::new()?;
    let (mut accepted, mut shown) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        accepted.push(runtime.block_on(dev())?);
        shown.push(demo()?);
    }
    let worst = |values: &[f64]| round(values.iter().copied().fold(0.0, f64::max));
    let line = json!({
        "bench": "startup", "rounds": rounds,
        "dev_to_accepted_seconds": { "max": worst(&accepted), "p50": percentile(&mut accepted, 0.5) },
        "demo_to_first_phase_seconds": { "max": worst(&shown), "p50": percentile(&mut shown, 0.5) },
    });
    load::print(&line);
    Ok(())
}

async fn dev() -> anyhow::Result<f64> {
    let begin = Instant::now();
    let cluster = Cluster::start(PROGRAM, 3)?;
    let request = proto::v1::SubmitRequest {
        agent: "default/postchain/first".to_owned(),
        input: "What is first?".to_owned(),
        ..proto::v1::SubmitRequest::default()
    };
    cluster.client.submit(request).await?;
    Ok(begin.elapsed().as_secs_f64())
}

/// Its output is read line by line; the first that names a phase counts.
fn demo() -> anyhow::Result<f64> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(b"The copper valve turns. Who turns the copper valve?")?;
    let begin = Instant::now();
    let mut child =
        Command::new(PROGRAM).arg("demo").arg(file.path()).stdout(Stdio::piped()).spawn()?;
    let output = BufReader::new(child.stdout.take().context("its output is piped")?);
    let mut first = None;
    for line in output.lines() {
        let line = line?;
        if first.is_none() && line.trim_start().starts_with("action ") {
            first = Some(begin.elapsed().as_secs_f64());
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "demo ended with {status}");
    first.context("demo showed no phase")
}
