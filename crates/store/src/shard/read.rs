//! What is read from a shard's database.

use prost::Message;
use proto::link::{
    AgentAnswer, AgentRow, AgentsPage, CheckAnswer, DedupRow, DefinitionRow, LogPage, LogRow, Mark,
    OwnerRow, ReadAgent, ReadAgents, ReadHistories, ReadHistory, ReadWorks, WorkRow, WorksPage,
};

use crate::schema::{self, META};
use crate::statement::{Found, Malformed, Page, Query, Row, Statement, blob, number, text};
use crate::{Error, PAGE_BYTES_MAX};

const LIMIT_DEFAULT: u32 = 200;
const LIMIT_MAX: u32 = 10_000;
const HISTORIES_MAX: usize = 1_024;

/// How many rows a reader gets at most: what it asked for, within reason.
pub(crate) fn limit(asked: u32) -> usize {
    let limit = if asked == 0 { LIMIT_DEFAULT } else { asked.min(LIMIT_MAX) };
    limit as usize
}

/// One page of an answer: bounded in rows and bytes, never empty because of one large row.
pub(crate) fn page(asked: u32) -> Page {
    Page { rows: limit(asked), bytes: PAGE_BYTES_MAX }
}

pub(crate) struct Owner;

impl Query for Owner {
    const IS_SHORT: bool = true;

    type Answer = OwnerRow;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        Ok(vec![Statement::new(OWNER, Vec::new())])
    }

    fn answer(&self, found: &mut Found) -> Result<OwnerRow, Error> {
        owner(found)
    }
}

pub(crate) const OWNER: &str = "SELECT epoch, node, incarnation, term, (SELECT ifnull(max(lsn), 0) FROM log), \
    (SELECT v FROM meta WHERE k = 'database_id') FROM owner";

pub(crate) fn owner(found: &mut Found) -> Result<OwnerRow, Error> {
    let row = found.row(|row| {
        Ok(OwnerRow {
            epoch: row.u64()?,
            node: row.text()?,
            incarnation: row.u64()?,
            term: row.u64()?,
            head: row.u64()?,
            database_id: row.text()?,
        })
    })?;
    row.ok_or_else(|| found.corrupt("its owner row"))
}

/// The epoch of the owner row, for readers that must know whether they still own what they have read.
const EPOCH: &str = "SELECT epoch FROM owner";

fn epoch(found: &mut Found) -> Result<u64, Error> {
    found.row(Row::u64)?.ok_or_else(|| found.corrupt("its owner row"))
}

/// An agent's row and an idempotency key of it, in one statement.
impl Query for ReadAgent {
    const IS_SHORT: bool = true;

    type Answer = AgentAnswer;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let key = text(&self.idempotency_key);
        let statement = if self.id == 0 {
            let params = vec![text(&self.tenant), text(&self.name), text(&self.key), key];
            Statement::new(AGENT_BY_NAME, params)
        } else {
            Statement::new(AGENT_BY_ID, vec![number(self.id)?, key])
        };
        Ok(vec![statement, Statement::new(EPOCH, Vec::new())])
    }

    fn answer(&self, found: &mut Found) -> Result<AgentAnswer, Error> {
        let row = found.row(|row| {
            let agent = agent(row)?;
            let dedup = DedupRow {
                agent: agent.id,
                key: self.idempotency_key.clone(),
                work: row.u64()?,
                input_hash: row.blob()?,
                expires_ms: row.i64()?,
            };
            let dedup = (dedup.work != 0).then_some(dedup);
            Ok(AgentAnswer { agent: Some(agent), dedup, epoch: 0 })
        })?;
        Ok(AgentAnswer { epoch: epoch(found)?, ..row.unwrap_or_default() })
    }
}

const AGENT_BY_NAME: &str = "SELECT a.id, a.tenant, a.name, a.key, a.head, a.snap_lsn, a.last_work, a.state, \
    d.work, d.input_hash, d.expires_ms FROM agent a LEFT JOIN dedup d ON d.agent = a.id AND d.key = ?4 \
    WHERE a.tenant = ?1 AND a.name = ?2 AND a.key = ?3";
