//! What is read from a shard's database.

use std::collections::BTreeSet;

use libsql::Row;
use prost::Message;
use proto::link::{
    AgentAnswer, AgentRow, AgentsPage, CheckAnswer, DedupRow, DefinitionRow, LogPage, LogRow, Mark,
    OwnerRow, ReadAgent, ReadAgents, ReadHistory, ReadWorks, TailRow, WorkRow, WorksPage,
};

use crate::engine::{More, Sql, blob, blob_at, i64_at, number, text, text_at, u32_at, u64_at};
use crate::schema::{self, meta};
use crate::{Error, PAGE_BYTES_MAX, Recovery};

const LIMIT_DEFAULT: u32 = 200;
const LIMIT_MAX: u32 = 10_000;

/// How many rows a reader gets at most: what it asked for, within reason.
pub(crate) fn limit(asked: u32) -> usize {
    let limit = if asked == 0 { LIMIT_DEFAULT } else { asked.min(LIMIT_MAX) };
    limit as usize
}

pub(crate) fn owner(sql: &mut Sql) -> Result<OwnerRow, Error> {
    let row = sql.row(
        "SELECT epoch, node, incarnation, term, (SELECT ifnull(max(lsn), 0) FROM log), \
         (SELECT v FROM meta WHERE k = 'database_id') FROM owner",
        Vec::new(),
        |row| {
            Ok(OwnerRow {
                epoch: u64_at(row, 0)?,
                node: text_at(row, 1)?,
                incarnation: u64_at(row, 2)?,
                term: u64_at(row, 3)?,
                head: u64_at(row, 4)?,
                database_id: text_at(row, 5)?,
            })
        },
    )?;
    row.ok_or_else(|| Error::Corrupt { what: format!("{}: its owner row", sql.name()) })
}

/// An agent's row and an idempotency key of it, in one statement.
pub(crate) fn agent(sql: &mut Sql, asked: &ReadAgent) -> Result<AgentAnswer, Error> {
    let read = |row: &Row| {
        let work = u64_at(row, 8)?;
        let dedup = DedupRow {
            agent: u64_at(row, 0)?,
            key: asked.idempotency_key.clone(),
            work,
            input_hash: blob_at(row, 9)?,
            expires_ms: i64_at(row, 10)?,
        };
        let dedup = (work != 0).then_some(dedup);
        Ok(AgentAnswer { agent: Some(agent_at(row, 0)?), dedup, epoch: 0 })
    };
    let key = text(&asked.idempotency_key);
    let found = if asked.id == 0 {
        let params = vec![text(&asked.tenant), text(&asked.name), text(&asked.key), key];
        sql.row(
            "SELECT a.id, a.tenant, a.name, a.key, a.head, a.snap_lsn, a.last_work, a.state, \
             d.work, d.input_hash, d.expires_ms FROM agent a \
             LEFT JOIN dedup d ON d.agent = a.id AND d.key = ?4 \
             WHERE a.tenant = ?1 AND a.name = ?2 AND a.key = ?3",
            params,
            read,
        )
    } else {
        sql.row(
            "SELECT a.id, a.tenant, a.name, a.key, a.head, a.snap_lsn, a.last_work, a.state, \
             d.work, d.input_hash, d.expires_ms FROM agent a \
             LEFT JOIN dedup d ON d.agent = a.id AND d.key = ?2 WHERE a.id = ?1",
            vec![number(asked.id)?, key],
            read,
        )
    };
    let found = found?.unwrap_or_default();
    Ok(AgentAnswer { epoch: epoch(sql)?, ..found })
}

/// The epoch of the owner row, for readers that must know whether they still own what they have read.
fn epoch(sql: &mut Sql) -> Result<u64, Error> {
    let found = sql.row("SELECT epoch FROM owner", Vec::new(), |row| u64_at(row, 0))?;
    found.ok_or_else(|| Error::Corrupt { what: format!("{}: its owner row", sql.name()) })
}

/// Follows `prev`, newest first; one page.
pub(crate) fn history(sql: &mut Sql, asked: &ReadHistory) -> Result<LogPage, Error> {
    sql.snapshot(|sql| {
        let mut page = LogPage::default();
        let (mut next, mut bytes) = (asked.from, 0);
        while asked.above < next && page.rows.len() < limit(asked.limit) && bytes < PAGE_BYTES_MAX {
            let Some(row) = log_row(sql, next)? else {
                page.truncated = true;
                break;
            };
            if next <= row.prev {
                return Err(Error::Corrupt {
                    what: format!("{}: row {next} of the log", sql.name()),
                });
            }
            next = row.prev;
            bytes += row.encoded_len();
            page.rows.push(row);
        }
        page.epoch = epoch(sql)?;
        Ok(page)
    })
}

