//! Many submits, cancels and watches on one stream, which outlives the connections that carry it.
//!
//! One task owns the stream. It takes a request only when the last ones are on their way, and reads a response only
//! when the caller has room for it: nothing is queued without bound, and a caller that stops reading stops the server.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::v1::work_service_client::WorkServiceClient;
use proto::v1::{OpenRequest, OpenResponse, OpenWatch, SubmitRequest, open_response};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};
use tracing::Instrument;

use crate::call::Limit;
use crate::later::Later;
use crate::ledger::{Heard, Ledger};
use crate::pool::Link;
use crate::retry::Patience;
use crate::{Client, Error, MESSAGE_BYTES_MAX, check_input, with_key};

/// The server takes no more than this from one stream.
const UNANSWERED_MAX: usize = 1024;
const QUEUE_LEN: usize = 256;

/// An open stream: requests in through [`OpenSender`], responses out of [`Open::next`]. Read while you send: unread
/// responses stop the stream, and with it the sending. Drop it to end it.
#[derive(Debug)]
pub struct Open {
    sender: OpenSender,
    responses: mpsc::Receiver<Result<OpenResponse, Error>>,
}

/// The sending half. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OpenSender {
    asks: mpsc::Sender<Ask>,
    unanswered: Arc<Semaphore>,
}

/// A request on its way to the task; the caller learns whether it was taken.
#[derive(Debug)]
struct Ask {
    tag: i64,
    what: What,
    taken: oneshot::Sender<Result<(), Error>>,
}

#[derive(Debug)]
enum What {
    Submit(SubmitRequest, OpenWatch, OwnedSemaphorePermit),
    Cancel(String),
    Watch(String, String),
}

impl Open {
    pub(crate) fn start(client: Client) -> Self {
        let (asks_in, asks) = mpsc::channel(QUEUE_LEN);
        let (responses_in, responses) = mpsc::channel(QUEUE_LEN);
        let unanswered = Arc::new(Semaphore::new(UNANSWERED_MAX));
        let patience = Patience::new(&client.timeouts);
        let later = Later::new(&client.timeouts);
        let driver = Driver {
            client,
            asks,
            responses: responses_in,
            ledger: Ledger::new(),
            later,
            backlog: VecDeque::new(),
            patience,
            asking: true,
        };
        // The stream belongs to the trace of whoever opens it.
        tokio::spawn(driver.run().in_current_span());
        Self { sender: OpenSender { asks: asks_in, unanswered }, responses }
    }

    /// A sending half for another task.
    pub fn sender(&self) -> OpenSender {
        self.sender.clone()
    }

    /// The two halves. The stream ends by itself once every sender is dropped and every request is done.
    pub fn split(self) -> (OpenSender, OpenReceiver) {
        (self.sender, OpenReceiver { responses: self.responses })
    }

