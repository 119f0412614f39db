//! Pools: the workers of this node, a factory for each phase and tool that it offers, and one for its models.
//!
//! A pool runs jobs for any agent of the cluster and knows nothing of journals: a job that is lost with its worker is
//! run again by the agent that asked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ractor::factory::{
    DeadMansSwitchConfiguration, DiscardHandler, DiscardMode, DiscardReason, DiscardSettings,
    Factory, FactoryArguments, FactoryMessage, FactoryRef, Job, JobOptions, queues, routing,
    worker_builder,
};
use ractor::{Actor, ActorCell, ActorStatus};

use domain::chain::PhaseKey;
use domain::step::{CallKey, Callee};
use domain::turn::doubt::Effect;
use domain::view::{Offer, View};
use domain::{Attempt, Capability, ErrorKind, Phase, ProcessName, Reason, ShardId, StepKey};
use proto::link::{CapabilityOffer, Load, StepAnswer, StepJob};

use crate::Error;
use crate::awake::Awake;
use crate::config::PhasesConfig;
use crate::held::{Held, Route};
use crate::metrics;
use crate::speech::Tell;
use crate::worker::StepWorker;

/// The version of the jobs that pools of this build take.
pub(crate) const JOB_VERSION: u32 = 1;

/// The attribute of a tool that may be called twice under one key.
const IDEMPOTENT: &str = "idempotent";

/// Takes the answer of a job; called once.
pub(crate) type Done = Box<dyn FnOnce(Result<StepAnswer, JobFailure>) + Send>;

/// Why a job came to nothing.
#[derive(Clone, Debug)]
pub(crate) struct JobFailure {
    pub kind: ErrorKind,
    pub reason: Reason,
    pub detail: String,
    /// It surely had no effect.
    pub is_harmless: bool,
}

impl JobFailure {
    /// It was not begun.
    pub(crate) fn not_begun(kind: ErrorKind, reason: Reason, detail: impl Into<String>) -> Self {
        Self { kind, reason, detail: detail.into(), is_harmless: true }
    }
}

/// What a step needs: who has it, offers a capability.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wanted {
    Phase(Phase),
    Model(String),
    Tool(String),
}

impl Wanted {
    fn capability(&self) -> String {
        match self {
            Self::Phase(phase) => phase.capability(),
            Self::Model(name) => format!("model/{name}"),
            Self::Tool(name) => format!("tool/{name}"),
        }
    }

    /// What is looked for in the registry.
    pub(crate) fn query(&self, modality: &str) -> Option<domain::CapabilityQuery> {
        let attributes = match self {
            Self::Phase(_) => [("modality".to_owned(), modality.to_owned())].into(),
            Self::Model(_) | Self::Tool(_) => BTreeMap::new(),
        };
        let name = self.capability().parse().ok()?;
        Some(domain::CapabilityQuery { name, version_min: JOB_VERSION, attributes })
    }

    pub(crate) fn of(step: StepKey, job: &StepJob) -> Self {
        match step {
            StepKey::Phase(PhaseKey { phase, .. }) => Self::Phase(phase),
            StepKey::Call(CallKey { of: Callee::Model, .. }) => Self::Model(job.model.clone()),
            StepKey::Call(CallKey { of: Callee::Tool(_), .. }) => {
                Self::Tool(job.tool.as_ref().map(|tool| tool.name.clone()).unwrap_or_default())
            }
        }
    }
}

/// What running a step twice does, as its offer says.
pub(crate) fn effect_of(wanted: &Wanted, attributes: &BTreeMap<String, String>) -> Effect {
    match wanted {
        Wanted::Phase(_) | Wanted::Model(_) => Effect::Idempotent,
        Wanted::Tool(_) if attributes.get(IDEMPOTENT).is_some_and(|is| is == "true") => {
            Effect::Idempotent
        }
        Wanted::Tool(_) => Effect::Once,
    }
}

/// All pools of this node.
#[derive(Clone)]
pub(crate) struct Pools(Arc<Inner>);

struct Inner {
    modality: String,
    capacity: u32,
    pools: BTreeMap<Wanted, Pool>,
    held: Arc<Held>,
}

#[derive(Clone)]
struct Pool {
    factory: FactoryRef<(), PoolJob>,
    load: Arc<AtomicU32>,
    attributes: BTreeMap<String, String>,
}

