//! A store behind the store role: one HTTP/2 connection, one stream of writes, a call for each read.
//!
//! Connects when first used and again when the connection broke. Never repeats a write by itself.

mod writes;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use domain::Role;
use prost::Message;
use proto::link::read_request::Read;
use proto::link::read_response::Answer;
use proto::link::store_service_client::StoreServiceClient;
use proto::link::write_request::Write;
use proto::link::write_response::Outcome;
use proto::link::{
    AgentAnswer, AgentRow, AgentsPage, Backup, CheckAnswer, ControlAnswer, ControlBatch,
    DefinitionRow, Fence, Group, LeaderRow, LogPage, OwnerRow, Provision, Prune, ReadAgent,
    ReadAgents, ReadCheck, ReadControl, ReadDefinition, ReadHistories, ReadHistory, ReadLeader,
    ReadOwner, ReadRecovery, ReadRequest, ReadWork, ReadWorks, WorkRow, WorksPage, read_control,
};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

use crate::{
    CommitOutcome, Config, ControlOutcome, Error, FenceOutcome, MESSAGE_BYTES_MAX, Recovery, Store,
    metrics,
};
use writes::Writes;

/// A store that was stopped, or a cable that was pulled, is noticed after the two together.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Room for a full group on its way while others are answered.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Reads of a whole database.
const SLOW_TIMEOUT: Duration = Duration::from_secs(600);
/// What a message has besides its group.
const ENVELOPE_BYTES_MAX: usize = 1 << 10;

/// The answer of this kind, if it is one.
macro_rules! pick {
    ($kind:ident) => {
        |answer| if let Answer::$kind(answer) = answer { Some(answer) } else { None }
    };
}

/// Cheap to share; ends its connection when dropped.
pub struct RemoteStore {
    client: StoreServiceClient<Channel>,
    writes: Writes,
    read_timeout: Duration,
}

impl RemoteStore {
    /// Must be called within a tokio runtime. Connects at the first use.
    pub fn new(config: &Config, identity: &net::Identity) -> Result<Self, Error> {
        metrics::register();
        let address = &config.address;
        let malformed = |_| {
            Error::invalid(format!("store address {address:?} is not valid: host:port is allowed"))
        };
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(malformed)?;
        let endpoint = endpoint
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let dialer = net::Dialer::new(identity, net::Protocol::Grpc);
        let connector = net::grpc::connector(dialer, net::Expected::any(Role::Store));
        let client = StoreServiceClient::new(endpoint.connect_with_connector_lazy(connector))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let write_timeout = Duration::from_millis(config.write_timeout_ms);
        let writes = Writes::spawn(client.clone(), write_timeout, config.in_flight_max);
        Ok(Self { client, writes, read_timeout: Duration::from_millis(config.read_timeout_ms) })
    }

    async fn read(
        &self,
        database: &str,
        read: Read,
        take: impl FnMut(Answer) -> Result<(), Error> + Send,
    ) -> Result<(), Error> {
        self.read_within(self.read_timeout, database, read, take).await
    }

    /// Hands every page of the answer to `take`.
    async fn read_within(
        &self,
        limit: Duration,
        database: &str,
        read: Read,
        mut take: impl FnMut(Answer) -> Result<(), Error> + Send,
    ) -> Result<(), Error> {
        let request = ReadRequest { database: database.to_owned(), read: Some(read) };
        let mut client = self.client.clone();
        let pages = async move {
            let mut pages = client.read(request).await.map_err(Error::of_status)?.into_inner();
            while let Some(page) = pages.message().await.map_err(Error::of_status)? {
                match page.answer {
                    Some(Answer::Failure(failure)) => return Err(Error::from_wire(failure)),
                    Some(answer) => take(answer)?,
                    None => return Err(foreign()),
                }
            }
            Ok(())
        };
        within(limit, pages).await
    }

