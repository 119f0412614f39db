//! Commits a second and rows a second, by size of the group, over files and through the store role over mutual TLS.
//!
//! One JSON object a line. `rows_found` is read back from the store after each run and must be `rows_sent`. Shards have
//! one group in flight each, as their writers do; `writer` appends single rows, 1,024 at a time, and lets it group them.
//! Load and store share one process here: the other benches measure them apart.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use domain::heads::Heads;
use domain::{Epoch, Lsn};
use net::pki::{Ca, Validity};
use proto::link::{Fence, Group, LogRow, Provision};
use store::role::{Config, Server};
use store::writer::{self, Append, Limits, NewRow, Opening};
use store::{CommitOutcome, EngineConfig, FileStore, RemoteStore, Store};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const PAYLOAD_BYTES: usize = 512;
const RUN: Duration = Duration::from_secs(2);
const IN_FLIGHT: usize = 1_024;

fn main() -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let folder = tempfile::tempdir()?;
        let files =
            Arc::new(FileStore::open(&folder.path().join("files"), EngineConfig::default())?);
        measure("files", &(files.clone() as Arc<dyn Store>), &(files.clone() as Arc<dyn Store>))
            .await?;
        files.close().await;
        through_the_role(folder.path()).await
    })
}

async fn through_the_role(folder: &Path) -> Result<(), Failure> {
    let ca = Ca::generate(&"stagedoor.local".parse()?)?;
    let identity = |who: &str| -> Result<net::Identity, Failure> {
        let id = format!("spiffe://stagedoor.local/{who}").parse()?;
        let issued = ca.issue(&id, Validity::default())?;
        let (certificate, key) = (&issued.certificate_pem, &issued.key_pem);
        Ok(net::Identity::from_pem(certificate, key, ca.certificate_pem())?)
    };
    let config = Config {
        listen: "127.0.0.1:0".parse()?,
        data_dir: folder.join("role"),
        net: net::Config { certificate: "-".into(), key: "-".into(), ca: "-".into() },
        engine: EngineConfig::default(),
        listener: net::ListenerConfig::default(),
        telemetry: telemetry::Config::default(),
    };
    let server = Server::bind(&config, &identity("store/store-1")?).await?;
    let address = server.local_addr().to_string();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.run(async { _ = stopped.await }, || ()));
    let client = store::Config { address, ..store::Config::default() };
    let control: Arc<dyn Store> =
        Arc::new(RemoteStore::new(&client, &identity("control/control-1")?)?);
    let node: Arc<dyn Store> = Arc::new(RemoteStore::new(&client, &identity("node/node-1")?)?);
    measure("role", &control, &node).await?;
    _ = stop.send(());
    Ok(serving.await??)
}

async fn measure(
    engine: &str,
    control: &Arc<dyn Store>,
    node: &Arc<dyn Store>,
) -> Result<(), Failure> {
    let mut next_shard = 0;
    for shards in [1, 12] {
        for rows in [1, 10, 100, 1_000] {
            let databases = provision(control, next_shard, shards).await?;
            next_shard += shards;
            groups(engine, node, &databases, rows).await?;
        }
        let databases = provision(control, next_shard, shards).await?;
        next_shard += shards;
        writers(engine, node, &databases).await?;
    }
    Ok(())
}

async fn provision(
    control: &Arc<dyn Store>,
    first: u32,
    count: u32,
) -> Result<Vec<String>, Failure> {
    let mut databases = Vec::new();
    for shard in first..first + count {
        let database = format!("shard-{shard}");
        let provision = Provision { cluster_id: "bench".to_owned(), shard };
        control.provision(&database, &provision).await?;
        let fence = Fence { expected: 0, node: "node-1".to_owned(), incarnation: 1, term: 1 };
        control.fence(&database, &fence).await?;
        databases.push(database);
    }
    Ok(databases)
}

/// What one shard sent, and how long each commit took.
#[derive(Default)]
struct Sent {
    rows: u64,
    latencies: Vec<Duration>,
}

