//! What a shard's database does: provision, fence, commit. Its reads are in [`read`], its housekeeping in [`prune`].
//!
//! The SQL of shards stands here and nowhere else, for every engine.

pub(crate) mod prune;
pub(crate) mod read;
pub(crate) mod recover;

use std::sync::LazyLock;

use domain::ShardId;
use prost::Message;
use proto::link::{
    AgentRow, DedupRow, DefinitionRow, Fence, Group, LogRow, Mark, OwnerRow, Provision, WorkEnd,
    WorkRow,
};

use crate::schema::{self, PUT_META};
use crate::statement::{Batch, Found, Guard, Sink, Stop, Value, blob, number, text};
use crate::{CommitOutcome, Error, FenceOutcome};

/// Binds a database to a shard of a cluster.
pub(crate) struct Bind {
    pub(crate) shard: ShardId,
    pub(crate) wanted: Provision,
}

impl Batch for Bind {
    type Answer = OwnerRow;

    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop> {
        let (shard, wanted) = (self.shard, &self.wanted);
        if wanted.shard != shard.0 {
            let what = format!("database shard-{shard} cannot hold shard {}", wanted.shard);
            return Err(Error::invalid(what).into());
        }
        if wanted.cluster_id.is_empty() {
            let what = "a shard is provisioned for a cluster: cluster_id is empty";
            return Err(Error::invalid(what).into());
        }
        let cluster = || text(&wanted.cluster_id);
        sink.guard(Guard::Cluster, GUARD_CLUSTER, vec![cluster()])?;
        sink.run(PUT_META, vec![text("cluster_id"), cluster()])?;
        sink.run(PUT_META, vec![text("shard"), text(&shard.to_string())])?;
        sink.keep(read::OWNER, Vec::new())
    }

    fn answer(&self, kept: &mut Found) -> Result<OwnerRow, Error> {
        read::owner(kept)
    }
}

const GUARD_CLUSTER: &str = "INSERT INTO fenced SELECT 'foreign' WHERE EXISTS(SELECT 1 FROM meta WHERE k = 'cluster_id' AND v <> ?1)";

/// The shard is bound to another cluster, `held`.
pub(crate) fn foreign(name: &str, held: Option<String>, wanted: &Provision) -> Error {
    let (held, asked) = (held.unwrap_or_default(), &wanted.cluster_id);
    let what =
        format!("database {name} belongs to cluster {held}, not {asked}; choose another store");
    Error::ForeignCluster { what }
}

/// Compare-and-set of the owner row. Asking again for what was granted already is granted again.
impl Batch for Fence {
    type Answer = FenceOutcome;

    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop> {
        let params = vec![
            number(self.expected)?,
            text(&self.node),
            number(self.incarnation)?,
            number(self.term)?,
            number(self.above)?,
        ];
        sink.run(
            "UPDATE owner SET epoch = max(epoch, ?5) + 1, node = ?2, incarnation = ?3, term = ?4 \
             WHERE epoch = ?1 AND term <= ?4",
            params,
        )?;
        sink.keep(read::OWNER, Vec::new())
    }

    fn answer(&self, kept: &mut Found) -> Result<FenceOutcome, Error> {
        Ok(FenceOutcome::of(self, read::owner(kept)?))
    }
}

/// The whole group, or nothing of it.
impl Batch for Group {
    type Answer = ();

    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop> {
        check(self)?;
        sink.guard(Guard::Epoch, GUARD_EPOCH, vec![number(self.epoch)?])?;
        sink.guard(Guard::Head, GUARD_HEAD, vec![number(self.head)?])?;
        insert_log(self, sink)?;
        for agent in &self.agents {
            sink.run(UPSERT_AGENT, agent_values(agent)?)?;
        }
        for work in &self.works {
            sink.run(UPSERT_WORK, work_values(work)?)?;
        }
        for end in &self.ends {
            sink.run_one(Guard::Work(end.id), END_WORK, end_values(end)?)?;
        }
        for dedup in &self.dedups {
            sink.run(UPSERT_DEDUP, dedup_values(dedup)?)?;
        }
        for definition in &self.definitions {
            sink.run(INSERT_DEFINITION, definition_values(definition))?;
        }
        if let Some(mark) = &self.mark {
            let heads = Mark { lsn: 0, heads: mark.heads.clone() }.encode_to_vec();
            sink.run(PUT_MARK, vec![number(mark.lsn)?, Value::Blob(heads)])?;
        }
        Ok(())
    }

    fn answer(&self, _: &mut Found) -> Result<(), Error> {
        Ok(())
    }
}

/// What it means that a group was stopped by `guard`, when the shard's row is this.
pub(crate) fn refused(guard: Guard, row: &OwnerRow) -> Result<CommitOutcome, Error> {
    match guard {
        Guard::Epoch => Ok(CommitOutcome::Fenced { epoch: row.epoch }),
        Guard::Head => Ok(CommitOutcome::HeadMismatch { head: row.head }),
        Guard::Work(id) => Err(Error::invalid(format!("work {id} cannot end: it does not exist"))),
        Guard::Leader | Guard::Cluster | Guard::Schema | Guard::Durability => {
            Err(Error::internal("a commit", "another batch's guard fired"))
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

/// Several rows a statement: cheaper than one by one. How many is best depends on the engine.
fn insert_log(group: &Group, sink: &mut dyn Sink) -> Result<(), Stop> {
    let mut rows = group.rows.as_slice();
    for (count, statement) in LOG_CHUNKS.iter() {
        if sink.log_rows_max() < *count {
            continue;
        }
        while let Some((chunk, rest)) = rows.split_at_checked(*count) {
            let mut values = Vec::with_capacity(count * LOG_COLUMNS);
            for row in chunk {
                values.extend(log_values(row, group.epoch)?);
            }
            sink.run(statement, values)?;
            rows = rest;
            if rows.is_empty() {
                return Ok(());
            }
        }
    }
    Ok(())
}

pub(crate) const GUARD_EPOCH: &str =
    "INSERT INTO fenced SELECT 'stale' WHERE NOT EXISTS(SELECT 1 FROM owner WHERE epoch = ?1)";
const GUARD_HEAD: &str =
    "INSERT INTO head SELECT 'moved' WHERE (SELECT ifnull(max(lsn), 0) FROM log) <> ?1";

const LOG_COLUMNS: usize = 9;
/// Statements that insert so many rows of the log, the largest first.
static LOG_CHUNKS: LazyLock<[(usize, String); 3]> = LazyLock::new(|| {
    let row = "(?, ?, ?, ?, ?, ?, ?, ?, ?)";
    [128, 16, 1]
        .map(|count| (count, format!("INSERT INTO log VALUES{}", vec![row; count].join(", "))))
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

fn definition_values(row: &DefinitionRow) -> Vec<Value> {
    vec![blob(&row.hash), blob(&row.body)]
}
