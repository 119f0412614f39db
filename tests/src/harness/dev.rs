//! A whole cluster: `stagedoor dev` in a temporary directory, on free ports.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::child::{Child, TAIL_LINES, send};
use super::wait::eventually;
use super::{Metrics, Output, PATIENCE, Program, metrics};

/// A debug build on a busy machine.
const READY_MAX: Duration = Duration::from_secs(60);
/// Clusters of one test binary at once: each is five processes.
const CLUSTERS_MAX: usize = 3;

/// How to start one.
#[derive(Clone, Debug)]
pub struct Options {
    pub nodes: u16,
    /// Control replicas.
    pub controls: u16,
    /// Whether a process that died is started again.
    pub restart: bool,
    /// What is set in the environment, for the config of the roles.
    pub env: Vec<(String, String)>,
    /// Further arguments.
    pub args: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { nodes: 3, controls: 1, restart: false, env: Vec::new(), args: Vec::new() }
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Dev {
    program: Program,
    options: Options,
    // In the order in which they have to go.
    child: Child,
    dir: TempDir,
    ready: Value,
    _place: Place,
}

impl Dev {
    /// Three nodes, nothing special.
    pub fn start(program: Program) -> Self {
        Self::start_with(program, &Options::default())
    }

    /// Returns when it says that it can take work.
    ///
    /// # Panics
    /// It does not.
    pub fn start_with(program: Program, options: &Options) -> Self {
        let place = Place::take();
        let dir = tempfile::Builder::new().prefix("stagedoor-test-").tempdir().expect("a folder");
        let data_dir = dir.path().join("dev");
        let starting = starting();
        let mut child = spawn(program, options, &data_dir);
        let ready = ready_line(&mut child, &data_dir);
        drop(starting);
        let options = options.clone();
        Self { program, options, child, dir, ready, _place: place }
    }

    /// Ends it as its user would, and starts it again in the same directory.
    ///
    /// # Panics
    /// It does not end, or not begin.
    pub fn restart(&mut self) {
        self.child.close_stdin();
        let status = self.child.wait(PATIENCE);
        assert!(status.success(), "{status}: {:?}", self.child.stderr());
        self.start_again(&self.options.clone());
    }

    /// Starts it again in the same directory, after it has ended.
    ///
    /// # Panics
    /// It does not say that it can take work.
    pub fn start_again(&mut self, options: &Options) {
        let dir = self.dir();
        self.options = options.clone();
        let _starting = starting();
        self.child = spawn(self.program, options, &dir);
        self.ready = ready_line(&mut self.child, &dir);
    }

    pub fn program(&self) -> Program {
        self.program
    }

    /// The data directory.
    pub fn dir(&self) -> PathBuf {
        self.dir.path().join("dev")
    }

    /// For the files of the test itself; removed with the cluster.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// What it said when it was ready.
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    pub fn api(&self) -> &str {
        self.ready["api"].as_str().expect("the ready line names the API")
    }

    pub fn credentials(&self) -> PathBuf {
        self.ready["credentials"].as_str().expect("the ready line names them").into()
    }

    /// The process `dev` itself.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Runs a client command with JSON as output.
    pub fn run(&self, args: &[&str]) -> Output {
        self.run_as(&self.credentials(), args)
    }

    /// The same with other credentials.
    pub fn run_as(&self, credentials: &Path, args: &[&str]) -> Output {
        let mut command = self.program.command();
        command.args(args).args(["--output", "json", "--api", self.api()]);
        Output::of(command.arg("--credentials").arg(credentials))
    }

    /// A client in this process.
    ///
    /// # Panics
    /// The credentials cannot be used.
    pub fn client(&self) -> client::Client {
        net::install_crypto_provider();
        client::Client::connect(&client::Config::new(self.credentials())).expect("a client")
    }

    /// The CA that all certificates of this cluster are from.
    ///
    /// # Panics
    /// It cannot be read.
    pub fn ca(&self) -> net::pki::Ca {
        net::pki::Ca::load(&self.dir().join("ca")).expect("dev has made a CA")
    }

    /// Writes the folder of a client whose certificate says this.
    ///
    /// # Panics
    /// It cannot be issued.
    pub fn issue_client(&self, id: &str, validity: net::pki::Validity) -> PathBuf {
        let ca = self.ca();
        let issued = ca.issue(&id.parse().expect("a SPIFFE id"), validity).expect("a certificate");
        let folder = tempfile::tempdir_in(self.scratch()).expect("a folder").keep();
        issued.write(&folder, "client").expect("a folder to write to");
        fs::write(folder.join("ca.crt"), ca.certificate_pem()).expect("a folder to write to");
        folder
    }

    pub fn pid(&self, name: &str) -> u32 {
        let processes = self.processes();
        let pid = processes.iter().find(|p| p["name"] == name).and_then(|p| p["pid"].as_u64());
        pid.unwrap_or_else(|| panic!("there is no {name}")).try_into().expect("a pid")
    }

