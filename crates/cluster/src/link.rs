//! What the links actor knows of one peer, and the rules of it. Pure but for the tasks that it holds.

use std::mem;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::ActorRef;
use ractor_cluster::NodeSessionMessage;
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinHandle};
use tokio_rustls::TlsStream;

use crate::Peer;
use crate::channel::Channel;
use crate::name::First;
use crate::transport::Connection;

/// A dial that crossed one of ours arrives within this time after the link came up.
const CROSSED: Duration = Duration::from_secs(2);

/// A task that ends with its owner.
#[derive(Debug)]
pub(crate) struct Task(AbortHandle);

impl<T> From<JoinHandle<T>> for Task {
    fn from(handle: JoinHandle<T>) -> Self {
        Self(handle.abort_handle())
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A connection of a peer whose name was checked.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) peer: Peer,
    pub(crate) subject: String,
    pub(crate) address: SocketAddr,
    pub(crate) first: First,
    pub(crate) stream: Box<TlsStream<TcpStream>>,
}

pub(crate) struct Link {
    pub(crate) channel: Arc<Channel>,
    /// Dial for ever.
    pub(crate) keep: bool,
    pub(crate) failures: u32,
    pub(crate) phase: Phase,
}

pub(crate) enum Phase {
    Idle,
    /// Until the next dial.
    Pausing {
        _timer: Task,
    },
    Dialling {
        attempt: u64,
        _task: Task,
    },
    Live(Live),
    /// The session was told to end. Only then may the next one begin: ractor_cluster elects among the sessions of one
    /// peer, and the dead one would often win.
    Ending {
        live: Live,
        next: Option<Box<Arrival>>,
    },
}

/// A connection that was handed over.
pub(crate) struct Live {
    pub(crate) serial: u64,
    pub(crate) connection: Arc<Connection>,
    pub(crate) subject: String,
    pub(crate) address: SocketAddr,
    /// We dialled it.
    pub(crate) ours: bool,
    /// The run of the peer, once known.
    pub(crate) instance: Option<String>,
    pub(crate) actor: Option<ActorRef<NodeSessionMessage>>,
    pub(crate) authenticated: bool,
    /// The gateway knows of it and has to hear of its end.
    pub(crate) opened: bool,
    pub(crate) up: Option<Instant>,
    /// It has to be up, or over, when this ends.
    pub(crate) _deadline: Option<Task>,
}

/// A session that is over.
pub(crate) struct Ended {
    pub(crate) live: Live,
    /// We told it to end.
    pub(crate) expected: bool,
    pub(crate) next: Option<Box<Arrival>>,
}

/// What to do with a connection of a peer that we may know already.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Take,
    /// Take it when the present session has ended.
    TakeAfter,
    /// Both dialled, and ours stays.
    Refuse,
}

impl Link {
    pub(crate) fn new(channel: Arc<Channel>) -> Self {
        Self { channel, keep: false, failures: 0, phase: Phase::Idle }
    }

    pub(crate) fn live(&self) -> Option<&Live> {
        match &self.phase {
            Phase::Live(live) | Phase::Ending { live, .. } => Some(live),
            Phase::Idle | Phase::Pausing { .. } | Phase::Dialling { .. } => None,
        }
    }

    pub(crate) fn live_mut(&mut self, serial: u64) -> Option<&mut Live> {
        match &mut self.phase {
            Phase::Live(live) | Phase::Ending { live, .. } if live.serial == serial => Some(live),
            Phase::Live(_)
            | Phase::Ending { .. }
            | Phase::Idle
            | Phase::Pausing { .. }
            | Phase::Dialling { .. } => None,
        }
    }

