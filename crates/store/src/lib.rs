//! What survives a crash: shards of agents and the control database, behind one trait.
//!
//! [`Store`] is typed; its SQL stands once, below it, and two engines run it: database files ([`FileStore`]), and a
//! server that speaks Hrana, sqld or Turso Cloud ([`HranaStore`]). Files are served over the network by the store role
//! ([`role`]), which is the only process that opens them. [`writer`] is the owner's side of a shard: it groups what waits
//! into commits and finds out what became of a commit whose answer was lost.
//!
//! Never decides who owns a shard or who leads: it compares and sets. Never answers a write before it is flushed, never
//! keeps half of one, and never guesses what became of one.

mod control;
mod database;
mod engine;
mod error;
mod file;
mod hrana;
mod metrics;
mod remote;
mod restore;
mod schema;
mod shard;
mod statement;

pub mod role;
pub mod writer;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use proto::link::{
    AgentAnswer, AgentRow, AgentsPage, CheckAnswer, ControlAnswer, ControlBatch, DefinitionRow,
    Fence, Group, LeaderRow, LogPage, Mark, OwnerRow, Provision, Prune, ReadAgent, ReadAgents,
    ReadControl, ReadHistories, ReadHistory, ReadWorks, TailRow, WorkRow, WorksPage,
};

pub use engine::Config as EngineConfig;
pub use error::Error;
pub use file::FileStore;
pub use hrana::HranaStore;
pub use remote::RemoteStore;
pub use restore::{Restored, restore};

/// What a page of an answer holds at most, unless a single row is larger.
pub(crate) const PAGE_BYTES_MAX: usize = 1 << 20;
/// The largest message between a store and its clients.
pub(crate) const MESSAGE_BYTES_MAX: usize = 8 << 20;

/// One store, as its clients know it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the data is.
    pub engine: Engine,
    /// Of the store role, `host:port`, for the engine `remote`.
    pub address: String,
    /// The data directory, for the engine `file`.
    pub directory: PathBuf,
    /// How the engine `file` uses the machine.
    pub file: EngineConfig,
    /// Of the server, for the engine `hrana`: `http://host:port` of an sqld with namespaces, or `https://host`. Where
    /// each database has a host of its own, as in Turso Cloud, `{namespace}` in the host stands for its name.
    pub url: String,
    /// Of sqld's admin API: then databases that are missing are made. Without it they have to be there.
    pub admin_url: Option<String>,
    /// A file with the token that the server asks for (a JWT). Read again when the server refuses what was in it.
    pub token_file: Option<PathBuf>,
    /// The same for the admin API.
    pub admin_token_file: Option<PathBuf>,
    /// A file with the CA of an `https` server, PEM; without it, the CAs that this machine trusts.
    pub ca_file: Option<PathBuf>,
    /// Before the names of databases: lower case letters, digits and `-`. Two clusters on one server differ in it.
    pub namespace_prefix: String,
    /// Whether the server is asked if it flushes its commits.
    pub durability: Durability,
    /// Lets `http://` leave this machine. Tokens and data can then be read on the way.
    pub allow_plaintext: bool,
    /// A server that was not reached after this is not available, milliseconds.
    pub connect_timeout_ms: u64,
    /// Connections to the server at once; sqld takes 128 from all processes together.
    pub connections_max: usize,
    /// A write without an answer is unknown after this, milliseconds.
    pub write_timeout_ms: u64,
    /// A read without an answer has failed after this, milliseconds.
    pub read_timeout_ms: u64,
    /// Writes that may wait for their answers.
    pub in_flight_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            engine: Engine::Remote,
            address: "127.0.0.1:7600".to_owned(),
            directory: PathBuf::new(),
            file: EngineConfig::default(),
            url: String::new(),
            admin_url: None,
            token_file: None,
            admin_token_file: None,
            ca_file: None,
            namespace_prefix: String::new(),
            durability: Durability::Checked,
            allow_plaintext: false,
            connect_timeout_ms: 5_000,
            connections_max: 24,
            write_timeout_ms: 10_000,
            read_timeout_ms: 10_000,
            in_flight_max: 4_096,
        }
    }
}

impl Config {
    /// # Errors
    /// What the types cannot say: a part that the engine needs is missing, malformed or out of its range.
    pub fn check(&self) -> Result<(), Error> {
        match self.engine {
            Engine::Remote | Engine::File => Ok(()),
            Engine::Hrana => hrana::Parsed::of(self).map(drop),
        }
    }
}

/// What keeps the data of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// A store role, over mutual TLS.
    #[default]
    Remote,
    /// Database files, opened by this process. One process at a time: for tests and measurements.
    File,
    /// A server that speaks Hrana over HTTP: sqld, Turso Cloud.
    Hrana,
}

/// Who says that a server flushes what it commits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The server: it is asked on every connection that writes, and refused if it does not.
    #[default]
    Checked,
    /// The operator vouches for it, where it cannot be asked.
    Trusted,
}

