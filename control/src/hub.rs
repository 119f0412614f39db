//! Where events of owners arrive: each subscription of this process, and the inbox of whoever follows it.
//!
//! Called on the gateway, so it never waits and never reads an entry. An inbox that is full loses a whole subscription,
//! never an event out of its middle: the follower subscribes anew after what it has. Text that is not durable comes with its step
//! again, and is dropped.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use domain::view::View;
use domain::{ProcessName, Role};
use prost::Message;
use proto::link::{Envelope, Events, UnsubscribeCall};
use proto::status::Failure;
use telemetry::metrics::{IntCounter, IntGauge, counter, gauge};
use tokio::sync::Notify;

use crate::follow::Follow;
use crate::network::Network;
use crate::router::Seat;

static SUBSCRIPTIONS: LazyLock<IntGauge> = LazyLock::new(|| {
    gauge("stagedoor_control_subscriptions", "Works that are followed at their owners.")
});
static OVERFLOWS: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "stagedoor_control_watch_overflows_total",
        "Subscriptions dropped because the client reads too slowly.",
    )
});

/// What a follower finds in its inbox, in order.
pub(crate) enum Item {
    /// A work to follow from now on; its events come after it.
    Follow(u64, Follow),
    Events(u64, Box<Events>),
    /// The subscription is over before its work is.
    Lost(u64),
    /// A work cannot be followed any more, whatever is tried.
    Failed(i64, Failure),
    /// Nothing is added any more but what follows from what was.
    NoMore,
}

/// How much may wait in an inbox.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    pub(crate) events: usize,
    pub(crate) bytes: usize,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Item>,
    events: usize,
    bytes: usize,
}

/// One follower's events. Only events are counted against its room: the rest is bounded by what the follower asked for.
pub(crate) struct Inbox {
    queue: Mutex<Queue>,
    room: Room,
    filled: Notify,
}

impl Inbox {
    pub(crate) fn new(room: Room) -> Arc<Self> {
        Arc::new(Self { queue: Mutex::default(), room, filled: Notify::new() })
    }

    pub(crate) fn push(&self, item: Item) {
        self.queue().items.push_back(item);
        self.filled.notify_one();
    }

    /// Whether there was room. An empty inbox takes anything, so that one large event gets through.
    fn push_events(&self, subscription: u64, events: Events) -> bool {
        let (count, bytes) = size(&events);
        let mut queue = self.queue();
        let is_full =
            self.room.events < queue.events + count || self.room.bytes < queue.bytes + bytes;
        if is_full && 0 < queue.events {
            return false;
        }
        queue.events += count;
        queue.bytes += bytes;
        queue.items.push_back(Item::Events(subscription, Box::new(events)));
        drop(queue);
        self.filled.notify_one();
        true
    }

