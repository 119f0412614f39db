//! Calls between two processes over mutual TLS, against a bare tonic bidirectional echo over the same TLS, in turns.
//!
//! Prints JSON lines: one a measurement, then the medians with their ratios. The other process counts what it answered,
//! and its count, which is read after each measurement, has to be ours. Nothing is stored here. `cpu_seconds` are of each
//! process, the warm-up included, and those of a call are that by all calls, `with_warm_up`.
// A bench that cannot go on has nothing to tell but where it stood.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod load;

use std::convert::Infallible;
use std::future::Ready;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster::{Args, Config, Handle, Incoming, LinkEvent, Peer, Service};
use domain::{Incarnation, Role};
use futures::StreamExt;
use futures::stream::BoxStream;
use net::pki::{Ca, Validity};
use proto::link::Envelope;
use tests::harness::Raw;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http;
use tonic::{Request, Response, Status, Streaming};

const CHILD: &str = "STAGEDOOR_BENCH_CHILD";
const PAYLOAD_BYTES: usize = 100;
const ROUNDS: usize = 5;
const WARM_UP: Duration = Duration::from_millis(300);
const MEASURE: Duration = Duration::from_secs(1);
const ECHO: u32 = 1;
const COUNT: u32 = 2;
const COUNT_BARE: u32 = 3;

fn main() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match std::env::var(CHILD) {
        Ok(dir) => runtime.block_on(child(Path::new(&dir))),
        Err(_) => runtime.block_on(parent()),
    }
}

// --- both ---

fn issue(dir: &Path) {
    let ca = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
    std::fs::write(dir.join("ca.crt"), ca.certificate_pem()).unwrap();
    std::fs::write(dir.join("cookie"), "0123456789abcdef").unwrap();
    for name in ["control/control-1", "node/node-1"] {
        let id = format!("spiffe://stagedoor.local/{name}").parse().unwrap();
        let file = name.split_once('/').unwrap().1;
        ca.issue(&id, Validity::default()).unwrap().write(dir, file).unwrap();
    }
}

fn identity(dir: &Path, name: &str) -> net::Identity {
    net::Identity::load(&net::Config {
        certificate: dir.join(format!("{name}.crt")),
        key: dir.join(format!("{name}.key")),
        ca: dir.join("ca.crt"),
    })
    .unwrap()
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

async fn join(dir: &Path, name: &str, service: Arc<dyn Service>) -> Handle {
    let config = Config { listen: any(), cookie: dir.join("cookie"), ..Config::default() };
    let identity = identity(dir, name);
    cluster::spawn(Args { config, identity, incarnation: Incarnation(1), service }).await.unwrap()
}

/// What this process answered, since it was asked.
#[derive(Clone, Default)]
struct Answers {
    calls: Arc<AtomicU64>,
    bare: Arc<AtomicU64>,
}

impl Service for Answers {
    fn handle(&self, incoming: Incoming) {
        let Some(reply) = incoming.reply else { return };
        match incoming.envelope.kind {
            ECHO => {
                self.calls.fetch_add(1, Ordering::Relaxed);
                reply.send(incoming.envelope.payload);
            }
            kind => {
                let counter = if kind == COUNT { &self.calls } else { &self.bare };
                let count = counter.swap(0, Ordering::Relaxed);
                reply.send(Bytes::copy_from_slice(&count.to_be_bytes()));
            }
        }
    }
    fn link(&self, _: LinkEvent) {}
}

// --- the process that answers ---

async fn child(dir: &Path) {
    let answers = Answers::default();
    let bare = answers.bare.clone();
    let handle = join(dir, "node-1", Arc::new(answers)).await;
    let allowed = [Role::Control];
    let (identity, limits) = (identity(dir, "node-1"), net::ListenerConfig::default());
    let listener = net::Listener::bind(any(), &identity, net::Protocol::Grpc, &allowed, limits);
    let listener = listener.await.unwrap();
    println!("{} {}", handle.address(), listener.local_addr());
    let server = tonic::transport::Server::builder()
        .add_service(Echo(bare))
        .serve_with_incoming(net::grpc::incoming(listener));
    tokio::spawn(server);
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()))
        .await
        .unwrap()
        .unwrap();
    handle.shutdown().await;
}

// --- the process that asks ---

struct Other {
    process: Child,
    cluster: String,
    grpc: String,
}

