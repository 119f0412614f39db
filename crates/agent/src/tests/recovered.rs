//! Agents of a new owner: what comes for them before they can be asked, and how much is read for them.

use std::sync::atomic::{AtomicBool, AtomicUsize};

use async_trait::async_trait;
use proto::link::{
    AgentAnswer, AgentRow, AgentsPage, CheckAnswer, ControlAnswer, ControlBatch, DefinitionRow,
    LogPage, OwnerRow, Prune, ReadAgent, ReadAgents, ReadControl, ReadHistories, ReadWorks,
    WorksPage,
};
use store::{CommitOutcome, ControlOutcome, Error, FenceOutcome, Recovery};

use super::takeover::{Stage, eventually, none};
use super::*;

const AGENTS: [&str; 3] = ["acme/postchain/a", "acme/postchain/b", "acme/postchain/c"];

/// A store that holds back the reads of a new owner, counts those of single agents, and may fail some.
struct Gated {
    inner: Arc<FileStore>,
    recover: Semaphore,
    histories: Semaphore,
    together: AtomicUsize,
    alone: AtomicUsize,
    /// Histories fail: all that are read together, and the first one that is asked for alone.
    fails: AtomicBool,
    failed: Mutex<Option<u64>>,
    /// What becomes of the next commit.
    planned: Mutex<Option<Planned>>,
}

#[derive(Clone, Copy, Debug)]
enum Planned {
    /// It is done, and nobody is told.
    AnswerLost,
    NotDone,
    /// Others have written as many rows in the same epoch before.
    Overtaken(u64),
}

impl Gated {
    fn new(inner: Arc<FileStore>) -> Arc<Self> {
        let (recover, histories) = (Semaphore::new(0), Semaphore::new(0));
        let (together, alone, fails, failed, planned) = Default::default();
        Arc::new(Self { inner, recover, histories, together, alone, fails, failed, planned })
    }

    fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::Relaxed)
    }

    fn is_failing(&self) -> bool {
        self.fails.load(Ordering::Relaxed)
    }
}

fn away<T>() -> Result<T, Error> {
    Err(Error::Unavailable { what: "planned".to_owned(), source: None })
}

#[async_trait]
impl Store for Gated {
    async fn recover(&self, database: &str) -> Result<Recovery, Error> {
        self.recover.acquire().await.unwrap().forget();
        self.inner.recover(database).await
    }

    async fn histories(&self, database: &str, read: &ReadHistories) -> Result<LogPage, Error> {
        self.histories.acquire().await.unwrap().forget();
        self.together.fetch_add(1, Ordering::Relaxed);
        if self.is_failing() { away() } else { self.inner.histories(database, read).await }
    }

    async fn history(&self, database: &str, read: &ReadHistory) -> Result<LogPage, Error> {
        self.alone.fetch_add(1, Ordering::Relaxed);
        if self.is_failing() && *lock(&self.failed).get_or_insert(read.from) == read.from {
            return away();
        }
        self.inner.history(database, read).await
    }

    async fn agent(&self, database: &str, read: &ReadAgent) -> Result<AgentAnswer, Error> {
        self.alone.fetch_add(1, Ordering::Relaxed);
        self.inner.agent(database, read).await
    }

    async fn provision(&self, database: &str, provision: &Provision) -> Result<OwnerRow, Error> {
        self.inner.provision(database, provision).await
    }

    async fn owner(&self, database: &str) -> Result<OwnerRow, Error> {
        self.inner.owner(database).await
    }

    async fn fence(&self, database: &str, fence: &Fence) -> Result<FenceOutcome, Error> {
        self.inner.fence(database, fence).await
    }

