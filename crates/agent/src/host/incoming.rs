//! What comes for a shard over a link: brought to its agent, or answered from the store.

use std::collections::HashMap;
use std::sync::Arc;

use ractor::ActorProcessingErr;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use cluster::{Incoming, Peer, Reply};
use domain::agent::QUEUE_MAX;
use domain::{AgentId, Epoch, Lsn, Reason};
use proto::kind;
use proto::link::{AgentInfo, AgentsCall, Envelope, Refusal, SubmitCall};

use crate::actor::text::Piece;
use crate::actor::{AgentMessage, Submit};
use crate::read;
use crate::shard::{Shard, refusal};

use super::State;
use super::request::{Checked, Request};
use super::slot::Stage;

/// Messages that wait for a shard to be open, and what they carry; whoever sends more has to ask again. So many that every
/// subscription of a client's stream has its place: asking again, all of them at every change of the view, costs both ends
/// more than the opening.
const EARLY_MAX: usize = 1_024;
const EARLY_BYTES_MAX: usize = 1 << 20;

impl State {
    pub(super) async fn incoming(&mut self, incoming: Incoming) -> Result<(), ActorProcessingErr> {
        let Some(shard) = self.shard.clone() else {
            // What is not durable is told again, and must not keep out what is.
            if incoming.envelope.kind == kind::STEP_TEXT {
                refuse(incoming.reply, refusal(Reason::Unowned, "the shard is being opened"));
                return Ok(());
            }
            let bytes = |early: &Incoming| early.envelope.payload.len();
            let held: usize = self.early.iter().map(bytes).sum();
            if self.early.len() < EARLY_MAX && held + bytes(&incoming) <= EARLY_BYTES_MAX {
                self.early.push(incoming);
            } else {
                refuse(incoming.reply, refusal(Reason::Unowned, "the shard is being opened"));
            }
            return Ok(());
        };
        let Incoming { from, envelope, reply, .. } = incoming;
        match Request::parse(&envelope) {
            Ok(request) => self.request(shard, request, envelope, from, reply).await,
            Err(why) => {
                refuse(reply, refusal(Reason::Malformed, why));
                Ok(())
            }
        }
    }

    async fn request(
        &mut self,
        shard: Arc<Shard>,
        request: Request,
        envelope: Envelope,
        from: Peer,
        reply: Option<Reply>,
    ) -> Result<(), ActorProcessingErr> {
        let Some(reply) = reply else {
            if let Request::Unsubscribe(call) = request {
                self.unsubscribe(from, call.subscription);
            }
            return Ok(());
        };
        match request {
            Request::Submit(call) => self.submit(&shard, call, envelope, from, reply).await?,
            Request::Get(work) => match shard.agent_of(work) {
                Some(id) => self.tell(id, AgentMessage::Get(work, reply)).await?,
                None => self.read(&shard, reply, move |shard, reply| async move {
                    read::get(&shard, work, reply).await;
                }),
            },
            Request::Cancel(work) => match shard.agent_of(work) {
                Some(id) => self.tell(id, AgentMessage::Cancel(work, reply)).await?,
                None => self.read(&shard, reply, move |shard, reply| async move {
                    read::cancelled(&shard, work, reply).await;
                }),
            },
            Request::Signal(work, signal) => match shard.agent_of(work) {
                Some(id) => self.tell(id, AgentMessage::Signal(work, signal, reply)).await?,
                None => self.read(&shard, reply, move |shard, reply| async move {
                    read::signalled(&shard, work, &signal, reply).await;
                }),
            },
            Request::Answered(routed) => match shard.agent_of(routed.attempt.work.lsn) {
                Some(id) => self.tell(id, AgentMessage::Routed(routed, reply)).await?,
                None => reply.refuse(refusal(Reason::Superseded, "the work has ended")),
            },
            Request::Text(piece) => match shard.agent_of(piece.attempt.work.lsn) {
                Some(id) => self.text(&id, piece, reply),
                None => reply.refuse(refusal(Reason::Superseded, "the work has ended")),
            },
            Request::Subscribe(call) => match shard.agent_of(Lsn(call.work)) {
                Some(id) => {
                    self.tell(id, AgentMessage::Subscribe(Box::new((call, from)), reply)).await?
                }
                // It needs no store, and so no share of the reads.
                None if shard.recent.has(Lsn(call.work)) => {
                    tokio::spawn(async move { read::subscribe(&shard, call, from, reply).await });
                }
                None => self.read(&shard, reply, move |shard, reply| async move {
                    read::subscribe(&shard, call, from, reply).await;
                }),
            },
            Request::Unsubscribe(call) => {
                self.unsubscribe(from, call.subscription);
                reply.send(bytes::Bytes::new());
            }
            Request::List(call) => self.read(&shard, reply, move |shard, reply| async move {
                read::list(&shard, call, reply).await;
            }),
            Request::History(call) => self.read(&shard, reply, move |shard, reply| async move {
                read::history(&shard, call, reply).await;
            }),
            Request::Agents(call) => {
                let hot = self.hot(&call, shard.epoch);
                self.read(&shard, reply, move |shard, reply| async move {
                    read::agents(&shard, call, |row| hot.get(&row.id).cloned(), reply).await;
                });
            }
        }
        Ok(())
    }