impl Drop for Other {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

fn start(dir: &Path) -> Other {
    let mut process = Command::new(std::env::current_exe().unwrap())
        .env(CHILD, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (cluster, grpc) = line.trim().split_once(' ').unwrap();
    Other { cluster: cluster.to_owned(), grpc: grpc.to_owned(), process }
}

async fn parent() {
    let dir = tempfile::tempdir().unwrap();
    issue(dir.path());
    let other = start(dir.path());
    let handle = join(dir.path(), "control-1", Arc::new(Answers::default())).await;
    let peer: Peer = "node/node-1".parse().unwrap();
    handle.learn(peer.clone(), vec![other.cluster.clone()]);
    handle.keep(peer.clone());
    let grpc = connect(dir.path(), &other.grpc).await;
    let pids = [std::process::id(), other.process.id()];
    let asked = Asked { handle: handle.clone(), peer };

    let mut all: Vec<Measured> = Vec::new();
    for round in 0..ROUNDS {
        for in_flight in [1, 64, 1_024] {
            let ours = measured("gateway", in_flight, pids, calls(&asked, in_flight)).await;
            let bare = echoes(&asked, grpc.clone(), in_flight);
            let theirs = measured("tonic_bidi", in_flight, pids, bare).await;
            for it in [ours, theirs] {
                println!("{}", it.json(round));
                all.push(it);
            }
        }
    }
    summary(&all);
    handle.shutdown().await;
}

struct Measured {
    what: &'static str,
    in_flight: usize,
    count: u64,
    all: u64,
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// Of who asks and of who answers.
    cpu_seconds: [f64; 2],
}

impl Measured {
    fn json(&self, round: usize) -> String {
        let Self { what, in_flight, count, all, per_second, p50_us, p99_us, .. } = self;
        let [asker, answerer] = self.cpu_seconds;
        let [asker_us, answerer_us] = [self.cpu_us(0), self.cpu_us(1)];
        format!(
            "{{\"bench\":\"call\",\"round\":{round},\"what\":\"{what}\",\"bytes\":{PAYLOAD_BYTES},\
             \"in_flight\":{in_flight},\"calls\":{count},\"with_warm_up\":{all},\"counted_by_the_other\":{all},\
             \"calls_per_second\":{per_second:.0},\
             \"p50_us\":{p50_us:.1},\"p99_us\":{p99_us:.1},\
             \"cpu_seconds\":{{\"asker\":{asker:.2},\"answerer\":{answerer:.2}}},\
             \"cpu_us_per_call\":{{\"asker\":{asker_us:.2},\"answerer\":{answerer_us:.2}}}}}"
        )
    }

    fn cpu_us(&self, process: usize) -> f64 {
        self.cpu_seconds[process] / self.all as f64 * 1e6
    }
}

/// How many calls were answered in all, and of those after the warm-up in which time, and how long each took.
struct Run {
    all: u64,
    elapsed: Duration,
    times_us: Vec<f32>,
}

async fn measured(
    what: &'static str,
    in_flight: usize,
    pids: [u32; 2],
    run: impl Future<Output = Run>,
) -> Measured {
    let seconds = || pids.map(|pid| load::cpu_seconds(pid).unwrap());
    let before = seconds();
    let mut run = run.await;
    let after = seconds();
    run.times_us.sort_by(f32::total_cmp);
    let at = |q: f64| f64::from(run.times_us[((run.times_us.len() - 1) as f64 * q) as usize]);
    let count = run.times_us.len() as u64;
    Measured {
        what,
        in_flight,
        count,
        all: run.all,
        per_second: count as f64 / run.elapsed.as_secs_f64(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        cpu_seconds: [after[0] - before[0], after[1] - before[1]],
    }
}

/// The other process, and the way to it.
struct Asked {
    handle: Handle,
    peer: Peer,
}

impl Asked {
    /// How much the other process answered since it was asked for the last time.
    async fn count(&self, kind: u32) -> u64 {
        let envelope = Envelope { kind, ..Envelope::default() };
        let deadline = Instant::now() + Duration::from_secs(10);
        let counted = self.handle.call(&self.peer, envelope, deadline).await.unwrap();
        u64::from_be_bytes(counted.as_ref().try_into().unwrap())
    }
}

async fn calls(asked: &Asked, in_flight: usize) -> Run {
    let Asked { handle, peer } = asked;
    let payload = Bytes::from(vec![7; PAYLOAD_BYTES]);
    let envelope = |kind| Envelope { kind, payload: payload.clone(), ..Envelope::default() };
    asked.count(COUNT).await;
    let begin = Instant::now() + WARM_UP;
    let end = begin + MEASURE;
    let callers: Vec<_> = (0..in_flight)
        .map(|_| {
            let (handle, peer, envelope) = (handle.clone(), peer.clone(), envelope(ECHO));
            tokio::spawn(async move {
                let (mut all, mut times) = (0_u64, Vec::new());
                loop {
                    let start = Instant::now();
                    if end <= start {
                        return (all, times);
                    }
                    let deadline = start + Duration::from_secs(10);
                    let answer = handle.call(&peer, envelope.clone(), deadline).await.unwrap();
                    assert_eq!(answer, envelope.payload);
                    all += 1;
                    if begin <= start {
                        times.push(start.elapsed().as_secs_f32() * 1e6);
                    }
                }
            })
        })
        .collect();
    let (mut all, mut times_us) = (0, Vec::new());
    for caller in callers {
        let (count, times) = caller.await.unwrap();
        all += count;
        times_us.extend(times);
    }
    let elapsed = begin.elapsed();
    assert_eq!(asked.count(COUNT).await, all, "the other process counted as many");
    Run { all, elapsed, times_us }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn summary(all: &[Measured]) {
    let of = |what, in_flight, field: fn(&Measured) -> f64| {
        let chosen = all.iter().filter(|it| it.what == what && it.in_flight == in_flight);
        median(chosen.map(field))
    };
    let rtt = |what| of(what, 1, |it| it.p50_us);
    let rate = |what, in_flight| of(what, in_flight, |it| it.per_second);
    let (ours, bare) = (rtt("gateway"), rtt("tonic_bidi"));
    println!(
        "{{\"bench\":\"call\",\"summary\":true,\"rounds\":{ROUNDS},\"rtt_p50_us\":{ours:.1},\
         \"bare_rtt_p50_us\":{bare:.1},\"rtt_ratio\":{:.2},\"calls_per_second_64\":{:.0},\
         \"bare_64\":{:.0},\"calls_per_second_1024\":{:.0},\"bare_1024\":{:.0},\
         \"cpu_us_per_call_1024\":{{\"asker\":{:.2},\"answerer\":{:.2}}}}}",
        ours / bare,
        rate("gateway", 64),
        rate("tonic_bidi", 64),
        rate("gateway", 1_024),
        rate("tonic_bidi", 1_024),
        of("gateway", 1_024, |it| it.cpu_us(0)),
        of("gateway", 1_024, |it| it.cpu_us(1)),
    );
}

// --- the bare echo ---

async fn connect(dir: &Path, address: &str) -> tonic::transport::Channel {
    let dialer = net::Dialer::new(&identity(dir, "control-1"), net::Protocol::Grpc);
    let expected = net::Expected::any(Role::Node);
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap();
    endpoint.connect_with_connector(net::grpc::connector(dialer, expected)).await.unwrap()
}

async fn echoes(asked: &Asked, channel: tonic::transport::Channel, in_flight: usize) -> Run {
    asked.count(COUNT_BARE).await;
    let payload = Bytes::from(vec![7; PAYLOAD_BYTES]);
    let (sender, receiver) = tokio::sync::mpsc::channel(in_flight);
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/bench.Echo/Echo");
    let stream = grpc.streaming(Request::new(ReceiverStream::new(receiver)), path, Raw);
    let mut answers: Streaming<Bytes> = stream.await.unwrap().into_inner();
    let begin = Instant::now() + WARM_UP;
    let end = begin + MEASURE;
    let mut sent = std::collections::VecDeque::new();
    for _ in 0..in_flight {
        sent.push_back(Instant::now());
        sender.send(payload.clone()).await.unwrap();
    }
    let (mut all, mut times_us) = (0, Vec::new());
    // Answers come in the order of the questions.
    while let Some(start) = sent.pop_front() {
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(answer, payload);
        all += 1;
        let now = Instant::now();
        if begin <= start {
            times_us.push((now - start).as_secs_f32() * 1e6);
        }
        if now < end {
            sent.push_back(now);
            sender.send(payload.clone()).await.unwrap();
        }
    }
    let elapsed = begin.elapsed();
    assert_eq!(asked.count(COUNT_BARE).await, all, "the other process counted as many");
    Run { all, elapsed, times_us }
}

/// Counts what it answers.
#[derive(Clone)]
struct Echo(Arc<AtomicU64>);

impl tonic::server::NamedService for Echo {
    const NAME: &'static str = "bench.Echo";
}

impl tonic::codegen::Service<http::Request<tonic::body::Body>> for Echo {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = tonic::codegen::BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let all = EchoAll(self.0.clone());
        Box::pin(async move { Ok(tonic::server::Grpc::new(Raw).streaming(all, request).await) })
    }
}

struct EchoAll(Arc<AtomicU64>);

impl tonic::server::StreamingService<Bytes> for EchoAll {
    type Response = Bytes;
    type ResponseStream = BoxStream<'static, Result<Bytes, Status>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let count = self.0.clone();
        let counted = request.into_inner().inspect(move |answer| {
            count.fetch_add(u64::from(answer.is_ok()), Ordering::Relaxed);
        });
        std::future::ready(Ok(Response::new(counted.boxed())))
    }
}
