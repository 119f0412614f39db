//! The node role: hosts agents.
//!
//! Composes: identity, cluster, store, agents, heartbeat. Never decides anything itself.

mod config;
mod error;
mod membership;
mod service;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cluster::beat::BeatSender;
use domain::{Incarnation, Member, Role};

pub use config::Config;
pub use error::Error;

use membership::Membership;
use service::Service;

/// Runs a node until `shutdown` ends.
///
/// # Errors
/// Something that the node needs cannot be had: a file, an address, an actor.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    config.check()?;
    let identity = net::Identity::load(&config.net)?;
    let id = identity.id();
    if id.role != Role::Node || id.name != config.name {
        return Err(Error::Name { name: config.name, id: id.to_string() });
    }
    let name = config.name.clone();
    let health = telemetry::Health::starting();
    let admin = telemetry::admin::serve(config.telemetry.admin, health.clone()).await?;
    tracing::info!(node = %name, admin = %admin.addr(), "starting");
    let mut stores = BTreeMap::new();
    for (store, config) in &config.stores {
        stores.insert(store.clone(), store::connect(config, &identity)?);
    }
    let me = Member { name, incarnation: first_incarnation() };
    let service = Arc::new(Service::default());
    let cluster = cluster::spawn(cluster::Args {
        config: config.cluster.clone(),
        identity: identity.clone(),
        incarnation: me.incarnation,
        service: service.clone(),
    })
    .await?;
    let (events, heard) = membership::channel();
    let views = events.clone();
    let agents = agent::spawn(agent::Args {
        config: config.agents.clone(),
        phases: config.phases.clone(),
        me,
        wire: Arc::new(cluster.clone()),
        stores,
        models: Arc::new(model::Registry::built_in()),
        tools: Arc::new(tool::Registry::from_config(&config.tools)),
        on_view: Box::new(move |view| membership::tell_view(&views, view)),
    })
    .await?;
    let source = agents.clone();
    let beats = BeatSender::spawn(
        config.beat.clone(),
        &identity,
        Vec::new(),
        Arc::new(move || source.beat()),
    )?;
    service.attach(agents.clone(), events);
    let membership =
        Membership { config, cluster: cluster.clone(), agents: agents.clone(), beats, health };
    let beats = membership.run(heard, shutdown).await;
    // In the opposite order: first nothing new comes, then what runs ends.
    agents.shutdown().await;
    beats.shutdown().await;
    cluster.shutdown().await;
    drop(admin);
    Ok(())
}

/// Later runs have larger numbers, as far as the clock is right; where it is not, the leader names the number to beat.
fn first_incarnation() -> Incarnation {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Incarnation(u64::try_from(since.as_millis()).unwrap_or(1))
}
