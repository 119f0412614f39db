//! What nodes say to each other about steps: jobs come in, answers go out.
//!
//! An answer that its asker may not have gets to whoever owns the agent now: it is told again and again until it is taken,
//! refused for good, or too late.

use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use tokio::sync::oneshot;

use cluster::{Incoming, Peer, Reply};
use domain::{Epoch, ProcessName, Reason, Role, ShardId};
use proto::kind;
use proto::link::{
    Envelope, StepAnswer, StepAnswered, StepJob, StepText, StepTextAnswer, StepsKept, StepsWanted,
};

use crate::dispatch::{self, Order};
use crate::held::{Route, WantedBy};
use crate::node::Handle;
use crate::pool::JobFailure;
use crate::shard::refusal;
use crate::speech::Taken;
use crate::{metrics, wire};

const AGAIN: Duration = Duration::from_millis(100);
const CALL_MAX: Duration = Duration::from_secs(2);

/// What became of one try.
enum Told {
    /// The owner has it, or does not want it.
    Settled,
    Again,
}

impl Handle {
    /// A job for a pool of this node.
    pub(crate) fn step(&self, incoming: Incoming) {
        let Incoming { envelope, deadline, reply, .. } = incoming;
        let (Some(reply), Some(deadline)) = (reply, deadline) else { return };
        let job = StepJob::decode(envelope.payload).ok();
        let Some((attempt, job)) = job.and_then(|job| Some((wire::attempt_of(&job)?, job))) else {
            return reply.refuse(refusal(Reason::Malformed, "the job is damaged"));
        };
        if dispatch::is_stale(job.left_ms, deadline) {
            metrics::JOBS_LATE.inc();
            return reply.refuse(refusal(Reason::TooOld, "the job was too long on its way"));
        }
        let before_ms = job.tool.as_ref().map_or(0, |tool| tool.begin_before_ms);
        let begin_by_ms = dispatch::begin_by_ms(before_ms, deadline);
        let traceparent = envelope.traceparent;
        let done = move |answer: Result<StepAnswer, JobFailure>| match answer {
            Ok(answer) => reply.send(answer.encode_to_vec().into()),
            Err(failure) => reply.refuse(refusal(failure.reason, failure.detail)),
        };
        let order = Order { job, attempt, traceparent, deadline, begin_by_ms };
        self.context().dispatcher.take(order, Box::new(done));
    }

    /// A new owner asks for the steps of its shard.
    pub(crate) fn steps_wanted(&self, incoming: Incoming) {
        let Some(reply) = incoming.reply else { return };
        let Ok(wanted) = StepsWanted::decode(incoming.envelope.payload) else {
            return reply.refuse(refusal(Reason::Malformed, "the question is damaged"));
        };
        let (shard, epoch) = (ShardId(wanted.shard), Epoch(wanted.epoch));
        let held = self.context().held.of_shard(shard, &incoming.from.name, epoch);
        reply.send(held.encode_to_vec().into());
    }

    /// Answers of this node are in a journal.
    pub(crate) fn steps_kept(&self, incoming: Incoming) {
        let Ok(kept) = StepsKept::decode(incoming.envelope.payload) else { return };
        let attempts: Vec<_> = kept.attempts.iter().filter_map(wire::read_attempt).collect();
        self.context().held.kept(&attempts);
    }

    /// Takes an answer to its owner, in a task of its own.
    pub(crate) fn route(&self, route: Route) {
        let this = self.clone();
        tokio::spawn(async move {
            while Instant::now() < route.deadline {
                let held = this.context().held.answer(&route.attempt);
                let Some((answer, wanted_by)) = held else { return };
                let message = StepAnswered {
                    attempt: Some(wire::attempt(&route.attempt)),
                    answer,
                    worker: this.context().name.to_string(),
                };
                let deadline = route.deadline.min(Instant::now() + CALL_MAX);
                let owner = this.owner(route.shard, wanted_by);
                if let Some((owner, _)) = owner
                    && let Told::Settled = this.tell(&owner, route.shard, &message, deadline).await
                {
                    return this.context().held.kept(&[route.attempt]);
                }
                tokio::time::sleep(AGAIN).await;
            }
            this.context().held.kept(&[route.attempt]);
        });
    }

