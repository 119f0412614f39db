//! Clusters of real processes for tests: real sockets, certificates, files and signals.
//!
//! Everything is bounded in time, and a dropped harness has ended its processes and removed its files. Panics instead
//! of returning errors: who uses it is a test.

mod child;
mod clients;
mod dev;
mod fault;
pub mod history;
mod mesh;
mod metrics;
mod node;
mod program;
mod proxy;
mod pump;
mod raw;
mod record;
mod sqld;
mod text;
mod wait;

pub use child::{Child, pids_with_mark};
pub use clients::{Clients, Heard, Load};
pub use dev::{Dev, Options, starting};
pub use fault::{Door, Fault, Flow};
pub use mesh::{CLIENTS, Mesh, MeshOptions, Port, Spaces};
pub use metrics::Metrics;
pub use node::{Node, NodeOptions};
pub use program::{Output, Program};
pub use proxy::{Origin, Proxy};
pub use raw::Raw;
pub use sqld::{ADMIN_KEY, HranaTarget, Sqld};
pub use text::Planted;
pub use wait::{Lateness, eventually, eventually_true};

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// How long anything may take that normally takes no time, on a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// An address that nobody listens on, and that no outgoing connection takes meanwhile: those have higher ports.
///
/// # Panics
/// There is none.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Two test programs at once begin at different ports.
    let first = u16::try_from(std::process::id() % 300).expect("less than 300") * 10;
    let ports = (0..PORTS).map(|_| {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        PORT_MIN + first.wrapping_add(number) % PORTS
    });
    let mut addresses = ports.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    addresses.find(|address| TcpListener::bind(address).is_ok()).expect("a free port")
}

/// For the environment of a cluster whose first shards are placed when every node is there, however late one comes.
pub fn placed_at_once() -> (String, String) {
    ("STAGEDOOR_CONTROL__SCHEDULER__SETTLE_MS".to_owned(), "20000".to_owned())
}

/// Says that a test could not be run here, past the capture of what tests print that pass.
fn skipped(why: &str) {
    _ = writeln!(std::io::stderr(), "{why}");
}

/// Below those that `dev` takes, and those that systems give to whoever asks for any.
const PORT_MIN: u16 = 15_000;
const PORTS: u16 = 3_000;
