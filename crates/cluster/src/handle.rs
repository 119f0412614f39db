use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use domain::Role;
use proto::link::Envelope;
use ractor::{Actor, ActorRef};
use tokio::sync::watch;
use tokio::time::timeout_at;

use crate::accept;
use crate::channel::{Channel, Failure};
use crate::hub::{Acknowledgements, Hub};
use crate::link::Task;
use crate::links::{Links, LinksArgs, LinksMessage};
use crate::server::Cookie;
use crate::{Args, Error, Peer, metrics};

/// For the actors to stop, which takes milliseconds.
const STOP_TIMEOUT: Duration = Duration::from_secs(6);

/// Joins the cluster: listens, and links on demand from now on.
pub async fn spawn(args: Args) -> Result<Handle, Error> {
    let Args { config, identity, incarnation, service } = args;
    metrics::register();
    let cookie = Cookie::read(&config.cookie).await?;
    let roles = [Role::Control, Role::Node];
    let (addr, limits) = (config.listen, config.listener.clone());
    let listener = net::Listener::bind(addr, &identity, net::Protocol::Link, &roles, limits).await;
    let listener = listener.map_err(|source| Error::Listen { what: "the cluster", source })?;
    let local = listener.local_addr().to_string();
    let address = config.advertise.clone().unwrap_or(local);
    let hub = Hub::new(Peer::from(identity.id()), incarnation, config, service);
    let started = Actor::spawn(None, Links, LinksArgs { hub: hub.clone(), cookie, identity }).await;
    let (links, ending) =
        started.map_err(|error| Error::Start { what: "the cluster", why: error.to_string() })?;
    let (ended, watch) = watch::channel(false);
    tokio::spawn(async move {
        _ = ending.await;
        ended.send_replace(true);
    });
    let tasks = vec![
        tokio::spawn(accept::run(listener, hub.clone(), links.clone())).into(),
        tokio::spawn(Acknowledgements::run(hub.clone())).into(),
    ];
    Ok(Handle(Arc::new(Inner { hub, address, links, ended: watch, tasks: Mutex::new(tasks) })))
}

/// The cluster as seen by this process. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Inner>);

struct Inner {
    hub: Arc<Hub>,
    address: String,
    links: ActorRef<LinksMessage>,
    ended: watch::Receiver<bool>,
    tasks: Mutex<Vec<Task>>,
}

impl Handle {
    /// Where others reach this process, `host:port`.
    pub fn address(&self) -> &str {
        &self.0.address
    }

    /// Who this process is.
    pub fn me(&self) -> &Peer {
        &self.0.hub.me
    }

    /// Where a peer is. It is dialled when somebody has something for it. The newest list counts.
    pub fn learn(&self, peer: Peer, addresses: Vec<String>) {
        let is_news = peer != self.0.hub.me && self.0.hub.learn(&peer, addresses);
        if is_news {
            self.0.hub.tell_links(LinksMessage::Learned(peer));
        }
    }

    /// Dials a peer that was learned now, and again whenever the link ends.
    pub fn keep(&self, peer: Peer) {
        self.0.hub.tell_links(LinksMessage::Keep(peer));
    }

    /// Ends the link to a peer and forgets where it is, unless it is learned again at once.
    pub fn forget(&self, peer: Peer) {
        if let Some(channel) = self.0.hub.find(&peer) {
            channel.forget();
            self.0.hub.tell_links(LinksMessage::Forget(peer));
        }
    }

    /// Sends an envelope and waits for its answer, but not beyond the deadline. The envelope's `id`, `answers`,
    /// `deadline_ms` and `refusal` are set here, and `hops` is raised by one.
    pub async fn call(
        &self,
        to: &Peer,
        envelope: Envelope,
        deadline: Instant,
    ) -> Result<Bytes, Error> {
        let channel = self.channel(to)?;
        let (id, answer) = channel.call(envelope, deadline)?;
        let mut waiting = Waiting { channel: &channel, id, over: false };
        let answer = timeout_at(deadline.into(), answer).await;
        waiting.over = answer.is_ok();
        let peer = || to.clone();
        match answer {
            Ok(Ok(Ok(payload))) => Ok(payload),
            Ok(Ok(Err(Failure::Refused(refusal)))) => Err(Error::Refused(*refusal)),
            Ok(Ok(Err(Failure::Unreachable))) => Err(Error::Unreachable { peer: peer() }),
            Ok(Ok(Err(Failure::Gone)) | Err(_)) => Err(Error::PeerGone { peer: peer() }),
            Err(_) => Err(Error::Deadline { peer: peer() }),
        }
    }

    /// Queues an envelope for which there is no answer. It is lost if the link ends, or does not come up.
    pub fn cast(&self, to: &Peer, envelope: Envelope) -> Result<(), Error> {
        self.channel(to)?.cast(envelope)
    }

    pub fn is_linked(&self, peer: &Peer) -> bool {
        self.0.hub.find(peer).is_some_and(|channel| channel.is_up())
    }

    /// The peers whose link is up.
    pub fn links(&self) -> Vec<Peer> {
        let up = self.0.hub.channels().into_iter().filter(|channel| channel.is_up());
        up.map(|channel| channel.peer.clone()).collect()
    }

    /// Returns when the cluster has ended, by [`Self::shutdown`] or because a part of it failed: then this process has
    /// to end, too.
    pub async fn ended(&self) {
        _ = self.0.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Leaves: takes nobody in any more, lets what was sent arrive, ends all links. Returns when nothing is left of it.
    pub async fn shutdown(&self) {
        let Inner { hub, links, tasks, .. } = &*self.0;
        let mut tasks = std::mem::take(&mut *tasks.lock().unwrap_or_else(PoisonError::into_inner));
        // The first task is the listener; acknowledgements are still needed.
        drop(tasks.drain(..1.min(tasks.len())));
        let drained = async {
            while !hub.channels().iter().all(|channel| channel.is_drained()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        _ = tokio::time::timeout(Duration::from_millis(hub.config.drain_timeout_ms), drained).await;
        _ = links.call(LinksMessage::Stop, Some(STOP_TIMEOUT)).await;
        links.get_cell().drain_children_and_wait(Some(STOP_TIMEOUT)).await;
        _ = links.stop_and_wait(None, Some(STOP_TIMEOUT)).await;
        for channel in hub.channels() {
            channel.shut();
        }
        hub.clear();
    }

    fn channel(&self, peer: &Peer) -> Result<Arc<Channel>, Error> {
        if let Some(channel) = self.0.hub.find(peer) {
            return Ok(channel);
        }
        match *self.0.ended.borrow() {
            true => Err(Error::Closed),
            false => Err(Error::NoAddress { peer: peer.clone() }),
        }
    }
}

impl Drop for Inner {
    /// Whoever drops the last handle without [`Handle::shutdown`] leaves at once.
    fn drop(&mut self) {
        self.links.stop(None);
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({} at {})", self.0.hub.me, self.0.address)
    }
}

/// A caller that stops waiting is forgotten.
struct Waiting<'a> {
    channel: &'a Channel,
    id: u64,
    over: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.channel.forget_call(self.id);
        }
    }
}
