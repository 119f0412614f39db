//! Which processes a cluster on this machine has, where each listens, and what its config says.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use domain::{Phase, Role};
use toml::{Table, Value};

use super::home::Home;
use super::server::ServerStore;
use crate::exit::Failure;

const SHARDS: i64 = 12;

/// One process to be.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) role: Role,
    pub(crate) name: String,
    /// Where its health and metrics are.
    pub(crate) admin: SocketAddr,
    pub(crate) config: String,
}

/// All of them, in the order in which they are named to people.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Of every control replica, the one that was asked for first.
    pub(crate) apis: Vec<SocketAddr>,
    pub(crate) processes: Vec<Process>,
    /// Nobody else takes the ports while this holds them: to be let go just before the processes start.
    held: Vec<TcpListener>,
}

/// Where everything listens.
struct Ports {
    held: Vec<TcpListener>,
    store: SocketAddr,
    controls: Vec<ControlPorts>,
    nodes: Vec<SocketAddr>,
    admin: Vec<SocketAddr>,
}

/// Where one control replica listens.
struct ControlPorts {
    api: SocketAddr,
    cluster: SocketAddr,
    beat: SocketAddr,
}

impl Plan {
    /// Without a `server` there is a store process.
    pub(crate) fn make(
        home: &Home,
        nodes: u16,
        controls: u16,
        api: SocketAddr,
        server: Option<&ServerStore>,
    ) -> Result<Self, Failure> {
        let ports = Ports::take(nodes, controls, api)?;
        let mut admin = ports.admin.iter().copied();
        let mut processes = Vec::new();
        let mut add = |role: Role, name: String, config: Table| {
            let admin = admin.next().expect("a port was taken for every process");
            let config = finish(home, role, &name, admin, config);
            processes.push(Process { role, name, admin, config });
        };
        let ours = || rows([("address", text(ports.store))]);
        let (for_control, for_node) = match server {
            Some(server) => (server.for_control(), server.for_node()),
            None => {
                add(Role::Store, "store-1".to_owned(), store(home, &ports));
                (ours(), ours())
            }
        };
        for index in 0..ports.controls.len() {
            let name = format!("control-{}", index + 1);
            add(Role::Control, name, control(home, &ports, index, for_control.clone()));
        }
        for index in 0..usize::from(nodes) {
            let name = format!("node-{}", index + 1);
            add(Role::Node, name, node(home, &ports, index, for_node.clone()));
        }
        let apis = ports.controls.iter().map(|control| control.api).collect();
        Ok(Self { apis, processes, held: ports.held })
    }

    /// The processes may listen now.
    pub(crate) fn let_ports_go(&mut self) {
        self.held.clear();
    }

    /// All API addresses as clients take them.
    pub(crate) fn api(&self) -> String {
        let apis: Vec<_> = self.apis.iter().map(ToString::to_string).collect();
        apis.join(",")
    }
}

impl Ports {
    /// All are held at once, so that no two are the same.
    fn take(nodes: u16, controls: u16, api: SocketAddr) -> Result<Self, Failure> {
        let mut held = Vec::new();
        let mut take = |addr: SocketAddr| -> std::io::Result<SocketAddr> {
            let listener = TcpListener::bind(addr)?;
            let addr = listener.local_addr()?;
            held.push(listener);
            Ok(addr)
        };
        let refused = |error| cannot_listen(api, error);
        let mut given = if api.port() == 0 { None } else { Some(take(api).map_err(refused)?) };
        let mut next = rand::random_range(PORTS);
        let mut any = || {
            for _ in PORTS {
                next = if next + 1 < PORTS.end { next + 1 } else { PORTS.start };
                if let Ok(addr) = take(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), next)) {
                    return Ok(addr);
                }
            }
            Err(Failure::other(format!("none of the ports {PORTS:?} of 127.0.0.1 is free")))
        };
        let mut replicas = Vec::new();
        for _ in 0..controls {
            let api = given.take().map_or_else(&mut any, Ok)?;
            replicas.push(ControlPorts { api, cluster: any()?, beat: any()? });
        }
        let store = any()?;
        let nodes = (0..nodes).map(|_| any()).collect::<Result<Vec<_>, _>>()?;
        let admin = (0..nodes.len() + usize::from(controls) + 1).map(|_| any());
        let admin = admin.collect::<Result<_, _>>()?;
        Ok(Self { held, store, controls: replicas, nodes, admin })
    }
}

/// Below the ports that systems give to outgoing connections: one of those could be taken between our choice and the
/// child's listening.
const PORTS: std::ops::Range<u16> = 18_000..32_000;

/// Whether the API can listen there, before anything is written.
pub(crate) fn check_api(api: SocketAddr) -> Result<(), Failure> {
    TcpListener::bind(api).map(drop).map_err(|error| cannot_listen(api, error))
}

fn cannot_listen(api: SocketAddr, error: std::io::Error) -> Failure {
    Failure::other(format!("cannot listen on {api}"))
        .why(error)
        .remedy("stop whoever listens there, or choose another address with --api")
}

/// What every config has.
fn finish(home: &Home, role: Role, name: &str, admin: SocketAddr, mut config: Table) -> String {
    let (certificate, key) = home.certificate(name);
    let ca = home.path("ca").join("ca.crt");
    // A store is named by its certificate alone.
    if role != Role::Store {
        config.insert("name".to_owned(), text(name));
    }
    config.insert(
        "net".to_owned(),
        table([
            ("certificate", text(certificate.display())),
            ("key", text(key.display())),
            ("ca", text(ca.display())),
        ]),
    );
    config.insert("telemetry".to_owned(), table([("admin", text(admin))]));
    config.to_string()
}

