//! The tables, their version, and the way from an older version to this one.
//!
//! Migrations are numbered, go forward only and add; a newer database than this program knows is refused.

use crate::Error;
use crate::database::Database;
use crate::engine::{Missing, Sql};
use crate::statement::{Batch, Found, Guard, Query, Row, Sink, Statement, Stop, text};

/// The version that this program writes.
pub(crate) const VERSION: u32 = 4;

/// Works with a smaller state number are open. Stands in the text of the partial index and in every query that uses it.
pub(crate) const FINAL_STATE_MIN: u32 = 6;

const META_TABLE: &str = "CREATE TABLE meta(k TEXT PRIMARY KEY, v TEXT NOT NULL);";

/// `fenced` and `head` never hold a row: the name of the constraint that fails says which guard of a batch it was.
/// `log` has no second index: history follows `prev`, and an index would cost several times the write volume.
const SHARD: &str = "
CREATE TABLE owner(id INTEGER PRIMARY KEY CHECK(id = 1), epoch INTEGER NOT NULL, node TEXT NOT NULL,
    incarnation INTEGER NOT NULL, term INTEGER NOT NULL);
INSERT INTO owner VALUES(1, 0, '', 0, 0);
CREATE TABLE fenced(why TEXT, CONSTRAINT fenced CHECK(0));
CREATE TABLE head(why TEXT, CONSTRAINT head CHECK(0));
CREATE TABLE log(lsn INTEGER PRIMARY KEY, agent INTEGER NOT NULL, prev INTEGER NOT NULL, seq INTEGER NOT NULL,
    work INTEGER NOT NULL, epoch INTEGER NOT NULL, kind INTEGER NOT NULL, ts_ms INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE TABLE agent(id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, key TEXT NOT NULL,
    head INTEGER NOT NULL, snap_lsn INTEGER NOT NULL, last_work INTEGER NOT NULL, state BLOB NOT NULL,
    UNIQUE(tenant, name, key));
CREATE TABLE work(id INTEGER PRIMARY KEY, agent INTEGER NOT NULL, prev_work INTEGER NOT NULL, slot INTEGER NOT NULL,
    state INTEGER NOT NULL, reason INTEGER NOT NULL, create_ms INTEGER NOT NULL, end_ms INTEGER NOT NULL,
    definition BLOB NOT NULL, record BLOB NOT NULL);
CREATE INDEX work_open ON work(agent) WHERE state < 6;
CREATE TABLE dedup(agent INTEGER NOT NULL, key TEXT NOT NULL, work INTEGER NOT NULL, input_hash BLOB NOT NULL,
    expires_ms INTEGER NOT NULL, PRIMARY KEY(agent, key));
CREATE TABLE definition(hash BLOB PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE mark(id INTEGER PRIMARY KEY CHECK(id = 1), lsn INTEGER NOT NULL, heads BLOB NOT NULL);
";

const CONTROL: &str = "
CREATE TABLE cluster(id INTEGER PRIMARY KEY CHECK(id = 1), cluster_id TEXT NOT NULL);
CREATE TABLE leader(id INTEGER PRIMARY KEY CHECK(id = 1), name TEXT NOT NULL, term INTEGER NOT NULL,
    beat INTEGER NOT NULL);
INSERT INTO leader VALUES(1, '', 0, 0);
CREATE TABLE fenced(why TEXT, CONSTRAINT fenced CHECK(0));
CREATE TABLE nodes(name TEXT PRIMARY KEY, incarnation INTEGER NOT NULL, state TEXT NOT NULL, reason INTEGER NOT NULL,
    zone TEXT NOT NULL, address TEXT NOT NULL, capacity INTEGER NOT NULL, capabilities BLOB NOT NULL);
CREATE TABLE classes(id INTEGER PRIMARY KEY, needs TEXT NOT NULL);
INSERT INTO classes VALUES(0, '{}');
CREATE TABLE shards(shard INTEGER PRIMARY KEY, class INTEGER NOT NULL, slot_first INTEGER NOT NULL,
    slot_count INTEGER NOT NULL, store TEXT NOT NULL, location TEXT NOT NULL);
CREATE TABLE definitions(id INTEGER PRIMARY KEY, hash BLOB NOT NULL, tenant TEXT NOT NULL, name TEXT NOT NULL,
    body BLOB NOT NULL, create_ms INTEGER NOT NULL, UNIQUE(tenant, name, hash));
CREATE INDEX definitions_hash ON definitions(hash);
CREATE TABLE transition(id INTEGER PRIMARY KEY, kind TEXT NOT NULL, subject TEXT NOT NULL, before TEXT NOT NULL,
    after TEXT NOT NULL, reason INTEGER NOT NULL, cause TEXT NOT NULL, term INTEGER NOT NULL, epoch INTEGER NOT NULL,
    node TEXT NOT NULL, at_ms INTEGER NOT NULL);
CREATE INDEX transition_subject ON transition(subject, id);
CREATE INDEX transition_kind ON transition(kind, id);
";

/// The steps from version n to n + 1, for n from 1. Each adds; none changes what an older program reads. A new database
/// goes the same way from version 1.
const SHARD_MIGRATIONS: &[&str] = &[
    // `parent` is the work that delegated this one, `notify` is 1 until the parent's shard has journaled its end.
    "ALTER TABLE work ADD COLUMN parent TEXT NOT NULL DEFAULT '';
     ALTER TABLE work ADD COLUMN notify INTEGER NOT NULL DEFAULT 0;
     CREATE INDEX work_notify ON work(id) WHERE notify = 1;",
    // Nothing new in shards.
    "",
    "",
];
const CONTROL_MIGRATIONS: &[&str] = &[
    // What each process announced stands in rows of its own; `nodes.capabilities` stays empty from now on.
    "CREATE TABLE capabilities(node TEXT NOT NULL, number INTEGER NOT NULL, incarnation INTEGER NOT NULL,
     name TEXT NOT NULL, version INTEGER NOT NULL, capacity INTEGER NOT NULL, attributes TEXT NOT NULL,
     PRIMARY KEY(node, number));
     CREATE TABLE audit(id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
     subject TEXT NOT NULL, term INTEGER NOT NULL);
     ALTER TABLE nodes ADD COLUMN admission TEXT NOT NULL DEFAULT '';",
    // Whose certificates the members of the cluster have, one a line; empty until a leader says so.
    "ALTER TABLE cluster ADD COLUMN authorities TEXT NOT NULL DEFAULT '';",
    // What leaders know of a shard, whose own database may have gone back.
    "ALTER TABLE shards ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE shards ADD COLUMN standing TEXT NOT NULL DEFAULT '';",
];
const _: () = assert!(SHARD_MIGRATIONS.len() + 1 == VERSION as usize);
const _: () = assert!(CONTROL_MIGRATIONS.len() + 1 == VERSION as usize);

fn of(database: Database) -> (&'static str, &'static [&'static str]) {
    match database {
        Database::Control => (CONTROL, CONTROL_MIGRATIONS),
        Database::Shard(_) => (SHARD, SHARD_MIGRATIONS),
    }
}

/// Makes the tables.
pub(crate) struct Create {
    pub(crate) database: Database,
}

impl Batch for Create {
    type Answer = ();

    /// The first statement fails where there are tables already.
    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop> {
        let (tables, migrations) = of(self.database);
        let texts = [META_TABLE, tables].into_iter().chain(migrations.iter().copied());
        for statement in texts.flat_map(each) {
            sink.run(statement, Vec::new())?;
        }
        sink.run(PUT_META, vec![text("schema_version"), text(&VERSION.to_string())])?;
        sink.run(PUT_META, vec![text("database_id"), text(&uuid::Uuid::new_v4().to_string())])
    }

    fn answer(&self, _: &mut Found) -> Result<(), Error> {
        Ok(())
    }
}

/// From one version to the next.
pub(crate) struct Migrate {
    pub(crate) database: Database,
    pub(crate) from: u32,
}

impl Batch for Migrate {
    type Answer = ();

    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop> {
        let (_, migrations) = of(self.database);
        let (from, to) = (text(&self.from.to_string()), text(&(self.from + 1).to_string()));
        sink.guard(Guard::Schema, GUARD_SCHEMA, vec![from])?;
        for statement in each(migrations[self.from as usize - 1]) {
            sink.run(statement, Vec::new())?;
        }
        sink.run(PUT_META, vec![text("schema_version"), to])
    }

    fn answer(&self, _: &mut Found) -> Result<(), Error> {
        Ok(())
    }
}

const GUARD_SCHEMA: &str = "INSERT INTO fenced SELECT 'migrated' WHERE NOT EXISTS(SELECT 1 FROM meta WHERE k = 'schema_version' AND v = ?1)";

/// The statements of a text. No text in them has a semicolon.
fn each(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.split(';').map(str::trim).filter(|statement| !statement.is_empty())
}

/// What is to be done before a database can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    Nothing,
    Create,
    /// From this version.
    Migrate(u32),
}

/// What `found`, the version of a database, means for this program.
pub(crate) fn need(
    database: Database,
    found: Option<u32>,
    missing: Missing,
) -> Result<Need, Error> {
    match found {
        None if missing == Missing::Refuse => {
            Err(Error::NotFound { what: format!("database {database}") })
        }
        None => Ok(Need::Create),
        Some(found) if VERSION < found => {
            let what = format!(
                "database {database} has schema version {found}, this program knows {VERSION}"
            );
            Err(Error::NewerSchema { what })
        }
        Some(found) if found < VERSION => Ok(Need::Migrate(found)),
        Some(_) => Ok(Need::Nothing),
    }
}

/// Makes the tables of a file, or brings them to this version. Answers whether they were made.
pub(crate) fn bring_up_to_date(
    sql: &mut Sql,
    database: Database,
    missing: Missing,
) -> Result<bool, Error> {
    let mut made = false;
    loop {
        let found = if sql.read(&HasMeta)? { Some(sql.read(&Version)?) } else { None };
        match need(database, found, missing)? {
            Need::Nothing => return Ok(made),
            Need::Create => {
                sql.write(&Create { database })?;
                made = true;
            }
            Need::Migrate(from) => {
                sql.write(&Migrate { database, from })?;
                tracing::info!(%database, version = from + 1, "migrated the schema");
            }
        }
    }
}

/// Whether there are tables; none also when their making was cut off.
struct HasMeta;

impl Query for HasMeta {
    type Answer = bool;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let tables = "SELECT count(*) FROM sqlite_schema WHERE name = 'meta'";
        Ok(vec![Statement::new(tables, Vec::new())])
    }

    fn answer(&self, found: &mut Found) -> Result<bool, Error> {
        Ok(found.number()? != 0)
    }
}

