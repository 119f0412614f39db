use std::collections::BTreeMap;
use std::net::SocketAddr;

use cluster::Peer;
use domain::{ProcessName, Role};
use serde::{Deserialize, Serialize};

use crate::Error;

/// The store of the control database and of all shards.
pub(crate) const STORE: &str = "main";

/// One control process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// As in the certificate.
    pub name: ProcessName,
    /// Where clients are served.
    #[serde(default)]
    pub api: Api,
    /// How this process takes part in the cluster.
    #[serde(default)]
    pub cluster: cluster::Config,
    /// Where nodes beat.
    #[serde(default)]
    pub beat: Beat,
    /// Cluster listeners of all control replicas, `name=host:port`, this one among them or not: they dial each other.
    #[serde(default)]
    pub controls: Vec<String>,
    /// Certificate, key and CA.
    pub net: net::Config,
    /// Logs, traces, health and metrics.
    #[serde(default)]
    pub telemetry: telemetry::Config,
    /// The stores by name; `main` is needed.
    pub stores: BTreeMap<String, store::Config>,
    /// How this replica leads.
    #[serde(default)]
    pub scheduler: scheduler::Config,
}

/// The gRPC server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    pub listen: SocketAddr,
    /// How many may knock at once, and for how long.
    pub listener: net::ListenerConfig,
    pub limits: Limits,
}

/// What one client may ask of the gRPC server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The largest request, bytes.
    pub message_bytes_max: usize,
    /// Calls under way on one connection.
    pub streams_max: u32,
    /// For calls under way when the process stops, milliseconds.
    pub drain_timeout_ms: u64,
}

/// The heartbeat listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Beat {
    pub listen: SocketAddr,
    /// What nodes are told, `host:port`; without it the address that is listened on.
    pub advertise: Option<String>,
    /// How many may knock at once, and for how long.
    pub listener: net::ListenerConfig,
    /// Silence after which a connection is given up, milliseconds. Verdicts fall long before.
    pub silence_timeout_ms: u64,
}

impl Default for Api {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7400)),
            listener: net::ListenerConfig::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { message_bytes_max: 8 << 20, streams_max: 4_096, drain_timeout_ms: 3_000 }
    }
}

impl Default for Beat {
    fn default() -> Self {
        let cluster::beat::ListenerConfig { listen, listener, silence_timeout_ms } =
            Default::default();
        Self { listen, advertise: None, listener, silence_timeout_ms }
    }
}

impl Config {
    /// # Errors
    /// A part that is missing or out of its range.
    pub fn check(&self) -> Result<(), Error> {
        self.scheduler.check()?;
        self.replicas()?;
        Ok(self.store()?.check()?)
    }

    /// The other control replicas, and where each is.
    pub(crate) fn replicas(&self) -> Result<Vec<(Peer, String)>, Error> {
        let mut replicas = Vec::new();
        for text in &self.controls {
            let wrong = || Error::Replica { text: text.clone() };
            let (name, address) = text.split_once('=').ok_or_else(wrong)?;
            let name: ProcessName = name.parse().map_err(|_| wrong())?;
            if !net::is_address(address) {
                return Err(wrong());
            }
            if name != self.name {
                replicas.push((Peer::new(Role::Control, name), address.to_owned()));
            }
        }
        Ok(replicas)
    }

    pub(crate) fn store(&self) -> Result<&store::Config, Error> {
        self.stores.get(STORE).ok_or(Error::NoStore { name: STORE })
    }
}

/// Where a store is, for people.
pub(crate) fn store_url(store: &store::Config) -> String {
    match store.engine {
        store::Engine::Remote => store.address.clone(),
        store::Engine::File => format!("file:{}", store.directory.display()),
        store::Engine::Hrana => store.url.clone(),
    }
}

impl Beat {
    pub(crate) fn listener_config(&self) -> cluster::beat::ListenerConfig {
        cluster::beat::ListenerConfig {
            listen: self.listen,
            listener: self.listener.clone(),
            silence_timeout_ms: self.silence_timeout_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "name = 'control-1'\n\
        [net]\ncertificate = 'a'\nkey = 'b'\nca = 'c'\n\
        [stores.main]\naddress = '127.0.0.1:7600'\n";

    #[test]
    fn a_config_sets_only_what_differs() {
        let config: Config = toml::from_str(LEAST).unwrap();
        assert_eq!(config.api, Api::default());
        assert!(config.check().is_ok());
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
    }

    #[test]
    fn an_unknown_key_and_a_missing_store_are_named() {
        let error = toml::from_str::<Config>(&format!("nmae = 1\n{LEAST}")).unwrap_err();
        assert!(error.to_string().contains("nmae"), "{error}");
        let mut config: Config = toml::from_str(LEAST).unwrap();
        config.stores.clear();
        assert!(config.check().unwrap_err().to_string().contains("stores.main"));
    }

    #[test]
    fn a_replica_that_cannot_be_dialled_is_named() {
        for text in ["127.0.0.1:1", "control-2=nonsense", "control-2=:7", "Control=host:7"] {
            let mut config: Config = toml::from_str(LEAST).unwrap();
            config.controls = vec![text.to_owned()];
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("name=host:port"), "{error}");
        }
    }
}