const AGENT_BY_ID: &str = "SELECT a.id, a.tenant, a.name, a.key, a.head, a.snap_lsn, a.last_work, a.state, \
    d.work, d.input_hash, d.expires_ms FROM agent a LEFT JOIN dedup d ON d.agent = a.id AND d.key = ?2 \
    WHERE a.id = ?1";

/// Follows `prev`, newest first; one page.
impl Query for ReadHistory {
    type Answer = LogPage;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let rows = number(limit(self.limit) as u64)?;
        let bytes = number(PAGE_BYTES_MAX as u64)?;
        let params = vec![number(self.from)?, number(self.above)?, rows, bytes];
        Ok(vec![Statement::new(HISTORY, params), Statement::new(EPOCH, Vec::new())])
    }

    fn answer(&self, found: &mut Found) -> Result<LogPage, Error> {
        let mut rows = found.rows(log)?;
        // The chain goes down, so this is its order, whatever the plan of the statement was.
        rows.sort_unstable_by_key(|row| std::cmp::Reverse(row.lsn));
        if let Some(row) = rows.iter().find(|row| row.lsn <= row.prev) {
            return Err(found.corrupt(&format!("row {} of the log", row.lsn)));
        }
        let next = rows.last().map_or(self.from, |row| row.prev);
        let bytes: usize = rows.iter().map(Message::encoded_len).sum();
        let is_full = limit(self.limit) <= rows.len() || PAGE_BYTES_MAX <= bytes;
        let truncated = self.above < next && !is_full;
        Ok(LogPage { rows, truncated, epoch: epoch(found)? })
    }
}

/// The chain carries no payloads; they are joined to it at the end. A row is taken to be no larger here than where it
/// is counted exactly, so that a page which ends early is not taken for a history that does.
const HISTORY: &str = "WITH RECURSIVE chain(lsn, prev, number, bytes) AS (\
    SELECT lsn, prev, 1, length(payload) FROM log WHERE lsn = ?1 AND ?2 < ?1 \
    UNION ALL SELECT l.lsn, l.prev, c.number + 1, c.bytes + length(l.payload) FROM chain c JOIN log l ON l.lsn = c.prev \
    WHERE ?2 < c.prev AND c.prev < c.lsn AND c.number < ?3 AND c.bytes < ?4) \
    SELECT l.lsn, l.agent, l.prev, l.seq, l.work, l.epoch, l.kind, l.ts_ms, l.payload \
    FROM chain c CROSS JOIN log l ON l.lsn = c.lsn";

/// Several histories, followed breadth first; one page of them all.
impl Query for ReadHistories {
    type Answer = LogPage;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        if HISTORIES_MAX < self.each.len() {
            let asked = self.each.len();
            return Err(Error::invalid(format!(
                "{asked} histories in one read are over the limit of {HISTORIES_MAX}"
            )));
        }
        let each: Vec<_> = self.each.iter().map(start).collect::<Result<_, _>>()?;
        let params = vec![text(&format!("[{}]", each.join(",")))];
        let page = Page { rows: LIMIT_MAX as usize, bytes: PAGE_BYTES_MAX };
        Ok(vec![Statement::page(HISTORIES, params, page), Statement::new(EPOCH, Vec::new())])
    }

    fn answer(&self, found: &mut Found) -> Result<LogPage, Error> {
        let rows = found.rows(log)?;
        Ok(LogPage { rows, truncated: false, epoch: epoch(found)? })
    }
}

/// Where a history begins, before which lsn it ends, and after how many rows.
fn start(of: &ReadHistory) -> Result<String, Error> {
    // Numbers that SQLite cannot hold are refused, as everywhere.
    number(of.from).and(number(of.above))?;
    Ok(format!("[{},{},{}]", of.from, of.above, limit(of.limit)))
}

const HISTORIES: &str = "WITH RECURSIVE chain(lsn, prev, above, more) AS (\
    SELECT l.lsn, l.prev, json_extract(s.value, '$[1]'), json_extract(s.value, '$[2]') - 1 \
    FROM json_each(?1) s CROSS JOIN log l ON l.lsn = json_extract(s.value, '$[0]') \
    WHERE json_extract(s.value, '$[1]') < l.lsn \
    UNION ALL SELECT l.lsn, l.prev, c.above, c.more - 1 FROM chain c CROSS JOIN log l ON l.lsn = c.prev \
    WHERE c.above < c.prev AND c.prev < c.lsn AND 0 < c.more) \
    SELECT l.lsn, l.agent, l.prev, l.seq, l.work, l.epoch, l.kind, l.ts_ms, l.payload \
    FROM chain c CROSS JOIN log l ON l.lsn = c.lsn LIMIT ?2";

