//! The connection: one at a time, to the first address that answers; after a failure the next one is tried.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use domain::Role;
use net::grpc::Connector;
use tokio::sync::Mutex;
use tokio::time::{Duration, Instant, timeout_at};
use tonic::transport::{Channel, Endpoint};

use crate::{Config, Error};

// A server that was stopped is left after two seconds, about when another replica leads in its place.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(1);
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Where to connect, and what is connected.
pub(crate) struct Pool {
    addresses: Vec<String>,
    endpoints: Vec<Endpoint>,
    connector: Connector,
    state: Mutex<State>,
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
        let state = Mutex::default();
        let reached = AtomicBool::new(false);
        Ok(Self { addresses, endpoints: endpoints?, connector, state, reached })
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
        let mut state = self.state.lock().await;
        if let Some(channel) = &state.channel {
            return Ok(Link { channel: channel.clone(), number: state.number });
        }
        let mut failure = None;
        for _ in 0..self.endpoints.len() {
            match self.connect(state.next).await {
                Ok(channel) => {
                    self.reached.store(true, Ordering::Relaxed);
                    return Ok(state.install(channel));
                }
                Err(error) => failure = Some(more_telling(failure, error)),
            }
            state.next = (state.next + 1) % self.endpoints.len();
        }
        Err(failure.unwrap_or(Error::NoAddress { origin: "the given addresses".to_owned() }))
    }

    /// Gives a connection up that has failed; the next one goes to the next address.
    pub(crate) async fn drop_link(&self, link: &Link) {
        let mut state = self.state.lock().await;
        if state.number == link.number && state.channel.take().is_some() {
            state.next = (state.next + 1) % self.endpoints.len();
        }
    }

    async fn connect(&self, index: usize) -> Result<Channel, Error> {
        let connecting = self.endpoints[index].connect_with_connector(self.connector.clone());
        connecting.await.map_err(|source| Error::of_connect(&self.addresses, source))
    }
}

impl State {
    fn install(&mut self, channel: Channel) -> Link {
        self.number += 1;
        self.channel = Some(channel.clone());
        Link { channel, number: self.number }
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
