//! What the parts of one process share: its peers, and which link a token belongs to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use domain::Incarnation;
use ractor::ActorRef;
use tokio::sync::Notify;

use crate::channel::Channel;
use crate::links::LinksMessage;
use crate::{Config, Peer, Service};

/// How long an acknowledgement waits for a frame that goes anyway.
const ACKNOWLEDGE_AFTER: Duration = Duration::from_millis(10);

/// 128 random bits that one side gives to a link, and that name it in every frame of the other side.
pub(crate) type Token = [u8; 16];

pub(crate) struct Hub {
    pub(crate) me: Peer,
    pub(crate) incarnation: Incarnation,
    pub(crate) config: Config,
    pub(crate) service: Arc<dyn Service>,
    pub(crate) acknowledgements: Acknowledgements,
    links: OnceLock<ActorRef<LinksMessage>>,
    ids: AtomicU64,
    channels: RwLock<HashMap<Peer, Arc<Channel>>>,
}

impl Hub {
    pub(crate) fn new(
        me: Peer,
        incarnation: Incarnation,
        config: Config,
        service: Arc<dyn Service>,
    ) -> Arc<Self> {
        Arc::new(Self {
            me,
            incarnation,
            config,
            service,
            acknowledgements: Acknowledgements::default(),
            links: OnceLock::new(),
            ids: AtomicU64::new(1),
            channels: RwLock::default(),
        })
    }

    pub(crate) fn set_links(&self, links: ActorRef<LinksMessage>) {
        _ = self.links.set(links);
    }

    /// Before the start and after the end nobody listens, and nothing has to be done.
    pub(crate) fn tell_links(&self, message: LinksMessage) {
        if let Some(links) = self.links.get() {
            _ = links.cast(message);
        }
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn find(&self, peer: &Peer) -> Option<Arc<Channel>> {
        self.channels.read().unwrap_or_else(PoisonError::into_inner).get(peer).cloned()
    }

    pub(crate) fn find_or_make(self: &Arc<Self>, peer: &Peer) -> Arc<Channel> {
        if let Some(channel) = self.find(peer) {
            return channel;
        }
        let mut channels = self.channels.write().unwrap_or_else(PoisonError::into_inner);
        let channel = channels.entry(peer.clone());
        channel.or_insert_with(|| Arc::new(Channel::new(peer.clone(), self.clone()))).clone()
    }

    /// Says whether that is news.
    pub(crate) fn learn(self: &Arc<Self>, peer: &Peer, addresses: Vec<String>) -> bool {
        let mut channels = self.channels.write().unwrap_or_else(PoisonError::into_inner);
        let channel = channels.entry(peer.clone());
        channel
            .or_insert_with(|| Arc::new(Channel::new(peer.clone(), self.clone())))
            .set_addresses(addresses)
    }

    /// Removes a peer that was forgotten, unless it was learned again meanwhile. Says whether it is gone.
    pub(crate) fn remove_if_forgotten(&self, peer: &Peer) -> bool {
        let mut channels = self.channels.write().unwrap_or_else(PoisonError::into_inner);
        if channels.get(peer).is_some_and(|channel| !channel.is_forgotten()) {
            return false;
        }
        if let Some(channel) = channels.remove(peer) {
            channel.shut();
        }
        true
    }

    pub(crate) fn channels(&self) -> Vec<Arc<Channel>> {
        self.channels.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Channels and hub hold each other; this lets both go.
    pub(crate) fn clear(&self) {
        self.channels.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Sees to it that an acknowledgement which no frame carried goes alone a moment later.
#[derive(Default)]
pub(crate) struct Acknowledgements {
    wanted: Notify,
    running: AtomicBool,
}

impl Acknowledgements {
    pub(crate) fn want(&self) {
        if !self.running.swap(true, Ordering::AcqRel) {
            self.wanted.notify_one();
        }
    }

    /// Never returns. Sleeps for as long as nothing is owed.
    pub(crate) async fn run(hub: Arc<Hub>) {
        loop {
            hub.acknowledgements.wanted.notified().await;
            hub.acknowledgements.running.store(false, Ordering::Release);
            tokio::time::sleep(ACKNOWLEDGE_AFTER).await;
            for channel in hub.channels() {
                if channel.acknowledge_if_old() {
                    hub.acknowledgements.want();
                }
            }
        }
    }
}
