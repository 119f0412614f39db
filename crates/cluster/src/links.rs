//! The links to all peers: dials, takes in, replaces and ends sessions.
//!
//! Never sees an envelope: those pass through [`crate::channel`], which is told here when a session is on its way.

use std::collections::HashMap;
use std::mem;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use ractor_cluster::node::NodeServerSessionInformation;
use ractor_cluster::{NodeServerMessage, RactorMessage};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::gateway::{Gateway, GatewayMessage};
use crate::hub::Hub;
use crate::link::{Arrival, Link, Live, Phase, Task, Verdict};
use crate::server::{self, Cookie, SessionEvent};
use crate::transport::{Connection, Guarded};
use crate::{Peer, metrics, name};

const TICK: Duration = Duration::from_secs(1);

pub(crate) struct LinksArgs {
    pub(crate) hub: Arc<Hub>,
    pub(crate) cookie: Cookie,
    pub(crate) identity: net::Identity,
}

#[derive(RactorMessage)]
pub(crate) enum LinksMessage {
    /// Somebody has something to send.
    Want(Peer),
    Keep(Peer),
    Forget(Peer),
    Paused(Peer),
    Dialled {
        peer: Peer,
        attempt: u64,
        outcome: Result<Box<net::Dialed>, net::Error>,
    },
    Arrived(Box<Arrival>),
    Session {
        serial: u64,
        event: SessionEvent,
        session: NodeServerSessionInformation,
    },
    /// Both hellos were exchanged.
    Up {
        serial: u64,
    },
    Violated {
        serial: u64,
        reason: &'static str,
    },
    Overdue {
        serial: u64,
    },
    Tick,
    Stop(RpcReplyPort<()>),
}

pub(crate) struct Links;

pub(crate) struct LinksState {
    hub: Arc<Hub>,
    me: ActorRef<LinksMessage>,
    server: ActorRef<NodeServerMessage>,
    gateway: ActorRef<GatewayMessage>,
    dialer: net::Dialer,
    links: HashMap<Peer, Link>,
    /// Whose a session is.
    sessions: HashMap<u64, Peer>,
    last_number: u64,
    stopping: bool,
    /// Who waits for the last session to end.
    stopped: Option<RpcReplyPort<()>>,
    _tick: Task,
}

impl Actor for Links {
    type Msg = LinksMessage;
    type State = LinksState;
    type Arguments = LinksArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<LinksMessage>,
        args: LinksArgs,
    ) -> Result<LinksState, ActorProcessingErr> {
        let LinksArgs { hub, cookie, identity } = args;
        hub.set_links(myself.clone());
        let cell = myself.get_cell();
        let (gateway, _) = Actor::spawn_linked(None, Gateway, hub.clone(), cell.clone()).await?;
        let instance = server::instance(hub.incarnation);
        let server = server::spawn(&hub.me, &instance, cookie, myself.clone(), cell).await?;
        let timeout = Duration::from_millis(hub.config.dial_timeout_ms);
        let dialer = net::Dialer::new(&identity, net::Protocol::Link).with_timeout(timeout);
        let tick = myself.send_interval(TICK, || LinksMessage::Tick);
        Ok(LinksState {
            hub,
            me: myself,
            server,
            gateway,
            dialer,
            links: HashMap::new(),
            sessions: HashMap::new(),
            last_number: 0,
            stopping: false,
            stopped: None,
            _tick: tick.into(),
        })
    }

    async fn handle(
        &self,
        _: ActorRef<LinksMessage>,
        message: LinksMessage,
        state: &mut LinksState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            LinksMessage::Want(peer) => state.want(&peer),
            LinksMessage::Keep(peer) => state.keep(&peer),
            LinksMessage::Forget(peer) => state.forget(&peer),
            LinksMessage::Paused(peer) => state.want(&peer),
            LinksMessage::Dialled { peer, attempt, outcome } => {
                state.dialled(&peer, attempt, outcome)
            }
            LinksMessage::Arrived(arrival) => state.arrived(arrival),
            LinksMessage::Session { serial, event, session } => {
                state.session(serial, event, session)
            }
            LinksMessage::Up { serial } => state.up(serial),
            LinksMessage::Violated { serial, reason } => state.violated(serial, reason),
            LinksMessage::Overdue { serial } => state.overdue(serial),
            LinksMessage::Tick => state.close_idle(),
            LinksMessage::Stop(reply) => state.stop(reply),
        }
        Ok(())
    }

    /// The gateway and the node server end only with this actor. If one fails, this process has no cluster any more,
    /// and those who watch the handle learn that by its end.
    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<LinksMessage>,
        event: SupervisionEvent,
        _: &mut LinksState,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(actor, error) = event {
            tracing::error!(actor = %actor.get_id(), %error, "a part of the cluster failed");
            myself.stop(Some("a part failed".to_owned()));
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<LinksMessage>,
        state: &mut LinksState,
    ) -> Result<(), ActorProcessingErr> {
        for link in state.links.values() {
            if let Some(live) = link.live() {
                live.end();
                link.channel.close(live.serial);
            }
            link.channel.shut();
        }
        state.hub.clear();
        Ok(())
    }
}

