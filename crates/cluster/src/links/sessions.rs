//! The life of a session, from a connection that was checked to its end.

use std::mem;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ractor_cluster::NodeServerMessage;
use ractor_cluster::node::NodeServerSessionInformation;
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::{LinksMessage, LinksState};
use crate::gateway::GatewayMessage;
use crate::link::{Arrival, Ended, Link, Live, Phase, Task, Verdict};
use crate::server::{self, SessionEvent};
use crate::transport::{Connection, Guarded};
use crate::{Peer, metrics, name};

impl LinksState {
    pub(super) fn arrived(&mut self, arrival: Box<Arrival>) {
        if self.stopping {
            return;
        }
        let (me, peer) = (self.hub.me.clone(), arrival.peer.clone());
        let link = self.link(&peer);
        match link.judge(&me, &arrival.first.instance, Instant::now()) {
            Verdict::Take => self.take(*arrival),
            Verdict::TakeAfter => self.end(&peer, Some(arrival)),
            Verdict::Refuse => tracing::debug!(%peer, "both dialled: ours stays"),
        }
    }

    fn take(&mut self, arrival: Arrival) {
        let Arrival { peer, subject, address, first, stream } = arrival;
        self.hand_over(&peer, subject, address, stream, Some(first));
    }

    /// Gives a connection to ractor_cluster. `first`: what the peer said already; only one that dialled us has.
    pub(super) fn hand_over(
        &mut self,
        peer: &Peer,
        subject: String,
        address: SocketAddr,
        stream: Box<TlsStream<TcpStream>>,
        first: Option<name::First>,
    ) {
        let serial = self.number();
        let connection = Arc::new(Connection::default());
        let (bytes, instance) = match first {
            Some(first) => (first.bytes, Some(first.instance)),
            None => (Vec::new(), None),
        };
        let is_server = instance.is_some();
        let guarded = Guarded {
            stream: *stream,
            first: bytes,
            connection: connection.clone(),
            label: server::label(&subject, serial),
            silence_max: self.hub.config.silence_timeout(),
        };
        let stream = Box::new(guarded);
        _ = self.server.cast(NodeServerMessage::ConnectionOpenedExternal { stream, is_server });
        self.sessions.insert(serial, peer.clone());
        let deadline = self.deadline(serial);
        let link = self.link(peer);
        link.channel.expect_session();
        link.phase = Phase::Live(Live {
            serial,
            connection,
            subject,
            address,
            ours: !is_server,
            instance,
            actor: None,
            authenticated: false,
            opened: false,
            up: None,
            _deadline: Some(deadline),
        });
    }

    fn deadline(&self, serial: u64) -> Task {
        let timeout = self.hub.config.session_timeout();
        self.me.send_after(timeout, move || LinksMessage::Overdue { serial }).into()
    }

    /// Ends the session of a peer; then comes the next connection, if there is one.
    pub(super) fn end(&mut self, peer: &Peer, arrival: Option<Box<Arrival>>) {
        let Some(serial) = self.links.get(peer).and_then(Link::live).map(|live| live.serial) else {
            return;
        };
        let deadline = self.deadline(serial);
        let link = self.link(peer);
        match mem::replace(&mut link.phase, Phase::Idle) {
            Phase::Live(live) => {
                live.end();
                let live = Live { _deadline: Some(deadline), ..live };
                link.phase = Phase::Ending { live, next: arrival };
            }
            Phase::Ending { live, next } => {
                link.phase = Phase::Ending { live, next: arrival.or(next) };
            }
            other @ (Phase::Idle | Phase::Pausing { .. } | Phase::Dialling { .. }) => {
                link.phase = other;
            }
        }
    }

    pub(super) fn session(
        &mut self,
        serial: u64,
        event: SessionEvent,
        session: NodeServerSessionInformation,
    ) {
        let Some(peer) = self.sessions.get(&serial).cloned() else {
            // It was given up before it began.
            return session.actor.stop(None);
        };
        match event {
            SessionEvent::Opened => self.opened(&peer, serial, session),
            SessionEvent::Authenticated => self.authenticated(&peer, serial, &session),
            SessionEvent::Ready => self.ready(&peer, serial, &session),
            SessionEvent::Disconnected => self.disconnected(&peer, serial),
        }
    }

    fn opened(&mut self, peer: &Peer, serial: u64, session: NodeServerSessionInformation) {
        let link = self.link(peer);
        let ending = matches!(link.phase, Phase::Ending { .. });
        if let Some(live) = link.live_mut(serial) {
            live.actor = Some(session.actor);
            if ending {
                live.end();
            }
        }
    }

