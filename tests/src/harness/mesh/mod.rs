//! A cluster whose processes reach each other through proxies only, so that any link of any process can be broken
//! while the process lives.
//!
//! Every process is a child of its own, with a config that outlives it: started again, it listens where it listened.
//! Clients go through proxies, too; the admin ports do not.

mod config;
mod origin;
mod spaces;

pub use spaces::Spaces;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use client::Client;
use proto::v1::{ExplainRequest, StatusResponse, Transition};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use self::config::Plan;
use self::origin::Processes;
use super::child::{Child, TAIL_LINES, send};
use super::dev::Place;
use super::{Fault, HranaTarget, Metrics, PATIENCE, Program, Proxy, eventually};

const READY_MAX: Duration = Duration::from_secs(90);
/// Whoever dials and is none of our processes.
pub const CLIENTS: &str = "clients";

/// What a mesh is made of.
#[derive(Clone, Debug)]
pub struct MeshOptions {
    pub controls: usize,
    pub nodes: usize,
    pub shards: usize,
    /// Set in the environment of every process.
    pub env: Vec<(String, String)>,
    /// In place of a store process. Its databases are reached through a proxy, its admin API is not.
    pub hrana: Option<HranaTarget>,
}

impl Default for MeshOptions {
    fn default() -> Self {
        Self { controls: 1, nodes: 3, shards: 12, env: Vec::new(), hrana: None }
    }
}

/// What a process listens for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Port {
    /// Of the store: its one port. Of a node: where other members reach it. Of control: the same.
    Main,
    /// Of control: where nodes beat.
    Beat,
    /// Of control: where clients are served.
    Api,
}

/// A running cluster behind proxies.
pub struct Mesh {
    program: Program,
    options: MeshOptions,
    runtime: Runtime,
    client: Client,
    // Processes go before what they use.
    children: BTreeMap<String, Child>,
    proxies: BTreeMap<(String, Port), Proxy>,
    plan: Plan,
    known: Processes,
    dir: TempDir,
    _place: Place,
}

impl Mesh {
    /// Returns when all nodes are alive and all shards are open.
    ///
    /// # Panics
    /// It does not come to that.
    pub fn start(program: Program, options: &MeshOptions) -> Self {
        // Replicas take over from one that is late with its beats, which a busy machine makes of all of them.
        let place = if 1 < options.controls { Place::take_all() } else { Place::take() };
        net::install_crypto_provider();
        let dir = tempfile::Builder::new().prefix("stagedoor-mesh-").tempdir().expect("a folder");
        let known = Processes::default();
        let plan = Plan::write(dir.path(), options, |_| (config::free(), config::free()));
        let origin = known.origin(CLIENTS);
        let proxies = plan
            .listeners
            .iter()
            .map(|(of, (real, shown))| (of.clone(), Proxy::start(*shown, *real, origin.clone())));
        let proxies = proxies.collect();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let client = client(&runtime, &plan.credentials);
        let mut mesh = Self {
            program,
            options: options.clone(),
            runtime,
            client,
            children: BTreeMap::new(),
            proxies,
            plan,
            known,
            dir,
            _place: place,
        };
        mesh.names().iter().for_each(|name| mesh.start_again(name));
        // What was planned is for their first run.
        mesh.options.env.retain(|(name, _)| name != telemetry::fault::VARIABLE);
        mesh.wait_until_ready();
        mesh
    }

    /// All of them, in the order in which they start.
    pub fn names(&self) -> Vec<String> {
        self.plan.processes.iter().map(|process| process.name.clone()).collect()
    }

    pub fn nodes(&self) -> Vec<String> {
        (1..=self.options.nodes).map(|number| format!("node-{number}")).collect()
    }

    pub fn options(&self) -> &MeshOptions {
        &self.options
    }

