//! The way out: reaches a peer at an address and makes sure that it is the one that was meant, and that it wants us.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use domain::{ErrorKind, ProcessName, Role};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncBufReadExt, AsyncReadExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::client::TlsStream as ClientStream;
use tokio_rustls::{TlsConnector, TlsStream};

use crate::listener::{GREETING, keepalive, tune};
use crate::{Error, Identity, Protocol, SpiffeId, spiffe, tls};

const TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE_IDLE_MS: u64 = 10_000;
const KEEPALIVE_INTERVAL_MS: u64 = 5_000;

/// Who has to answer. The address says where a process is, its certificate says who it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Expected {
    pub role: Role,
    /// Any of that role, if there is none.
    pub name: Option<ProcessName>,
}

impl Expected {
    /// Any process of the role.
    pub fn any(role: Role) -> Self {
        Self { role, name: None }
    }

    /// One process and no other.
    pub fn exactly(role: Role, name: ProcessName) -> Self {
        Self { role, name: Some(name) }
    }

    fn admits(&self, id: &SpiffeId) -> bool {
        self.role == id.role && self.name.as_ref().is_none_or(|name| *name == id.name)
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{}/{name}", self.role),
            None => write!(f, "a {}", self.role),
        }
    }
}

/// A peer that was reached, and has let us in.
#[derive(Debug)]
pub struct Dialed {
    pub stream: TlsStream<TcpStream>,
    pub peer: SpiffeId,
    pub addr: SocketAddr,
}

/// Reaches peers that speak one protocol. Cheap to clone.
#[derive(Clone)]
pub struct Dialer {
    tls: TlsConnector,
    server_name: ServerName<'static>,
    protocol: Protocol,
    timeout: Duration,
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dialer({})", self.protocol)
    }
}

impl Dialer {
    /// A dial takes at most 5 s.
    pub fn new(identity: &Identity, protocol: Protocol) -> Self {
        Self {
            tls: TlsConnector::from(Arc::new(tls::client_config(identity, protocol))),
            server_name: tls::server_name(),
            protocol,
            timeout: TIMEOUT,
        }
    }

    /// The same with another deadline.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Connects to `addr`, `host:port`. The name is resolved anew each time, since pods move; all its addresses are
    /// tried, each with an equal share of the time that is left, until one is the peer that was meant.
    ///
    /// Returns when the peer has accepted us, so that a refusal is an error here and not a broken stream later.
    pub async fn dial(&self, addr: &str, expected: &Expected) -> Result<Dialed, Error> {
        let deadline = Instant::now() + self.timeout;
        let targets = resolve(addr, deadline).await?;
        let mut failure = None;
        for (tried, target) in targets.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let share = left / u32::try_from(targets.len() - tried).unwrap_or(u32::MAX);
            let attempt = self.attempt(addr, *target, expected);
            match timeout_at(Instant::now() + share, attempt).await {
                Ok(Ok(dialed)) => return Ok(dialed),
                Ok(Err(error)) => failure = Some(more_telling(failure, error)),
                Err(_) => failure = Some(more_telling(failure, too_late(addr))),
            }
        }
        Err(failure.unwrap_or_else(|| {
            let source = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            Error::NotReached { addr: addr.to_owned(), source }
        }))
    }

    async fn attempt(
        &self,
        addr: &str,
        target: SocketAddr,
        expected: &Expected,
    ) -> Result<Dialed, Error> {
        let failed = |error| Error::of_dial(addr, error);
        let stream = TcpStream::connect(target).await.map_err(failed)?;
        tune(&stream, &keepalive(KEEPALIVE_IDLE_MS, KEEPALIVE_INTERVAL_MS)).map_err(failed)?;
        let connecting = self.tls.connect(self.server_name.clone(), stream);
        let mut stream = connecting.await.map_err(failed)?;
        let peer = self.identify(&stream).map_err(failed)?;
        if !expected.admits(&peer) {
            let expected = expected.clone();
            return Err(Error::WrongPeer { addr: addr.to_owned(), found: peer, expected });
        }
        self.await_welcome(&mut stream).await.map_err(failed)?;
        Ok(Dialed { stream: stream.into(), peer, addr: target })
    }

    fn identify(&self, stream: &ClientStream<TcpStream>) -> io::Result<SpiffeId> {
        let (_, session) = stream.get_ref();
        if session.alpn_protocol() != Some(self.protocol.alpn()) {
            return Err(io::Error::other(rustls::Error::NoApplicationProtocol));
        }
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let leaf = leaf.ok_or(rustls::Error::NoCertificatesPresented).map_err(io::Error::other)?;
        spiffe::id_of(leaf).map_err(io::Error::other)
    }

    /// Waits for the first sign that the server has verified us: the greeting, or the first frame of a gRPC server,
    /// which is looked at and left where it is.
    async fn await_welcome(&self, stream: &mut ClientStream<TcpStream>) -> io::Result<()> {
        match self.protocol {
            Protocol::Grpc => match stream.fill_buf().await?.is_empty() {
                false => Ok(()),
                true => Err(io::ErrorKind::UnexpectedEof.into()),
            },
            Protocol::Link | Protocol::Beat => match stream.read_u8().await? {
                GREETING => Ok(()),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the greeting is another")),
            },
        }
    }
}

/// Whether a text is `host:port`, something that can be dialled.
pub fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let plain = !host.contains(|c: char| c.is_whitespace() || "/@?#".contains(c));
    // An IPv6 address stands in brackets.
    let is_one = !host.contains(':') || host.starts_with('[') && host.ends_with(']');
    !host.is_empty() && plain && is_one && port.parse::<u16>().is_ok_and(|port| 0 < port)
}

async fn resolve(addr: &str, deadline: Instant) -> Result<Vec<SocketAddr>, Error> {
    if !is_address(addr) {
        return Err(Error::Address { addr: addr.to_owned() });
    }
    match timeout_at(deadline, tokio::net::lookup_host(addr)).await {
        Ok(Ok(targets)) => Ok(targets.collect()),
        Ok(Err(source)) => Err(Error::NotReached { addr: addr.to_owned(), source }),
        Err(_) => Err(too_late(addr)),
    }
}

fn too_late(addr: &str) -> Error {
    let source = io::Error::new(io::ErrorKind::TimedOut, "it did not answer in time");
    Error::NotReached { addr: addr.to_owned(), source }
}

/// Of several addresses the one that answered says more than those that did not.
fn more_telling(before: Option<Error>, now: Error) -> Error {
    match before {
        Some(before) if before.kind() == ErrorKind::Denied => before,
        _ => now,
    }
}

#[cfg(test)]
#[path = "dialer_tests.rs"]
mod tests;
