//! A typed client of the gRPC API: several addresses tried in turn, calls repeated while that is safe, streams resumed
//! where they broke.
//!
//! Every call of the API may be repeated without harm, because a submit without an idempotency key gets one here.
//! Never repeats what was refused for good, never waits beyond the caller's deadline, and never follows a peer whose
//! certificate is not that of a control process.

mod call;
mod config;
mod error;
mod history;
mod later;
mod ledger;
mod open;
mod pool;
mod retry;
mod watch;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use domain::position::{Shown, Subject};
use domain::{AgentId, Position, WorkId};
use proto::status::POSITION;
use proto::v1;
use proto::v1::agent_service_client::AgentServiceClient as Agents;
use proto::v1::cluster_service_client::ClusterServiceClient as Cluster;
use proto::v1::open_response;
use proto::v1::registry_service_client::RegistryServiceClient as Registry;
use proto::v1::work_service_client::WorkServiceClient as Works;
use tonic::{Response, Status};
use tracing::Instrument;
use uuid::Uuid;

pub use config::{Config, Timeouts, addresses_of};
pub use error::Error;
pub use history::History;
pub use open::{Open, OpenReceiver, OpenSender};
pub use watch::Watch;

use pool::Pool;

/// No message of the API is larger: a page of works with their results.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// One cluster, seen from outside. Cheap to clone; clones share one connection.
#[derive(Clone, Debug)]
pub struct Client {
    pool: Arc<Pool>,
    timeouts: Timeouts,
    shown: Arc<Mutex<Shown>>,
}

/// Works of which it is remembered how new the last answer was.
const SHOWN_MAX: usize = 4_096;

/// Declares the calls that ask one thing and get one answer.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident, $service:ident, $method:ident, $request:ident -> $answer:ident;)*) => {
        impl Client {
            $(
                $(#[$doc])*
                pub async fn $name(&self, request: v1::$request) -> Result<v1::$answer, Error> {
                    self.call(stringify!($request), request, |channel, request| async move {
                        let mut service =
                            $service::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
                        service.$method(request).await
                    })
                    .await
                }
            )*
        }
    };
}

calls! {
    /// One page of works, newest first.
    list, Works, list, ListRequest -> ListResponse;
    /// One page of definitions.
    definitions, Agents, list_definitions, ListDefinitionsRequest -> ListDefinitionsResponse;
    /// One page of agents.
    agents, Agents, list_agents, ListAgentsRequest -> ListAgentsResponse;
    /// What the processes of the cluster offer.
    find, Registry, find, FindRequest -> FindResponse;
    /// Keeps new shards from a node.
    cordon, Cluster, cordon, CordonRequest -> CordonResponse;
    /// Lets a node have shards again.
    uncordon, Cluster, uncordon, UncordonRequest -> UncordonResponse;
    /// Lets a node give everything away and end.
    drain, Cluster, drain, DrainRequest -> DrainResponse;
    /// Gives a stopped shard an owner again.
    release_shard, Cluster, release_shard, ReleaseShardRequest -> ReleaseShardResponse;
    /// Copies every database of the store.
    backup, Cluster, backup, BackupRequest -> BackupResponse;
    /// Why something is as it is.
    explain, Cluster, explain, ExplainRequest -> ExplainResponse;
}

/// The calls whose answer is wrapped in a response of one field, or whose request has none.
impl Client {
    /// Reads the credentials. Connects when the first call needs it.
    ///
    /// # Errors
    /// Credentials that are missing or cannot be used; no address, or one that is none.
    pub fn connect(config: &Config) -> Result<Self, Error> {
        let pool = Pool::new(config)?;
        let shown = Arc::new(Mutex::new(Shown::new(SHOWN_MAX)));
        Ok(Self { pool: Arc::new(pool), timeouts: config.timeouts.clone(), shown })
    }