    /// Runs something asynchronous to its end.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(Box::pin(work))
    }

    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// A client that knows all addresses; usable on the runtime of the mesh.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Another connection.
    pub fn new_client(&self) -> Client {
        client(&self.runtime, &self.plan.credentials)
    }

    /// A connection that is made to this replica first, and to the others after it.
    ///
    /// # Panics
    /// There is none of that name.
    pub fn client_at(&self, replica: &str) -> Client {
        let _inside = self.runtime.enter();
        let listeners = self.plan.listeners.iter().filter(|((_, port), _)| *port == Port::Api);
        let mut api: Vec<_> =
            listeners.map(|((name, _), (_, shown))| (name != replica, shown.to_string())).collect();
        api.sort();
        assert!(api.first().is_some_and(|(is_other, _)| !is_other), "there is no {replica}");
        let api = api.into_iter().map(|(_, address)| address).collect();
        let config = client::Config { api, ..client::Config::new(&self.plan.credentials) };
        Client::connect(&config).expect("the credentials were just made")
    }

    /// # Panics
    /// It does not run.
    pub fn pid(&self, name: &str) -> u32 {
        self.children.get(name).unwrap_or_else(|| panic!("{name} does not run")).pid()
    }

    /// By name, of those that run.
    pub fn pids(&self) -> BTreeMap<String, u32> {
        self.children.iter().map(|(name, child)| (name.clone(), child.pid())).collect()
    }

    /// Those that have ended without being told to.
    pub fn dead(&mut self) -> Vec<String> {
        let children = self.children.iter_mut();
        let dead = children.filter_map(|(name, child)| child.status().map(|_| name.clone()));
        dead.collect()
    }

    /// Waits until one of them has ended by itself, and takes it away.
    ///
    /// # Panics
    /// It does not end.
    pub fn wait_until_over(&mut self, name: &str) -> ExitStatus {
        let mut child = self.children.remove(name).unwrap_or_else(|| panic!("{name} is not there"));
        let status = child.wait(PATIENCE);
        self.known.forget(child.pid());
        self.listen(name, false);
        status
    }

    /// # Panics
    /// It does not run.
    pub fn signal(&self, name: &str, signal: Signal) {
        send(self.pid(name), signal).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// Kills it, and nobody listens there any more.
    pub fn kill(&mut self, name: &str) {
        let mut child = self.children.remove(name).unwrap_or_else(|| panic!("{name} is not there"));
        child.signal(Signal::KILL);
        self.listen(name, false);
        self.known.forget(child.pid());
        child.wait(PATIENCE);
    }

    /// Starts one that does not run, with the config and the ports that it had.
    pub fn start_again(&mut self, name: &str) {
        let process = self.plan.processes.iter().find(|process| process.name == name);
        let process = process.unwrap_or_else(|| panic!("{name} is not planned"));
        let mut command = self.program.command();
        command.arg(process.role.as_str()).arg("--config").arg(&process.config);
        command.arg("--stdin-guard");
        command.envs(self.options.env.iter().map(|(name, value)| (name, value)));
        let child = self.known.learn(name, || {
            let child = Child::spawn_logging(name, &mut command, &self.log_path(name));
            (child.pid(), child)
        });
        self.listen(name, true);
        self.children.insert(name.to_owned(), child);
    }

    fn listen(&self, name: &str, wanted: bool) {
        let proxies = self.proxies.iter().filter(|((of, _), _)| of == name);
        proxies.for_each(|(_, proxy)| proxy.listen(wanted));
    }

    /// What `from` has with a port of `to`.
    pub fn fault(&self, from: &str, to: &str, port: Port, fault: Fault) {
        self.proxy(to, port).set(from, fault);
    }

    /// Resets, once, what `from` has open there.
    pub fn reset(&self, from: &str, to: &str, port: Port) {
        self.proxy(to, port).reset(from);
    }

    /// Every link of a process, those of clients to it included.
    pub fn isolate(&self, name: &str, fault: Fault) {
        for ((of, _), proxy) in &self.proxies {
            match of == name {
                true => proxy.set_all(fault),
                false => proxy.set(name, fault),
            }
        }
    }

    /// No link has a fault any more.
    pub fn heal(&self) {
        self.proxies.values().for_each(|proxy| proxy.set_all(Fault::NONE));
    }

    fn proxy(&self, to: &str, port: Port) -> &Proxy {
        let of = (to.to_owned(), port);
        self.proxies.get(&of).unwrap_or_else(|| panic!("{to} has no {port:?}"))
    }

    /// # Errors
    /// The cluster does not answer.
    pub fn status(&self) -> Result<StatusResponse, client::Error> {
        let client = self.client().with_timeout(Duration::from_secs(5));
        self.block_on(client.status())
    }

    /// Until all nodes are alive and all shards are open.
    ///
    /// # Panics
    /// It does not come to that.
    pub fn wait_until_ready(&self) {
        eventually(READY_MAX, "all nodes are alive and all shards open", || self.check_ready());
    }

    /// # Errors
    /// What is missing: nodes that are not alive, shards that are not open.
    pub fn check_ready(&self) -> Result<(), String> {
        let status = self.status().map_err(|error| error.to_string())?;
        let lost = status.nodes.iter().filter(|node| node.state != "alive");
        let lost = lost.map(|node| format!("{} is {}", node.name, node.state));
        let shut = status.shards.iter().filter(|shard| shard.state != "open");
        let shut = shut.map(|shard| format!("shard {} is {}", shard.id, shard.state));
        let missing: Vec<_> = lost.chain(shut).collect();
        let is_whole =
            status.nodes.len() == self.options.nodes && status.shards.len() == self.options.shards;
        if is_whole && missing.is_empty() { Ok(()) } else { Err(missing.join(", ")) }
    }

    /// The transitions of something, as far as they are stored.
    ///
    /// # Panics
    /// The cluster does not tell.
    pub fn why(&self, kind: &str, id: &str) -> Vec<Transition> {
        let request = || ExplainRequest { kind: kind.to_owned(), id: id.to_owned() };
        let client = self.client();
        let what = format!("why {kind} {id} is answered");
        let answer = eventually(PATIENCE, &what, || self.block_on(client.explain(request())));
        answer.transitions
    }

    /// # Errors
    /// It does not answer.
    pub fn metrics(&self, name: &str) -> std::io::Result<Metrics> {
        let process = self.plan.processes.iter().find(|process| process.name == name);
        Metrics::read(process.unwrap_or_else(|| panic!("{name} is not planned")).admin)
    }

    /// The sum of what a process counts under this name.
    ///
    /// # Panics
    /// It does not answer.
    pub fn count(&self, process: &str, metric: &str, labels: &[&str]) -> f64 {
        let what = format!("{process} tells its metrics");
        eventually(PATIENCE, &what, || self.metrics(process)).sum(metric, labels)
    }

    /// For the files of the test itself; removed with the cluster.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.dir.path().join("logs").join(format!("{name}.log"))
    }

    /// Copies all logs to a folder that outlives the mesh.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep_logs(&self, to: &Path) -> std::io::Result<()> {
        fs::create_dir_all(to)?;
        for name in self.names() {
            fs::copy(self.log_path(&name), to.join(format!("{name}.log")))?;
        }
        Ok(())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell();
        }
        self.heal();
        // One that was stopped cannot hear that it has to end.
        self.children.values().for_each(|child| _ = send(child.pid(), Signal::CONT));
        for process in self.plan.processes.iter().rev() {
            if let Some(mut child) = self.children.remove(&process.name) {
                child.close_stdin();
                drop(child);
            }
        }
    }
}

impl Mesh {
    /// Prints the ends of all logs, for whoever reads why a test failed.
    fn tell(&self) {
        for name in self.names() {
            let text = self.log(&name);
            let lines: Vec<_> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
            eprintln!("--- {name}\n{}", tail.join("\n"));
        }
    }
}

fn client(runtime: &Runtime, credentials: &Path) -> Client {
    let _inside = runtime.enter();
    Client::connect(&client::Config::new(credentials)).expect("the credentials were just made")
}

/// An address that no other test program uses: the last three bytes of 127.x.y.z are those of our pid.
fn own_address() -> Ipv4Addr {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    // 127.0 and its neighbours are what others listen on.
    Ipv4Addr::new(127, 64 + high % 64, middle, low)
}

fn socket(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::from((ip, port))
}
