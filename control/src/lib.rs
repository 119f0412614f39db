//! The control role: serves the gRPC API, routes work to the owners of its agents, and leads when it may.
//!
//! Composes, never decides: the scheduler decides who owns what, owners decide about works. Never reads or writes a
//! shard itself, and never answers a submit that its owner has not made durable.

mod api;
mod config;
mod deadline;
mod desk;
mod dispatch;
mod edge;
mod error;
mod explain;
mod follow;
mod hub;
mod network;
mod open;
mod paging;
mod pump;
mod refusal;
mod router;
mod watch;

#[cfg(test)]
mod testing;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cluster::beat::BeatListener;
use domain::{Incarnation, Member, Role};
use net::{Identity, Listener, Protocol};
use telemetry::Health;

pub use config::{Api, Beat, Config, Limits};
pub use error::Error;

use crate::desk::Desk;
use crate::dispatch::{Definitions, Dispatch, Links};
use crate::hub::Hub;

/// Runs one control process until `shutdown` resolves. Whoever calls it has set up telemetry and the crypto provider.
///
/// # Errors
/// A part cannot start, or has ended although nobody asked it to.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    config.check()?;
    let identity = Identity::load(&config.net)?;
    check_name(&config, &identity)?;
    let health = Health::starting();
    let _admin = telemetry::admin::serve(config.telemetry.admin, health.clone()).await?;
    let process = Box::pin(Process::start(&config, &identity)).await?;
    let ready = tokio::spawn(ready(process.scheduler.views(), health));
    let outcome = Box::pin(process.run(&config, shutdown)).await;
    ready.abort();
    outcome
}

fn check_name(config: &Config, identity: &Identity) -> Result<(), Error> {
    let id = identity.id();
    if id.role == Role::Control && id.name == config.name {
        return Ok(());
    }
    Err(Error::Name { name: config.name.clone(), id: id.to_string() })
}

/// Ready means that a work that is submitted now finds its way: there is a view.
async fn ready(mut views: network::Views, health: Health) {
    if views.wait_for(Option::is_some).await.is_ok() {
        health.set_ready();
        tracing::info!("ready");
    }
}

/// Everything that runs, in the order in which it is started.
struct Process {
    cluster: cluster::Handle,
    beats: BeatListener,
    scheduler: scheduler::Handle,
    desk: Desk,
    listener: Listener,
}

impl Process {
    async fn start(config: &Config, identity: &Identity) -> Result<Self, Error> {
        // A port that is taken is found before anything is joined.
        let everybody = [Role::Client, Role::Node, Role::Store, Role::Control];
        let limits = config.api.listener.clone();
        let listener =
            Listener::bind(config.api.listen, identity, Protocol::Grpc, &everybody, limits);
        let listener = listener.await.map_err(Error::Listen)?;
        let store = store::connect(config.store()?, identity)?;
        let incarnation = incarnation();
        let dispatch = Arc::new(Dispatch::default());
        let cluster = cluster::spawn(cluster::Args {
            config: config.cluster.clone(),
            identity: identity.clone(),
            incarnation,
            service: dispatch.clone(),
        });
        let cluster = Box::pin(cluster).await?;
        let beats = listen_for_beats(config, identity, &dispatch).await?;
        let advertised = config.beat.advertise.clone().unwrap_or_else(|| beats.addr().to_string());
        let scheduler = scheduler::spawn(scheduler::Args {
            config: config.scheduler.clone(),
            me: Member { name: config.name.clone(), incarnation },
            store,
            store_name: config::STORE.to_owned(),
            authorities: identity.authorities(),
            cluster: cluster.clone(),
            beat: advertised,
        });
        let scheduler = Box::pin(scheduler).await?;
        let network = Arc::new(Links { cluster: cluster.clone(), scheduler: scheduler.clone() });
        let hub = Hub::spawn(network.clone());
        dispatch.start(scheduler.clone(), hub.clone());
        for (peer, address) in config.replicas()? {
            cluster.learn(peer.clone(), vec![address]);
            cluster.keep(peer);
        }
        let desk = Desk::new(network, hub, Arc::new(Definitions(scheduler.clone())));
        Ok(Self { cluster, beats, scheduler, desk, listener })
    }

    async fn run(
        self,
        config: &Config,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), Error> {
        let Self { cluster, beats, scheduler, desk, listener } = self;
        let stop = desk.stop.clone();
        tracing::info!(
            name = %config.name, api = %listener.local_addr(), cluster = cluster.address(), beat = %beats.addr(),
            "serving"
        );
        let store_url = config::store_url(config.store()?);
        let services = api::Services { desk, scheduler: scheduler.clone(), store_url };
        let mut serving = Box::pin(api::serve(services, listener, &config.api.limits));
        let outcome = tokio::select! {
            served = &mut serving => served,
            () = cluster.ended() => Err(Error::Ended { what: "the cluster" }),
            unusable = scheduler.stopped() => Err(unusable.map_or(
                Error::Ended { what: "the scheduler" },
                |why| Error::Unusable { why },
            )),
            () = shutdown => {
                tracing::info!("stopping");
                stop.cancel();
                let drain = Duration::from_millis(config.api.limits.drain_timeout_ms);
                // Whoever does not end its call by then is cut off.
                tokio::time::timeout(drain, &mut serving).await.unwrap_or(Ok(()))
            }
        };
        stop.cancel();
        drop(serving);
        scheduler.shutdown().await;
        beats.shutdown().await;
        cluster.shutdown().await;
        outcome
    }
}

async fn listen_for_beats(
    config: &Config,
    identity: &Identity,
    dispatch: &Arc<Dispatch>,
) -> Result<BeatListener, Error> {
    let (sink, source) = (dispatch.clone(), dispatch.clone());
    let listener = BeatListener::spawn(
        config.beat.listener_config(),
        identity,
        Arc::new(move |event| sink.beat(event)),
        Arc::new(move || source.leader()),
    );
    Ok(Box::pin(listener).await?)
}

/// Larger for a later run, as long as the clock of this machine does not go back by more than a run lasts.
fn incarnation() -> Incarnation {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Incarnation(u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
