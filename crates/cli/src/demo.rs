//! `demo`: one text through the PostChain, on a cluster that is made for it and gone afterwards.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use client::Client;
use domain::definition::POSTCHAIN;
use proto::v1::{SubmitRequest, Work, WorkEvent, WorkState, work_event};

use crate::args::{DemoArgs, Format};
use crate::command::work::{follow_submit, read_file};
use crate::dev::{Cluster, Options};
use crate::exit::{Exit, Failure};
use crate::output;
use crate::signal::Shutdown;

const NODES: u16 = 3;
const TIMEOUT: Duration = Duration::from_secs(30);

/// `demo`.
pub(crate) async fn run(args: DemoArgs) -> Result<Exit, Failure> {
    let input = read_file(&args.file)?;
    let mut shutdown = Shutdown::new(false)?;
    // Removed when this function ends, however it ends.
    let dir = tempfile::Builder::new()
        .prefix("stagedoor-demo-")
        .tempdir()
        .map_err(|error| Failure::other("cannot make a temporary folder").why(error))?;
    let began = Instant::now();
    let mut cluster = Cluster::start(Options {
        data_dir: dir.path().to_owned(),
        nodes: NODES,
        controls: 1,
        api: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        restart: false,
        store: None,
    })?;
    let outcome = tokio::select! {
        outcome = show(&mut cluster, &args, input, began) => outcome,
        () = shutdown.wait() => Err(Failure::other("stopped before the answer was there")),
    };
    cluster.stop().await;
    if let Err(error) = dir.close() {
        eprintln!("cannot remove the temporary folder: {error}");
    }
    outcome
}

async fn show(
    cluster: &mut Cluster,
    args: &DemoArgs,
    input: String,
    began: Instant,
) -> Result<Exit, Failure> {
    // The logs go with the folder.
    let ready = cluster.ready().await;
    ready.map_err(|failure| failure.remedy("`stagedoor dev` keeps its logs"))?;
    if args.output == Format::Text {
        let ready = began.elapsed().as_millis();
        output::line(&format!("store, control and {NODES} nodes are ready after {ready} ms"))?;
        let (name, bytes) = (args.file.display(), input.len());
        output::line(&format!("{name} ({bytes} bytes) goes to agent default/{POSTCHAIN}/demo\n"))?;
    }
    let client = cluster.client(TIMEOUT)?;
    let began = Instant::now();
    let work = tokio::select! {
        work = submit(&client, args.output, input) => work?,
        // Says who died; the work goes on elsewhere.
        () = cluster.watch() => return Err(Failure::other("the cluster ended")),
    };
    if args.output == Format::Text {
        output::line(&answer(&work, began.elapsed()))?;
    }
    Ok(output::exit_of(&work))
}

async fn submit(client: &Client, format: Format, input: String) -> Result<Work, Failure> {
    let agent = format!("default/{POSTCHAIN}/demo");
    let request = SubmitRequest { agent, input, ..SubmitRequest::default() };
    let mut nodes = BTreeSet::new();
    let mut show = |event: &WorkEvent| {
        if let Some(work_event::Event::Phase(step)) = &event.event {
            nodes.insert(step.node.clone());
        }
        match format {
            Format::Json => output::print(format, event, |_| String::new()),
            Format::Text => show_event(event),
        }
    };
    let work = follow_submit(client, request, &mut show).await?;
    if format == Format::Text {
        let nodes: Vec<_> = nodes.into_iter().collect();
        output::line(&format!("\non {}", nodes.join(", ")))?;
    }
    Ok(work)
}

/// Phases as they end, and why nothing happens while nothing does.
fn show_event(event: &WorkEvent) -> Result<(), Failure> {
    match &event.event {
        Some(work_event::Event::Phase(step)) => output::line(&output::phase(step)),
        Some(work_event::Event::StateChange(change)) if change.state() == WorkState::Waiting => {
            output::line(&format!("  waiting ({})", change.reason))
        }
        Some(
            work_event::Event::StateChange(_)
            | work_event::Event::Text(_)
            | work_event::Event::Superseded(_)
            | work_event::Event::Step(_)
            | work_event::Event::Reset(_)
            | work_event::Event::Result(_),
        )
        | None => Ok(()),
    }
}

fn answer(work: &Work, took: Duration) -> String {
    let text = work.result.as_ref().map(|result| result.text.as_str()).unwrap_or_default();
    let text = if text.is_empty() { work.detail.as_str() } else { text };
    let state = output::state(work.state());
    format!("\n{text}\n\n{state} ({}) after {} ms", work.reason, took.as_millis())
}
