//! A store in the databases of a server that speaks Hrana over HTTP: sqld, or Turso Cloud. One database, one namespace.
//!
//! The client is our own. A write is one self-contained batch in one request, and the writes of a database go one after
//! another, in a stream that the server keeps open for us; short reads that come at once go together, others are requests of
//! their own. Never holds a transaction open between two requests, and never repeats a write unless it certainly was not
//! done.

mod http;
mod lane;
mod server;
mod steps;
mod target;
mod together;
mod token;
mod wire;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use proto::link::{
    AgentAnswer, AgentRow, AgentsPage, CheckAnswer, ControlAnswer, ControlBatch, DefinitionRow,
    Fence, Group, LogPage, OwnerRow, Provision, Prune, ReadAgent, ReadAgents, ReadControl,
    ReadHistories, ReadHistory, ReadWorks, TailRow, WorkRow, WorksPage,
};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::control::read::LeaderOnly;
use crate::database::Database;
use crate::engine::Missing;
use crate::file::{count, done, shard};
use crate::schema::ClusterOf;
use crate::shard::prune::{Look, Next, Step};
use crate::shard::read::{Check, DefinitionByHash, Owner, WorkById};
use crate::shard::recover::{self, Begun, PAGES, Part};
use crate::shard::{Bind, foreign, refused};
use crate::statement::{Batch, Outcome, Query};
use crate::{CommitOutcome, Config, ControlOutcome, Error, FenceOutcome, Recovery, Store, metrics};
use lane::{Lane, Order};
use server::Server;
pub(crate) use target::Parsed;

/// Reads of a whole database.
const SLOW_TIMEOUT: Duration = Duration::from_secs(600);
/// Slices of one call of prune, as in files.
const SLICES_MAX: usize = 40;
/// How often a recovery begins again because the owner row changed under it.
const RECOVERIES_MAX: usize = 3;

/// Cheap to clone. Connects when it is first used, and again when a connection broke.
#[derive(Clone)]
pub struct HranaStore(Arc<Shared>);

struct Shared {
    server: Server,
    lanes: Mutex<HashMap<Database, Arc<Lane>>>,
    /// Writes that wait for their answers.
    room: Semaphore,
    write_timeout: Duration,
    read_timeout: Duration,
}

impl HranaStore {
    /// Reads the tokens and the CA; sends nothing yet.
    ///
    /// # Errors
    /// The config is out of its range, or a file that it names cannot be used.
    pub fn new(config: &Config) -> Result<Self, Error> {
        metrics::register();
        let parsed = Parsed::of(config)?;
        Ok(Self(Arc::new(Shared {
            server: Server::new(config, parsed)?,
            lanes: Mutex::default(),
            room: Semaphore::new(config.in_flight_max),
            write_timeout: Duration::from_millis(config.write_timeout_ms),
            read_timeout: Duration::from_millis(config.read_timeout_ms),
        })))
    }

    fn lane(&self, database: Database) -> Arc<Lane> {
        let mut lanes = self.0.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.entry(database).or_insert_with(|| Arc::new(Lane::new(database))).clone()
    }

    fn missing(database: Database) -> Missing {
        match database {
            Database::Control => Missing::Create,
            Database::Shard(_) => Missing::Refuse,
        }
    }

    async fn read<Q: Query>(&self, database: Database, query: &Q) -> Result<Q::Answer, Error> {
        let (lane, deadline) = (self.lane(database), Instant::now() + self.0.read_timeout);
        lane.ready(&self.0.server, Self::missing(database), deadline).await?;
        lane.read(&self.0.server, query, deadline).await
    }

    /// A read of a whole database.
    async fn read_slowly<Q: Query>(
        &self,
        database: Database,
        query: &Q,
    ) -> Result<Q::Answer, Error> {
        let (lane, deadline) = (self.lane(database), Instant::now() + SLOW_TIMEOUT);
        lane.ready(&self.0.server, Self::missing(database), deadline).await?;
        lane.read_alone(&self.0.server, query, deadline).await
    }