    /// Takes out the session that is over.
    pub(crate) fn ended(&mut self, serial: u64) -> Option<Ended> {
        self.live_mut(serial)?;
        match mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Live(live) => Some(Ended { live, expected: false, next: None }),
            Phase::Ending { live, next } => Some(Ended { live, expected: true, next }),
            Phase::Idle | Phase::Pausing { .. } | Phase::Dialling { .. } => None,
        }
    }

    /// If both sides dialled, the session dialled by the smaller name stays. Otherwise the newer one: a peer that dials
    /// again has lost the session that we still see.
    pub(crate) fn judge(&self, me: &Peer, instance: &str, now: Instant) -> Verdict {
        let ours_stays = *me < self.channel.peer;
        match &self.phase {
            Phase::Idle | Phase::Pausing { .. } => Verdict::Take,
            Phase::Dialling { .. } if ours_stays => Verdict::Refuse,
            Phase::Dialling { .. } => Verdict::Take,
            Phase::Live(live) if ours_stays && live.crosses(instance, now) => Verdict::Refuse,
            Phase::Live(_) | Phase::Ending { .. } => Verdict::TakeAfter,
        }
    }
}

impl Live {
    /// Whether a connection of this run of the peer was dialled before the peer knew of our session.
    fn crosses(&self, instance: &str, now: Instant) -> bool {
        let same_run = self.instance.as_deref().is_none_or(|known| known == instance);
        let just_up = self.up.is_none_or(|up| now.duration_since(up) < CROSSED);
        self.ours && same_run && just_up
    }

    /// Whether the peer hung up on a dial of ours before it proved anything: most likely it dialled, too, and its own
    /// connection is on its way.
    pub(crate) fn was_crossed(&self) -> bool {
        self.ours && !self.authenticated && self.connection.ended_by_peer()
    }

    /// Ends the session; what follows from that comes as its event.
    pub(crate) fn end(&self) {
        if let Some(actor) = &self.actor {
            actor.stop(Some("link_ended".to_owned()));
        }
        self.connection.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::Hub;
    use crate::{Config, Incoming, LinkEvent, Service};

    struct Deaf;
    impl Service for Deaf {
        fn handle(&self, _: Incoming) {}
        fn link(&self, _: LinkEvent) {}
    }

    fn link(peer: &str, phase: Phase) -> Link {
        let hub = Hub::new(
            "node/node-2".parse().unwrap(),
            domain::Incarnation(1),
            Config::default(),
            Arc::new(Deaf),
        );
        Link { phase, ..Link::new(hub.find_or_make(&peer.parse().unwrap())) }
    }

    fn live(ours: bool, instance: Option<&str>, up: Option<Instant>) -> Live {
        Live {
            serial: 1,
            connection: Arc::default(),
            subject: String::new(),
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            ours,
            instance: instance.map(str::to_owned),
            actor: None,
            authenticated: false,
            opened: false,
            up,
            _deadline: None,
        }
    }

    fn dialling() -> Phase {
        Phase::Dialling { attempt: 1, _task: tokio::spawn(async {}).into() }
    }

    #[tokio::test]
    async fn of_two_crossing_dials_the_smaller_names_stays() {
        let now = Instant::now();
        let check = |peer, phase, expected| {
            let verdict = link(peer, phase).judge(&"node/node-2".parse().unwrap(), "run-1", now);
            assert_eq!(verdict, expected, "{peer}");
        };
        check("node/node-3", Phase::Idle, Verdict::Take);
        check("node/node-3", dialling(), Verdict::Refuse);
        check("node/node-1", dialling(), Verdict::Take);
        check("control/control-1", dialling(), Verdict::Take);
        check("node/node-3", Phase::Live(live(true, None, None)), Verdict::Refuse);
        check("node/node-3", Phase::Live(live(true, Some("run-1"), Some(now))), Verdict::Refuse);
        check("node/node-1", Phase::Live(live(true, None, None)), Verdict::TakeAfter);
    }

    #[tokio::test]
    async fn a_peer_that_comes_back_replaces_its_old_session() {
        let (now, me) = (Instant::now(), "node/node-2".parse().unwrap());
        let check = |live| {
            let verdict = link("node/node-3", Phase::Live(live)).judge(&me, "run-2", now + CROSSED);
            assert_eq!(verdict, Verdict::TakeAfter);
        };
        check(live(false, Some("run-2"), Some(now)));
        check(live(true, Some("run-1"), None));
        check(live(true, Some("run-2"), Some(now)));
    }
}
