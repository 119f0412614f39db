//! What a new owner reads before it opens a shard: who owns it, the mark and which agents wrote after it, the open works and
//! their agents, each agent and work at most once.
//!
//! A file is read at once, in one moment. A server answers in pages, each with the owner row: read while that stays as it
//! is, they are of one moment, too, since only the owner writes what they hold.

use proto::link::{AgentRow, OwnerRow, TailRow, WorkRow};

use super::read::{self, OWNER, agent, owner, work};
use crate::statement::{Found, Malformed, Page, Query, Row, Statement, number};
use crate::{Error, Recovery};

/// Of each part of a recovery.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) tail: usize,
    pub(crate) works: usize,
    pub(crate) agents: usize,
}

pub(crate) const ALL: Sizes = Sizes { tail: usize::MAX, works: usize::MAX, agents: usize::MAX };
/// A page of the tail is some hundred KiB; works and agents may be large, so fewer of them are asked for at once.
pub(crate) const PAGES: Sizes = Sizes { tail: 16_384, works: 256, agents: 256 };

/// The beginning of every recovery, and the first page of each part: mostly all of it.
pub(crate) struct First(pub(crate) Sizes);

/// Some of a recovery, and of which parts there may be more.
pub(crate) struct Begun {
    pub(crate) recovery: Recovery,
    pub(crate) is_full: Full,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Full {
    pub(crate) tail: bool,
    pub(crate) open: bool,
    pub(crate) agents: bool,
}

/// One page of a part.
pub(crate) struct Part<T> {
    pub(crate) owner: OwnerRow,
    pub(crate) rows: Vec<T>,
    pub(crate) is_full: bool,
}

impl Query for First {
    const IS_SHORT: bool = true;

    type Answer = Begun;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let Self(sizes) = *self;
        let plain = |sql| Statement::new(sql, Vec::new());
        Ok(vec![
            plain(OWNER),
            plain(MARK),
            plain("SELECT ifnull(max(id), 0) FROM agent"),
            page(TAIL, 0, sizes.tail)?,
            page(OPEN, 0, sizes.works)?,
            page(AGENTS, 0, sizes.agents)?,
        ])
    }

    fn answer(&self, found: &mut Found) -> Result<Begun, Error> {
        let (owner, mark, agent_max) = (owner(found)?, read::mark(found)?, found.number()?);
        let (tail, is_tail_full) = found.page(tail)?;
        let (open, is_open_full) = found.page(work)?;
        let (agents, is_agents_full) = found.page(agent)?;
        Ok(Begun {
            recovery: Recovery { owner, mark, tail, open, agents, agent_max },
            is_full: Full { tail: is_tail_full, open: is_open_full, agents: is_agents_full },
        })
    }
}

const MARK: &str = "SELECT lsn, heads FROM mark";

const TAIL: &str = "SELECT max(lsn), agent FROM log \
                    WHERE lsn > ifnull((SELECT lsn FROM mark), 0) AND agent > ?1 GROUP BY agent ORDER BY agent LIMIT ?2";

fn tail(row: &mut Row) -> Result<TailRow, Malformed> {
    Ok(TailRow { lsn: row.u64()?, agent: row.u64()? })
}

/// Where the agents stand that wrote after the mark, those with larger ids than this.
pub(crate) struct Tail {
    pub(crate) after: u64,
    pub(crate) rows: usize,
}

impl Query for Tail {
    type Answer = Part<TailRow>;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        part(TAIL, self.after, self.rows)
    }

    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error> {
        read_part(found, tail)
    }
}

const OPEN: &str = "SELECT id, agent, prev_work, slot, state, reason, create_ms, end_ms, definition, record \
                    FROM work WHERE id IN (SELECT id FROM work INDEXED BY work_open WHERE state < 6 AND id > ?1 \
                    ORDER BY id LIMIT ?2) ORDER BY id";

/// Open works, oldest first, with larger ids than this.
pub(crate) struct Open {
    pub(crate) after: u64,
    pub(crate) rows: usize,
}

impl Query for Open {
    type Answer = Part<WorkRow>;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        part(OPEN, self.after, self.rows)
    }

    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error> {
        read_part(found, work)
    }
}

const AGENTS: &str = "SELECT id, tenant, name, key, head, snap_lsn, last_work, state FROM agent \
                      WHERE id IN (SELECT DISTINCT agent FROM work INDEXED BY work_open WHERE state < 6 AND agent > ?1 \
                      ORDER BY agent LIMIT ?2) ORDER BY id";

/// The agents of the open works, with their states, with larger ids than this.
pub(crate) struct Agents {
    pub(crate) after: u64,
    pub(crate) rows: usize,
}

impl Query for Agents {
    type Answer = Part<AgentRow>;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        part(AGENTS, self.after, self.rows)
    }

    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error> {
        read_part(found, agent)
    }
}

fn page(sql: &'static str, after: u64, rows: usize) -> Result<Statement, Error> {
    Ok(Statement::page(sql, vec![number(after)?], Page { rows, bytes: usize::MAX }))
}

fn part(sql: &'static str, after: u64, rows: usize) -> Result<Vec<Statement>, Error> {
    Ok(vec![Statement::new(OWNER, Vec::new()), page(sql, after, rows)?])
}

fn read_part<T>(
    found: &mut Found,
    read: impl Fn(&mut Row) -> Result<T, Malformed>,
) -> Result<Part<T>, Error> {
    let owner = owner(found)?;
    let (rows, is_full) = found.page(read)?;
    Ok(Part { owner, rows, is_full })
}