async fn groups(
    engine: &str,
    node: &Arc<dyn Store>,
    databases: &[String],
    rows: usize,
) -> Result<(), Failure> {
    let started = Instant::now();
    let tasks = databases.iter().map(|database| {
        let (node, database) = (node.clone(), database.clone());
        tokio::spawn(async move { commit_groups(&node, &database, rows).await })
    });
    let mut all = Sent::default();
    for task in tasks.collect::<Vec<_>>() {
        let sent = task.await??;
        all.rows += sent.rows;
        all.latencies.extend(sent.latencies);
    }
    let seconds = started.elapsed().as_secs_f64();
    all.latencies.sort();
    let at =
        |share: usize| all.latencies[(all.latencies.len() - 1) * share / 100].as_micros() as u64;
    tell(serde_json::json!({
        "bench": "commit", "engine": engine, "shards": databases.len(), "group_rows": rows,
        "payload_bytes": PAYLOAD_BYTES,
        "commits_per_second": (all.latencies.len() as f64 / seconds) as u64,
        "rows_per_second": (all.rows as f64 / seconds) as u64,
        "p50_us": at(50), "p99_us": at(99),
        "rows_sent": all.rows, "rows_found": found(node, databases).await?,
    }))
}

async fn commit_groups(
    node: &Arc<dyn Store>,
    database: &str,
    rows: usize,
) -> Result<Sent, Failure> {
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    let mut sent = Sent::default();
    let started = Instant::now();
    while started.elapsed() < RUN {
        let head = sent.rows;
        let row = |lsn| LogRow {
            lsn,
            agent: lsn % 1_000 + 1,
            prev: 0,
            seq: lsn,
            work: lsn,
            kind: 1,
            ts_ms: 1,
            payload: payload.clone(),
            epoch: 1,
        };
        let rows = (head + 1..=head + rows as u64).map(row).collect::<Vec<_>>();
        sent.rows += rows.len() as u64;
        let group = Group { epoch: 1, head, rows, ..Group::default() };
        let began = Instant::now();
        let outcome = node.commit(database, Arc::new(group)).await?;
        sent.latencies.push(began.elapsed());
        if outcome != CommitOutcome::Committed {
            return Err(format!("{database}: {outcome:?}").into());
        }
    }
    Ok(sent)
}

async fn writers(engine: &str, node: &Arc<dyn Store>, databases: &[String]) -> Result<(), Failure> {
    let groups_before = counter();
    let started = Instant::now();
    let tasks = databases.iter().map(|database| {
        let (node, database) = (node.clone(), database.clone());
        let in_flight = IN_FLIGHT / databases.len();
        tokio::spawn(async move { append_rows(node, database, in_flight).await })
    });
    let mut rows = 0;
    for task in tasks.collect::<Vec<_>>() {
        rows += task.await??;
    }
    let seconds = started.elapsed().as_secs_f64();
    tell(serde_json::json!({
        "bench": "writer", "engine": engine, "shards": databases.len(), "in_flight": IN_FLIGHT,
        "payload_bytes": PAYLOAD_BYTES,
        "groups_per_second": ((counter() - groups_before) as f64 / seconds) as u64,
        "rows_per_second": (rows as f64 / seconds) as u64,
        "rows_sent": rows, "rows_found": found(node, databases).await?,
    }))
}

/// Groups that the writers of this process committed.
fn counter() -> u64 {
    telemetry::metrics::counter("stagedoor_store_writer_groups_total", "Groups.").get()
}

async fn append_rows(
    node: Arc<dyn Store>,
    database: String,
    in_flight: usize,
) -> Result<u64, Failure> {
    let opening = Opening { epoch: Epoch(1), head: Lsn(0), heads: Heads::new() };
    let writer = writer::spawn(node, database, opening, Limits::default(), |_| ());
    let room = Arc::new(tokio::sync::Semaphore::new(in_flight));
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    let (started, mut rows) = (Instant::now(), 0);
    while started.elapsed() < RUN {
        let place = room.clone().acquire_owned().await?;
        let row = NewRow { seq: 1, work: 0, kind: 1, ts_ms: 1, payload: payload.clone() };
        let append = Append {
            agent: rows % 1_000 + 1,
            prev: Lsn(0),
            rows: vec![row],
            agents: Vec::new(),
            works: Vec::new(),
            ends: Vec::new(),
            dedups: Vec::new(),
            definitions: Vec::new(),
            done: Box::new(move |_| drop(place)),
        };
        if writer.append(append).is_err() {
            return Err("the writer is full or has stopped".into());
        }
        rows += 1;
    }
    writer.settled().await;
    Ok(rows)
}

async fn found(node: &Arc<dyn Store>, databases: &[String]) -> Result<u64, Failure> {
    let mut rows = 0;
    for database in databases {
        let recovery = node.recover(database).await?;
        rows += recovery.mark.lsn + recovery.tail.len() as u64;
    }
    Ok(rows)
}

fn tell(line: serde_json::Value) -> Result<(), Failure> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
