//! What an agent hears. What waits for nothing is handled at once; the rest is boxed, which an idle agent does not pay for.

use std::sync::Arc;

use ractor::ActorProcessingErr;
use tokio::sync::OwnedSemaphorePermit;

use cluster::{Peer, Reply};
use domain::Lsn;
use proto::link::SubscribeCall;
use store::writer::{Committed, Stopped};

use super::{Answer, State, Submit, doubt, step, text};
use crate::recovering::Due;

/// Everything that an agent hears. Small, because an idle agent pays for the room of one several times over.
pub(crate) enum AgentMessage {
    /// A submit, with the right to stand in the queue.
    Deliver(Box<Submit>, OwnedSemaphorePermit),
    /// The oldest of its appends is durable, or its writer stopped.
    Committed(Result<Committed, Stopped>),
    /// What became of the step that was sent out.
    Answered(Box<Answer>),
    /// The answer of a step that an owner before asked for, or whose link broke.
    Routed(Box<step::Routed>, Reply),
    /// What a model says while its step runs.
    Text(Box<text::Piece>, Reply),
    /// What a tool says about a step in doubt.
    Probed(Box<Answer>),
    Signal(Lsn, Box<doubt::Signal>, Reply),
    Cancel(Lsn, Reply),
    Get(Lsn, Reply),
    Subscribe(Box<(SubscribeCall, Peer)>, Reply),
    /// A subscription of this API server; others have the same numbers.
    Unsubscribe(Arc<Peer>, u64),
    /// A new owner found unfinished work of it.
    Recover(Box<Due>),
    /// It was started again after a failure: take up what it left.
    Resume,
    /// Accept the next submit of the queue.
    AcceptNext,
    /// Look again what is to be done.
    Drive,
    /// The deadline of this work passed.
    Overdue(Lsn),
    /// Append again what the writer had no room for.
    Flush,
    /// Write its row: too many rows of the shard are old.
    Persist,
    /// Go, if there is nothing to do.
    Passivate,
    /// End every work: it failed too often.
    Quarantine,
}

impl ractor::Message for AgentMessage {}
const _: () = assert!(size_of::<AgentMessage>() <= 64);

/// The messages that may have to wait for a store.
pub(super) enum Waiting {
    Deliver(Box<Submit>, OwnedSemaphorePermit),
    Routed(Box<step::Routed>, Reply),
    Signal(Lsn, Box<doubt::Signal>, Reply),
    Cancel(Lsn, Reply),
    Get(Lsn, Reply),
    Subscribe(Box<(SubscribeCall, Peer)>, Reply),
    Recover(Box<Due>),
    Resume,
    AcceptNext,
    Persist,
    Quarantine,
}

impl State {
    /// Handles what waits for nothing. Err: the message does.
    pub(super) fn handle_now(
        &mut self,
        message: AgentMessage,
    ) -> Result<Result<(), ActorProcessingErr>, Waiting> {
        Ok(match message {
            AgentMessage::Committed(result) => self.committed(result),
            AgentMessage::Answered(answer) => self.answered(*answer),
            AgentMessage::Probed(answer) => self.probed(*answer),
            AgentMessage::Text(piece, reply) => {
                self.text(*piece, reply);
                Ok(())
            }
            AgentMessage::Unsubscribe(peer, subscription) => {
                self.unsubscribe(&peer, subscription);
                Ok(())
            }
            AgentMessage::Drive => self.drive(),
            AgentMessage::Overdue(work) => self.overdue(work),
            AgentMessage::Flush => {
                self.flush();
                Ok(())
            }
            AgentMessage::Passivate => {
                self.passivate();
                Ok(())
            }
            AgentMessage::Deliver(submit, permit) => return Err(Waiting::Deliver(submit, permit)),
            AgentMessage::Routed(routed, reply) => return Err(Waiting::Routed(routed, reply)),
            AgentMessage::Signal(work, signal, reply) => {
                return Err(Waiting::Signal(work, signal, reply));
            }
            AgentMessage::Cancel(work, reply) => return Err(Waiting::Cancel(work, reply)),
            AgentMessage::Get(work, reply) => return Err(Waiting::Get(work, reply)),
            AgentMessage::Subscribe(asked, reply) => return Err(Waiting::Subscribe(asked, reply)),
            AgentMessage::Recover(due) => return Err(Waiting::Recover(due)),
            AgentMessage::Resume => return Err(Waiting::Resume),
            AgentMessage::AcceptNext => return Err(Waiting::AcceptNext),
            AgentMessage::Persist => return Err(Waiting::Persist),
            AgentMessage::Quarantine => return Err(Waiting::Quarantine),
        })
    }

    pub(super) async fn handle_waiting(
        &mut self,
        message: Waiting,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            Waiting::Deliver(submit, permit) => self.deliver(submit, permit).await,
            Waiting::Routed(routed, reply) => self.routed(*routed, reply).await,
            Waiting::Signal(work, signal, reply) => self.signal(work, signal, reply).await,
            Waiting::Cancel(work, reply) => self.cancel(work, reply).await,
            Waiting::Get(work, reply) => self.get(work, reply).await,
            Waiting::Subscribe(asked, reply) => {
                let (call, from) = *asked;
                self.subscribe(call, from, reply).await
            }
            Waiting::Recover(due) => self.recover(*due).await,
            Waiting::Resume => self.resume().await,
            Waiting::AcceptNext => self.accept_next().await,
            Waiting::Persist => self.persist().await,
            Waiting::Quarantine => self.quarantine().await,
        }
    }
}