    async fn write<B: Batch>(
        &self,
        database: Database,
        missing: Missing,
        order: Order,
        batch: &B,
    ) -> Result<Outcome<B::Answer>, Error> {
        let full =
            || Error::Overloaded { what: "too many writes wait for their answers".to_owned() };
        let _place = self.0.room.try_acquire().map_err(|_| full())?;
        let (lane, deadline) = (self.lane(database), Instant::now() + self.0.write_timeout);
        // Nothing of the write was sent yet, whatever became of the tables.
        lane.ready(&self.0.server, missing, deadline).await.map_err(Error::before_the_write)?;
        lane.write(&self.0.server, order, batch, deadline).await
    }

    async fn shard<Q: Query>(&self, database: &str, query: &Q) -> Result<Q::Answer, Error> {
        self.read(Database::Shard(shard(database)?), query).await
    }

    async fn commit_once(&self, database: Database, group: &Group) -> Result<CommitOutcome, Error> {
        match self.write(database, Missing::Refuse, Order::InLine, group).await? {
            Outcome::Done(()) => Ok(CommitOutcome::Committed),
            Outcome::Stopped(guard) => refused(guard, &self.read(database, &Owner).await?),
        }
    }

    /// All pages of a recovery. None: the owner row changed while they were read.
    async fn recover_once(&self, database: Database) -> Result<Option<Recovery>, Error> {
        let Begun { recovery, is_full } = self.read(database, &recover::First(PAGES)).await?;
        let Recovery { owner, mark, tail, open, agents, agent_max } = recovery;
        let rest = tokio::try_join!(
            self.pages(database, &owner, (tail, is_full.tail), |last: &TailRow| {
                recover::Tail { after: last.agent, rows: PAGES.tail }
            }),
            self.pages(database, &owner, (open, is_full.open), |last: &WorkRow| {
                recover::Open { after: last.id, rows: PAGES.works }
            }),
            self.pages(database, &owner, (agents, is_full.agents), |last: &AgentRow| {
                recover::Agents { after: last.id, rows: PAGES.agents }
            }),
        )?;
        let (Some(tail), Some(open), Some(agents)) = rest else { return Ok(None) };
        Ok(Some(Recovery { owner, mark, tail, open, agents, agent_max }))
    }

    /// The rows of one part of a recovery and all pages after them, each as `after` the last row that was read. None: the
    /// owner row is not `owner`.
    async fn pages<Q, T>(
        &self,
        database: Database,
        owner: &OwnerRow,
        (mut rows, mut is_full): (Vec<T>, bool),
        after: impl Fn(&T) -> Q,
    ) -> Result<Option<Vec<T>>, Error>
    where
        Q: Query<Answer = Part<T>>,
    {
        while let Some(last) = rows.last().filter(|_| is_full) {
            let part = self.read(database, &after(last)).await?;
            if part.owner != *owner {
                return Ok(None);
            }
            is_full = part.is_full && !part.rows.is_empty();
            rows.extend(part.rows);
        }
        Ok(Some(rows))
    }
}

#[async_trait]
impl Store for HranaStore {
    async fn provision(&self, database: &str, provision: &Provision) -> Result<OwnerRow, Error> {
        let shard = shard(database)?;
        let database = Database::Shard(shard);
        let bind = Bind { shard, wanted: provision.clone() };
        match self.write(database, Missing::Create, Order::Before, &bind).await? {
            Outcome::Done(row) => Ok(row),
            Outcome::Stopped(_) => {
                let held = self.read(database, &ClusterOf).await?;
                Err(foreign(&database.to_string(), held, provision))
            }
        }
    }

    async fn owner(&self, database: &str) -> Result<OwnerRow, Error> {
        self.shard(database, &Owner).await
    }

    async fn fence(&self, database: &str, fence: &Fence) -> Result<FenceOutcome, Error> {
        let database = Database::Shard(shard(database)?);
        done(self.write(database, Missing::Refuse, Order::Before, fence).await?)
    }

