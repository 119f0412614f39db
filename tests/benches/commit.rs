//! Commits a second and rows a second, by size of the group, through the store role over mutual TLS; and over files.
//!
//! One JSON object a line. The load is this process; the store role is another one, this program run again. What it has is
//! read back after each run: rows as they are found in its files have to be the ones that were sent, and the commits that
//! it counted have to be the ones that were acknowledged here. `files` is the engine alone, a library without network and so
//! in the same process: the difference to `role` is what the way to another process costs.
//!
//! Shards have one group in flight each, as their writers do; `writer` appends single rows, 1,024 at a time, and lets it
//! group them. `syncs` are the calls of fsync and fdatasync meanwhile, checkpoints included.

mod load;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use domain::heads::Heads;
use domain::{Epoch, Lsn};
use net::pki::{Ca, Validity};
use proto::link::{Fence, Group, LogRow, Provision, ReadHistories, ReadHistory};
use serde_json::{Value, json};
use store::role::{Config, Server};
use store::writer::{self, Append, Limits, NewRow, Opening};
use store::{CommitOutcome, EngineConfig, FileStore, RemoteStore, Store};
use tests::harness::Metrics;

/// Set in the process of the store: the folder with its certificate.
const CHILD: &str = "STAGEDOOR_BENCH_CHILD";
const PAYLOAD_BYTES: usize = 512;
const RUN: Duration = Duration::from_secs(2);
const IN_FLIGHT: usize = 1_024;
/// Of which one answer has room for all.
const ROWS_A_READ: usize = 1_000;

fn main() -> anyhow::Result<ExitCode> {
    load::run(async {
        match std::env::var_os(CHILD) {
            Some(folder) => serve(Path::new(&folder)).await,
            None => bench().await,
        }
    })
}

async fn bench() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let files = Arc::new(FileStore::open(&folder.path().join("files"), EngineConfig::default())?);
    let (control, node) = (files.clone() as Arc<dyn Store>, files.clone() as Arc<dyn Store>);
    measure(&Bench { engine: "files", control, node, role: None }).await?;
    files.close().await;
    through_the_role(folder.path()).await
}

/// A store under load.
struct Bench {
    engine: &'static str,
    control: Arc<dyn Store>,
    node: Arc<dyn Store>,
    /// None: it is in this process.
    role: Option<Role>,
}

/// The process of the store. It does not outlive this.
struct Role {
    process: Child,
    address: String,
    admin: SocketAddr,
}

impl Drop for Role {
    fn drop(&mut self) {
        // It ends when its input does.
        drop(self.process.stdin.take());
        _ = self.process.wait();
    }
}

impl Role {
    fn start(folder: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.env(CHILD, folder).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn()?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("it is piped")?).read_line(&mut line)?;
        let (address, admin) = line.trim().split_once(' ').context("the store did not start")?;
        Ok(Self { address: address.to_owned(), admin: admin.parse()?, process })
    }
}

/// The store role, until its input ends.
async fn serve(folder: &Path) -> anyhow::Result<()> {
    let config = Config {
        listen: "127.0.0.1:0".parse()?,
        data_dir: folder.join("role"),
        net: credentials(folder, "store-1"),
        engine: EngineConfig::default(),
        listener: net::ListenerConfig::default(),
        telemetry: telemetry::Config::default(),
    };
    let server = Server::bind(&config, &net::Identity::load(&config.net)?).await?;
    let health = telemetry::Health::starting();
    let admin = telemetry::admin::serve(config.telemetry.admin, health).await?;
    writeln!(std::io::stdout(), "{} {}", server.local_addr(), admin.addr())?;
    let stopped = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
    server.run(async { _ = stopped.await }, || ()).await?;
    Ok(())
}

fn credentials(folder: &Path, name: &str) -> net::Config {
    let file = |end: &str| folder.join(format!("{name}.{end}"));
    net::Config { certificate: file("crt"), key: file("key"), ca: folder.join("ca.crt") }
}

async fn through_the_role(folder: &Path) -> anyhow::Result<()> {
    let ca = Ca::generate(&"stagedoor.local".parse()?)?;
    std::fs::write(folder.join("ca.crt"), ca.certificate_pem())?;
    for (role, name) in [("store", "store-1"), ("control", "control-1"), ("node", "node-1")] {
        let id = format!("spiffe://stagedoor.local/{role}/{name}").parse()?;
        ca.issue(&id, Validity::default())?.write(folder, name)?;
    }
    let role = Role::start(folder)?;
    let config = store::Config { address: role.address.clone(), ..store::Config::default() };
    let client = |name: &str| -> anyhow::Result<Arc<dyn Store>> {
        let identity = net::Identity::load(&credentials(folder, name))?;
        Ok(Arc::new(RemoteStore::new(&config, &identity)?))
    };
    let (control, node) = (client("control-1")?, client("node-1")?);
    measure(&Bench { engine: "role", control, node, role: Some(role) }).await
}

/// What had been committed and burnt at one moment.
struct Mark {
    commits: f64,
    syncs: u64,
    load_cpu_seconds: f64,
    store_cpu_seconds: f64,
}

impl Bench {
    fn mark(&self) -> anyhow::Result<Mark> {
        const COMMITS: &str = "stagedoor_store_commits_total";
        let load_cpu_seconds = load::cpu_seconds(std::process::id())?;
        let syncs = load::syncs::count()?;
        Ok(match &self.role {
            Some(role) => Mark {
                commits: Metrics::read(role.admin)?.sum(COMMITS, &["outcome=\"committed\""]),
                syncs,
                load_cpu_seconds,
                store_cpu_seconds: load::cpu_seconds(role.process.id())?,
            },
            None => {
                let counter = telemetry::metrics::counter_vec(COMMITS, "Commits.", &["outcome"]);
                let commits = counter.with_label_values(&["committed"]).get() as f64;
                Mark { commits, syncs, load_cpu_seconds, store_cpu_seconds: 0.0 }
            }
        })
    }

