//! What others ask of a shard, read from their messages.

use bytes::Bytes;
use prost::Message;

use domain::entry::Verdict;
use domain::round::Returned;
use domain::turn::doubt::Which;
use domain::{AgentId, DefinitionHash, IdempotencyKey, Lsn, Reason};
use proto::kind;
use proto::link::{
    AgentsCall, CancelCall, Envelope, GetCall, HistoryCall, ListCall, SignalCall, StepAnswered,
    StepText, SubmitCall, SubscribeCall, UnsubscribeCall,
};

use crate::actor::doubt::Signal;
use crate::actor::step::Routed;
use crate::actor::text::Piece;
use crate::wire;

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
    Signal(Lsn, Box<Signal>),
    Answered(Box<Routed>),
    Text(Box<Piece>),
    Subscribe(SubscribeCall),
    Unsubscribe(UnsubscribeCall),
    List(ListCall),
    Agents(AgentsCall),
    History(HistoryCall),
}

impl Request {
    pub(super) fn parse(envelope: &Envelope) -> Result<Self, String> {
        let payload = envelope.payload.clone();
        match envelope.kind {
            kind::SIGNAL => return signal(payload),
            kind::STEP_ANSWERED => return answered(payload),
            kind::STEP_TEXT => return text(payload),
            _ => {}
        }
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

fn signal(payload: Bytes) -> Result<Request, String> {
    let call = SignalCall::decode(payload).map_err(|error| error.to_string())?;
    let reason = u16::try_from(call.reason).ok().and_then(Reason::from_code);
    let verdict = reason.and_then(Verdict::from_reason).ok_or("the reason is no verdict")?;
    let SignalCall { sequence, name, attempt, .. } = call;
    let which = Which { sequence, name, attempt };
    let returned = Returned { output: call.output, is_error: false };
    Ok(Request::Signal(Lsn(call.work), Box::new(Signal { which, verdict, returned })))
}

fn answered(payload: Bytes) -> Result<Request, String> {
    let answered = StepAnswered::decode(payload).map_err(|error| error.to_string())?;
    let attempt = answered.attempt.as_ref().and_then(wire::read_attempt);
    let attempt = attempt.ok_or("the attempt of an answer cannot be read")?;
    let worker = answered.worker.parse().map_err(|error: domain::Error| error.to_string())?;
    let answer = answered.answer;
    Ok(Request::Answered(Box::new(Routed { attempt, answer, worker })))
}

fn text(payload: Bytes) -> Result<Request, String> {
    let StepText { attempt, offset, text, .. } =
        StepText::decode(payload).map_err(|error| error.to_string())?;
    let attempt = attempt.as_ref().and_then(wire::read_attempt);
    let attempt = attempt.ok_or("the attempt of a text cannot be read")?;
    Ok(Request::Text(Box::new(Piece { attempt, offset, text })))
}