/// A job on its way to a worker.
pub(crate) struct Task {
    pub job: StepJob,
    pub attempt: Attempt,
    pub traceparent: String,
    /// Nobody waits for the answer after that.
    pub deadline: Instant,
    /// It is not begun after that time of the boot clock.
    pub begin_by_ms: Option<u64>,
    /// When this process took it, by the boot clock.
    pub taken_ms: u64,
}

impl Task {
    /// Whether its answer belongs to the agent: a probe is asked again.
    fn is_held(&self) -> bool {
        !self.job.tool.as_ref().is_some_and(|tool| tool.is_probe)
    }
}

pub(crate) struct PoolJob {
    pub task: Task,
    pub answer: Answer,
}

impl ractor::Message for PoolJob {}

/// Answers exactly once: a job that is dropped by a worker that died answers as lost.
pub(crate) struct Answer {
    done: Option<Done>,
    load: Arc<AtomicU32>,
}

impl Answer {
    pub(crate) fn send(mut self, result: Result<StepAnswer, JobFailure>) {
        if let Some(done) = self.done.take() {
            // It is counted until this is dropped.
            let pool_jobs = self.load.load(Ordering::Relaxed).saturating_sub(1);
            done(result.map(|answer| StepAnswer { pool_jobs, ..answer }));
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
        if let Some(done) = self.done.take() {
            metrics::JOBS_LOST.inc();
            done(Err(JobFailure {
                kind: ErrorKind::Unavailable,
                reason: Reason::WorkerLost,
                detail: "the worker of the step died".to_owned(),
                is_harmless: false,
            }));
        }
    }
}

/// What the pools of a node need.
pub(crate) struct PoolsArgs<'a> {
    pub config: &'a PhasesConfig,
    pub me: &'a ProcessName,
    pub models: Arc<model::Registry>,
    pub tools: Arc<tool::Registry>,
    pub held: Arc<Held>,
    pub awake: Arc<Awake>,
    pub tell: Tell,
    pub supervisor: ActorCell,
}

impl Pools {
    /// Starts a pool for each phase that the config offers and for each tool, and one for all models.
    ///
    /// # Errors
    /// A factory that does not start.
    pub(crate) async fn spawn(args: PoolsArgs<'_>) -> Result<Self, Error> {
        let mut pools = BTreeMap::new();
        let modality = [("modality".to_owned(), args.config.modality.clone())];
        for phase in &args.config.offer {
            let attributes = modality.clone().into();
            let pool = spawn_pool(&phase.capability(), &args, attributes).await?;
            pools.insert(Wanted::Phase(*phase), pool);
        }
        let of_models = spawn_pool("models", &args, BTreeMap::new()).await?;
        for name in args.models.names() {
            pools.insert(Wanted::Model(name.to_owned()), of_models.clone());
        }
        for tool in args.tools.tools() {
            let wanted = Wanted::Tool(tool.name().to_owned());
            let is_idempotent = tool.is_idempotent().to_string();
            let attributes = [(IDEMPOTENT.to_owned(), is_idempotent)].into();
            let pool = spawn_pool(&wanted.capability(), &args, attributes).await?;
            pools.insert(wanted, pool);
        }
        let capacity = u32::try_from(args.config.workers).unwrap_or(u32::MAX);
        let modality = args.config.modality.clone();
        Ok(Self(Arc::new(Inner { modality, capacity, pools, held: args.held })))
    }

    fn pool(&self, wanted: &Wanted, modality: &str) -> Option<&Pool> {
        let is_ours = !matches!(wanted, Wanted::Phase(_)) || self.0.modality == modality;
        let pool = self.0.pools.get(wanted).filter(|_| is_ours)?;
        // A pool that ended takes no more jobs; others may offer the same still.
        (pool.factory.get_status() == ActorStatus::Running).then_some(pool)
    }

    /// What running a step twice would do, if this node offers it.
    pub(crate) fn offers(&self, wanted: &Wanted, modality: &str) -> Option<Effect> {
        self.pool(wanted, modality).map(|pool| effect_of(wanted, &pool.attributes))
    }

    /// What this node announces.
    pub(crate) fn capabilities(&self) -> Vec<CapabilityOffer> {
        let offer = |(wanted, pool): (&Wanted, &Pool)| {
            let capability = Capability {
                name: wanted.capability().parse().ok()?,
                version: JOB_VERSION,
                attributes: pool.attributes.clone(),
            };
            let offer = Offer { capability, capacity: self.0.capacity };
            Some(proto::view::offer_to_message(&offer))
        };
        self.0.pools.iter().filter_map(offer).collect()
    }

