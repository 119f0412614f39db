//! Stores on a real sqld, as control and as a node would be configured.

use std::sync::Arc;

use store::{Config, Engine, HranaStore, Store};
use tests::harness::{ADMIN_KEY, Sqld};

use crate::doors::Doors;

/// What serves a store.
pub(crate) struct Behind(pub(crate) Sqld);

impl Doors {
    #[allow(clippy::unused_async, reason = "others await it")]
    pub(crate) async fn any() -> Option<Self> {
        net::install_crypto_provider();
        let sqld = Sqld::start()?;
        let (control, node) = (store(control_config(&sqld)), store(node_config(&sqld)));
        let folder = tempfile::tempdir().unwrap();
        Some(Self { control, node, folder, behind: Behind(sqld) })
    }

    pub(crate) async fn restartable() -> Option<Self> {
        Self::any().await
    }

    #[allow(clippy::unused_async, reason = "others await it")]
    pub(crate) async fn end(self) {
        drop(self);
    }

    /// Kills the server and starts it again.
    #[allow(clippy::unused_async, reason = "others await it")]
    pub(crate) async fn restart(&mut self) {
        self.behind.0.kill();
        self.behind.0.start_again();
    }

    pub(crate) fn sqld(&mut self) -> &mut Sqld {
        &mut self.behind.0
    }
}

pub(crate) fn store(config: Config) -> Arc<dyn Store> {
    Arc::new(HranaStore::new(&config).unwrap())
}

pub(crate) fn node_config(sqld: &Sqld) -> Config {
    Config {
        engine: Engine::Hrana,
        url: sqld.url(),
        token_file: Some(sqld.write_secret("token", &sqld.token())),
        namespace_prefix: "test-".to_owned(),
        ..Config::default()
    }
}

pub(crate) fn control_config(sqld: &Sqld) -> Config {
    Config {
        admin_url: Some(sqld.admin_url()),
        admin_token_file: Some(sqld.write_secret("admin-token", ADMIN_KEY)),
        ..node_config(sqld)
    }
}