impl LinksState {
    fn link(&mut self, peer: &Peer) -> &mut Link {
        let Self { links, hub, .. } = self;
        links.entry(peer.clone()).or_insert_with(|| Link::new(hub.find_or_make(peer)))
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    // --- who wants a link ---

    fn keep(&mut self, peer: &Peer) {
        let link = self.link(peer);
        link.keep = true;
        self.want(peer);
    }

    fn want(&mut self, peer: &Peer) {
        if self.stopping {
            return;
        }
        match self.link(peer).phase {
            Phase::Idle | Phase::Pausing { .. } => self.dial(peer),
            Phase::Dialling { .. } | Phase::Live(_) | Phase::Ending { .. } => {}
        }
    }

    fn forget(&mut self, peer: &Peer) {
        let link = self.link(peer);
        if !link.channel.is_forgotten() {
            return;
        }
        link.keep = false;
        match link.live() {
            Some(_) => self.end(peer, None),
            None => self.remove_if_forgotten(peer),
        }
    }

    /// Only without a session: its end has to find its link.
    fn remove_if_forgotten(&mut self, peer: &Peer) {
        if self.link(peer).channel.is_forgotten() && self.hub.remove_if_forgotten(peer) {
            self.links.remove(peer);
        }
    }

    // --- dialling ---

    fn dial(&mut self, peer: &Peer) {
        let (attempt, dialer, me) = (self.number(), self.dialer.clone(), self.me.clone());
        let link = self.link(peer);
        let addresses = link.channel.addresses();
        if addresses.is_empty() {
            link.phase = Phase::Idle;
            return link.channel.unreachable();
        }
        link.channel.expect_session();
        let peer = peer.clone();
        let dial = async move {
            let outcome = dial_any(&dialer, &peer, &addresses).await;
            _ = me.cast(LinksMessage::Dialled { peer, attempt, outcome });
        };
        link.phase = Phase::Dialling { attempt, _task: tokio::spawn(dial).into() };
    }

    fn dialled(&mut self, peer: &Peer, number: u64, outcome: Result<Box<net::Dialed>, net::Error>) {
        let Some(link) = self.links.get_mut(peer) else { return };
        match link.phase {
            Phase::Dialling { attempt, .. } if attempt == number => {}
            // Another way was found meanwhile, or the peer was forgotten.
            Phase::Dialling { .. }
            | Phase::Idle
            | Phase::Pausing { .. }
            | Phase::Live(_)
            | Phase::Ending { .. } => return,
        }
        match outcome {
            Ok(dialed) => {
                let net::Dialed { stream, peer: id, addr } = *dialed;
                self.hand_over(peer, id.to_string(), addr, Box::new(stream), None);
            }
            Err(error) => {
                metrics::DIALS_FAILED.inc();
                let error: &dyn std::error::Error = &error;
                tracing::info!(%peer, error, "cannot reach a peer");
                self.rest(peer);
            }
        }
    }

    /// No session, and none on its way: the next dial comes after a pause, or when somebody wants it.
    fn rest(&mut self, peer: &Peer) {
        let stopping = self.stopping;
        let link = self.link(peer);
        link.phase = Phase::Idle;
        link.channel.unreachable();
        if stopping {
            link.channel.shut();
        } else if link.keep {
            self.pause(peer);
        }
        self.remove_if_forgotten(peer);
    }

    fn pause(&mut self, peer: &Peer) {
        let (me, hub) = (self.me.clone(), self.hub.clone());
        let link = self.link(peer);
        link.failures = link.failures.saturating_add(1);
        let pause = hub.config.backoff(link.failures, rand::random());
        let peer = peer.clone();
        let timer = me.send_after(pause, || LinksMessage::Paused(peer));
        link.phase = Phase::Pausing { _timer: timer.into() };
    }

    // --- sessions ---

    fn arrived(&mut self, arrival: Box<Arrival>) {
        if self.stopping {
            return;
        }
        let (me, peer) = (self.hub.me.clone(), arrival.peer.clone());
        let link = self.link(&peer);
        match link.judge(&me, &arrival.first.instance, Instant::now()) {
            Verdict::Take => self.take(arrival),
            Verdict::TakeAfter => self.end(&peer, Some(arrival)),
            Verdict::Refuse => tracing::debug!(%peer, "both dialled: ours stays"),
        }
    }

    fn take(&mut self, arrival: Box<Arrival>) {
        let Arrival { peer, subject, address, first, stream } = *arrival;
        self.hand_over(&peer, subject, address, stream, Some(first));
    }

    /// Gives a connection to ractor_cluster. `first`: what the peer said already; only one that dialled us has.
    fn hand_over(
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
    fn end(&mut self, peer: &Peer, arrival: Option<Box<Arrival>>) {
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

    fn session(&mut self, serial: u64, event: SessionEvent, session: NodeServerSessionInformation) {
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

    fn up(&mut self, serial: u64) {
        let Some(peer) = self.sessions.get(&serial).cloned() else { return };
        let link = self.link(&peer);
        link.failures = 0;
        let is_live = matches!(link.phase, Phase::Live(_));
        if let Some(live) = link.live_mut(serial).filter(|_| is_live) {
            live.up = Some(Instant::now());
            live._deadline = None;
        }
    }

    fn violated(&mut self, serial: u64, reason: &'static str) {
        let Some(peer) = self.sessions.get(&serial).cloned() else { return };
        if let Some(live) = self.link(&peer).live_mut(serial) {
            metrics::refused(reason, live.address, &live.subject, "it broke the link protocol");
        }
        self.end(&peer, None);
    }

    /// A session did not come up in time, or did not end in time.
    fn overdue(&mut self, serial: u64) {
        let Some(peer) = self.sessions.get(&serial).cloned() else { return };
        let link = self.link(&peer);
        let ending = matches!(link.phase, Phase::Ending { .. });
        let Some(live) = link.live_mut(serial) else { return };
        if ending || live.actor.is_none() {
            if let Some(actor) = &live.actor {
                actor.kill();
            }
            live.connection.close();
            return self.disconnected(&peer, serial);
        }
        if live.up.is_none() {
            let why = "it did not finish the handshake in time";
            metrics::refused("handshake_timeout", live.address, &live.subject, why);
            self.end(&peer, None);
        }
    }

    fn disconnected(&mut self, peer: &Peer, serial: u64) {
        self.sessions.remove(&serial);
        let stopping = self.stopping;
        let link = self.link(peer);
        let first_failure = link.failures == 0;
        let (live, next) = match mem::replace(&mut link.phase, Phase::Idle) {
            Phase::Live(live) if live.serial == serial => {
                if live.was_crossed() && first_failure && !stopping {
                    // Those who wait go on waiting.
                    return self.pause(peer);
                }
                live.explain();
                (live, None)
            }
            Phase::Ending { live, next } if live.serial == serial => (live, next),
            other => {
                link.phase = other;
                return;
            }
        };
        live.connection.close();
        let (channel, was_up) = (link.channel.clone(), live.up.is_some());
        if live.opened {
            _ = self.gateway.cast(GatewayMessage::Closed { channel, serial });
        }
        match next {
            Some(arrival) if !self.stopping => self.take(arrival),
            _ => self.rest(peer),
        }
        if was_up {
            tracing::info!(%peer, "session over");
        }
        self.stop_if_done();
    }

    // --- now and then ---

    /// Only who dialled a link on demand closes it: the other side may not be able to dial.
    fn close_idle(&mut self) {
        let (now, idle_max) = (Instant::now(), self.hub.config.idle_timeout());
        let is_idle = |link: &&Link| {
            let on_demand =
                matches!(&link.phase, Phase::Live(live) if live.ours && live.up.is_some());
            on_demand && !link.keep && idle_max <= link.channel.idle(now)
        };
        let idle: Vec<_> =
            self.links.values().filter(is_idle).map(|it| it.channel.peer.clone()).collect();
        for peer in idle {
            tracing::debug!(%peer, "closing an idle link");
            self.end(&peer, None);
        }
    }

    fn stop(&mut self, reply: RpcReplyPort<()>) {
        self.stopping = true;
        self.stopped = Some(reply);
        let peers: Vec<_> = self.links.keys().cloned().collect();
        for peer in peers {
            self.end(&peer, None);
            let link = self.link(&peer);
            if link.live().is_none() {
                link.phase = Phase::Idle;
                link.channel.shut();
            }
        }
        self.stop_if_done();
    }

    fn stop_if_done(&mut self) {
        if self.sessions.is_empty()
            && let Some(reply) = self.stopped.take()
        {
            _ = reply.send(());
        }
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

/// The first of the addresses at which the peer itself answers.
async fn dial_any(
    dialer: &net::Dialer,
    peer: &Peer,
    addresses: &[String],
) -> Result<Box<net::Dialed>, net::Error> {
    let expected = net::Expected::exactly(peer.role, peer.name.clone());
    let mut failure = net::Error::Address { addr: String::new() };
    for address in addresses {
        match dialer.dial(address, &expected).await {
            Ok(dialed) => return Ok(Box::new(dialed)),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}
