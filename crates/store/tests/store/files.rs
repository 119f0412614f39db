//! What files promise besides: a life after the process.

use domain::ErrorKind;
use proto::link::control_write::Write;
use proto::link::read_control::Read;
use proto::link::{ControlBatch, ControlWrite, ReadCluster, ReadControl, TakeLeadership};
use store::{EngineConfig, Error, FileStore, Store};

use crate::doors::Doors;
use crate::fixture::open;
use crate::rows::{SHARD, agent, done, fence, group, provision};

#[tokio::test]
async fn reopening_keeps_everything() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path());
    first.provision(SHARD, &provision()).await.unwrap();
    first.fence(SHARD, &fence(0, 1, 1)).await.unwrap();
    let mut written = group(0, &[(1, 0), (1, 1)]);
    written.agents = vec![agent(1, 2, 2)];
    first.commit(SHARD, written.into()).await.unwrap();
    let before = first.recover(SHARD).await.unwrap();
    first.close().await;
    let closed = first.owner(SHARD).await.unwrap_err();
    assert!(matches!(closed, Error::Unavailable { .. }), "{closed}");

    let second = open(folder.path());
    assert_eq!(second.recover(SHARD).await.unwrap(), before);
    assert_eq!(before.owner.head, 2);
    second.close().await;
}

#[tokio::test]
async fn what_waits_when_a_store_is_closed_is_still_done() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.provision(SHARD, &provision()).await.unwrap();
    store.fence(SHARD, &fence(0, 1, 1)).await.unwrap();
    let committing = (0..50).map(|head| store.commit(SHARD, group(head, &[(0, 0)]).into()));
    let (outcomes, ()) = futures::join!(futures::future::join_all(committing), store.close());
    let committed = outcomes.iter().filter(|outcome| outcome.is_ok()).count() as u64;
    let again = open(folder.path());
    assert_eq!(again.owner(SHARD).await.unwrap().head, committed);
    again.close().await;
}

#[tokio::test]
async fn a_second_store_on_a_directory_is_refused_with_the_pid_of_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path());
    let Err(refused) = FileStore::open(&folder.path().join("data"), EngineConfig::default()) else {
        panic!("two stores share a directory");
    };
    assert!(refused.to_string().contains(&format!("pid {}", std::process::id())), "{refused}");
    first.close().await;
    open(folder.path()).close().await;
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.provision(SHARD, &provision()).await.unwrap();
    store.close().await;
    let path = folder.path().join("data/shard-3.db");
    let database = libsql::Builder::new_local(&path).build().await.unwrap();
    let connection = database.connect().unwrap();
    let newer = "UPDATE meta SET v = '99' WHERE k = 'schema_version'";
    connection.execute(newer, ()).await.unwrap();
    drop((connection, database));

    let store = open(folder.path());
    let refused = store.owner(SHARD).await.unwrap_err();
    assert!(matches!(refused, Error::NewerSchema { .. }), "{refused}");
    assert!(refused.to_string().contains("shard-3 has schema version 99"), "{refused}");
    let refused = store.provision(SHARD, &provision()).await.unwrap_err();
    assert!(matches!(refused, Error::NewerSchema { .. }), "{refused}");
    store.close().await;
}

#[tokio::test]
async fn a_database_of_an_older_version_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.provision(SHARD, &provision()).await.unwrap();
    store.close().await;
    let path = folder.path().join("data/shard-3.db");
    let database = libsql::Builder::new_local(&path).build().await.unwrap();
    let connection = database.connect().unwrap();
    let older = "DROP INDEX work_notify; ALTER TABLE work DROP COLUMN parent;
                 ALTER TABLE work DROP COLUMN notify; UPDATE meta SET v = '1' WHERE k = 'schema_version'";
    connection.execute_batch(older).await.unwrap();

    let store = open(folder.path());
    assert_eq!(store.check(SHARD).await.unwrap().schema, 4);
    let columns =
        "SELECT count(*) FROM pragma_table_info('work') WHERE name IN ('parent', 'notify')";
    let mut rows = connection.query(columns, ()).await.unwrap();
    let row = rows.next().await.unwrap().unwrap();
    assert_eq!(row.get::<i64>(0).unwrap(), 2);
    drop((row, rows, connection, database));
    store.close().await;
}

#[tokio::test]
async fn a_cluster_of_an_older_version_keeps_its_id_and_names_no_authority_yet() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let take = TakeLeadership { name: "control-1".into(), expected_term: 0, expected_beat: 0 };
    let take = ControlWrite { write: Some(Write::Take(take)) };
    done(
        store
            .control(&ControlBatch { writes: vec![take], ..ControlBatch::default() })
            .await
            .unwrap(),
    );
    store.close().await;
    let path = folder.path().join("data/control.db");
    let database = libsql::Builder::new_local(&path).build().await.unwrap();
    let connection = database.connect().unwrap();
    let older = "ALTER TABLE shards DROP COLUMN epoch; ALTER TABLE shards DROP COLUMN standing;
                 ALTER TABLE cluster DROP COLUMN authorities; INSERT INTO cluster VALUES(1, 'c-1');
                 UPDATE meta SET v = '2' WHERE k = 'schema_version'";
    connection.execute_batch(older).await.unwrap();
    drop((connection, database));

    let store = open(folder.path());
    let read = ReadControl { read: Some(Read::Cluster(ReadCluster {})) };
    let found = store.read_control(&read).await.unwrap();
    assert_eq!((found.cluster_id.as_str(), found.authorities.len()), ("c-1", 0));
    assert_eq!(store.check("control").await.unwrap().schema, 4);
    store.close().await;
}

#[tokio::test]
async fn a_damaged_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("data")).unwrap();
    std::fs::write(folder.path().join("data/shard-3.db"), vec![b'x'; 8_192]).unwrap();
    let store = open(folder.path());
    let refused = store.owner(SHARD).await.unwrap_err();
    assert!(matches!(&refused, Error::Corrupt { what } if what == SHARD), "{refused}");
    store.close().await;
}

#[tokio::test]
async fn a_store_can_be_copied() {
    let doors = Doors::file();
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
