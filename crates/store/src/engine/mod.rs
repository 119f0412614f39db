//! The file engine: database files, the threads that use them, and the queues before those threads.
//!
//! SQLite blocks, so nothing here runs on a thread of tokio: a small pool of threads owns the connections that write,
//! each database pinned to one of them, so that its writes have one order; another small pool reads, and one more thread
//! does what takes long. Never knows what a job means.

mod directory;
mod queue;
mod sql;

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;

use tokio::sync::oneshot;

pub(crate) use directory::{Directory, flush_directory};
pub(crate) use queue::Lane;
pub(crate) use sql::{Access, Sql};

use crate::database::Database;
use crate::statement::{Found, Query, Row, Statement};
use crate::{Error, metrics, schema};
use queue::{Queue, Refused};

/// How the file engine uses the machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Threads that own the connections that write; each shard's database belongs to one. The control database has one more
    /// to itself.
    pub write_threads: usize,
    /// Threads that read.
    pub read_threads: usize,
    /// Jobs that may wait for one thread, or for the readers together.
    pub queue_max: usize,
    /// Page cache of all databases together, MiB.
    pub cache_mib: usize,
    /// Write-ahead logs of all databases together, MiB.
    pub wal_mib: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { write_threads: 2, read_threads: 2, queue_max: 4_096, cache_mib: 256, wal_mib: 512 }
    }
}

type Job = Box<dyn FnOnce(&mut Connections) + Send>;

/// Closing it is orderly ([`Engine::close`]); dropping it lets the threads finish what waits and end.
pub(crate) struct Engine {
    shared: Arc<Shared>,
    writers: Vec<Arc<Queue<Job>>>,
    /// A leader's beats wait for no shard.
    control: Arc<Queue<Job>>,
    readers: Arc<Queue<Job>>,
    /// Backups and checks: minutes, not milliseconds.
    slow: Arc<Queue<Job>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the threads share. The directory is let go of when the last of them has ended.
struct Shared {
    directory: Directory,
    config: Config,
    /// Databases whose schema was checked and brought up to date by their writer.
    ready: RwLock<HashSet<Database>>,
    /// Databases that are open for writing: they share cache and WAL.
    open: AtomicUsize,
}

/// The answer to a job that waits or runs.
pub(crate) struct Pending<T> {
    answer: oneshot::Receiver<Result<T, Error>>,
    /// What it means when the answer is lost with its thread.
    lost: Lost,
}

#[derive(Clone, Copy)]
enum Lost {
    Unknown,
    Unavailable,
}

impl<T> Pending<T> {
    pub(crate) async fn wait(self) -> Result<T, Error> {
        let what = "the thread that ran it ended";
        self.answer.await.unwrap_or_else(|_| match self.lost {
            Lost::Unknown => Err(Error::unknown(what)),
            Lost::Unavailable => Err(Error::unavailable(what)),
        })
    }
}

/// Whether a database may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    Refuse,
    Create,
}

impl Engine {
    /// Blocks for the moment that it takes to lock the directory.
    pub(crate) fn open(path: &Path, config: Config) -> Result<Self, Error> {
        metrics::register();
        let directory = Directory::open(path)?;
        let config = Config {
            write_threads: config.write_threads.max(1),
            read_threads: config.read_threads.max(1),
            queue_max: config.queue_max.max(1),
            ..config
        };
        let queue = || Arc::new(Queue::new(config.queue_max));
        let writers: Vec<_> = (0..config.write_threads).map(|_| queue()).collect();
        let (control, readers, slow) = (queue(), queue(), queue());
        let shared = Arc::new(Shared {
            directory,
            config,
            ready: RwLock::default(),
            open: AtomicUsize::new(0),
        });
        let threads = Mutex::default();
        let engine = Self { shared: shared.clone(), writers, control, readers, slow, threads };
        for (number, queue) in engine.writers.iter().enumerate() {
            engine.start(format!("store-write-{number}"), queue, Access::ReadWrite)?;
        }
        engine.start("store-control".to_owned(), &engine.control, Access::ReadWrite)?;
        for number in 0..shared.config.read_threads {
            engine.start(format!("store-read-{number}"), &engine.readers, Access::ReadOnly)?;
        }
        engine.start("store-slow".to_owned(), &engine.slow, Access::ReadOnly)?;
        Ok(engine)
    }

