//! Stores to test, and the rows that the tests write.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use net::pki::{Ca, Validity};
use proto::link::{
    AgentRow, ControlAnswer, Fence, Group, LeaderRow, LogRow, OwnerRow, Provision, WorkRow,
};
use store::role::{Config, Server};
use store::{CommitOutcome, ControlOutcome, FenceOutcome, FileStore, RemoteStore, Store};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longer than anything honest takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
pub(crate) const CLUSTER: &str = "cluster-1";
pub(crate) const SHARD: &str = "shard-3";

/// One store, as control sees it and as a node sees it.
pub(crate) struct Doors {
    pub(crate) control: Arc<dyn Store>,
    pub(crate) node: Arc<dyn Store>,
    pub(crate) folder: TempDir,
    served: Option<Served>,
}

/// A store role in this process.
pub(crate) struct Served {
    pub(crate) ca: Ca,
    pub(crate) address: String,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Doors {
    pub(crate) fn file() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(open(folder.path()));
        Self { control: store.clone(), node: store, folder, served: None }
    }

    pub(crate) async fn remote() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
        let served = Served::start(ca, folder.path(), "127.0.0.1:0").await;
        let (control, node) = (served.client("control/control-1"), served.client("node/node-1"));
        Self { control, node, folder, served: Some(served) }
    }

    /// Ends what runs; files and all.
    pub(crate) async fn end(self) {
        if let Some(served) = self.served {
            served.stop().await;
        }
    }

    /// Stops the store role and starts it again on the same port.
    pub(crate) async fn restart(&mut self) {
        let served = self.served.take().unwrap();
        let address = served.address.clone();
        let ca = served.stop().await;
        self.served = Some(Served::start(ca, self.folder.path(), &address).await);
    }

    pub(crate) async fn stop_serving(&mut self) -> (Ca, String) {
        let served = self.served.take().unwrap();
        let address = served.address.clone();
        (served.stop().await, address)
    }

    pub(crate) fn served(&self) -> &Served {
        self.served.as_ref().unwrap()
    }

    /// A shard that node-1 owns in epoch 1.
    pub(crate) async fn owned(&self) -> OwnerRow {
        self.control.provision(SHARD, &provision()).await.unwrap();
        self.fence(0, 1, 1).await
    }

    pub(crate) async fn fence(&self, expected: u64, incarnation: u64, term: u64) -> OwnerRow {
        match self.control.fence(SHARD, &fence(expected, incarnation, term)).await.unwrap() {
            FenceOutcome::Fenced(row) => row,
            FenceOutcome::Lost(row) => panic!("lost to {row:?}"),
        }
    }

    pub(crate) async fn commit(&self, group: Group) -> CommitOutcome {
        self.node.commit(SHARD, Arc::new(group)).await.unwrap()
    }

    pub(crate) async fn committed(&self, group: Group) {
        assert_eq!(self.commit(group).await, CommitOutcome::Committed);
    }

    pub(crate) async fn head(&self) -> u64 {
        self.node.owner(SHARD).await.unwrap().head
    }
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

pub(crate) fn provision() -> Provision {
    Provision { cluster_id: CLUSTER.to_owned(), shard: 3 }
}

pub(crate) fn fence(expected: u64, incarnation: u64, term: u64) -> Fence {
    Fence { expected, node: "node-1".to_owned(), incarnation, term }
}

/// A group of epoch 1 with these rows: (agent, prev), numbered after `head`.
pub(crate) fn group(head: u64, rows: &[(u64, u64)]) -> Group {
    let row = |(lsn, (agent, prev)): (u64, &(u64, u64))| LogRow {
        lsn,
        agent: *agent,
        prev: *prev,
        seq: lsn,
        work: 0,
        kind: 1,
        ts_ms: 1_000 + lsn as i64,
        payload: Bytes::from(format!("entry {lsn}")),
        epoch: 1,
    };
    let rows = (head + 1..).zip(rows).map(row).collect();
    Group { epoch: 1, head, rows, ..Group::default() }
}

pub(crate) fn agent(id: u64, head: u64, snap_lsn: u64) -> AgentRow {
    AgentRow {
        id,
        tenant: "acme".to_owned(),
        name: "support".to_owned(),
        key: format!("user-{id}"),
        head,
        snap_lsn,
        last_work: 0,
        state: Bytes::from(format!("state of {id} at {snap_lsn}")),
    }
}

pub(crate) fn work(id: u64, agent: u64, prev_work: u64, state: u32) -> WorkRow {
    WorkRow {
        id,
        agent,
        prev_work,
        state,
        reason: 1,
        create_ms: 1_000 + id as i64,
        end_ms: if state < 6 { 0 } else { 2_000 + id as i64 },
        definition: Bytes::from_static(&[7; 32]),
        slot: 99,
        record: Bytes::from(format!("record of {id}")),
    }
}

pub(crate) fn done(outcome: ControlOutcome) -> ControlAnswer {
    match outcome {
        ControlOutcome::Done(answer) => answer,
        ControlOutcome::NotLeader(row) => panic!("{row:?} leads"),
    }
}

pub(crate) fn not_leader(outcome: ControlOutcome) -> LeaderRow {
    match outcome {
        ControlOutcome::Done(answer) => panic!("done: {answer:?}"),
        ControlOutcome::NotLeader(row) => row,
    }
}

/// Waits until the condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "it never happened: {what}");
}