/// The store that `config` names. Lazy: one on the network that is not up yet answers as soon as it is.
///
/// # Errors
/// The address is malformed, or a file that is named cannot be used; or, with the engine `file`, the directory.
pub fn connect(config: &Config, identity: &net::Identity) -> Result<Arc<dyn Store>, Error> {
    Ok(match config.engine {
        Engine::Remote => Arc::new(RemoteStore::new(config, identity)?),
        Engine::File => Arc::new(FileStore::open(&config.directory, config.file.clone())?),
        Engine::Hrana => Arc::new(HranaStore::new(config)?),
    })
}

/// What became of a fence.
#[derive(Clone, Debug, PartialEq)]
pub enum FenceOutcome {
    /// The shard is owned as asked.
    Fenced(OwnerRow),
    /// Another epoch or a newer term was there: this row.
    Lost(OwnerRow),
}

impl FenceOutcome {
    /// What the owner row after a fence says about it. A row that is as asked was granted, now or by an earlier try.
    fn of(asked: &Fence, row: OwnerRow) -> Self {
        let is_ours = row.epoch == asked.expected.max(asked.above) + 1
            && row.node == asked.node
            && row.incarnation == asked.incarnation
            && row.term == asked.term;
        if is_ours { Self::Fenced(row) } else { Self::Lost(row) }
    }
}

/// What became of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitOutcome {
    Committed,
    /// The owner row has this epoch.
    Fenced {
        epoch: u64,
    },
    /// The last row of the log is this one.
    HeadMismatch {
        head: u64,
    },
}

/// What became of a batch on the control database.
#[derive(Clone, Debug, PartialEq)]
pub enum ControlOutcome {
    Done(ControlAnswer),
    /// Nothing was written: this is the leader, or the row that a take-over did not expect.
    NotLeader(LeaderRow),
}

/// What a new owner of a shard reads before it opens it; of one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recovery {
    pub owner: OwnerRow,
    /// Lsn 0 if none was written yet.
    pub mark: Mark,
    /// The last entry after the mark of each agent that has one, by agent.
    pub tail: Vec<TailRow>,
    /// Works that have not ended, oldest first.
    pub open: Vec<WorkRow>,
    /// The agents of the open works, with their states.
    pub agents: Vec<AgentRow>,
    /// The largest row number of an agent.
    pub agent_max: u64,
}

/// A store. Databases are named `control` and `shard-<number>`.
///
/// A write that fails with [`Error::Unknown`] may be done or not: read what it would have changed. After every other
/// error of a write it is certainly not done. A write whose future is dropped may still happen.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Makes the shard's database if it is missing, and binds it to a cluster. Asked again, answers the same.
    async fn provision(&self, database: &str, provision: &Provision) -> Result<OwnerRow, Error>;

    async fn owner(&self, database: &str) -> Result<OwnerRow, Error>;

    /// Compare-and-set of the owner row. It overtakes the commits that wait.
    async fn fence(&self, database: &str, fence: &Fence) -> Result<FenceOutcome, Error>;

    /// The whole group, flushed, or nothing of it.
    async fn commit(&self, database: &str, group: Arc<Group>) -> Result<CommitOutcome, Error>;

    /// An agent's row and an idempotency key of it, in one read.
    async fn agent(&self, database: &str, read: &ReadAgent) -> Result<AgentAnswer, Error>;

    /// Entries of an agent, newest first, by `prev`. A page is at most 1 MiB: `prev` of its last row is where to go on.
    async fn history(&self, database: &str, read: &ReadHistory) -> Result<LogPage, Error>;

    /// Of several histories as much as one page of 1 MiB holds, the newest entries of each first, in no promised order.
    /// What is missing is read by [`Store::history`].
    async fn histories(&self, database: &str, read: &ReadHistories) -> Result<LogPage, Error>;

    async fn recover(&self, database: &str) -> Result<Recovery, Error>;

    async fn work(&self, database: &str, id: u64) -> Result<Option<(WorkRow, AgentRow)>, Error>;

    /// Newest first, with their agents, which come without their states.
    async fn works(&self, database: &str, read: &ReadWorks) -> Result<WorksPage, Error>;

    /// By row number, without their states.
    async fn agents(&self, database: &str, read: &ReadAgents) -> Result<AgentsPage, Error>;

    async fn definition(&self, database: &str, hash: &[u8])
    -> Result<Option<DefinitionRow>, Error>;

    /// Deletes what is old; answers how many rows went. A bounded amount at a time: asked again, goes on.
    async fn prune(&self, database: &str, prune: &Prune) -> Result<u64, Error>;

    /// Reads the whole file; for operators.
    async fn check(&self, database: &str) -> Result<CheckAnswer, Error>;

    /// Copies the database, as of one moment, to a file in the folder `backups` of the store's data directory: a part of
    /// the backup `name`.
    async fn backup(&self, database: &str, name: &str) -> Result<(), Error>;

    /// A batch on the control database.
    async fn control(&self, batch: &ControlBatch) -> Result<ControlOutcome, Error>;

    async fn read_control(&self, read: &ReadControl) -> Result<ControlAnswer, Error>;
}
