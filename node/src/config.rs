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
    /// How long a node that was told to end may take to hand everything over, milliseconds.
    #[serde(default = "drain_timeout_ms")]
    pub drain_timeout_ms: u64,
    /// By their names in grants.
    pub stores: BTreeMap<String, store::Config>,
    #[serde(default)]
    pub phases: agent::PhasesConfig,
    #[serde(default)]
    pub agents: agent::Config,
    #[serde(default)]
    pub tools: tool::Config,
    #[serde(default)]
    pub beat: cluster::beat::SenderConfig,
}

impl Config {
    /// What the types cannot say.
    ///
    /// # Errors
    /// The part that is missing, malformed or out of its range.
    pub fn check(&self) -> Result<(), Error> {
        if self.controls()?.is_empty() {
            return Err(Error::NoControl);
        }
        if self.stores.is_empty() {
            return Err(Error::NoStore);
        }
        if self.capacity == 0 {
            return Err(Error::Capacity);
        }
        self.stores.values().try_for_each(store::Config::check)?;
        self.agents.check()?;
        Ok(self.phases.check()?)
    }

    /// The control replicas with the address of each.
    pub(crate) fn controls(&self) -> Result<Vec<(Peer, String)>, Error> {
        let numbered = self.controls.iter().enumerate();
        let controls = numbered.map(|(index, text)| {
            let (name, address) = match text.split_once('=') {
                Some((name, address)) => (name.to_owned(), address),
                None => (format!("control-{}", index + 1), text.as_str()),
            };
            let wrong = |source| Error::Control { text: text.clone(), source };
            let name = name.parse().map_err(|source| wrong(Some(source)))?;
            if !net::is_address(address) {
                return Err(wrong(None));
            }
            Ok((Peer::new(Role::Control, name), address.to_owned()))
        });
        controls.collect()
    }
}

fn one() -> u32 {
    1
}

/// Less than what Kubernetes gives a pod before it kills it.
fn drain_timeout_ms() -> u64 {
    25_000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(controls: &[&str]) -> Config {
        let text = r#"
            name = "node-1"
            controls = []
            cluster = { cookie = "cookie" }
            net = { certificate = "c", key = "k", ca = "ca" }
            stores = { main = { address = "127.0.0.1:1" } }
        "#;
        let config: Config = toml::from_str(text).unwrap();
        Config { controls: controls.iter().map(|text| (*text).to_owned()).collect(), ..config }
    }

    #[test]
    fn a_control_replica_has_the_name_that_is_given_or_its_number() {
        let controls = config(&["127.0.0.1:1", "left=host:2", "127.0.0.1:3"]).controls().unwrap();
        let shown: Vec<_> =
            controls.iter().map(|(peer, address)| format!("{peer} {address}")).collect();
        let expected = [
            "control/control-1 127.0.0.1:1",
            "control/left host:2",
            "control/control-3 127.0.0.1:3",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_control_replica_with_an_impossible_name_is_named() {
        let error = config(&["Left=host:2"]).controls().unwrap_err();
        assert!(error.to_string().contains("Left=host:2"));
    }

    #[test]
    fn a_config_that_cannot_work_is_refused_before_anything_starts() {
        assert!(config(&["127.0.0.1:1"]).check().is_ok());
        for controls in [&[][..], &["127.0.0.1"], &["left=:2"], &["left=host:port"]] {
            assert!(config(controls).check().is_err(), "{controls:?}");
        }
        let good = || config(&["127.0.0.1:1"]);
        assert!(Config { capacity: 0, ..good() }.check().is_err());
        assert!(Config { stores: BTreeMap::new(), ..good() }.check().is_err());
        let mut idle = good();
        idle.phases.workers = 0;
        let error = idle.check().unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("phases.workers"));
        let mut odd = good();
        odd.stores.get_mut("main").unwrap().engine = store::Engine::Hrana;
        assert!(odd.check().is_err());
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = toml::from_str::<Config>("name = \"node-1\"\nzones = 1").unwrap_err();
        assert!(error.to_string().contains("zones"));
    }
}