    async fn commit(&self, database: &str, group: Arc<Group>) -> Result<CommitOutcome, Error> {
        let planned = lock(&self.planned).take();
        if let Some(Planned::Overtaken(rows)) = planned {
            for number in 1..=rows {
                let mut other = Group { head: group.head + number - 1, ..Group::clone(&group) };
                other.rows[0].lsn = group.head + number;
                self.inner.commit(database, Arc::new(other)).await?;
            }
        }
        if let Some(Planned::NotDone) = planned {
            return away();
        }
        let outcome = self.inner.commit(database, group).await;
        match planned {
            Some(Planned::AnswerLost) => Err(Error::Unknown { what: "planned".to_owned() }),
            Some(_) | None => outcome,
        }
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

    async fn backup(&self, database: &str, name: &str) -> Result<(), Error> {
        self.inner.backup(database, name).await
    }

    async fn control(&self, batch: &ControlBatch) -> Result<ControlOutcome, Error> {
        self.inner.control(batch).await
    }

    async fn read_control(&self, read: &ReadControl) -> Result<ControlAnswer, Error> {
        self.inner.read_control(read).await
    }
}

/// A node whose shard is granted, and whose recovery is held back.
async fn opening() -> (Stage, Arc<Gated>) {
    let mut stage = Stage::new().await;
    let gated = Gated::new(stage.store.clone());
    let (model, phases) = (Arc::new(Scripted::new()), PhasesConfig::default());
    stage.add_with("node-1", model, phases, Config::default(), gated.clone()).await;
    stage.fence("node-1").await;
    stage.tell_view();
    let mut held = None;
    eventually("the node has started and takes the grant", async || {
        held = stage.call(kind::GRANT, &stage.grant()).await.ok();
        held.is_some()
    })
    .await;
    let held = Held::decode(held.unwrap()).unwrap();
    assert!(!held.open, "its recovery is held back");
    (stage, gated)
}

/// Works of all agents, each in the middle of its turn, whose owner has died; the next one is node-3, on the other store.
async fn inherited(config: Config) -> (Stage, Arc<Gated>, Vec<u64>, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Observation, gate.clone()));
    let model = Arc::new(Scripted { held, ..Scripted::new() });
    let mut stage = Stage::new().await;
    let gated = Gated::new(stage.store.clone());
    gated.recover.add_permits(100);
    stage.add("node-1", Arc::new(Scripted::new()), none()).await;
    stage.add("node-2", model.clone(), PhasesConfig::default()).await;
    stage.add_with("node-3", Arc::new(Scripted::new()), none(), config, gated.clone()).await;
    stage.own("node-1").await;
    let mut works = Vec::new();
    for agent in AGENTS {
        works.push(stage.submit(agent, 20_000).await);
    }
    let all = AGENTS.len() as u64;
    eventually("observations run", async || model.calls(Phase::Observation) == all).await;
    stage.kill("node-1").await;
    (stage, gated, works, gate)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_before_a_shard_is_open_is_answered_when_it_is() {
    let (stage, gated) = opening().await;
    let call = call(AGENTS[0], "text", "k");
    let submitted = stage.call(kind::SUBMIT, &call);
    let opened = async {
        tokio::task::yield_now().await;
        gated.recover.add_permits(1);
    };
    let (submitted, ()) = tokio::join!(submitted, opened);
    let work = SubmitAnswer::decode(submitted.unwrap()).unwrap().lsn;
    assert_eq!(state(&stage.ended(work).await), WorkState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_for_a_shard_that_was_not_opened_is_sent_elsewhere() {
    let (mut stage, gated) = opening().await;
    let call = call(AGENTS[0], "text", "k");
    let fence = Fence { expected: 1, node: "node-9".into(), incarnation: 1, term: 1, above: 0 };
    stage.store.fence(DATABASE, &fence).await.unwrap();
    let submitted = stage.call(kind::SUBMIT, &call);
    let opened = async {
        tokio::task::yield_now().await;
        gated.recover.add_permits(1);
    };
    let (refused, ()) = tokio::join!(submitted, opened);
    let refused = cluster::reason_of(&refused.unwrap_err()).unwrap();
    assert_eq!(refused, Reason::Unowned);
    stage.epoch = 2;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_opened_with_one_entry_whatever_becomes_of_the_answer() {
    for planned in [Planned::AnswerLost, Planned::NotDone, Planned::Overtaken(1)] {
        let (stage, gated) = opening().await;
        *lock(&gated.planned) = Some(planned);
        gated.recover.add_permits(1);
        // The first entry after that of the opening.
        assert_eq!(stage.submit(AGENTS[0], 20_000).await, 2, "{planned:?}");
        assert_eq!(state(&stage.ended(2).await), WorkState::Succeeded);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_that_somebody_else_wrote_to_meanwhile_is_not_opened() {
    let (mut stage, gated) = opening().await;
    *lock(&gated.planned) = Some(Planned::Overtaken(2));
    gated.recover.add_permits(1);
    let call = call(AGENTS[0], "text", "k");
    let refused = stage.call(kind::SUBMIT, &call).await.unwrap_err();
    assert_eq!(cluster::reason_of(&refused).unwrap(), Reason::Unowned);
    stage.epoch = 2;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_are_larger_than_what_may_be_read_at_once_are_recovered_one_after_the_other() {
    let config = Config { recovering_bytes_max: 1, ..Config::default() };
    let (mut stage, gated, works, gate) = inherited(config).await;
    gated.histories.add_permits(100);
    gate.add_permits(100);
    stage.own("node-3").await;
    for work in works {
        assert_eq!(state(&stage.ended(work).await), WorkState::Succeeded);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_are_due_are_read_together_and_what_comes_for_them_waits() {
    let (mut stage, gated, works, gate) = inherited(Config::default()).await;
    stage.own("node-3").await;
    let gets = futures::future::join_all(works.iter().map(|work| stage.get(*work)));
    let let_go = async {
        tokio::task::yield_now().await;
        gated.histories.add_permits(100);
    };
    let (found, ()) = tokio::join!(gets, let_go);
    let steps: Vec<usize> = found.iter().map(|work| work.as_ref().unwrap().steps.len()).collect();
    assert_eq!(steps, [3; 3], "what the owner before had journaled");
    assert_eq!((Gated::count(&gated.together), Gated::count(&gated.alone)), (1, 0));
    gate.add_permits(100);
    for work in works {
        assert_eq!(state(&stage.ended(work).await), WorkState::Succeeded);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_be_recovered_yet_does_not_hold_up_the_others() {
    let config = Config { recovering_max: 1.try_into().unwrap(), ..Config::default() };
    let (mut stage, gated, works, gate) = inherited(config).await;
    gated.fails.store(true, Ordering::Relaxed);
    gated.histories.add_permits(100);
    gate.add_permits(100);
    stage.own("node-3").await;
    for work in &works[1..] {
        assert_eq!(state(&stage.ended(*work).await), WorkState::Succeeded);
    }
    assert!(lock(&gated.failed).is_some(), "nothing failed");
    gated.fails.store(false, Ordering::Relaxed);
    assert_eq!(state(&stage.ended(works[0]).await), WorkState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_row_of_an_idle_agent_is_written_after_each_work() {
    let mut stage = Stage::new().await;
    let (model, phases) = (Arc::new(Scripted::new()), PhasesConfig::default());
    // Nobody is evicted, which would write it, too.
    let config = Config { idle_ms: 3_600_000, ..Config::default() };
    stage.add_with("node-1", model, phases, config, stage.store.clone()).await;
    stage.own("node-1").await;
    let mut works = Vec::new();
    for key in ["k1", "k2", "k3"] {
        let bytes = stage.call(kind::SUBMIT, &call(AGENTS[0], "text", key)).await.unwrap();
        works.push(SubmitAnswer::decode(bytes).unwrap().lsn);
        stage.ended(works[works.len() - 1]).await;
    }
    let read = ReadAgent { id: 1, ..ReadAgent::default() };
    eventually("its row holds what it did", async || {
        let row = stage.store.agent(DATABASE, &read).await.unwrap().agent.unwrap();
        works.last().is_some_and(|last| *last < row.snap_lsn)
    })
    .await;
}
