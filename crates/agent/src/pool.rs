//! Phase pools: the workers of this node, a factory for each phase that it offers.
//!
//! A pool runs jobs for any agent of the cluster and knows nothing of journals: a job that is lost with its worker is
//! run again by the agent that asked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use ractor::factory::{
    DeadMansSwitchConfiguration, DiscardHandler, DiscardMode, DiscardReason, DiscardSettings,
    Factory, FactoryArguments, FactoryMessage, FactoryRef, Job, JobOptions, Worker, WorkerId,
    queues, routing, worker_builder,
};
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorStatus};
use tracing::Instrument;

use domain::view::Offer;
use domain::{Capability, ErrorKind, Phase, ProcessName, Reason};
use model::{Message, MessageRole, Part, Request, Task};
use proto::link::{CapabilityOffer, Load, PhaseAnswer, PhaseJob};

use crate::config::PhasesConfig;
use crate::metrics;
use crate::{Error, clock};

/// The version of the phase jobs that pools of this build take.
pub(crate) const PHASE_VERSION: u32 = 1;

/// Takes the answer of a job; called once.
pub(crate) type Done = Box<dyn FnOnce(Result<PhaseAnswer, JobFailure>) + Send>;

/// Why a job came to nothing.
#[derive(Clone, Debug)]
pub(crate) struct JobFailure {
    pub kind: ErrorKind,
    pub reason: Reason,
    pub detail: String,
}

/// All pools of this node.
#[derive(Clone)]
pub(crate) struct Pools(Arc<Inner>);

struct Inner {
    modality: String,
    capacity: u32,
    pools: BTreeMap<Phase, Pool>,
}

struct Pool {
    factory: FactoryRef<(), PoolJob>,
    load: Arc<AtomicU32>,
}

struct PoolJob {
    job: PhaseJob,
    traceparent: String,
    done: Answer,
}

impl ractor::Message for PoolJob {}

/// Answers exactly once: a job that is dropped by a worker that died answers as lost.
struct Answer {
    done: Option<Done>,
    load: Arc<AtomicU32>,
}

impl Answer {
    fn send(mut self, result: Result<PhaseAnswer, JobFailure>) {
        if let Some(done) = self.done.take() {
            done(result);
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
                detail: "the worker of the phase died".to_owned(),
            }));
        }
    }
}

impl Pools {
    /// Starts a pool for each phase that `config` offers, below `supervisor`.
    ///
    /// # Errors
    /// A factory that does not start.
    pub(crate) async fn spawn(
        config: &PhasesConfig,
        me: &ProcessName,
        models: Arc<model::Registry>,
        supervisor: ActorCell,
    ) -> Result<Self, Error> {
        let mut pools = BTreeMap::new();
        for phase in &config.offer {
            let pool = spawn_pool(*phase, config, me, models.clone(), supervisor.clone()).await?;
            pools.insert(*phase, pool);
        }
        let capacity = u32::try_from(config.workers).unwrap_or(u32::MAX);
        Ok(Self(Arc::new(Inner { modality: config.modality.clone(), capacity, pools })))
    }

    pub(crate) fn offers(&self, phase: Phase, modality: &str) -> bool {
        let pool = self.0.pools.get(&phase).filter(|_| self.0.modality == modality);
        // A pool that ended takes no more jobs; others may offer the phase still.
        pool.is_some_and(|pool| pool.factory.get_status() == ActorStatus::Running)
    }

    /// What this node announces.
    pub(crate) fn capabilities(&self) -> Vec<CapabilityOffer> {
        let offer = |phase: &Phase| {
            let capability = Capability {
                name: phase.capability().parse().expect("phases have valid names"),
                version: PHASE_VERSION,
                attributes: [("modality".to_owned(), self.0.modality.clone())].into(),
            };
            proto::view::offer_to_message(&Offer { capability, capacity: self.0.capacity })
        };
        self.0.pools.keys().map(offer).collect()
    }

    /// How busy each pool is.
    pub(crate) fn loads(&self) -> Vec<Load> {
        let load = |(phase, pool): (&Phase, &Pool)| {
            let jobs = pool.load.load(Ordering::Relaxed);
            let running = jobs.min(self.0.capacity);
            Load { capability: phase.capability(), running, queued: jobs - running }
        };
        self.0.pools.iter().map(load).collect()
    }

    /// Gives `job` to a worker; `done` hears what came of it.
    pub(crate) fn submit(&self, job: PhaseJob, traceparent: String, done: Done) {
        let pool = Phase::from_code(job.phase)
            .filter(|phase| self.offers(*phase, &job.modality))
            .and_then(|phase| self.0.pools.get(&phase));
        let Some(pool) = pool else {
            let detail = "this node does not offer the phase".to_owned();
            return done(Err(JobFailure {
                kind: ErrorKind::Unavailable,
                reason: Reason::NoOffer,
                detail,
            }));
        };
        pool.load.fetch_add(1, Ordering::Relaxed);
        metrics::JOBS.inc();
        let done = Answer { done: Some(done), load: pool.load.clone() };
        let job = Job {
            key: (),
            msg: PoolJob { job, traceparent, done },
            options: JobOptions::default(),
            accepted: None,
        };
        // A factory that is gone drops the job, which answers it as lost.
        _ = pool.factory.cast(FactoryMessage::Dispatch(job));
    }
}

