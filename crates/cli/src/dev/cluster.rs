//! A cluster on this machine, from the first process to the last.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use client::{Client, Config, Timeouts};
use domain::Role;
use proto::v1::StatusResponse;
use serde::Serialize;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::children::{Children, Ended, Start};
use super::home::Home;
use super::plan::{Plan, Process, check_api};
use super::server::ServerStore;
use crate::exit::Failure;

const READY_MAX: Duration = Duration::from_secs(60);
const READY_CALL: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);
const STOP_MAX: Duration = Duration::from_secs(10);
const RESTART_PAUSE_MIN: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Who ran this long and dies is started again at once.
const RAN_WELL: Duration = Duration::from_secs(60);
/// The end of a log that may be long.
const LOG_BYTES_MAX: u64 = 16 * 1024;

pub(crate) struct Options {
    pub(crate) data_dir: PathBuf,
    pub(crate) nodes: u16,
    /// Control replicas.
    pub(crate) controls: u16,
    pub(crate) api: SocketAddr,
    /// Whether a process that died is started again.
    pub(crate) restart: bool,
    /// A database server that is there already; without it, a store process is started.
    pub(crate) store: Option<ServerStore>,
}

pub(crate) struct Cluster {
    home: Home,
    plan: Plan,
    nodes: usize,
    restart: bool,
    children: Children,
    /// By name: when it was started last, and how often it was restarted in a row.
    runs: BTreeMap<String, Run>,
    /// Who is to be started again, and when.
    due: Vec<(Instant, String)>,
}

#[derive(Clone, Copy)]
struct Run {
    since: Instant,
    restarts: u32,
}

/// What is said when the cluster can take work.
#[derive(Debug, Serialize)]
pub(crate) struct Announcement {
    pub(crate) ready: bool,
    pub(crate) api: String,
    pub(crate) credentials: String,
    pub(crate) processes: Vec<Member>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Member {
    pub(crate) role: &'static str,
    pub(crate) name: String,
    pub(crate) pid: u32,
}

/// The same for programs that also want the metrics: the file `processes.json`.
#[derive(Debug, Serialize)]
struct Known<'a> {
    role: &'static str,
    name: &'a str,
    pid: u32,
    admin: SocketAddr,
}

impl Cluster {
    /// Takes the data directory and starts every process in it.
    pub(crate) fn start(options: Options) -> Result<Self, Failure> {
        Home::check(&options.data_dir)?;
        check_api(options.api)?;
        let home = Home::open(&options.data_dir)?;
        let Options { nodes, controls, api, .. } = options;
        let plan = Plan::make(&home, nodes, controls, api, options.store.as_ref())?;
        home.certify(plan.processes.iter().map(|process| (process.role, process.name.as_str())))?;
        home.write_api(&plan.api())?;
        for process in &plan.processes {
            home.write_config(&process.name, &process.config)?;
        }
        let mut cluster = Self {
            home,
            plan,
            nodes: usize::from(options.nodes),
            restart: options.restart,
            children: Children::default(),
            runs: BTreeMap::new(),
            due: Vec::new(),
        };
        cluster.plan.let_ports_go();
        for index in 0..cluster.plan.processes.len() {
            cluster.start_process(index, 0)?;
        }
        cluster.write_processes()?;
        Ok(cluster)
    }

    /// Returns when the cluster can take work.
    pub(crate) async fn ready(&mut self) -> Result<(), Failure> {
        let nodes = self.nodes;
        // Every replica serves: whichever is asked, it has to know.
        let apis = self.plan.apis.iter().map(ToString::to_string);
        let clients: Vec<Client> =
            apis.map(|api| self.client_at(api, READY_CALL)).collect::<Result<_, _>>()?;
        let ready = async {
            for client in &clients {
                while !client.status().await.is_ok_and(|status| is_ready(&status, nodes)) {
                    sleep(POLL).await;
                }
            }
        };
        tokio::select! {
            ready = timeout(READY_MAX, ready) => ready.map_err(|_| {
                Failure::other(format!("the cluster was not ready within {} s", READY_MAX.as_secs()))
                    .remedy(format!("see why in {}", self.home.path("logs").display()))
            }),
            ended = self.children.next_end() => Err(self.failed_to_start(&ended)),
        }
    }

