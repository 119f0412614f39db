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
    /// Learns the pid of a process that `start` makes. Nobody is named meanwhile, or the first that it opens would be a
    /// stranger's.
    pub(super) fn learn<C>(&self, name: &str, start: impl FnOnce() -> (u32, C)) -> C {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (pid, started) = start();
        known.insert(pid, name.to_owned());
        started
    }

    pub(super) fn forget(&self, pid: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid);
    }

    /// Names a connection after the process that has it, or `others`.
    pub(super) fn origin(&self, others: &'static str) -> Origin {
        let known = self.clone();
        Arc::new(move |peer, listen| known.owner(peer, listen).unwrap_or_else(|| others.to_owned()))
    }

    fn owner(&self, peer: SocketAddr, listen: SocketAddr) -> Option<String> {
        let socket = (0..LOOKS).find_map(|look| {
            if 0 < look {
                std::thread::sleep(Duration::from_millis(2));
            }
            let table = fs::read_to_string("/proc/net/tcp").ok()?;
            Some(format!("socket:[{}]", inode(&table, peer, listen)?))
        })?;
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(pid, _)| has_open(**pid, &socket)).map(|(_, name)| name.clone())
    }
}

/// The inode of the socket that connects these two, in a table like `/proc/net/tcp`. Its own address alone names none: the
/// system gives one port to several that go to different places, and what was closed is in the table for a minute.
fn inode(table: &str, own: SocketAddr, other: SocketAddr) -> Option<&str> {
    let (own, other) = (shown(own)?, shown(other)?);
    let mut rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row.get(1) == Some(&&*own) && row.get(2) == Some(&&*other))?;
    row.get(9).copied()
}

fn shown(addr: SocketAddr) -> Option<String> {
    let IpAddr::V4(ip) = addr.ip() else { return None };
    Some(format!("{:08X}:{:04X}", u32::from_le_bytes(ip.octets()), addr.port()))
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
        let listen = listener.local_addr().unwrap();
        let stream = TcpStream::connect(listen).unwrap();
        let (_far, peer) = listener.accept().unwrap();
        assert_eq!(origin(peer, listen), "others");
        known.learn("me", || (std::process::id(), ()));
        assert_eq!(origin(peer, listen), "me");
        known.forget(std::process::id());
        assert_eq!(origin(peer, listen), "others");
        drop(stream);
    }

    #[test]
    fn a_socket_is_told_from_another_at_the_same_port() {
        let row = |other: u16, inode: u32| {
            format!("0: 0100007F:1F90 0100007F:{other:04X} 06 0:0 00:0 0 0 0 {inode} 1\n")
        };
        let table = format!("head\n{}{}", row(80, 0), row(443, 7));
        let addr = |port| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(inode(&table, addr(8080), addr(443)), Some("7"));
        assert_eq!(inode(&table, addr(8080), addr(81)), None);
    }
}