    /// A read whose answer is one message.
    async fn read_one<T: Send>(
        &self,
        database: &str,
        read: Read,
        pick: impl Fn(Answer) -> Option<T> + Send + Sync,
    ) -> Result<T, Error> {
        let mut found = None;
        self.read(database, read, |answer| {
            found = Some(pick(answer).ok_or_else(foreign)?);
            Ok(())
        })
        .await?;
        found.ok_or_else(foreign)
    }
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    match timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(Error::unavailable(format!("it did not answer a read within {limit:?}"))),
    }
}

/// An answer that does not belong to the question.
fn foreign() -> Error {
    Error::internal(
        "store",
        "it gave an answer of another kind; check that both have the same version",
    )
}

#[async_trait]
impl Store for RemoteStore {
    async fn provision(&self, database: &str, provision: &Provision) -> Result<OwnerRow, Error> {
        let outcome = self.writes.send(database, Write::Provision(provision.clone())).await?;
        let Outcome::Owner(row) = outcome else { return Err(unexpected(outcome)) };
        Ok(row)
    }

    async fn owner(&self, database: &str) -> Result<OwnerRow, Error> {
        self.read_one(database, Read::Owner(ReadOwner {}), pick!(Owner)).await
    }

    async fn fence(&self, database: &str, fence: &Fence) -> Result<FenceOutcome, Error> {
        let outcome = self.writes.send(database, Write::Fence(fence.clone())).await?;
        let Outcome::Owner(row) = outcome else { return Err(unexpected(outcome)) };
        Ok(FenceOutcome::of(fence, row))
    }

