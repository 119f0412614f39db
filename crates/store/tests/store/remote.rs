//! What the store role promises besides: who may do what, and what a lost connection means.

use std::sync::Arc;
use std::time::Duration;

use domain::ErrorKind;
use proto::link::{ControlBatch, ReadControl, ReadLeader, read_control};
use store::{CommitOutcome, Error, Store};

use crate::doors::{Doors, eventually};
use crate::fixture::{Served, identity};
use crate::rows::{SHARD, fence, group, provision};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_may_not_fence_and_control_may_not_commit() {
    let doors = Doors::remote().await;
    doors.owned().await;
    let denied = |error: Error| assert_eq!(error.kind(), ErrorKind::Denied, "{error}");
    denied(doors.node.fence(SHARD, &fence(1, 2, 1)).await.unwrap_err());
    denied(doors.node.provision(SHARD, &provision()).await.unwrap_err());
    denied(doors.node.control(&ControlBatch::default()).await.unwrap_err());
    let read = ReadControl { read: Some(read_control::Read::Leader(ReadLeader {})) };
    denied(doors.node.read_control(&read).await.unwrap_err());
    denied(doors.node.backup(SHARD, "copy").await.unwrap_err());
    denied(doors.control.commit(SHARD, group(0, &[(1, 0)]).into()).await.unwrap_err());
    // A refusal ends nothing: the stream still serves.
    doors.committed(group(0, &[(1, 0)])).await;
    assert_eq!(doors.node.owner(SHARD).await.unwrap().epoch, 1);
    doors.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_refused() {
    let doors = Doors::remote().await;
    let client = doors.served().client("client/ann");
    let refused = client.owner(SHARD).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
    let refused = client.provision(SHARD, &provision()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
    doors.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_comes_back_after_a_restart() {
    let mut doors = Doors::remote().await;
    doors.owned().await;
    doors.committed(group(0, &[(1, 0)])).await;
    doors.restart().await;
    eventually("the write stream is open again", async || {
        match doors.node.commit(SHARD, group(1, &[(1, 1)]).into()).await {
            Ok(outcome) => outcome == CommitOutcome::Committed,
            // Never sent, or lost: both may happen while the old connection goes down.
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
                false
            }
        }
    })
    .await;
    assert_eq!(doors.head().await, 2);
    doors.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_not_there_is_unavailable_and_a_write_was_not_sent() {
    let mut doors = Doors::remote().await;
    doors.owned().await;
    let (ca, address) = doors.stop_serving().await;
    let config = store::Config { address, ..store::Config::default() };
    let fresh = store::RemoteStore::new(&config, &identity(&ca, "node/node-2")).unwrap();
    let failed = fresh.commit(SHARD, group(0, &[(1, 0)]).into()).await.unwrap_err();
    assert!(
        matches!(failed, Error::Unavailable { .. }) && failed.is_certainly_not_done(),
        "{failed}"
    );
    let failed = fresh.owner(SHARD).await.unwrap_err();
    assert!(matches!(failed, Error::Unavailable { .. }), "{failed}");
    doors.end().await;
}

/// A peer that lets everybody in and never answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_does_not_answer_fails_within_the_deadline() {
    let ca = net::pki::Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let roles = [domain::Role::Node];
    let (identity_of_store, protocol) = (identity(&ca, "store/store-1"), net::Protocol::Grpc);
    let listener =
        net::Listener::bind(any, &identity_of_store, protocol, &roles, Default::default());
    let listener = listener.await.unwrap();
    let config = store::Config {
        address: listener.local_addr().to_string(),
        write_timeout_ms: 200,
        read_timeout_ms: 200,
        in_flight_max: 2,
        ..store::Config::default()
    };
    let silent = Arc::new(store::RemoteStore::new(&config, &identity(&ca, "node/node-1")).unwrap());
    let commit = || {
        let silent = silent.clone();
        tokio::spawn(async move { silent.commit(SHARD, group(0, &[(1, 0)]).into()).await })
    };
    let (first, second) = (commit(), commit());
    let unknown = first.await.unwrap().unwrap_err();
    assert!(matches!(unknown, Error::Unknown { .. }), "{unknown}");
    assert!(matches!(second.await.unwrap(), Err(Error::Unknown { .. })));
    // Both keep their places: nobody knows yet what became of them.
    let full = commit().await.unwrap().unwrap_err();
    assert!(matches!(full, Error::Overloaded { .. }), "{full}");
    let read = tokio::time::timeout(Duration::from_secs(20), silent.owner(SHARD)).await.unwrap();
    assert!(matches!(read, Err(Error::Unavailable { .. })));
    drop(listener);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_of_a_shard_keep_their_order_on_the_wire() {
    let doors = Doors::remote().await;
    doors.owned().await;
    let commits = (0..500).map(|head| doors.commit(group(head, &[(1, head)])));
    let outcomes = futures::future::join_all(commits).await;
    assert!(outcomes.iter().all(|outcome| *outcome == CommitOutcome::Committed));
    assert_eq!(doors.head().await, 500);
    doors.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_is_no_store_may_not_serve_one() {
    let folder = tempfile::tempdir().unwrap();
    let ca = net::pki::Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
    let served = Served::start(ca, folder.path(), "127.0.0.1:0").await;
    let config = store::role::Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        data_dir: folder.path().join("other"),
        net: net::Config { certificate: "-".into(), key: "-".into(), ca: "-".into() },
        engine: Default::default(),
        listener: Default::default(),
        telemetry: Default::default(),
    };
    let node = identity(&served.ca, "node/node-1");
    let refused = store::role::Server::bind(&config, &node).await.err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
    served.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_role_runs_from_files_until_it_is_told_to_stop() {
    let folder = tempfile::tempdir().unwrap();
    let pki = folder.path().join("pki");
    let ca = net::pki::init(&pki, &"stagedoor.local".parse().unwrap()).unwrap();
    let id = "spiffe://stagedoor.local/store/store-1".parse().unwrap();
    let issued = ca.issue(&id, net::pki::Validity::default()).unwrap();
    let written = issued.write(&pki, "store-1").unwrap();
    let config = store::role::Config {
        listen: "127.0.0.1:0".parse().unwrap(),
        data_dir: folder.path().join("data"),
        net: net::Config {
            certificate: written.certificate,
            key: written.key,
            ca: pki.join("ca.crt"),
        },
        engine: Default::default(),
        listener: Default::default(),
        telemetry: Default::default(),
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(store::role::run(config.clone(), async { _ = stopped.await }));
    let lock = folder.path().join("data/control.db");
    eventually("it has its directory", async || lock.exists()).await;
    let second = store::role::run(config.clone(), std::future::pending()).await.unwrap_err();
    assert!(matches!(second, Error::Locked { .. }), "{second}");
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
    store::role::run(config, std::future::ready(())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_can_be_copied() {
    let doors = Doors::remote().await;
    doors.owned().await;
    doors.control.backup(SHARD, "copy").await.unwrap();
    let copy = doors.folder.path().join("data/backups/copy.shard-3.db");
    assert!(0 < std::fs::metadata(&copy).unwrap().len());
    let again = doors.control.backup(SHARD, "copy").await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Invalid);
    let outside = doors.control.backup(SHARD, "../copy").await.unwrap_err();
    assert_eq!(outside.kind(), ErrorKind::Invalid);
    doors.end().await;
}