    fn start(&self, name: String, queue: &Arc<Queue<Job>>, access: Access) -> Result<(), Error> {
        let (queue, shared) = (queue.clone(), self.shared.clone());
        let run = move || {
            let mut connections = Connections { shared, access, open: HashMap::new() };
            while let Some(job) = queue.pop() {
                // A job that panics drops its answer; what it had begun is rolled back with its connection.
                if catch_unwind(AssertUnwindSafe(|| job(&mut connections))).is_err() {
                    tracing::error!("a job of the store panicked; its connections are opened anew");
                    connections.forget_all();
                }
            }
            connections.checkpoint();
        };
        let thread = std::thread::Builder::new().name(name).spawn(run);
        let thread =
            thread.map_err(|error| Error::file("start a thread for", self.file(""), error))?;
        self.threads().push(thread);
        Ok(())
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a write in line; it happens whether or not its answer is waited for.
    pub(crate) fn write<T: Send + 'static>(
        &self,
        database: Database,
        lane: Lane,
        missing: Missing,
        work: impl FnOnce(&mut Sql) -> Result<T, Error> + Send + 'static,
    ) -> Result<Pending<T>, Error> {
        let run = move |connections: &mut Connections| connections.write(database, missing, work);
        push(self.writer_of(database), lane, Lost::Unknown, run)
    }

    fn writer_of(&self, database: Database) -> &Arc<Queue<Job>> {
        if database == Database::Control {
            return &self.control;
        }
        let mut hasher = DefaultHasher::new();
        database.hash(&mut hasher);
        let number = hasher.finish() % self.writers.len() as u64;
        &self.writers[number as usize]
    }

    /// Puts a read in line. It sees every write that was answered before.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        database: Database,
        work: impl FnOnce(&mut Sql) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.ensure_ready(database).await?;
        let run = move |connections: &mut Connections| connections.read(database, work);
        push(&self.readers, Lane::Normal, Lost::Unavailable, run)?.wait().await
    }

    /// The same on a thread of its own, for reads of a whole database.
    pub(crate) async fn read_slowly<T: Send + 'static>(
        &self,
        database: Database,
        work: impl FnOnce(&mut Sql) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.ensure_ready(database).await?;
        let run = move |connections: &mut Connections| connections.read(database, work);
        push(&self.slow, Lane::Normal, Lost::Unavailable, run)?.wait().await
    }

    /// Readers cannot bring a schema up to date, so the writer opens a database first.
    async fn ensure_ready(&self, database: Database) -> Result<(), Error> {
        if self.shared.is_ready(database) {
            return Ok(());
        }
        let missing = match database {
            Database::Control => Missing::Create,
            Database::Shard(_) => Missing::Refuse,
        };
        self.write(database, Lane::Urgent, missing, |_| Ok(()))?.wait().await
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.shared.directory.file(name)
    }

    pub(crate) fn backup_paths(&self, name: &str) -> Result<(PathBuf, PathBuf), Error> {
        self.shared.directory.backup(name)
    }

    fn close_queues(&self) {
        for queue in &self.writers {
            queue.close();
        }
        self.control.close();
        self.readers.close();
        self.slow.close();
    }

    /// Finishes what waits, writes the logs back into the files and lets go of the directory. Blocks.
    pub(crate) fn close(&self) {
        self.close_queues();
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the store panicked");
            }
        }
        self.shared.directory.unlock();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close_queues();
    }
}

fn push<T: Send + 'static>(
    queue: &Queue<Job>,
    lane: Lane,
    lost: Lost,
    run: impl FnOnce(&mut Connections) -> Result<T, Error> + Send + 'static,
) -> Result<Pending<T>, Error> {
    let (sender, answer) = oneshot::channel();
    // Whoever asked may be gone; the work is done all the same.
    let job: Job = Box::new(move |connections| _ = sender.send(run(connections)));
    match queue.push(job, lane) {
        Ok(()) => Ok(Pending { answer, lost }),
        Err(Refused::Full) => Err(Error::Overloaded { what: "too many requests wait".to_owned() }),
        Err(Refused::Closed) => Err(Error::unavailable("it is shutting down")),
    }
}

impl Shared {
    fn is_ready(&self, database: Database) -> bool {
        self.ready.read().unwrap_or_else(PoisonError::into_inner).contains(&database)
    }

    fn set_ready(&self, database: Database) {
        self.ready.write().unwrap_or_else(PoisonError::into_inner).insert(database);
    }

    /// Among how many databases the budgets are divided: a power of two, so that it rarely changes.
    fn shares(&self) -> usize {
        self.open.load(Ordering::Relaxed).max(1).next_power_of_two()
    }
}

/// The connections of one thread.
pub(crate) struct Connections {
    shared: Arc<Shared>,
    access: Access,
    open: HashMap<Database, Open>,
}

struct Open {
    sql: Sql,
    /// Among how many databases the budgets were divided when it got its part.
    shares: usize,
}

impl Connections {
    fn write<T>(
        &mut self,
        database: Database,
        missing: Missing,
        work: impl FnOnce(&mut Sql) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let open = self.connection(database, missing)?;
        let result = work(&mut open.sql);
        // After a lost flush the connection's idea of the file may be wrong, and an open transaction blocks everything.
        if matches!(result, Err(Error::Unknown { .. })) || open.sql.is_in_transaction() {
            self.forget(database);
        }
        result
    }

    fn read<T>(
        &mut self,
        database: Database,
        work: impl FnOnce(&mut Sql) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let open = self.connection(database, Missing::Refuse)?;
        let result = work(&mut open.sql);
        if open.sql.is_in_transaction() {
            self.forget(database);
        }
        result
    }

