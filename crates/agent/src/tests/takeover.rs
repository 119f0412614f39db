//! Several nodes in one process: an owner dies while another node has its step, and what is old is not begun.

use super::*;
use domain::slot::ShardTable;
use domain::view::{MemberInfo, Place, Version, View};
use domain::{Epoch, ProcessName, ShardId, Term};
use proto::link::StepAnswer;

use crate::dispatch;
use crate::pool::Wanted;

/// Carries messages between the nodes that are there.
#[derive(Default)]
struct Net {
    nodes: Mutex<HashMap<String, Handle>>,
    /// Every step that was called for is cut off, without its worker noticing.
    cut: tokio::sync::Notify,
    /// The same, and the answer of each is given up for want of room on its way.
    lost: tokio::sync::Notify,
    /// Whose pools are full: they refuse every step.
    full: Mutex<Vec<String>>,
    /// Jobs that each pool was said to have left when it answered, and when.
    left: Mutex<Vec<(u32, Instant)>>,
    /// Jobs that every pool is said to have beside those.
    others: u32,
    /// How long a new owner's question is on its way, and whether because its link has to come up first.
    late: Mutex<(Duration, bool)>,
}

struct Port {
    me: ProcessName,
    net: Arc<Net>,
}

impl Net {
    fn node(&self, peer: &Peer) -> Option<Handle> {
        lock(&self.nodes).get(peer.name.as_str()).cloned()
    }
}

impl Wire for Port {
    fn call(
        &self,
        to: Peer,
        envelope: Envelope,
        deadline: Instant,
    ) -> BoxFuture<'static, Result<Bytes, cluster::Error>> {
        let (node, me, net) = (self.net.node(&to), self.me.clone(), self.net.clone());
        let is_step = envelope.kind == kind::STEP;
        if is_step && lock(&self.net.full).iter().any(|full| full == to.name.as_str()) {
            let reason = Reason::Overloaded.code().into();
            let refusal = Refusal { reason, ..Refusal::default() };
            return Box::pin(async { Err(cluster::Error::Refused(refusal)) });
        }
        let late =
            if envelope.kind == kind::STEPS_WANTED { lock(&net.late).0 } else { Duration::ZERO };
        Box::pin(async move {
            let Some(node) = node else { return Err(cluster::Error::NoAddress { peer: to }) };
            if !late.is_zero() {
                tokio::time::sleep(late).await;
            }
            if deadline < Instant::now() {
                return Err(cluster::Error::Deadline { peer: to });
            }
            let (sender, receiver) = oneshot::channel();
            let reply = Some(Reply::from_fn(move |answer| _ = sender.send(answer)));
            let from = Peer::new(Role::Node, me);
            node.incoming(Incoming { from, envelope, deadline: Some(deadline), reply });
            let answer = tokio::select! {
                answer = tokio::time::timeout_at(deadline.into(), receiver) => answer,
                () = net.cut.notified(), if is_step => {
                    return Err(cluster::Error::PeerGone { peer: to });
                }
                () = net.lost.notified(), if is_step => {
                    let reason = Reason::AnswerLost.code().into();
                    return Err(cluster::Error::Refused(Refusal { reason, ..Refusal::default() }));
                }
            };
            match answer {
                Ok(Ok(Ok(bytes))) if is_step && net.others != 0 => {
                    let mut answer = StepAnswer::decode(bytes).unwrap();
                    lock(&net.left).push((answer.pool_jobs, Instant::now()));
                    answer.pool_jobs += net.others;
                    Ok(answer.encode_to_vec().into())
                }
                Ok(Ok(Ok(bytes))) => Ok(bytes),
                Ok(Ok(Err(refusal))) => Err(cluster::Error::Refused(refusal)),
                Ok(Err(_)) => Err(cluster::Error::PeerGone { peer: to }),
                Err(_) => Err(cluster::Error::Deadline { peer: to }),
            }
        })
    }

    fn cast(&self, to: &Peer, envelope: Envelope) -> Result<(), cluster::Error> {
        if let Some(node) = self.net.node(to) {
            let from = Peer::new(Role::Node, self.me.clone());
            node.incoming(Incoming { from, envelope, deadline: None, reply: None });
        }
        Ok(())
    }

    fn is_linked(&self, _: &Peer) -> bool {
        !lock(&self.net.late).1
    }
}

