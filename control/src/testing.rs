//! A cluster for unit tests: a view that the test sets, and nodes that answer as the test says.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use domain::slot::ShardTable;
use domain::view::{Place, Version, View};
use domain::{
    DefinitionHash, DefinitionName, Epoch, Incarnation, Member, ProcessName, Reason, ShardId,
    Tenant, Term,
};
use proto::link::{Envelope, Refusal};
use proto::status::Failure;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::network::{Catalog, Missed, Network, Views};

type Answer = Box<dyn Fn(&FakeNetwork, &str, &Envelope) -> Result<Bytes, Missed> + Send + Sync>;

pub(crate) struct FakeNetwork {
    views: watch::Sender<Option<Arc<View>>>,
    seen: watch::Sender<Vec<String>>,
    silent: Mutex<BTreeSet<String>>,
    casts: Mutex<Vec<(String, Envelope)>>,
    answer: Answer,
}

impl FakeNetwork {
    pub(crate) fn new(
        view: Arc<View>,
        answer: impl Fn(&FakeNetwork, &str, &Envelope) -> Result<Bytes, Missed> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            views: watch::Sender::new(Some(view)),
            seen: watch::Sender::new(Vec::new()),
            silent: Mutex::default(),
            casts: Mutex::default(),
            answer: Box::new(answer),
        })
    }

    pub(crate) fn set_view(&self, view: Arc<View>) {
        self.views.send_replace(Some(view));
    }

    /// Calls to this node are never answered.
    pub(crate) fn make_silent(&self, node: &str) {
        self.silent.lock().unwrap().insert(node.to_owned());
    }

    /// Who was called so far, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.seen.borrow().clone()
    }

    pub(crate) fn casts(&self) -> Vec<(String, Envelope)> {
        self.casts.lock().unwrap().clone()
    }

    /// Waits until so many calls were made.
    pub(crate) async fn called(&self, count: usize) {
        self.seen.subscribe().wait_for(|seen| count <= seen.len()).await.unwrap();
    }
}

#[async_trait]
impl Network for FakeNetwork {
    async fn call(
        &self,
        node: &ProcessName,
        envelope: Envelope,
        _: Instant,
    ) -> Result<Bytes, Missed> {
        self.seen.send_modify(|seen| seen.push(node.to_string()));
        let is_silent = self.silent.lock().unwrap().contains(node.as_str());
        if is_silent {
            std::future::pending::<()>().await;
        }
        (self.answer)(self, node.as_str(), &envelope)
    }

    fn cast(&self, node: &ProcessName, envelope: Envelope) {
        self.casts.lock().unwrap().push((node.to_string(), envelope));
    }

    fn views(&self) -> Views {
        self.views.subscribe()
    }
}

/// A catalog that knows the definition `postchain` and no other.
pub(crate) struct FakeCatalog;

pub(crate) const HASH: DefinitionHash = DefinitionHash([7; 32]);

#[async_trait]
impl Catalog for FakeCatalog {
    async fn definition(
        &self,
        _: &Tenant,
        name: &DefinitionName,
        hash: Option<DefinitionHash>,
    ) -> Result<Option<DefinitionHash>, Failure> {
        let known = name.as_str() == "postchain" && hash.is_none_or(|hash| hash == HASH);
        Ok(known.then_some(HASH))
    }
}

/// One shard for each owner and epoch; an empty name is no owner.
pub(crate) fn view(number: u64, owners: &[(&str, u64)]) -> Arc<View> {
    let count = u16::try_from(owners.len()).unwrap();
    let version = Version { term: Term(1), number };
    let mut view = View::new(version, ShardTable::single(count).unwrap());
    for (shard, (name, epoch)) in (0..).zip(owners) {
        let owner = name.parse().ok().map(|name| Member { name, incarnation: Incarnation(1) });
        let place = Place { owner, epoch: Epoch(*epoch), open: true, stopped: false };
        view.shards.insert(ShardId(shard), place);
    }
    Arc::new(view)
}

pub(crate) fn refuse(reason: Reason) -> Result<Bytes, Missed> {
    Err(Missed::Refused(Refusal { reason: reason.code().into(), ..Refusal::default() }))
}