fn log(row: &mut Row) -> Result<LogRow, Malformed> {
    Ok(LogRow {
        lsn: row.u64()?,
        agent: row.u64()?,
        prev: row.u64()?,
        seq: row.u64()?,
        work: row.u64()?,
        epoch: row.u64()?,
        kind: row.u32()?,
        ts_ms: row.i64()?,
        payload: row.blob()?,
    })
}

/// A work by its id, and its agent.
pub(crate) struct WorkById(pub(crate) u64);

impl Query for WorkById {
    const IS_SHORT: bool = true;

    type Answer = Option<(WorkRow, AgentRow)>;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let by_id = "SELECT w.id, w.agent, w.prev_work, w.slot, w.state, w.reason, w.create_ms, w.end_ms, \
                     w.definition, w.record, a.id, a.tenant, a.name, a.key, a.head, a.snap_lsn, a.last_work, a.state \
                     FROM work w JOIN agent a ON a.id = w.agent WHERE w.id = ?1";
        Ok(vec![Statement::new(by_id, vec![number(self.0)?])])
    }

    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error> {
        found.row(|row| Ok((work(row)?, agent(row)?)))
    }
}

/// Works of a tenant or of an agent, newest first, with their agents (without states).
impl Query for ReadWorks {
    type Answer = WorksPage;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let below = number(if self.below == 0 { i64::MAX as u64 } else { self.below })?;
        let statement = if self.agent == 0 {
            let params = vec![text(&self.tenant), below];
            Statement::page(WORKS_OF_TENANT, params, page(self.limit))
        } else {
            let params = vec![number(self.agent)?, below];
            Statement::page(WORKS_OF_AGENT, params, page(self.limit))
        };
        Ok(vec![statement])
    }

    fn answer(&self, found: &mut Found) -> Result<WorksPage, Error> {
        let rows = found.rows(|row| Ok((work(row)?, agent(row)?)))?;
        let (mut works, mut agents) = (Vec::with_capacity(rows.len()), Vec::new());
        for (work, agent) in rows {
            works.push(work);
            agents.push(agent);
        }
        works.sort_unstable_by_key(|work: &WorkRow| std::cmp::Reverse(work.id));
        agents.sort_unstable_by_key(|agent: &AgentRow| agent.id);
        agents.dedup_by_key(|agent| agent.id);
        Ok(WorksPage { works, agents })
    }
}

const WORKS_OF_TENANT: &str = "SELECT w.id, w.agent, w.prev_work, w.slot, w.state, w.reason, w.create_ms, w.end_ms, \
    w.definition, w.record, a.id, a.tenant, a.name, a.key, a.head, a.snap_lsn, a.last_work, NULL \
    FROM work w JOIN agent a ON a.id = w.agent WHERE a.tenant = ?1 AND w.id < ?2 ORDER BY w.id DESC LIMIT ?3";

/// An agent's row may be older than its newest work, but by no more than lies after the last mark, or is open. What a
/// work's `prev_work` names and is not there was pruned, and so was everything before it. The chain is followed downwards
/// and cross joins keep its order, so that nothing has to be sorted and a page can end early.
const WORKS_OF_AGENT: &str = "WITH RECURSIVE chain(id, prev, number) AS (\
    SELECT id, prev_work, id < ?2 FROM work WHERE id = (SELECT max(id) FROM (\
        SELECT last_work AS id FROM agent WHERE id = ?1 \
        UNION ALL SELECT max(id) FROM work WHERE agent = ?1 AND state < 6 \
        UNION ALL SELECT max(id) FROM (SELECT id, agent FROM work ORDER BY id DESC LIMIT 50000) WHERE agent = ?1)) \
    UNION ALL SELECT w.id, w.prev_work, c.number + (w.id < ?2) FROM chain c JOIN work w ON w.id = c.prev \
    WHERE c.prev < c.id AND c.number < ?3) \
    SELECT w.id, w.agent, w.prev_work, w.slot, w.state, w.reason, w.create_ms, w.end_ms, \
    w.definition, w.record, a.id, a.tenant, a.name, a.key, a.head, a.snap_lsn, a.last_work, NULL \
    FROM chain c CROSS JOIN work w ON w.id = c.id CROSS JOIN agent a ON a.id = w.agent WHERE w.id < ?2 LIMIT ?3";