fn store(home: &Home, ports: &Ports) -> Table {
    rows([("listen", text(ports.store)), ("data_dir", text(home.path("store").display()))])
}

fn control(home: &Home, ports: &Ports, index: usize, store: Table) -> Table {
    let ControlPorts { api, cluster: link, beat } = &ports.controls[index];
    let nodes = i64::try_from(ports.nodes.len()).expect("16 at most");
    rows([
        ("controls", controls(ports)),
        ("api", table([("listen", text(api))])),
        ("cluster", cluster(home, *link)),
        ("beat", table([("listen", text(beat)), ("advertise", text(beat))])),
        ("stores", table([("main", Value::Table(store))])),
        (
            "scheduler",
            table([("shards", Value::Integer(SHARDS)), ("nodes_expected", Value::Integer(nodes))]),
        ),
    ])
}

fn node(home: &Home, ports: &Ports, index: usize, store: Table) -> Table {
    let offered = offered(index, ports.nodes.len());
    let offered = offered.into_iter().map(|phase| text(phase.as_str())).collect();
    rows([
        ("zone", text("local")),
        ("controls", controls(ports)),
        ("cluster", cluster(home, ports.nodes[index])),
        ("stores", table([("main", Value::Table(store))])),
        ("phases", table([("offer", Value::Array(offered)), ("modality", text("text"))])),
    ])
}

/// With 3 to 6 nodes each phase is left out by one, so that every work crosses nodes, and every phase is offered while
/// any two live. Fewer nodes must offer all; of more nodes all can.
fn offered(index: usize, nodes: usize) -> Vec<Phase> {
    let left_out = (3..=Phase::ALL.len()).contains(&nodes);
    let leaves = |phase: usize| left_out && phase % nodes == index;
    let phases = Phase::ALL.into_iter().enumerate();
    phases.filter(|(number, _)| !leaves(*number)).map(|(_, phase)| phase).collect()
}

/// All control replicas, as every process is told of them.
fn controls(ports: &Ports) -> Value {
    let named = ports.controls.iter().enumerate();
    let named =
        named.map(|(index, control)| text(format!("control-{}={}", index + 1, control.cluster)));
    Value::Array(named.collect())
}

fn cluster(home: &Home, addr: SocketAddr) -> Value {
    let cookie = home.path("cookie");
    table([("listen", text(addr)), ("advertise", text(addr)), ("cookie", text(cookie.display()))])
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

#[cfg(test)]
mod tests {
    use super::*;

    fn left_out(index: usize, nodes: usize) -> Vec<&'static str> {
        let offered = offered(index, nodes);
        let phases = Phase::ALL.into_iter().filter(|phase| !offered.contains(phase));
        phases.map(Phase::as_str).collect()
    }

    #[test]
    fn each_phase_is_left_out_by_the_node_of_its_number() {
        assert_eq!(left_out(0, 3), ["action", "observation"]);
        assert_eq!(left_out(1, 3), ["experience", "understanding"]);
        assert_eq!(left_out(2, 3), ["intention", "yield"]);
        assert_eq!(left_out(0, 4), ["action", "understanding"]);
        assert_eq!(left_out(3, 4), ["observation"]);
        assert_eq!(left_out(5, 6), ["yield"]);
    }

    #[test]
    fn few_or_many_nodes_offer_everything() {
        for nodes in [1, 2, 7, 16] {
            assert!((0..nodes).all(|index| left_out(index, nodes).is_empty()), "{nodes} nodes");
        }
    }

    #[test]
    fn every_phase_is_offered_while_two_nodes_live() {
        for nodes in 2..=16 {
            for (one, other) in (0..nodes).flat_map(|one| (0..one).map(move |other| (one, other))) {
                let lives = |phase: Phase| {
                    offered(one, nodes).contains(&phase) || offered(other, nodes).contains(&phase)
                };
                assert!(Phase::ALL.into_iter().all(lives), "{one} and {other} of {nodes}");
            }
        }
    }

    #[test]
    fn all_processes_listen_on_loopback_and_no_two_on_one_port() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(dir.path()).unwrap();
        let plan = Plan::make(&home, 3, 2, "127.0.0.1:0".parse().unwrap(), None).unwrap();
        let names: Vec<_> = plan.processes.iter().map(|process| process.name.as_str()).collect();
        assert_eq!(names, ["store-1", "control-1", "control-2", "node-1", "node-2", "node-3"]);
        let mut addresses = Vec::new();
        for process in &plan.processes {
            let config: Table = process.config.parse().unwrap();
            let part = |name: &str| config.get(name).and_then(Value::as_table);
            let listens = [Some(&config), part("api"), part("cluster"), part("beat")];
            let listens = listens.into_iter().flatten().filter_map(|part| part.get("listen"));
            addresses.extend(listens.map(|listen| listen.as_str().unwrap().to_owned()));
            addresses.push(process.admin.to_string());
        }
        assert!(addresses.iter().all(|address| address.starts_with("127.0.0.1:")));
        let count = addresses.len();
        addresses.sort();
        addresses.dedup();
        assert_eq!((addresses.len(), count), (16, 16));
    }

    #[test]
    fn a_port_in_use_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(dir.path()).unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = taken.local_addr().unwrap();
        let failure = Plan::make(&home, 3, 1, addr, None).unwrap_err();
        let text = failure.to_string();
        assert!(text.contains(&addr.to_string()) && text.contains("--api"), "{text}");
    }
}
