//! The way in: accepts connections, verifies who is there, and hands over only those that are in order.
//!
//! Each handshake is a task of its own with a deadline, so that a silent client keeps nobody out. Their number is
//! bounded; when all places are taken, the oldest unfinished handshake goes: an honest peer needs milliseconds, so
//! the oldest is the least likely to be one.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use domain::Role;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinError, JoinHandle, JoinSet};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{TlsAcceptor, TlsStream};

use crate::refusal::{ACCEPT_ERRORS, ACCEPTED, REFUSED, Refusal, Rejection};
use crate::{Error, Identity, Protocol, SpiffeId, spiffe, tls};

/// The first byte of a server on a connection that is not gRPC: you are in.
///
/// In TLS 1.3 a client is done before the server has looked at its certificate. Without this byte a dial would succeed
/// and a refusal would look like a connection that broke. A gRPC server says as much with its first settings frame.
pub(crate) const GREETING: u8 = b'+';

const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(10);
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// How many may knock at once, and for how long.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenerConfig {
    /// Handshakes under way at once, connections. One more, and the oldest is dropped.
    pub handshakes_max: NonZeroUsize,
    /// From the TCP connection to the end of the handshake, milliseconds.
    pub handshake_timeout_ms: u64,
    /// Verified peers that wait until this process takes them, connections.
    pub backlog_max: NonZeroUsize,
    /// Silence after which TCP asks whether the peer's machine is still there, milliseconds.
    pub keepalive_idle_ms: u64,
    /// Between two such questions, milliseconds.
    pub keepalive_interval_ms: u64,
}

impl Default for ListenerConfig {
    fn default() -> Self {
        const HANDSHAKES_MAX: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
        const BACKLOG_MAX: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");
        Self {
            handshakes_max: HANDSHAKES_MAX,
            handshake_timeout_ms: 5_000,
            backlog_max: BACKLOG_MAX,
            keepalive_idle_ms: 10_000,
            keepalive_interval_ms: 5_000,
        }
    }
}

/// A peer that was let in.
#[derive(Debug)]
pub struct Accepted {
    pub stream: TlsStream<TcpStream>,
    pub peer: SpiffeId,
    pub addr: SocketAddr,
}

/// An open port. Dropping it closes the port and ends the handshakes under way.
#[derive(Debug)]
pub struct Listener {
    accepted: mpsc::Receiver<Accepted>,
    addr: SocketAddr,
    task: JoinHandle<()>,
}

impl Listener {
    /// Opens the port. Peers whose role is not among `allowed` are refused.
    pub async fn bind(
        addr: SocketAddr,
        identity: &Identity,
        protocol: Protocol,
        allowed: &[Role],
        config: ListenerConfig,
    ) -> Result<Self, Error> {
        LazyLock::force(&REFUSED);
        let socket = TcpListener::bind(addr).await.map_err(|error| of_bind(addr, error))?;
        let addr = socket.local_addr().map_err(|error| of_bind(addr, error))?;
        let (sender, accepted) = mpsc::channel(config.backlog_max.get());
        let door = Door {
            tls: TlsAcceptor::from(Arc::new(tls::server_config(identity, protocol, allowed))),
            protocol,
            timeout: Duration::from_millis(config.handshake_timeout_ms),
            keepalive: keepalive(config.keepalive_idle_ms, config.keepalive_interval_ms),
            accepted: sender,
        };
        let task = tokio::spawn(serve(socket, Arc::new(door), config.handshakes_max.get()));
        Ok(Self { accepted, addr, task })
    }

    /// Where it listens, with the port that the system chose if none was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The next peer. Safe to cancel. An error is final.
    pub async fn accept(&mut self) -> Result<Accepted, Error> {
        self.accepted.recv().await.ok_or(Error::Ended { addr: self.addr })
    }

    pub(crate) fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<Accepted>> {
        self.accepted.poll_recv(cx)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn of_bind(addr: SocketAddr, source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::AddrInUse {
        return Error::AddressInUse { addr };
    }
    Error::Listen { addr, source }
}

pub(crate) fn keepalive(idle_ms: u64, interval_ms: u64) -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(Duration::from_millis(idle_ms))
        .with_interval(Duration::from_millis(interval_ms))
}

/// Small messages leave at once, and a peer whose machine lost power is noticed some day.
pub(crate) fn tune(stream: &TcpStream, keepalive: &TcpKeepalive) -> io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_keepalive(keepalive)
}

async fn serve(socket: TcpListener, door: Arc<Door>, handshakes_max: usize) {
    let mut pending = Pending::default();
    loop {
        tokio::select! {
            biased;
            Some(ended) = pending.tasks.join_next_with_id() => pending.forget(ended),
            (stream, addr) = accept(&socket) => {
                if handshakes_max <= pending.oldest_first.len() {
                    pending.drop_oldest(door.protocol);
                }
                pending.start(door.clone(), stream, addr);
            }
        }
    }
}

