//! Which of our processes has opened a connection, as the system knows it.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::harness::Origin;

/// The system writes its table in pieces; a row that moves between two of them is missed.
const LOOKS: usize = 20;

/// The names of the processes that run, by pid.
#[derive(Clone, Default)]
pub(super) struct Processes(Arc<Mutex<BTreeMap<u32, String>>>);

impl Processes {
    pub(super) fn learn(&self, pid: u32, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, name.to_owned());
    }

    pub(super) fn forget(&self, pid: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    }

    /// Names a connection after the process that has it, or `others`.
    pub(super) fn origin(&self, others: &'static str) -> Origin {
        let known = self.clone();
        Arc::new(move |peer| known.owner(peer).unwrap_or_else(|| others.to_owned()))
    }

    fn owner(&self, peer: SocketAddr) -> Option<String> {
        let socket = (0..LOOKS).find_map(|look| {
            if 0 < look {
                std::thread::sleep(Duration::from_millis(2));
            }
            let table = fs::read_to_string("/proc/net/tcp").ok()?;
            Some(format!("socket:[{}]", inode(&table, peer)?))
        })?;
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(pid, _)| has_open(**pid, &socket)).map(|(_, name)| name.clone())
    }
}

/// The inode of the socket whose own address this is, in a table like `/proc/net/tcp`.
fn inode(table: &str, addr: SocketAddr) -> Option<&str> {
    let IpAddr::V4(ip) = addr.ip() else { return None };
    let shown = format!("{:08X}:{:04X}", u32::from_le_bytes(ip.octets()), addr.port());
    let mut rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.find(|row| row.get(1) == Some(&shown.as_str())).and_then(|row| row.get(9).copied())
}

fn has_open(pid: u32, socket: &str) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.into_iter().any(|file| fs::read_link(file.path()).is_ok_and(|to| to == Path::new(socket)))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_connection_is_known_by_the_process_that_has_it() {
        let known = Processes::default();
        let origin = known.origin("others");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_far, peer) = listener.accept().unwrap();
        assert_eq!(origin(peer), "others");
        known.learn(std::process::id(), "me");
        assert_eq!(origin(peer), "me");
        known.forget(std::process::id());
        assert_eq!(origin(peer), "others");
        drop(stream);
    }
}
