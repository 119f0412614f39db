//! What a new owner reads before it opens a shard: who owns it, the mark and the log after it, the open works and their
//! agents, each agent and work at most once.
//!
//! A file is read at once, in one moment. A server answers in pages, each with the owner row: read while that stays as it
//! is, they are of one moment, too, since only the owner writes what they hold.

use proto::link::{AgentRow, Mark, OwnerRow, TailRow, WorkRow};

use super::read::{self, OWNER, agent, owner, work};
use crate::statement::{Found, Page, Query, Statement, number};
use crate::{Error, Recovery};

/// Of each part of a recovery.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) tail: usize,
    pub(crate) works: usize,
    pub(crate) agents: usize,
}

const ALL: Sizes = Sizes { tail: usize::MAX, works: usize::MAX, agents: usize::MAX };
/// A page of tail rows is some hundred KiB; works and agents may be large, so fewer of them are asked for at once.
pub(crate) const PAGES: Sizes = Sizes { tail: 16_384, works: 256, agents: 256 };

/// The beginning of every recovery.
pub(crate) struct Start;

pub(crate) struct Started {
    pub(crate) owner: OwnerRow,
    pub(crate) mark: Mark,
    pub(crate) agent_max: u64,
}

impl Query for Start {
    type Answer = Started;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let plain = |sql| Statement::new(sql, Vec::new());
        Ok(vec![plain(OWNER), plain(MARK), plain("SELECT ifnull(max(id), 0) FROM agent")])
    }

    fn answer(&self, found: &mut Found) -> Result<Started, Error> {
        let (owner, mark) = (owner(found)?, read::mark(found)?);
        Ok(Started { owner, mark, agent_max: found.number()? })
    }
}

const MARK: &str = "SELECT lsn, heads FROM mark";

/// The log after the mark, from after this lsn.
pub(crate) struct Tail {
    pub(crate) after: u64,
    pub(crate) rows: usize,
}

impl Query for Tail {
    type Answer = (OwnerRow, Vec<TailRow>);

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let tail = "SELECT lsn, agent FROM log \
                    WHERE lsn > max(?1, ifnull((SELECT lsn FROM mark), 0)) ORDER BY lsn LIMIT ?2";
        paged(tail, self.after, self.rows)
    }

    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error> {
        let owner = owner(found)?;
        let tail = found.rows(|row| Ok(TailRow { lsn: row.u64()?, agent: row.u64()? }))?;
        Ok((owner, tail))
    }
}

/// Open works, oldest first, with larger ids than this.
pub(crate) struct Open {
    pub(crate) after: u64,
    pub(crate) rows: usize,
}

impl Query for Open {
    type Answer = (OwnerRow, Vec<WorkRow>);

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let open = "SELECT id, agent, prev_work, slot, state, reason, create_ms, end_ms, definition, record \
                    FROM work WHERE id IN (SELECT id FROM work INDEXED BY work_open WHERE state < 6 AND id > ?1 \
                    ORDER BY id LIMIT ?2) ORDER BY id";
        paged(open, self.after, self.rows)
    }

    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error> {
        Ok((owner(found)?, found.rows(work)?))
    }
}

/// The agents of the open works, with their states, with larger ids than this.
pub(crate) struct Agents {
    pub(crate) after: u64,
    pub(crate) rows: usize,
}

impl Query for Agents {
    type Answer = (OwnerRow, Vec<AgentRow>);

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let agents = "SELECT id, tenant, name, key, head, snap_lsn, last_work, state FROM agent \
                      WHERE id IN (SELECT DISTINCT agent FROM work INDEXED BY work_open WHERE state < 6 AND agent > ?1 \
                      ORDER BY agent LIMIT ?2) ORDER BY id";
        paged(agents, self.after, self.rows)
    }

    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error> {
        Ok((owner(found)?, found.rows(agent)?))
    }
}

fn paged(sql: &'static str, after: u64, rows: usize) -> Result<Vec<Statement>, Error> {
    let page = Page { rows, bytes: usize::MAX };
    Ok(vec![Statement::new(OWNER, Vec::new()), Statement::page(sql, vec![number(after)?], page)])
}

/// Everything at once.
pub(crate) struct Whole;

impl Query for Whole {
    type Answer = Recovery;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let mut statements = Start.statements()?;
        statements.extend(Tail { after: 0, rows: ALL.tail }.statements()?);
        statements.extend(Open { after: 0, rows: ALL.works }.statements()?);
        statements.extend(Agents { after: 0, rows: ALL.agents }.statements()?);
        Ok(statements)
    }

    fn answer(&self, found: &mut Found) -> Result<Recovery, Error> {
        let Started { owner, mark, agent_max } = Start.answer(found)?;
        let (_, tail) = Tail { after: 0, rows: ALL.tail }.answer(found)?;
        let (_, open) = Open { after: 0, rows: ALL.works }.answer(found)?;
        let (_, agents) = Agents { after: 0, rows: ALL.agents }.answer(found)?;
        Ok(Recovery { owner, mark, tail, open, agents, agent_max })
    }
}
