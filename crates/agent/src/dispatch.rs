//! Finds a pool for a step and runs the step there: here if this node offers it, else on the least loaded node that does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use prost::Message;
use tokio::sync::oneshot;

use cluster::Peer;
use domain::loads::Loads;
use domain::time::Millis;
use domain::turn::doubt::Effect;
use domain::view::View;
use domain::{Attempt, ErrorKind, ProcessName, Reason, Role};
use proto::kind;
use proto::link::{Envelope, StepAnswer, StepJob, StepsKept};

use crate::awake::boot_ms;
use crate::held::{Held, Route};
use crate::pool::{JobFailure, Pools, Task, Wanted, effect_of};
use crate::shard::lock;
use crate::wire::{self, Wire};

/// How long word that answers are journaled waits for more of it.
const KEPT_AFTER: Duration = Duration::from_millis(25);

/// Told of answers that belong to another owner than the one that asked.
pub(crate) type OnRoute = Arc<dyn Fn(Route) + Send + Sync>;

/// Sends steps to pools.
pub(crate) struct Dispatcher {
    me: ProcessName,
    pools: Pools,
    held: Arc<Held>,
    wire: Arc<dyn Wire>,
    view: Arc<ArcSwapOption<View>>,
    on_route: OnRoute,
    loads: Mutex<Loads<Wanted>>,
    /// Answers of others' pools that are in the journal, and nobody has told them.
    kept: Mutex<BTreeMap<ProcessName, Vec<Attempt>>>,
    this: Weak<Self>,
}

/// Where a step can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    At(Place, Effect),
    /// It is offered, but by nobody who can be reached now.
    Later,
    /// Nobody offers it.
    Nowhere,
}

/// Whose pool runs a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Here,
    There(ProcessName),
}

/// One attempt at a step, for a pool.
pub(crate) struct Order {
    pub job: StepJob,
    pub attempt: Attempt,
    pub traceparent: String,
    pub deadline: Instant,
    /// It is not begun after that time of the boot clock.
    pub begin_by_ms: Option<u64>,
}

/// What became of a job.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done(StepAnswer),
    /// It did not run: give it to somebody else, no attempt was made.
    NotRun {
        after: Duration,
    },
    /// It may have run and its answer is lost, or it ran and failed.
    Failed(JobFailure),
    /// The answer got lost, or the link with it, and the worker lives: it may have the answer still.
    Cut(JobFailure),
}

/// What a dispatcher needs.
pub(crate) struct DispatcherArgs {
    pub me: ProcessName,
    pub pools: Pools,
    pub held: Arc<Held>,
    pub wire: Arc<dyn Wire>,
    pub view: Arc<ArcSwapOption<View>>,
    pub on_route: OnRoute,
}

impl Dispatcher {
    pub(crate) fn new(args: DispatcherArgs) -> Arc<Self> {
        let DispatcherArgs { me, pools, held, wire, view, on_route } = args;
        let (loads, kept) = Default::default();
        Arc::new_cyclic(|this| Self {
            me,
            pools,
            held,
            wire,
            view,
            on_route,
            loads,
            kept,
            this: this.clone(),
        })
    }

    /// Chooses where a step that needs `wanted` runs.
    pub(crate) fn target(&self, view: Option<&View>, wanted: &Wanted, modality: &str) -> Target {
        if let Some(effect) = self.pools.offers(wanted, modality) {
            return Target::At(Place::Here, effect);
        }
        let (Some(view), Some(query)) = (view, wanted.query(modality)) else {
            return Target::Nowhere;
        };
        let offers = || view.offers(&query).filter(|(name, _)| **name != self.me);
        let rooms = offers().map(|(name, offer)| (name, offer.capacity));
        let least = lock(&self.loads)
            .least(wanted, rooms, Millis(boot_ms()), |equals| rand::random_range(0..equals));
        match least.and_then(|least| offers().find(|(name, _)| *name == least)) {
            Some((name, offer)) => {
                let effect = effect_of(wanted, &offer.capability.attributes);
                Target::At(Place::There(name.clone()), effect)
            }
            None if offers().next().is_some() => Target::Later,
            None => Target::Nowhere,
        }
    }

    /// Runs `order` at `place`, until its deadline at the latest.
    pub(crate) async fn run(&self, place: Place, order: Order) -> Outcome {
        match place {
            Place::Here => self.run_here(order).await,
            Place::There(name) => self.run_there(name, order).await,
        }
    }

    async fn run_here(&self, order: Order) -> Outcome {
        let (sender, receiver) = oneshot::channel();
        let deadline = order.deadline;
        self.take(order, Box::new(move |answer| _ = sender.send(answer)));
        let answer = tokio::time::timeout_at(deadline.into(), receiver).await;
        match answer {
            Ok(Ok(answer)) => outcome(answer),
            Ok(Err(_)) => Outcome::Failed(lost("the worker of the step died")),
            Err(_) => Outcome::Failed(lost("the worker of the step did not answer in time")),
        }
    }