    /// What a model says is for an agent that is there: it neither wakes one nor waits for it.
    fn text(&self, id: &AgentId, piece: Box<Piece>, reply: Reply) {
        let slot = self.agents.get(id).filter(|slot| slot.stage == Stage::Running);
        match slot.and_then(|slot| slot.actor.as_ref()) {
            Some(actor) => _ = actor.cast(AgentMessage::Text(piece, reply)),
            None => reply.refuse(refusal(Reason::Unowned, "the agent is not in memory")),
        }
    }

    /// A read on behalf of a client, in its own task, if there is room for one more.
    fn read<F, R>(&self, shard: &Arc<Shard>, reply: Reply, read: R)
    where
        R: FnOnce(Arc<Shard>, Reply) -> F + Send + 'static,
        F: Future<Output = ()> + Send,
    {
        let Ok(permit) = shard.reads.clone().try_acquire_owned() else {
            return reply
                .refuse(refusal(Reason::Overloaded, "too many reads of this shard are under way"));
        };
        let shard = shard.clone();
        tokio::spawn(async move {
            read(shard, reply).await;
            drop(permit);
        });
    }

    /// What is known of the agents in memory, by their rows: of one agent, if only that is asked for.
    fn hot(&self, call: &AgentsCall, epoch: Epoch) -> HashMap<u64, AgentInfo> {
        let one = call.agent.parse::<AgentId>().ok();
        let one = one.and_then(|id| self.agents.get_key_value(&id));
        let hot: Vec<_> = match call.agent.is_empty() {
            true => self.agents.iter().collect(),
            false => one.into_iter().collect(),
        };
        hot.into_iter().map(|(id, slot)| slot.info(id, epoch)).collect()
    }

    fn unsubscribe(&self, peer: Peer, subscription: u64) {
        let peer = Arc::new(peer);
        for actor in self.agents.values().filter_map(|slot| slot.actor.as_ref()) {
            _ = actor.cast(AgentMessage::Unsubscribe(peer.clone(), subscription));
        }
    }

    async fn submit(
        &mut self,
        shard: &Arc<Shard>,
        call: SubmitCall,
        envelope: Envelope,
        from: Peer,
        reply: Reply,
    ) -> Result<(), ActorProcessingErr> {
        let checked = match Checked::new(&call) {
            Ok(checked) => checked,
            Err(error) => {
                reply.refuse(refusal(Reason::Malformed, error.to_string()));
                return Ok(());
            }
        };
        let Some(permit) = self.permit(&checked.agent) else {
            let message = format!(
                "the queue of agent {} is full: at most {QUEUE_MAX} works wait",
                checked.agent
            );
            reply.refuse(refusal(Reason::QueueFull, message));
            return Ok(());
        };
        let size = u32::try_from(call.input.len().max(1)).unwrap_or(u32::MAX);
        let Ok(room) = shard.node.inputs.clone().try_acquire_many_owned(size) else {
            reply.refuse(refusal(
                Reason::NodeFull,
                "the inputs that wait on this node are at their limit",
            ));
            return Ok(());
        };
        let submit = Submit {
            key: checked.key,
            definition: checked.definition,
            slot: checked.agent.slot(),
            call,
            from,
            traceparent: envelope.traceparent,
            reply,
            room,
        };
        self.tell(checked.agent, AgentMessage::Deliver(Box::new(submit), permit)).await
    }

    /// The right to put one more submit into an agent's queue.
    fn permit(&mut self, id: &AgentId) -> Option<OwnedSemaphorePermit> {
        match self.agents.get(id) {
            Some(slot) => slot.room.clone().try_acquire_owned().ok(),
            // Its first message makes the agent; that one always has room.
            None => Arc::new(Semaphore::new(1)).try_acquire_owned().ok(),
        }
    }
}

pub(super) fn refuse(reply: Option<Reply>, refusal: Refusal) {
    if let Some(reply) = reply {
        reply.refuse(refusal);
    }
}