/// Agents of a tenant by row number, without their states.
impl Query for ReadAgents {
    type Answer = AgentsPage;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let of_tenant = "SELECT id, tenant, name, key, head, snap_lsn, last_work, NULL FROM agent \
                         WHERE tenant = ?1 AND id > ?2 ORDER BY id LIMIT ?3";
        let params = vec![text(&self.tenant), number(self.above)?];
        Ok(vec![Statement::page(of_tenant, params, page(self.limit))])
    }

    fn answer(&self, found: &mut Found) -> Result<AgentsPage, Error> {
        Ok(AgentsPage { agents: found.rows(agent)? })
    }
}

/// A definition by its hash.
pub(crate) struct DefinitionByHash(pub(crate) Vec<u8>);

impl Query for DefinitionByHash {
    const IS_SHORT: bool = true;

    type Answer = Option<DefinitionRow>;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let by_hash = "SELECT hash, body FROM definition WHERE hash = ?1";
        Ok(vec![Statement::new(by_hash, vec![blob(&self.0)])])
    }

    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error> {
        found.row(|row| Ok(DefinitionRow { hash: row.blob()?, body: row.blob()? }))
    }
}

/// Also reads every page of the database. The engine says which one it is, and how it flushes.
pub(crate) struct Check;

/// What a database says of itself.
pub(crate) struct Checked {
    pub(crate) answer: CheckAnswer,
    pub(crate) sqlite: String,
}

impl Query for Check {
    type Answer = Checked;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let plain = |sql| Statement::new(sql, Vec::new());
        Ok(vec![
            plain("PRAGMA quick_check(10)"),
            Statement::new(META, vec![text("schema_version")]),
            Statement::new(META, vec![text("database_id")]),
            plain("PRAGMA synchronous"),
            plain("SELECT sqlite_version()"),
        ])
    }

    fn answer(&self, found: &mut Found) -> Result<Checked, Error> {
        let integrity = found.rows(Row::text)?.join("; ");
        let schema = found.row(Row::text)?.and_then(|text| text.parse().ok());
        let database_id = found.row(Row::text)?.unwrap_or_default();
        let synchronous = found.row(Row::u32)?.unwrap_or(0);
        let sqlite = found.row(Row::text)?.unwrap_or_default();
        let schema = schema.unwrap_or(schema::VERSION);
        let answer =
            CheckAnswer { schema, database_id, synchronous, integrity, ..CheckAnswer::default() };
        Ok(Checked { answer, sqlite })
    }
}

pub(super) fn mark(found: &mut Found) -> Result<Mark, Error> {
    let Some((lsn, heads)) = found.row(|row| Ok((row.u64()?, row.blob()?)))? else {
        return Ok(Mark::default());
    };
    let heads = Mark::decode(heads).map_err(|_| found.corrupt("its mark"))?;
    Ok(Mark { lsn, ..heads })
}

pub(super) fn agent(row: &mut Row) -> Result<AgentRow, Malformed> {
    Ok(AgentRow {
        id: row.u64()?,
        tenant: row.text()?,
        name: row.text()?,
        key: row.text()?,
        head: row.u64()?,
        snap_lsn: row.u64()?,
        last_work: row.u64()?,
        state: row.blob()?,
    })
}

pub(super) fn work(row: &mut Row) -> Result<WorkRow, Malformed> {
    Ok(WorkRow {
        id: row.u64()?,
        agent: row.u64()?,
        prev_work: row.u64()?,
        slot: row.u32()?,
        state: row.u32()?,
        reason: row.u32()?,
        create_ms: row.i64()?,
        end_ms: row.i64()?,
        definition: row.blob()?,
        record: row.blob()?,
    })
}

/// The value of a number that is used in SQL text must not drift from the schema's.
const _: () = assert!(schema::FINAL_STATE_MIN == 6);
