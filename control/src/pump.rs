//! Carries events from an inbox to one client, as fast as the client reads, and subscribes anew when a subscription is
//! lost. One task a stream, however many works it follows.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use domain::{ErrorKind, Reason};
use proto::status::Failure;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::Status;

use crate::desk::Desk;
use crate::follow::{Follow, Next, Told};
use crate::hub::{Inbox, Item};
use crate::{deadline, refusal, router};

/// Subscriptions that one stream asks for at once, after their owner has died: three quarters of what may be on its way to one
/// node, so that submits find room beside them.
const AGAIN_MAX: usize = 768;
/// Before a lost subscription is asked for again: an owner that ends each at once must not keep us busy.
const PAUSE: Duration = Duration::from_millis(20);

/// What a stream of the API carries.
pub(crate) trait Outlet: Send + 'static {
    type Response: Send;
    fn event(tag: i64, told: Told) -> Self::Response;
    /// A work that cannot be followed any more: a response, or the end of the stream.
    fn failed(tag: i64, failure: Failure) -> Result<Self::Response, Status>;
}

pub(crate) type Out<T> = mpsc::Sender<Result<T, Status>>;

pub(crate) struct Pump<O: Outlet> {
    desk: Desk,
    inbox: Arc<Inbox>,
    out: Out<O::Response>,
    follows: HashMap<u64, Follow>,
    /// Subscriptions that are being asked for again.
    again: JoinSet<()>,
    again_slots: Arc<Semaphore>,
    /// Nothing new is asked for on this stream.
    no_more: bool,
    outlet: PhantomData<fn() -> O>,
}

/// The client is gone.
struct Gone;

impl<O: Outlet> Pump<O> {
    pub(crate) fn new(desk: Desk, inbox: Arc<Inbox>, out: Out<O::Response>) -> Self {
        Self {
            desk,
            inbox,
            out,
            follows: HashMap::new(),
            again: JoinSet::new(),
            again_slots: Arc::new(Semaphore::new(AGAIN_MAX)),
            no_more: false,
            outlet: PhantomData,
        }
    }

    /// Until everything that was asked for is told, or the client goes, or the server.
    pub(crate) async fn run(mut self) {
        while !self.is_done() {
            let Self { desk, inbox, out, again, .. } = &mut self;
            let item = tokio::select! {
                biased;
                () = desk.stop.cancelled() => {
                    // Whoever does not read is not waited for.
                    let _ = out.try_send(Err(router::shutting_down().into()));
                    return;
                }
                item = inbox.next() => item,
                Some(_) = again.join_next() => continue,
                () = out.closed() => return,
            };
            if self.take(item).await.is_err() {
                return;
            }
        }
    }

    fn is_done(&self) -> bool {
        // A task that subscribes puts its work into the inbox before it ends, so the inbox is looked at last.
        self.no_more && self.follows.is_empty() && self.again.is_empty() && self.inbox.is_empty()
    }

    async fn take(&mut self, item: Item) -> Result<(), Gone> {
        match item {
            Item::Follow(number, follow) => {
                self.follows.insert(number, follow);
                Ok(())
            }
            Item::Events(number, events) => {
                let Some(follow) = self.follows.get_mut(&number) else { return Ok(()) };
                let (tag, work, mut out) = (follow.tag, follow.work, Vec::new());
                let next = follow.read(*events, &mut out);
                for told in out {
                    if let Some(position) = told.position {
                        self.desk.shown(work, position);
                    }
                    self.send(Ok(O::event(tag, told))).await?;
                }
                match next {
                    Ok(Next::More) => Ok(()),
                    Ok(Next::End) => {
                        self.follows.remove(&number);
                        self.desk.hub.ended(number);
                        Ok(())
                    }
                    Ok(Next::Again) => {
                        self.desk.hub.ended(number);
                        self.lost(number);
                        Ok(())
                    }
                    Err(error) => {
                        self.follows.remove(&number);
                        self.desk.hub.end(number);
                        self.send(O::failed(tag, refusal::unreadable("an entry", &error))).await
                    }
                }
            }
            Item::Lost(number) => {
                self.lost(number);
                Ok(())
            }
            Item::Failed(tag, failure) => self.send(O::failed(tag, failure)).await,
            Item::NoMore => {
                self.no_more = true;
                Ok(())
            }
        }
    }

    fn lost(&mut self, number: u64) {
        if let Some(follow) = self.follows.remove(&number) {
            let (desk, inbox, slots) =
                (self.desk.clone(), self.inbox.clone(), self.again_slots.clone());
            self.again.spawn(follow_again(desk, inbox, follow, slots));
        }
    }

    /// Whoever does not read is waited for until the server stops.
    async fn send(&self, response: Result<O::Response, Status>) -> Result<(), Gone> {
        tokio::select! {
            biased;
            sent = self.out.send(response) => sent.map_err(|_| Gone),
            () = self.desk.stop.cancelled() => Err(Gone),
        }
    }
}

impl<O: Outlet> Drop for Pump<O> {
    fn drop(&mut self) {
        for number in self.follows.keys() {
            self.desk.hub.end(*number);
        }
    }
}

/// Does not give up while the client is there and its work may be found: slower, never lost. Where only this server does
/// not reach the owner, the client is told, and may go on at another.
async fn follow_again(desk: Desk, inbox: Arc<Inbox>, follow: Follow, slots: Arc<Semaphore>) {
    let Ok(_slot) = slots.acquire().await else { return };
    let mut pause = PAUSE;
    loop {
        sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        match desk.subscribe(&inbox, &follow, deadline::by_default()).await {
            Ok(ticket) => return ticket.release(&inbox, follow),
            Err(failure) if failure.reason == Reason::OwnerUnreached => {
                return inbox.push(Item::Failed(follow.tag, failure));
            }
            Err(failure) if failure.kind.is_retryable() || failure.kind == ErrorKind::Deadline => {
                pause = failure.retry_after.unwrap_or(pause);
            }
            Err(failure) => return inbox.push(Item::Failed(follow.tag, failure)),
        }
    }
}
