//! One store, as control sees it and as a node sees it, whatever is behind it.

use std::sync::Arc;
use std::time::Duration;

use proto::link::{Group, OwnerRow};
use store::{CommitOutcome, FenceOutcome, Store};
use tempfile::TempDir;

use crate::fixture::Behind;
use crate::rows::{SHARD, fence, provision};

/// Longer than anything honest takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Doors {
    pub(crate) control: Arc<dyn Store>,
    pub(crate) node: Arc<dyn Store>,
    /// Where those that have files have them.
    #[allow(dead_code, reason = "not every store has files")]
    pub(crate) folder: TempDir,
    pub(crate) behind: Behind,
}

impl Doors {
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

/// Waits until the condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "it never happened: {what}");
}
