//! The stores that this crate has without any other program: files, and the store role in this process.

use std::path::Path;
use std::sync::Arc;

use net::pki::{Ca, Validity};
use store::role::{Config, Server};
use store::{FileStore, RemoteStore, Store};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::doors::Doors;

/// What serves a store.
pub(crate) struct Behind(Option<Served>);

/// A store role in this process.
pub(crate) struct Served {
    pub(crate) ca: Ca,
    pub(crate) address: String,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Doors {
    /// What the tests use that do not care.
    #[allow(clippy::unused_async, reason = "others have to start a process for it")]
    pub(crate) async fn any() -> Option<Self> {
        Some(Self::file())
    }

    /// Over something that can be started again.
    pub(crate) async fn restartable() -> Option<Self> {
        Some(Self::remote().await)
    }

    pub(crate) fn file() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(open(folder.path()));
        Self { control: store.clone(), node: store, folder, behind: Behind(None) }
    }

    pub(crate) async fn remote() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
        let served = Served::start(ca, folder.path(), "127.0.0.1:0").await;
        let (control, node) = (served.client("control/control-1"), served.client("node/node-1"));
        Self { control, node, folder, behind: Behind(Some(served)) }
    }

    /// Ends what runs; files and all.
    pub(crate) async fn end(self) {
        if let Some(served) = self.behind.0 {
            served.stop().await;
        }
    }

    /// Stops the store role and starts it again on the same port.
    pub(crate) async fn restart(&mut self) {
        let Self { behind: Behind(behind), folder, .. } = self;
        restart(behind, folder).await;
    }

    pub(crate) async fn stop_serving(&mut self) -> (Ca, String) {
        let served = self.behind.0.take().unwrap();
        let address = served.address.clone();
        (served.stop().await, address)
    }

    pub(crate) fn served(&self) -> &Served {
        self.behind.0.as_ref().unwrap()
    }
}

async fn restart(behind: &mut Option<Served>, folder: &TempDir) {
    let served = behind.take().unwrap();
    let address = served.address.clone();
    let ca = served.stop().await;
    *behind = Some(Served::start(ca, folder.path(), &address).await);
}

impl Served {
    pub(crate) async fn start(ca: Ca, folder: &Path, listen: &str) -> Self {
        let identity = identity(&ca, "store/store-1");
        let config = Config {
            listen: listen.parse().unwrap(),
            data_dir: folder.join("data"),
            // The identity is handed over, not read.
            net: net::Config { certificate: "-".into(), key: "-".into(), ca: "-".into() },
            engine: Default::default(),
            listener: Default::default(),
            telemetry: Default::default(),
        };
        let server = Server::bind(&config, &identity).await.unwrap();
        let address = server.local_addr().to_string();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let shutdown = async { _ = stopped.await };
            server.run(shutdown, || ()).await.unwrap();
        });
        Self { ca, address, stop, task }
    }

    pub(crate) fn client(&self, role_and_name: &str) -> Arc<dyn Store> {
        let config = store::Config { address: self.address.clone(), ..store::Config::default() };
        Arc::new(RemoteStore::new(&config, &identity(&self.ca, role_and_name)).unwrap())
    }

    pub(crate) async fn stop(self) -> Ca {
        self.stop.send(()).unwrap();
        self.task.await.unwrap();
        self.ca
    }
}

pub(crate) fn identity(ca: &Ca, role_and_name: &str) -> net::Identity {
    let id = format!("spiffe://stagedoor.local/{role_and_name}").parse().unwrap();
    let issued = ca.issue(&id, Validity::default()).unwrap();
    net::Identity::from_pem(&issued.certificate_pem, &issued.key_pem, ca.certificate_pem()).unwrap()
}

pub(crate) fn open(folder: &Path) -> FileStore {
    FileStore::open(&folder.join("data"), store::EngineConfig::default()).unwrap()
}
