//! The tables, their version, and the way from an older version to this one.
//!
//! Migrations are numbered, go forward only and add; a newer database than this program knows is refused.

use libsql::Value;

use crate::Error;
use crate::database::Database;
use crate::engine::{Missing, Sql, text, text_at};

/// The version that this program writes.
pub(crate) const VERSION: u32 = 2;

/// Works with a smaller state number are open. Stands in the text of the partial index and in every query that uses it.
pub(crate) const FINAL_STATE_MIN: u32 = 6;

const META: &str = "CREATE TABLE meta(k TEXT PRIMARY KEY, v TEXT NOT NULL);";

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
];
const CONTROL_MIGRATIONS: &[&str] = &[
    // What each process announced stands in rows of its own; `nodes.capabilities` stays empty from now on.
    "CREATE TABLE capabilities(node TEXT NOT NULL, number INTEGER NOT NULL, incarnation INTEGER NOT NULL,
     name TEXT NOT NULL, version INTEGER NOT NULL, capacity INTEGER NOT NULL, attributes TEXT NOT NULL,
     PRIMARY KEY(node, number));
     CREATE TABLE audit(id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
     subject TEXT NOT NULL, term INTEGER NOT NULL);
     ALTER TABLE nodes ADD COLUMN admission TEXT NOT NULL DEFAULT '';",
];
const _: () = assert!(SHARD_MIGRATIONS.len() + 1 == VERSION as usize);
const _: () = assert!(CONTROL_MIGRATIONS.len() + 1 == VERSION as usize);

/// Makes the tables, or brings them to this version. Answers whether they were made.
pub(crate) fn bring_up_to_date(
    sql: &mut Sql,
    database: Database,
    missing: Missing,
) -> Result<bool, Error> {
    let (tables, migrations) = match database {
        Database::Control => (CONTROL, CONTROL_MIGRATIONS),
        Database::Shard(_) => (SHARD, SHARD_MIGRATIONS),
    };
    let Some(found) = version(sql)? else {
        if missing == Missing::Refuse {
            return Err(Error::NotFound { what: format!("database {database}") });
        }
        create(sql, tables, migrations)?;
        return Ok(true);
    };
    if VERSION < found {
        let what =
            format!("database {database} has schema version {found}, this program knows {VERSION}");
        return Err(Error::NewerSchema { what });
    }
    for version in found..VERSION {
        sql.transaction(|sql| {
            sql.batch(migrations[version as usize - 1])?;
            set_meta(sql, "schema_version", &(version + 1).to_string())
        })?;
        tracing::info!(%database, version = version + 1, "migrated the schema");
    }
    Ok(false)
}

fn create(sql: &mut Sql, tables: &str, migrations: &[&str]) -> Result<(), Error> {
    sql.transaction(|sql| {
        sql.batch(META)?;
        sql.batch(tables)?;
        migrations.iter().try_for_each(|step| sql.batch(step))?;
        set_meta(sql, "schema_version", &VERSION.to_string())?;
        set_meta(sql, "database_id", &uuid::Uuid::new_v4().to_string())
    })
}

/// The schema version; none if there are no tables yet, also when their making was cut off.
fn version(sql: &mut Sql) -> Result<Option<u32>, Error> {
    let tables = "SELECT count(*) FROM sqlite_schema WHERE name = 'meta'";
    if sql.number(tables, Vec::new())? == 0 {
        return Ok(None);
    }
    let found = meta(sql, "schema_version")?.and_then(|text| text.parse().ok());
    let what = || format!("{}: its schema version", sql.name());
    found.map(Some).ok_or_else(|| Error::Corrupt { what: what() })
}

pub(crate) fn meta(sql: &mut Sql, key: &str) -> Result<Option<String>, Error> {
    sql.row("SELECT v FROM meta WHERE k = ?1", vec![text(key)], |row| text_at(row, 0))
}

pub(crate) fn set_meta(sql: &mut Sql, key: &str, value: &str) -> Result<(), Error> {
    let params: Vec<Value> = vec![text(key), text(value)];
    sql.execute("INSERT OR REPLACE INTO meta(k, v) VALUES(?1, ?2)", params).map(drop)
}
