//! What the processes of a mesh are told: real addresses to listen on, and those of proxies for everything else.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use domain::{Phase, Role};
use net::pki::{self, Ca, Validity};
use toml::{Table, Value};

use super::{MeshOptions, Port, own_address, socket};

const TRUST_DOMAIN: &str = "stagedoor.local";
const STORE: &str = "store-1";
/// Below the ports that outgoing connections have.
const PORT_MIN: u16 = 20_000;

/// One process to be.
pub(super) struct Process {
    pub(super) role: Role,
    pub(super) name: String,
    pub(super) config: PathBuf,
    pub(super) admin: SocketAddr,
}

/// All of them, and where each listens: really, and as shown to others.
pub(super) struct Plan {
    pub(super) processes: Vec<Process>,
    pub(super) listeners: BTreeMap<(String, Port), (SocketAddr, SocketAddr)>,
    pub(super) credentials: PathBuf,
}

/// The real address of the next listener of a process, and the one that is shown.
type Address = dyn FnMut(&str) -> (SocketAddr, SocketAddr);

impl Plan {
    /// `address` gives each listener of a process its real address and the one that is shown.
    pub(super) fn write(
        dir: &Path,
        options: &MeshOptions,
        address: impl FnMut(&str) -> (SocketAddr, SocketAddr) + 'static,
    ) -> Self {
        let controls = names("control", options.controls);
        let nodes = names("node", options.nodes);
        let mut ports = Ports { address: Box::new(address), taken: BTreeMap::new() };
        ports.add(STORE, Port::Main);
        if let Some(hrana) = &options.hrana {
            // It listens already.
            ports.set_real(STORE, Port::Main, hrana.http);
        }
        for name in &controls {
            for port in [Port::Main, Port::Beat, Port::Api] {
                ports.add(name, port);
            }
        }
        nodes.iter().for_each(|name| ports.add(name, Port::Main));
        let writer = Writer::new(dir, &ports, options, &controls);
        let mut processes = Vec::new();
        if options.hrana.is_none() {
            processes.push(writer.process(Role::Store, STORE, writer.store()));
        }
        for name in &controls {
            processes.push(writer.process(Role::Control, name, writer.control(name)));
        }
        for (index, name) in nodes.iter().enumerate() {
            processes.push(writer.process(Role::Node, name, writer.node(index, name)));
        }
        let credentials = writer.credentials();
        Self { processes, listeners: ports.taken, credentials }
    }
}

fn names(role: &str, count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("{role}-{number}")).collect()
}

struct Ports {
    address: Box<Address>,
    taken: BTreeMap<(String, Port), (SocketAddr, SocketAddr)>,
}

impl Ports {
    fn add(&mut self, name: &str, port: Port) {
        let addresses = (self.address)(name);
        self.taken.insert((name.to_owned(), port), addresses);
    }

    fn set_real(&mut self, name: &str, port: Port, real: SocketAddr) {
        if let Some(addresses) = self.taken.get_mut(&(name.to_owned(), port)) {
            addresses.0 = real;
        }
    }

    fn real(&self, name: &str, port: Port) -> Value {
        text(self.taken[&(name.to_owned(), port)].0)
    }

    fn shown(&self, name: &str, port: Port) -> String {
        self.taken[&(name.to_owned(), port)].1.to_string()
    }
}

/// A port of an address that is ours alone, given out once.
pub(super) fn free() -> SocketAddr {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(PORT_MIN);
    socket(own_address(), NEXT.fetch_add(1, Ordering::Relaxed))
}

struct Writer<'a> {
    dir: &'a Path,
    ports: &'a Ports,
    options: &'a MeshOptions,
    controls: &'a [String],
    ca: Ca,
}

impl<'a> Writer<'a> {
    fn new(
        dir: &'a Path,
        ports: &'a Ports,
        options: &'a MeshOptions,
        controls: &'a [String],
    ) -> Self {
        for folder in ["certs", "config", "logs", "store"] {
            fs::create_dir_all(dir.join(folder)).expect("a folder to write to");
        }
        fs::write(dir.join("cookie"), "the cookie of a mesh, for its tests\n").expect("a file");
        let trust_domain = TRUST_DOMAIN.parse().expect("a trust domain");
        let ca = pki::init(&dir.join("ca"), &trust_domain).expect("a CA");
        Self { dir, ports, options, controls, ca }
    }

    fn store(&self) -> Table {
        rows([("listen", self.ports.real(STORE, Port::Main)), ("data_dir", self.path("store"))])
    }