fn log_row(sql: &mut Sql, lsn: u64) -> Result<Option<LogRow>, Error> {
    sql.row(
        "SELECT lsn, agent, prev, seq, work, epoch, kind, ts_ms, payload FROM log WHERE lsn = ?1",
        vec![number(lsn)?],
        |row| {
            Ok(LogRow {
                lsn: u64_at(row, 0)?,
                agent: u64_at(row, 1)?,
                prev: u64_at(row, 2)?,
                seq: u64_at(row, 3)?,
                work: u64_at(row, 4)?,
                epoch: u64_at(row, 5)?,
                kind: u32_at(row, 6)?,
                ts_ms: i64_at(row, 7)?,
                payload: blob_at(row, 8)?,
            })
        },
    )
}

/// Everything that a new owner needs before it opens the shard, of one moment.
pub(crate) fn recover(sql: &mut Sql) -> Result<Recovery, Error> {
    sql.snapshot(|sql| {
        let mark = mark(sql)?;
        let after = vec![number(mark.lsn)?];
        let tail = sql.rows("SELECT lsn, agent FROM log WHERE lsn > ?1 ORDER BY lsn", after, |row| {
            Ok(TailRow { lsn: u64_at(row, 0)?, agent: u64_at(row, 1)? })
        })?;
        let open = sql.rows(
            "SELECT id, agent, prev_work, slot, state, reason, create_ms, end_ms, definition, record \
             FROM work WHERE state < 6 ORDER BY id",
            Vec::new(),
            |row| work_at(row, 0),
        )?;
        let ids: BTreeSet<u64> = open.iter().map(|work| work.agent).collect();
        let mut agents = Vec::with_capacity(ids.len());
        for id in ids {
            agents.extend(agent_by_id(sql, id)?);
        }
        let agent_max = sql.number("SELECT ifnull(max(id), 0) FROM agent", Vec::new())?;
        Ok(Recovery { owner: owner(sql)?, mark, tail, open, agents, agent_max })
    })
}

fn mark(sql: &mut Sql) -> Result<Mark, Error> {
    let found = sql.row("SELECT lsn, heads FROM mark", Vec::new(), |row| {
        Ok((u64_at(row, 0)?, blob_at(row, 1)?))
    })?;
    let Some((lsn, heads)) = found else { return Ok(Mark::default()) };
    let damaged = |_| Error::Corrupt { what: format!("{}: its mark", sql.name()) };
    Ok(Mark { lsn, ..Mark::decode(heads).map_err(damaged)? })
}

pub(crate) fn work(sql: &mut Sql, id: u64) -> Result<Option<(WorkRow, AgentRow)>, Error> {
    sql.row(
        "SELECT w.id, w.agent, w.prev_work, w.slot, w.state, w.reason, w.create_ms, w.end_ms, w.definition, \
         w.record, a.id, a.tenant, a.name, a.key, a.head, a.snap_lsn, a.last_work, a.state \
         FROM work w JOIN agent a ON a.id = w.agent WHERE w.id = ?1",
        vec![number(id)?],
        |row| Ok((work_at(row, 0)?, agent_at(row, 10)?)),
    )
}

/// Works of a tenant or of an agent, newest first, with their agents (without states).
pub(crate) fn works(sql: &mut Sql, asked: &ReadWorks) -> Result<WorksPage, Error> {
    sql.snapshot(|sql| {
        let mut page = Page::new(asked.limit);
        let below = if asked.below == 0 { i64::MAX as u64 } else { asked.below };
        let mut works = Vec::new();
        if asked.agent == 0 {
            let params = vec![text(&asked.tenant), number(below)?];
            sql.each(WORKS_OF_TENANT, params, |row| {
                let work = work_at(row, 0)?;
                Ok(page.take(work.encoded_len(), || works.push(work)))
            })?;
        } else {
            works_of_agent(sql, asked.agent, below, &mut page, &mut works)?;
        }
        let ids: BTreeSet<u64> = works.iter().map(|work| work.agent).collect();
        let mut agents = Vec::with_capacity(ids.len());
        for id in ids {
            agents.extend(agent_without_state(sql, id)?);
        }
        Ok(WorksPage { works, agents })
    })
}

const WORKS_OF_TENANT: &str = "SELECT w.id, w.agent, w.prev_work, w.slot, w.state, w.reason, w.create_ms, w.end_ms, \
    w.definition, w.record FROM work w JOIN agent a ON a.id = w.agent \
    WHERE a.tenant = ?1 AND w.id < ?2 ORDER BY w.id DESC";

/// An agent's row may be older than its newest work, but by no more than lies after the last mark, or is open.
const NEWEST_WORK: &str = "SELECT max(id) FROM (\
    SELECT last_work AS id FROM agent WHERE id = ?1 \
    UNION ALL SELECT max(id) FROM work WHERE agent = ?1 AND state < 6 \
    UNION ALL SELECT max(id) FROM (SELECT id, agent FROM work ORDER BY id DESC LIMIT 50000) WHERE agent = ?1)";

