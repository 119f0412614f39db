//! A cluster whose processes have a network of their own each, with a cable to one switch: what is unplugged falls silent,
//! as a machine does whose network died.
//!
//! Namespaces of the kernel, made without any right: where it does not let this user make them, that is said, and nothing is
//! tested. Nothing of the machine's own network is touched.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::config::{Plan, Process};
use super::{MeshOptions, READY_MAX, socket};
use crate::harness::dev::Place;
use crate::harness::{Child, Output, PATIENCE, Program, eventually, eventually_true, skipped};

const SWITCH: &str = "switch";
const PORT_MIN: u16 = 20_000;
/// The switch has a place in the network, too: who calls from there is a client.
const CLIENTS: u8 = 254;

/// A running cluster.
pub struct Spaces {
    program: Program,
    // In the order in which they have to go.
    processes: BTreeMap<String, Child>,
    machines: BTreeMap<String, Space>,
    hub: Space,
    plan: Plan,
    dir: TempDir,
    _place: Place,
}

/// A network of its own, for as long as the process lives that holds it.
struct Space(Child);

impl Space {
    /// The first one, in which all others are made.
    fn hub() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "cat"]);
        Self::held(&mut command)
    }

    /// Another, that this one has the rights over.
    fn inner(&self) -> Self {
        let mut command = self.command("unshare");
        command.args(["--net", "cat"]);
        Self::held(&mut command)
    }

    fn held(command: &mut Command) -> Self {
        let holder = Child::spawn("holder", command);
        let name = PathBuf::from("/proc").join(holder.pid().to_string()).join("comm");
        eventually_true(PATIENCE, "the namespace is there", || {
            fs::read_to_string(&name).is_ok_and(|name| name.trim() == "cat")
        });
        Self(holder)
    }

    fn pid(&self) -> String {
        self.0.pid().to_string()
    }

    /// A program that runs in here.
    fn command(&self, program: &str) -> Command {
        let mut command = self.runner();
        command.arg(program);
        command
    }

    /// What runs in here what its next argument names.
    fn runner(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid(), "--user", "--preserve-credentials", "--net", "--"]);
        command
    }

    fn ip(&self, words: &str) {
        let output = Output::of(self.command("ip").args(words.split(' ')));
        assert_eq!(output.code, Some(0), "ip {words}: {output}");
    }

    fn plug_in(&self, address: Ipv4Addr, device: &str) {
        self.ip(&format!("address add {address}/24 dev {device}"));
        self.ip(&format!("link set {device} up"));
        self.ip("link set lo up");
    }
}

/// Why this machine can have no networks of its own, if so.
fn missing() -> Option<String> {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "ip", "link", "add", "v", "type", "veth"]);
    match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Some(format!("unshare: {error}")),
    }
}

impl Spaces {
    /// Returns when the cluster is whole. None where there can be no such networks, which is said loudly.
    ///
    /// # Panics
    /// It does not come to that.
    pub fn start(program: Program, options: &MeshOptions) -> Option<Self> {
        if let Some(why) = missing() {
            skipped(&format!("=== SKIPPED: there are no network namespaces here: {why} ==="));
            return None;
        }
        let place = Place::take();
        let dir = tempfile::Builder::new().prefix("stagedoor-spaces-").tempdir().expect("a folder");
        let mut port = PORT_MIN;
        let plan = Plan::write(dir.path(), options, move |name| {
            port += 1;
            (socket(address(host(name)), port), socket(address(host(name)), port))
        });
        let hub = Space::hub();
        hub.ip(&format!("link add {SWITCH} type bridge"));
        hub.plug_in(address(CLIENTS), SWITCH);
        let (processes, machines) = (BTreeMap::new(), BTreeMap::new());
        let mut spaces = Self { program, processes, machines, hub, plan, dir, _place: place };
        for name in spaces.names() {
            spaces.cable(&name);
            spaces.run(&name, options);
        }
        spaces.wait_until_whole(options);
        Some(spaces)
    }

    fn names(&self) -> Vec<String> {
        self.plan.processes.iter().map(|process| process.name.clone()).collect()
    }

    /// Gives a process a machine with a cable to the switch.
    fn cable(&mut self, name: &str) {
        let machine = self.hub.inner();
        let cable = cable_of(name);
        self.hub.ip(&format!("link add {cable} type veth peer name eth0 netns {}", machine.pid()));
        machine.plug_in(address(host(name)), "eth0");
        self.hub.ip(&format!("link set {cable} up"));
        self.machines.insert(name.to_owned(), machine);
        self.plug(name);
    }

    fn run(&mut self, name: &str, options: &MeshOptions) {
        let is_it = |process: &&Process| process.name == name;
        let process = self.plan.processes.iter().find(is_it).expect("it is planned");
        let mut command = self.program.command_of(self.machines[name].runner());
        command.arg(process.role.as_str()).arg("--config").arg(&process.config);
        command.arg("--stdin-guard");
        command.envs(options.env.iter().map(|(name, value)| (name, value)));
        let log = self.dir.path().join("logs").join(format!("{name}.log"));
        let child = Child::spawn_logging(name, &mut command, &log);
        self.processes.insert(name.to_owned(), child);
    }

    /// Its cable is in the switch.
    pub fn plug(&self, name: &str) {
        self.hub.ip(&format!("link set {} master {SWITCH}", cable_of(name)));
    }

    /// Whatever it says, and whatever it is told, gets nowhere.
    pub fn unplug(&self, name: &str) {
        self.hub.ip(&format!("link set {} nomaster", cable_of(name)));
    }

    /// Runs a client command at the switch, with JSON as output.
    pub fn client(&self, args: &[&str]) -> Output {
        Output::of(&mut self.client_command(args))
    }

    /// The same, without waiting for its end.
    pub fn start_client(&self, args: &[&str]) -> Child {
        Child::spawn("client", &mut self.client_command(args))
    }

    fn client_command(&self, args: &[&str]) -> Command {
        let mut command = self.program.command_of(self.hub.runner());
        command.args(args).args(["--output", "json", "--credentials"]).arg(&self.plan.credentials);
        command
    }

    fn wait_until_whole(&self, options: &MeshOptions) {
        eventually(READY_MAX, "all nodes are alive and all shards open", || {
            let status = self.client(&["status"]);
            let text = status.stdout.join("");
            let (alive, open) =
                (text.matches("\"alive\"").count(), text.matches("\"open\"").count());
            let is_whole = alive == options.nodes && open == options.shards;
            if is_whole { Ok(()) } else { Err(format!("{alive} and {open}: {status}")) }
        });
    }

    /// For the files of the test itself; removed with the cluster.
    pub fn scratch(&self) -> &std::path::Path {
        self.dir.path()
    }
}

impl Drop for Spaces {
    fn drop(&mut self) {
        // In the order in which they need each other: the store goes last.
        for name in self.names().into_iter().rev() {
            self.processes.remove(&name);
        }
    }
}

/// The number of a process in the network.
fn host(name: &str) -> u8 {
    let (role, number) = name.rsplit_once('-').expect("a role and a number");
    let base = match role {
        "store" => 0,
        "control" => 10,
        _ => 100,
    };
    base + number.parse::<u8>().expect("a small number")
}

fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, host)
}

fn cable_of(name: &str) -> String {
    format!("cable{}", host(name))
}
