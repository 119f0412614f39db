//! Everything that is on its way to one peer, and the calls that wait for its answers.
//!
//! Callers, the gateway and the links actor meet here, under one lock that is held for as long as it takes to encode
//! one envelope. A channel outlives sessions; what was sent over a session and not answered ends with it.

mod state;

use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use domain::{Incarnation, Reason};
use proto::link::{Envelope, Frame, Hello, Refusal};
use ractor::ActorRef;
use tokio::sync::oneshot;

use self::state::{Phase, Session, State};
use crate::clock::{self, Offset};
use crate::error::refusal;
use crate::gateway::GatewayMessage;
use crate::hub::{Hub, Token};
use crate::links::LinksMessage;
use crate::metrics;
use crate::outbox::Outbox;
use crate::window::{ENVELOPE_BYTES_MAX, Load};
use crate::{Error, Peer};

/// The version of the link protocol.
const VERSION: u32 = 1;
/// For so long after a failed dial a caller is told at once instead of dialling again.
const FAILED_RECENTLY: Duration = Duration::from_millis(200);
/// What an overloaded caller is advised.
const RETRY_AFTER_MS: u32 = 20;

/// What becomes of a call, but for its deadline.
pub(crate) type Outcome = Result<Bytes, Failure>;
pub(crate) type Caller = oneshot::Sender<Outcome>;

#[derive(Debug)]
pub(crate) enum Failure {
    Unreachable,
    Gone,
    Refused(Box<Refusal>),
}

/// The peer broke the link protocol; the value of the label `reason`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation(pub(crate) &'static str);

pub(crate) struct Channel {
    pub(crate) peer: Peer,
    hub: Arc<Hub>,
    state: Mutex<State>,
}

/// What a frame brought.
#[derive(Default)]
pub(crate) struct Received {
    /// The envelopes, and for those that are answers in order who waits for them.
    pub(crate) envelopes: Vec<Envelope>,
    pub(crate) callers: Vec<Option<Caller>>,
    /// Add it to a time of the peer.
    pub(crate) offset_ms: i64,
    /// Of the calls in it, so many at the end are more than we take.
    pub(crate) calls_refused: usize,
}

/// What was on its way when a link ended.
pub(crate) struct Remains {
    pub(crate) was_up: bool,
    pub(crate) token: Token,
}

