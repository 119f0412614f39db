//! Puts a backup in the place of what a data directory holds. No store may use the directory meanwhile.
//!
//! Whoever wrote to the databases that are replaced must not write to the restored ones: each gets a new id, a much later
//! epoch without an owner, and goes on far behind the last number of its log, so that no work that the backup lacks
//! shares its id with a later one. What is replaced is kept beside it; a restore that is cut off is done again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use domain::entry::Entry;
use domain::{Incarnation, Member};
use proto::journal;
use proto::link::read_control::Read;
use proto::link::{ReadControl, ReadShards};

use crate::Error;
use crate::database::Database;
use crate::engine::{Access, Directory, Missing, Sql, flush_directory};
use crate::schema::{self, PUT_META};
use crate::statement::{Batch, Found, Query, Sink, Statement, Stop, Value, blob, number, text};

/// More ownerships, and leaderships, than can have come after the backup was made.
const EPOCHS_AHEAD: u64 = 1_000_000;
/// More rows than can have been written after it.
const ROWS_AHEAD: u64 = 1 << 32;
const PARTS: &str = ".restoring";

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// `control` and the shards.
    pub databases: Vec<String>,
    /// The folder with what was there before; none if nothing was.
    pub replaced: Option<PathBuf>,
    /// Of these what was there before could not be read: works that it had after the backup may share their ids with later
    /// ones, if it was itself an earlier restore of this backup.
    pub unread: Vec<String>,
}

/// Restores the backup of this name, which `backup` has put into the folder `backups` of the data directory.
///
/// # Errors
/// A store uses the directory; the backup is missing or incomplete, or a file of it is damaged. Then nothing was replaced.
pub fn restore(data_dir: &Path, backup: &str) -> Result<Restored, Error> {
    let directory = Directory::open_to_restore(data_dir)?;
    let found = files(&directory, backup)?;
    let parts = directory.file(PARTS);
    if parts.exists() {
        fs::remove_dir_all(&parts).map_err(|error| Error::file("remove", &parts, error))?;
    }
    fs::create_dir(&parts).map_err(|error| Error::file("create", &parts, error))?;
    let (mut shards, mut unread) = (Vec::new(), Vec::new());
    for (database, file) in &found {
        let part = parts.join(database.file_name());
        let before = last_of(*database, &directory.file(&database.file_name()));
        let before = before.unwrap_or_else(|_| {
            unread.push(database.to_string());
            Last::default()
        });
        shards.extend(prepare(*database, file, &part, before)?);
    }
    let is_there = |name: &String| found.iter().any(|(database, _)| database.to_string() == *name);
    if let Some(missing) = shards.iter().find(|name| !is_there(name)) {
        let what = format!("backup {backup:?} is not complete: it has no database {missing}");
        return Err(Error::invalid(what));
    }
    let replaced = directory.replace(&parts, &now_ms().to_string())?;
    let databases = found.iter().map(|(database, _)| database.to_string()).collect();
    Ok(Restored { databases, replaced, unread })
}

/// The name of the file that holds a database of a backup.
pub(crate) fn file_of(backup: &str, database: &str) -> String {
    format!("{backup}.{database}.db")
}

fn files(directory: &Directory, backup: &str) -> Result<Vec<(Database, PathBuf)>, Error> {
    let mut found = Vec::new();
    for file in directory.backups()? {
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned());
        let database = name.as_deref().and_then(|name| {
            name.strip_prefix(backup)?.strip_prefix('.')?.strip_suffix(".db")?.parse().ok()
        });
        found.extend(database.map(|database: Database| (database, file)));
    }
    match found.iter().any(|(database, _)| *database == Database::Control) {
        true => Ok(found),
        false => Err(Error::NotFound { what: format!("a backup named {backup:?}") }),
    }
}

