//! Deletes what is old, in slices: each is a transaction of its own, and commits go in between.
//!
//! Never deletes an entry above its agent's snapshot, an entry of an open work, or the newest row of the log, which says
//! where the log ends.

use domain::retention::Seen;
use proto::link::Prune;

use super::GUARD_EPOCH;
use crate::Error;
use crate::statement::{Batch, Found, Guard, Query, Row, Sink, Statement, Stop, Value, number};

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

/// Looks at what is next in line, and says what to do about it. Refuses a stale epoch.
pub(crate) struct Look {
    pub(crate) asked: Prune,
    pub(crate) step: Step,
}

impl Query for Look {
    type Answer = Next;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let (sql, after) = match self.step {
            Step::Log { after } => (LOOK_LOG, after),
            Step::Works { after } => (LOOK_WORKS, after),
            Step::Keys { after } => (LOOK_KEYS, after),
            Step::Done => return Ok(Vec::new()),
        };
        Ok(vec![
            Statement::new("SELECT epoch FROM owner", Vec::new()),
            Statement::new(sql, vec![number(after)?, number(SLICE_ROWS)?]),
        ])
    }

    fn answer(&self, found: &mut Found) -> Result<Next, Error> {
        let epoch = found.row(Row::u64)?.ok_or_else(|| found.corrupt("its owner row"))?;
        if epoch != self.asked.epoch {
            return Err(Error::Fenced { epoch });
        }
        let seen = found.row(|row| {
            let (last, oldest_ms) = (row.u64()?, row.i64()?);
            let (head, rows, payload) = (row.u64()?, row.u64()?, row.u64()?);
            Ok(Seen { last, head, rows, payload, oldest_ms })
        })?;
        let seen = seen.filter(|seen| seen.last != 0);
        Ok(self.step.next(&self.asked, seen))
    }
}

const LOOK_LOG: &str = "SELECT max(lsn), min(ts_ms), (SELECT max(lsn) FROM log), count(*), sum(bytes) \
    FROM (SELECT lsn, ts_ms, length(payload) bytes FROM log WHERE lsn > ?1 ORDER BY lsn LIMIT ?2)";
const LOOK_WORKS: &str = "SELECT max(id), min(create_ms), 0, 0, 0 \
    FROM (SELECT id, create_ms FROM work WHERE id > ?1 ORDER BY id LIMIT ?2)";
const LOOK_KEYS: &str = "SELECT max(rowid), min(expires_ms), 0, 0, 0 \
    FROM (SELECT rowid, expires_ms FROM dedup WHERE rowid > ?1 ORDER BY rowid LIMIT ?2)";

/// What to do about what was seen.
pub(crate) enum Next {
    /// Nothing is old enough here.
    Skip(Step),
    Delete(Slice, Step),
}

impl Step {
    fn following(self) -> Self {
        match self {
            Self::Log { .. } => Self::Works { after: 0 },
            Self::Works { .. } => Self::Keys { after: 0 },
            Self::Keys { .. } | Self::Done => Self::Done,
        }
    }

    fn next(self, asked: &Prune, seen: Option<Seen>) -> Next {
        let Some(seen) = seen else { return Next::Skip(self.following()) };
        let last = seen.last;
        let old = |before_ms| seen.goes_before(before_ms, 0);
        let (before_ms, next) = match self {
            Self::Log { .. } => {
                let before_ms = seen.goes_before(asked.entries_before_ms, asked.log_bytes_max);
                (before_ms, Self::Log { after: last })
            }
            Self::Works { .. } => (old(asked.works_before_ms), Self::Works { after: last }),
            Self::Keys { .. } => (old(asked.now_ms), Self::Keys { after: last }),
            Self::Done => return Next::Skip(Self::Done),
        };
        match before_ms {
            Some(before_ms) => {
                Next::Delete(Slice { epoch: asked.epoch, step: self, last, before_ms }, next)
            }
            None => Next::Skip(self.following()),
        }
    }
}

/// Deletes the rows of one slice that nothing needs; they are looked at again as it does so.
pub(crate) struct Slice {
    epoch: u64,
    step: Step,
    last: u64,
    before_ms: i64,
}

impl Batch for Slice {
    type Answer = u64;

    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop> {
        sink.guard(Guard::Epoch, GUARD_EPOCH, vec![number(self.epoch)?])?;
        let (sql, after) = match self.step {
            Step::Log { after } => (DELETE_LOG, after),
            Step::Works { after } => (DELETE_WORKS, after),
            Step::Keys { after } => (DELETE_KEYS, after),
            Step::Done => return Ok(()),
        };
        sink.keep(sql, vec![number(after)?, number(self.last)?, Value::Integer(self.before_ms)])
    }

    fn answer(&self, kept: &mut Found) -> Result<u64, Error> {
        Ok(kept.changed())
    }
}

const DELETE_LOG: &str = "DELETE FROM log WHERE lsn > ?1 AND lsn <= ?2 AND lsn < (SELECT max(lsn) FROM log) AND ts_ms < ?3 \
    AND (agent = 0 OR lsn <= (SELECT snap_lsn FROM agent WHERE agent.id = log.agent)) \
    AND NOT EXISTS(SELECT 1 FROM work WHERE work.id = log.work AND work.state < 6)";
const DELETE_WORKS: &str =
    "DELETE FROM work WHERE id > ?1 AND id <= ?2 AND state >= 6 AND end_ms < ?3";
const DELETE_KEYS: &str = "DELETE FROM dedup WHERE rowid > ?1 AND rowid <= ?2 AND expires_ms < ?3";
