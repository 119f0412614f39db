//! Which faults there are, and the schedule of them: a pause, a fault, and after a while its end.
//!
//! At least two nodes are well at any time, and everything that was taken away comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;

use crate::harness::{Fault, Mesh, Port, Sqld};

const STORE: &str = "store-1";
const WELL_MIN: usize = 2;
/// Between two faults, milliseconds.
const PAUSE_MS: std::ops::Range<u64> = 100..2_000;
/// How long a fault lasts, milliseconds.
const LASTS_MS: std::ops::Range<u64> = 200..5_000;
/// After the last fault, until all nodes are alive and all shards open.
const WHOLE_MAX: Duration = Duration::from_secs(60);
const LATE: Duration = Duration::from_millis(200);

/// Something that can be done to a process or to a link of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kill,
    Stop,
    /// It is told to end, and has to end well.
    Leave,
    /// All links of it.
    Isolate(&'static str, Fault),
    /// One of its links.
    Link(&'static str, Fault),
    /// One of its links is reset, once.
    Reset,
}

const KINDS: [Kind; 13] = [
    Kind::Kill,
    Kind::Kill,
    Kind::Stop,
    Kind::Stop,
    Kind::Leave,
    Kind::Isolate("half-open", Fault::HALF_OPEN),
    Kind::Isolate("cut", Fault::CUT),
    Kind::Link("half-open", Fault::HALF_OPEN),
    Kind::Link("cut", Fault::CUT),
    Kind::Link("deaf up", Fault::DEAF_UP),
    Kind::Link("deaf down", Fault::DEAF_DOWN),
    Kind::Link("late", Fault::late(LATE, LATE)),
    Kind::Reset,
];

/// What no run is without, whatever else chance brings: of these roles one each, of control the leader. Where nodes are spared, a
/// second one is stopped instead of killed.
const ALWAYS: [(Kind, &str); 5] = [
    (Kind::Kill, "node"),
    (Kind::Kill, "control"),
    (Kind::Kill, "store"),
    (Kind::Stop, "node"),
    (Kind::Isolate("cut", Fault::CUT), "node"),
];

impl Kind {
    fn name(self) -> String {
        match self {
            Self::Kill => "kill".to_owned(),
            Self::Stop => "stop".to_owned(),
            Self::Leave => "leave".to_owned(),
            Self::Isolate(name, _) => format!("isolate {name}"),
            Self::Link(name, _) => format!("link {name}"),
            Self::Reset => "link reset".to_owned(),
        }
    }
}

/// A fault that lasts.
struct Lasting {
    until: Instant,
    process: String,
    kind: Kind,
    link: Option<(String, Port)>,
}

/// A process may be told to end before it listens for that.
const YOUNG: Duration = Duration::from_secs(5);

pub(super) struct Chaos {
    random: StdRng,
    only: Vec<String>,
    /// Nodes are not killed, nor told to leave.
    spares: bool,
    /// Of what always happens, what has not yet.
    always: Vec<(Kind, &'static str)>,
    began: Instant,
    lasting: Vec<Lasting>,
    /// Who was told to end and has not yet.
    leaving: BTreeSet<String>,
    /// When whom was started again last.
    started: BTreeMap<String, Instant>,
    happened: BTreeMap<String, u64>,
    exits: Vec<String>,
    timeline: Vec<String>,
    nodes: Vec<String>,
    processes: Vec<String>,
    /// In place of a store process.
    sqld: Option<Sqld>,
    /// What was missing in the end.
    broken: Option<String>,
}

impl Chaos {
    pub(super) fn new(seed: u64, only: Vec<String>, mesh: &Mesh, sqld: Option<Sqld>) -> Self {
        let mut processes = mesh.names();
        if sqld.is_some() {
            processes.push(STORE.to_owned());
        }
        let mut random = StdRng::seed_from_u64(seed);
        let mut always = if only.is_empty() { ALWAYS.to_vec() } else { Vec::new() };
        always.shuffle(&mut random);
        Self {
            random,
            // With every other seed what nodes count is lost with them, and with the others they are only stopped and cut off.
            spares: seed.is_multiple_of(2),
            always,
            only,
            began: Instant::now(),
            lasting: Vec::new(),
            leaving: BTreeSet::new(),
            started: BTreeMap::new(),
            happened: BTreeMap::new(),
            exits: Vec::new(),
            timeline: Vec::new(),
            nodes: mesh.nodes(),
            processes,
            sqld,
            broken: None,
        }
    }

    pub(super) fn happened(&self) -> BTreeMap<String, u64> {
        self.happened.clone()
    }

    pub(super) fn exits(&self) -> Vec<String> {
        self.exits.clone()
    }

    /// Whether no node was started again, so that the calls that they counted are all.
    pub(super) fn spared_nodes(&self) -> bool {
        let is_over = |name: &&str| self.happened.contains_key(*name);
        !["kill of node", "leave of node"].iter().any(is_over) && self.exits.is_empty()
    }

    /// What becomes of a fault in a run that spares nodes.
    fn spared(&self, kind: Kind, process: &str) -> Kind {
        let ends = matches!(kind, Kind::Kill | Kind::Leave);
        if self.spares && ends && role_of(process) == "node" { Kind::Stop } else { kind }
    }

    pub(super) fn broken(&self) -> Option<String> {
        self.broken.clone()
    }

    pub(super) fn timeline(&self) -> Vec<String> {
        self.timeline.clone()
    }

    /// Lets faults happen for so long, then ends all of them and waits until the cluster is whole.
    pub(super) fn run(&mut self, mesh: &mut Mesh, time: Duration) {
        self.began = Instant::now();
        let end = self.began + time;
        let mut next = self.began + self.millis(PAUSE_MS);
        while Instant::now() < end {
            let due = self.lasting.iter().map(|lasting| lasting.until).min();
            let at = due.map_or(next, |due| due.min(next)).min(end);
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            self.end_due(mesh, Instant::now());
            self.revive(mesh);
            if next <= Instant::now() {
                self.begin_one(mesh);
                next = Instant::now() + self.millis(PAUSE_MS);
            }
        }
        for lasting in std::mem::take(&mut self.lasting) {
            self.end(mesh, &lasting);
        }
        mesh.heal();
        self.note("all is healed".to_owned());
        self.wait(mesh);
    }

    /// Until the cluster is whole, for a while. Whether it is shows in the end.
    fn wait(&mut self, mesh: &mut Mesh) {
        let began = Instant::now();
        loop {
            self.revive(mesh);
            match mesh.check_ready() {
                Ok(()) if self.leaving.is_empty() => {
                    return self.note("all is ready".to_owned());
                }
                Ok(()) if WHOLE_MAX < began.elapsed() => {
                    return self.broken = Some(format!("{:?} have not left", self.leaving));
                }
                Ok(()) => std::thread::sleep(Duration::from_millis(50)),
                Err(missing) if WHOLE_MAX < began.elapsed() => {
                    self.note(format!("not ready: {missing}"));
                    return self.broken = Some(missing);
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.random.random_range(range))
    }

    fn note(&mut self, what: String) {
        let line = format!("{:8.3} {what}", self.began.elapsed().as_secs_f64());
        eprintln!("{line}");
        self.timeline.push(line);
    }

    /// Whoever ended by itself is started again, as a supervisor would.
    fn revive(&mut self, mesh: &mut Mesh) {
        for name in mesh.dead() {
            let status = mesh.wait_until_over(&name);
            // Who is told to leave before it listens for that just ends.
            let is_young = self.started.get(&name).is_some_and(|at| at.elapsed() < YOUNG);
            let is_told = is_young && status.signal() == Some(Signal::TERM.as_raw());
            if self.leaving.remove(&name) && (status.success() || is_told) {
                self.note(format!("{name} has left"));
            } else {
                self.note(format!("{name} ended by itself: {status}"));
                self.exits.push(format!("{name}: {status}"));
            }
            self.start_again(mesh, &name);
        }
    }

    fn start_again(&mut self, mesh: &mut Mesh, name: &str) {
        mesh.start_again(name);
        self.started.insert(name.to_owned(), Instant::now());
    }

    fn begin_one(&mut self, mesh: &mut Mesh) {
        let mut kind = *KINDS.choose(&mut self.random).expect("there are some");
        // Which of them is chosen must not depend on what lasts just now, or a seed would say little.
        let mut process = self.processes.choose(&mut self.random).expect("there are some").clone();
        let links = links_of(&process, &self.processes);
        let link = links.choose(&mut self.random).cloned();
        let lasts = self.millis(LASTS_MS);
        if let Some((always, role)) = self.always.last().copied() {
            let found = self.one_of(role, mesh).filter(|found| self.may(found));
            let Some(found) = found else { return };
            (kind, process) = (always, found);
            self.always.pop();
        }
        kind = self.spared(kind, &process);
        let name = format!("{} of {}", kind.name(), role_of(&process));
        let is_wanted = self.only.is_empty() || self.only.iter().any(|only| name.contains(only));
        let is_of_link = matches!(kind, Kind::Link(..) | Kind::Reset);
        // A foreign server is not told to leave.
        let is_foreign = self.sqld.is_some() && process == STORE && kind == Kind::Leave;
        if !is_wanted || is_foreign || !self.may(&process) || (is_of_link && link.is_none()) {
            return;
        }
        let link = link.filter(|_| is_of_link);
        let shown = link.as_ref().map(|(to, port)| format!(" to {to} {port:?}"));
        self.note(format!("{} {process}{}", kind.name(), shown.unwrap_or_default()));
        *self.happened.entry(name).or_default() += 1;
        let lasting = Lasting { until: Instant::now() + lasts, process, kind, link };
        self.begin(mesh, &lasting);
        match kind {
            Kind::Reset => {}
            // It ends when it has handed everything over, and is started again then.
            Kind::Leave => _ = self.leaving.insert(lasting.process),
            Kind::Kill | Kind::Stop | Kind::Isolate(..) | Kind::Link(..) => {
                self.lasting.push(lasting);
            }
        }
    }

    /// A process of this role; of control the one that leads.
    fn one_of(&self, role: &str, mesh: &Mesh) -> Option<String> {
        if role == "control" {
            let leader = mesh.status().ok()?.leader?.name;
            return Some(leader).filter(|name| !name.is_empty());
        }
        // The first that is well: who it is does not matter, and is not drawn.
        let mut of_role = self.processes.iter().filter(|process| role_of(process) == role);
        of_role.find(|process| self.may(process)).cloned()
    }

    /// Whether everything has happened that always has to.
    pub(super) fn had_all(&self) -> bool {
        self.always.is_empty()
    }

    /// One fault of a process at a time, and enough nodes that have none.
    fn may(&self, process: &str) -> bool {
        let lasting = self.lasting.iter().map(|it| &it.process);
        let ill: BTreeSet<_> = lasting.chain(&self.leaving).map(String::as_str).collect();
        let ill_nodes = self.nodes.iter().filter(|node| ill.contains(node.as_str())).count();
        let is_node = self.nodes.iter().any(|node| node == process);
        !ill.contains(process) && (!is_node || ill_nodes + WELL_MIN < self.nodes.len())
    }

    fn begin(&mut self, mesh: &mut Mesh, lasting: &Lasting) {
        let process = &lasting.process;
        if let Some(sqld) = self.sqld.as_mut().filter(|_| process == STORE) {
            match lasting.kind {
                Kind::Kill => return sqld.kill(),
                Kind::Stop => return sqld.signal(Signal::STOP),
                Kind::Leave | Kind::Isolate(..) | Kind::Link(..) | Kind::Reset => {}
            }
        }
        match (lasting.kind, &lasting.link) {
            (Kind::Kill, _) => mesh.kill(process),
            (Kind::Stop, _) => mesh.signal(process, Signal::STOP),
            (Kind::Leave, _) => mesh.signal(process, Signal::TERM),
            (Kind::Isolate(_, fault), _) => mesh.isolate(process, fault),
            (Kind::Link(_, fault), Some((to, port))) => mesh.fault(process, to, *port, fault),
            (Kind::Reset, Some((to, port))) => mesh.reset(process, to, *port),
            (Kind::Link(..) | Kind::Reset, None) => {}
        }
    }

    fn end_due(&mut self, mesh: &mut Mesh, now: Instant) {
        let lasting = std::mem::take(&mut self.lasting);
        let (over, lasting) = lasting.into_iter().partition(|lasting| lasting.until <= now);
        self.lasting = lasting;
        let over: Vec<Lasting> = over;
        over.iter().for_each(|lasting| self.end(mesh, lasting));
    }

    fn end(&mut self, mesh: &mut Mesh, lasting: &Lasting) {
        let process = &lasting.process;
        self.note(format!("end of {} {process}", lasting.kind.name()));
        if let Some(sqld) = self.sqld.as_mut().filter(|_| process == STORE) {
            match lasting.kind {
                Kind::Kill => return sqld.start_again(),
                Kind::Stop => return sqld.signal(Signal::CONT),
                Kind::Leave | Kind::Isolate(..) | Kind::Link(..) | Kind::Reset => {}
            }
        }
        match (lasting.kind, &lasting.link) {
            (Kind::Kill, _) => self.start_again(mesh, process),
            (Kind::Stop, _) => mesh.signal(process, Signal::CONT),
            (Kind::Isolate(..), _) => mesh.isolate(process, Fault::NONE),
            (Kind::Link(..), Some((to, port))) => mesh.fault(process, to, *port, Fault::NONE),
            (Kind::Link(..) | Kind::Leave | Kind::Reset, _) => {}
        }
    }
}

fn role_of(process: &str) -> &str {
    process.split_once('-').map_or(process, |(role, _)| role)
}

/// Where a process dials.
fn links_of(process: &str, all: &[String]) -> Vec<(String, Port)> {
    let others = all.iter().filter(|other| *other != process);
    let links = others.flat_map(|other| {
        let ports: &[Port] = match (role_of(process), role_of(other)) {
            ("node" | "control", "store") | ("node" | "control", "node") => &[Port::Main],
            ("node", "control") => &[Port::Main, Port::Beat],
            ("control", "control") => &[Port::Main],
            _ => &[],
        };
        ports.iter().map(|port| (other.clone(), *port))
    });
    links.collect()
}