/// Copies a database and disowns it. Answers which databases it names, if it is the control database.
fn prepare(database: Database, from: &Path, to: &Path, before: Last) -> Result<Vec<String>, Error> {
    fs::copy(from, to).map_err(|error| Error::file("copy to", to, error))?;
    let mut sql = Sql::open(to, &database.to_string(), Access::ReadWrite)?;
    schema::bring_up_to_date(&mut sql, database, Missing::Refuse)?;
    sql.write(&Disown { database, before, now_ms: now_ms() })?;
    let named = match database {
        Database::Shard(_) => Vec::new(),
        Database::Control => {
            let shards = ReadControl { read: Some(Read::Shards(ReadShards {})) };
            sql.read(&shards)?.shards.into_iter().map(|shard| shard.database).collect()
        }
    };
    drop(sql);
    let flushed = fs::File::open(to).and_then(|file| file.sync_all());
    flushed.map_err(|error| Error::file("flush", to, error))?;
    to.parent().map_or(Ok(()), flush_directory)?;
    Ok(named)
}

/// How far a database has come.
#[derive(Clone, Copy, Debug, Default)]
struct Last {
    /// Of the control database its term.
    epoch: u64,
    lsn: u64,
}

/// Of what is replaced, which may be an earlier restore of the same backup. What cannot be read is no obstacle: it is why a
/// backup is restored.
fn last_of(database: Database, file: &Path) -> Result<Last, Error> {
    if !file.exists() {
        return Ok(Last::default());
    }
    Sql::open(file, &database.to_string(), Access::ReadWrite)?.read(&ReadLast(database))
}

struct ReadLast(Database);

impl Query for ReadLast {
    type Answer = Last;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let texts = match self.0 {
            Database::Control => ["SELECT term FROM leader", "SELECT 0"],
            Database::Shard(_) => {
                ["SELECT epoch FROM owner", "SELECT coalesce(max(lsn), 0) FROM log"]
            }
        };
        Ok(texts.map(|text| Statement::new(text, Vec::new())).into())
    }

    fn answer(&self, found: &mut Found) -> Result<Last, Error> {
        Ok(Last { epoch: found.number()?, lsn: found.number()? })
    }
}

struct Disown {
    database: Database,
    /// What it replaces.
    before: Last,
    now_ms: i64,
}

impl Batch for Disown {
    type Answer = ();

    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop> {
        sink.run(PUT_META, vec![text("database_id"), text(&uuid::Uuid::new_v4().to_string())])?;
        match self.database {
            Database::Control => {
                // Who restores may have other certificates than who made the backup.
                sink.run("UPDATE cluster SET authorities = ''", Vec::new())?;
                sink.run(NEXT_TERM, vec![number(EPOCHS_AHEAD)?, number(self.before.epoch)?])
            }
            Database::Shard(_) => {
                sink.run(NEXT_EPOCH, vec![number(EPOCHS_AHEAD)?, number(self.before.epoch)?])?;
                let name = "restore".parse().map_err(|_| Error::invalid("a name"))?;
                let incarnation = Incarnation(self.now_ms.unsigned_abs());
                let entry = Entry::ShardOpened(Member { name, incarnation });
                let params = vec![
                    number(ROWS_AHEAD)?,
                    Value::Integer(entry.kind().into()),
                    Value::Integer(self.now_ms),
                    blob(&journal::encode(&entry)),
                    number(self.before.lsn)?,
                ];
                sink.run(NEXT_ROW, params)
            }
        }
    }

    fn answer(&self, _: &mut Found) -> Result<(), Error> {
        Ok(())
    }
}

const NEXT_TERM: &str = "UPDATE leader SET name = '', term = max(term, ?2) + ?1, beat = beat + 1";
const NEXT_EPOCH: &str = "UPDATE owner SET epoch = max(epoch, ?2) + ?1, node = '', incarnation = 0";
/// A shard that has no row yet has no work either.
const NEXT_ROW: &str = "INSERT INTO log SELECT max(last, ?5) + ?1, 0, 0, 0, 0, (SELECT epoch FROM owner), ?2, ?3, ?4 \
    FROM (SELECT coalesce(max(lsn), 0) AS last FROM log) WHERE 0 < max(last, ?5)";

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
