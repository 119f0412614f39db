//! Finds a pool for a step and runs the step there: here if this node offers it, else on the least loaded node that does.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use prost::Message;
use tokio::sync::oneshot;

use cluster::Peer;
use domain::turn::doubt::Effect;
use domain::view::{Offer, View};
use domain::{Attempt, ErrorKind, ProcessName, Reason, Role};
use proto::kind;
use proto::link::{Envelope, StepAnswer, StepJob, StepsKept};

use crate::awake::boot_ms;
use crate::held::{Held, Route};
use crate::pool::{JobFailure, Pools, Task, Wanted, effect_of};
use crate::shard::lock;
use crate::wire::{self, Wire};

/// After a node was found gone it is passed over for this long, or until it answers again.
const PASS_OVER: Duration = Duration::from_millis(1_000);
/// After a node had no room for a step it is passed over for this long: others may have some.
const FULL_FOR: Duration = Duration::from_millis(100);
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
    peers: Mutex<BTreeMap<ProcessName, PeerLoad>>,
    /// Answers of others' pools that are in the journal, and nobody has told them.
    kept: Mutex<BTreeMap<ProcessName, Vec<Attempt>>>,
    this: Weak<Self>,
}

#[derive(Default)]
struct PeerLoad {
    /// Jobs of ours that it has not answered.
    jobs: u32,
    gone_at: Option<Instant>,
    full_at: Option<Instant>,
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
        let (peers, kept) = Default::default();
        Arc::new_cyclic(|this| Self {
            me,
            pools,
            held,
            wire,
            view,
            on_route,
            peers,
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
        match least(&lock(&self.peers), offers()) {
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
        let envelope = Envelope {
            kind: kind::STEP,
            attempt: attempt.number,
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
                self.with(&name, |load| (load.gone_at, load.full_at) = (None, None));
                match StepAnswer::decode(bytes) {
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
            cluster::Error::Overloaded { retry_after_ms, .. } => {
                self.with(name, |load| load.full_at = Some(Instant::now()));
                Outcome::NotRun {
                    after: Duration::from_millis(retry_after_ms.clamp(5, 1_000).into()),
                }
            }
            cluster::Error::PeerGone { .. } => {
                self.with(name, |load| load.gone_at = Some(Instant::now()));
                Outcome::Cut(lost(&format!("{name} went away with the step")))
            }
            cluster::Error::Deadline { .. } => {
                Outcome::Failed(lost(&format!("{name} did not answer in time")))
            }
            cluster::Error::Refused(refusal) => {
                // What a later version means is not known, and so it is not known whether the step ran.
                let reason = cluster::reason_of(&refusal).unwrap_or(Reason::AnswerLost);
                if matches!(reason, Reason::Overloaded | Reason::NodeFull) {
                    self.with(name, |load| load.full_at = Some(Instant::now()));
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

    fn with(&self, name: &ProcessName, change: impl FnOnce(&mut PeerLoad)) {
        change(lock(&self.peers).entry(name.clone()).or_default());
    }

    /// Forgets what is known of nodes that are not in `view`.
    pub(crate) fn retain(&self, view: &View) {
        let is_known = |name: &ProcessName| view.members.contains_key(name);
        lock(&self.peers).retain(|name, load| is_known(name) || 0 < load.jobs);
    }
}

/// Who of these has the least of our jobs for the room that it offers; any of those that are equal. None: all are gone or
/// full.
fn least<'a>(
    peers: &BTreeMap<ProcessName, PeerLoad>,
    offers: impl Iterator<Item = (&'a ProcessName, &'a Offer)>,
) -> Option<(&'a ProcessName, &'a Offer)> {
    let (mut best, mut least, mut equals) = (None, u64::MAX, 0_u32);
    for (name, offer) in offers {
        let load = peers.get(name);
        if load.is_some_and(PeerLoad::is_passed_over) {
            continue;
        }
        let jobs = u64::from(load.map_or(0, |load| load.jobs));
        let share = jobs * 1_000 / u64::from(offer.capacity.max(1));
        equals = if share < least { 1 } else { equals + u32::from(share == least) };
        if share < least || share == least && rand::random_range(0..equals) == 0 {
            (best, least) = (Some((name, offer)), share);
        }
    }
    best
}

/// How long before its deadline an order may be begun at the latest, so that the receiver can tell by its own clock. None:
/// it is too late already.
fn begin_before_ms(by_ms: u64, now_ms: u64, deadline: Instant) -> Option<u64> {
    let left_ms = by_ms.checked_sub(now_ms)?;
    let until = deadline.saturating_duration_since(Instant::now());
    let until_ms = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
    // 0 means at any time.
    Some(until_ms.saturating_sub(left_ms).max(1))
}

/// The latest beginning of an order that came in, by this machine's boot clock.
pub(crate) fn begin_by_ms(before_ms: u64, deadline: Instant) -> Option<u64> {
    if before_ms == 0 {
        return None;
    }
    let until = deadline.saturating_duration_since(Instant::now());
    let until_ms = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
    Some(boot_ms() + until_ms.saturating_sub(before_ms))
}

impl PeerLoad {
    fn is_passed_over(&self) -> bool {
        let within = |at: Option<Instant>, span| at.is_some_and(|at| at.elapsed() < span);
        within(self.gone_at, PASS_OVER) || within(self.full_at, FULL_FOR)
    }
}

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
    use std::collections::BTreeSet;

    use domain::Capability;

    use super::*;

    #[test]
    fn a_step_goes_where_there_is_most_room_and_not_where_there_is_none() {
        let name = |n: u32| -> ProcessName { format!("node-{n}").parse().unwrap() };
        let capability = Capability {
            name: "phase/action".parse().unwrap(),
            version: 1,
            attributes: BTreeMap::new(),
        };
        let offers: BTreeMap<ProcessName, Offer> = [(1, 8), (2, 4), (3, 4)]
            .map(|(n, capacity)| (name(n), Offer { capability: capability.clone(), capacity }))
            .into();
        let loads = |loads: [(u32, Option<Instant>); 3]| -> BTreeMap<ProcessName, PeerLoad> {
            let load = |(jobs, full_at)| PeerLoad { jobs, full_at, gone_at: None };
            (1..).zip(loads).map(|(n, of)| (name(n), load(of))).collect()
        };
        let chosen = |peers: &BTreeMap<ProcessName, PeerLoad>| -> BTreeSet<String> {
            let choose = |_| Some(least(peers, offers.iter())?.0.to_string());
            (0..200).filter_map(choose).collect()
        };
        let all = ["node-1", "node-2", "node-3"].map(str::to_owned);
        assert_eq!(chosen(&BTreeMap::new()), all.into(), "nobody has more to do than others");
        let by_share = chosen(&loads([(7, None), (3, None), (4, None)]));
        assert_eq!(by_share, ["node-2".to_owned()].into());
        let now = Some(Instant::now());
        let full = chosen(&loads([(0, now), (0, now), (9, None)]));
        assert_eq!(full, ["node-3".to_owned()].into());
        let none = loads([(0, now), (0, now), (0, now)]);
        assert!(least(&none, offers.iter()).is_none());
    }

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
}
