//! One node's agents on a store of files, with scripted models: what is journaled before what, and what a new owner finds.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use prost::Message;
use tokio::sync::{Semaphore, oneshot};

use cluster::{Incoming, Peer, Reply};
use domain::{AgentId, Definition, Incarnation, Lsn, Member, Phase, Reason, Role, WorkState};
use model::{Chunk, Model, Request, Task, Usage};
use proto::kind;
use proto::link::{
    AgentFailed, CancelAnswer, CancelCall, DefinitionResponse, Envelope, Events, Fence, GetAnswer,
    GetCall, Grant, Group, Held, LogRow, Provision, ReadHistory, Refusal, SubmitAnswer, SubmitCall,
    SubscribeCall, WatchMode, WorkInfo, WorkRow,
};
use store::{FileStore, Store};

use crate::shard::lock;
use crate::{Args, Config, Handle, PhasesConfig, Wire, spawn};

const DATABASE: &str = "shard-0";
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers every phase; may be told to hold one phase back, to panic in it, or to give rubbish.
struct Scripted {
    calls: Mutex<HashMap<String, u64>>,
    held: Option<(Phase, Arc<Semaphore>)>,
    panics: Option<(Phase, AtomicU64)>,
    rubbish: Option<Phase>,
}

impl Scripted {
    fn new() -> Self {
        Self { calls: Mutex::default(), held: None, panics: None, rubbish: None }
    }

    fn calls(&self, phase: Phase) -> u64 {
        lock(&self.calls).get(phase.as_str()).copied().unwrap_or(0)
    }
}

impl Model for Scripted {
    fn name(&self) -> &str {
        "extractive"
    }

    fn call<'a>(&'a self, request: &'a Request) -> BoxStream<'a, Result<Chunk, model::Error>> {
        let Task::Phase(phase) = &request.task else { unreachable!("only phases are asked for") };
        let phase: Phase = phase.parse().unwrap();
        *lock(&self.calls).entry(phase.to_string()).or_default() += 1;
        let answer = match phase {
            _ if self.rubbish == Some(phase) => "rubbish",
            Phase::Action => r#"{"draft":"d"}"#,
            Phase::Experience | Phase::Intention => "{}",
            Phase::Observation => r#"{"terms":["heron"]}"#,
            Phase::Understanding => r#"{"decision":"yield"}"#,
            Phase::Yield => r#"{"answer":"the answer"}"#,
        };
        let gate = self.held.clone().filter(|(held, _)| *held == phase).map(|(_, gate)| gate);
        if let Some((_, left)) = self.panics.as_ref().filter(|(panics, _)| *panics == phase)
            && left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                .is_ok()
        {
            panic!("scripted");
        }
        let first = async move {
            if let Some(gate) = gate {
                drop(gate.acquire().await);
            }
            Ok(Chunk::Text(answer.to_owned()))
        };
        let last = stream::iter([Ok(Chunk::Finished(Usage { calls: 1, ..Usage::default() }))]);
        stream::once(first).chain(last).boxed()
    }
}

/// Nobody else is there but two control replicas, the first of which hangs when it is asked for a definition; what is cast to
/// the API server is kept.
#[derive(Default)]
struct Alone {
    events: Mutex<Vec<Events>>,
    failures: Mutex<Vec<AgentFailed>>,
    definition: Mutex<Bytes>,
    /// There is no room for events on the link.
    is_full: AtomicBool,
    /// There is no link to the API server.
    is_gone: AtomicBool,
    refused: AtomicU64,
}

impl Wire for Alone {
    fn call(
        &self,
        to: Peer,
        envelope: Envelope,
        _: Instant,
    ) -> BoxFuture<'static, Result<Bytes, cluster::Error>> {
        if envelope.kind == kind::AGENT_FAILED {
            lock(&self.failures).push(AgentFailed::decode(envelope.payload).unwrap());
            return Box::pin(async { Ok(Bytes::new()) });
        }
        if envelope.kind == kind::DEFINITION {
            if to.name.as_str() == "control-1" {
                return Box::pin(std::future::pending());
            }
            let body = lock(&self.definition).clone();
            let answer = DefinitionResponse { body, ..DefinitionResponse::default() };
            return Box::pin(async move { Ok(answer.encode_to_vec().into()) });
        }
        Box::pin(async move { Err(cluster::Error::NoAddress { peer: to }) })
    }

    fn cast(&self, to: &Peer, envelope: Envelope) -> Result<(), cluster::Error> {
        if envelope.kind == kind::EVENTS {
            if self.is_gone.load(Ordering::Relaxed) {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return Err(cluster::Error::PeerGone { peer: to.clone() });
            }
            if self.is_full.load(Ordering::Relaxed) {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return Err(cluster::Error::Overloaded { peer: to.clone(), retry_after_ms: 1 });
            }
            lock(&self.events).push(Events::decode(envelope.payload).unwrap());
        }
        Ok(())
    }

    fn is_linked(&self, _: &Peer) -> bool {
        true
    }
}

