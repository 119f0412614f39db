//! What a new owner asks every live node once: which steps of the shard do you run, or hold answers of?

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures::future::join_all;
use prost::Message;

use cluster::Peer;
use domain::{Attempt, Epoch, Lsn, ProcessName, Role, ShardId};
use proto::kind;
use proto::link::{Envelope, StepAnswer, StepsHeld, StepsWanted};

use crate::actor::step::Outcome;
use crate::dispatch::Place;
use crate::metrics;
use crate::pool::JobFailure;
use crate::shard::Context;
use crate::wire;

/// A node that has not answered by then is not waited for.
const WAIT: Duration = Duration::from_millis(200);
/// The same for a new owner whose link to the node has to come up first: they had nothing to say to each other until the shard
/// moved. A dial that fails is an answer; one that takes so long is of a node that hangs, and was not found out yet.
const WAIT_FOR_LINK: Duration = Duration::from_secs(1);

/// A step that its worker has.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub attempt: Attempt,
    pub place: Place,
    /// None while it runs.
    pub answer: Option<StepAnswer>,
    pub deadline: Instant,
}

impl Context {
    /// Asks every node of the view for the steps of `shard`, which this node owns in `epoch`. By their works: of each the
    /// last attempt.
    pub(crate) async fn steps_of(&self, shard: ShardId, epoch: Epoch) -> HashMap<Lsn, Named> {
        let view = self.view.load_full();
        let nodes = view.iter().flat_map(|view| &view.members);
        let nodes = nodes.filter(|(name, info)| info.role == Role::Node && **name != self.name);
        let asked = nodes.map(|(name, _)| {
            let is_linked = self.wire.is_linked(&Peer::new(Role::Node, name.clone()));
            let wait = if is_linked { WAIT } else { WAIT_FOR_LINK };
            self.ask(name.clone(), shard, epoch, wait)
        });
        let mut named = read(Place::Here, self.held.of_shard(shard, &self.name, epoch));
        for steps in join_all(asked).await {
            named.extend(steps);
        }
        metrics::STEPS_NAMED.inc_by(named.len() as u64);
        let mut by_work: HashMap<Lsn, Named> = HashMap::new();
        for step in named {
            let key = |named: &Named| (named.attempt.step, named.attempt.number);
            let known = by_work.get(&step.attempt.work.lsn);
            if known.is_none_or(|known| key(known) < key(&step)) {
                by_work.insert(step.attempt.work.lsn, step);
            }
        }
        by_work
    }

    /// The link to `place` broke while it had `attempt`: it may live, and have the step still.
    pub(crate) async fn after_cut(
        &self,
        place: &Place,
        shard: ShardId,
        attempt: Attempt,
        failure: JobFailure,
    ) -> Outcome {
        let Place::There(node) = place else { return Outcome::Failed(failure) };
        if !self.is_there(place) {
            return Outcome::Failed(failure);
        }
        let steps = self.ask(node.clone(), shard, attempt.epoch, WAIT).await;
        match steps.into_iter().find(|named| named.attempt == attempt) {
            Some(Named { answer: Some(answer), .. }) => Outcome::Done(answer),
            Some(named) => Outcome::Awaited(named),
            None => Outcome::Failed(failure),
        }
    }

    /// Whether the cluster believes that a node lives.
    pub(crate) fn is_there(&self, place: &Place) -> bool {
        let Place::There(name) = place else { return true };
        self.view.load().as_ref().is_some_and(|view| view.members.contains_key(name))
    }

    async fn ask(
        &self,
        node: ProcessName,
        shard: ShardId,
        epoch: Epoch,
        wait: Duration,
    ) -> Vec<Named> {
        let wanted = StepsWanted { shard: shard.0, epoch: epoch.0 };
        let payload = wanted.encode_to_vec().into();
        let envelope = Envelope { kind: kind::STEPS_WANTED, payload, ..Envelope::default() };
        let peer = Peer::new(Role::Node, node.clone());
        let answer = self.wire.call(peer, envelope, Instant::now() + wait).await;
        let steps = answer.ok().and_then(|bytes| StepsHeld::decode(bytes).ok());
        read(Place::There(node), steps.unwrap_or_default())
    }
}

fn read(place: Place, steps: StepsHeld) -> Vec<Named> {
    let now = Instant::now();
    let named = steps.steps.into_iter().filter_map(|step| {
        Some(Named {
            attempt: wire::read_attempt(step.attempt.as_ref()?)?,
            place: place.clone(),
            answer: step.answer,
            // Nobody's step takes longer than a day.
            deadline: now + Duration::from_millis(step.left_ms.min(24 * 3_600 * 1_000)),
        })
    });
    named.collect()
}
