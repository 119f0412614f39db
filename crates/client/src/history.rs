//! The journal of one agent as one stream, over however many connections.

use proto::v1::agent_service_client::AgentServiceClient;
use proto::v1::{HistoryEntry, HistoryRequest, HistoryResponse};
use tonic::Streaming;

use crate::call::Limit;
use crate::pool::Link;
use crate::retry::Patience;
use crate::{Client, Error, MESSAGE_BYTES_MAX};

/// A history that is being read, newest entry first.
pub struct History {
    client: Client,
    id: String,
    /// How many entries are still wanted.
    left: Option<u32>,
    /// The sequence number of the last entry that was returned. What a new stream tells from there up is known.
    last: Option<i64>,
    stream: Option<(Streaming<HistoryResponse>, Link)>,
    patience: Patience,
    ended: bool,
}

impl History {
    pub(crate) fn new(client: Client, id: &str, limit: u32) -> Self {
        let patience = Patience::new(&client.timeouts);
        let left = (0 < limit).then_some(limit);
        Self { client, id: id.to_owned(), left, last: None, stream: None, patience, ended: false }
    }

    /// The next entry; none after the oldest, and none after an error.
    pub async fn next(&mut self) -> Option<Result<HistoryEntry, Error>> {
        if self.ended || self.left == Some(0) {
            return None;
        }
        loop {
            let error = match Box::pin(self.step()).await {
                Ok(Some(entry)) => return Some(Ok(self.saw(entry))),
                Ok(None) => {
                    self.ended = true;
                    return None;
                }
                Err(error) => error,
            };
            if let Err(error) = self.client.pause(&mut self.patience, "History", error).await {
                self.ended = true;
                return Some(Err(error));
            }
        }
    }

    fn saw(&mut self, entry: HistoryEntry) -> HistoryEntry {
        self.patience.restart();
        self.left = self.left.map(|left| left.saturating_sub(1));
        self.last = Some(entry.seq);
        self.ended = entry.truncated;
        entry
    }

    async fn step(&mut self) -> Result<Option<HistoryEntry>, Error> {
        if self.stream.is_none() {
            self.stream = Some(self.begin().await?);
        }
        let (stream, link) = self.stream.as_mut().expect("was just put there");
        loop {
            match stream.message().await {
                Ok(Some(HistoryResponse { entry: Some(entry) })) => {
                    if self.last.is_none_or(|last| entry.seq < last) {
                        return Ok(Some(entry));
                    }
                }
                Ok(Some(HistoryResponse { entry: None })) => {
                    return Err(Error::Answer { what: "entry" });
                }
                Ok(None) => return Ok(None),
                Err(status) => {
                    let link = link.clone();
                    self.stream = None;
                    return Err(self.client.failed(&link, status));
                }
            }
        }
    }

    async fn begin(&self) -> Result<(Streaming<HistoryResponse>, Link), Error> {
        // A second stream begins at the newest entry again, so only the first can be limited by the server.
        let limit = self.left.filter(|_| self.last.is_none()).unwrap_or(0);
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let request = HistoryRequest { id: self.id.clone(), limit };
        let deadline = self.patience.deadline();
        let begin = async |channel, request| {
            let agents = AgentServiceClient::new(channel);
            let mut agents = agents.max_decoding_message_size(MESSAGE_BYTES_MAX);
            self.client.shows(&self.id, agents.history(request).await?)
        };
        self.client.attempt(request, deadline, Limit::Begin, &begin).await
    }
}

impl std::fmt::Debug for History {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "History({})", self.id)
    }
}