    fn control(&self, name: &str) -> Table {
        let count = |count: usize| Value::Integer(i64::try_from(count).expect("a few"));
        let scheduler =
            [("shards", count(self.options.shards)), ("nodes_expected", count(self.options.nodes))];
        let beat = [
            ("listen", self.ports.real(name, Port::Beat)),
            ("advertise", text(self.ports.shown(name, Port::Beat))),
        ];
        let mut config = rows([
            ("name", text(name)),
            ("api", table([("listen", self.ports.real(name, Port::Api))])),
            ("cluster", self.member(name)),
            ("beat", table(beat)),
            ("stores", self.stores()),
            ("scheduler", table(scheduler)),
        ]);
        if 1 < self.controls.len() {
            config.insert("controls".to_owned(), self.control_addresses());
        }
        config
    }

    fn node(&self, index: usize, name: &str) -> Table {
        let offer = offered(index, self.options.nodes).into_iter();
        let offer = offer.map(|phase| text(phase.as_str())).collect();
        rows([
            ("name", text(name)),
            ("zone", text("local")),
            ("controls", self.control_addresses()),
            ("cluster", self.member(name)),
            ("stores", self.stores()),
            ("phases", table([("offer", Value::Array(offer)), ("modality", text("text"))])),
        ])
    }

    fn control_addresses(&self) -> Value {
        let shown = |name: &String| text(format!("{name}={}", self.ports.shown(name, Port::Main)));
        Value::Array(self.controls.iter().map(shown).collect())
    }

    fn member(&self, name: &str) -> Value {
        table([
            ("listen", self.ports.real(name, Port::Main)),
            ("advertise", text(self.ports.shown(name, Port::Main))),
            ("cookie", self.path("cookie")),
        ])
    }

    fn stores(&self) -> Value {
        let shown = self.ports.shown(STORE, Port::Main);
        let Some(hrana) = &self.options.hrana else {
            return table([("main", table([("address", text(shown))]))]);
        };
        let main = [
            ("engine", text("hrana")),
            ("url", text(format!("http://{shown}"))),
            ("token_file", text(hrana.token_file.display())),
            ("admin_url", text(format!("http://{}", hrana.admin))),
            ("admin_token_file", text(hrana.admin_token_file.display())),
        ];
        table([("main", table(main))])
    }

    /// Issues its certificate and writes its config.
    fn process(&self, role: Role, name: &str, mut config: Table) -> Process {
        let id = format!("spiffe://{TRUST_DOMAIN}/{}/{name}", role.as_str());
        let id = id.parse().expect("a SPIFFE id");
        let issued = self.ca.issue(&id, Validity::default()).expect("a certificate");
        issued.write(&self.dir.join("certs"), name).expect("a folder to write to");
        let net = [
            ("certificate", self.path(&format!("certs/{name}.crt"))),
            ("key", self.path(&format!("certs/{name}.key"))),
            ("ca", self.path("ca/ca.crt")),
        ];
        config.insert("net".to_owned(), table(net));
        let admin = free();
        config.insert("telemetry".to_owned(), table([("admin", text(admin))]));
        let path = self.dir.join(format!("config/{name}.toml"));
        fs::write(&path, config.to_string()).expect("a folder to write to");
        Process { role, name: name.to_owned(), config: path, admin }
    }

    /// The folder of a client that knows all API servers.
    fn credentials(&self) -> PathBuf {
        let folder = self.dir.join("credentials");
        let id = format!("spiffe://{TRUST_DOMAIN}/client/tester").parse().expect("a SPIFFE id");
        let issued = self.ca.issue(&id, Validity::default()).expect("a certificate");
        issued.write(&folder, "client").expect("a folder to write to");
        let api = self.controls.iter().map(|name| self.ports.shown(name, Port::Api));
        let api: Vec<_> = api.collect();
        fs::write(folder.join("api"), api.join("\n")).expect("a folder to write to");
        fs::write(folder.join("ca.crt"), self.ca.certificate_pem()).expect("a folder to write to");
        folder
    }

    fn path(&self, name: &str) -> Value {
        text(self.dir.join(name).display())
    }
}

/// As in `dev`: each phase is left out by one node of few, so that works cross nodes and any two can do all.
fn offered(index: usize, nodes: usize) -> Vec<Phase> {
    let left_out = (3..=Phase::ALL.len()).contains(&nodes);
    let phases = Phase::ALL.into_iter().enumerate();
    let offered = phases.filter(|(phase, _)| !(left_out && phase % nodes == index));
    offered.map(|(_, phase)| phase).collect()
}

fn text(value: impl ToString) -> Value {
    Value::String(value.to_string())
}

fn table<const N: usize>(entries: [(&str, Value); N]) -> Value {
    Value::Table(rows(entries))
}

fn rows<const N: usize>(entries: [(&str, Value); N]) -> Table {
    entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
