//! The gateway: the one actor of this process that others can reach, through which all frames come in.
//!
//! ractor_cluster does not say by which session a message came. So a frame counts as sent by the link whose token it
//! names, and by nobody else; one without a valid token is dropped, counted and logged. Every event of a link passes
//! through here too, so that the service hears of a link before its first message and after its last.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::{Duration, Instant};

use bytes::Bytes;
use domain::Reason;
use prost::Message as _;
use proto::link::{Envelope, Frame};
use ractor::message::{BoxedDowncastErr, SerializedMessage};
use ractor::{Actor, ActorProcessingErr, ActorRef};

use crate::channel::{Channel, Failure, Received, Remains, Violation};
use crate::error::refusal;
use crate::hub::{Hub, Token};
use crate::links::LinksMessage;
use crate::reply::Reply;
use crate::{Incoming, LinkEvent, clock, metrics};

/// Where the gateways of all members meet.
pub(crate) const SCOPE: &str = "stagedoor";
pub(crate) const GROUP: &str = "gateway";

const HOPS_MAX: u32 = 32;

pub(crate) enum GatewayMessage {
    /// From a peer: the only message that can come from outside.
    Frame(Bytes),
    /// A session is ready, and this is the gateway at its other end.
    Opened { channel: Arc<Channel>, serial: u64, gateway: ActorRef<GatewayMessage> },
    /// A session that was opened is over.
    Closed { channel: Arc<Channel>, serial: u64 },
    /// A session that may end if it is still idle.
    Idle { channel: Arc<Channel>, serial: u64 },
}

impl ractor::Message for GatewayMessage {
    fn serializable() -> bool {
        true
    }

    fn serialize(self) -> Result<SerializedMessage, BoxedDowncastErr> {
        match self {
            Self::Frame(bytes) => Ok(SerializedMessage::Cast {
                variant: String::new(),
                args: bytes.into(),
                metadata: None,
            }),
            Self::Opened { .. } | Self::Closed { .. } | Self::Idle { .. } => Err(BoxedDowncastErr),
        }
    }

    fn deserialize(message: SerializedMessage) -> Result<Self, BoxedDowncastErr> {
        match message {
            SerializedMessage::Cast { args, .. } => Ok(Self::Frame(args.into())),
            SerializedMessage::Call { .. } | SerializedMessage::CallReply(..) => {
                Err(BoxedDowncastErr)
            }
        }
    }
}

pub(crate) struct Gateway;

pub(crate) struct GatewayState {
    hub: Arc<Hub>,
    tokens: HashMap<Token, (Arc<Channel>, u64)>,
}

impl Actor for Gateway {
    type Msg = GatewayMessage;
    type State = GatewayState;
    type Arguments = Arc<Hub>;

    async fn pre_start(
        &self,
        myself: ActorRef<GatewayMessage>,
        hub: Arc<Hub>,
    ) -> Result<GatewayState, ActorProcessingErr> {
        ractor::pg::join_scoped(SCOPE.to_owned(), GROUP.to_owned(), vec![myself.get_cell()]);
        Ok(GatewayState { hub, tokens: HashMap::new() })
    }

    async fn handle(
        &self,
        _: ActorRef<GatewayMessage>,
        message: GatewayMessage,
        state: &mut GatewayState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            GatewayMessage::Frame(bytes) => state.receive(bytes).await,
            GatewayMessage::Opened { channel, serial, gateway } => {
                state.open(channel, serial, gateway)
            }
            GatewayMessage::Closed { channel, serial } => {
                state.closed(&channel, channel.close(serial));
            }
            GatewayMessage::Idle { channel, serial } => state.idle(&channel, serial),
        }
        Ok(())
    }
}

impl GatewayState {
    fn open(&mut self, channel: Arc<Channel>, serial: u64, gateway: ActorRef<GatewayMessage>) {
        let token: Token = rand::random();
        channel.open(serial, gateway, token);
        self.tokens.insert(token, (channel, serial));
    }

    fn idle(&mut self, channel: &Arc<Channel>, serial: u64) {
        let remains = channel.close_idle(serial, self.hub.config.idle_timeout());
        if remains.is_some() {
            self.closed(channel, remains);
            self.hub.tell_links(LinksMessage::Unused { serial });
        }
    }

    fn closed(&mut self, channel: &Channel, remains: Option<Remains>) {
        let Some(remains) = remains else { return };
        self.tokens.remove(&remains.token);
        if remains.was_up {
            metrics::LINKS.dec();
            self.tell(LinkEvent::Down { peer: channel.peer.clone() });
        }
    }

    async fn receive(&self, bytes: Bytes) {
        let length = bytes.len();
        let Ok(frame) = Frame::decode(bytes) else {
            return drop_frame("malformed");
        };
        if frame.token.is_empty() {
            return self.claimed(&frame);
        }
        let token = Token::try_from(frame.token.as_ref()).ok();
        let Some((channel, serial)) = token.and_then(|token| self.tokens.get(&token)) else {
            return drop_frame("token");
        };
        match self.take_in(channel, *serial, frame, length) {
            Ok(Taken::Nothing) => {}
            Ok(Taken::One) => channel.uncork(),
            Ok(Taken::Many) => {
                // Those who were woken run first: what they send goes in one frame.
                tokio::task::yield_now().await;
                channel.uncork();
            }
            Err(Violation(reason)) => {
                channel.uncork();
                drop_frame(reason);
                self.hub.tell_links(LinksMessage::Violated { serial: *serial, reason });
            }
        }
    }