/// The schema version of a database that has tables.
pub(crate) struct Version;

impl Query for Version {
    type Answer = u32;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        Ok(vec![Statement::new(META, vec![text("schema_version")])])
    }

    fn answer(&self, found: &mut Found) -> Result<u32, Error> {
        let version = found.row(Row::text)?.and_then(|text| text.parse().ok());
        version.ok_or_else(|| found.corrupt("its schema version"))
    }
}

/// To which cluster a shard is bound.
pub(crate) struct ClusterOf;

impl Query for ClusterOf {
    type Answer = Option<String>;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        Ok(vec![Statement::new(META, vec![text("cluster_id")])])
    }

    fn answer(&self, found: &mut Found) -> Result<Option<String>, Error> {
        found.row(Row::text)
    }
}

pub(crate) const META: &str = "SELECT v FROM meta WHERE k = ?1";
pub(crate) const PUT_META: &str = "INSERT OR REPLACE INTO meta(k, v) VALUES(?1, ?2)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_into_whole_statements() {
        for text in
            [META_TABLE, SHARD, CONTROL].iter().chain(SHARD_MIGRATIONS).chain(CONTROL_MIGRATIONS)
        {
            for statement in each(text) {
                let begins = ["CREATE ", "INSERT ", "ALTER "];
                assert!(begins.iter().any(|begin| statement.starts_with(begin)), "{statement}");
                let opened = statement.matches('(').count();
                assert_eq!(opened, statement.matches(')').count(), "{statement}");
            }
        }
    }
}