struct Bench {
    node: Handle,
    store: Arc<FileStore>,
    wire: Arc<Alone>,
    epoch: u64,
    _folder: tempfile::TempDir,
}

fn node_name() -> Member {
    Member { name: "node-1".parse().unwrap(), incarnation: Incarnation(1) }
}

async fn bench_with(model: Arc<dyn Model>, config: Config, offer: &[Phase]) -> Bench {
    let phases = PhasesConfig { offer: offer.to_vec(), ..PhasesConfig::default() };
    bench_of(model, config, phases).await
}

async fn bench_of(model: Arc<dyn Model>, config: Config, phases: PhasesConfig) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(FileStore::open(folder.path(), store::EngineConfig::default()).unwrap());
    let provision = Provision { cluster_id: "c-1".into(), shard: 0 };
    store.provision(DATABASE, &provision).await.unwrap();
    let wire = Arc::new(Alone::default());
    let args = Args {
        config,
        phases,
        me: node_name(),
        wire: wire.clone(),
        stores: BTreeMap::from([("main".to_owned(), store.clone() as Arc<dyn Store>)]),
        models: Arc::new(model::Registry::built_in().with(model)),
        tools: Arc::new(tool::Registry::default()),
        on_view: Box::new(|_| {}),
    };
    let node = spawn(args).await.unwrap();
    let mut bench = Bench { node, store, wire, epoch: 0, _folder: folder };
    bench.own().await;
    bench
}

async fn bench(model: Arc<Scripted>) -> Bench {
    bench_with(model, Config::default(), &Phase::ALL).await
}

impl Bench {
    /// Fences the shard to this node under a new epoch, grants it, and waits until it is open.
    async fn own(&mut self) {
        self.fence().await;
        let grant = Grant {
            shard: 0,
            epoch: self.epoch,
            term: 1,
            store: "main".into(),
            database: DATABASE.into(),
            class: 0,
        };
        self.eventually("the shard is open", async || {
            let answer = self.call(kind::GRANT, &grant).await;
            answer.is_ok_and(|bytes| {
                let held = Held::decode(bytes).unwrap();
                held.open && held.epoch == self.epoch
            })
        })
        .await;
    }

    async fn fence(&mut self) {
        let fence = Fence {
            expected: self.epoch,
            node: "node-1".into(),
            incarnation: 1,
            term: 1,
            above: 0,
        };
        self.store.fence(DATABASE, &fence).await.unwrap();
        self.epoch += 1;
    }

    async fn call(&self, kind: u32, message: &impl Message) -> Result<Bytes, Refusal> {
        let (sender, receiver) = oneshot::channel();
        let envelope =
            Envelope { kind, payload: message.encode_to_vec().into(), ..Envelope::default() };
        let reply = Reply::from_fn(move |answer| _ = sender.send(answer));
        let from = Peer::new(Role::Control, "control-1".parse().unwrap());
        self.node.incoming(Incoming { from, envelope, deadline: None, reply: Some(reply) });
        tokio::time::timeout(PATIENCE, receiver).await.expect("every call is answered").unwrap()
    }

    /// What an API server of this name asks for, and does not wait for.
    fn cast_from(&self, control: &str, kind: u32, message: &impl Message) {
        let payload = message.encode_to_vec().into();
        let envelope = Envelope { kind, payload, ..Envelope::default() };
        let from = Peer::new(Role::Control, control.parse().unwrap());
        let reply = Some(Reply::from_fn(|_| {})).filter(|_| kind != kind::UNSUBSCRIBE);
        self.node.incoming(Incoming { from, envelope, deadline: None, reply });
    }

