//! The store role: serves database files to the cluster over mutual TLS.
//!
//! The only process that opens them. Never serves a client, and lets nobody do more than its role needs.

mod pages;
mod rights;
mod service;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use domain::Role;
use proto::link::store_service_server::StoreServiceServer;
use telemetry::Health;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::transport::Server as GrpcServer;

use crate::{EngineConfig, Error, FileStore, MESSAGE_BYTES_MAX};
use service::Service;

/// Answers that are still on their way when the process is told to stop.
const GRACE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 32 << 20;
const STREAMS_MAX: u32 = 1_024;

/// What `stagedoor store` is told.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where control and nodes reach it, `host:port`; port 0 takes a free one.
    #[serde(default = "listen")]
    pub listen: SocketAddr,
    /// Where the database files are. One process at a time.
    pub data_dir: PathBuf,
    /// Who this process is.
    pub net: net::Config,
    /// How it uses the machine.
    #[serde(default)]
    pub engine: EngineConfig,
    /// The door of the network.
    #[serde(default)]
    pub listener: net::ListenerConfig,
    /// What it says about itself, and where.
    #[serde(default)]
    pub telemetry: telemetry::Config,
}

fn listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7600))
}

/// Serves until `shutdown`, then finishes what is in flight and closes the files.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
    let health = Health::starting();
    let admin = telemetry::admin::serve(config.telemetry.admin, health.clone()).await?;
    let net = config.net.clone();
    let identity = blocking(move || Ok(net::Identity::load(&net)?)).await?;
    let server = Server::bind(&config, &identity).await?;
    health.set_ready();
    tracing::info!(listen = %server.local_addr(), admin = %admin.addr(), "store is serving");
    let served = server.run(shutdown, || health.set_not_ready("shutting down")).await;
    tracing::info!("store has stopped");
    served
}

/// A store role that has its directory and its port, and does not serve yet.
pub struct Server {
    store: FileStore,
    listener: net::Listener,
    addr: SocketAddr,
}

impl Server {
    pub async fn bind(config: &Config, identity: &net::Identity) -> Result<Self, Error> {
        if identity.id().role != Role::Store {
            let what =
                format!("{} is no store; use a certificate of the role store", identity.id());
            return Err(Error::Invalid { what });
        }
        let (data_dir, engine) = (config.data_dir.clone(), config.engine.clone());
        let store = blocking(move || FileStore::open(&data_dir, engine)).await?;
        store.open_control().await?;
        let allowed = [Role::Control, Role::Node];
        let listener = net::Listener::bind(
            config.listen,
            identity,
            net::Protocol::Grpc,
            &allowed,
            config.listener.clone(),
        )
        .await?;
        let addr = listener.local_addr();
        Ok(Self { store, listener, addr })
    }

    /// Where it listens, with the port that was free if 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `shutdown`; `stopping` is called then.
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()>,
        stopping: impl FnOnce(),
    ) -> Result<(), Error> {
        let (stop, stopped) = watch::channel(false);
        let service = StoreServiceServer::new(Service::new(self.store.clone(), stopped.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let serving = GrpcServer::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS_MAX)
            .add_service(service)
            .serve_with_incoming_shutdown(net::grpc::incoming(self.listener), is_true(stopped));
        let mut serving = Box::pin(serving);
        let served = tokio::select! {
            served = &mut serving => served,
            () = shutdown => {
                stopping();
                stop.send_replace(true);
                timeout(GRACE, &mut serving).await.unwrap_or_else(|_| {
                    tracing::warn!("connections were cut: they did not end within {GRACE:?}");
                    Ok(())
                })
            }
        };
        drop(serving);
        self.store.close().await;
        served.map_err(Error::Serve)
    }
}

async fn is_true(mut flag: watch::Receiver<bool>) {
    // An error means that the sender is gone: then the server is over, too.
    _ = flag.wait_for(|is_true| *is_true).await;
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.unwrap_or_else(|error| Err(Error::internal("starting the store", error)))
}
