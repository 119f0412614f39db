//! A store whose commits go wrong as told, between a writer and a real store.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use proto::link::*;
use store::{CommitOutcome, ControlOutcome, Error, FenceOutcome, Recovery, Store};
use tokio::sync::Semaphore;

/// What becomes of one commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Done, and the answer is lost.
    AnswerLost,
    /// Lost on its way.
    RequestLost,
    /// Certainly not sent.
    Refused,
    /// The store is broken for good.
    Broken,
}

pub(crate) struct Faulty {
    inner: Arc<dyn Store>,
    /// For the next commits; then they go well.
    pub(crate) plan: Mutex<VecDeque<Fault>>,
    /// Positions that cannot be read before one can.
    pub(crate) unreadable: Mutex<usize>,
    /// A commit takes one and keeps it.
    pub(crate) gate: Semaphore,
    pub(crate) seen: Mutex<Vec<Arc<Group>>>,
}

impl Faulty {
    pub(crate) fn new(inner: Arc<dyn Store>, plan: &[Fault]) -> Arc<Self> {
        Arc::new(Self {
            inner,
            plan: Mutex::new(plan.iter().copied().collect()),
            unreadable: Mutex::new(0),
            gate: Semaphore::new(Semaphore::MAX_PERMITS),
            seen: Mutex::default(),
        })
    }

    /// Lets no commit begin before the gate gets permits.
    pub(crate) fn gated(inner: Arc<dyn Store>) -> Arc<Self> {
        let store = Self::new(inner, &[]);
        store.gate.forget_permits(Semaphore::MAX_PERMITS);
        store
    }
}

#[async_trait]
impl Store for Faulty {
    async fn commit(&self, database: &str, group: Arc<Group>) -> Result<CommitOutcome, Error> {
        self.seen.lock().unwrap().push(group.clone());
        self.gate.acquire().await.unwrap().forget();
        let fault = self.plan.lock().unwrap().pop_front();
        match fault {
            None => self.inner.commit(database, group).await,
            Some(Fault::AnswerLost) => {
                self.inner.commit(database, group).await?;
                Err(Error::Unknown { what: "planned".to_owned() })
            }
            Some(Fault::RequestLost) => Err(Error::Unknown { what: "planned".to_owned() }),
            Some(Fault::Refused) => {
                Err(Error::Unavailable { what: "planned".to_owned(), source: None })
            }
            Some(Fault::Broken) => Err(Error::Corrupt { what: "planned".to_owned() }),
        }
    }

    async fn owner(&self, database: &str) -> Result<OwnerRow, Error> {
        {
            let mut unreadable = self.unreadable.lock().unwrap();
            if 0 < *unreadable {
                *unreadable -= 1;
                return Err(Error::Unavailable { what: "planned".to_owned(), source: None });
            }
        }
        self.inner.owner(database).await
    }

    async fn provision(&self, database: &str, provision: &Provision) -> Result<OwnerRow, Error> {
        self.inner.provision(database, provision).await
    }

    async fn fence(&self, database: &str, fence: &Fence) -> Result<FenceOutcome, Error> {
        self.inner.fence(database, fence).await
    }

    async fn agent(&self, database: &str, read: &ReadAgent) -> Result<AgentAnswer, Error> {
        self.inner.agent(database, read).await
    }

    async fn history(&self, database: &str, read: &ReadHistory) -> Result<LogPage, Error> {
        self.inner.history(database, read).await
    }

    async fn histories(&self, database: &str, read: &ReadHistories) -> Result<LogPage, Error> {
        self.inner.histories(database, read).await
    }

    async fn recover(&self, database: &str) -> Result<Recovery, Error> {
        self.inner.recover(database).await
    }

    async fn work(&self, database: &str, id: u64) -> Result<Option<(WorkRow, AgentRow)>, Error> {
        self.inner.work(database, id).await
    }

    async fn works(&self, database: &str, read: &ReadWorks) -> Result<WorksPage, Error> {
        self.inner.works(database, read).await
    }

    async fn agents(&self, database: &str, read: &ReadAgents) -> Result<AgentsPage, Error> {
        self.inner.agents(database, read).await
    }

    async fn definition(
        &self,
        database: &str,
        hash: &[u8],
    ) -> Result<Option<DefinitionRow>, Error> {
        self.inner.definition(database, hash).await
    }

    async fn prune(&self, database: &str, prune: &Prune) -> Result<u64, Error> {
        self.inner.prune(database, prune).await
    }

    async fn check(&self, database: &str) -> Result<CheckAnswer, Error> {
        self.inner.check(database).await
    }

    async fn backup(&self, database: &str, to: &str) -> Result<(), Error> {
        self.inner.backup(database, to).await
    }

    async fn control(&self, batch: &ControlBatch) -> Result<ControlOutcome, Error> {
        self.inner.control(batch).await
    }

    async fn read_control(&self, read: &ReadControl) -> Result<ControlAnswer, Error> {
        self.inner.read_control(read).await
    }
}
