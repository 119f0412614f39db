//! Opening a shard: the first act of a new owner is a guarded commit. What it goes on with was read right before, and the
//! guard says that nobody has written since.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use domain::entry::Entry;
use domain::heads::Heads;
use domain::{AgentId, Class, Epoch, Lsn, ShardId};
use proto::journal;
use proto::link::{AgentRow, Grant, Group, LogRow, OwnerRow};
use store::writer::{self, Opening};
use store::{CommitOutcome, Recovery, Store};

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
    let (id, epoch) = (ShardId(grant.shard), Epoch(grant.epoch));
    let Owned { recovery, head, named } = own(&node, &*store, &grant).await?;
    let mark: Vec<(u64, Lsn)> =
        recovery.mark.heads.iter().map(|head| (head.agent, Lsn(head.head))).collect();
    let tail = recovery.tail.iter().map(|row| (Lsn(row.lsn), row.agent));
    let heads = Heads::recover(&mark, tail.filter(|(_, agent)| *agent != 0));
    let opening = Opening { epoch, head, heads };
    let limits = writer::Limits {
        waiting_rows_max: node.config.waiting_entries_max,
        ..writer::Limits::default()
    };
    let writer = writer::spawn(store.clone(), grant.database.clone(), opening, limits, events);
    let due = due(&recovery);
    let works = open_works(&recovery);
    let opened = Opened {
        id,
        class: Class(u16::try_from(grant.class).unwrap_or(0)),
        epoch,
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
    /// That entry.
    head: Lsn,
    named: HashMap<Lsn, Named>,
}

/// Reads all and commits `shard_opened` right after it, under the epoch of the grant.
async fn own(node: &Context, store: &dyn Store, grant: &Grant) -> Result<Owned, Error> {
    let shard = ShardId(grant.shard);
    let recovery = retry(shard, || store.recover(&grant.database)).await?;
    // A newer owner's rows are not ours to act on.
    if recovery.owner.epoch != grant.epoch {
        return Err(Error::Fenced { shard });
    }
    let head = Lsn(recovery.owner.head + 1);
    let begin = begin(node, store, grant, &recovery.owner);
    let (begun, named) = tokio::join!(begin, named(node, grant, &recovery));
    begun.map(|()| Owned { recovery, head, named })
}

/// Commits `shard_opened` right after `before`: then nobody has written since that was read.
async fn begin(
    node: &Context,
    store: &dyn Store,
    grant: &Grant,
    before: &OwnerRow,
) -> Result<(), Error> {
    let shard = ShardId(grant.shard);
    let fenced = || Error::Fenced { shard };
    let group = Arc::new(first_group(node, grant, before));
    loop {
        match store.commit(&grant.database, group.clone()).await {
            Ok(CommitOutcome::Committed) => return Ok(()),
            Ok(CommitOutcome::Fenced { .. }) => return Err(fenced()),
            Ok(CommitOutcome::HeadMismatch { .. }) => {}
            Err(error) if error.kind().is_retryable() => tokio::time::sleep(RETRY_MIN).await,
            Err(source) => return Err(Error::Open { shard, source: Box::new(source) }),
        }
        // The answer was lost, or a twin of this group came first: the row says which.
        let now = retry(shard, || store.owner(&grant.database)).await?;
        match now.head {
            _ if now.epoch != grant.epoch => return Err(fenced()),
            head if head == before.head => {}
            head if head == before.head + 1 => return Ok(()),
            _ => return Err(fenced()),
        }
    }
}

/// Steps that an owner before asked for are not asked for again while somebody has them.
async fn named(node: &Context, grant: &Grant, recovery: &Recovery) -> HashMap<Lsn, Named> {
    match recovery.open.is_empty() {
        true => HashMap::new(),
        false => node.steps_of(ShardId(grant.shard), Epoch(grant.epoch)).await,
    }
}

fn first_group(node: &Context, grant: &Grant, before: &OwnerRow) -> Group {
    let entry = Entry::ShardOpened(node.me());
    let row = LogRow {
        lsn: before.head + 1,
        agent: 0,
        prev: 0,
        seq: 0,
        work: 0,
        kind: entry.kind(),
        ts_ms: clock::now_ms(),
        payload: journal::encode(&entry),
        epoch: grant.epoch,
    };
    Group { epoch: grant.epoch, head: before.head, rows: vec![row], ..Group::default() }
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