    /// How busy each pool is.
    pub(crate) fn loads(&self) -> Vec<Load> {
        let load = |(wanted, pool): (&Wanted, &Pool)| {
            let jobs = pool.load.load(Ordering::Relaxed);
            let running = jobs.min(self.0.capacity);
            Load { capability: wanted.capability(), running, queued: jobs - running }
        };
        self.0.pools.iter().map(load).collect()
    }

    /// Gives a task to a worker; `done` hears what came of it. Before that, `route` is told if somebody else has to hear it,
    /// too.
    pub(crate) fn submit(
        &self,
        task: Task,
        view: impl Fn() -> Option<Arc<View>> + Send + 'static,
        route: impl FnOnce(Route) + Send + 'static,
        done: Done,
    ) {
        let wanted = Wanted::of(task.attempt.step, &task.job);
        let Some(pool) = self.pool(&wanted, &task.job.modality) else {
            let (kind, reason) = (ErrorKind::Unavailable, Reason::NoOffer);
            return done(Err(JobFailure::not_begun(
                kind,
                reason,
                "this node does not offer the step",
            )));
        };
        pool.load.fetch_add(1, Ordering::Relaxed);
        metrics::JOBS.inc();
        let done: Done = match task.is_held() {
            false => done,
            true => {
                let (held, attempt) = (self.0.held.clone(), task.attempt);
                held.begin(attempt, ShardId(task.job.shard), task.deadline);
                Box::new(move |answer| {
                    if let Some(to) = held.finish(&attempt, answer.as_ref().ok(), view().as_deref())
                    {
                        route(to);
                    }
                    done(answer);
                })
            }
        };
        let answer = Answer { done: Some(done), load: pool.load.clone() };
        let job = Job {
            key: (),
            msg: PoolJob { task, answer },
            options: JobOptions::default(),
            accepted: None,
        };
        // A factory that is gone drops the job, which answers it as lost.
        _ = pool.factory.cast(FactoryMessage::Dispatch(job));
    }
}

async fn spawn_pool(
    name: &str,
    args: &PoolsArgs<'_>,
    attributes: BTreeMap<String, String>,
) -> Result<Pool, Error> {
    let config = args.config;
    let prototype = StepWorker {
        me: args.me.to_string(),
        models: args.models.clone(),
        tools: args.tools.clone(),
        awake: args.awake.clone(),
        tell: args.tell.clone(),
    };
    let worker = move |_| (prototype.clone(), ());
    let stuck = DeadMansSwitchConfiguration::builder()
        .detection_timeout(Duration::from_millis(config.stuck_ms))
        .build();
    let arguments = FactoryArguments::builder()
        .worker_builder(Box::new(worker_builder(worker)))
        .num_initial_workers(config.workers)
        .router(routing::QueuerRouting::default())
        .queue(queues::DefaultQueue::default())
        .discard_settings(DiscardSettings::Static {
            limit: config.queue_max,
            mode: DiscardMode::Newest,
        })
        .discard_handler(Arc::new(Refuse))
        .dead_mans_switch(stuck)
        .build();
    let factory = Factory::<
        (),
        PoolJob,
        (),
        StepWorker,
        routing::QueuerRouting<(), PoolJob>,
        queues::DefaultQueue<(), PoolJob>,
    >::default();
    let (factory, _) = Actor::spawn_linked(None, factory, arguments, args.supervisor.clone())
        .await
        .map_err(|source| Error::Spawn { what: name.to_owned(), source })?;
    Ok(Pool { factory, load: Arc::new(AtomicU32::new(0)), attributes })
}

/// Answers jobs that the queue has no room for.
struct Refuse;

impl DiscardHandler<(), PoolJob> for Refuse {
    fn discard(&self, _reason: DiscardReason, job: &mut Job<(), PoolJob>) {
        if let Some(done) = job.msg.answer.done.take() {
            metrics::JOBS_REFUSED.inc();
            let (kind, reason) = (ErrorKind::Exhausted, Reason::Overloaded);
            done(Err(JobFailure::not_begun(kind, reason, "the queue of the pool is full")));
        }
    }
}