    /// The name that was exchanged with the cookie has to be the certified one, whoever dialled.
    fn authenticated(&mut self, peer: &Peer, serial: u64, session: &NodeServerSessionInformation) {
        let Some(live) = self.link(peer).live_mut(serial) else { return };
        let name = session.peer_name.as_ref().map_or("", |name| name.name.as_str());
        let Some(instance) = name::instance_of(peer, name) else {
            let why = format!("it claims to be {:?}", name.chars().take(100).collect::<String>());
            metrics::refused("name_mismatch", live.address, &live.subject, why);
            session.actor.kill();
            return self.end(peer, None);
        };
        live.authenticated = true;
        live.instance = Some(instance.to_owned());
    }

    fn ready(&mut self, peer: &Peer, serial: u64, session: &NodeServerSessionInformation) {
        let gateway = server::gateway_of(session);
        let link = self.link(peer);
        let (channel, is_live) = (link.channel.clone(), matches!(link.phase, Phase::Live(_)));
        let Some(live) = link.live_mut(serial).filter(|_| is_live) else { return };
        match gateway {
            Some(gateway) => {
                live.opened = true;
                _ = self.gateway.cast(GatewayMessage::Opened { channel, serial, gateway });
            }
            None => {
                metrics::refused("no_gateway", live.address, &live.subject, "it has no gateway");
                self.end(peer, None);
            }
        }
    }

    pub(super) fn up(&mut self, serial: u64) {
        let Some(peer) = self.sessions.get(&serial).cloned() else { return };
        let link = self.link(&peer);
        link.failures = 0;
        let is_live = matches!(link.phase, Phase::Live(_));
        if let Some(live) = link.live_mut(serial).filter(|_| is_live) {
            live.up = Some(Instant::now());
            live._deadline = None;
        }
    }

    pub(super) fn unused(&mut self, serial: u64) {
        if let Some(peer) = self.sessions.get(&serial).cloned() {
            tracing::debug!(%peer, "closing an idle link");
            self.end(&peer, None);
        }
    }

    pub(super) fn violated(&mut self, serial: u64, reason: &'static str) {
        let Some(peer) = self.sessions.get(&serial).cloned() else { return };
        if let Some(live) = self.link(&peer).live_mut(serial) {
            metrics::refused(reason, live.address, &live.subject, "it broke the link protocol");
        }
        self.end(&peer, None);
    }

    /// A session did not come up in time, or did not end in time.
    pub(super) fn overdue(&mut self, serial: u64) {
        let Some(peer) = self.sessions.get(&serial).cloned() else { return };
        let link = self.link(&peer);
        let ending = matches!(link.phase, Phase::Ending { .. });
        let Some(live) = link.live_mut(serial) else { return };
        if !ending && live.up.is_none() {
            let why = "it did not finish the handshake in time";
            metrics::refused("handshake_timeout", live.address, &live.subject, why);
            return self.end(&peer, None);
        }
        if ending {
            if let Some(actor) = &live.actor {
                actor.kill();
            }
            self.disconnected(&peer, serial);
        }
    }

    fn disconnected(&mut self, peer: &Peer, serial: u64) {
        self.sessions.remove(&serial);
        let stopping = self.stopping;
        let link = self.link(peer);
        let Some(Ended { live, expected, next }) = link.ended(serial) else { return };
        live.connection.close();
        if !expected && live.was_crossed() && link.failures == 0 && !stopping {
            // Those who wait go on waiting.
            return self.pause(peer);
        }
        if !expected {
            live.explain();
        }
        let channel = link.channel.clone();
        if live.opened {
            _ = self.gateway.cast(GatewayMessage::Closed { channel: channel.clone(), serial });
        }
        match next {
            Some(arrival) if !stopping => self.take(*arrival),
            // Somebody wants it while it ends for want of use.
            None if expected && !stopping && channel.is_wanted() => self.dial(peer),
            _ => self.rest(peer),
        }
        self.stop_if_done();
    }
}

impl Live {
    /// ractor_cluster does not say why a session ended. If it ended before it was authenticated, and the peer did not
    /// hang up, then our side did not like what the peer proved.
    fn explain(&self) {
        if self.authenticated {
            return;
        }
        let (address, subject) = (self.address, &self.subject);
        match self.connection.ended_by_peer() {
            false => {
                metrics::refused("wrong_cookie", address, subject, "it does not know the cookie")
            }
            true => {
                metrics::REFUSED.with_label_values(&["ended_by_peer"]).inc();
                tracing::warn!(%address, %subject, "a peer ended the session before it was authenticated: are the cookies the same?");
            }
        }
    }
}
