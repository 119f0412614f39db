//! The links to all peers: dials, takes in, replaces and ends sessions.
//!
//! Never sees an envelope: those pass through [`crate::channel`], which is told here when a session is on its way.

mod sessions;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent};
use ractor_cluster::node::NodeServerSessionInformation;
use ractor_cluster::{NodeServerMessage, RactorMessage};

use crate::gateway::{Gateway, GatewayMessage};
use crate::hub::Hub;
use crate::link::{Arrival, Link, Phase, Task};
use crate::server::{self, Cookie, SessionEvent};
use crate::{Peer, metrics};

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
    /// It has other addresses than before.
    Learned(Peer),
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
    /// The gateway has closed it: nothing was sent for long.
    Unused {
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
            LinksMessage::Learned(peer) => state.learned(&peer),
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
            LinksMessage::Unused { serial } => state.unused(serial),
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

    fn learned(&mut self, peer: &Peer) {
        if self.links.get(peer).is_some_and(|link| link.keep) {
            self.want(peer);
        }
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
            return self.rest(peer);
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
                tell_failed(peer, &error);
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
        } else {
            link.failures = 0;
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

    // --- now and then ---

    /// Only who dialled a link on demand closes it: the other side may not be able to dial.
    fn close_idle(&mut self) {
        let (now, idle_max) = (Instant::now(), self.hub.config.idle_timeout());
        let is_idle = |link: &&Link| {
            let on_demand =
                matches!(&link.phase, Phase::Live(live) if live.ours && live.up.is_some());
            on_demand && !link.keep && idle_max <= link.channel.idle(now)
        };
        for link in self.links.values().filter(is_idle) {
            if let Some(live) = link.live() {
                let (channel, serial) = (link.channel.clone(), live.serial);
                _ = self.gateway.cast(GatewayMessage::Idle { channel, serial });
            }
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

/// A peer that is away comes back by itself; a certificate that is refused does not get better.
fn tell_failed(peer: &Peer, error: &net::Error) {
    let is_denied = error.kind() == domain::ErrorKind::Denied;
    let error: &dyn std::error::Error = error;
    if is_denied {
        tracing::warn!(%peer, error, "a peer and this process do not trust each other: see `certificate` and `ca` under [net] on both sides");
    } else {
        tracing::info!(%peer, error, "cannot reach a peer");
    }
}