    fn connection(&mut self, database: Database, missing: Missing) -> Result<&mut Open, Error> {
        if !self.open.contains_key(&database) {
            let sql = self.open(database, missing)?;
            if self.access == Access::ReadWrite {
                self.shared.open.fetch_add(1, Ordering::Relaxed);
                self.shared.set_ready(database);
                metrics::OPEN_DATABASES.inc();
            }
            self.open.insert(database, Open { sql, shares: 0 });
        }
        let shares = self.shared.shares();
        let open = self.open.get_mut(&database).expect("it is open now");
        if open.shares != shares {
            divide(&self.shared.config, self.access, &open.sql, shares)?;
            open.shares = shares;
        }
        Ok(open)
    }

    fn open(&self, database: Database, missing: Missing) -> Result<Sql, Error> {
        let path = self.shared.directory.file(&database.file_name());
        let is_new = !path.exists();
        if is_new && missing == Missing::Refuse {
            return Err(Error::NotFound { what: format!("database {database}") });
        }
        let mut sql = Sql::open(&path, &database.to_string(), self.access)?;
        if self.access == Access::ReadWrite {
            sql.batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=OFF; PRAGMA temp_store=MEMORY")?;
            check_durable(&mut sql)?;
            let made = schema::bring_up_to_date(&mut sql, database, missing)?;
            if made {
                self.shared.directory.flush_names()?;
            }
        }
        Ok(sql)
    }

    fn forget(&mut self, database: Database) {
        if self.open.remove(&database).is_some() && self.access == Access::ReadWrite {
            self.shared.open.fetch_sub(1, Ordering::Relaxed);
            metrics::OPEN_DATABASES.dec();
        }
    }

    fn forget_all(&mut self) {
        let databases: Vec<_> = self.open.keys().copied().collect();
        databases.into_iter().for_each(|database| self.forget(database));
    }

    /// At the end: the next start finds no log to replay.
    fn checkpoint(&mut self) {
        if self.access == Access::ReadWrite {
            for open in self.open.values() {
                if let Err(error) = open.sql.batch("PRAGMA wal_checkpoint(TRUNCATE)") {
                    tracing::warn!(database = open.sql.name(), %error, "cannot checkpoint");
                }
            }
        }
        self.forget_all();
    }
}

/// 2 is FULL: every commit is flushed before it is answered.
fn check_durable(sql: &mut Sql) -> Result<(), Error> {
    let (mode, synchronous) = sql.read(&Flushing)?;
    if mode != "wal" || synchronous != 2 {
        let what = format!(
            "{} does not flush its commits; a store must run with synchronous=FULL",
            sql.name()
        );
        return Err(Error::NotDurable { what });
    }
    Ok(())
}

/// Journal mode and `synchronous` of a connection.
struct Flushing;

impl Query for Flushing {
    type Answer = (String, u64);

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let pragmas = ["PRAGMA journal_mode", "PRAGMA synchronous"];
        Ok(pragmas.map(|pragma| Statement::new(pragma, Vec::new())).into())
    }

    fn answer(&self, found: &mut Found) -> Result<(String, u64), Error> {
        Ok((found.row(Row::text)?.unwrap_or_default(), found.number()?))
    }
}

/// Gives a connection its part of the cache, half of which is for those that write, and of the write-ahead logs.
fn divide(config: &Config, access: Access, sql: &Sql, shares: usize) -> Result<(), Error> {
    const PAGE_KIB: usize = 4;
    const CACHE_KIB_MIN: usize = 256;
    const WAL_PAGES_MIN: usize = 256;
    const WAL_PAGES_MAX: usize = 16_384;
    let half_kib = config.cache_mib * 1_024 / 2;
    let cache_kib = match access {
        Access::ReadWrite => half_kib / shares,
        Access::ReadOnly => half_kib / shares / (config.read_threads + 1),
    };
    let cache_kib = cache_kib.max(CACHE_KIB_MIN);
    sql.batch(&format!("PRAGMA cache_size=-{cache_kib}"))?;
    if access == Access::ReadWrite {
        let pages = config.wal_mib * 1_024 / PAGE_KIB / shares;
        let pages = pages.clamp(WAL_PAGES_MIN, WAL_PAGES_MAX);
        sql.batch(&format!("PRAGMA wal_autocheckpoint={pages}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_control_database_waits_for_no_shard() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config { write_threads: 1, ..Config::default() };
        let engine = Engine::open(folder.path(), config).unwrap();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let hold = move |_: &mut Sql| Ok(held.recv().is_ok());
        let (shard, create) = (Database::Shard(domain::ShardId(0)), Missing::Create);
        let shard = engine.write(shard, Lane::Urgent, create, hold).unwrap();
        let beat = engine.write(Database::Control, Lane::Normal, create, |_| Ok(()));
        beat.unwrap().wait().await.unwrap();
        release.send(()).unwrap();
        assert!(shard.wait().await.unwrap());
        engine.close();
    }
}
