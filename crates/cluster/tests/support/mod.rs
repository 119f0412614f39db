//! A cluster of this process and children, each a member.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster::{Args, Config, Error, Handle, Incoming, LinkEvent, Peer, Reply, Service};
use domain::{Incarnation, Reason, Role};
use net::pki::{Ca, Validity};
use proto::link::{Envelope, Refusal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard};
use tokio::task::JoinHandle;
use tokio_rustls::TlsStream;

pub(crate) const ECHO: u32 = 1;
pub(crate) const NEVER: u32 = 2;
pub(crate) const CALL_BACK: u32 = 3;
pub(crate) const REFUSE: u32 = 4;
pub(crate) const COUNT_KEPT: u32 = 5;
pub(crate) const COUNT_CASTS: u32 = 6;

pub(crate) const SOON: Duration = Duration::from_secs(20);
const COOKIE: &str = "the-cookie-of-this-cluster";
const CHILD: &str = "STAGEDOOR_CLUSTER_TEST_CHILD";

pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(SOON, wait).await.is_ok(), "it never happened: {what}");
}

pub(crate) fn envelope(kind: u32, text: &str) -> Envelope {
    Envelope { kind, payload: Bytes::copy_from_slice(text.as_bytes()), ..Envelope::default() }
}

/// How many sessions were refused for this reason by this process.
pub(crate) fn refused(reason: &str) -> u64 {
    let start = format!("stagedoor_cluster_refused_total{{reason=\"{reason}\"}} ");
    let text = telemetry::metrics::text().unwrap();
    text.lines().find_map(|line| line.strip_prefix(&start)?.parse().ok()).unwrap_or(0)
}

// --- a member ---

#[derive(Default)]
struct Behaviour {
    handle: OnceLock<Handle>,
    events: Mutex<Vec<LinkEvent>>,
    casts: Mutex<Vec<Peer>>,
    kept: Mutex<Vec<Reply>>,
}

impl Behaviour {
    fn call_back(&self, peer: Peer, payload: Bytes, reply: Reply) {
        let handle = self.handle.get().unwrap().clone();
        tokio::spawn(async move {
            let envelope = Envelope { kind: ECHO, payload, ..Envelope::default() };
            match handle.call(&peer, envelope, Instant::now() + SOON).await {
                Ok(answer) => reply.send(answer),
                Err(error) => reply.send(error.to_string().into()),
            }
        });
    }
}

impl Service for Behaviour {
    fn handle(&self, incoming: Incoming) {
        let Incoming { from, envelope, reply, .. } = incoming;
        let Some(reply) = reply else {
            return self.casts.lock().unwrap().push(from);
        };
        match envelope.kind {
            ECHO => reply.send(envelope.payload),
            NEVER => self.kept.lock().unwrap().push(reply),
            CALL_BACK => self.call_back(from, envelope.payload, reply),
            REFUSE => reply.refuse(Refusal {
                reason: u32::from(Reason::Moved.code()),
                message: "it moved".to_owned(),
                moved_node: "node-7".to_owned(),
                moved_epoch: 3,
                retry_after_ms: 0,
            }),
            COUNT_KEPT => reply.send(self.kept.lock().unwrap().len().to_string().into()),
            COUNT_CASTS => reply.send(self.casts.lock().unwrap().len().to_string().into()),
            other => panic!("kind {other}"),
        }
    }

    fn link(&self, event: LinkEvent) {
        self.events.lock().unwrap().push(event);
    }
}

fn file_of(name: &str) -> String {
    name.replace('/', "-")
}

fn identity(dir: &Path, name: &str) -> net::Identity {
    net::Identity::load(&net::Config {
        certificate: dir.join(format!("{}.crt", file_of(name))),
        key: dir.join(format!("{}.key", file_of(name))),
        ca: dir.join("ca.crt"),
    })
    .unwrap()
}

