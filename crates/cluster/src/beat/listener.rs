use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain::{ProcessName, Role, Term};
use proto::link::{Beat, BeatAnswer};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, LocalSet};
use tokio::time::timeout;
use tokio_rustls::TlsStream;

use super::ListenerConfig;
use super::thread::BeatThread;
use super::wire;
use crate::Error;

/// Something was heard of a node, or was not.
#[derive(Clone, Debug, PartialEq)]
pub struct BeatEvent {
    /// By its certificate.
    pub from: ProcessName,
    pub what: What,
    pub at: Instant,
}

#[derive(Clone, Debug, PartialEq)]
pub enum What {
    Beat(Beat),
    /// Its connection ended, and it has no other one.
    Lost,
}

/// Called on the beat thread for every event: must not block.
pub type BeatSink = Arc<dyn Fn(BeatEvent) + Send + Sync>;
/// The leader, if there is one, and its term; told to every node that beats. Called on the beat thread, too.
pub type BeatAnswerSource = Arc<dyn Fn() -> (Option<ProcessName>, Term) + Send + Sync>;

/// Hears the beats of all nodes until it is dropped.
pub struct BeatListener {
    thread: BeatThread,
    addr: SocketAddr,
}

impl BeatListener {
    pub async fn spawn(
        config: ListenerConfig,
        identity: &net::Identity,
        sink: BeatSink,
        answer: BeatAnswerSource,
    ) -> Result<Self, Error> {
        let (bound, binding) = oneshot::channel();
        let identity = identity.clone();
        let thread = BeatThread::spawn("beat-listener", move || {
            let local = LocalSet::new();
            async move {
                local.run_until(run(config, identity, sink, answer, bound)).await;
            }
        })?;
        let addr = binding.await.map_err(|_| Error::Start {
            what: "the beat listener",
            why: "its thread ended".to_owned(),
        })?;
        let addr = addr.map_err(|source| Error::Listen { what: "the heartbeat", source })?;
        Ok(Self { thread, addr })
    }

    /// Where it listens, with the port that the system chose if none was asked for.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub async fn shutdown(self) {
        self.thread.shutdown().await;
    }
}

impl fmt::Debug for BeatListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BeatListener({})", self.addr)
    }
}

struct Hearing {
    sink: BeatSink,
    answer: BeatAnswerSource,
    silence_max: Duration,
    /// The newest connection of each node, and its number.
    newest: RefCell<HashMap<ProcessName, (u64, AbortHandle)>>,
}

async fn run(
    config: ListenerConfig,
    identity: net::Identity,
    sink: BeatSink,
    answer: BeatAnswerSource,
    bound: oneshot::Sender<Result<SocketAddr, net::Error>>,
) {
    let protocol = net::Protocol::Beat;
    let opened =
        net::Listener::bind(config.listen, &identity, protocol, &[Role::Node], config.listener)
            .await;
    let mut listener = match opened {
        Ok(listener) => listener,
        Err(error) => {
            _ = bound.send(Err(error));
            return;
        }
    };
    _ = bound.send(Ok(listener.local_addr()));
    let silence_max = Duration::from_millis(config.silence_timeout_ms);
    let hearing = Rc::new(Hearing { sink, answer, silence_max, newest: RefCell::default() });
    let mut number = 0;
    loop {
        let net::Accepted { stream, peer, .. } = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => return tracing::error!(%error, "the beat listener has ended"),
        };
        number += 1;
        let task =
            tokio::task::spawn_local(hear(hearing.clone(), number, peer.name.clone(), stream));
        // A node has one connection. Its newer one replaces the older without a word.
        let newest = (number, task.abort_handle());
        if let Some((_, older)) = hearing.newest.borrow_mut().insert(peer.name, newest) {
            older.abort();
        }
    }
}

async fn hear(
    hearing: Rc<Hearing>,
    number: u64,
    from: ProcessName,
    mut stream: TlsStream<TcpStream>,
) {
    let Err(error) = converse(&hearing, &from, &mut stream).await;
    let mut newest = hearing.newest.borrow_mut();
    if newest.get(&from).is_some_and(|(current, _)| *current == number) {
        newest.remove(&from);
        drop(newest);
        tracing::info!(node = %from, %error, "lost the beat connection of a node");
        (hearing.sink)(BeatEvent { from, what: What::Lost, at: Instant::now() });
    }
}

async fn converse(
    hearing: &Hearing,
    from: &ProcessName,
    stream: &mut TlsStream<TcpStream>,
) -> io::Result<std::convert::Infallible> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    loop {
        let beat: Beat = timeout(hearing.silence_max, wire::read(stream)).await.map_err(late)??;
        let number = beat.number;
        let (from, at) = (from.clone(), Instant::now());
        (hearing.sink)(BeatEvent { from, what: What::Beat(beat), at });
        let (leader, term) = (hearing.answer)();
        let leader = leader.map(String::from).unwrap_or_default();
        let answer = BeatAnswer { number, leader, term: term.0 };
        timeout(hearing.silence_max, wire::write(stream, &answer)).await.map_err(late)??;
    }
}
