//! Brings a call to the owner of its shard, again and again across moves and failovers, until the caller's deadline.
//!
//! Never repeats a call that the owner itself has refused for good, and never decides who owns a shard: the view says
//! so, and the owner has the last word.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use domain::reach::Unreached;
use domain::time::Millis;
use domain::view::View;
use domain::{AgentId, Class, Epoch, ErrorKind, ProcessName, Reason, ShardId, Slot, WorkId};
use prost::Message;
use proto::link;
use proto::status::Failure;
use telemetry::metrics::{IntCounter, counter};
use tokio::time::{Instant, sleep_until};
use tracing::Instrument;

use crate::network::{Missed, Network, Views};
use crate::refusal;

const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(200);

static RETRIES: LazyLock<IntCounter> = LazyLock::new(|| {
    counter("stagedoor_control_route_retries_total", "Calls to owners that were tried again.")
});

/// Which shard a call is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum At {
    Slot(Class, Slot),
    Shard(ShardId),
}

impl At {
    pub(crate) fn work(id: WorkId) -> Self {
        Self::Slot(id.class, id.slot)
    }

    pub(crate) fn agent(id: &AgentId) -> Self {
        Self::Slot(Class(0), id.slot())
    }

    /// Of a call that is made to many shards: each replaces it.
    pub(crate) fn any() -> Self {
        Self::Shard(ShardId(0))
    }
}

/// Who owns a shard, as the view has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seat {
    pub(crate) shard: ShardId,
    pub(crate) node: ProcessName,
    pub(crate) epoch: Epoch,
}

impl Seat {
    /// Whether the view still has it so.
    pub(crate) fn stands_in(&self, view: &View) -> bool {
        view.owner(self.shard)
            .is_some_and(|(owner, epoch)| owner.name == self.node && epoch == self.epoch)
    }
}

/// A call without its payload.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) at: At,
    pub(crate) kind: u32,
    pub(crate) tenant: String,
    /// tenant/name/key, if it is for one agent.
    pub(crate) agent: String,
    pub(crate) work: u64,
    pub(crate) traceparent: String,
    pub(crate) deadline: Instant,
    /// The caller may make it again: it is the same call then.
    pub(crate) is_repeatable: bool,
}

impl Call {
    pub(crate) fn new(kind: u32, at: At, deadline: Instant) -> Self {
        let (tenant, agent, traceparent) = (String::new(), String::new(), String::new());
        Self { at, kind, tenant, agent, work: 0, traceparent, deadline, is_repeatable: true }
    }
}

/// What keeps a call from its owner.
struct Obstacle {
    reason: Reason,
    text: String,
}

enum Outcome {
    Answer(Bytes),
    Again(Obstacle),
    /// No word gets to the owner.
    Unreached(Obstacle),
    Over(Failure),
}

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Router {
    network: Arc<dyn Network>,
}

impl Router {
    pub(crate) fn new(network: Arc<dyn Network>) -> Self {
        Self { network }
    }

    pub(crate) fn network(&self) -> &Arc<dyn Network> {
        &self.network
    }

    /// Calls with the same payload at every attempt.
    pub(crate) async fn call<A>(&self, call: &Call, request: &impl Message) -> Result<A, Failure>
    where
        A: Message + Default,
    {
        let payload = Bytes::from(request.encode_to_vec());
        let (answer, _) = self.call_with(call, &mut |_| payload.clone()).await?;
        Ok(answer)
    }

    /// Calls with what `prepare` makes for each attempt; answers with the owner that answered, too.
    pub(crate) async fn call_with<A>(
        &self,
        call: &Call,
        prepare: &mut (dyn FnMut(&Seat) -> Bytes + Send),
    ) -> Result<(A, Seat), Failure>
    where
        A: Message + Default,
    {
        let span = match call.traceparent.is_empty() {
            true => tracing::Span::none(),
            false => tracing::info_span!("route", agent = call.agent),
        };
        self.route(call, prepare).instrument(span).await
    }