    /// A client of this cluster.
    pub(crate) fn client(&self, call: Duration) -> Result<Client, Failure> {
        self.client_at(self.plan.api(), call)
    }

    fn client_at(&self, api: String, call: Duration) -> Result<Client, Failure> {
        let timeouts = Timeouts { call, unreached: call, pause_max: POLL, ..Timeouts::default() };
        let api = client::addresses_of(&api);
        let credentials = self.home.credentials();
        Ok(Client::connect(&Config { api, credentials, timeouts })?)
    }

    pub(crate) fn announcement(&self) -> Announcement {
        let member = |process: &Process| {
            let pid = self.children.pid(&process.name)?;
            Some(Member { role: process.role.as_str(), name: process.name.clone(), pid })
        };
        Announcement {
            ready: true,
            api: self.plan.api(),
            credentials: self.home.credentials().display().to_string(),
            processes: self.plan.processes.iter().filter_map(member).collect(),
        }
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.home.path("logs")
    }

    /// Says who died, for ever; starts it again if that was asked for. May be dropped and called again.
    pub(crate) async fn watch(&mut self) {
        loop {
            let due = self.due.iter().map(|(at, _)| *at).min();
            let next_start = async {
                match due {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ended = self.children.next_end() => self.note(&ended),
                () = next_start => self.start_due(),
            }
        }
    }

    /// Ends every process, those first that need the others, and kills what does not end.
    pub(crate) async fn stop(mut self) {
        let deadline = Instant::now() + STOP_MAX;
        for role in [Role::Node, Role::Control, Role::Store] {
            let names = self.names_of(role);
            self.children.end(|name| names.iter().any(|known| known == name), deadline).await;
        }
        for name in self.children.kill().await {
            eprintln!("{name} did not end by itself and was killed");
        }
    }

    fn names_of(&self, role: Role) -> Vec<String> {
        let processes = self.plan.processes.iter().filter(|process| process.role == role);
        processes.map(|process| process.name.clone()).collect()
    }

    fn start_process(&mut self, index: usize, restarts: u32) -> Result<u32, Failure> {
        let process = &self.plan.processes[index];
        let program = std::env::current_exe()
            .map_err(|error| Failure::other("cannot find this program").why(error))?;
        let start = Start {
            name: process.name.clone(),
            program,
            args: vec![
                process.role.as_str().into(),
                "--config".into(),
                self.home.config(&process.name).into(),
                "--stdin-guard".into(),
            ],
            log: self.home.log(&process.name),
        };
        let run = Run { since: Instant::now(), restarts };
        self.runs.insert(process.name.clone(), run);
        self.children.start(&start)
    }

    fn note(&mut self, ended: &Ended) {
        eprintln!("{}", self.obituary(ended));
        if !self.restart || has_left(ended) {
            return;
        }
        let now = Instant::now();
        let run = self.runs.get_mut(&ended.name).expect("it was started");
        if RAN_WELL < now - run.since {
            run.restarts = 0;
        }
        let pause = RESTART_PAUSE_MIN * 2_u32.saturating_pow(run.restarts.min(16));
        self.due.push((now + pause.min(RESTART_PAUSE_MAX), ended.name.clone()));
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        let (due, later) = self.due.drain(..).partition(|(at, _)| *at <= now);
        self.due = later;
        let due: Vec<(Instant, String)> = due;
        for (_, name) in due {
            let restarts = self.runs.get(&name).map_or(0, |run| run.restarts) + 1;
            let index = self.plan.processes.iter().position(|process| process.name == name);
            let started = self.start_process(index.expect("it is planned"), restarts);
            match started.and_then(|pid| self.write_processes().map(|()| pid)) {
                Ok(pid) => eprintln!("{name} runs again (pid {pid})"),
                Err(failure) => failure.print(),
            }
        }
    }

    fn write_processes(&self) -> Result<(), Failure> {
        let known = self.plan.processes.iter().filter_map(|process| {
            let pid = self.children.pid(&process.name)?;
            let (role, name) = (process.role.as_str(), process.name.as_str());
            Some(Known { role, name, pid, admin: process.admin })
        });
        let text = serde_json::to_string(&known.collect::<Vec<_>>())
            .map_err(|error| Failure::other("cannot write JSON").why(error))?;
        self.home.write("processes.json", text.as_bytes())
    }

    fn obituary(&self, ended: &Ended) -> String {
        let status = match &ended.status {
            Some(status) => status.to_string(),
            None => "for a reason unknown".to_owned(),
        };
        let next = match self.restart {
            _ if has_left(ended) => "it was told to",
            true => "it is started again",
            false => "the others go on; `stagedoor dev --restart` would start it again",
        };
        format!("{} (pid {}) ended: {status}; {next}", ended.name, ended.pid)
    }

    fn failed_to_start(&self, ended: &Ended) -> Failure {
        let log = self.home.log(&ended.name);
        let status = ended.status.map(|status| status.to_string()).unwrap_or_default();
        let failure =
            Failure::other(format!("{} ended before the cluster was ready ({status})", ended.name));
        let failure = match last_line(&log) {
            Some(line) => failure.why(line.trim_start_matches("error: ")),
            None => failure,
        };
        failure.remedy(format!("see {}", log.display()))
    }
}

/// It was drained, or told to end: it did not die.
fn has_left(ended: &Ended) -> bool {
    ended.status.is_some_and(|status| status.success())
}

fn is_ready(status: &StatusResponse, nodes: usize) -> bool {
    let alive = status.nodes.iter().filter(|node| node.state == "alive").count();
    // A stopped one waits for its user, who needs the API to release it.
    let is_open =
        status.shards.iter().all(|shard| ["open", "stopped"].contains(&shard.state.as_str()));
    alive == nodes && is_open && !status.shards.is_empty()
}

fn last_line(path: &std::path::Path) -> Option<String> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LOG_BYTES_MAX))).ok()?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use proto::v1::{Node, Shard};

    use super::*;

    fn status(nodes: &[&str], shards: &[&str]) -> StatusResponse {
        let node = |state: &&str| Node { state: (*state).to_owned(), ..Node::default() };
        let shard = |state: &&str| Shard { state: (*state).to_owned(), ..Shard::default() };
        StatusResponse {
            nodes: nodes.iter().map(node).collect(),
            shards: shards.iter().map(shard).collect(),
            ..StatusResponse::default()
        }
    }

    #[test]
    fn an_api_address_that_is_taken_is_refused_before_anything_is_written() {
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("dev");
        let api = held.local_addr().unwrap();
        let options = Options {
            data_dir: data_dir.clone(),
            nodes: 1,
            controls: 1,
            api,
            restart: false,
            store: None,
        };
        let failure = Cluster::start(options).map(drop).unwrap_err();
        assert!(failure.to_string().contains(&api.to_string()), "{failure}");
        assert!(!data_dir.exists());
    }

    #[test]
    fn ready_means_all_nodes_alive_and_all_shards_open() {
        let check = |nodes: &[&str], shards: &[&str], ready: bool| {
            assert_eq!(is_ready(&status(nodes, shards), 2), ready, "{nodes:?} {shards:?}");
        };
        check(&["alive", "alive"], &["open", "open"], true);
        check(&["alive", "alive", "dead"], &["open", "open"], true);
        check(&["alive"], &["open", "open"], false);
        check(&["alive", "suspect"], &["open", "open"], false);
        check(&["alive", "alive"], &["open", "stopped"], true);
        check(&["alive", "alive"], &["open", "granted"], false);
        check(&["alive", "alive"], &[], false);
    }

    #[test]
    fn the_ready_line_has_the_shape_that_programs_read() {
        let announcement = Announcement {
            ready: true,
            api: "127.0.0.1:7700".to_owned(),
            credentials: "/d/credentials".to_owned(),
            processes: vec![Member { role: "store", name: "store-1".to_owned(), pid: 7 }],
        };
        assert_eq!(
            serde_json::to_string(&announcement).unwrap(),
            r#"{"ready":true,"api":"127.0.0.1:7700","credentials":"/d/credentials","processes":[{"role":"store","name":"store-1","pid":7}]}"#
        );
    }

    #[test]
    fn the_last_line_of_a_log_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-1.log");
        assert_eq!(last_line(&path), None);
        std::fs::write(&path, "first\nerror: why\n\n").unwrap();
        assert_eq!(last_line(&path).as_deref(), Some("error: why"));
    }
}
