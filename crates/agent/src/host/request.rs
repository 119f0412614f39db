//! What others ask of a shard, read from their messages.

use prost::Message;

use domain::{AgentId, DefinitionHash, IdempotencyKey, Lsn};
use proto::kind;
use proto::link::{
    AgentsCall, CancelCall, Envelope, GetCall, HistoryCall, ListCall, SubmitCall, SubscribeCall,
    UnsubscribeCall,
};

/// The parts of a submit that have to be valid before anything is done for it.
pub(super) struct Checked {
    pub agent: AgentId,
    pub key: IdempotencyKey,
    pub definition: DefinitionHash,
}

impl Checked {
    pub(super) fn new(call: &SubmitCall) -> Result<Self, domain::Error> {
        Ok(Self {
            agent: call.agent.parse()?,
            key: call.idempotency_key.parse()?,
            definition: DefinitionHash::try_from(&call.definition[..])?,
        })
    }
}

/// What is asked of a shard.
pub(super) enum Request {
    Submit(SubmitCall),
    Get(Lsn),
    Cancel(Lsn),
    Subscribe(SubscribeCall),
    Unsubscribe(UnsubscribeCall),
    List(ListCall),
    Agents(AgentsCall),
    History(HistoryCall),
}

impl Request {
    pub(super) fn parse(envelope: &Envelope) -> Result<Self, String> {
        let payload = envelope.payload.clone();
        let request = match envelope.kind {
            kind::SUBMIT => SubmitCall::decode(payload).map(Self::Submit),
            kind::GET => GetCall::decode(payload).map(|call| Self::Get(Lsn(call.work))),
            kind::CANCEL => CancelCall::decode(payload).map(|call| Self::Cancel(Lsn(call.work))),
            kind::SUBSCRIBE => SubscribeCall::decode(payload).map(Self::Subscribe),
            kind::UNSUBSCRIBE => UnsubscribeCall::decode(payload).map(Self::Unsubscribe),
            kind::LIST => ListCall::decode(payload).map(Self::List),
            kind::AGENTS => AgentsCall::decode(payload).map(Self::Agents),
            kind::HISTORY => HistoryCall::decode(payload).map(Self::History),
            other => return Err(format!("messages of kind {other} are not for a shard")),
        };
        request.map_err(|error| format!("a message of kind {} is damaged: {error}", envelope.kind))
    }
}
