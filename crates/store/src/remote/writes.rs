//! The stream of writes to a store: numbered requests out, answers in, in whatever order they come.
//!
//! A write that was handed to the stream and not answered when it broke is unknown; one that was not is not done.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::link::store_service_client::StoreServiceClient;
use proto::link::write_request::Write;
use proto::link::write_response::Outcome;
use proto::link::{WriteRequest, WriteResponse};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::{Error, metrics};

/// Requests between us and the transport.
const OUTBOUND_MAX: usize = 64;
/// A connection and the first answer on it.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

pub(super) struct Writes {
    queue: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
    timeout: Duration,
    next: AtomicU64,
}

struct Request {
    message: WriteRequest,
    waiting: Waiting,
}

/// Who waits for an answer. Holds its place among the writes in flight until the answer came or the stream broke.
struct Waiting {
    answer: oneshot::Sender<Result<Outcome, Error>>,
    _place: OwnedSemaphorePermit,
}

impl Waiting {
    /// Whoever waited may have given up.
    fn tell(self, result: Result<Outcome, Error>) {
        _ = self.answer.send(result);
    }
}

impl Writes {
    pub(super) fn spawn(
        client: StoreServiceClient<Channel>,
        timeout: Duration,
        in_flight_max: usize,
    ) -> Self {
        let in_flight_max = in_flight_max.max(1);
        let (queue, requests) = mpsc::channel(in_flight_max);
        tokio::spawn(run(client, requests));
        let room = Arc::new(Semaphore::new(in_flight_max));
        Self { queue, room, timeout, next: AtomicU64::new(1) }
    }

    pub(super) async fn send(&self, database: &str, write: Write) -> Result<Outcome, Error> {
        let full =
            || Error::Overloaded { what: "too many writes wait for their answers".to_owned() };
        let place = self.room.clone().try_acquire_owned().map_err(|_| full())?;
        let (answer, answered) = oneshot::channel();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let message = WriteRequest { id, database: database.to_owned(), write: Some(write) };
        let request = Request { message, waiting: Waiting { answer, _place: place } };
        self.queue.try_send(request).map_err(|_| full())?;
        match timeout(self.timeout, answered).await {
            Ok(Ok(Ok(Outcome::Failure(failure)))) => Err(Error::from_wire(failure)),
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::unknown(format!("the connection for {database} ended"))),
            Err(_) => {
                Err(Error::unknown(format!("no answer for {database} within {:?}", self.timeout)))
            }
        }
    }
}

async fn run(mut client: StoreServiceClient<Channel>, mut requests: mpsc::Receiver<Request>) {
    let mut backoff = BACKOFF_MIN;
    while let Some(first) = requests.recv().await {
        match open(&mut client).await {
            Ok(stream) => {
                metrics::RECONNECTS.inc();
                backoff = BACKOFF_MIN;
                stream.serve(first, &mut requests).await;
            }
            Err(error) => {
                let text = error.to_string();
                tracing::debug!(error = text, "cannot open the stream of writes");
                first.waiting.tell(Err(error));
                refuse_for(backoff.mul_f64(rand::random_range(0.5..1.5)), &text, &mut requests)
                    .await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
        }
    }
}

/// While nobody answers, a write fails at once: whoever sends it decides whether it waits.
async fn refuse_for(pause: Duration, why: &str, requests: &mut mpsc::Receiver<Request>) {
    let refuse = async {
        while let Some(request) = requests.recv().await {
            request.waiting.tell(Err(Error::unavailable(why)));
        }
    };
    tokio::select! {
        () = sleep(pause) => {}
        () = refuse => {}
    }
}

async fn open(client: &mut StoreServiceClient<Channel>) -> Result<Stream, Error> {
    let (outbound, requests) = mpsc::channel(OUTBOUND_MAX);
    let opening = client.write(ReceiverStream::new(requests));
    match timeout(OPEN_TIMEOUT, opening).await {
        Ok(Ok(response)) => {
            Ok(Stream { outbound, inbound: response.into_inner(), waiting: HashMap::new() })
        }
        Ok(Err(status)) => Err(Error::of_status(status)),
        Err(_) => Err(Error::unavailable(format!("no connection within {OPEN_TIMEOUT:?}"))),
    }
}

struct Stream {
    outbound: mpsc::Sender<WriteRequest>,
    inbound: Streaming<WriteResponse>,
    waiting: HashMap<u64, Waiting>,
}

impl Stream {
    /// Until the stream breaks or nobody can ask any more.
    async fn serve(mut self, first: Request, requests: &mut mpsc::Receiver<Request>) {
        let outbound = self.outbound.clone();
        if let Ok(slot) = outbound.try_reserve() {
            self.hand_over(slot, first);
        }
        loop {
            let next = async {
                let slot = outbound.reserve().await.ok()?;
                Some((slot, requests.recv().await?))
            };
            tokio::select! {
                answer = self.inbound.message() => match answer {
                    Ok(Some(answer)) => self.answer(answer),
                    Ok(None) => return self.end("it ended the stream"),
                    Err(status) => return self.end(status.message()),
                },
                next = next => match next {
                    Some((slot, request)) => self.hand_over(slot, request),
                    None => return self.drain().await,
                },
            }
        }
    }

    fn hand_over(&mut self, slot: mpsc::Permit<'_, WriteRequest>, request: Request) {
        self.waiting.insert(request.message.id, request.waiting);
        slot.send(request.message);
    }

    fn answer(&mut self, answer: WriteResponse) {
        let Some(waiting) = self.waiting.remove(&answer.id) else { return };
        let outcome =
            answer.outcome.ok_or_else(|| Error::unknown("its answer is of an unknown kind"));
        waiting.tell(outcome);
    }

    fn end(self, why: &str) {
        for (_, waiting) in self.waiting {
            waiting.tell(Err(Error::unknown(format!("the connection broke: {why}"))));
        }
    }

    /// The store was dropped here; whoever still waits gets its answer.
    async fn drain(mut self) {
        while !self.waiting.is_empty() {
            match self.inbound.message().await {
                Ok(Some(answer)) => self.answer(answer),
                Ok(None) | Err(_) => return self.end("it ended the stream"),
            }
        }
    }
}