/// The next connection. While the system has none to give (no file descriptors left), it is asked ever more rarely.
async fn accept(socket: &TcpListener) -> (TcpStream, SocketAddr) {
    let mut pause = ACCEPT_PAUSE_MIN;
    loop {
        match socket.accept().await {
            Ok(connection) => return connection,
            Err(error) => {
                ACCEPT_ERRORS.inc();
                tracing::warn!(%error, pause_ms = pause.as_millis(), "cannot accept connections");
                tokio::time::sleep(pause).await;
                pause = ACCEPT_PAUSE_MAX.min(pause * 2);
            }
        }
    }
}

/// The handshakes under way. All end when this is dropped.
#[derive(Default)]
struct Pending {
    tasks: JoinSet<()>,
    oldest_first: VecDeque<(AbortHandle, SocketAddr)>,
}

impl Pending {
    fn start(&mut self, door: Arc<Door>, stream: TcpStream, addr: SocketAddr) {
        let handle = self.tasks.spawn(door.admit(stream, addr));
        self.oldest_first.push_back((handle, addr));
    }

    fn drop_oldest(&mut self, protocol: Protocol) {
        let Some((handle, addr)) = self.oldest_first.pop_front() else { return };
        if handle.is_finished() {
            return;
        }
        handle.abort();
        Rejection::of(Refusal::Crowded).record(addr, protocol);
    }

    fn forget(&mut self, ended: Result<(Id, ()), JoinError>) {
        let id = match ended {
            Ok((id, ())) => id,
            Err(error) => {
                if error.is_panic() {
                    tracing::error!(%error, "handshake panicked");
                }
                error.id()
            }
        };
        self.oldest_first.retain(|(handle, _)| handle.id() != id);
    }
}

/// What every handshake needs.
struct Door {
    tls: TlsAcceptor,
    protocol: Protocol,
    timeout: Duration,
    keepalive: TcpKeepalive,
    accepted: mpsc::Sender<Accepted>,
}

impl Door {
    async fn admit(self: Arc<Self>, stream: TcpStream, addr: SocketAddr) {
        let deadline = Instant::now() + self.timeout;
        match self.welcome(stream, addr, deadline).await {
            Ok(peer) => {
                ACCEPTED.with_label_values(&[self.protocol.as_str()]).inc();
                tracing::debug!(%addr, %peer, protocol = %self.protocol, "let peer in");
            }
            Err(rejection) => rejection.record(addr, self.protocol),
        }
    }

    /// Verifies the peer and, when there is a place for it, tells it so and hands it over.
    async fn welcome(
        &self,
        stream: TcpStream,
        addr: SocketAddr,
        deadline: Instant,
    ) -> Result<SpiffeId, Rejection> {
        // A socket that cannot be tuned is one that was reset already: the handshake says so, too.
        _ = tune(&stream, &self.keepalive);
        let mut accepted = match timeout_at(deadline, self.handshake(stream, addr)).await {
            Ok(outcome) => outcome?,
            Err(_) => return Err(Rejection::of(Refusal::Timeout)),
        };
        let peer = accepted.peer.clone();
        let reject = |refusal| Rejection::of(refusal).with_subject(Some(peer.to_string()));
        let Ok(Ok(place)) = timeout_at(deadline, self.accepted.reserve()).await else {
            return Err(reject(Refusal::Backlog));
        };
        match timeout_at(deadline, self.greet(&mut accepted.stream)).await {
            Ok(Ok(())) => place.send(accepted),
            Ok(Err(error)) => return Err(reject(Refusal::Left).with_source(error)),
            Err(_) => return Err(reject(Refusal::Timeout)),
        }
        Ok(peer)
    }

    async fn handshake(&self, stream: TcpStream, addr: SocketAddr) -> Result<Accepted, Rejection> {
        let (outcome, seen) = tls::observed(self.tls.accept(stream)).await;
        let stream = match outcome {
            Ok(stream) => stream,
            Err(error) => {
                let refusal = seen.refusal.unwrap_or_else(|| Refusal::of_handshake(&error));
                let rejection = Rejection::of(refusal).with_subject(seen.subject);
                return Err(rejection.with_source(error));
            }
        };
        let (_, session) = stream.get_ref();
        let reject = |refusal| Rejection::of(refusal).with_subject(seen.subject.clone());
        // rustls turns away only those that named other protocols, not those that named none.
        if session.alpn_protocol() != Some(self.protocol.alpn()) {
            return Err(reject(Refusal::Alpn));
        }
        let leaf = session.peer_certificates().and_then(<[_]>::first);
        let peer = match leaf.map(|leaf| spiffe::id_of(leaf)) {
            Some(Ok(peer)) => peer,
            Some(Err(refusal)) => return Err(reject(refusal)),
            None => return Err(reject(Refusal::NoCertificate)),
        };
        Ok(Accepted { stream: stream.into(), peer, addr })
    }

    async fn greet(&self, stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
        match self.protocol {
            Protocol::Grpc => Ok(()),
            Protocol::Link | Protocol::Beat => {
                stream.write_all(&[GREETING]).await?;
                stream.flush().await
            }
        }
    }
}

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;
