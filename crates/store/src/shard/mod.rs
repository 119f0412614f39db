//! What a shard's database does: provision, fence, commit. Its reads are in [`read`], its housekeeping in [`prune`].
//!
//! The SQL of shards stands here and nowhere else. Runs on a thread of the engine, inside one transaction each.

pub(crate) mod prune;
pub(crate) mod read;

use std::sync::LazyLock;

use domain::ShardId;
use libsql::Value;
use prost::Message;
use proto::link::{
    AgentRow, DedupRow, DefinitionRow, Fence, Group, LogRow, Mark, OwnerRow, Provision, WorkEnd,
    WorkRow,
};

use crate::engine::{Sql, blob, number, text};
use crate::schema::{self, meta, set_meta};
use crate::{CommitOutcome, Error, FenceOutcome};

pub(crate) fn provision(
    sql: &mut Sql,
    shard: ShardId,
    wanted: &Provision,
) -> Result<OwnerRow, Error> {
    if wanted.shard != shard.0 {
        let what = format!("database {} cannot hold shard {}", sql.name(), wanted.shard);
        return Err(Error::invalid(what));
    }
    if wanted.cluster_id.is_empty() {
        return Err(Error::invalid("a shard is provisioned for a cluster: cluster_id is empty"));
    }
    sql.transaction(|sql| {
        match meta(sql, "cluster_id")? {
            Some(held) if held == wanted.cluster_id => {}
            Some(held) => {
                let (name, asked) = (sql.name(), &wanted.cluster_id);
                let what = format!(
                    "database {name} belongs to cluster {held}, not {asked}; choose another store"
                );
                return Err(Error::ForeignCluster { what });
            }
            None => {
                set_meta(sql, "cluster_id", &wanted.cluster_id)?;
                set_meta(sql, "shard", &shard.to_string())?;
            }
        }
        read::owner(sql)
    })
}

/// Compare-and-set of the owner row. Asking again for what was granted already is granted again.
pub(crate) fn fence(sql: &mut Sql, wanted: &Fence) -> Result<FenceOutcome, Error> {
    sql.transaction(|sql| {
        let params = vec![
            number(wanted.expected)?,
            text(&wanted.node),
            number(wanted.incarnation)?,
            number(wanted.term)?,
        ];
        let changed = sql.execute(
            "UPDATE owner SET epoch = epoch + 1, node = ?2, incarnation = ?3, term = ?4 \
             WHERE epoch = ?1 AND term <= ?4",
            params,
        )?;
        let row = read::owner(sql)?;
        assert!(
            changed == 0 || row.epoch == wanted.expected + 1,
            "a fence raises the epoch by one"
        );
        Ok(FenceOutcome::of(wanted, row))
    })
}

/// Which guard of a batch fired, told by the name of its constraint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    Fenced,
    Head,
}