    async fn commit(&self, database: &str, group: Arc<Group>) -> Result<CommitOutcome, Error> {
        let database = Database::Shard(shard(database)?);
        let timer = metrics::ENGINE_SECONDS.start_timer();
        let outcome = self.commit_once(database, &group).await;
        timer.observe_duration();
        count(&outcome, group.rows.len());
        outcome
    }

    async fn agent(&self, database: &str, asked: &ReadAgent) -> Result<AgentAnswer, Error> {
        self.shard(database, asked).await
    }

    async fn history(&self, database: &str, asked: &ReadHistory) -> Result<LogPage, Error> {
        self.shard(database, asked).await
    }

    async fn histories(&self, database: &str, asked: &ReadHistories) -> Result<LogPage, Error> {
        self.shard(database, asked).await
    }

    async fn recover(&self, database: &str) -> Result<Recovery, Error> {
        let database = Database::Shard(shard(database)?);
        for _ in 0..RECOVERIES_MAX {
            if let Some(whole) = self.recover_once(database).await? {
                return Ok(whole);
            }
        }
        Err(Error::unavailable(format!("{database} was written to while it was recovered")))
    }

    async fn work(&self, database: &str, id: u64) -> Result<Option<(WorkRow, AgentRow)>, Error> {
        self.shard(database, &WorkById(id)).await
    }

    async fn works(&self, database: &str, asked: &ReadWorks) -> Result<WorksPage, Error> {
        self.shard(database, asked).await
    }

    async fn agents(&self, database: &str, asked: &ReadAgents) -> Result<AgentsPage, Error> {
        self.shard(database, asked).await
    }

    async fn definition(
        &self,
        database: &str,
        hash: &[u8],
    ) -> Result<Option<DefinitionRow>, Error> {
        self.shard(database, &DefinitionByHash(hash.to_vec())).await
    }

    async fn prune(&self, database: &str, asked: &Prune) -> Result<u64, Error> {
        let database = Database::Shard(shard(database)?);
        let (asked, mut deleted, mut step) = (*asked, 0, Step::Log { after: 0 });
        for _ in 0..SLICES_MAX {
            let (slice, next) = match self.read(database, &Look { asked, step }).await? {
                Next::Skip(next) => (None, next),
                Next::Delete(slice, next) => (Some(slice), next),
            };
            if let Some(slice) = slice {
                match self.write(database, Missing::Refuse, Order::InLine, &slice).await? {
                    Outcome::Done(rows) => {
                        metrics::PRUNED_ROWS.inc_by(rows);
                        deleted += rows;
                    }
                    Outcome::Stopped(_) => {
                        let epoch = self.read(database, &Owner).await?.epoch;
                        return Err(Error::Fenced { epoch });
                    }
                }
            }
            step = next;
            if step == Step::Done {
                break;
            }
        }
        Ok(deleted)
    }

    async fn check(&self, database: &str) -> Result<CheckAnswer, Error> {
        let checked = self.read_slowly(database.parse()?, &Check).await?;
        let version = self.0.server.version(Instant::now() + self.0.read_timeout).await;
        Ok(CheckAnswer {
            engine: format!("{version}, SQLite {}", checked.sqlite),
            trusted: !self.0.server.parsed().is_checked,
            ..checked.answer
        })
    }

    async fn backup(&self, database: &str, _: &str) -> Result<(), Error> {
        let database: Database = database.parse()?;
        let namespace = self.0.server.parsed().namespace(database);
        Err(Error::invalid(format!(
            "the server keeps {database}, so it has to back it up: its own backups in Turso Cloud, or of sqld \
             `GET /dump` of namespace {namespace}"
        )))
    }

    async fn control(&self, batch: &ControlBatch) -> Result<ControlOutcome, Error> {
        let database = Database::Control;
        match self.write(database, Missing::Create, Order::InLine, batch).await? {
            Outcome::Done(answer) => Ok(ControlOutcome::Done(answer)),
            Outcome::Stopped(_) => {
                Ok(ControlOutcome::NotLeader(self.read(database, &LeaderOnly).await?))
            }
        }
    }

    async fn read_control(&self, asked: &ReadControl) -> Result<ControlAnswer, Error> {
        self.read(Database::Control, asked).await
    }
}