    /// Gives an order to a pool of this node, whoever it comes from.
    pub(crate) fn take(&self, order: Order, done: crate::pool::Done) {
        let Order { job, attempt, traceparent, deadline, begin_by_ms } = order;
        let taken_ms = boot_ms();
        let task = Task { job, attempt, traceparent, deadline, begin_by_ms, taken_ms };
        let (view, on_route) = (self.view.clone(), self.on_route.clone());
        self.pools.submit(task, move || view.load_full(), move |route| on_route(route), done);
    }

    async fn run_there(&self, name: ProcessName, order: Order) -> Outcome {
        let Order { mut job, attempt, traceparent, deadline, begin_by_ms } = order;
        if let (Some(by_ms), Some(tool)) = (begin_by_ms, &mut job.tool) {
            let Some(before_ms) = begin_before_ms(by_ms, boot_ms(), deadline) else {
                return Outcome::NotRun { after: Duration::ZERO };
            };
            tool.begin_before_ms = before_ms;
        }
        job.left_ms = left_ms(deadline);
        let envelope = Envelope {
            kind: kind::STEP,
            attempt: attempt.number,
            traceparent,
            payload: job.encode_to_vec().into(),
            ..Envelope::default()
        };
        let pool = Wanted::of(attempt.step, &job);
        lock(&self.loads).sent(&name, &pool);
        let peer = Peer::new(Role::Node, name.clone());
        let result = self.wire.call(peer, envelope, deadline).await;
        lock(&self.loads).back(&name, &pool);
        match result.map(StepAnswer::decode) {
            Ok(Ok(answer)) => {
                let left = answer.pool_jobs;
                lock(&self.loads).answered(&name, &pool, left, Millis(boot_ms()));
                Outcome::Done(answer)
            }
            Ok(Err(error)) => {
                Outcome::Failed(lost(&format!("the answer of {name} is damaged: {error}")))
            }
            Err(error) => self.failed(&name, &pool, error),
        }
    }

    fn failed(&self, name: &ProcessName, pool: &Wanted, error: cluster::Error) -> Outcome {
        match error {
            cluster::Error::NoAddress { .. }
            | cluster::Error::Unreachable { .. }
            | cluster::Error::Closed => {
                lock(&self.loads).gone(name, Millis(boot_ms()));
                Outcome::NotRun { after: Duration::from_millis(20) }
            }
            cluster::Error::Overloaded { retry_after_ms, .. } => {
                lock(&self.loads).full(name, pool, Millis(boot_ms()));
                Outcome::NotRun {
                    after: Duration::from_millis(retry_after_ms.clamp(5, 1_000).into()),
                }
            }
            cluster::Error::PeerGone { .. } => {
                lock(&self.loads).gone(name, Millis(boot_ms()));
                Outcome::Cut(lost(&format!("{name} went away with the step")))
            }
            cluster::Error::Deadline { .. } => {
                Outcome::Failed(lost(&format!("{name} did not answer in time")))
            }
            cluster::Error::Refused(refusal) => {
                // What a later version means is not known, and so it is not known whether the step ran.
                let reason = cluster::reason_of(&refusal).unwrap_or(Reason::AnswerLost);
                if matches!(reason, Reason::Overloaded | Reason::NodeFull) {
                    lock(&self.loads).full(name, pool, Millis(boot_ms()));
                }
                if reason == Reason::AnswerLost {
                    return Outcome::Cut(lost(&format!("{name}: {}", refusal.message)));
                }
                let kind = cluster::Error::Refused(refusal.clone()).kind();
                // A worker that failed says so in an answer; what is refused may have been begun, unless its reason says
                // otherwise.
                let is_harmless = matches!(reason, Reason::ToolUnavailable | Reason::Malformed);
                let detail = refusal.message;
                outcome(Err(JobFailure { kind, reason, detail, is_harmless }))
            }
            cluster::Error::Cookie { .. }
            | cluster::Error::CookieShort { .. }
            | cluster::Error::Listen { .. }
            | cluster::Error::Start { .. }
            | cluster::Error::TooLarge { .. } => {
                let (kind, reason) = (error.kind(), Reason::InputTooLarge);
                Outcome::Failed(JobFailure::not_begun(kind, reason, error.to_string()))
            }
        }
    }