async fn join(dir: &Path, name: &str, config: Config) -> (Handle, Arc<Behaviour>) {
    let behaviour = Arc::new(Behaviour::default());
    let (identity, service) = (identity(dir, name), behaviour.clone());
    let args = Args { config, identity, incarnation: Incarnation(1), service };
    let handle = cluster::spawn(args).await.unwrap();
    assert!(behaviour.handle.set(handle.clone()).is_ok());
    (handle, behaviour)
}

// --- this process ---

/// Certificates and a cookie, and the turn of a test.
pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    ca: Ca,
    _turn: MutexGuard<'static, ()>,
}

impl Cluster {
    pub(crate) async fn new() -> Self {
        static TURN: AsyncMutex<()> = AsyncMutex::const_new(());
        let _turn = TURN.lock().await;
        let dir = tempfile::tempdir().unwrap();
        let ca = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
        std::fs::write(dir.path().join("ca.crt"), ca.certificate_pem()).unwrap();
        std::fs::write(dir.path().join("cookie"), COOKIE).unwrap();
        Self { dir, ca, _turn }
    }

    fn issue(&self, name: &str) {
        let id = format!("spiffe://stagedoor.local/{name}").parse().unwrap();
        let issued = self.ca.issue(&id, Validity::default()).unwrap();
        issued.write(self.dir.path(), &file_of(name)).unwrap();
    }

    pub(crate) async fn join(&self, name: &str, config: Config) -> Arc<Here> {
        self.issue(name);
        let dir = self.dir.path();
        let listen = "127.0.0.1:0".parse().unwrap();
        let config = Config { listen, cookie: dir.join("cookie"), ..config };
        let (handle, behaviour) = join(dir, name, config).await;
        Arc::new(Here { handle, behaviour })
    }

    pub(crate) fn start(&self, name: &str, orders: &[&str], here: &Here) -> There {
        self.start_at(name, orders, here, "127.0.0.1:0")
    }

    /// Starts a child. An order `learn X` is given the address of this process.
    pub(crate) fn start_at(&self, name: &str, orders: &[&str], here: &Here, listen: &str) -> There {
        self.issue(name);
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut input, output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        writeln!(input, "{name} {listen} {}", here.handle.address()).unwrap();
        for order in orders {
            writeln!(input, "{order}").unwrap();
        }
        writeln!(input, "join").unwrap();
        let mut lines = BufReader::new(output).lines().map_while(Result::ok);
        let address = lines.find_map(|line| Some(line.split_once("JOINED ")?.1.to_owned()));
        let (peer, address) = (name.parse().unwrap(), address.expect("the child joins"));
        There { peer, address, process, input }
    }

    /// A connection of somebody with a valid certificate who is no member.
    pub(crate) async fn dial(&self, name: &str, here: &Here) -> TlsStream<TcpStream> {
        self.issue(name);
        let dialer = net::Dialer::new(&identity(self.dir.path(), name), net::Protocol::Link);
        let expected = net::Expected::any(Role::Control);
        dialer.dial(here.handle.address(), &expected).await.unwrap().stream
    }
}

pub(crate) struct Here {
    pub(crate) handle: Handle,
    behaviour: Arc<Behaviour>,
}

impl Here {
    pub(crate) fn learn(&self, there: &There) {
        self.handle.learn(there.peer.clone(), vec![there.address.clone()]);
    }

    pub(crate) async fn call(
        &self,
        peer: &Peer,
        kind: u32,
        text: &str,
        limit: Duration,
    ) -> Result<String, Error> {
        let answer = self.handle.call(peer, envelope(kind, text), Instant::now() + limit).await?;
        Ok(String::from_utf8(answer.to_vec()).unwrap())
    }

    pub(crate) async fn echo(&self, peer: &Peer) -> Result<String, Error> {
        self.call(peer, ECHO, "hello", SOON).await
    }

    pub(crate) fn spawn_call(
        self: Arc<Self>,
        peer: &Peer,
        kind: u32,
    ) -> JoinHandle<Result<String, Error>> {
        let peer = peer.clone();
        tokio::spawn(async move { self.call(&peer, kind, "", SOON).await })
    }

