//! Health and metrics over plain HTTP, for whoever is on this machine.
//!
//! Never listens on anything but loopback, since it asks nobody who they are, and never changes anything.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Sleep;

use crate::{Error, Health, metrics};

/// A probe and a scraper need two. More callers wait until one of these is done or out of time.
const CONNECTIONS_MAX: usize = 32;
/// A whole connection, silent or not: scrapers connect again.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// After an accept that failed, which mostly means too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The listener; it stops when this is dropped.
#[derive(Debug)]
pub struct Admin {
    addr: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Admin {
    /// Where it listens, with the port that was free if 0 was asked for.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

/// Serves `/healthz` (200 while the process lives), `/readyz` (200, or 503 and why) and `/metrics`.
pub async fn serve(addr: SocketAddr, health: Health) -> Result<Admin, Error> {
    if !addr.ip().is_loopback() {
        return Err(Error::AdminNotLoopback { addr });
    }
    let listener = TcpListener::bind(addr).await;
    let listener = listener.map_err(|source| Error::AdminListen { addr, source })?;
    let addr = listener.local_addr().map_err(|source| Error::AdminListen { addr, source })?;
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(scrape))
        .with_state(health);
    let (stop, stopped) = oneshot::channel::<()>();
    let listener = Bounded { listener, room: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
    tokio::spawn(async move {
        let server = axum::serve(listener, router).with_graceful_shutdown(async {
            let _ = stopped.await;
        });
        if let Err(error) = server.await {
            tracing::warn!(%addr, %error, "admin listener ended");
        }
    });
    Ok(Admin { addr, _stop: stop })
}

async fn ready(State(health): State<Health>) -> Response {
    let reasons = health.reasons_not_ready();
    if reasons.is_empty() {
        return "ready\n".into_response();
    }
    let text = reasons.iter().map(|reason| format!("{reason}\n")).collect::<String>();
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

async fn scrape() -> Response {
    // Some thousand lines of text are formatted: not on a thread that carries the work.
    match tokio::task::spawn_blocking(metrics::text).await {
        Ok(Ok(text)) => {
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
        }
        Ok(Err(error)) => failed(&error),
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("cannot gather metrics: {error}\n")).into_response()
}

/// Accepts only so many connections at once.
struct Bounded {
    listener: TcpListener,
    room: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let permit =
            self.room.clone().acquire_owned().await.expect("the semaphore is never closed");
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    let deadline = Box::pin(tokio::time::sleep(CONNECTION_TIMEOUT));
                    return (Connection { stream, deadline, _permit: permit }, peer);
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an admin connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A stream that fails after its deadline.
struct Connection {
    stream: TcpStream,
    deadline: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    fn check_deadline(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_deadline(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_deadline(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const FREE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    async fn request(addr: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let text = format!("GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(10), read).await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn health_readiness_and_metrics_are_served() {
        let health = Health::starting();
        let admin = serve(FREE, health.clone()).await.unwrap();
        let check = async |path: &str, status: &str, contained: &str| {
            let answer = request(admin.addr(), path).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
            assert!(answer.contains(contained), "{answer}");
        };
        check("/healthz", "200", "\r\n\r\nok\n").await;
        check("/readyz", "503", "\r\n\r\nstarting\n").await;
        health.set_ready();
        check("/readyz", "200", "\r\n\r\nready\n").await;
        health.set_not_ready("store unreachable");
        check("/readyz", "503", "\r\n\r\nstore unreachable\n").await;
        check("/healthz", "200", "ok").await;
        metrics::counter("test_admin_total", "Counted.").inc_by(7);
        check("/metrics", "200", "\ntest_admin_total 7\n").await;
        check("/metrics", "200", "process_resident_memory_bytes").await;
        check("/other", "404", "").await;
    }

    #[tokio::test]
    async fn only_loopback_is_served() {
        for addr in ["0.0.0.0:0", "[::]:0", "192.0.2.1:9090"] {
            let error = serve(addr.parse().unwrap(), Health::starting()).await.unwrap_err();
            assert_eq!(error.kind(), domain::ErrorKind::Invalid);
            assert!(error.to_string().contains(addr), "{error}");
        }
    }

    #[tokio::test]
    async fn a_port_in_use_is_an_error_that_names_it() {
        let first = serve(FREE, Health::starting()).await.unwrap();
        let error = serve(first.addr(), Health::starting()).await.unwrap_err();
        assert!(error.to_string().contains(&first.addr().to_string()), "{error}");
    }

    #[tokio::test]
    async fn a_dropped_listener_frees_its_port() {
        let admin = serve(FREE, Health::starting()).await.unwrap();
        let addr = admin.addr();
        drop(admin);
        let freed = async {
            while TcpListener::bind(addr).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), freed).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn silent_callers_do_not_lock_out_a_probe() {
        let admin = serve(FREE, Health::starting()).await.unwrap();
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX * 2 {
            silent.push(TcpStream::connect(admin.addr()).await.unwrap());
        }
        let mut stream = TcpStream::connect(admin.addr()).await.unwrap();
        stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("ok\n"), "{answer}");
    }
}