    /// The newest owner of a shard that is known here.
    fn owner(&self, shard: ShardId, wanted_by: Option<WantedBy>) -> Option<WantedBy> {
        let view = self.context().view.load_full();
        let seen = view.as_ref().and_then(|view| view.owner(shard));
        let seen = seen.map(|(owner, epoch)| (owner.name.clone(), epoch));
        seen.into_iter().chain(wanted_by).max_by_key(|(_, epoch)| *epoch)
    }

    async fn tell(
        &self,
        owner: &ProcessName,
        shard: ShardId,
        message: &StepAnswered,
        deadline: Instant,
    ) -> Told {
        let payload = message.encode_to_vec().into();
        let envelope =
            Envelope { kind: kind::STEP_ANSWERED, shard: shard.0, payload, ..Envelope::default() };
        match self.ask_owner(owner, envelope, deadline).await {
            Ok(_) => {
                metrics::ANSWERS_ROUTED.inc();
                Told::Settled
            }
            Err(Some(Reason::Superseded | Reason::NotFound | Reason::Malformed)) => Told::Settled,
            Err(_) => Told::Again,
        }
    }

    /// Takes a piece of what an attempt says to the owner of its agent.
    pub(crate) async fn tell_text(&self, shard: ShardId, text: StepText) -> Taken {
        let Some(attempt) = text.attempt.as_ref().and_then(wire::read_attempt) else {
            return Taken::Enough;
        };
        let owner = self.owner(shard, self.context().held.wanted_by(&attempt));
        // One before the owner that asked would say that nobody waits for it.
        let Some((owner, _)) = owner.filter(|(_, epoch)| attempt.epoch <= *epoch) else {
            return Taken::Again;
        };
        let payload = text.encode_to_vec().into();
        let envelope =
            Envelope { kind: kind::STEP_TEXT, shard: shard.0, payload, ..Envelope::default() };
        match self.ask_owner(&owner, envelope, Instant::now() + CALL_MAX).await {
            Ok(bytes) => match StepTextAnswer::decode(bytes) {
                Ok(StepTextAnswer { bytes, full: false }) => Taken::Has(bytes),
                Ok(_) | Err(_) => Taken::Enough,
            },
            Err(Some(Reason::Superseded | Reason::NotFound | Reason::Malformed)) => Taken::Enough,
            Err(_) => Taken::Again,
        }
    }

    /// Asks the owner of a shard, which may be this node. Err: why it refused, if that is known.
    async fn ask_owner(
        &self,
        owner: &ProcessName,
        envelope: Envelope,
        deadline: Instant,
    ) -> Result<Bytes, Option<Reason>> {
        let peer = Peer::new(Role::Node, owner.clone());
        if *owner != self.context().name {
            return match self.context().wire.call(peer, envelope, deadline).await {
                Ok(bytes) => Ok(bytes),
                Err(cluster::Error::Refused(refusal)) => Err(cluster::reason_of(&refusal)),
                Err(_) => Err(None),
            };
        }
        let (sender, receiver) = oneshot::channel();
        let reply = Some(Reply::from_fn(move |answer| _ = sender.send(answer)));
        self.incoming(Incoming { from: peer, envelope, deadline: Some(deadline), reply });
        match tokio::time::timeout_at(deadline.into(), receiver).await {
            Ok(Ok(Ok(bytes))) => Ok(bytes),
            Ok(Ok(Err(refusal))) => Err(cluster::reason_of(&refusal)),
            Ok(Err(_)) | Err(_) => Err(None),
        }
    }
}