    /// The answer of `attempt` is in the journal: whoever keeps it need not.
    pub(crate) fn kept(&self, place: &Place, attempt: Attempt) {
        let Place::There(name) = place else { return self.held.kept(&[attempt]) };
        let is_first = {
            let mut kept = lock(&self.kept);
            kept.entry(name.clone()).or_default().push(attempt);
            kept.values().map(Vec::len).sum::<usize>() == 1
        };
        let (Some(this), true) = (self.this.upgrade(), is_first) else { return };
        tokio::spawn(async move {
            tokio::time::sleep(KEPT_AFTER).await;
            this.tell_kept();
        });
    }

    fn tell_kept(&self) {
        for (name, attempts) in std::mem::take(&mut *lock(&self.kept)) {
            let attempts = attempts.iter().map(wire::attempt).collect();
            let payload = StepsKept { attempts }.encode_to_vec().into();
            let envelope = Envelope { kind: kind::STEPS_KEPT, payload, ..Envelope::default() };
            // Lost, they are kept until their deadlines.
            _ = self.wire.cast(&Peer::new(Role::Node, name), envelope);
        }
    }

    /// Forgets what is known of nodes that are not in `view`.
    pub(crate) fn retain(&self, view: &View) {
        lock(&self.loads).retain(|name| view.members.contains_key(name));
    }
}

fn left_ms(deadline: Instant) -> u64 {
    let left = deadline.saturating_duration_since(Instant::now());
    u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
}

/// Whether a job was so long on its way that it lay in a process that stood still: another may have it by now.
pub(crate) fn is_stale(sent_left_ms: u64, deadline: Instant) -> bool {
    sent_left_ms != 0 && left_ms(deadline) + STALE_MS < sent_left_ms
}

/// How long before its deadline an order may be begun at the latest, so that the receiver can tell by its own clock. None:
/// it is too late already.
fn begin_before_ms(by_ms: u64, now_ms: u64, deadline: Instant) -> Option<u64> {
    let young_ms = by_ms.checked_sub(now_ms)?;
    // 0 means at any time.
    Some(left_ms(deadline).saturating_sub(young_ms).max(1))
}

/// The latest beginning of an order that came in, by this machine's boot clock.
pub(crate) fn begin_by_ms(before_ms: u64, deadline: Instant) -> Option<u64> {
    if before_ms == 0 {
        return None;
    }
    Some((boot_ms() + left_ms(deadline)).saturating_sub(before_ms))
}

/// A job is longer on its way than this if one of the two processes stood still, and hardly otherwise.
const STALE_MS: u64 = 2_000;

/// Refusals before the job ran are no attempts.
const NOT_RUN: [Reason; 6] = [
    Reason::Overloaded,
    Reason::NoOffer,
    Reason::ShuttingDown,
    Reason::NodeFull,
    Reason::DeadlineExceeded,
    Reason::TooOld,
];

fn outcome(answer: Result<StepAnswer, JobFailure>) -> Outcome {
    match answer {
        Ok(answer) => Outcome::Done(answer),
        Err(failure) if NOT_RUN.contains(&failure.reason) => {
            Outcome::NotRun { after: Duration::from_millis(20) }
        }
        Err(failure) => Outcome::Failed(failure),
    }
}

pub(crate) fn lost(detail: &str) -> JobFailure {
    JobFailure {
        kind: ErrorKind::Unavailable,
        reason: Reason::WorkerLost,
        detail: detail.to_owned(),
        is_harmless: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_begun_as_late_there_as_here() {
        let deadline = Instant::now() + Duration::from_secs(30);
        let now_ms = boot_ms();
        let before = begin_before_ms(now_ms + 1_000, now_ms, deadline).unwrap();
        let by_ms = begin_by_ms(before, deadline).unwrap();
        assert!(by_ms.abs_diff(now_ms + 1_000) < 200, "{by_ms} {now_ms}");
        assert_eq!(begin_before_ms(now_ms - 1, now_ms, deadline), None);
        assert_eq!(begin_by_ms(0, deadline), None);
    }

    #[test]
    fn an_order_that_comes_too_late_to_be_begun_is_too_late_in_the_same_millisecond() {
        let deadline = Instant::now() + Duration::from_secs(30);
        // It was to be begun within a second, and lay five in a process that stood still.
        let before = begin_before_ms(boot_ms() + 1_000, boot_ms(), deadline).unwrap();
        let by_ms = begin_by_ms(before, deadline.checked_sub(Duration::from_secs(5)).unwrap());
        assert!(by_ms.unwrap() + 3_000 < boot_ms());
    }

    #[test]
    fn a_job_that_lay_in_a_process_that_stood_still_is_stale() {
        let deadline = Instant::now() + Duration::from_secs(30);
        assert!(!is_stale(30_000, deadline));
        assert!(!is_stale(31_500, deadline));
        assert!(is_stale(32_500, deadline));
        assert!(!is_stale(0, deadline), "who asks does not say how long it was");
    }
}