    /// The next item. Loses nothing when it is dropped.
    pub(crate) async fn next(&self) -> Item {
        loop {
            if let Some(item) = self.take() {
                return item;
            }
            self.filled.notified().await;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue().items.is_empty()
    }

    fn take(&self) -> Option<Item> {
        let mut queue = self.queue();
        let item = queue.items.pop_front()?;
        if let Item::Events(_, events) = &item {
            let (count, bytes) = size(events);
            queue.events -= count;
            queue.bytes -= bytes;
        }
        Some(item)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn size(events: &Events) -> (usize, usize) {
    let entries: usize = events.entries.iter().map(|entry| entry.entry.len()).sum();
    let ended = events.ended.as_ref().map_or(0, |work| work.result.len());
    let text = events.text.as_ref().map_or(0, |said| said.text.len());
    let whole = events.whole.as_ref().map_or(0, |work| work.result.len());
    (events.entries.len().max(1), entries + ended + text + whole)
}

/// Whether they hold nothing but what an attempt that runs has said.
fn is_only_text(events: &Events) -> bool {
    let Events { entries, ended, closed, began_ms, .. } = events;
    entries.is_empty() && ended.is_none() && closed.is_none() && *began_ms == 0
}

/// One work followed at one owner.
struct Subscription {
    seat: Seat,
    inbox: Arc<Inbox>,
    /// What came before its follower was ready for it; none once it is.
    early: Option<Vec<Events>>,
    is_lost: bool,
}

/// All subscriptions of this process.
pub(crate) struct Hub {
    subscriptions: Mutex<HashMap<u64, Subscription>>,
    next: AtomicU64,
    network: Arc<dyn Network>,
}

impl Hub {
    /// Subscriptions end with the ownership under which they were made: a task sees to it as long as the hub lives.
    pub(crate) fn spawn(network: Arc<dyn Network>) -> Arc<Self> {
        let hub = Arc::new(Self {
            subscriptions: Mutex::default(),
            // Owners may still have subscriptions of the run of this process before: none has the number of a later one.
            next: AtomicU64::new(rand::random_range(1..u64::MAX >> 1)),
            network: network.clone(),
        });
        tokio::spawn(watch_moves(Arc::downgrade(&hub), network));
        hub
    }

    /// A subscription that is about to be asked for at `seat`; it ends with the ticket.
    pub(crate) fn register(self: &Arc<Self>, seat: &Seat, inbox: &Arc<Inbox>) -> Ticket {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let subscription = Subscription {
            seat: seat.clone(),
            inbox: inbox.clone(),
            early: Some(Vec::new()),
            is_lost: false,
        };
        self.lock().insert(number, subscription);
        SUBSCRIPTIONS.inc();
        Ticket { hub: self.clone(), number, held: true }
    }

    /// Events as they come over a link. Only the owner that was asked is heard.
    pub(crate) fn events(&self, from: &ProcessName, events: Events) {
        let number = events.subscription;
        let mut subscriptions = self.lock();
        let Some(subscription) =
            subscriptions.get_mut(&number).filter(|known| known.seat.node == *from)
        else {
            drop(subscriptions);
            // An owner that did not hear of the end of a subscription hears of it now.
            return self.unsubscribe(from, number);
        };
        let is_only_text = is_only_text(&events);
        if subscription.is_lost {
            return;
        }
        if let Some(early) = &mut subscription.early {
            let taken =
                early.iter().map(size).fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
            let room = subscription.inbox.room;
            if early.is_empty() || taken.0 < room.events && taken.1 + size(&events).1 <= room.bytes
            {
                early.push(events);
            } else if !is_only_text {
                subscription.is_lost = true;
            }
            return;
        }
        // What is not durable comes with its step once more.
        if subscription.inbox.push_events(number, events) || is_only_text {
            return;
        }
        OVERFLOWS.inc();
        let lost = subscriptions.remove(&number);
        drop(subscriptions);
        if let Some(lost) = lost {
            SUBSCRIPTIONS.dec();
            lost.inbox.push(Item::Lost(number));
            self.unsubscribe(from, number);
        }
    }

    /// The link to a node is down: what it sent since may be lost.
    pub(crate) fn link_down(&self, role: Role, node: &ProcessName) {
        if role == Role::Node {
            self.lose(|seat| seat.node == *node);
        }
    }

    fn moved(&self, view: &View) {
        self.lose(|seat| !seat.stands_in(view));
    }

    fn lose(&self, is_over: impl Fn(&Seat) -> bool) {
        let mut subscriptions = self.lock();
        subscriptions.retain(|number, subscription| {
            if !is_over(&subscription.seat) {
                return true;
            }
            if subscription.early.is_some() {
                subscription.is_lost = true;
                return true;
            }
            SUBSCRIPTIONS.dec();
            subscription.inbox.push(Item::Lost(*number));
            false
        });
    }

    /// The subscription is not wanted any more, or over: its owner is told, unless it said so itself.
    pub(crate) fn end(&self, number: u64) {
        if let Some(subscription) = self.forget(number) {
            self.unsubscribe(&subscription.seat.node, number);
        }
    }

    /// Its owner knows that it is over.
    pub(crate) fn ended(&self, number: u64) {
        self.forget(number);
    }

    fn forget(&self, number: u64) -> Option<Subscription> {
        let subscription = self.lock().remove(&number);
        if subscription.is_some() {
            SUBSCRIPTIONS.dec();
        }
        subscription
    }

    fn release(&self, number: u64) {
        let mut subscriptions = self.lock();
        let Some(subscription) = subscriptions.get_mut(&number) else { return };
        // The shard may have moved before the subscription was there to hear of it.
        let stands = self
            .network
            .views()
            .borrow()
            .as_ref()
            .is_none_or(|view| subscription.seat.stands_in(view));
        // What came before the loss is without a gap, so the next subscription goes on behind it.
        let early = subscription.early.take().into_iter().flatten();
        let is_full = early
            .map(|events| (is_only_text(&events), events))
            .any(|(is_text, events)| !subscription.inbox.push_events(number, events) && !is_text);
        if subscription.is_lost || !stands || is_full {
            subscription.inbox.push(Item::Lost(number));
            let node = subscription.seat.node.clone();
            subscriptions.remove(&number);
            drop(subscriptions);
            SUBSCRIPTIONS.dec();
            self.unsubscribe(&node, number);
        }
    }

    fn unsubscribe(&self, node: &ProcessName, subscription: u64) {
        let payload = UnsubscribeCall { subscription }.encode_to_vec().into();
        self.network.cast(
            node,
            Envelope { kind: proto::kind::UNSUBSCRIBE, payload, ..Envelope::default() },
        );
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Subscription>> {
        self.subscriptions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }
}

async fn watch_moves(hub: Weak<Hub>, network: Arc<dyn Network>) {
    let mut views = network.views();
    drop(network);
    while views.changed().await.is_ok() {
        let Some(hub) = hub.upgrade() else { return };
        let view = views.borrow_and_update().clone();
        if let Some(view) = view {
            hub.moved(&view);
        }
    }
}

/// A subscription whose follower is not ready yet. Dropped, it is not wanted after all.
pub(crate) struct Ticket {
    hub: Arc<Hub>,
    number: u64,
    held: bool,
}

impl Ticket {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Hands the work to its follower, and everything that came for it so far.
    pub(crate) fn release(mut self, inbox: &Inbox, follow: Follow) {
        self.held = false;
        inbox.push(Item::Follow(self.number, follow));
        self.hub.release(self.number);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.held {
            self.hub.end(self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::follow::tests::{last, phase, says, work};
    use crate::testing::{FakeNetwork, refuse, view};
    use domain::{Epoch, Phase, Reason, ShardId};
    use proto::link::WatchMode;

    const ROOM: Room = Room { events: 2, bytes: 1_000 };

    fn hub() -> (Arc<Hub>, Arc<FakeNetwork>) {
        let network =
            FakeNetwork::new(view(1, &[("node-1", 1)]), |_, _, _| refuse(Reason::NotFound));
        (Hub::spawn(network.clone()), network)
    }

    fn seat(epoch: u64) -> Seat {
        Seat { shard: ShardId(0), node: "node-1".parse().unwrap(), epoch: Epoch(epoch) }
    }

    fn follow() -> Follow {
        Follow::new(0, work(), WatchMode::All)
    }

    fn sent(subscription: u64, seqs: &[u64]) -> Events {
        let entries = seqs.iter().map(|seq| phase(*seq, Phase::Action)).collect();
        Events { subscription, entries, ..Events::default() }
    }

    /// What is in the inbox, each item as a word.
    fn words(inbox: &Inbox) -> Vec<&'static str> {
        let word = |item| match item {
            Item::Follow(..) => "follow",
            Item::Events(..) => "events",
            Item::Lost(_) => "lost",
            Item::Failed(..) => "failed",
            Item::NoMore => "no more",
        };
        std::iter::from_fn(|| inbox.take()).map(word).collect()
    }

    #[tokio::test]
    async fn a_subscription_made_at_an_old_owner_is_lost_at_once() {
        let (hub, _) = hub();
        let inbox = Inbox::new(ROOM);
        hub.register(&seat(1), &inbox).release(&inbox, follow());
        assert_eq!(words(&inbox), ["follow"]);
        hub.register(&seat(9), &inbox).release(&inbox, follow());
        assert_eq!(words(&inbox), ["follow", "lost"]);
        assert_eq!(hub.len(), 1);
    }

    #[tokio::test]
    async fn a_full_inbox_loses_the_whole_subscription_and_tells_its_owner() {
        let (hub, network) = hub();
        let inbox = Inbox::new(ROOM);
        let ticket = hub.register(&seat(1), &inbox);
        let number = ticket.number();
        ticket.release(&inbox, follow());
        let node = seat(1).node;
        hub.events(&node, sent(number, &[1, 2, 3]));
        hub.events(&node, sent(number, &[4]));
        hub.events(&node, sent(number, &[5]));
        assert_eq!(words(&inbox), ["follow", "events", "lost"]);
        assert!(network.casts().iter().all(|(_, cast)| cast.kind == proto::kind::UNSUBSCRIBE));
        assert_eq!((hub.len(), network.casts().len()), (0, 2));
    }

    #[tokio::test]
    async fn text_that_finds_no_room_costs_nobody_a_subscription() {
        let (hub, network) = hub();
        let inbox = Inbox::new(ROOM);
        let ticket = hub.register(&seat(1), &inbox);
        let (number, node) = (ticket.number(), seat(1).node);
        let say = |bytes: usize| {
            let said = says(0, 1, 0, &"x".repeat(bytes));
            hub.events(&node, Events { subscription: number, ..said });
        };
        // Before its follower is ready, too.
        for bytes in [900, 200, 50] {
            say(bytes);
        }
        ticket.release(&inbox, follow());
        say(100);
        assert_eq!(words(&inbox), ["follow", "events", "events"]);
        say(900);
        say(200);
        assert_eq!(words(&inbox), ["events"]);
        assert_eq!((hub.len(), network.casts().len()), (1, 0));
    }

    #[tokio::test]
    async fn another_node_cannot_speak_for_the_owner() {
        let (hub, network) = hub();
        let inbox = Inbox::new(ROOM);
        let ticket = hub.register(&seat(1), &inbox);
        let number = ticket.number();
        ticket.release(&inbox, follow());
        let forged = Events { subscription: number, entries: vec![last(1)], ..Events::default() };
        hub.events(&"node-2".parse().unwrap(), forged);
        assert_eq!(words(&inbox), ["follow"]);
        assert_eq!(network.casts().len(), 1);
    }
}