enum Failed {
    Guard(Guard),
    Error(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The whole group, or nothing of it.
pub(crate) fn commit(sql: &mut Sql, group: &Group) -> Result<CommitOutcome, Error> {
    check(group)?;
    let mut fired = None;
    let result = sql.transaction(|sql| match write(sql, group) {
        Ok(()) => Ok(()),
        Err(Failed::Error(error)) => Err(error),
        Err(Failed::Guard(guard)) => {
            fired = Some(guard);
            Err(Error::invalid("a guard fired"))
        }
    });
    match fired {
        None => result.map(|()| CommitOutcome::Committed),
        Some(guard) => {
            let row = read::owner(sql)?;
            Ok(match guard {
                Guard::Fenced => CommitOutcome::Fenced { epoch: row.epoch },
                Guard::Head => CommitOutcome::HeadMismatch { head: row.head },
            })
        }
    }
}

/// The rows of a group follow its head without a gap, so that `max(lsn)` alone says what is committed.
fn check(group: &Group) -> Result<(), Error> {
    for (expected, row) in (group.head + 1..).zip(&group.rows) {
        if row.lsn != expected {
            let found = row.lsn;
            return Err(Error::invalid(format!("row {found} stands where row {expected} belongs")));
        }
    }
    Ok(())
}

fn write(sql: &mut Sql, group: &Group) -> Result<(), Failed> {
    guard(sql, group)?;
    insert_log(sql, group)?;
    sql.execute_each(UPSERT_AGENT, group.agents.iter().map(agent_values))?;
    sql.execute_each(UPSERT_WORK, group.works.iter().map(work_values))?;
    for end in &group.ends {
        if sql.execute(END_WORK, end_values(end)?)? != 1 {
            return Err(
                Error::invalid(format!("work {} cannot end: it does not exist", end.id)).into()
            );
        }
    }
    sql.execute_each(UPSERT_DEDUP, group.dedups.iter().map(dedup_values))?;
    sql.execute_each(INSERT_DEFINITION, group.definitions.iter().map(definition_values))?;
    if let Some(mark) = &group.mark {
        let heads = Mark { lsn: 0, heads: mark.heads.clone() }.encode_to_vec();
        sql.execute(PUT_MARK, vec![number(mark.lsn)?, Value::Blob(heads)])?;
    }
    Ok(())
}

/// Several rows a statement: a fifth cheaper than one by one.
fn insert_log(sql: &mut Sql, group: &Group) -> Result<(), Error> {
    let (chunks, rest) = group.rows.as_chunks::<LOG_CHUNK>();
    let values = |rows: &[LogRow]| -> Result<Vec<Value>, Error> {
        let mut values = Vec::with_capacity(rows.len() * LOG_COLUMNS);
        for row in rows {
            values.extend(log_values(row, group.epoch)?);
        }
        Ok(values)
    };
    sql.execute_each(&INSERT_LOG_CHUNK, chunks.iter().map(|rows| values(rows)))?;
    sql.execute_each(INSERT_LOG, rest.chunks(1).map(values))
}

pub(crate) const GUARD_EPOCH: &str =
    "INSERT INTO fenced SELECT 'stale' WHERE NOT EXISTS(SELECT 1 FROM owner WHERE epoch = ?1)";
const GUARD_HEAD: &str =
    "INSERT INTO head SELECT 'moved' WHERE (SELECT ifnull(max(lsn), 0) FROM log) <> ?1";

fn guard(sql: &mut Sql, group: &Group) -> Result<(), Failed> {
    let guards = [
        (GUARD_EPOCH, "fenced", Guard::Fenced, group.epoch),
        (GUARD_HEAD, "head", Guard::Head, group.head),
    ];
    for (statement, name, guard, value) in guards {
        if !passes(sql, statement, name, vec![number(value)?])? {
            return Err(Failed::Guard(guard));
        }
    }
    Ok(())
}

/// Runs a guard: a statement that violates the constraint `name` exactly when the batch must not happen.
pub(crate) fn passes(
    sql: &mut Sql,
    statement: &'static str,
    name: &str,
    params: Vec<Value>,
) -> Result<bool, Error> {
    match sql.try_execute(statement, params) {
        Ok(_) => Ok(true),
        Err(libsql::Error::SqliteFailure(_, text))
            if text == format!("CHECK constraint failed: {name}") =>
        {
            Ok(false)
        }
        Err(error) => Err(Error::of_sqlite(sql.name(), error)),
    }
}

const LOG_COLUMNS: usize = 9;
const LOG_CHUNK: usize = 16;
const INSERT_LOG: &str = "INSERT INTO log VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)";
static INSERT_LOG_CHUNK: LazyLock<String> = LazyLock::new(|| {
    let row = ", (?, ?, ?, ?, ?, ?, ?, ?, ?)";
    format!("{INSERT_LOG}{}", row.repeat(LOG_CHUNK - 1))
});
const UPSERT_AGENT: &str = "INSERT INTO agent VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT(id) DO UPDATE SET \
    head = excluded.head, snap_lsn = excluded.snap_lsn, last_work = excluded.last_work, state = excluded.state";
const UPSERT_WORK: &str = "INSERT INTO work(id, agent, prev_work, slot, state, reason, create_ms, end_ms, definition, \
    record) VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) ON CONFLICT(id) DO UPDATE SET state = excluded.state, reason = excluded.reason, end_ms = excluded.end_ms, record = excluded.record";
const END_WORK: &str =
    "UPDATE work SET state = ?2, reason = ?3, end_ms = ?4, record = ?5 WHERE id = ?1";
const UPSERT_DEDUP: &str = "INSERT INTO dedup VALUES(?1, ?2, ?3, ?4, ?5) ON CONFLICT(agent, key) DO UPDATE SET \
    work = excluded.work, input_hash = excluded.input_hash, expires_ms = excluded.expires_ms";
const INSERT_DEFINITION: &str = "INSERT OR IGNORE INTO definition VALUES(?1, ?2)";
const PUT_MARK: &str = "INSERT OR REPLACE INTO mark VALUES(1, ?1, ?2)";

fn log_values(row: &LogRow, epoch: u64) -> Result<[Value; LOG_COLUMNS], Error> {
    Ok([
        number(row.lsn)?,
        number(row.agent)?,
        number(row.prev)?,
        number(row.seq)?,
        number(row.work)?,
        number(epoch)?,
        Value::Integer(row.kind.into()),
        Value::Integer(row.ts_ms),
        blob(&row.payload),
    ])
}

fn agent_values(row: &AgentRow) -> Result<Vec<Value>, Error> {
    Ok(vec![
        number(row.id)?,
        text(&row.tenant),
        text(&row.name),
        text(&row.key),
        number(row.head)?,
        number(row.snap_lsn)?,
        number(row.last_work)?,
        blob(&row.state),
    ])
}

fn work_values(row: &WorkRow) -> Result<Vec<Value>, Error> {
    Ok(vec![
        number(row.id)?,
        number(row.agent)?,
        number(row.prev_work)?,
        Value::Integer(row.slot.into()),
        Value::Integer(row.state.into()),
        Value::Integer(row.reason.into()),
        Value::Integer(row.create_ms),
        Value::Integer(row.end_ms),
        blob(&row.definition),
        blob(&row.record),
    ])
}

fn end_values(end: &WorkEnd) -> Result<Vec<Value>, Error> {
    if end.state < schema::FINAL_STATE_MIN {
        return Err(Error::invalid(format!("state {} of work {} is not final", end.state, end.id)));
    }
    Ok(vec![
        number(end.id)?,
        Value::Integer(end.state.into()),
        Value::Integer(end.reason.into()),
        Value::Integer(end.end_ms),
        blob(&end.record),
    ])
}

fn dedup_values(row: &DedupRow) -> Result<Vec<Value>, Error> {
    Ok(vec![
        number(row.agent)?,
        text(&row.key),
        number(row.work)?,
        blob(&row.input_hash),
        Value::Integer(row.expires_ms),
    ])
}

fn definition_values(row: &DefinitionRow) -> Result<Vec<Value>, Error> {
    Ok(vec![blob(&row.hash), blob(&row.body)])
}
