//! A store over database files.
//!
//! Writes are put in line by the `start_*` methods, in the order in which these are called; the store role relies on it.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use domain::ShardId;
use proto::link::{
    AgentAnswer, AgentRow, AgentsPage, CheckAnswer, ControlAnswer, ControlBatch, DefinitionRow,
    Fence, Group, LogPage, OwnerRow, Provision, Prune, ReadAgent, ReadAgents, ReadControl,
    ReadHistories, ReadHistory, ReadWorks, WorkRow, WorksPage,
};

use crate::control::read::LeaderOnly;
use crate::database::Database;
use crate::engine::{Engine, Lane, Missing, Pending, Sql, flush_directory};
use crate::schema::ClusterOf;
use crate::shard::prune::{Look, Next, Step};
use crate::shard::read::{Check, DefinitionByHash, Owner, WorkById};
use crate::shard::{Bind, foreign, recover, refused};
use crate::statement::{Outcome, Query};
use crate::{
    CommitOutcome, ControlOutcome, EngineConfig, Error, FenceOutcome, Recovery, Store, metrics,
};

/// Slices of one call of prune: 200,000 rows of the log, or less.
const SLICES_MAX: usize = 40;

/// Owns a data directory. Cheap to clone.
#[derive(Clone)]
pub struct FileStore(Arc<Engine>);

impl FileStore {
    /// Makes the directory if it is missing and locks it. Blocks, for a moment.
    pub fn open(directory: &Path, config: EngineConfig) -> Result<Self, Error> {
        Ok(Self(Arc::new(Engine::open(directory, config)?)))
    }

    /// Finishes what waits, writes everything back into the database files and unlocks the directory.
    pub async fn close(&self) {
        let engine = self.0.clone();
        if tokio::task::spawn_blocking(move || engine.close()).await.is_err() {
            tracing::error!("closing the store panicked");
        }
    }

    /// Opens the control database, so that a directory that cannot be used is found out at once.
    pub(crate) async fn open_control(&self) -> Result<(), Error> {
        self.0.write(Database::Control, Lane::Normal, Missing::Create, |_| Ok(()))?.wait().await
    }

    pub(crate) fn start_provision(
        &self,
        database: &str,
        wanted: Provision,
    ) -> Result<Pending<OwnerRow>, Error> {
        let shard = shard(database)?;
        let bind = Bind { shard, wanted };
        self.0.write(Database::Shard(shard), Lane::Normal, Missing::Create, move |sql| {
            match sql.write(&bind)? {
                Outcome::Done(row) => Ok(row),
                Outcome::Stopped(_) => {
                    let held = sql.read(&ClusterOf)?;
                    Err(foreign(sql.name(), held, &bind.wanted))
                }
            }
        })
    }

    pub(crate) fn start_fence(
        &self,
        database: &str,
        fence: Fence,
    ) -> Result<Pending<FenceOutcome>, Error> {
        let database = Database::Shard(shard(database)?);
        self.0.write(database, Lane::Urgent, Missing::Refuse, move |sql| done(sql.write(&fence)?))
    }

    pub(crate) fn start_commit(
        &self,
        database: &str,
        group: Arc<Group>,
    ) -> Result<Pending<CommitOutcome>, Error> {
        let database = Database::Shard(shard(database)?);
        // The first entry of a new owner is the shard's own, and all of its agents stand still until it is there.
        let is_opening = group.rows.first().is_some_and(|row| row.agent == 0);
        let lane = if is_opening { Lane::Urgent } else { Lane::Normal };
        self.0.write(database, lane, Missing::Refuse, move |sql| {
            let timer = metrics::ENGINE_SECONDS.start_timer();
            let outcome = commit(sql, &group);
            timer.observe_duration();
            count(&outcome, group.rows.len());
            outcome
        })
    }

    pub(crate) fn start_control(
        &self,
        batch: ControlBatch,
    ) -> Result<Pending<ControlOutcome>, Error> {
        self.0.write(Database::Control, Lane::Normal, Missing::Create, move |sql| {
            match sql.write(&batch)? {
                Outcome::Done(answer) => Ok(ControlOutcome::Done(answer)),
                Outcome::Stopped(_) => Ok(ControlOutcome::NotLeader(sql.read(&LeaderOnly)?)),
            }
        })
    }

    /// A read of a shard.
    async fn read<Q: Query<Answer: 'static> + 'static>(
        &self,
        database: &str,
        query: Q,
    ) -> Result<Q::Answer, Error> {
        let database = Database::Shard(shard(database)?);
        self.0.read(database, move |sql| sql.read(&query)).await
    }
}

pub(crate) fn shard(database: &str) -> Result<ShardId, Error> {
    match database.parse()? {
        Database::Shard(shard) => Ok(shard),
        Database::Control => Err(Error::invalid("database control is no shard")),
    }
}

fn commit(sql: &mut Sql, group: &Group) -> Result<CommitOutcome, Error> {
    match sql.write(group)? {
        Outcome::Done(()) => Ok(CommitOutcome::Committed),
        Outcome::Stopped(guard) => refused(guard, &sql.read(&Owner)?),
    }
}

/// Of a batch without a guard.
pub(crate) fn done<T>(outcome: Outcome<T>) -> Result<T, Error> {
    match outcome {
        Outcome::Done(answer) => Ok(answer),
        Outcome::Stopped(guard) => Err(Error::internal("a batch", format!("{guard:?} fired"))),
    }
}