    /// The line of a run with what became of it: everything that was acknowledged is there.
    async fn tell(
        &self,
        mut line: Value,
        before: &Mark,
        databases: &[String],
        rows: u64,
        commits: u64,
    ) -> anyhow::Result<()> {
        let now = self.mark()?;
        let counted = now.commits - before.commits;
        ensure!(
            counted == commits as f64,
            "{commits} commits, of which the store counted {counted}"
        );
        let found = found(&self.node, databases).await?;
        ensure!(rows == found, "{rows} rows were sent, and {found} are there");
        let load = load::round(now.load_cpu_seconds - before.load_cpu_seconds);
        let store = load::round(now.store_cpu_seconds - before.store_cpu_seconds);
        line["engine"] = json!(self.engine);
        line["rows_sent"] = json!(rows);
        line["rows_found"] = json!(found);
        line["commits_acknowledged"] = json!(commits);
        line["commits_counted_by_the_store"] = json!(counted);
        line["syncs"] = json!(now.syncs - before.syncs);
        line["cpu_seconds"] = match self.role {
            Some(_) => json!({ "load": load, "store": store }),
            None => json!({ "load_and_store": load }),
        };
        load::print(&line);
        Ok(())
    }
}

async fn measure(bench: &Bench) -> anyhow::Result<()> {
    let mut next_shard = 0;
    for shards in [1, 12] {
        for rows in [1, 10, 100, 1_000] {
            let databases = provision(&bench.control, next_shard, shards).await?;
            next_shard += shards;
            groups(bench, &databases, rows).await?;
        }
        let databases = provision(&bench.control, next_shard, shards).await?;
        next_shard += shards;
        writers(bench, &databases).await?;
    }
    Ok(())
}

async fn provision(
    control: &Arc<dyn Store>,
    first: u32,
    count: u32,
) -> anyhow::Result<Vec<String>> {
    let mut databases = Vec::new();
    for shard in first..first + count {
        let database = format!("shard-{shard}");
        let provision = Provision { cluster_id: "bench".to_owned(), shard };
        control.provision(&database, &provision).await?;
        let fence =
            Fence { expected: 0, node: "node-1".to_owned(), incarnation: 1, term: 1, above: 0 };
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

async fn groups(bench: &Bench, databases: &[String], rows: usize) -> anyhow::Result<()> {
    let (before, started) = (bench.mark()?, Instant::now());
    let tasks = databases.iter().map(|database| {
        let (node, database) = (bench.node.clone(), database.clone());
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
    let line = json!({
        "bench": "commit", "shards": databases.len(), "group_rows": rows,
        "payload_bytes": PAYLOAD_BYTES,
        "commits_per_second": (all.latencies.len() as f64 / seconds) as u64,
        "rows_per_second": (all.rows as f64 / seconds) as u64,
        "p50_us": at(50), "p99_us": at(99),
    });
    bench.tell(line, &before, databases, all.rows, all.latencies.len() as u64).await
}

async fn commit_groups(node: &Arc<dyn Store>, database: &str, rows: usize) -> anyhow::Result<Sent> {
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
            bail!("{database}: {outcome:?}");
        }
    }
    Ok(sent)
}

async fn writers(bench: &Bench, databases: &[String]) -> anyhow::Result<()> {
    let groups_before = counter();
    let (before, started) = (bench.mark()?, Instant::now());
    let tasks = databases.iter().map(|database| {
        let (node, database) = (bench.node.clone(), database.clone());
        let in_flight = IN_FLIGHT / databases.len();
        tokio::spawn(async move { append_rows(node, database, in_flight).await })
    });
    let mut rows = 0;
    for task in tasks.collect::<Vec<_>>() {
        rows += task.await??;
    }
    let seconds = started.elapsed().as_secs_f64();
    let groups = counter() - groups_before;
    let line = json!({
        "bench": "writer", "shards": databases.len(), "in_flight": IN_FLIGHT,
        "payload_bytes": PAYLOAD_BYTES,
        "groups_per_second": (groups as f64 / seconds) as u64,
        "rows_per_second": (rows as f64 / seconds) as u64,
    });
    bench.tell(line, &before, databases, rows, groups).await
}

/// Groups that the writers of this process committed.
fn counter() -> u64 {
    telemetry::metrics::counter("stagedoor_store_writer_groups_total", "Groups.").get()
}

async fn append_rows(
    node: Arc<dyn Store>,
    database: String,
    in_flight: usize,
) -> anyhow::Result<u64> {
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
            bail!("the writer is full or has stopped");
        }
        rows += 1;
    }
    writer.settled().await;
    Ok(rows)
}

/// Rows of the log that are there, each read.
async fn found(node: &Arc<dyn Store>, databases: &[String]) -> anyhow::Result<u64> {
    let mut rows = 0;
    for database in databases {
        let all: Vec<u64> = (1..=node.owner(database).await?.head).collect();
        for some in all.chunks(ROWS_A_READ) {
            let each = some.iter().map(|lsn| ReadHistory { from: *lsn, above: lsn - 1, limit: 1 });
            let read = ReadHistories { each: each.collect() };
            rows += node.histories(database, &read).await?.rows.len() as u64;
        }
    }
    Ok(rows)
}