    async fn route<A>(
        &self,
        call: &Call,
        prepare: &mut (dyn FnMut(&Seat) -> Bytes + Send),
    ) -> Result<(A, Seat), Failure>
    where
        A: Message + Default,
    {
        let begun = Instant::now();
        let mut views = self.network.views();
        let mut pause = PAUSE_MIN;
        let mut unreached = Unreached::default();
        loop {
            let seat = seat(&views.borrow_and_update(), call.at);
            let obstacle = match seat {
                Ok(seat) => match self.attempt(call, &seat, &mut views, prepare(&seat)).await {
                    Outcome::Answer(bytes) => {
                        let answer = A::decode(bytes);
                        let answer =
                            answer.map_err(|error| refusal::unreadable("an answer", &error))?;
                        return Ok((answer, seat));
                    }
                    Outcome::Over(failure) => return Err(failure),
                    Outcome::Again(obstacle) => {
                        unreached.reached();
                        obstacle
                    }
                    Outcome::Unreached(obstacle) => match unreached.missed(seat, since(begun)) {
                        true if call.is_repeatable => return Err(out_of_reach(obstacle)),
                        true | false => obstacle,
                    },
                },
                Err(Missing::Shard) => return Err(no_shard(call.at)),
                Err(Missing::Stopped(shard)) => return Err(stopped(shard)),
                Err(Missing::Owner(obstacle)) => obstacle,
            };
            RETRIES.inc();
            wait(&mut views, pause, call.deadline).await?;
            if call.deadline <= Instant::now() {
                return Err(too_late(begun, Some(&obstacle)));
            }
            pause = PAUSE_MAX.min(pause * 2);
        }
    }

    async fn attempt(
        &self,
        call: &Call,
        seat: &Seat,
        views: &mut Views,
        payload: Bytes,
    ) -> Outcome {
        let begun = Instant::now();
        if call.deadline <= begun {
            return Outcome::Over(too_late(begun, None));
        }
        let envelope = link::Envelope {
            kind: call.kind,
            agent: call.agent.clone(),
            shard: seat.shard.0,
            epoch: seat.epoch.0,
            work: call.work,
            tenant: call.tenant.clone(),
            // The turn hangs on the route to it.
            traceparent: telemetry::current_traceparent()
                .unwrap_or_else(|| call.traceparent.clone()),
            payload,
            ..link::Envelope::default()
        };
        // An owner that was stopped answers nothing for as long as its link holds; the view knows earlier.
        let missed = tokio::select! {
            biased;
            answer = self.network.call(&seat.node, envelope, call.deadline) => match answer {
                Ok(bytes) => return Outcome::Answer(bytes),
                Err(missed) => missed,
            },
            () = unseated(seat, views) => {
                let text = format!("{}, which owned shard {}, has not answered", seat.node, seat.shard);
                return Outcome::Again(Obstacle { reason: Reason::Unowned, text });
            }
        };
        let Seat { shard, node, .. } = seat;
        match missed {
            Missed::Gone(text) => Outcome::Unreached(Obstacle {
                reason: Reason::Unowned,
                text: format!("{node}, which owns shard {shard}, does not answer: {text}"),
            }),
            Missed::Overloaded(text) => {
                Outcome::Over(refusal::overloaded(format!("{node}: {text}")))
            }
            Missed::Deadline => Outcome::Over(too_late(begun, None)),
            Missed::Refused(refused) => match refusal::reason(&refused) {
                Some(reason) if refusal::is_elsewhere(reason) => Outcome::Again(Obstacle {
                    reason,
                    text: format!("{node} does not own shard {shard}: {reason}"),
                }),
                Some(_) | None => Outcome::Over(refusal::failure(refused)),
            },
        }
    }
}

/// Counted from the begin of the call.
fn since(begun: Instant) -> Millis {
    Millis(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX))
}

/// The client may reach it through another API server.
fn out_of_reach(obstacle: Obstacle) -> Failure {
    let reason = Reason::OwnerUnreached;
    let failure = Failure::new(refusal::kind(reason), reason, obstacle.text);
    failure.retry_after(PAUSE_MAX)
}

/// Resolves when the view has the shard elsewhere.
async fn unseated(seat: &Seat, views: &mut Views) {
    while views.changed().await.is_ok() {
        let stands = views.borrow_and_update().as_ref().is_some_and(|view| seat.stands_in(view));
        if !stands {
            return;
        }
    }
    // There will be no other view; only the call itself can end now.
    std::future::pending().await
}

