//! Everything that can be set about a node.

use std::collections::BTreeMap;

use cluster::Peer;
use domain::{ProcessName, Role};
use serde::Deserialize;

use crate::Error;

/// The tree of a node's config.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name in its certificate.
    pub name: ProcessName,
    /// Agents are spread over zones; empty: no zones.
    #[serde(default)]
    pub zone: String,
    /// Its share of the shards, compared with the other nodes'.
    #[serde(default = "one")]
    pub capacity: u32,
    /// Cluster listeners of control replicas, `name=host:port`. Without a name the first is control-1, and so on.
    pub controls: Vec<String>,
    pub cluster: cluster::Config,
    pub net: net::Config,
    #[serde(default)]
    pub telemetry: telemetry::Config,
    /// By their names in grants.
    pub stores: BTreeMap<String, store::Config>,
    #[serde(default)]
    pub phases: agent::PhasesConfig,
    #[serde(default)]
    pub agents: agent::Config,
    #[serde(default)]
    pub beat: cluster::beat::SenderConfig,
}

impl Config {
    /// The control replicas with the address of each.
    pub(crate) fn controls(&self) -> Result<Vec<(Peer, String)>, Error> {
        let numbered = self.controls.iter().enumerate();
        let controls = numbered.map(|(index, text)| {
            let (name, address) = match text.split_once('=') {
                Some((name, address)) => (name.to_owned(), address),
                None => (format!("control-{}", index + 1), text.as_str()),
            };
            let name =
                name.parse().map_err(|source| Error::Control { text: text.clone(), source })?;
            Ok((Peer::new(Role::Control, name), address.to_owned()))
        });
        controls.collect()
    }
}

fn one() -> u32 {
    1
}
