//! Clusters of real processes for tests: real sockets, certificates, files and signals.
//!
//! Everything is bounded in time, and a dropped harness has ended its processes and removed its files. Panics instead
//! of returning errors: who uses it is a test.

mod child;
mod dev;
pub mod history;
mod metrics;
mod node;
mod program;
mod text;
mod wait;

pub use child::{Child, pids_with_mark};
pub use dev::{Dev, Options};
pub use metrics::Metrics;
pub use node::{Node, NodeOptions};
pub use program::{Output, Program};
pub use text::Planted;
pub use wait::{eventually, eventually_true};

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

/// How long anything may take that normally takes no time, on a machine that does much else.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// An address that nobody listens on.
///
/// # Panics
/// There is none.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("a bound address")
}
