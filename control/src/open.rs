//! The cheap way in: many submits, cancels and watches on one stream, each answered under the caller's tag.
//!
//! Per agent one submit is under way at a time, so that the order holds over every retry. At most so many requests are
//! unanswered; then the stream is not read.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain::{AgentId, Position};
use proto::link::WatchMode;
use proto::status::Failure;
use proto::v1::{
    CancelRequest, OpenRequest, OpenResponse, OpenSubmit, OpenWatch, WatchRequest, Work,
    open_request, open_response,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;
use tracing::Instrument;

use crate::desk::{Desk, Wanted};
use crate::follow::{Follow, Told};
use crate::hub::{Inbox, Item, Room};
use crate::pump::{Out, Outlet, Pump};
use crate::{api, deadline, edge, refusal};

const UNANSWERED_MAX: usize = 1_024;
/// Works that one stream follows at once.
const FOLLOWS_MAX: usize = 16_384;
const ROOM: Room = Room { events: 16_384, bytes: 8 << 20 };
const RESPONSES_MAX: usize = 256;

pub(crate) type OpenStream = ReceiverStream<Result<OpenResponse, Status>>;

struct Open;

impl Outlet for Open {
    type Response = OpenResponse;

    fn event(tag: i64, Told { event, position }: Told) -> OpenResponse {
        let response = Some(open_response::Response::Event(event));
        OpenResponse { tag, response, position: api::text(position) }
    }

    fn failed(tag: i64, failure: Failure) -> Result<OpenResponse, Status> {
        Ok(refused(tag, failure))
    }
}

fn refused(tag: i64, failure: Failure) -> OpenResponse {
    let response = Some(open_response::Response::Refused(failure.into()));
    OpenResponse { tag, response, position: String::new() }
}

/// Serves one stream until the client has said all and was told all, or goes.
pub(crate) fn open<S>(desk: Desk, requests: S, traceparent: Option<String>) -> OpenStream
where
    S: Stream<Item = Result<OpenRequest, Status>> + Send + Unpin + 'static,
{
    let (out, responses) = mpsc::channel(RESPONSES_MAX);
    let inbox = Inbox::new(ROOM);
    let pump = Pump::<Open>::new(desk.clone(), inbox.clone(), out.clone());
    let session = Arc::new(Session { desk, inbox, out, traceparent, lanes: Mutex::default() });
    let reader = async move {
        session.read(requests).await;
        // The pump knows when all is told.
        std::future::pending::<()>().await;
    };
    tokio::spawn(async move {
        tokio::select! {
            () = pump.run() => {}
            () = reader => {}
        }
    });
    ReceiverStream::new(responses)
}

/// A submit that waits for its turn.
struct Waiting {
    tag: i64,
    submit: edge::Submit,
    watch: Option<(WatchMode, OwnedSemaphorePermit)>,
    unanswered: OwnedSemaphorePermit,
}

/// Submits by agent, behind the one that is under way. No entry: none is.
type Lanes = HashMap<AgentId, VecDeque<Waiting>>;

struct Session {
    desk: Desk,
    inbox: Arc<Inbox>,
    out: Out<OpenResponse>,
    traceparent: Option<String>,
    lanes: Mutex<Lanes>,
}

/// The client is gone.
struct Gone;

impl Session {
    async fn read<S>(self: Arc<Self>, mut requests: S)
    where
        S: Stream<Item = Result<OpenRequest, Status>> + Send + Unpin,
    {
        let unanswered = Arc::new(Semaphore::new(UNANSWERED_MAX));
        let follows = Arc::new(Semaphore::new(FOLLOWS_MAX));
        let mut tasks = JoinSet::new();
        let mut broken = None;
        while let Some(request) = requests.next().await {
            // One that cannot be read has no tag, so the stream ends with it; a stream that broke has no more requests either. What
            // was asked for is answered if it still can be.
            let request = match request {
                Ok(request) => request,
                Err(status) => {
                    broken = Some(refusal::unread(status));
                    break;
                }
            };
            while tasks.try_join_next().is_some() {}
            let Ok(permit) = unanswered.clone().acquire_owned().await else { break };
            let tag = request.tag;
            let handled = match request.request {
                Some(open_request::Request::Submit(submit)) => {
                    self.submit(tag, submit, permit, &follows, &mut tasks).await
                }
                Some(open_request::Request::Cancel(cancel)) => {
                    tasks.spawn(self.clone().cancel(tag, cancel, permit));
                    Ok(())
                }
                Some(open_request::Request::Watch(watch)) => {
                    let Ok(place) = follows.clone().acquire_owned().await else { break };
                    tasks.spawn(self.clone().watch(tag, watch, place, permit));
                    Ok(())
                }
                None => {
                    let text = "the request is empty: submit, cancel or watch is allowed";
                    self.refuse(tag, Failure::invalid("request", text)).await
                }
            };
            if handled.is_err() {
                return;
            }
        }
        while tasks.join_next().await.is_some() {}
        match broken {
            // The client is told, or it would send the same again.
            Some(status) => _ = self.out.send(Err(status)).await,
            None => self.inbox.push(Item::NoMore),
        }
    }

    /// Queues a submit behind the others of its agent.
    async fn submit(
        self: &Arc<Self>,
        tag: i64,
        request: OpenSubmit,
        unanswered: OwnedSemaphorePermit,
        follows: &Arc<Semaphore>,
        tasks: &mut JoinSet<()>,
    ) -> Result<(), Gone> {
        let (submit, mode) = match checked(request) {
            Ok(checked) => checked,
            Err(failure) => return self.refuse(tag, failure).await,
        };
        let watch = match mode {
            Some(mode) => {
                let place = follows.clone().acquire_owned().await.map_err(|_| Gone)?;
                Some((mode, place))
            }
            None => None,
        };
        let agent = submit.agent.clone();
        let waiting = Waiting { tag, submit, watch, unanswered };
        if let Some(lane) = self.lanes().get_mut(&agent) {
            lane.push_back(waiting);
            return Ok(());
        }
        self.lanes().insert(agent.clone(), VecDeque::new());
        tasks.spawn(self.clone().drive(agent, waiting));
        Ok(())
    }

    /// One submit of an agent after the other.
    async fn drive(self: Arc<Self>, agent: AgentId, first: Waiting) {
        let mut next = Some(first);
        while let Some(waiting) = next {
            if self.carry(waiting).await.is_err() {
                return;
            }
            let mut lanes = self.lanes();
            next = lanes.get_mut(&agent).and_then(VecDeque::pop_front);
            if next.is_none() {
                lanes.remove(&agent);
            }
        }
    }

    async fn carry(&self, waiting: Waiting) -> Result<(), Gone> {
        let Waiting { tag, submit, watch, unanswered } = waiting;
        let span = api::submit_span(&submit.agent, self.traceparent.as_deref());
        let traceparent = span.in_scope(telemetry::current_traceparent);
        let wanted = watch.as_ref().map(|(mode, _)| Wanted { mode: *mode, inbox: &self.inbox });
        let submitted = self.desk.submit(submit, wanted, traceparent, deadline::by_default());
        let submitted = match submitted.instrument(span).await {
            Ok(submitted) => submitted,
            Err(failure) => return self.refuse(tag, failure).await,
        };
        self.accepted(tag, submitted.work, submitted.position).await?;
        drop(unanswered);
        if let (Some((mode, place)), Some(ticket)) = (watch, submitted.ticket) {
            let follow = Follow::new(tag, submitted.id, mode).with_place(place);
            ticket.release(&self.inbox, follow);
        }
        Ok(())
    }

    async fn cancel(
        self: Arc<Self>,
        tag: i64,
        request: CancelRequest,
        _unanswered: OwnedSemaphorePermit,
    ) {
        // Whoever is gone does not want to know.
        let _ = match api::work::cancel(&self.desk, &request, deadline::by_default()).await {
            Ok((work, position)) => self.accepted(tag, work, position).await,
            Err(failure) => self.refuse(tag, failure).await,
        };
    }

    async fn watch(
        self: Arc<Self>,
        tag: i64,
        request: WatchRequest,
        place: OwnedSemaphorePermit,
        _unanswered: OwnedSemaphorePermit,
    ) {
        let cursor = match edge::watch(&request) {
            Ok(cursor) => cursor,
            Err(failure) => {
                let _ = self.refuse(tag, failure).await;
                return;
            }
        };
        let follow = Follow::after(tag, cursor).with_place(place);
        match self.desk.subscribe(&self.inbox, &follow, deadline::by_default()).await {
            Ok(ticket) => ticket.release(&self.inbox, follow),
            Err(failure) => _ = self.refuse(tag, failure).await,
        }
    }

    async fn refuse(&self, tag: i64, failure: Failure) -> Result<(), Gone> {
        self.out.send(Ok(refused(tag, failure))).await.map_err(|_| Gone)
    }

    async fn accepted(&self, tag: i64, work: Work, position: Position) -> Result<(), Gone> {
        let response = Some(open_response::Response::Accepted(work));
        let response = OpenResponse { tag, response, position: position.to_string() };
        self.out.send(Ok(response)).await.map_err(|_| Gone)
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn checked(request: OpenSubmit) -> Result<(edge::Submit, Option<WatchMode>), Failure> {
    let mode = match OpenWatch::try_from(request.watch) {
        Ok(OpenWatch::Unspecified | OpenWatch::None) => None,
        Ok(OpenWatch::End) => Some(WatchMode::End),
        Ok(OpenWatch::All) => Some(WatchMode::All),
        Err(_) => {
            let text = format!("watch {} is not known: none, end or all is allowed", request.watch);
            return Err(Failure::invalid("submit.watch", text));
        }
    };
    let submit = request.submit;
    let submit = submit.ok_or_else(|| Failure::invalid("submit.submit", "the submit is empty"))?;
    Ok((edge::submit(submit)?, mode))
}

#[cfg(test)]
#[path = "open_tests.rs"]
mod tests;