    /// Sends a signal to one of the processes.
    ///
    /// # Panics
    /// It is not there.
    pub fn signal(&self, name: &str, signal: Signal) {
        send(self.pid(name), signal).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// What a process counts.
    ///
    /// # Panics
    /// It does not answer.
    pub fn metrics(&self, name: &str) -> Metrics {
        let admin = self.admin(name);
        eventually(PATIENCE, &format!("{name} tells its metrics"), || Metrics::read(admin))
    }

    /// Why a process is not ready, or that it is.
    ///
    /// # Panics
    /// It does not answer.
    pub fn readiness(&self, name: &str) -> String {
        let admin = self.admin(name);
        let what = format!("{name} says whether it is ready");
        let answer = eventually(PATIENCE, &what, || metrics::get(admin, "/readyz"));
        answer.lines().last().unwrap_or_default().to_owned()
    }

    /// The sum over all nodes.
    pub fn node_metrics(&self, name: &str, labels: &[&str]) -> f64 {
        let processes = self.processes();
        let nodes = processes.iter().filter(|p| p["role"] == "node");
        let names = nodes.filter_map(|p| p["name"].as_str());
        names.map(|node| self.metrics(node).sum(name, labels)).sum()
    }

    pub fn log(&self, name: &str) -> String {
        log(&self.dir(), name)
    }

    /// Where a control process listens for `part`: `api`, `cluster` or `beat`.
    ///
    /// # Panics
    /// Its config does not say.
    pub fn control_address(&self, part: &str) -> String {
        self.config("control-1")[part]["listen"].as_str().expect("it is set").to_owned()
    }

    /// The config that a process was started with.
    ///
    /// # Panics
    /// It cannot be read.
    pub fn config(&self, name: &str) -> toml::Table {
        let path = self.dir().join("config").join(format!("{name}.toml"));
        fs::read_to_string(path).expect("dev has written it").parse().expect("it is TOML")
    }

    fn admin(&self, name: &str) -> SocketAddr {
        let processes = self.processes();
        let admin = processes.iter().find(|p| p["name"] == name).and_then(|p| p["admin"].as_str());
        admin.unwrap_or_else(|| panic!("there is no {name}")).parse().expect("an address")
    }

    /// As they are now: a process that was started again has another pid.
    fn processes(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.dir().join("processes.json")).expect("dev writes it");
        serde_json::from_str(&text).expect("it is JSON")
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tell(&self.dir());
        }
        // A process that was stopped cannot hear that it has to end.
        let live = self.child.status().is_none();
        for process in self.processes().iter().filter(|_| live) {
            let pid = process["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            _ = pid.map(|pid| send(pid, Signal::CONT));
        }
    }
}

fn spawn(program: Program, options: &Options, data_dir: &Path) -> Child {
    let mut command = program.command();
    command.args(["dev", "--output", "json", "--api", "127.0.0.1:0", "--stdin-guard"]);
    command.arg("--nodes").arg(options.nodes.to_string()).arg("--data-dir").arg(data_dir);
    command.arg("--controls").arg(options.controls.to_string());
    command.args(&options.args);
    command.envs(options.env.iter().map(|(name, value)| (name, value)));
    if options.restart {
        command.arg("--restart");
    }
    Child::spawn("dev", &mut command)
}

fn ready_line(child: &mut Child, dir: &Path) -> Value {
    let began = Instant::now();
    loop {
        if let Some(line) = child.stdout().first() {
            return serde_json::from_str(line).expect("the ready line is JSON");
        }
        if child.status().is_some() || READY_MAX < began.elapsed() {
            tell(dir);
            panic!("the cluster was not ready after {:?}", began.elapsed());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Prints the ends of all logs, for whoever reads why a test failed.
fn tell(dir: &Path) {
    let logs = fs::read_dir(dir.join("logs")).into_iter().flatten().flatten();
    let mut names: Vec<_> = logs.filter_map(|log| log.file_name().into_string().ok()).collect();
    names.sort();
    for name in names {
        let text = log(dir, name.trim_end_matches(".log"));
        let lines: Vec<_> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        eprintln!("--- {name}\n{}", tail.join("\n"));
    }
}

fn log(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join("logs").join(format!("{name}.log"))).unwrap_or_default()
}

/// While it is held, no other cluster of this program chooses its ports: between the choice and the listening they are
/// nobody's.
pub fn starting() -> MutexGuard<'static, ()> {
    static STARTING: Mutex<()> = Mutex::new(());
    STARTING.lock().unwrap_or_else(PoisonError::into_inner)
}

static CLUSTERS: Mutex<usize> = Mutex::new(0);
static LEFT: Condvar = Condvar::new();

/// One of the few places for clusters, or all of them.
#[derive(Debug)]
pub(super) struct Place(usize);

impl Place {
    pub(super) fn take() -> Self {
        Self::take_some(1)
    }

    /// Nothing else runs meanwhile.
    pub(super) fn take_all() -> Self {
        Self::take_some(CLUSTERS_MAX)
    }

    fn take_some(wanted: usize) -> Self {
        let clusters = CLUSTERS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut clusters = LEFT
            .wait_while(clusters, |clusters| CLUSTERS_MAX < *clusters + wanted)
            .unwrap_or_else(PoisonError::into_inner);
        *clusters += wanted;
        Self(wanted)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *CLUSTERS.lock().unwrap_or_else(PoisonError::into_inner) -= self.0;
        LEFT.notify_all();
    }
}
