//! Finds a pool for a step and runs the step there: here if this node offers it, else on the least loaded node that does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prost::Message;
use tokio::sync::oneshot;

use cluster::Peer;
use domain::view::View;
use domain::{CapabilityQuery, ErrorKind, Phase, ProcessName, Reason, Role};
use proto::kind;
use proto::link::{Envelope, PhaseAnswer, PhaseJob};

use crate::pool::{JobFailure, PHASE_VERSION, Pools};
use crate::wire::Wire;

/// After a node was found gone it is passed over for this long, or until it answers again.
const PASS_OVER: Duration = Duration::from_millis(1_000);

/// Sends steps to pools.
pub(crate) struct Dispatcher {
    me: ProcessName,
    pools: Pools,
    wire: Arc<dyn Wire>,
    peers: Mutex<BTreeMap<ProcessName, PeerLoad>>,
}

#[derive(Default)]
struct PeerLoad {
    /// Jobs of ours that it has not answered.
    jobs: u32,
    gone_at: Option<Instant>,
}

/// Where a step can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Here,
    There(ProcessName),
    /// It is offered, but by nobody who can be reached now.
    Later,
    /// Nobody offers it.
    Nowhere,
}

/// What became of a job.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done(PhaseAnswer),
    /// It did not run: give it to somebody else, no attempt was made.
    NotRun {
        after: Duration,
    },
    /// It may have run and its answer is lost, or it ran and failed.
    Failed(JobFailure),
}

impl Dispatcher {
    pub(crate) fn new(me: ProcessName, pools: Pools, wire: Arc<dyn Wire>) -> Self {
        Self { me, pools, wire, peers: Mutex::default() }
    }

    /// Chooses where a step of `phase` runs.
    pub(crate) fn target(&self, view: Option<&View>, phase: Phase, modality: &str) -> Target {
        if self.pools.offers(phase, modality) {
            return Target::Here;
        }
        let query = CapabilityQuery {
            name: phase.capability().parse().expect("phases have valid names"),
            version_min: PHASE_VERSION,
            attributes: [("modality".to_owned(), modality.to_owned())].into(),
        };
        let Some(view) = view else { return Target::Nowhere };
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut offered = false;
        let mut best: Option<(u64, &ProcessName)> = None;
        for (name, offer) in view.offers(&query).filter(|(name, _)| **name != self.me) {
            offered = true;
            let load = peers.get(name);
            if load.is_some_and(PeerLoad::is_passed_over) {
                continue;
            }
            let jobs = u64::from(load.map_or(0, |load| load.jobs));
            let share = jobs * 1_000 / u64::from(offer.capacity.max(1));
            if best.is_none_or(|(least, _)| share < least) {
                best = Some((share, name));
            }
        }
        match best {
            Some((_, name)) => Target::There(name.clone()),
            None if offered => Target::Later,
            None => Target::Nowhere,
        }
    }

    /// Runs `job` at `target`, until `deadline` at the latest.
    pub(crate) async fn run(
        &self,
        target: Target,
        job: PhaseJob,
        traceparent: String,
        deadline: Instant,
    ) -> Outcome {
        match target {
            Target::Here => self.run_here(job, traceparent, deadline).await,
            Target::There(name) => self.run_there(name, job, traceparent, deadline).await,
            Target::Later | Target::Nowhere => {
                Outcome::NotRun { after: Duration::from_millis(100) }
            }
        }
    }

    async fn run_here(&self, job: PhaseJob, traceparent: String, deadline: Instant) -> Outcome {
        let (sender, receiver) = oneshot::channel();
        self.pools.submit(job, traceparent, Box::new(move |answer| _ = sender.send(answer)));
        let answer = tokio::time::timeout_at(deadline.into(), receiver).await;
        match answer {
            Ok(Ok(answer)) => outcome(answer),
            Ok(Err(_)) => Outcome::Failed(lost("the worker of the phase died")),
            Err(_) => Outcome::Failed(lost("the worker of the phase did not answer in time")),
        }
    }

