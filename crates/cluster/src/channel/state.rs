//! What the lock of a channel guards.

use std::collections::HashMap;
use std::mem;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::link::{Frame, Hello};
use ractor::ActorRef;

use super::{Caller, Failure, Remains};
use crate::clock::{self, Offset};
use crate::gateway::GatewayMessage;
use crate::hub::Token;
use crate::metrics;
use crate::outbox::Outbox;
use crate::window::{Load, Window};

pub(super) struct State {
    pub(super) phase: Phase,
    pub(super) addresses: Vec<String>,
    pub(super) forgotten: bool,
    pub(super) window: Window,
    pub(super) outbox: Outbox,
    /// By the id of the envelope.
    pub(super) calls: HashMap<u64, Caller>,
    /// Calls of the peer that we have not answered.
    pub(super) answering: usize,
    pub(super) offset: Offset,
    /// The gateway is about to hand over more: what is queued meanwhile goes in one frame.
    pub(super) corked: bool,
    /// The acknowledgement that is owed was owed at the last look, too.
    pub(super) owed_before: bool,
    pub(super) used: Instant,
}

pub(super) enum Phase {
    Down {
        failed: Option<Instant>,
    },
    /// A session is on its way, or asked for.
    Dialling,
    /// There is a session. The link is up when the peer's token is known.
    Open(Session),
    Closed,
}

pub(super) struct Session {
    pub(super) serial: u64,
    pub(super) gateway: ActorRef<GatewayMessage>,
    pub(super) ours: Token,
    /// Empty until the peer's own hello came.
    pub(super) theirs: Bytes,
    /// The token of the peer that our last hello named.
    pub(super) greeted: Bytes,
}

impl State {
    pub(super) fn new(max: Load) -> Self {
        Self {
            phase: Phase::Down { failed: None },
            addresses: Vec::new(),
            forgotten: false,
            window: Window::new(max),
            outbox: Outbox::default(),
            calls: HashMap::new(),
            answering: 0,
            offset: Offset::default(),
            corked: false,
            owed_before: false,
            used: Instant::now(),
        }
    }

    pub(super) fn up(&self, serial: u64) -> Option<&Session> {
        match &self.phase {
            Phase::Open(session) if session.serial == serial && session.is_up() => Some(session),
            Phase::Open(_) | Phase::Dialling | Phase::Down { .. } | Phase::Closed => None,
        }
    }

    /// Sends as many frames as may go.
    pub(super) fn pump(&mut self) {
        let Phase::Open(session) = &self.phase else { return };
        while session.is_up() && !self.corked && self.window.may_send() {
            let Some(batch) = self.outbox.pop() else { return };
            self.window.sent(batch.load);
            metrics::ENVELOPES.inc_by(batch.load.envelopes as u64);
            self.owed_before = false;
            session.send_bytes(batch.into_frame(&session.header(self.window.acknowledge())));
        }
    }

    pub(super) fn send_acknowledgement(&mut self) {
        if let Phase::Open(session) = &self.phase
            && session.is_up()
        {
            self.owed_before = false;
            session.send(session.header(self.window.acknowledge()));
        }
    }

    /// For how long nothing was sent or received, if nobody waits for anything.
    pub(super) fn idle(&self, now: Instant) -> Duration {
        match self.calls.is_empty() && self.answering == 0 && self.window.is_idle() {
            true => now.saturating_duration_since(self.used),
            false => Duration::ZERO,
        }
    }

    /// The session is over: everybody who waits is told.
    pub(super) fn close(&mut self, serial: u64) -> Option<Remains> {
        let Phase::Open(session) = &self.phase else { return None };
        if session.serial != serial {
            return None;
        }
        let remains = Remains { was_up: session.is_up(), token: session.ours };
        self.phase = Phase::Down { failed: (!remains.was_up).then(Instant::now) };
        match remains.was_up {
            true => self.fail_all().tell(|| Failure::Gone),
            false => self.fail_all().tell(|| Failure::Unreachable),
        }
        Some(remains)
    }

    pub(super) fn fail_all(&mut self) -> Failed {
        self.window.clear();
        self.corked = false;
        self.answering = 0;
        let calls = mem::take(&mut self.calls);
        Failed { calls, unsent: self.outbox.clear() }
    }
}

pub(super) struct Failed {
    pub(super) calls: HashMap<u64, Caller>,
    pub(super) unsent: usize,
}

impl Failed {
    pub(super) fn tell(self, failure: impl Fn() -> Failure) {
        if 0 < self.unsent {
            metrics::DROPPED.with_label_values(&["unsent"]).inc_by(self.unsent as u64);
        }
        for caller in self.calls.into_values() {
            _ = caller.send(Err(failure()));
        }
    }
}

impl Session {
    pub(super) fn is_up(&self) -> bool {
        !self.theirs.is_empty()
    }

    pub(super) fn header(&self, acknowledged: u64) -> Frame {
        Frame {
            token: self.theirs.clone(),
            acknowledged,
            sent_ms: clock::now_ms(),
            ..Frame::default()
        }
    }

    pub(super) fn send_hello(&self, hello: Hello, token: &Bytes) {
        let hello = Some(hello);
        let sent_ms = clock::now_ms();
        self.send(Frame { token: token.clone(), hello, sent_ms, ..Frame::default() });
    }

    pub(super) fn send(&self, frame: Frame) {
        self.send_bytes(prost::Message::encode_to_vec(&frame));
    }

    /// A gateway that is gone says so by the end of its session, which is on its way to us.
    pub(super) fn send_bytes(&self, bytes: Vec<u8>) {
        metrics::FRAMES.inc();
        _ = self.gateway.cast(GatewayMessage::Frame(bytes.into()));
    }
}