    /// Without a token a frame can only say that a link may begin.
    fn claimed(&self, frame: &Frame) {
        let from = frame.hello.as_ref().and_then(|hello| hello.from.parse().ok());
        let channel = from.and_then(|peer| self.hub.find(&peer));
        match (channel, &frame.hello) {
            (Some(channel), Some(hello)) => channel.claimed(&Bytes::copy_from_slice(&hello.token)),
            _ => drop_frame("token"),
        }
    }

    fn take_in(
        &self,
        channel: &Arc<Channel>,
        serial: u64,
        frame: Frame,
        length: usize,
    ) -> Result<Taken, Violation> {
        if let Some(hello) = &frame.hello
            && let Some(incarnation) = channel.greeted(serial, hello)?
        {
            metrics::LINKS.inc();
            self.hub.tell_links(LinksMessage::Up { serial });
            self.tell(LinkEvent::Up { peer: channel.peer.clone(), incarnation });
            channel.uncork();
        }
        let received = channel.receive(serial, frame, length)?;
        let taken = match received.envelopes.len() {
            0 => Taken::Nothing,
            1 => Taken::One,
            _ => Taken::Many,
        };
        self.hand_over(channel, serial, received);
        Ok(taken)
    }

    fn hand_over(&self, channel: &Arc<Channel>, serial: u64, received: Received) {
        let now = Instant::now();
        let mut callers = received.callers.into_iter();
        let calls = received.envelopes.iter().filter(|it| it.answers == 0 && it.deadline_ms != 0);
        let mut calls_left = match received.calls_refused {
            0 => usize::MAX,
            refused => calls.count() - refused,
        };
        for envelope in received.envelopes {
            if envelope.answers != 0 {
                match callers.next().flatten() {
                    Some(caller) => _ = caller.send(outcome(envelope)),
                    // Its caller has stopped waiting.
                    None => metrics::DROPPED.with_label_values(&["late_answer"]).inc(),
                }
                continue;
            }
            let is_call = envelope.deadline_ms != 0;
            let reply = is_call.then(|| Reply::new(channel.clone(), serial, envelope.id));
            let deadline = is_call.then(|| instant(envelope.deadline_ms, received.offset_ms, now));
            if is_call {
                if calls_left == 0 {
                    refuse(reply, Reason::Overloaded, "too many calls are not answered yet");
                    continue;
                }
                calls_left -= 1;
            }
            if deadline.is_some_and(|deadline| deadline <= now) {
                metrics::DROPPED.with_label_values(&["late"]).inc();
                refuse(reply, Reason::DeadlineExceeded, "it came after its deadline");
                continue;
            }
            if HOPS_MAX < envelope.hops {
                metrics::DROPPED.with_label_values(&["hops"]).inc();
                refuse(reply, Reason::TooManyHops, "it was passed on too often");
                continue;
            }
            self.handle(Incoming { from: channel.peer.clone(), envelope, deadline, reply });
        }
    }

    /// A service that panics loses one message, not the gateway: its reply is dropped, and so a refusal.
    fn handle(&self, incoming: Incoming) {
        let service = &self.hub.service;
        if catch_unwind(AssertUnwindSafe(|| service.handle(incoming))).is_err() {
            metrics::DROPPED.with_label_values(&["panic"]).inc();
            tracing::error!("the service panicked while it handled a message");
        }
    }

    fn tell(&self, event: LinkEvent) {
        tracing::info!(%event, "link changed");
        let service = &self.hub.service;
        if catch_unwind(AssertUnwindSafe(|| service.link(event))).is_err() {
            tracing::error!("the service panicked while it heard of a link");
        }
    }
}

enum Taken {
    Nothing,
    One,
    Many,
}

fn outcome(envelope: Envelope) -> Result<Bytes, Failure> {
    match envelope.refusal {
        Some(refusal) => Err(Failure::Refused(Box::new(refusal))),
        None => Ok(envelope.payload),
    }
}

fn refuse(reply: Option<Reply>, reason: Reason, text: &str) {
    if let Some(reply) = reply {
        reply.refuse(refusal(reason, text));
    }
}

/// A deadline of the peer in our clock.
fn instant(deadline_ms: i64, offset_ms: i64, now: Instant) -> Instant {
    /// More than any deadline; keeps the arithmetic below from overflowing.
    const FAR: Duration = Duration::from_secs(365 * 24 * 3_600);
    let left = deadline_ms.saturating_add(offset_ms).saturating_sub(clock::at_ms(now));
    match u64::try_from(left) {
        Ok(left) => now + Duration::from_millis(left).min(FAR),
        Err(_) => now,
    }
}

fn drop_frame(reason: &'static str) {
    static LAST_LOGGED_MS: AtomicI64 = AtomicI64::new(0);
    metrics::dropped(reason, 1, &LAST_LOGGED_MS);
}

#[cfg(test)]
#[path = "gateway_tests.rs"]
mod tests;