async fn spawn_pool(
    phase: Phase,
    config: &PhasesConfig,
    me: &ProcessName,
    models: Arc<model::Registry>,
    supervisor: ActorCell,
) -> Result<Pool, Error> {
    let me = me.to_string();
    let worker = move |_| (PhaseWorker { me: me.clone(), models: models.clone() }, ());
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
        PhaseWorker,
        routing::QueuerRouting<(), PoolJob>,
        queues::DefaultQueue<(), PoolJob>,
    >::default();
    let (factory, _) = Actor::spawn_linked(None, factory, arguments, supervisor)
        .await
        .map_err(|source| Error::Spawn { what: phase.capability(), source })?;
    Ok(Pool { factory, load: Arc::new(AtomicU32::new(0)) })
}

/// Answers jobs that the queue has no room for.
struct Refuse;

impl DiscardHandler<(), PoolJob> for Refuse {
    fn discard(&self, _reason: DiscardReason, job: &mut Job<(), PoolJob>) {
        if let Some(done) = job.msg.done.done.take() {
            metrics::JOBS_REFUSED.inc();
            done(Err(JobFailure {
                kind: ErrorKind::Exhausted,
                reason: Reason::Overloaded,
                detail: "the queue of the phase pool is full".to_owned(),
            }));
        }
    }
}

struct PhaseWorker {
    me: String,
    models: Arc<model::Registry>,
}

impl Worker for PhaseWorker {
    type Key = ();
    type Message = PoolJob;
    type Arguments = ();
    type State = ();

    async fn pre_start(
        &self,
        _: WorkerId,
        _: &FactoryRef<(), PoolJob>,
        (): (),
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle(
        &self,
        _: WorkerId,
        _: &FactoryRef<(), PoolJob>,
        job: Job<(), PoolJob>,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        let PoolJob { job, traceparent, done } = job.msg;
        let answer = match traceparent.is_empty() {
            true => self.run(job).await,
            false => {
                let phase = Phase::from_code(job.phase).map_or("", Phase::as_str);
                let span = tracing::info_span!("phase", phase, work = job.work, node = self.me);
                telemetry::set_parent(&span, Some(&traceparent));
                self.run(job).instrument(span).await
            }
        };
        done.send(answer);
        Ok(())
    }
}

impl PhaseWorker {
    async fn run(&self, job: PhaseJob) -> Result<PhaseAnswer, JobFailure> {
        let model = self.models.get(&job.model).ok_or_else(|| JobFailure {
            kind: ErrorKind::Invalid,
            reason: Reason::ModelRefused,
            detail: format!(
                "there is no model {:?}: use one of {}",
                job.model,
                self.models.names().join(", ")
            ),
        })?;
        let start_ms = clock::now_ms();
        let request = request(job)?;
        let call = model::complete(&*model, &request);
        let completion = match tracing::Span::current().is_none() {
            true => call.await,
            false => call.instrument(tracing::info_span!("model", model = model.name())).await,
        };
        let completion = completion.map_err(|error| JobFailure {
            kind: error.kind(),
            reason: reason_of(&error),
            detail: error.to_string(),
        })?;
        Ok(PhaseAnswer {
            output: Bytes::from(completion.text),
            node: self.me.clone(),
            start_ms,
            end_ms: clock::now_ms(),
            calls: completion.usage.calls,
            input_tokens: completion.usage.input_tokens,
            output_tokens: completion.usage.output_tokens,
        })
    }
}

fn reason_of(error: &model::Error) -> Reason {
    match error.kind() {
        ErrorKind::Unavailable | ErrorKind::Exhausted | ErrorKind::Deadline | ErrorKind::Fenced => {
            Reason::ModelUnavailable
        }
        ErrorKind::Internal => Reason::ModelAnswerInvalid,
        ErrorKind::Invalid | ErrorKind::NotFound | ErrorKind::Conflict | ErrorKind::Denied => {
            Reason::ModelRefused
        }
    }
}

/// The most that one phase may answer.
const OUTPUT_BYTES_MAX: usize = 2 << 20;

fn request(job: PhaseJob) -> Result<Request, JobFailure> {
    let invalid = |detail: &str| JobFailure {
        kind: ErrorKind::Invalid,
        reason: Reason::Malformed,
        detail: detail.to_owned(),
    };
    let phase =
        Phase::from_code(job.phase).ok_or_else(|| invalid("the phase of the job is not known"))?;
    let text = |role, text: String| Message { role, parts: vec![Part::Text(text)] };
    let utf8 = |bytes: Bytes| {
        String::from_utf8(bytes.into()).map_err(|_| invalid("a text of the job is not UTF-8"))
    };
    let mut messages = vec![text(MessageRole::System, job.instructions)];
    if !job.findings.is_empty() {
        let findings = serde_json::json!({ "findings": job.findings });
        messages.push(text(MessageRole::System, findings.to_string()));
    }
    messages.push(text(MessageRole::User, utf8(job.input)?));
    for earlier in job.earlier {
        messages.push(text(MessageRole::Assistant, utf8(earlier)?));
    }
    Ok(Request {
        task: Task::Phase(phase.as_str().to_owned()),
        messages,
        // The same for every attempt: a provider that knows the key need not work twice.
        idempotency_key: format!("{}/{}/{}", job.work, job.cycle, phase),
        max_output_bytes: OUTPUT_BYTES_MAX,
    })
}
