//! The events of one work as one stream, over however many connections.

use proto::v1::work_service_client::WorkServiceClient;
use proto::v1::{WatchRequest, WatchResponse, WorkEvent, WorkState, work_event};
use tokio::time::Instant;
use tonic::{Status, Streaming};

use crate::call::Limit;
use crate::pool::Link;
use crate::retry::Patience;
use crate::{Client, Error, MESSAGE_BYTES_MAX};

/// A running watch. Drop it to end it.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    request: WatchRequest,
    stream: Option<Connected>,
    patience: Patience,
    /// There was a stream: a server that does not reach the owner is then left for another, however often.
    has_begun: bool,
    /// The cluster said that the work has ended, though no result came: there may be nothing after the cursor.
    is_over: bool,
    ended: bool,
}

struct Connected {
    stream: Streaming<WatchResponse>,
    link: Link,
    since: Instant,
    is_empty: bool,
}

impl Watch {
    pub(crate) fn new(client: Client, id: &str, cursor: &str) -> Self {
        let patience = Patience::new(&client.timeouts);
        let request = WatchRequest { id: id.to_owned(), cursor: cursor.to_owned() };
        Self {
            client,
            request,
            stream: None,
            patience,
            has_begun: false,
            is_over: false,
            ended: false,
        }
    }

    /// The next event; none after the last, which carries the result, and none after an error. None at all, if the
    /// watch began at the cursor of the last. Each event comes once,
    /// also over a broken connection: the stream is taken up at the last cursor, at another address if need be.
    pub async fn next(&mut self) -> Option<Result<WorkEvent, Error>> {
        if self.ended {
            return None;
        }
        loop {
            let error = match Box::pin(self.step()).await {
                Ok(Some(event)) => return Some(Ok(self.saw(event))),
                Ok(None) => {
                    self.ended = true;
                    return None;
                }
                Err(error) => error,
            };
            if self.has_begun && error.is_owner_unreached() {
                self.patience.restart();
            }
            if let Err(error) = self.client.pause(&mut self.patience, "Watch", error).await {
                self.ended = true;
                return Some(Err(error));
            }
        }
    }

    /// The bookmark after the last event that was returned.
    pub fn cursor(&self) -> &str {
        &self.request.cursor
    }

    fn saw(&mut self, event: WorkEvent) -> WorkEvent {
        self.patience.restart();
        self.request.cursor.clone_from(&event.cursor);
        self.ended = matches!(event.event, Some(work_event::Event::Result(_)));
        event
    }

    async fn step(&mut self) -> Result<Option<WorkEvent>, Error> {
        if self.stream.is_none() {
            self.stream = Some(self.begin().await?);
            self.has_begun = true;
        }
        let connected = self.stream.as_mut().expect("was just put there");
        let status = match connected.stream.message().await {
            Ok(Some(WatchResponse { event: Some(event), position })) => {
                connected.is_empty = false;
                // An entry is what happened, however late it is told.
                self.client.shown(&self.request.id, &position);
                return Ok(Some(event));
            }
            Ok(Some(WatchResponse { event: None, .. })) => {
                return Err(Error::Answer { what: "event" });
            }
            Ok(None) if connected.is_empty && !self.request.cursor.is_empty() => {
                if self.is_over {
                    return Ok(None);
                }
                // A stream that begins after this one holds the result, if it is after the cursor.
                self.is_over = has_ended(self.client.get(&self.request.id).await?.state());
                Status::unavailable("the stream ended without an event")
            }
            Ok(None) => Status::unavailable("the stream ended before the work did"),
            Err(status) => status,
        };
        let Some(connected) = self.stream.take() else { return Ok(None) };
        self.patience.lasted(connected.since);
        let link = connected.link;
        Err(self.client.failed(&link, status))
    }

    async fn begin(&self) -> Result<Connected, Error> {
        let deadline = self.patience.deadline();
        let begin = self.client.attempt(
            self.request.clone(),
            deadline,
            Limit::Begin,
            &|channel, request| async move {
                let service = WorkServiceClient::new(channel);
                service.max_decoding_message_size(MESSAGE_BYTES_MAX).watch(request).await
            },
        );
        let (stream, link) = begin.await?;
        Ok(Connected { stream, link, since: Instant::now(), is_empty: true })
    }
}

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connected")
    }
}

fn has_ended(state: WorkState) -> bool {
    match state {
        WorkState::Succeeded
        | WorkState::Failed
        | WorkState::Cancelled
        | WorkState::DeadLettered => true,
        WorkState::Unspecified
        | WorkState::Accepted
        | WorkState::Running
        | WorkState::Waiting
        | WorkState::InDoubt
        | WorkState::Cancelling => false,
    }
}