/// A few nodes on one store.
pub(super) struct Stage {
    net: Arc<Net>,
    pub(super) store: Arc<FileStore>,
    pub(super) epoch: u64,
    owner: String,
    version: u64,
    _folder: tempfile::TempDir,
}

impl Stage {
    pub(super) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store =
            Arc::new(FileStore::open(folder.path(), store::EngineConfig::default()).unwrap());
        let provision = Provision { cluster_id: "c-1".into(), shard: 0 };
        store.provision(DATABASE, &provision).await.unwrap();
        let (net, owner) = Default::default();
        Self { net, store, epoch: 0, owner, version: 0, _folder: folder }
    }

    pub(super) async fn add(&self, name: &str, model: Arc<Scripted>, phases: PhasesConfig) {
        self.add_with(name, model, phases, Config::default(), self.store.clone()).await;
    }

    /// A node that sees the store through `store`.
    pub(super) async fn add_with(
        &self,
        name: &str,
        model: Arc<Scripted>,
        phases: PhasesConfig,
        config: Config,
        store: Arc<dyn Store>,
    ) {
        let me = Member { name: name.parse().unwrap(), incarnation: Incarnation(1) };
        let args = Args {
            config,
            phases,
            wire: Arc::new(Port { me: me.name.clone(), net: self.net.clone() }),
            me,
            stores: BTreeMap::from([("main".to_owned(), store)]),
            models: Arc::new(model::Registry::built_in().with(model)),
            tools: Arc::new(tool::Registry::default()),
            on_view: Box::new(|_| {}),
        };
        let node = spawn(args).await.unwrap();
        lock(&self.net.nodes).insert(name.to_owned(), node);
    }

    fn node(&self, name: &str) -> Handle {
        lock(&self.net.nodes)[name].clone()
    }

    /// The shard belongs to `name` from now on, and nobody hears of it.
    pub(super) async fn fence(&mut self, name: &str) {
        let fence =
            Fence { expected: self.epoch, node: name.into(), incarnation: 1, term: 1, above: 0 };
        self.store.fence(DATABASE, &fence).await.unwrap();
        self.epoch += 1;
        self.owner = name.to_owned();
    }

    /// The shard belongs to `name` from now on; everybody who is there hears of it.
    pub(super) async fn own(&mut self, name: &str) {
        self.fence(name).await;
        self.tell_view();
        eventually("the shard is open", async || {
            let answer = self.call(kind::GRANT, &self.grant()).await;
            answer.is_ok_and(|bytes| Held::decode(bytes).unwrap().open)
        })
        .await;
    }

    pub(super) fn grant(&self) -> Grant {
        Grant {
            shard: 0,
            epoch: self.epoch,
            term: 1,
            store: "main".into(),
            database: DATABASE.into(),
            class: 0,
        }
    }

    pub(super) fn tell_view(&mut self) {
        self.version += 1;
        let version = Version { term: Term(1), number: self.version };
        let mut view = View::new(version, ShardTable::single(1).unwrap());
        let owner = Member { name: self.owner.parse().unwrap(), incarnation: Incarnation(1) };
        let place =
            Place { owner: Some(owner), epoch: Epoch(self.epoch), open: true, ..Place::default() };
        view.shards.insert(ShardId(0), place);
        for (name, node) in &*lock(&self.net.nodes) {
            let offers = node.capabilities();
            let offers = offers.into_iter().map(|it| proto::view::offer_from_message(it).unwrap());
            let (role, incarnation, address) = (Role::Node, Incarnation(1), String::new());
            let (offers, beat) = (offers.collect(), String::new());
            let info = MemberInfo { role, incarnation, address, offers, beat };
            view.members.insert(name.parse().unwrap(), info);
        }
        let payload = Bytes::from(proto::view::to_message(&view.whole()).encode_to_vec());
        let control = Peer::new(Role::Control, "control-1".parse().unwrap());
        for node in lock(&self.net.nodes).values() {
            node.view_message(control.clone(), payload.clone());
        }
    }

    /// As `kill -9` does it: nobody hears of it any more.
    pub(super) async fn kill(&self, name: &str) {
        let node = lock(&self.net.nodes).remove(name).unwrap();
        node.shutdown().await;
    }

    pub(super) async fn call(&self, kind: u32, message: &impl Message) -> Result<Bytes, Refusal> {
        let (sender, receiver) = oneshot::channel();
        let envelope =
            Envelope { kind, payload: message.encode_to_vec().into(), ..Envelope::default() };
        let reply = Some(Reply::from_fn(move |answer| _ = sender.send(answer)));
        let from = Peer::new(Role::Control, "control-1".parse().unwrap());
        self.node(&self.owner).incoming(Incoming { from, envelope, deadline: None, reply });
        tokio::time::timeout(PATIENCE, receiver).await.expect("every call is answered").unwrap()
    }

    pub(super) async fn submit(&self, agent: &str, timeout_ms: u64) -> u64 {
        let call = SubmitCall { timeout_ms, ..call(agent, "text", "k") };
        let bytes = self.call(kind::SUBMIT, &call).await.unwrap();
        SubmitAnswer::decode(bytes).unwrap().lsn
    }

    pub(super) async fn get(&self, work: u64) -> Option<WorkInfo> {
        let bytes = self.call(kind::GET, &GetCall { work, ..GetCall::default() }).await.ok()?;
        GetAnswer::decode(bytes).unwrap().work
    }

    pub(super) async fn ended(&self, work: u64) -> WorkInfo {
        let is_final = |work: Option<WorkInfo>| work.is_some_and(|work| state(&work).is_final());
        eventually("the work has ended", async || is_final(self.get(work).await)).await;
        self.get(work).await.unwrap()
    }
}