enum Missing {
    Shard,
    /// Only an operator can bring it back.
    Stopped(ShardId),
    Owner(Obstacle),
}

fn seat(view: &Option<Arc<View>>, at: At) -> Result<Seat, Missing> {
    let missing = |text: String| Missing::Owner(Obstacle { reason: Reason::Unowned, text });
    let Some(view) = view else {
        return Err(missing("nobody leads the cluster yet".to_owned()));
    };
    let shard = match at {
        At::Slot(class, slot) => view.shard_at(class, slot),
        At::Shard(shard) => view.shards.contains_key(&shard).then_some(shard),
    };
    let shard = shard.ok_or(Missing::Shard)?;
    if view.shards.get(&shard).is_some_and(|place| place.stopped) {
        return Err(Missing::Stopped(shard));
    }
    let Some((owner, epoch)) = view.owner(shard) else {
        return Err(missing(format!("shard {shard} has no owner")));
    };
    Ok(Seat { shard, node: owner.name.clone(), epoch })
}

fn no_shard(at: At) -> Failure {
    Failure::not_found(match at {
        At::Slot(class, _) => format!("this cluster has no placement class {}", class.0),
        At::Shard(shard) => format!("this cluster has no shard {shard}"),
    })
}

fn stopped(shard: ShardId) -> Failure {
    let text = format!(
        "shard {shard} is stopped: its store is older than what was acknowledged; restore it from a backup, or accept what \
         is lost with stagedoor release {shard}"
    );
    Failure::new(refusal::kind(Reason::StoreRolledBack), Reason::StoreRolledBack, text)
}

/// Until the view changes, or for some time between half of `pause` and all of it.
async fn wait(views: &mut Views, pause: Duration, deadline: Instant) -> Result<(), Failure> {
    let jittered = pause.mul_f64(rand::random_range(0.5..1.0));
    let until = deadline.min(Instant::now() + jittered);
    tokio::select! {
        changed = views.changed() => changed.map_err(|_| shutting_down()),
        () = sleep_until(until) => Ok(()),
    }
}

/// This process is about to end: another API server may answer.
pub(crate) fn shutting_down() -> Failure {
    let failure = Failure::new(
        ErrorKind::Unavailable,
        Reason::ShuttingDown,
        "this API server is shutting down",
    );
    failure.retry_after(PAUSE_MAX)
}