    /// The same client with another deadline for each call.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeouts: Timeouts { call: timeout, ..self.timeouts }, ..self }
    }

    /// Where the cluster is looked for.
    pub fn addresses(&self) -> &[String] {
        self.pool.addresses()
    }

    /// Submits one work; returns when it is durable.
    pub async fn submit(&self, mut request: v1::SubmitRequest) -> Result<v1::Work, Error> {
        check_input(&request)?;
        with_key(&mut request);
        let span = tracing::info_span!("submit", agent = request.agent);
        let answer = self.call("SubmitRequest", request, |channel, request| async move {
            let mut works = Works::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let answer = works.submit(request).await?;
            // What was accepted does not age, so it is never too old; what is asked for after it must not be older.
            let work = answer.get_ref().work.as_ref().map_or("", |work| &work.id);
            self.shown(work, position_of(&answer));
            Ok(answer)
        });
        let answer: v1::SubmitResponse = answer.instrument(span).await?;
        answer.work.ok_or(Error::Answer { what: "work" })
    }

    /// One work, with its steps.
    pub async fn get(&self, id: &str) -> Result<v1::Work, Error> {
        let request = v1::GetRequest { id: id.to_owned() };
        let answer = self.call("GetRequest", request, |channel, request| async move {
            let mut works = Works::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            self.shows(id, works.get(request).await?)
        });
        answer.await?.work.ok_or(Error::Answer { what: "work" })
    }

    /// Asks for a work to be cancelled; the work as it is then.
    pub async fn cancel(&self, id: &str) -> Result<v1::Work, Error> {
        let request = v1::CancelRequest { id: id.to_owned() };
        let answer = self.call("CancelRequest", request, |channel, request| async move {
            let mut works = Works::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            self.shows(id, works.cancel(request).await?)
        });
        answer.await?.work.ok_or(Error::Answer { what: "work" })
    }

    /// Says what became of a step in doubt; the work as it is then.
    pub async fn signal(&self, request: v1::SignalRequest) -> Result<v1::Work, Error> {
        let id = request.id.clone();
        let answer = self.call("SignalRequest", request, |channel, request| async {
            let mut works = Works::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            self.shows(&id, works.signal(request).await?)
        });
        answer.await?.work.ok_or(Error::Answer { what: "work" })
    }

    /// Gives an answer about a work or an agent back, unless a later one was shown before: an API server that was cut off
    /// may not know what another one has told already. Then it is asked for again, elsewhere.
    fn shows<A>(&self, id: &str, answer: Response<A>) -> Result<Response<A>, Status> {
        match self.shown(id, position_of(&answer)) {
            true => Ok(answer),
            false => Err(Status::unavailable("the answer is older than one that was shown before")),
        }
    }

    /// Whether something about this work or agent that stands at `position` may be shown; if so it counts as shown. What
    /// has no position may.
    fn shown(&self, id: &str, position: &str) -> bool {
        let work = id.parse::<WorkId>().map(Subject::from);
        let subject = work.or_else(|_| id.parse::<AgentId>().map(Subject::from));
        let (Ok(position), Ok(subject)) = (position.parse::<Position>(), subject) else {
            return true;
        };
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).show(subject, position)
    }

    /// Remembers where a message of an open stream stands.
    fn heard(&self, response: &v1::OpenResponse) {
        let work = match &response.response {
            Some(open_response::Response::Accepted(work)) => &work.id,
            Some(open_response::Response::Event(event)) => &event.work,
            Some(open_response::Response::Refused(_)) | None => return,
        };
        self.shown(work, &response.position);
    }

    /// The events of a work after `cursor` (empty: from its beginning) until it ends.
    pub fn watch(&self, id: &str, cursor: &str) -> Watch {
        Watch::new(self.clone(), id, cursor)
    }

    /// Many submits, cancels and watches on one stream: the cheap way.
    pub fn open(&self) -> Open {
        Open::start(self.clone())
    }

    /// Stores a version of a definition.
    pub async fn apply(
        &self,
        request: v1::ApplyDefinitionRequest,
    ) -> Result<v1::DefinitionVersion, Error> {
        let answer = self.call("ApplyDefinitionRequest", request, |channel, request| async move {
            Agents::new(channel).apply_definition(request).await
        });
        answer.await?.version.ok_or(Error::Answer { what: "version" })
    }

    /// One version of a definition; the newest without a hash.
    pub async fn definition(
        &self,
        request: v1::GetDefinitionRequest,
    ) -> Result<v1::DefinitionVersion, Error> {
        let answer = self.call("GetDefinitionRequest", request, |channel, request| async move {
            Agents::new(channel).get_definition(request).await
        });
        answer.await?.version.ok_or(Error::Answer { what: "version" })
    }

    /// One agent.
    pub async fn agent(&self, id: &str) -> Result<v1::Agent, Error> {
        let request = v1::GetAgentRequest { id: id.to_owned() };
        let answer = self.call("GetAgentRequest", request, |channel, request| async move {
            self.shows(id, Agents::new(channel).get_agent(request).await?)
        });
        answer.await?.agent.ok_or(Error::Answer { what: "agent" })
    }

    /// The journal of an agent, newest entry first, at most `limit` entries (0: all).
    pub fn history(&self, id: &str, limit: u32) -> History {
        History::new(self.clone(), id, limit)
    }

    /// The whole cluster at a glance.
    pub async fn status(&self) -> Result<v1::StatusResponse, Error> {
        self.call("StatusRequest", v1::StatusRequest {}, |channel, request| async move {
            Cluster::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX).status(request).await
        })
        .await
    }

    /// The nodes.
    pub async fn nodes(&self) -> Result<v1::ListNodesResponse, Error> {
        self.call("ListNodesRequest", v1::ListNodesRequest {}, |channel, request| async move {
            Cluster::new(channel).list_nodes(request).await
        })
        .await
    }

    /// The shards and their owners.
    pub async fn shards(&self) -> Result<v1::ListShardsResponse, Error> {
        self.call("ListShardsRequest", v1::ListShardsRequest {}, |channel, request| async move {
            Cluster::new(channel).list_shards(request).await
        })
        .await
    }
}

/// Where an answer says that it was taken; empty if it does not.
fn position_of<A>(answer: &Response<A>) -> &str {
    answer.metadata().get(POSITION).and_then(|text| text.to_str().ok()).unwrap_or_default()
}

/// What the API would refuse anyway: a message that is much too large breaks the stream that it comes by.
fn check_input(request: &v1::SubmitRequest) -> Result<(), Error> {
    proto::convert::check_input(&request.input).map_err(|failure| Error::refused(failure.into()))
}

/// A submit that may be sent twice needs a key of its own.
fn with_key(request: &mut v1::SubmitRequest) {
    if request.idempotency_key.is_empty() {
        request.idempotency_key = Uuid::now_v7().to_string();
    }
}
