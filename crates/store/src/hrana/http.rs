//! HTTP/1.1 to one server: bounded in connections, in time and in what it reads.
//!
//! Says of a request that failed whether it was sent. Never repeats one that was.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use domain::ErrorKind;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, StatusCode};
use net::WebDialer;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::target::Place;
use crate::{Error, metrics};

/// A server answers with 10 MB at most, and its errors are short.
const REPLY_BYTES_MAX: usize = 16 << 20;
/// A connection that was not used for so long may be cut by anything that lies between.
const IDLE_MAX: Duration = Duration::from_secs(20);

pub(super) struct Http {
    dialer: WebDialer,
    idle: Mutex<HashMap<(String, u16), Vec<Connection>>>,
    room: Semaphore,
}

pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
}

/// Why there is no reply.
pub(super) enum NoReply {
    /// The server has not seen the request.
    NotSent(Error),
    /// It may have.
    Lost(String),
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: Driver,
    used: Instant,
    /// Nothing was sent over it yet.
    is_fresh: bool,
}

/// Cuts the connection when nobody waits for its answer any more.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Http {
    pub(super) fn new(dialer: WebDialer, connections_max: usize) -> Self {
        Self { dialer, idle: Mutex::default(), room: Semaphore::new(connections_max) }
    }

    pub(super) async fn send(
        &self,
        place: &Place,
        mut request: Request<Full<Bytes>>,
        deadline: Instant,
    ) -> Result<Reply, NoReply> {
        let not_sent = |what: &str| NoReply::NotSent(Error::unavailable(what));
        let permit = timeout_at(deadline, self.room.acquire()).await;
        let Ok(Ok(_permit)) = permit else {
            return Err(not_sent("too many requests wait for the server"));
        };
        loop {
            let connecting = self.connection(place);
            let connection = timeout_at(deadline, connecting).await;
            let mut connection =
                connection.map_err(|_| not_sent("the server was not reached in time"))??;
            let is_fresh = std::mem::take(&mut connection.is_fresh);
            let reply =
                match timeout_at(deadline, connection.sender.try_send_request(request)).await {
                    Ok(Ok(reply)) => reply,
                    Ok(Err(mut failed)) => match failed.take_message() {
                        // A server that closes what it has just accepted is not dialled again and again.
                        Some(_) if is_fresh => return Err(not_sent("a new connection was closed")),
                        // The server closed a connection that was idle: it has seen nothing.
                        Some(back) => {
                            request = back;
                            continue;
                        }
                        None => return Err(lost(failed.error())),
                    },
                    Err(_) => {
                        return Err(NoReply::Lost("the server did not answer in time".to_owned()));
                    }
                };
            let status = reply.status();
            let body = Limited::new(reply.into_body(), REPLY_BYTES_MAX).collect();
            let body = timeout_at(deadline, body).await;
            let body = body
                .map_err(|_| NoReply::Lost("its answer did not end in time".to_owned()))?
                .map_err(|error| NoReply::Lost(format!("its answer was cut: {error}")))?;
            self.give_back(place, connection);
            return Ok(Reply { status, body: body.to_bytes() });
        }
    }

    /// One that is open still, or a new one.
    async fn connection(&self, place: &Place) -> Result<Connection, NoReply> {
        let not_sent = |error| NoReply::NotSent(error);
        while let Some(mut connection) = self.take(place) {
            if connection.used.elapsed() < IDLE_MAX && connection.sender.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        let stream = self.dialer.dial(&place.host, place.port).await;
        let unreached = |error: net::Error| {
            if error.kind() == ErrorKind::Denied {
                return Error::Denied { what: error.to_string() };
            }
            let what = format!("{}:{} was not reached", place.host, place.port);
            Error::unavailable_because(what, error)
        };
        let stream = stream.map_err(unreached).map_err(not_sent)?;
        metrics::RECONNECTS.inc();
        let (sender, connection) = handshake(stream).await.map_err(|error| {
            not_sent(Error::unavailable_because("a new connection broke", error))
        })?;
        let driver = Driver(tokio::spawn(async move {
            // Whoever waits for an answer is told by its absence.
            _ = connection.await;
        }));
        Ok(Connection { sender, driver, used: Instant::now(), is_fresh: true })
    }

    fn take(&self, place: &Place) -> Option<Connection> {
        let mut idle = self.idle();
        let list = idle.get_mut(&(place.host.clone(), place.port))?;
        list.pop()
    }

    fn give_back(&self, place: &Place, connection: Connection) {
        if connection.sender.is_closed() || connection.driver.0.is_finished() {
            return;
        }
        let connection = Connection { used: Instant::now(), ..connection };
        let mut idle = self.idle();
        let list = idle.entry((place.host.clone(), place.port)).or_default();
        list.retain(|connection| connection.used.elapsed() < IDLE_MAX);
        list.push(connection);
    }

    fn idle(&self) -> MutexGuard<'_, HashMap<(String, u16), Vec<Connection>>> {
        // Whole at every moment, also when a holder panicked.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lost(error: &hyper::Error) -> NoReply {
    NoReply::Lost(format!("the connection broke: {error}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_closes_every_connection_is_not_dialled_until_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let dials = Arc::new(AtomicUsize::new(0));
        let counted = dials.clone();
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                drop(stream);
            }
        });
        let http = Http::new(WebDialer::plaintext(Duration::from_secs(5)), 4);
        let (host, authority) = ("127.0.0.1".to_owned(), format!("127.0.0.1:{port}"));
        let place = Place { host, port, authority, namespace: None };
        for _ in 0..20 {
            let request = Request::builder().uri("/").body(Full::default()).unwrap();
            let sent = http.send(&place, request, Instant::now() + Duration::from_secs(60)).await;
            assert!(sent.is_err());
        }
        assert_eq!(dials.load(Ordering::Relaxed), 20);
        server.abort();
    }
}