fn works_of_agent(
    sql: &mut Sql,
    agent: u64,
    below: u64,
    page: &mut Page,
    works: &mut Vec<WorkRow>,
) -> Result<(), Error> {
    let mut next = sql.number(NEWEST_WORK, vec![number(agent)?])?;
    while next != 0 {
        let found = sql.row(
            "SELECT id, agent, prev_work, slot, state, reason, create_ms, end_ms, definition, record \
             FROM work WHERE id = ?1",
            vec![number(next)?],
            |row| work_at(row, 0),
        )?;
        // Pruned: so is everything before it.
        let Some(work) = found.filter(|work| work.prev_work < work.id) else { break };
        next = work.prev_work;
        if work.id < below && page.take(work.encoded_len(), || works.push(work)) == More::No {
            break;
        }
    }
    Ok(())
}

/// Agents of a tenant by row number, without their states.
pub(crate) fn agents(sql: &mut Sql, asked: &ReadAgents) -> Result<AgentsPage, Error> {
    let mut page = Page::new(asked.limit);
    let mut agents = Vec::new();
    let params = vec![text(&asked.tenant), number(asked.above)?];
    sql.each(
        "SELECT id, tenant, name, key, head, snap_lsn, last_work, NULL FROM agent \
         WHERE tenant = ?1 AND id > ?2 ORDER BY id",
        params,
        |row| {
            let agent = agent_at(row, 0)?;
            Ok(page.take(agent.encoded_len(), || agents.push(agent)))
        },
    )?;
    Ok(AgentsPage { agents })
}

pub(crate) fn definition(sql: &mut Sql, hash: &[u8]) -> Result<Option<DefinitionRow>, Error> {
    sql.row("SELECT hash, body FROM definition WHERE hash = ?1", vec![blob(hash)], |row| {
        Ok(DefinitionRow { hash: blob_at(row, 0)?, body: blob_at(row, 1)? })
    })
}

/// Also reads every page of the file.
pub(crate) fn check(sql: &mut Sql) -> Result<CheckAnswer, Error> {
    let found = sql.rows("PRAGMA quick_check(10)", Vec::new(), |row| text_at(row, 0))?;
    let schema = meta(sql, "schema_version")?.and_then(|text| text.parse().ok());
    Ok(CheckAnswer {
        schema: schema.unwrap_or(schema::VERSION),
        database_id: meta(sql, "database_id")?.unwrap_or_default(),
        // Asked of the connection that writes, when it was opened: with another value it is refused.
        synchronous: 2,
        engine: format!("libsql files, SQLite {}", libsql::version()),
        integrity: found.join("; "),
    })
}

/// One page of an answer: bounded in rows and bytes, never empty because of one large row.
pub(crate) struct Page {
    rows_left: usize,
    bytes_left: usize,
}

impl Page {
    pub(crate) fn new(asked: u32) -> Self {
        Self { rows_left: limit(asked), bytes_left: PAGE_BYTES_MAX }
    }

    /// Takes a row; answers whether there is room for another one.
    pub(crate) fn take(&mut self, bytes: usize, take: impl FnOnce()) -> More {
        take();
        self.rows_left = self.rows_left.saturating_sub(1);
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
        if self.rows_left == 0 || self.bytes_left == 0 { More::No } else { More::Yes }
    }
}

fn agent_by_id(sql: &mut Sql, id: u64) -> Result<Option<AgentRow>, Error> {
    sql.row(
        "SELECT id, tenant, name, key, head, snap_lsn, last_work, state FROM agent WHERE id = ?1",
        vec![number(id)?],
        |row| agent_at(row, 0),
    )
}

fn agent_without_state(sql: &mut Sql, id: u64) -> Result<Option<AgentRow>, Error> {
    sql.row(
        "SELECT id, tenant, name, key, head, snap_lsn, last_work, NULL FROM agent WHERE id = ?1",
        vec![number(id)?],
        |row| agent_at(row, 0),
    )
}

fn agent_at(row: &Row, first: i32) -> Result<AgentRow, libsql::Error> {
    Ok(AgentRow {
        id: u64_at(row, first)?,
        tenant: text_at(row, first + 1)?,
        name: text_at(row, first + 2)?,
        key: text_at(row, first + 3)?,
        head: u64_at(row, first + 4)?,
        snap_lsn: u64_at(row, first + 5)?,
        last_work: u64_at(row, first + 6)?,
        state: blob_at(row, first + 7)?,
    })
}

fn work_at(row: &Row, first: i32) -> Result<WorkRow, libsql::Error> {
    Ok(WorkRow {
        id: u64_at(row, first)?,
        agent: u64_at(row, first + 1)?,
        prev_work: u64_at(row, first + 2)?,
        slot: u32_at(row, first + 3)?,
        state: u32_at(row, first + 4)?,
        reason: u32_at(row, first + 5)?,
        create_ms: i64_at(row, first + 6)?,
        end_ms: i64_at(row, first + 7)?,
        definition: blob_at(row, first + 8)?,
        record: blob_at(row, first + 9)?,
    })
}

/// The value of a number that is used in SQL text must not drift from the schema's.
const _: () = assert!(schema::FINAL_STATE_MIN == 6);
