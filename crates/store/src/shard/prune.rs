//! Deletes what is old, in slices: each is a transaction of its own, and commits go in between.
//!
//! Never deletes an entry above its agent's snapshot, an entry of an open work, or the newest row of the log, which says
//! where the log ends.

use libsql::Value;
use proto::link::Prune;

use super::{GUARD_EPOCH, passes};
use crate::engine::{Sql, i64_at, number, u64_at};
use crate::shard::read;
use crate::{Error, metrics};

/// Rows that one slice looks at, and so the most that it deletes.
const SLICE_ROWS: u64 = 5_000;

/// Where the next slice begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Rows of the log after this lsn.
    Log {
        after: u64,
    },
    /// Works with a larger id.
    Works {
        after: u64,
    },
    /// Idempotency keys.
    Keys {
        after: u64,
    },
    Done,
}

/// One slice. Answers how many rows went, and what is next.
pub(crate) fn slice(sql: &mut Sql, asked: &Prune, step: Step) -> Result<(u64, Step), Error> {
    let mut is_fenced = false;
    let done = sql.transaction(|sql| {
        if !passes(sql, GUARD_EPOCH, "fenced", vec![number(asked.epoch)?])? {
            is_fenced = true;
            return Err(Error::Fenced { epoch: 0 });
        }
        match step {
            Step::Log { after } => log(sql, asked, after),
            Step::Works { after } => works(sql, asked, after),
            Step::Keys { after } => keys(sql, asked, after),
            Step::Done => Ok((0, Step::Done)),
        }
    });
    if is_fenced {
        return Err(Error::Fenced { epoch: read::owner(sql)?.epoch });
    }
    if let Ok((rows, _)) = &done {
        metrics::PRUNED_ROWS.inc_by(*rows);
    }
    done
}

/// The ids from `first` to `last`, and the time of the oldest of them.
struct Span {
    last: u64,
    oldest_ms: i64,
}

fn span(sql: &mut Sql, statement: &'static str, after: u64) -> Result<Option<Span>, Error> {
    let params = vec![number(after)?, number(SLICE_ROWS)?];
    let span = sql.row(statement, params, |row| Ok((u64_at(row, 0)?, i64_at(row, 1)?)))?;
    Ok(span.filter(|(last, _)| *last != 0).map(|(last, oldest_ms)| Span { last, oldest_ms }))
}

fn log(sql: &mut Sql, asked: &Prune, after: u64) -> Result<(u64, Step), Error> {
    let next = Step::Works { after: 0 };
    let rows = "SELECT max(lsn), min(ts_ms) FROM (SELECT lsn, ts_ms FROM log WHERE lsn > ?1 ORDER BY lsn LIMIT ?2)";
    let Some(span) = span(sql, rows, after)? else { return Ok((0, next)) };
    // Over the limit of bytes even young entries go, the oldest first.
    let is_over = asked.log_bytes_max != 0 && asked.log_bytes_max < used_bytes(sql)?;
    if !is_over && asked.entries_before_ms <= span.oldest_ms {
        return Ok((0, next));
    }
    let before_ms = if is_over { i64::MAX } else { asked.entries_before_ms };
    let deleted = sql.execute(
        "DELETE FROM log WHERE lsn > ?1 AND lsn <= ?2 AND lsn < (SELECT max(lsn) FROM log) AND ts_ms < ?3 \
         AND (agent = 0 OR lsn <= (SELECT snap_lsn FROM agent WHERE agent.id = log.agent)) \
         AND NOT EXISTS(SELECT 1 FROM work WHERE work.id = log.work AND work.state < 6)",
        vec![number(after)?, number(span.last)?, Value::Integer(before_ms)],
    )?;
    Ok((deleted, Step::Log { after: span.last }))
}

/// Bytes of the file that hold something.
fn used_bytes(sql: &mut Sql) -> Result<u64, Error> {
    let pages = sql.number("PRAGMA page_count", Vec::new())?;
    let free = sql.number("PRAGMA freelist_count", Vec::new())?;
    let page = sql.number("PRAGMA page_size", Vec::new())?;
    Ok(pages.saturating_sub(free) * page)
}

fn works(sql: &mut Sql, asked: &Prune, after: u64) -> Result<(u64, Step), Error> {
    let next = Step::Keys { after: 0 };
    let rows = "SELECT max(id), min(create_ms) FROM (SELECT id, create_ms FROM work WHERE id > ?1 ORDER BY id LIMIT ?2)";
    let Some(span) = span(sql, rows, after)? else { return Ok((0, next)) };
    if asked.works_before_ms <= span.oldest_ms {
        return Ok((0, next));
    }
    let deleted = sql.execute(
        "DELETE FROM work WHERE id > ?1 AND id <= ?2 AND state >= 6 AND end_ms < ?3",
        vec![number(after)?, number(span.last)?, Value::Integer(asked.works_before_ms)],
    )?;
    Ok((deleted, Step::Works { after: span.last }))
}

fn keys(sql: &mut Sql, asked: &Prune, after: u64) -> Result<(u64, Step), Error> {
    let rows = "SELECT max(rowid), min(expires_ms) \
                FROM (SELECT rowid, expires_ms FROM dedup WHERE rowid > ?1 ORDER BY rowid LIMIT ?2)";
    let Some(span) = span(sql, rows, after)? else { return Ok((0, Step::Done)) };
    if asked.now_ms <= span.oldest_ms {
        return Ok((0, Step::Done));
    }
    let deleted = sql.execute(
        "DELETE FROM dedup WHERE rowid > ?1 AND rowid <= ?2 AND expires_ms < ?3",
        vec![number(after)?, number(span.last)?, Value::Integer(asked.now_ms)],
    )?;
    Ok((deleted, Step::Keys { after: span.last }))
}
