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
    ReadHistory, ReadWorks, WorkRow, WorksPage,
};

use crate::database::Database;
use crate::engine::{Engine, Lane, Missing, Pending, flush_directory};
use crate::shard::prune::Step;
use crate::shard::{prune, read};
use crate::{
    CommitOutcome, ControlOutcome, EngineConfig, Error, FenceOutcome, Recovery, Store, control,
    metrics, shard,
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
        self.0.write(Database::Shard(shard), Lane::Normal, Missing::Create, move |sql| {
            shard::provision(sql, shard, &wanted)
        })
    }

    pub(crate) fn start_fence(
        &self,
        database: &str,
        fence: Fence,
    ) -> Result<Pending<FenceOutcome>, Error> {
        let database = Database::Shard(shard(database)?);
        self.0.write(database, Lane::Urgent, Missing::Refuse, move |sql| shard::fence(sql, &fence))
    }

    pub(crate) fn start_commit(
        &self,
        database: &str,
        group: Arc<Group>,
    ) -> Result<Pending<CommitOutcome>, Error> {
        let database = Database::Shard(shard(database)?);
        self.0.write(database, Lane::Normal, Missing::Refuse, move |sql| {
            let timer = metrics::ENGINE_SECONDS.start_timer();
            let outcome = shard::commit(sql, &group);
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
            control::batch(sql, &batch)
        })
    }

    /// A read of a shard.
    async fn read<T: Send + 'static>(
        &self,
        database: &str,
        work: impl FnOnce(&mut crate::engine::Sql) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.0.read(Database::Shard(shard(database)?), work).await
    }
}

fn shard(database: &str) -> Result<ShardId, Error> {
    match database.parse()? {
        Database::Shard(shard) => Ok(shard),
        Database::Control => Err(Error::invalid("database control is no shard")),
    }
}

fn count(outcome: &Result<CommitOutcome, Error>, rows: usize) {
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
        self.read(database, read::owner).await
    }

    async fn fence(&self, database: &str, fence: &Fence) -> Result<FenceOutcome, Error> {
        self.start_fence(database, fence.clone())?.wait().await
    }

    async fn commit(&self, database: &str, group: Arc<Group>) -> Result<CommitOutcome, Error> {
        self.start_commit(database, group)?.wait().await
    }

    async fn agent(&self, database: &str, asked: &ReadAgent) -> Result<AgentAnswer, Error> {
        let asked = asked.clone();
        self.read(database, move |sql| read::agent(sql, &asked)).await
    }

    async fn history(&self, database: &str, asked: &ReadHistory) -> Result<LogPage, Error> {
        let asked = *asked;
        self.read(database, move |sql| read::history(sql, &asked)).await
    }

    async fn recover(&self, database: &str) -> Result<Recovery, Error> {
        self.read(database, read::recover).await
    }

    async fn work(&self, database: &str, id: u64) -> Result<Option<(WorkRow, AgentRow)>, Error> {
        self.read(database, move |sql| read::work(sql, id)).await
    }

    async fn works(&self, database: &str, asked: &ReadWorks) -> Result<WorksPage, Error> {
        let asked = asked.clone();
        self.read(database, move |sql| read::works(sql, &asked)).await
    }

    async fn agents(&self, database: &str, asked: &ReadAgents) -> Result<AgentsPage, Error> {
        let asked = asked.clone();
        self.read(database, move |sql| read::agents(sql, &asked)).await
    }

    async fn definition(
        &self,
        database: &str,
        hash: &[u8],
    ) -> Result<Option<DefinitionRow>, Error> {
        let hash = hash.to_vec();
        self.read(database, move |sql| read::definition(sql, &hash)).await
    }

    async fn prune(&self, database: &str, asked: &Prune) -> Result<u64, Error> {
        let database = Database::Shard(shard(database)?);
        let asked = *asked;
        let (mut deleted, mut step) = (0, Step::Log { after: 0 });
        for _ in 0..SLICES_MAX {
            let slice = move |sql: &mut crate::engine::Sql| prune::slice(sql, &asked, step);
            let pending = self.0.write(database, Lane::Normal, Missing::Refuse, slice)?;
            let (rows, next) = pending.wait().await?;
            deleted += rows;
            step = next;
            if step == Step::Done {
                break;
            }
        }
        Ok(deleted)
    }

    async fn check(&self, database: &str) -> Result<CheckAnswer, Error> {
        self.0.read_slowly(database.parse()?, read::check).await
    }

    async fn backup(&self, database: &str, to: &str) -> Result<(), Error> {
        let database: Database = database.parse()?;
        let (engine, to) = (self.0.clone(), to.to_owned());
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
        self.0.read(Database::Control, move |sql| control::read(sql, &asked)).await
    }
}

/// SQLite does not flush a copy that it makes; a backup that exists under its name is whole and on the disk.
fn backup(sql: &mut crate::engine::Sql, target: &Path, part: &Path) -> Result<(), Error> {
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