    /// The next response; after an error, which is the last, there are none.
    pub async fn next(&mut self) -> Option<Result<OpenResponse, Error>> {
        self.responses.recv().await
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct OpenReceiver {
    responses: mpsc::Receiver<Result<OpenResponse, Error>>,
}

impl OpenReceiver {
    /// See [`Open::next`].
    pub async fn next(&mut self) -> Option<Result<OpenResponse, Error>> {
        self.responses.recv().await
    }
}

impl OpenSender {
    /// Submits a work. Waits while 1,024 submits are unanswered. Without an idempotency key it gets one, so that it can
    /// be repeated after a broken connection.
    ///
    /// # Errors
    /// Its input is too large for the API, or the stream has ended.
    pub async fn submit(
        &self,
        tag: i64,
        mut request: SubmitRequest,
        watch: OpenWatch,
    ) -> Result<(), Error> {
        check_input(&request)?;
        with_key(&mut request);
        let permit = self.unanswered.clone().acquire_owned().await.map_err(|_| Error::Ended)?;
        self.ask(tag, What::Submit(request, watch, permit)).await
    }

    /// Asks for a work to be cancelled; answered by `accepted` with the work as it is then.
    pub async fn cancel(&self, tag: i64, id: &str) -> Result<(), Error> {
        self.ask(tag, What::Cancel(id.to_owned())).await
    }

    /// Follows a work after `cursor`.
    pub async fn watch(&self, tag: i64, id: &str, cursor: &str) -> Result<(), Error> {
        self.ask(tag, What::Watch(id.to_owned(), cursor.to_owned())).await
    }

    async fn ask(&self, tag: i64, what: What) -> Result<(), Error> {
        let (taken, answer) = oneshot::channel();
        self.asks.send(Ask { tag, what, taken }).await.map_err(|_| Error::Ended)?;
        answer.await.map_err(|_| Error::Ended)?
    }
}

/// The task behind an open stream.
struct Driver {
    client: Client,
    asks: mpsc::Receiver<Ask>,
    responses: mpsc::Sender<Result<OpenResponse, Error>>,
    ledger: Ledger<OwnedSemaphorePermit>,
    later: Later,
    /// Requests that the connection has not taken yet.
    backlog: VecDeque<OpenRequest>,
    patience: Patience,
    /// Whether somebody may still ask.
    asking: bool,
}

/// One connection's part of the stream.
struct Lane {
    requests: mpsc::Sender<OpenRequest>,
    stream: Streaming<OpenResponse>,
    link: Link,
    since: Instant,
}

/// How a lane ended.
enum End {
    /// All is done, or nobody listens.
    Done,
    Broken(Error),
}

impl Driver {
    async fn run(mut self) {
        loop {
            let error = match Box::pin(self.round()).await {
                End::Done => return,
                End::Broken(error) => error,
            };
            let pause = self.client.pause(&mut self.patience, "Open", error);
            let pause = async { Box::pin(pause).await };
            let failed = tokio::select! {
                failed = pause => failed,
                () = self.responses.closed() => return,
            };
            if let Err(error) = failed {
                // Whoever is gone does not want to know.
                let _ = self.responses.send(Err(error)).await;
                return;
            }
        }
    }

    async fn round(&mut self) -> End {
        self.backlog = self.ledger.again().into();
        self.later.reconnected();
        let begun = tokio::select! {
            begun = Self::begin(&self.client, &self.patience, &mut self.backlog) => begun,
            () = self.responses.closed() => return End::Done,
        };
        match begun {
            Ok(lane) => self.drive(lane).await,
            Err(error) => End::Broken(error),
        }
    }

    async fn begin(
        client: &Client,
        patience: &Patience,
        backlog: &mut VecDeque<OpenRequest>,
    ) -> Result<Lane, Error> {
        let (requests, taken) = mpsc::channel(QUEUE_LEN);
        // The server may want to see a request before it answers.
        while let Some(request) = backlog.pop_front() {
            if let Err(error) = requests.try_send(request) {
                backlog.push_front(error.into_inner());
                break;
            }
        }
        // The stream goes into the one attempt that there is.
        let taken = Mutex::new(Some(ReceiverStream::new(taken)));
        let open = |channel, request: Request<()>| {
            let taken = take(&taken);
            async move {
                let taken = taken.ok_or_else(|| Status::internal("begun twice"))?;
                let request = request.map(|()| taken);
                let service = WorkServiceClient::new(channel);
                service.max_decoding_message_size(MESSAGE_BYTES_MAX).open(request).await
            }
        };
        let begin = client.attempt((), patience.deadline(), Limit::Begin, &open);
        let (stream, link) = Box::pin(begin).await?;
        Ok(Lane { requests, stream, link, since: Instant::now() })
    }

    async fn drive(&mut self, mut lane: Lane) -> End {
        let responses = self.responses.clone();
        loop {
            if !self.asking && self.ledger.is_empty() {
                return End::Done;
            }
            let has_backlog = !self.backlog.is_empty();
            tokio::select! {
                ask = self.asks.recv(), if !has_backlog && self.asking => match ask {
                    Some(ask) => self.take(ask),
                    None => self.asking = false,
                },
                place = lane.requests.reserve(), if has_backlog => {
                    // A closed lane shows in its stream, with a reason.
                    if let (Ok(place), Some(request)) = (place, self.backlog.pop_front()) {
                        place.send(request);
                    }
                }
                due = self.later.next() => {
                    self.later.take(due);
                    self.backlog.extend(self.ledger.repeat(due.1));
                }
                heard = receive(&responses, &mut lane.stream) => {
                    if let Some(end) = self.hear(heard, &lane) {
                        return end;
                    }
                    self.backlog.extend(self.ledger.freed());
                }
            }
        }
    }

    fn take(&mut self, ask: Ask) {
        let Ask { tag, what, taken } = ask;
        let request = match what {
            What::Submit(request, watch, permit) => {
                let limit = request.timeout.and_then(|limit| Duration::try_from(limit).ok());
                let begun = self.ledger.submit(tag, request, watch, permit);
                begun.inspect(|_| self.later.begin(tag, limit))
            }
            What::Cancel(id) => self.ledger.cancel(tag, id).map(Some),
            What::Watch(id, cursor) => self.ledger.watch(tag, id, cursor).map(Some),
        };
        let answer = request.map(|request| self.backlog.extend(request));
        // A caller that did not wait for the answer has its request all the same.
        let _ = taken.send(answer);
    }

    fn hear(&mut self, heard: Received<'_>, lane: &Lane) -> Option<End> {
        let Some((place, message)) = heard else { return Some(End::Done) };
        let status = match message {
            Ok(Some(response)) => {
                self.patience.restart();
                self.client.heard(&response);
                match self.ledger.hear(&response) {
                    Heard::Pass => {
                        self.later.end(response.tag);
                        place.send(Ok(response));
                        return None;
                    }
                    Heard::Later => {
                        if !self.postpone(&response) {
                            place.send(Ok(response));
                        }
                        return None;
                    }
                    Heard::Nothing => {
                        self.later.end(response.tag);
                        return None;
                    }
                    Heard::Elsewhere => {
                        let is_over =
                            !self.ledger.follows(response.tag) && !self.postpone(&response);
                        if is_over {
                            place.send(Ok(response));
                            return None;
                        }
                        Status::unavailable("the API server does not reach a node")
                    }
                    Heard::Leave => Status::unavailable("the API server is shutting down"),
                }
            }
            Ok(None) => Status::unavailable("the API server ended the stream"),
            Err(status) => status,
        };
        self.patience.lasted(lane.since);
        Some(End::Broken(self.client.failed(&lane.link, status)))
    }
}

impl Driver {
    /// Whether a refused request is sent again; else its refusal is for the caller.
    fn postpone(&mut self, response: &OpenResponse) -> bool {
        let Some(open_response::Response::Refused(refused)) = &response.response else {
            return false;
        };
        let tag = response.tag;
        let error = Error::of_refused(refused.clone());
        let text = error.to_string();
        match self.later.postpone(tag, error) {
            Ok(()) => {
                tracing::debug!(method = "Open", error = text, "trying again");
                true
            }
            Err(_) => {
                self.later.end(tag);
                self.ledger.give_up(tag);
                false
            }
        }
    }
}

fn take<T>(once: &Mutex<Option<T>>) -> Option<T> {
    once.lock().ok()?.take()
}

type Answer = Result<OpenResponse, Error>;

/// What the stream said, and the place for it at the caller; nothing if the caller has dropped its half.
type Received<'a> = Option<(mpsc::Permit<'a, Answer>, Result<Option<OpenResponse>, Status>)>;

/// Waits for room at the caller first, so that a response that was read is never without a place. Loses nothing when
/// it is dropped.
async fn receive<'a>(
    responses: &'a mpsc::Sender<Answer>,
    stream: &mut Streaming<OpenResponse>,
) -> Received<'a> {
    let place = responses.reserve().await.ok()?;
    tokio::select! {
        message = stream.message() => Some((place, message)),
        () = responses.closed() => None,
    }
}
