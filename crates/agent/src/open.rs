//! Opening a shard: the first act of a new owner is a guarded commit. What it goes on with was read right before, and the
//! guard says that nobody has written since.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use domain::entry::Entry;
use domain::heads::Heads;
use domain::{AgentId, Class, Epoch, Lsn, Reason, ShardId};
use proto::journal;
use proto::link::{AgentRow, Grant};
use store::writer::{self, Append, NewRow, Opening, WriterHandle};
use store::{Recovery, Store};
use telemetry::fault::point;
use tokio::sync::oneshot;

use crate::named::Named;
use crate::shard::{Context, Opened, Shard};
use crate::{Error, clock};

/// A shard that is open, and the agents that have unfinished work in it.
pub(crate) struct Open {
    pub shard: Arc<Shard>,
    pub due: Vec<AgentRow>,
}

const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(1_000);

/// Opens the shard of `grant`. Waits for a store that does not answer; ends when the shard is owned under another epoch.
///
/// # Errors
/// The epoch of the grant is not the shard's any more, or what is stored cannot be read.
pub(crate) async fn open(
    node: Arc<Context>,
    store: Arc<dyn Store>,
    grant: Grant,
    events: Box<dyn Fn(writer::Event) + Send + Sync>,
) -> Result<Open, Error> {
    let id = ShardId(grant.shard);
    let Owned { recovery, writer, named } = own(&node, store.clone(), &grant, events).await?;
    let due = due(&recovery);
    let works = open_works(&recovery);
    let opened = Opened {
        id,
        class: Class(u16::try_from(grant.class).unwrap_or(0)),
        epoch: Epoch(grant.epoch),
        database: grant.database,
        agent_max: recovery.agent_max,
        named,
    };
    let shard = Arc::new(Shard::new(node, store, writer, opened));
    for (work, agent) in works {
        // Its agent is asked from now on; the deadline is known when the agent has read its journal.
        shard.opened(work, agent, i64::MAX);
    }
    Ok(Open { shard, due })
}

/// Which agent has which open work.
fn open_works(recovery: &Recovery) -> Vec<(Lsn, AgentId)> {
    let name = |row: &AgentRow| format!("{}/{}/{}", row.tenant, row.name, row.key).parse().ok();
    let names: BTreeMap<u64, AgentId> =
        recovery.agents.iter().filter_map(|row| Some((row.id, name(row)?))).collect();
    let works = recovery.open.iter();
    works.filter_map(|work| Some((Lsn(work.id), names.get(&work.agent)?.clone()))).collect()
}

/// The agents of open works, each once.
fn due(recovery: &Recovery) -> Vec<AgentRow> {
    let rows: BTreeMap<u64, &AgentRow> = recovery.agents.iter().map(|row| (row.id, row)).collect();
    rows.into_values().cloned().collect()
}

/// A shard that this node owns for certain.
struct Owned {
    /// As it was before this node's first entry.
    recovery: Recovery,
    writer: WriterHandle,
    named: HashMap<Lsn, Named>,
}

/// Reads all and commits `shard_opened` right after it, under the epoch of the grant.
async fn own(
    node: &Context,
    store: Arc<dyn Store>,
    grant: &Grant,
    events: Box<dyn Fn(writer::Event) + Send + Sync>,
) -> Result<Owned, Error> {
    let (shard, epoch) = (ShardId(grant.shard), Epoch(grant.epoch));
    let recovery = retry(shard, || store.recover(&grant.database)).await?;
    point("open-read");
    // A newer owner's rows are not ours to act on, and older ones than of our grant lack what was acknowledged.
    let stored = Epoch(recovery.owner.epoch);
    if stored != epoch {
        return Err(Error::NotOpened { shard, reason: domain::writer::lost_to(epoch, stored) });
    }
    let opening = Opening { epoch, head: Lsn(recovery.owner.head), heads: heads(&recovery) };
    let limits = writer::Limits {
        waiting_rows_max: node.config.waiting_entries_max,
        ..writer::Limits::default()
    };
    let writer = writer::spawn(store, grant.database.clone(), opening, limits, events);
    let (begun, named) = tokio::join!(begin(node, &writer), named(node, grant, &recovery));
    point("open-committed");
    match begun {
        Ok(()) => Ok(Owned { recovery, writer, named }),
        Err(reason) => Err(Error::NotOpened { shard, reason }),
    }
}

fn heads(recovery: &Recovery) -> Heads {
    let mark = recovery.mark.heads.iter().map(|head| (head.agent, Lsn(head.head)));
    let tail = recovery.tail.iter().map(|row| (Lsn(row.lsn), row.agent));
    Heads::recover(&mark.collect::<Vec<_>>(), tail)
}

/// Commits the first entry of this owner. The writer finds out what became of it, and that nobody has written before it.
///
/// # Errors
/// Why the shard is not this node's.
async fn begin(node: &Context, writer: &WriterHandle) -> Result<(), Reason> {
    let entry = Entry::ShardOpened(node.me());
    let (payload, ts_ms) = (journal::encode(&entry), clock::now_ms());
    let (done, begun) = oneshot::channel();
    let append = Append {
        agent: 0,
        prev: Lsn(0),
        rows: vec![NewRow { seq: 0, work: 0, kind: entry.kind(), ts_ms, payload }],
        agents: Vec::new(),
        works: Vec::new(),
        ends: Vec::new(),
        dedups: Vec::new(),
        definitions: Vec::new(),
        done: Box::new(move |outcome| _ = done.send(outcome)),
    };
    writer.begin(append).map_err(|_| Reason::ShuttingDown)?;
    match begun.await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(stopped)) => Err(stopped.reason),
        Err(_) => Err(Reason::ShuttingDown),
    }
}

/// Steps that an owner before asked for are not asked for again while somebody has them.
async fn named(node: &Context, grant: &Grant, recovery: &Recovery) -> HashMap<Lsn, Named> {
    match recovery.open.is_empty() {
        true => HashMap::new(),
        false => node.steps_of(ShardId(grant.shard), Epoch(grant.epoch)).await,
    }
}

/// Asks until the store answers: a shard that was granted cannot do anything else.
async fn retry<T, F>(shard: ShardId, mut ask: impl FnMut() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, store::Error>>,
{
    let mut delay = RETRY_MIN;
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) if error.kind().is_retryable() => {
                tracing::warn!(%shard, error = &error as &dyn std::error::Error, "the store does not answer");
            }
            Err(source) => return Err(Error::Open { shard, source: Box::new(source) }),
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(RETRY_MAX);
    }
}
