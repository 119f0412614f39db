//! The connection: one at a time, to the first address that answers; after a failure, or when it has not answered for a
//! moment, the next one is tried.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use domain::Role;
use futures::stream::{FuturesUnordered, StreamExt};
use net::grpc::Connector;
use tokio::time::{Duration, Instant, timeout, timeout_at};
use tonic::transport::{Channel, Endpoint};

use crate::{Config, Error};

// A server that was stopped is left after two seconds, about when another replica leads in its place.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// What an address has before the next one is tried beside it: one that was stopped takes connections and says nothing.
const HEAD_START: Duration = Duration::from_millis(250);
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Where to connect, and what is connected.
pub(crate) struct Pool {
    addresses: Vec<String>,
    endpoints: Vec<Endpoint>,
    connector: Connector,
    state: Mutex<State>,
    /// Who has it connects; the others take what it finds.
    turn: tokio::sync::Mutex<()>,
    reached: AtomicBool,
}

#[derive(Default)]
struct State {
    /// The address to try next.
    next: usize,
    /// Counts connections, so that a late failure of an old one does not close its successor.
    number: u64,
    channel: Option<Channel>,
}

/// One connection.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) channel: Channel,
    number: u64,
}

impl Pool {
    pub(crate) fn new(config: &Config) -> Result<Self, Error> {
        let identity = config.identity()?;
        let addresses = config.addresses()?;
        let endpoints = addresses.iter().map(|address| endpoint(address)).collect::<Result<_, _>>();
        let dialer =
            net::Dialer::new(&identity, net::Protocol::Grpc).with_timeout(config.timeouts.connect);
        let connector = net::grpc::connector(dialer, net::Expected::any(Role::Control));
        Ok(Self {
            addresses,
            endpoints: endpoints?,
            connector,
            state: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            reached: AtomicBool::new(false),
        })
    }

    pub(crate) fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Whether there ever was a connection.
    pub(crate) fn reached(&self) -> bool {
        self.reached.load(Ordering::Relaxed)
    }

    /// The connection, made now if there is none. Every address is tried once.
    pub(crate) async fn link(&self, deadline: Instant) -> Result<Link, Error> {
        match timeout_at(deadline, self.link_in_turn()).await {
            Ok(link) => link,
            Err(elapsed) => {
                let addresses = self.addresses.clone();
                Err(Error::NotReached { addresses, source: elapsed.into() })
            }
        }
    }

    async fn link_in_turn(&self) -> Result<Link, Error> {
        let _turn = self.turn.lock().await;
        let (link, first) = self.look();
        if let Some(link) = link {
            return Ok(link);
        }
        let count = self.endpoints.len();
        let mut untried = (0..count).map(|turn| (first + turn) % count);
        let (mut dials, mut failure) = (FuturesUnordered::new(), None);
        loop {
            match untried.next() {
                Some(index) => dials.push(self.connect(index)),
                None if dials.is_empty() => {
                    let origin = || "the given addresses".to_owned();
                    return Err(failure.unwrap_or_else(|| Error::NoAddress { origin: origin() }));
                }
                None => {}
            }
            let wait = if untried.len() == 0 { Duration::MAX } else { HEAD_START };
            match timeout(wait, dials.next()).await {
                Ok(Some(Ok((index, channel)))) => return Ok(self.install(index, channel)),
                Ok(Some(Err(error))) => failure = Some(more_telling(failure, error)),
                Ok(None) | Err(_) => {}
            }
        }
    }

    /// The connection, if there is one, and the address to try first.
    fn look(&self) -> (Option<Link>, usize) {
        let state = self.state();
        let link = |channel: &Channel| Link { channel: channel.clone(), number: state.number };
        (state.channel.as_ref().map(link), state.next)
    }

    fn install(&self, index: usize, channel: Channel) -> Link {
        self.reached.store(true, Ordering::Relaxed);
        let mut state = self.state();
        state.next = index;
        state.number += 1;
        state.channel = Some(channel.clone());
        Link { channel, number: state.number }
    }

    /// Gives a connection up that has failed; the next one goes to the next address.
    pub(crate) fn drop_link(&self, link: &Link) {
        let mut state = self.state();
        if state.number == link.number && state.channel.take().is_some() {
            state.next = (state.next + 1) % self.endpoints.len();
        }
    }

    async fn connect(&self, index: usize) -> Result<(usize, Channel), Error> {
        // Also where nobody waits for the outcome any more, the next attempt begins with another.
        self.state().next = (index + 1) % self.endpoints.len();
        let connecting = self.endpoints[index].connect_with_connector(self.connector.clone());
        let channel = connecting.await;
        let channel = channel.map_err(|source| Error::of_connect(&self.addresses, source))?;
        Ok((index, channel))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({})", self.addresses.join(","))
    }
}

fn endpoint(address: &str) -> Result<Endpoint, Error> {
    let invalid = |_| Error::Address { address: address.to_owned() };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(invalid)?;
    // A process that was stopped keeps its connections: only its silence shows it.
    Ok(endpoint
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES))
}

/// Of several addresses the one that answered says more than those that did not.
fn more_telling(before: Option<Error>, now: Error) -> Error {
    match before {
        Some(before) if before.is_refusal() || (before.is_for_good() && !now.is_refusal()) => {
            before
        }
        Some(_) | None => now,
    }
}
