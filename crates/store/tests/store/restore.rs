//! A backup that takes the place of what a store holds.

use std::path::Path;

use domain::ErrorKind;
use proto::link::control_write::Write;
use proto::link::read_control::Read;
use proto::link::{
    ControlBatch, ControlWrite, PutCluster, PutShard, ReadCluster, ReadControl, ReadLeader,
    TakeLeadership,
};
use store::{CommitOutcome, FenceOutcome, FileStore, Restored, Store, restore};

use crate::fixture::open;
use crate::rows::{SHARD, done, fence, group, provision};

const NAME: &str = "monday";
const ROWS_AHEAD: u64 = 1 << 32;

fn control(leader: &str, term: u64, write: Write) -> ControlBatch {
    let writes = vec![ControlWrite { write: Some(write) }];
    ControlBatch { leader: leader.into(), term, writes }
}

/// A store whose control database names one shard, with two rows in it.
async fn with_two_rows(folder: &Path) -> FileStore {
    let store = open(folder);
    store.provision(SHARD, &provision()).await.unwrap();
    store.fence(SHARD, &fence(0, 1, 1)).await.unwrap();
    store.commit(SHARD, group(0, &[(0, 0), (0, 0)]).into()).await.unwrap();
    let take = TakeLeadership { name: "control-1".into(), expected_term: 0, expected_beat: 0 };
    done(store.control(&control("", 0, Write::Take(take))).await.unwrap());
    let cluster = PutCluster { cluster_id: "one".into(), authorities: vec!["theirs".into()] };
    done(store.control(&control("control-1", 1, Write::Cluster(cluster))).await.unwrap());
    let shard = PutShard { shard: 3, database: SHARD.into(), ..PutShard::default() };
    done(store.control(&control("control-1", 1, Write::Shard(shard))).await.unwrap());
    store
}

async fn back_up(store: &FileStore) {
    for database in ["control", SHARD] {
        store.backup(database, NAME).await.unwrap();
    }
}

#[tokio::test]
async fn a_restored_database_belongs_to_nobody_and_no_earlier_writer_gets_in() {
    let folder = tempfile::tempdir().unwrap();
    let store = with_two_rows(folder.path()).await;
    back_up(&store).await;
    store.commit(SHARD, group(2, &[(0, 0)]).into()).await.unwrap();
    let before = store.owner(SHARD).await.unwrap();
    store.close().await;

    let data = folder.path().join("data");
    let Restored { databases, replaced, unread } = restore(&data, NAME).unwrap();
    assert_eq!((databases, unread), (vec!["control".to_owned(), SHARD.to_owned()], vec![]));
    // What was there is kept, with the row that the backup lacks.
    assert!(replaced.unwrap().join(format!("{SHARD}.db")).exists());

    let store = open(folder.path());
    let owner = store.owner(SHARD).await.unwrap();
    assert_eq!((owner.node.as_str(), owner.incarnation, owner.epoch), ("", 0, 1_000_001));
    // Behind what it replaces, too.
    assert_eq!(owner.head, 3 + ROWS_AHEAD);
    assert_ne!(before.database_id, owner.database_id);
    // The owner of before goes on where it was, and where the restored log is.
    for head in [3, owner.head] {
        let outcome = store.commit(SHARD, group(head, &[(0, 0)]).into()).await.unwrap();
        assert!(matches!(outcome, CommitOutcome::Fenced { .. }), "{outcome:?}");
    }
    let leader = ReadControl { read: Some(Read::Leader(ReadLeader {})) };
    let leader = store.read_control(&leader).await.unwrap().leader.unwrap();
    assert_eq!((leader.name.as_str(), leader.term), ("", 1_000_001));
    // Who restores may have other certificates than who made the backup; it is the same cluster.
    let cluster = ReadControl { read: Some(Read::Cluster(ReadCluster {})) };
    let cluster = store.read_control(&cluster).await.unwrap();
    assert_eq!((cluster.cluster_id.as_str(), cluster.authorities.len()), ("one", 0));
    // A new owner writes behind everything that was ever numbered.
    let fenced = store.fence(SHARD, &fence(owner.epoch, 2, 1_000_002)).await.unwrap();
    let FenceOutcome::Fenced(row) = fenced else { panic!("{fenced:?}") };
    assert_eq!((row.epoch, row.head), (1_000_002, owner.head));
    store.close().await;
}

#[tokio::test]
async fn a_backup_that_is_missing_or_not_complete_replaces_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = with_two_rows(folder.path()).await;
    store.backup("control", NAME).await.unwrap();
    let data = folder.path().join("data");
    let running = restore(&data, NAME).unwrap_err();
    assert_eq!(running.kind(), ErrorKind::Conflict, "{running}");
    store.close().await;

    let unknown = restore(&data, "tuesday").unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::NotFound, "{unknown}");
    let partial = restore(&data, NAME).unwrap_err();
    assert!(partial.to_string().contains(SHARD), "{partial}");
    std::fs::write(data.join(format!("backups/{NAME}.{SHARD}.db")), [b'x'; 8_192]).unwrap();
    let damaged = restore(&data, NAME).unwrap_err();
    assert!(damaged.to_string().contains(SHARD), "{damaged}");
    let store = open(folder.path());
    assert_eq!(store.owner(SHARD).await.unwrap().head, 2);
    store.close().await;
}

#[tokio::test]
async fn what_cannot_be_read_is_replaced_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = with_two_rows(folder.path()).await;
    back_up(&store).await;
    store.close().await;
    let data = folder.path().join("data");
    std::fs::write(data.join(format!("{SHARD}.db")), [b'x'; 8_192]).unwrap();
    assert_eq!(restore(&data, NAME).unwrap().unread, [SHARD]);
    let store = open(folder.path());
    assert_eq!(store.owner(SHARD).await.unwrap().head, 2 + ROWS_AHEAD);
    store.close().await;
}

#[tokio::test]
async fn a_restore_that_was_cut_off_is_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = with_two_rows(folder.path()).await;
    back_up(&store).await;
    store.close().await;
    let data = folder.path().join("data");
    std::fs::write(data.join("restoring"), NAME).unwrap();
    let Err(half) = FileStore::open(&data, store::EngineConfig::default()) else {
        panic!("a store opens what is half restored");
    };
    assert!(half.to_string().contains("stagedoor store restore"), "{half}");
    restore(&data, NAME).unwrap();
    let store = open(folder.path());
    assert_eq!(store.owner(SHARD).await.unwrap().head, 2 + ROWS_AHEAD);
    store.close().await;
}

/// Of a time before the shard had an owner: works that came after it have ids all the same, and none gets one of those.
#[tokio::test]
async fn a_backup_without_rows_gives_no_row_number_away_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.provision(SHARD, &provision()).await.unwrap();
    // Makes the control database.
    store.read_control(&ReadControl { read: Some(Read::Leader(ReadLeader {})) }).await.unwrap();
    back_up(&store).await;
    store.fence(SHARD, &fence(0, 1, 1)).await.unwrap();
    store.commit(SHARD, group(0, &[(0, 0), (0, 0)]).into()).await.unwrap();
    store.close().await;
    restore(&folder.path().join("data"), NAME).unwrap();
    let store = open(folder.path());
    assert_eq!(store.owner(SHARD).await.unwrap().head, 2 + ROWS_AHEAD);
    store.close().await;
}