fn too_late(begun: Instant, obstacle: Option<&Obstacle>) -> Failure {
    let ms = begun.elapsed().as_millis();
    let (reason, why) = match obstacle {
        Some(obstacle) => (obstacle.reason, obstacle.text.as_str()),
        None => (Reason::DeadlineExceeded, "the owner has not answered"),
    };
    Failure::new(ErrorKind::Deadline, reason, format!("no answer within {ms} ms: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeNetwork, refuse, view};

    fn call(deadline: Duration) -> Call {
        Call::new(proto::kind::GET, At::Shard(ShardId(0)), Instant::now() + deadline)
    }

    fn answer() -> Result<Bytes, Missed> {
        Ok(link::GetAnswer { lsn: 7, ..link::GetAnswer::default() }.encode_to_vec().into())
    }

    async fn get(
        network: &Arc<FakeNetwork>,
        deadline: Duration,
    ) -> Result<link::GetAnswer, Failure> {
        let router = Router::new(network.clone());
        router.call(&call(deadline), &link::GetCall::default()).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_follows_its_shard() {
        let network = FakeNetwork::new(view(1, &[("node-1", 1)]), |network, node, envelope| {
            if node == "node-2" && envelope.epoch == 2 {
                return answer();
            }
            network.set_view(view(2, &[("node-2", 2)]));
            refuse(Reason::Moved)
        });
        assert_eq!(get(&network, Duration::from_secs(1)).await.unwrap().lsn, 7);
        assert_eq!(network.calls(), ["node-1", "node-2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn every_sign_of_a_move_is_tried_again() {
        for reason in [Reason::Moved, Reason::Fenced, Reason::Unowned, Reason::ShuttingDown] {
            let network = FakeNetwork::new(view(1, &[("node-1", 1)]), move |network, _, _| {
                if network.calls().len() < 4 { refuse(reason) } else { answer() }
            });
            assert!(get(&network, Duration::from_secs(5)).await.is_ok(), "{reason}");
        }
        let network = FakeNetwork::new(view(1, &[("node-1", 1)]), |network, _, _| {
            if network.calls().len() < 2 { Err(Missed::Gone("reset".to_owned())) } else { answer() }
        });
        assert!(get(&network, Duration::from_secs(5)).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn an_owner_that_only_this_server_cannot_reach_is_left_to_another_server() {
        let begun = Instant::now();
        let network = FakeNetwork::new(view(1, &[("node-1", 1)]), |network, _, _| {
            // It comes back as another owner, which has its time, too.
            if network.calls().len() == 20 {
                network.set_view(view(2, &[("node-1", 2)]));
            }
            Err(Missed::Gone("reset".to_owned()))
        });
        let failure = get(&network, Duration::from_secs(60)).await.unwrap_err();
        let told = (failure.kind, failure.reason);
        assert_eq!(told, (ErrorKind::Unavailable, Reason::OwnerUnreached));
        assert!(failure.message.contains("node-1, which owns shard 0"), "{}", failure.message);
        let (early, late) = (Duration::from_millis(9_500), Duration::from_secs(12));
        assert!(early < begun.elapsed() && begun.elapsed() < late, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_owner_is_left_when_the_view_says_so() {
        let network = FakeNetwork::new(view(1, &[("node-1", 1)]), |_, node, _| {
            if node == "node-1" { Err(Missed::Deadline) } else { answer() }
        });
        network.make_silent("node-1");
        let waiting = tokio::spawn({
            let network = network.clone();
            async move { get(&network, Duration::from_secs(60)).await }
        });
        network.called(1).await;
        network.set_view(view(2, &[("node-1", 1)]));
        network.set_view(view(3, &[("node-2", 2)]));
        assert_eq!(waiting.await.unwrap().unwrap().lsn, 7);
        assert_eq!(network.calls(), ["node-1", "node-2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_deadline_the_caller_learns_what_was_missing() {
        let begun = Instant::now();
        let network = FakeNetwork::new(view(1, &[("", 0)]), |_, _, _| answer());
        let failure = get(&network, Duration::from_secs(2)).await.unwrap_err();
        assert_eq!((failure.kind, failure.reason), (ErrorKind::Deadline, Reason::Unowned));
        assert!(failure.message.contains("shard 0 has no owner"), "{}", failure.message);
        assert_eq!(begun.elapsed().as_secs(), 2);
        assert!(network.calls().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_owner_refuses_for_good_is_not_repeated() {
        for reason in
            [Reason::QueueFull, Reason::StoreUnavailable, Reason::KeyReused, Reason::NotFound]
        {
            let network =
                FakeNetwork::new(view(1, &[("node-1", 1)]), move |_, _, _| refuse(reason));
            let failure = get(&network, Duration::from_secs(2)).await.unwrap_err();
            assert_eq!((failure.reason, network.calls().len()), (reason, 1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stopped_shard_is_not_waited_for() {
        let mut stopped = View::clone(&view(1, &[("node-1", 1)]));
        stopped.shards.entry(ShardId(0)).or_default().stopped = true;
        let network = FakeNetwork::new(Arc::new(stopped), |_, _, _| answer());
        let begun = Instant::now();
        let failure = get(&network, Duration::from_secs(2)).await.unwrap_err();
        assert_eq!((failure.kind, failure.reason), (ErrorKind::Internal, Reason::StoreRolledBack));
        assert!(failure.message.contains("stagedoor release 0"), "{}", failure.message);
        assert_eq!((begun.elapsed(), network.calls().len()), (Duration::ZERO, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_shard_that_does_not_exist_is_not_waited_for() {
        let network = FakeNetwork::new(view(1, &[("node-1", 1)]), |_, _, _| answer());
        let router = Router::new(network.clone());
        let at = At::Slot(Class(4), Slot::new(0).unwrap());
        let call = Call::new(proto::kind::GET, at, Instant::now() + Duration::from_secs(1));
        let failed: Result<link::GetAnswer, _> =
            router.call(&call, &link::GetCall::default()).await;
        assert_eq!(failed.unwrap_err().kind, ErrorKind::NotFound);
    }
}