    async fn run_there(
        &self,
        name: ProcessName,
        job: PhaseJob,
        traceparent: String,
        deadline: Instant,
    ) -> Outcome {
        let envelope = Envelope {
            kind: kind::PHASE,
            attempt: job.attempt,
            traceparent,
            payload: job.encode_to_vec().into(),
            ..Envelope::default()
        };
        self.with(&name, |load| load.jobs += 1);
        let peer = Peer::new(Role::Node, name.clone());
        let result = self.wire.call(peer, envelope, deadline).await;
        self.with(&name, |load| load.jobs = load.jobs.saturating_sub(1));
        match result {
            Ok(bytes) => {
                self.with(&name, |load| load.gone_at = None);
                match PhaseAnswer::decode(bytes) {
                    Ok(answer) => Outcome::Done(answer),
                    Err(error) => {
                        Outcome::Failed(lost(&format!("the answer of {name} is damaged: {error}")))
                    }
                }
            }
            Err(error) => self.failed(&name, error),
        }
    }

    fn failed(&self, name: &ProcessName, error: cluster::Error) -> Outcome {
        match error {
            cluster::Error::NoAddress { .. }
            | cluster::Error::Unreachable { .. }
            | cluster::Error::Closed => {
                self.with(name, |load| load.gone_at = Some(Instant::now()));
                Outcome::NotRun { after: Duration::from_millis(20) }
            }
            cluster::Error::Overloaded { retry_after_ms, .. } => Outcome::NotRun {
                after: Duration::from_millis(retry_after_ms.clamp(5, 1_000).into()),
            },
            cluster::Error::PeerGone { .. } => {
                self.with(name, |load| load.gone_at = Some(Instant::now()));
                Outcome::Failed(lost(&format!("{name} went away with the step")))
            }
            cluster::Error::Deadline { .. } => {
                Outcome::Failed(lost(&format!("{name} did not answer in time")))
            }
            cluster::Error::Refused(refusal) => {
                let reason = cluster::reason_of(&refusal).unwrap_or(Reason::Overloaded);
                let kind = cluster::Error::Refused(refusal.clone()).kind();
                outcome(Err(JobFailure { kind, reason, detail: refusal.message }))
            }
            cluster::Error::Cookie { .. }
            | cluster::Error::CookieShort { .. }
            | cluster::Error::Listen { .. }
            | cluster::Error::Start { .. }
            | cluster::Error::TooLarge { .. } => {
                let (kind, reason) = (error.kind(), Reason::InputTooLarge);
                Outcome::Failed(JobFailure { kind, reason, detail: error.to_string() })
            }
        }
    }

    fn with(&self, name: &ProcessName, change: impl FnOnce(&mut PeerLoad)) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        change(peers.entry(name.clone()).or_default());
    }

    /// Forgets what is known of nodes that are not in `view`.
    pub(crate) fn retain(&self, view: &View) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.retain(|name, load| view.members.contains_key(name) || 0 < load.jobs);
    }
}

impl PeerLoad {
    fn is_passed_over(&self) -> bool {
        self.gone_at.is_some_and(|at| at.elapsed() < PASS_OVER)
    }
}

/// Refusals before the job ran are no attempts.
const NOT_RUN: [Reason; 4] =
    [Reason::Overloaded, Reason::NoOffer, Reason::ShuttingDown, Reason::NodeFull];

fn outcome(answer: Result<PhaseAnswer, JobFailure>) -> Outcome {
    match answer {
        Ok(answer) => Outcome::Done(answer),
        Err(failure) if NOT_RUN.contains(&failure.reason) => {
            Outcome::NotRun { after: Duration::from_millis(20) }
        }
        Err(failure) => Outcome::Failed(failure),
    }
}

fn lost(detail: &str) -> JobFailure {
    JobFailure {
        kind: ErrorKind::Unavailable,
        reason: Reason::WorkerLost,
        detail: detail.to_owned(),
    }
}