pub(super) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(super) fn none() -> PhasesConfig {
    PhasesConfig { offer: Vec::new(), ..PhasesConfig::default() }
}

/// An owner without phases, a worker with all of them, and another node without. The model of the worker holds Observation;
/// returns when that runs.
async fn stage_with_worker() -> (Stage, Arc<Scripted>, Arc<Semaphore>, u64) {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Observation, gate.clone()));
    let model = Arc::new(Scripted { held, ..Scripted::new() });
    let mut stage = Stage::new().await;
    for name in ["node-1", "node-3"] {
        stage.add(name, Arc::new(Scripted::new()), none()).await;
    }
    stage.add("node-2", model.clone(), PhasesConfig::default()).await;
    stage.own("node-1").await;
    let work = stage.submit(A, 20_000).await;
    eventually("observation runs", async || model.calls(Phase::Observation) == 1).await;
    (stage, model, gate, work)
}

fn assert_every_phase_once(work: &WorkInfo, model: &Scripted) {
    assert_eq!(state(work), WorkState::Succeeded);
    let attempts: Vec<u32> = work.steps.iter().map(|step| step.attempts).collect();
    assert_eq!(attempts, [1; 6]);
    for phase in Phase::ALL {
        assert_eq!(model.calls(phase), 1, "{phase}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_on_its_way_reaches_the_next_owner() {
    let (mut stage, model, gate, work) = stage_with_worker().await;
    stage.kill("node-1").await;
    stage.own("node-3").await;
    gate.add_permits(100);
    let work = stage.ended(work).await;
    assert_every_phase_once(&work, &model);
    let epochs: Vec<u64> = work.steps.iter().map(|step| step.epoch).collect();
    assert_eq!(epochs, [1, 1, 1, 2, 2, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_waited_for_longer_where_its_link_has_to_come_up_first() {
    for (is_cold, attempts) in [(true, 1), (false, 2)] {
        let (mut stage, _, gate, work) = stage_with_worker().await;
        *lock(&stage.net.late) = (Duration::from_millis(500), is_cold);
        stage.kill("node-1").await;
        stage.own("node-3").await;
        gate.add_permits(100);
        let work = stage.ended(work).await;
        assert_eq!(work.steps[3].attempts, attempts, "is cold: {is_cold}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_given_before_the_next_owner_came_is_kept_for_it() {
    let (mut stage, model, gate, work) = stage_with_worker().await;
    stage.kill("node-1").await;
    gate.add_permits(100);
    let worker = stage.node("node-2");
    let steps = || {
        let node = "node-2".parse().unwrap();
        worker.context().held.of_shard(ShardId(0), &node, Epoch(1)).steps
    };
    let has_answer = || steps().iter().any(|step| step.answer.is_some());
    eventually("the worker has the answer", async || has_answer()).await;
    stage.own("node-3").await;
    assert_every_phase_once(&stage.ended(work).await, &model);
    eventually("nobody keeps it any more", async || !has_answer()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_whose_worker_dies_while_the_next_owner_waits_for_it_is_run_again() {
    let (mut stage, _, _gate, work) = stage_with_worker().await;
    stage.kill("node-1").await;
    stage.own("node-3").await;
    let fresh = Arc::new(Scripted::new());
    stage.add("node-4", fresh.clone(), PhasesConfig::default()).await;
    stage.kill("node-2").await;
    stage.tell_view();
    let work = stage.ended(work).await;
    assert_eq!(state(&work), WorkState::Succeeded);
    assert_eq!((work.steps[3].attempts, fresh.calls(Phase::Observation)), (2, 1));
    assert_eq!(fresh.calls(Phase::Action), 0, "what is committed is not run again");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_whose_link_broke_reaches_the_owner_that_asked() {
    an_answer_comes_although(|net| &net.cut).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_got_lost_reaches_the_owner_that_asked() {
    an_answer_comes_although(|net| &net.lost).await;
}

async fn an_answer_comes_although(what: impl Fn(&Net) -> &tokio::sync::Notify) {
    let (stage, model, gate, work) = stage_with_worker().await;
    let before = crate::metrics::ANSWERS_ROUTED.get();
    what(&stage.net).notify_waiters();
    // The owner has asked again, and was told that it still runs.
    let worker = stage.node("node-2");
    eventually("the owner waits", async || worker.context().held.is_wanted()).await;
    gate.add_permits(100);
    assert_every_phase_once(&stage.ended(work).await, &model);
    eventually("it was routed", async || before < crate::metrics::ANSWERS_ROUTED.get()).await;
}

/// One worker for Action, which is busy with the first work.
async fn busy_stage(timeout_ms: u64) -> (Stage, Arc<Scripted>, Arc<Semaphore>, u64) {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Action, gate.clone()));
    let model = Arc::new(Scripted { held, ..Scripted::new() });
    let mut stage = Stage::new().await;
    let phases = PhasesConfig { workers: 1, ..PhasesConfig::default() };
    stage.add("node-1", model.clone(), phases).await;
    stage.own("node-1").await;
    let first = stage.submit(A, timeout_ms).await;
    eventually("action runs", async || model.calls(Phase::Action) == 1).await;
    (stage, model, gate, first)
}

async fn await_queued(node: &Handle, jobs: u32) {
    let is_queued = || node.beat().loads.iter().any(|load| load.queued == jobs);
    eventually("jobs wait", async || is_queued()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_deadline_passed_in_the_queue_is_not_begun() {
    let (stage, model, gate, first) = busy_stage(20_000).await;
    let before = crate::metrics::JOBS_LATE.get();
    let late = stage.submit("acme/postchain/b", 3_000).await;
    await_queued(&stage.node("node-1"), 1).await;
    let late = stage.ended(late).await;
    assert_eq!(reason(late.reason), Reason::DeadlineExceeded);
    gate.add_permits(100);
    assert_eq!(state(&stage.ended(first).await), WorkState::Succeeded);
    eventually("the job is refused", async || before < crate::metrics::JOBS_LATE.get()).await;
    assert_eq!(model.calls(Phase::Action), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_process_took_before_it_stood_still_is_given_back() {
    let (stage, model, gate, first) = busy_stage(20_000).await;
    let second = stage.submit("acme/postchain/b", 20_000).await;
    let (node, before) = (stage.node("node-1"), crate::metrics::JOBS_LATE.get());
    await_queued(&node, 1).await;
    node.context().awake.pretend_stop();
    gate.add_permits(100);
    for work in [first, second] {
        assert_eq!(state(&stage.ended(work).await), WorkState::Succeeded);
    }
    assert!(before < crate::metrics::JOBS_LATE.get());
    assert_eq!(model.calls(Phase::Action), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_stood_still_begins_nothing_before_it_knows_that_it_still_is_one() {
    let (mut stage, model, gate, first) = busy_stage(3_000).await;
    // Nothing of the first is journaled any more: its answer finds nobody.
    stage.ended(first).await;
    // Each of them asks, and not only the first may hear that it is somebody else's shard now.
    for agent in ["acme/postchain/b", "acme/postchain/c", "acme/postchain/d"] {
        stage.submit(agent, 20_000).await;
    }
    let node = stage.node("node-1");
    await_queued(&node, 3).await;
    stage.fence("node-2").await;
    node.context().awake.pretend_stop();
    gate.add_permits(100);
    eventually("the shard is dropped", async || node.beat().held.is_empty()).await;
    assert_eq!(model.calls(Phase::Action), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_a_full_node_refuses_goes_to_another() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Action, gate.clone()));
    let other = Arc::new(Scripted { held, ..Scripted::new() });
    let mut stage = Stage::new().await;
    let offer =
        |phases: &[Phase]| PhasesConfig { offer: phases.to_vec(), ..PhasesConfig::default() };
    stage.add("node-1", Arc::new(Scripted::new()), offer(&Phase::ALL[1..])).await;
    stage.add("node-2", Arc::new(Scripted::new()), offer(&[Phase::Action])).await;
    stage.add("node-3", other.clone(), offer(&[Phase::Action])).await;
    lock(&stage.net.full).push("node-2".to_owned());
    stage.own("node-1").await;
    // The third has more and more to do, and the second nothing: for want of room, which only its refusals tell.
    for works in 1..=3 {
        stage.submit(&format!("acme/postchain/{works}"), 120_000).await;
        eventually("the third has it", async || other.calls(Phase::Action) == works).await;
    }
    gate.add_permits(100);
}

/// What others have in a pool counts for a second after it was told: a machine that is slower is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_goes_past_a_pool_that_others_fill() {
    for _ in 0..5 {
        if a_pool_is_passed_over_in_time().await {
            return;
        }
    }
    panic!("this machine is too slow for what is told");
}

async fn a_pool_is_passed_over_in_time() -> bool {
    let gate = Arc::new(Semaphore::new(0));
    let model = Arc::new(Scripted { held: Some((Phase::Action, gate.clone())), ..Scripted::new() });
    let mut stage = Stage::new().await;
    stage.net = Arc::new(Net { others: 100, ..Net::default() });
    let offer = |phases: &[Phase]| PhasesConfig {
        offer: phases.to_vec(),
        workers: 1,
        ..PhasesConfig::default()
    };
    stage.add("node-1", Arc::new(Scripted::new()), offer(&Phase::ALL[1..])).await;
    stage.add("node-2", model, offer(&[Phase::Action])).await;
    stage.add("node-3", Arc::new(Scripted::new()), offer(&[Phase::Yield])).await;
    stage.own("node-1").await;
    for work in ["a", "b", "c"] {
        stage.submit(&format!("acme/postchain/{work}"), 120_000).await;
    }
    await_queued(&stage.node("node-2"), 2).await;
    gate.add_permits(100);
    let left = stage.net.clone();
    eventually("every job is answered", async || lock(&left.left).len() == 3).await;
    let told: Vec<_> = lock(&stage.net.left).iter().map(|(left, _)| *left).collect();
    assert_eq!(told, [2, 1, 0], "what a pool has left");
    // Another offers the same now, with as many jobs of ours: none.
    stage.kill("node-3").await;
    stage.add("node-3", Arc::new(Scripted::new()), offer(&[Phase::Action])).await;
    stage.tell_view();
    let node = stage.node("node-1");
    let context = node.context();
    let chosen = || {
        let view = context.view.load_full();
        context.dispatcher.target(view.as_deref(), &Wanted::Phase(Phase::Action), "text")
    };
    let is_there = |target: &dispatch::Target, name: &str| match target {
        dispatch::Target::At(dispatch::Place::There(node), _) => node.as_str() == name,
        dispatch::Target::At(dispatch::Place::Here, _)
        | dispatch::Target::Later
        | dispatch::Target::Nowhere => false,
    };
    eventually("the other is seen", async || is_there(&chosen(), "node-3")).await;
    let targets: Vec<_> = (0..30).map(|_| chosen()).collect();
    let last = lock(&stage.net.left).last().map(|(_, at)| at.elapsed());
    if last.is_none_or(|since| Duration::from_millis(domain::loads::TOLD_MS) <= since) {
        return false;
    }
    assert!(targets.iter().all(|target| is_there(target, "node-3")), "{targets:?}");
    true
}