pub(crate) fn count(outcome: &Result<CommitOutcome, Error>, rows: usize) {
    let label = match outcome {
        Ok(CommitOutcome::Committed) => "committed",
        Ok(CommitOutcome::Fenced { .. }) => "fenced",
        Ok(CommitOutcome::HeadMismatch { .. }) => "head",
        Err(_) => "error",
    };
    metrics::COMMITS.with_label_values(&[label]).inc();
    if matches!(outcome, Ok(CommitOutcome::Committed)) {
        metrics::COMMITTED_ROWS.inc_by(rows as u64);
    }
}

#[async_trait]
impl Store for FileStore {
    async fn provision(&self, database: &str, provision: &Provision) -> Result<OwnerRow, Error> {
        self.start_provision(database, provision.clone())?.wait().await
    }

    async fn owner(&self, database: &str) -> Result<OwnerRow, Error> {
        self.read(database, Owner).await
    }

    async fn fence(&self, database: &str, fence: &Fence) -> Result<FenceOutcome, Error> {
        self.start_fence(database, fence.clone())?.wait().await
    }

    async fn commit(&self, database: &str, group: Arc<Group>) -> Result<CommitOutcome, Error> {
        self.start_commit(database, group)?.wait().await
    }

    async fn agent(&self, database: &str, asked: &ReadAgent) -> Result<AgentAnswer, Error> {
        self.read(database, asked.clone()).await
    }

    async fn history(&self, database: &str, asked: &ReadHistory) -> Result<LogPage, Error> {
        self.read(database, *asked).await
    }

    async fn histories(&self, database: &str, asked: &ReadHistories) -> Result<LogPage, Error> {
        self.read(database, asked.clone()).await
    }

    async fn recover(&self, database: &str) -> Result<Recovery, Error> {
        Ok(self.read(database, recover::First(recover::ALL)).await?.recovery)
    }

    async fn work(&self, database: &str, id: u64) -> Result<Option<(WorkRow, AgentRow)>, Error> {
        self.read(database, WorkById(id)).await
    }

    async fn works(&self, database: &str, asked: &ReadWorks) -> Result<WorksPage, Error> {
        self.read(database, asked.clone()).await
    }

    async fn agents(&self, database: &str, asked: &ReadAgents) -> Result<AgentsPage, Error> {
        self.read(database, asked.clone()).await
    }

    async fn definition(
        &self,
        database: &str,
        hash: &[u8],
    ) -> Result<Option<DefinitionRow>, Error> {
        self.read(database, DefinitionByHash(hash.to_vec())).await
    }

    async fn prune(&self, database: &str, asked: &Prune) -> Result<u64, Error> {
        let database = Database::Shard(shard(database)?);
        let asked = *asked;
        let (mut deleted, mut step) = (0, Step::Log { after: 0 });
        for _ in 0..SLICES_MAX {
            let slice = move |sql: &mut Sql| slice(sql, asked, step);
            let pending = self.0.write(database, Lane::Normal, Missing::Refuse, slice)?;
            let (rows, next) = pending.wait().await?;
            metrics::PRUNED_ROWS.inc_by(rows);
            deleted += rows;
            step = next;
            if step == Step::Done {
                break;
            }
        }
        Ok(deleted)
    }

    async fn check(&self, database: &str) -> Result<CheckAnswer, Error> {
        let checked = self.0.read_slowly(database.parse()?, |sql| sql.read(&Check)).await?;
        Ok(CheckAnswer {
            // Asked of the connection that writes, when it was opened: with another value it is refused.
            synchronous: 2,
            engine: format!("libsql files, SQLite {}", checked.sqlite),
            ..checked.answer
        })
    }

    async fn backup(&self, database: &str, name: &str) -> Result<(), Error> {
        let database: Database = database.parse()?;
        let (engine, to) = (self.0.clone(), crate::restore::file_of(name, &database.to_string()));
        self.0
            .read_slowly(database, move |sql| {
                let (target, part) = engine.backup_paths(&to)?;
                backup(sql, &target, &part)
            })
            .await
    }

    async fn control(&self, batch: &ControlBatch) -> Result<ControlOutcome, Error> {
        self.start_control(batch.clone())?.wait().await
    }

    async fn read_control(&self, asked: &ReadControl) -> Result<ControlAnswer, Error> {
        let asked = asked.clone();
        self.0.read(Database::Control, move |sql| sql.read(&asked)).await
    }
}

/// One slice of pruning. Answers how many rows went, and what is next.
fn slice(sql: &mut Sql, asked: Prune, step: Step) -> Result<(u64, Step), Error> {
    match sql.read(&Look { asked, step })? {
        Next::Skip(next) => Ok((0, next)),
        Next::Delete(slice, next) => match sql.write(&slice)? {
            Outcome::Done(rows) => Ok((rows, next)),
            Outcome::Stopped(_) => Err(Error::Fenced { epoch: sql.read(&Owner)?.epoch }),
        },
    }
}

/// SQLite does not flush a copy that it makes; a backup that exists under its name is whole and on the disk.
fn backup(sql: &mut Sql, target: &Path, part: &Path) -> Result<(), Error> {
    if part.exists() {
        std::fs::remove_file(part).map_err(|error| Error::file("remove", part, error))?;
    }
    let Some(path) = part.to_str() else {
        return Err(Error::invalid(format!("path {} is not UTF-8", part.display())));
    };
    sql.copy_into(path)?;
    let flushed = std::fs::File::open(part).and_then(|file| file.sync_all());
    flushed.map_err(|error| Error::file("flush", part, error))?;
    std::fs::rename(part, target).map_err(|error| Error::file("rename to", target, error))?;
    target.parent().map_or(Ok(()), flush_directory)
}