    async fn submit(&self, agent: &str, input: &str, key: &str) -> Result<SubmitAnswer, Refusal> {
        self.submit_with(SubmitCall { timeout_ms: 20_000, ..call(agent, input, key) }).await
    }

    async fn submit_with(&self, call: SubmitCall) -> Result<SubmitAnswer, Refusal> {
        let bytes = self.call(kind::SUBMIT, &call).await?;
        let answer = SubmitAnswer::decode(bytes).unwrap();
        // The tests name a work by its number; where the answer was taken does not matter to them.
        Ok(SubmitAnswer { lsn: answer.work.as_ref().unwrap().lsn, ..answer })
    }

    async fn get(&self, work: u64) -> WorkInfo {
        let bytes = self.call(kind::GET, &GetCall { work, ..GetCall::default() }).await.unwrap();
        GetAnswer::decode(bytes).unwrap().work.unwrap()
    }

    async fn ended(&self, work: u64) -> WorkInfo {
        self.eventually("the work has ended", async || state(&self.get(work).await).is_final())
            .await;
        self.get(work).await
    }

    async fn eventually(&self, what: &str, mut condition: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition().await {
            assert!(Instant::now() < deadline, "not in time: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn log(&self) -> Vec<LogRow> {
        let head = self.store.owner(DATABASE).await.unwrap().head;
        let mut rows = Vec::new();
        for from in 1..=head {
            let read = ReadHistory { from, above: from - 1, limit: 1 };
            rows.extend(self.store.history(DATABASE, &read).await.unwrap().rows);
        }
        rows
    }
}

fn call(agent: &str, input: &str, key: &str) -> SubmitCall {
    let (hash, _) = proto::convert::canonical(&Definition::postchain());
    SubmitCall {
        agent: agent.into(),
        definition: Bytes::copy_from_slice(hash.as_bytes()),
        input: Bytes::copy_from_slice(input.as_bytes()),
        idempotency_key: key.into(),
        timeout_ms: 20_000,
        ..SubmitCall::default()
    }
}

fn state(info: &WorkInfo) -> WorkState {
    proto::journal::state_from_code(info.state).unwrap()
}

fn reason(code: u32) -> Reason {
    Reason::from_code(u16::try_from(code).unwrap()).unwrap()
}

const A: &str = "acme/postchain/a";

#[tokio::test(flavor = "multi_thread")]
async fn a_work_is_six_phases_in_eight_rows() {
    let bench = bench(Arc::new(Scripted::new())).await;
    let answer = bench.submit(A, "text", "k").await.unwrap();
    let work = bench.ended(answer.lsn).await;
    assert_eq!((state(&work), &work.result[..]), (WorkState::Succeeded, &b"the answer"[..]));
    let phases: Vec<_> =
        work.steps.iter().filter_map(|step| Phase::from_code(step.phase)).collect();
    assert_eq!(phases, Phase::ALL);
    assert!(work.steps.iter().all(|step| step.attempts == 1 && step.node == "node-1"));
    let kinds: Vec<u32> = bench.log().await.iter().map(|row| row.kind).collect();
    assert_eq!(kinds, [1, 2, 3, 3, 3, 3, 3, 3, 7], "opened, accepted, six phases, ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_one_work() {
    let bench = bench(Arc::new(Scripted::new())).await;
    let first = bench.submit(A, "text", "k").await.unwrap();
    bench.ended(first.lsn).await;
    let again = bench.submit(A, "text", "k").await.unwrap();
    assert_eq!((again.lsn, again.duplicate), (first.lsn, true));
    let refused = bench.submit(A, "other", "k").await.unwrap_err();
    assert_eq!(reason(refused.reason), Reason::KeyReused);
    let other = bench.submit("acme/postchain/b", "other", "k").await.unwrap();
    assert_ne!(other.lsn, first.lsn, "a key belongs to its agent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_owner_goes_on_from_the_last_committed_step() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Observation, gate.clone()));
    let model = Arc::new(Scripted { held, ..Scripted::new() });
    let mut bench = bench(model.clone()).await;
    let answer = bench.submit(A, "text", "k").await.unwrap();
    bench.eventually("observation runs", async || model.calls(Phase::Observation) == 1).await;
    bench.own().await;
    gate.add_permits(100);
    let work = bench.ended(answer.lsn).await;
    assert_eq!(state(&work), WorkState::Succeeded);
    for phase in [Phase::Action, Phase::Experience, Phase::Intention, Phase::Yield] {
        assert_eq!(model.calls(phase), 1, "{phase} is journaled once and not run again");
    }
    // The pool had the interrupted one still, and gave its answer to the new owner.
    assert_eq!(model.calls(Phase::Observation), 1);
    let attempts: Vec<u32> = work.steps.iter().map(|step| step.attempts).collect();
    assert_eq!(attempts, [1; 6]);
    let epochs: Vec<u64> = work.steps.iter().map(|step| step.epoch).collect();
    assert_eq!(epochs, [1, 1, 1, 2, 2, 2]);
    let again = bench.submit(A, "text", "k").await.unwrap();
    assert_eq!(
        (again.lsn, again.duplicate),
        (answer.lsn, true),
        "the key is known to the new owner"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_comes_from_whoever_answers() {
    let bench = bench(Arc::new(Scripted::new())).await;
    let other = Definition { cycles_max: 1, ..Definition::postchain() };
    let (hash, body) = proto::convert::canonical(&other);
    *lock(&bench.wire.definition) = body;
    let controls = ["control-1", "control-2"].map(|name| name.parse().unwrap());
    bench.node.set_controls(controls.map(|name| Peer::new(Role::Control, name)).to_vec());
    let definition = Bytes::copy_from_slice(hash.as_bytes());
    let submit = SubmitCall { definition: definition.clone(), ..call(A, "text", "k") };
    let answer = bench.submit_with(submit).await.unwrap();
    let work = bench.ended(answer.lsn).await;
    assert_eq!((state(&work), work.definition), (WorkState::Succeeded, definition));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_owner_accepts_nothing() {
    let mut bench = bench(Arc::new(Scripted::new())).await;
    bench.fence().await;
    let refused = bench.submit(A, "text", "k").await.unwrap_err();
    assert!(
        [Reason::Fenced, Reason::Moved, Reason::ShuttingDown].contains(&reason(refused.reason))
    );
    bench.eventually("the shard is dropped", async || bench.node.beat().held.is_empty()).await;
    assert_eq!(bench.log().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_agent_leaves_memory_and_remembers() {
    let config = Config { idle_ms: 20, ..Config::default() };
    let bench = bench_with(Arc::new(Scripted::new()), config, &Phase::ALL).await;
    let answer = bench.submit(A, "text", "k").await.unwrap();
    bench.ended(answer.lsn).await;
    let row = async || {
        let read = proto::link::ReadAgent { id: 1, ..Default::default() };
        bench.store.agent(DATABASE, &read).await.unwrap().agent.unwrap()
    };
    bench.eventually("its row holds its fold", async || !row().await.state.is_empty()).await;
    let row = row().await;
    assert_eq!(row.snap_lsn, row.head);
    let fold =
        proto::journal::decode_agent(row.state, Lsn(row.snap_lsn), Lsn(row.last_work), |_| {
            domain::turn::Limits::chain(0, 1)
        });
    assert_eq!(fold.unwrap().findings().collect::<Vec<_>>(), ["heron: the answer"]);
    let second = bench.submit(A, "text", "k2").await.unwrap();
    assert_eq!(state(&bench.ended(second.lsn).await), WorkState::Succeeded);
    assert_eq!(bench.submit(A, "text", "k").await.unwrap().lsn, answer.lsn);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_phase_that_nobody_offers_waits_until_the_deadline() {
    let bench = bench_with(Arc::new(Scripted::new()), Config::default(), &Phase::ALL[..2]).await;
    let answer =
        bench.submit_with(SubmitCall { timeout_ms: 5_000, ..call(A, "text", "k") }).await.unwrap();
    bench
        .eventually("it waits", async || {
            let work = bench.get(answer.lsn).await;
            state(&work) == WorkState::Waiting && reason(work.reason) == Reason::NoOffer
        })
        .await;
    let work = bench.ended(answer.lsn).await;
    assert_eq!((state(&work), reason(work.reason)), (WorkState::Failed, Reason::DeadlineExceeded));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_whose_worker_died_is_run_again() {
    let panics = Some((Phase::Intention, AtomicU64::new(1)));
    let model = Arc::new(Scripted { panics, ..Scripted::new() });
    let bench = bench(model.clone()).await;
    let answer = bench.submit(A, "text", "k").await.unwrap();
    let work = bench.ended(answer.lsn).await;
    assert_eq!(state(&work), WorkState::Succeeded);
    assert_eq!(work.steps[2].attempts, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_fails_for_ever_is_a_dead_letter() {
    let panics = Some((Phase::Action, AtomicU64::new(1_000)));
    let bench = bench(Arc::new(Scripted { panics, ..Scripted::new() })).await;
    let answer = bench.submit(A, "text", "k").await.unwrap();
    let work = bench.ended(answer.lsn).await;
    assert_eq!((state(&work), reason(work.reason)), (WorkState::DeadLettered, Reason::WorkerLost));
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_of_a_model_fails_the_work() {
    let rubbish = Some(Phase::Understanding);
    let bench = bench(Arc::new(Scripted { rubbish, ..Scripted::new() })).await;
    let answer = bench.submit(A, "text", "k").await.unwrap();
    let work = bench.ended(answer.lsn).await;
    assert_eq!(
        (state(&work), reason(work.reason)),
        (WorkState::Failed, Reason::ModelAnswerInvalid)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_refused_and_works_run_in_order() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Action, gate.clone()));
    let bench = bench(Arc::new(Scripted { held, ..Scripted::new() })).await;
    let mut works = Vec::new();
    for n in 0..domain::agent::QUEUE_MAX {
        works.push(bench.submit(A, "text", &format!("k{n}")).await.unwrap().lsn);
    }
    let refused = bench.submit(A, "text", "one more").await.unwrap_err();
    assert_eq!(reason(refused.reason), Reason::QueueFull);
    gate.add_permits(1_000);
    let mut ends = Vec::new();
    for work in works {
        ends.push(bench.ended(work).await.end_ms);
    }
    assert!(ends.is_sorted());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_work_ends_at_once_and_its_step_is_ignored() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Intention, gate.clone()));
    let model = Arc::new(Scripted { held, ..Scripted::new() });
    let bench = bench(model.clone()).await;
    let answer = bench.submit(A, "text", "k").await.unwrap();
    bench.eventually("intention runs", async || model.calls(Phase::Intention) == 1).await;
    let cancel = CancelCall { work: answer.lsn, ..CancelCall::default() };
    for _ in 0..2 {
        let bytes = bench.call(kind::CANCEL, &cancel).await.unwrap();
        let work = CancelAnswer::decode(bytes).unwrap().work.unwrap();
        assert_eq!(
            (state(&work), reason(work.reason)),
            (WorkState::Cancelled, Reason::CancelRequested)
        );
    }
    gate.add_permits(100);
    let next = bench.submit(A, "text", "k2").await.unwrap();
    assert_eq!(state(&bench.ended(next.lsn).await), WorkState::Succeeded);
    assert_eq!(bench.get(answer.lsn).await.steps.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_ends_no_subscription_of_another_that_has_the_same_number() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Action, gate.clone()));
    let bench = bench(Arc::new(Scripted { held, ..Scripted::new() })).await;
    let work = bench.submit(A, "text", "k").await.unwrap().lsn;
    let seen = |one: fn(&Events) -> bool| {
        lock(&bench.wire.events).iter().filter(|events| one(events)).count()
    };
    let mode = WatchMode::All.into();
    let watch = SubscribeCall { subscription: 7, work, mode, ..SubscribeCall::default() };
    for control in ["control-1", "control-2"] {
        bench.cast_from(control, kind::SUBSCRIBE, &watch);
    }
    bench.eventually("both watch", async || seen(|events| !events.entries.is_empty()) == 2).await;
    let unwatch = proto::link::UnsubscribeCall { subscription: 7 };
    bench.cast_from("control-2", kind::UNSUBSCRIBE, &unwatch);
    // Heard by the same agent, after it.
    bench.get(work).await;
    gate.add_permits(100);
    bench.ended(work).await;
    bench.eventually("its end is sent", async || seen(|events| events.ended.is_some()) != 0).await;
    assert_eq!(seen(|events| events.ended.is_some()), 1, "to the one that watches still");
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_see_every_entry_once_live_and_later() {
    let bench = bench(Arc::new(Scripted::new())).await;
    let watched =
        SubmitCall { subscription: 7, mode: WatchMode::All.into(), ..call(A, "text", "k") };
    let answer = bench.submit_with(watched).await.unwrap();
    bench.ended(answer.lsn).await;
    let seen = |subscription: u64| {
        let events = lock(&bench.wire.events);
        let of: Vec<&Events> = events.iter().filter(|e| e.subscription == subscription).collect();
        let seqs: Vec<u64> = of.iter().flat_map(|e| &e.entries).map(|entry| entry.seq).collect();
        (seqs, of.iter().filter(|e| e.ended.is_some()).count())
    };
    bench.eventually("the end is seen", async || seen(7).1 == 1).await;
    assert_eq!(seen(7).0, [1, 2, 3, 4, 5, 6, 7, 8]);
    let later = SubscribeCall {
        subscription: 8,
        work: answer.lsn,
        after_seq: 3,
        mode: WatchMode::All.into(),
        ..SubscribeCall::default()
    };
    let from_memory = crate::metrics::WATCHES_RECENT.get();
    bench.call(kind::SUBSCRIBE, &later).await.unwrap();
    bench.eventually("the end is seen again", async || seen(8).1 == 1).await;
    assert!(from_memory < crate::metrics::WATCHES_RECENT.get(), "it needs no store");
    assert_eq!(seen(8).0, [4, 5, 6, 7, 8]);
    let end = SubscribeCall { subscription: 9, mode: WatchMode::End.into(), after_seq: 0, ..later };
    bench.call(kind::SUBSCRIBE, &end).await.unwrap();
    bench.eventually("only the end is seen", async || seen(9).1 == 1).await;
    assert_eq!(seen(9).0, [8]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_a_damaged_journal_is_quarantined_and_others_go_on() {
    let mut bench = bench(Arc::new(Scripted::new())).await;
    let head = bench.store.owner(DATABASE).await.unwrap().head;
    let rubbish = Bytes::from_static(b"\xff\xff");
    let row = LogRow {
        lsn: head + 1,
        agent: 1,
        seq: 1,
        kind: 2,
        payload: rubbish,
        epoch: bench.epoch,
        ..LogRow::default()
    };
    let agent: AgentId = A.parse().unwrap();
    let agent = proto::link::AgentRow {
        id: 1,
        tenant: agent.tenant.to_string(),
        name: agent.name.to_string(),
        key: agent.key.to_string(),
        head: head + 1,
        ..Default::default()
    };
    let work = WorkRow { id: head + 1, agent: 1, state: 1, ..WorkRow::default() };
    let group = Group {
        epoch: bench.epoch,
        head,
        rows: vec![row],
        agents: vec![agent],
        works: vec![work],
        ..Group::default()
    };
    bench.store.commit(DATABASE, Arc::new(group)).await.unwrap();
    let leader = Peer::new(Role::Control, "control-1".parse().unwrap());
    bench.node.set_controls(vec![leader]);
    let before = crate::metrics::QUARANTINED.get();
    bench.own().await;
    bench
        .eventually("it is quarantined", async || before < crate::metrics::QUARANTINED.get())
        .await;
    bench.eventually("the leader knows", async || lock(&bench.wire.failures).len() == 6).await;
    let mut told = lock(&bench.wire.failures).clone();
    told.sort_by_key(|failed| failed.failures);
    let reasons: Vec<u32> = told.iter().map(|failed| failed.reason).collect();
    let restarted = u32::from(Reason::Restarted.code());
    assert_eq!(reasons[..5], [restarted; 5]);
    assert_eq!(reasons[5], u32::from(Reason::Quarantined.code()));
    assert!(told[5].agent == A && !told[5].detail.is_empty(), "{:?}", told[5]);
    // A person is told so, again and again.
    for key in ["k1", "k2"] {
        let refused = bench.submit(A, "text", key).await.unwrap_err();
        assert_eq!(refused.reason, u32::from(Reason::Quarantined.code()), "{refused:?}");
    }
    let other = bench.submit("acme/postchain/b", "text", "k").await.unwrap();
    assert_eq!(state(&bench.ended(other.lsn).await), WorkState::Succeeded);
}

mod owner;
mod recovered;
mod spoken;
mod takeover;