impl Channel {
    pub(crate) fn new(peer: Peer, hub: Arc<Hub>) -> Self {
        let max = Load { envelopes: hub.config.window_envelopes, bytes: hub.config.window_bytes };
        Self { peer, hub, state: Mutex::new(State::new(max)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- callers ---

    /// Queues a call. Its envelope goes at once, or with others.
    pub(crate) fn call(
        &self,
        mut envelope: Envelope,
        deadline: Instant,
    ) -> Result<(u64, oneshot::Receiver<Outcome>), Error> {
        let now = Instant::now();
        if deadline <= now {
            return Err(Error::Deadline { peer: self.peer.clone() });
        }
        let (caller, answer) = oneshot::channel();
        envelope.deadline_ms = clock::at_ms(deadline).max(1);
        let size = self.prepare(&mut envelope);
        let mut state = self.lock();
        if self.hub.config.calls_max <= state.calls.len() {
            return Err(self.overloaded());
        }
        self.admit(&mut state, size, now)?;
        state.calls.insert(envelope.id, caller);
        self.push(&mut state, &envelope, size, now);
        Ok((envelope.id, answer))
    }

    /// Queues an envelope that nobody answers.
    pub(crate) fn cast(&self, mut envelope: Envelope) -> Result<(), Error> {
        let now = Instant::now();
        envelope.deadline_ms = 0;
        let size = self.prepare(&mut envelope);
        let mut state = self.lock();
        self.admit(&mut state, size, now)?;
        self.push(&mut state, &envelope, size, now);
        Ok(())
    }

    /// The caller no longer waits.
    pub(crate) fn forget_call(&self, id: u64) {
        let caller = self.lock().calls.remove(&id);
        drop(caller);
    }

    fn prepare(&self, envelope: &mut Envelope) -> usize {
        envelope.id = self.hub.next_id();
        envelope.answers = 0;
        envelope.refusal = None;
        envelope.hops = envelope.hops.saturating_add(1);
        Outbox::size_of(envelope)
    }

    fn admit(&self, state: &mut State, size: usize, now: Instant) -> Result<(), Error> {
        if ENVELOPE_BYTES_MAX < size {
            return Err(Error::TooLarge { bytes: size, max: ENVELOPE_BYTES_MAX });
        }
        if !state.window.admits(size) {
            return Err(self.overloaded());
        }
        match &state.phase {
            Phase::Dialling | Phase::Open(_) => Ok(()),
            Phase::Closed => Err(Error::Closed),
            Phase::Down { .. } if state.addresses.is_empty() => {
                Err(Error::NoAddress { peer: self.peer.clone() })
            }
            Phase::Down { failed: Some(at) } if now.duration_since(*at) < FAILED_RECENTLY => {
                Err(Error::Unreachable { peer: self.peer.clone() })
            }
            Phase::Down { .. } => {
                state.phase = Phase::Dialling;
                self.hub.tell_links(LinksMessage::Want(self.peer.clone()));
                Ok(())
            }
        }
    }

    fn overloaded(&self) -> Error {
        metrics::OVERLOADED.inc();
        Error::Overloaded { peer: self.peer.clone(), retry_after_ms: RETRY_AFTER_MS }
    }

    fn push(&self, state: &mut State, envelope: &Envelope, size: usize, now: Instant) {
        state.used = now;
        state.window.queue(size);
        state.outbox.push(envelope, size);
        state.pump();
    }

    // --- answers ---

    /// Answers a call that came over this session. If the session is gone, nobody waits for it.
    pub(crate) fn answer(&self, session: u64, call: u64, mut envelope: Envelope) {
        let now = Instant::now();
        let mut state = self.lock();
        if state.up(session).is_none() {
            return;
        }
        state.answering = state.answering.saturating_sub(1);
        envelope.id = self.hub.next_id();
        envelope.answers = call;
        let mut size = Outbox::size_of(&envelope);
        if ENVELOPE_BYTES_MAX < size || !state.window.admits_bytes(size) {
            let (reason, text) = match ENVELOPE_BYTES_MAX < size {
                true => (Reason::ResultTooLarge, "the answer is larger than a message may be"),
                false => (Reason::AnswerLost, "too many answers are on their way"),
            };
            envelope.payload = Bytes::new();
            envelope.refusal = Some(refusal(reason, text));
            size = Outbox::size_of(&envelope);
        }
        self.push(&mut state, &envelope, size, now);
    }

    // --- the gateway ---

    /// A session is ready: greets the peer with the token that it has to name.
    pub(crate) fn open(&self, serial: u64, gateway: ActorRef<GatewayMessage>, ours: Token) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Closed) {
            return;
        }
        state.window.restart();
        state.offset = Offset::default();
        state.answering = 0;
        let (theirs, greeted) = (Bytes::new(), Bytes::new());
        let session = Session { serial, gateway, ours, theirs, greeted };
        session.send(Frame { hello: Some(self.hello(&session)), ..Frame::default() });
        state.phase = Phase::Open(session);
    }

    /// Somebody claims to be this peer and shows a token. Only the true one can read what goes over its session, so it
    /// is named there, together with ours: who knows ours afterwards is the peer.
    pub(crate) fn claimed(&self, token: &Bytes) {
        let mut state = self.lock();
        if let Phase::Open(session) = &mut state.phase
            && !session.is_up()
        {
            session.greeted = token.clone();
            session.send_hello(self.hello(session), token);
        }
    }

    /// A hello that names our token. Says whether the link is up with it.
    pub(crate) fn greeted(
        &self,
        serial: u64,
        hello: &Hello,
    ) -> Result<Option<Incarnation>, Violation> {
        if hello.version != VERSION {
            return Err(Violation("version"));
        }
        if hello.token.len() != size_of::<Token>() {
            return Err(Violation("malformed_hello"));
        }
        let mut state = self.lock();
        let Phase::Open(session) = &mut state.phase else { return Ok(None) };
        if session.serial != serial || session.is_up() {
            return Ok(None);
        }
        // A slice of the frame would hold all of it.
        session.theirs = Bytes::copy_from_slice(&hello.token);
        if session.greeted != session.theirs {
            session.greeted = session.theirs.clone();
            session.send_hello(self.hello(session), &session.theirs);
        }
        state.used = Instant::now();
        Ok(Some(Incarnation(hello.incarnation)))
    }

    fn hello(&self, session: &Session) -> Hello {
        Hello {
            token: Bytes::copy_from_slice(&session.ours),
            incarnation: self.hub.incarnation.0,
            version: VERSION,
            from: self.hub.me.to_string(),
        }
    }

    /// Takes a frame in, and holds back what is sent to the peer until [`Self::uncork`].
    pub(crate) fn receive(
        &self,
        serial: u64,
        frame: Frame,
        bytes: usize,
    ) -> Result<Received, Violation> {
        let now = Instant::now();
        let calls_max = self.hub.config.calls_max;
        let mut state = self.lock();
        if state.up(serial).is_none() {
            return if frame.envelopes.is_empty() {
                Ok(Received::default())
            } else {
                Err(Violation("early"))
            };
        }
        state.window.acknowledged(frame.acknowledged).map_err(|_| Violation("acknowledged"))?;
        state.offset.observe(frame.sent_ms, clock::at_ms(now), now);
        let mut received = Received { offset_ms: state.offset.get(), ..Received::default() };
        if !frame.envelopes.is_empty() {
            state.used = now;
            state.window.taken(Load { envelopes: frame.envelopes.len(), bytes });
            state.corked = true;
        }
        for envelope in &frame.envelopes {
            match (envelope.answers, envelope.deadline_ms) {
                (0, 0) => {}
                (0, _) => {
                    state.answering += 1;
                    received.calls_refused += usize::from(calls_max < state.answering);
                }
                (call, _) => received.callers.push(state.calls.remove(&call)),
            }
        }
        received.envelopes = frame.envelopes;
        state.pump();
        Ok(received)
    }

    /// Everything that a frame brought was handed over: sends what that made, and the acknowledgement with it.
    pub(crate) fn uncork(&self) {
        let mut state = self.lock();
        state.corked = false;
        state.pump();
        if state.window.owes_now() {
            state.send_acknowledgement();
        }
        let owes = state.window.owes();
        drop(state);
        if owes {
            self.hub.acknowledgements.want();
        }
    }

    /// Sends an acknowledgement that was owed at the last look already. Says whether one is still owed.
    pub(crate) fn acknowledge_if_old(&self) -> bool {
        let mut state = self.lock();
        let owes = state.window.owes();
        if mem::replace(&mut state.owed_before, owes) && owes {
            state.send_acknowledgement();
        }
        state.window.owes()
    }

    /// The session is over: everybody who waits is told.
    pub(crate) fn close(&self, serial: u64) -> Option<Remains> {
        self.lock().close(serial)
    }

    /// The same, if nothing was sent or received for so long and nobody waits. Whoever has something for the peer
    /// afterwards asks for a new session.
    pub(crate) fn close_idle(&self, serial: u64, idle_min: Duration) -> Option<Remains> {
        let mut state = self.lock();
        match idle_min <= state.idle(Instant::now()) {
            true => state.close(serial),
            false => None,
        }
    }

    // --- the links actor ---

    /// A session is on its way: callers wait for it.
    pub(crate) fn expect_session(&self) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Down { .. }) {
            state.phase = Phase::Dialling;
        }
    }

    /// Somebody waits for a session.
    pub(crate) fn is_wanted(&self) -> bool {
        matches!(self.lock().phase, Phase::Dialling)
    }

    /// There will be no session for now.
    pub(crate) fn unreachable(&self) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Dialling) {
            state.phase = Phase::Down { failed: Some(Instant::now()) };
            state.fail_all().tell(|| Failure::Unreachable);
        }
    }

    /// For good.
    pub(crate) fn shut(&self) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Down { .. } | Phase::Dialling) {
            state.phase = Phase::Closed;
            // Whatever waits here waited for a session: none of it was sent.
            state.fail_all().tell(|| Failure::Unreachable);
        }
    }

    /// Says whether they are others than before.
    pub(crate) fn set_addresses(&self, addresses: Vec<String>) -> bool {
        let mut state = self.lock();
        state.forgotten = false;
        mem::replace(&mut state.addresses, addresses) != state.addresses
    }

    pub(crate) fn forget(&self) {
        let mut state = self.lock();
        state.addresses.clear();
        state.forgotten = true;
    }

    pub(crate) fn is_forgotten(&self) -> bool {
        self.lock().forgotten
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        self.lock().addresses.clone()
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(&self.lock().phase, Phase::Open(session) if session.is_up())
    }

    /// For how long nothing was sent or received, if nobody waits for anything.
    pub(crate) fn idle(&self, now: Instant) -> Duration {
        self.lock().idle(now)
    }

    /// Whether everything that was sent has arrived.
    pub(crate) fn is_drained(&self) -> bool {
        let state = self.lock();
        !matches!(state.phase, Phase::Open(_)) || state.window.is_idle()
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Channel({})", self.peer)
    }
}