    async fn commit(&self, database: &str, group: Arc<Group>) -> Result<CommitOutcome, Error> {
        let bytes = group.encoded_len();
        if MESSAGE_BYTES_MAX < bytes + ENVELOPE_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a group of {bytes} bytes is over the limit of {MESSAGE_BYTES_MAX}"
            )));
        }
        // The payloads are shared, so this copies the numbers only.
        let group = Arc::unwrap_or_clone(group);
        match self.writes.send(database, Write::Group(group)).await? {
            Outcome::Committed(_) => Ok(CommitOutcome::Committed),
            Outcome::Fenced(fenced) => Ok(CommitOutcome::Fenced { epoch: fenced.epoch }),
            Outcome::Head(mismatch) => Ok(CommitOutcome::HeadMismatch { head: mismatch.head }),
            Outcome::Failure(failure) => Err(Error::from_wire(failure)),
            Outcome::Owner(_) | Outcome::Pruned(_) | Outcome::Control(_) => Err(foreign()),
        }
    }

    async fn agent(&self, database: &str, read: &ReadAgent) -> Result<AgentAnswer, Error> {
        self.read_one(database, Read::Agent(read.clone()), pick!(Agent)).await
    }

    async fn history(&self, database: &str, read: &ReadHistory) -> Result<LogPage, Error> {
        self.read_one(database, Read::History(*read), pick!(Log)).await
    }

    async fn histories(&self, database: &str, read: &ReadHistories) -> Result<LogPage, Error> {
        self.read_one(database, Read::Histories(read.clone()), pick!(Log)).await
    }

    async fn recover(&self, database: &str) -> Result<Recovery, Error> {
        let mut whole = Recovery::default();
        self.read(database, Read::Recovery(ReadRecovery {}), |answer| {
            let Answer::Recovery(page) = answer else { return Err(foreign()) };
            if let Some(owner) = page.owner {
                whole.owner = owner;
                whole.agent_max = page.agent_max;
            }
            if let Some(mark) = page.mark {
                whole.mark.lsn = mark.lsn;
                whole.mark.heads.extend(mark.heads);
            }
            whole.tail.extend(page.tail);
            whole.open.extend(page.open);
            whole.agents.extend(page.agents);
            Ok(())
        })
        .await?;
        Ok(whole)
    }

    async fn work(&self, database: &str, id: u64) -> Result<Option<(WorkRow, AgentRow)>, Error> {
        let read = Read::Work(ReadWork { id });
        let mut page = self.read_one(database, read, pick!(Works)).await?;
        Ok(page.works.pop().zip(page.agents.pop()))
    }

    async fn works(&self, database: &str, read: &ReadWorks) -> Result<WorksPage, Error> {
        self.read_one(database, Read::Works(read.clone()), pick!(Works)).await
    }

    async fn agents(&self, database: &str, read: &ReadAgents) -> Result<AgentsPage, Error> {
        self.read_one(database, Read::Agents(read.clone()), pick!(Agents)).await
    }

    async fn definition(
        &self,
        database: &str,
        hash: &[u8],
    ) -> Result<Option<DefinitionRow>, Error> {
        let hash = hash.to_vec();
        let read = Read::Definition(ReadDefinition { hash: hash.into() });
        let mut found = None;
        self.read(database, read, |answer| {
            let Answer::Definition(row) = answer else { return Err(foreign()) };
            found = Some(row);
            Ok(())
        })
        .await?;
        Ok(found)
    }

    async fn prune(&self, database: &str, prune: &Prune) -> Result<u64, Error> {
        let outcome = self.writes.send(database, Write::Prune(*prune)).await?;
        let Outcome::Pruned(pruned) = outcome else { return Err(unexpected(outcome)) };
        Ok(pruned.rows)
    }

    async fn check(&self, database: &str) -> Result<CheckAnswer, Error> {
        let mut found = None;
        let take = |answer| {
            let Answer::Check(answer) = answer else { return Err(foreign()) };
            found = Some(answer);
            Ok(())
        };
        self.read_within(SLOW_TIMEOUT, database, Read::Check(ReadCheck {}), take).await?;
        found.ok_or_else(foreign)
    }

    async fn backup(&self, database: &str, to: &str) -> Result<(), Error> {
        let read = Read::Backup(Backup { to: to.to_owned() });
        self.read_within(SLOW_TIMEOUT, database, read, |_| Ok(())).await
    }

    async fn control(&self, batch: &ControlBatch) -> Result<ControlOutcome, Error> {
        let outcome = self.writes.send("control", Write::Control(batch.clone())).await?;
        if matches!(outcome, Outcome::Fenced(_)) {
            let read = ReadControl { read: Some(read_control::Read::Leader(ReadLeader {})) };
            let leader: Option<LeaderRow> = self.read_control(&read).await?.leader;
            return Ok(ControlOutcome::NotLeader(leader.ok_or_else(foreign)?));
        }
        let Outcome::Control(answer) = outcome else { return Err(unexpected(outcome)) };
        Ok(ControlOutcome::Done(answer))
    }

    async fn read_control(&self, read: &ReadControl) -> Result<ControlAnswer, Error> {
        let mut whole = ControlAnswer::default();
        self.read("control", Read::Control(read.clone()), |answer| {
            let Answer::Control(page) = answer else { return Err(foreign()) };
            if page.leader.is_some() {
                whole.leader = page.leader;
                whole.cluster_id = page.cluster_id;
                whole.authorities = page.authorities;
            }
            whole.definitions.extend(page.definitions);
            whole.transitions.extend(page.transitions);
            whole.nodes.extend(page.nodes);
            whole.shards.extend(page.shards);
            whole.audit.extend(page.audit);
            Ok(())
        })
        .await?;
        Ok(whole)
    }
}

fn unexpected(outcome: Outcome) -> Error {
    match outcome {
        Outcome::Fenced(fenced) => Error::Fenced { epoch: fenced.epoch },
        Outcome::Failure(failure) => Error::from_wire(failure),
        Outcome::Committed(_)
        | Outcome::Head(_)
        | Outcome::Owner(_)
        | Outcome::Pruned(_)
        | Outcome::Control(_) => foreign(),
    }
}