    pub(crate) async fn eventually_linked(&self, there: &There) {
        eventually("it is linked", async || self.handle.is_linked(&there.peer)).await;
    }

    /// Waits until the peer holds so many calls that it does not answer.
    pub(crate) async fn eventually_keeps(&self, peer: &Peer, count: usize) {
        eventually("the call arrived", async || {
            self.call(peer, COUNT_KEPT, "", SOON).await.is_ok_and(|it| it == count.to_string())
        })
        .await;
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.behaviour.events.lock().unwrap().iter().map(ToString::to_string).collect()
    }

    pub(crate) fn events_of(&self, peer: &Peer) -> Vec<String> {
        let start = peer.to_string();
        self.events().into_iter().filter(|event| event.starts_with(&start)).collect()
    }

    pub(crate) fn casts_of(&self, peer: &Peer) -> usize {
        self.behaviour.casts.lock().unwrap().iter().filter(|from| *from == peer).count()
    }

    pub(crate) async fn leave(&self) {
        self.handle.shutdown().await;
    }
}

/// A member in a process of its own, which ends with this.
pub(crate) struct There {
    pub(crate) peer: Peer,
    pub(crate) address: String,
    process: Child,
    input: ChildStdin,
}

impl There {
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub(crate) fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .args([&format!("-{signal}"), &self.process.id().to_string()])
            .status();
        assert!(status.unwrap().success());
    }

    pub(crate) fn tell(&mut self, order: &str) {
        writeln!(self.input, "{order}").unwrap();
    }
}

impl Drop for There {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

/// What a client of ractor_cluster says first.
pub(crate) async fn say_name(stream: &mut TlsStream<TcpStream>, name: &str) {
    let mut message = name.as_bytes().to_vec();
    // Name in NameMessage in AuthenticationMessage in NetworkMessage: each the field 1 of the next.
    for _ in 0..3 {
        message.splice(0..0, [0x0a, u8::try_from(message.len()).unwrap()]);
    }
    stream.write_u64(message.len() as u64).await.unwrap();
    stream.write_all(&message).await.unwrap();
    stream.flush().await.unwrap();
}

/// Waits until the other side has ended it.
pub(crate) async fn ends(mut stream: TlsStream<TcpStream>) {
    let mut rest = Vec::new();
    let read = tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await;
    _ = read.expect("the stream ends");
}

// --- a child ---

/// Joins and does what it is told, one order a line, until its input ends.
pub(crate) fn child_main() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut lines = std::io::stdin().lines().map_while(Result::ok);
    let first = lines.next().unwrap();
    let [name, listen, parent] = first.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{first}")
    };
    let dir = PathBuf::from(dir);
    let mut config =
        Config { listen: listen.parse().unwrap(), cookie: dir.join("cookie"), ..Config::default() };
    let orders: Vec<String> = lines.by_ref().take_while(|line| line != "join").collect();
    if let Some(cookie) = orders.iter().find_map(|order| order.strip_prefix("cookie ")) {
        config.cookie = dir.join(format!("{}.cookie", file_of(name)));
        std::fs::write(&config.cookie, cookie).unwrap();
    }
    let (handle, _) = runtime.block_on(join(&dir, name, config));
    for order in orders {
        obey(&handle, &order, parent);
    }
    println!("JOINED {}", handle.address());
    for order in lines {
        obey(&handle, &order, parent);
    }
    runtime.block_on(handle.shutdown());
    std::process::exit(0);
}

fn obey(handle: &Handle, order: &str, parent: &str) {
    let (verb, rest) = order.split_once(' ').unwrap();
    match verb {
        "cookie" => {}
        "learn" => handle.learn(rest.parse().unwrap(), vec![parent.to_owned()]),
        "keep" => handle.keep(rest.parse().unwrap()),
        "cast" => handle.cast(&rest.parse().unwrap(), envelope(ECHO, "cast")).unwrap(),
        _ => panic!("{order}"),
    }
}
