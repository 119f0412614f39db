//! The first act of a leader: it reads everything, and makes what the first leader of a store has to make.

use std::collections::BTreeMap;
use std::time::Duration;

use domain::leadership;
use domain::ownership::{OwnerRow, STORE_MS};
use domain::slot::{SLOTS, ShardRange, ShardTable};
use domain::{Class, ClusterId, ShardId};
use proto::link::control_write::Write;
use proto::link::read_control::Read;
use proto::link::{
    ControlWrite, PutCluster, PutNode, PutShard, ReadCluster, ReadNodes, ReadShards,
};
use store::ControlOutcome;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use super::hands::{Hands, Outcome};
use crate::clock::Backoff;
use crate::shared::row;

const WRITE_MS: u64 = 5_000;

/// Everything that a leader knows when it begins to act.
pub(crate) struct Loaded {
    pub(crate) cluster_id: ClusterId,
    pub(crate) table: ShardTable,
    pub(crate) shards: Vec<PutShard>,
    pub(crate) nodes: Vec<PutNode>,
    pub(crate) owners: BTreeMap<ShardId, OwnerRow>,
}

enum Tried {
    Loaded(Box<Loaded>),
    NotLeader,
    /// Another cluster was first.
    Foreign(String),
}

/// Tries until it has everything. Ends with its task, when the term ends.
pub(crate) async fn load(hands: Hands) {
    let mut backoff = Backoff::new();
    loop {
        match Box::pin(try_load(&hands)).await {
            Ok(Tried::Loaded(loaded)) => return hands.report(Outcome::Loaded(loaded)),
            Ok(Tried::NotLeader) => return hands.deposed(),
            Ok(Tried::Foreign(cluster_id)) => return hands.foreign(&cluster_id),
            Err(error) if hands.is_final(&error) => return,
            Err(error) => {
                warn!(%error, term = %hands.term, "the leader cannot read its databases; trying again");
                backoff.wait().await;
            }
        }
    }
}

async fn try_load(hands: &Hands) -> Result<Tried, store::Error> {
    let shared = &hands.shared;
    let found = shared.read(Read::Cluster(ReadCluster {})).await?;
    if !leadership::is_of_cluster(&shared.authorities, &found.authorities) {
        return Ok(Tried::Foreign(found.cluster_id));
    }
    let mut cluster_id = found.cluster_id;
    let mut shards = shared.read(Read::Shards(ReadShards {})).await?.shards;
    if cluster_id.is_empty() || shards.is_empty() {
        let fresh = new_shards(shared.config.shards, &shared.store_name);
        let rows = first_rows(&fresh, &shared.authorities);
        match shared.write(hands.term, rows, WRITE_MS).await? {
            ControlOutcome::Done(answer) => cluster_id = answer.cluster_id,
            ControlOutcome::NotLeader(_) => return Ok(Tried::NotLeader),
        }
        info!(cluster = cluster_id, shards = fresh.len(), "made the cluster");
        shards = fresh;
    } else if found.authorities != shared.authorities {
        // They change while certificates are replaced: first both are trusted, then the new one alone.
        let put = put_cluster(cluster_id.clone(), &shared.authorities);
        let written = shared.write(hands.term, vec![put], WRITE_MS).await?;
        if let ControlOutcome::NotLeader(_) = written {
            return Ok(Tried::NotLeader);
        }
    }
    let nodes = shared.read(Read::Nodes(ReadNodes {})).await?.nodes;
    let table = table(&shards).map_err(corrupt)?;
    let owners = owners(hands, &cluster_id, &shards).await;
    let cluster_id = cluster_id.parse().map_err(corrupt)?;
    Ok(Tried::Loaded(Box::new(Loaded { cluster_id, table, shards, nodes, owners })))
}

fn corrupt(error: domain::Error) -> store::Error {
    store::Error::Corrupt { what: format!("control database: {error}") }
}

/// All or nothing: a cluster that has an id has its shards.
fn first_rows(shards: &[PutShard], authorities: &[String]) -> Vec<ControlWrite> {
    let cluster_id = format!("c-{:016x}", rand::random::<u64>());
    let mut writes = vec![put_cluster(cluster_id, authorities)];
    writes.extend(shards.iter().cloned().map(|shard| row(Write::Shard(shard))));
    writes
}

fn put_cluster(cluster_id: String, authorities: &[String]) -> ControlWrite {
    row(Write::Cluster(PutCluster { cluster_id, authorities: authorities.to_vec() }))
}

/// The shards of a new cluster: all of class `{}`, each with an equal run of slots.
fn new_shards(count: u16, store: &str) -> Vec<PutShard> {
    let (count, slots) = (u32::from(count), u32::from(SLOTS));
    let first = |shard: u32| (shard * slots).div_ceil(count);
    let shard = |shard: u32| PutShard {
        shard,
        class: 0,
        slot_first: first(shard),
        slot_count: first(shard + 1) - first(shard),
        store: store.to_owned(),
        database: format!("shard-{shard}"),
        epoch: 0,
        standing: String::new(),
    };
    (0..count).map(shard).collect()
}

fn table(shards: &[PutShard]) -> Result<ShardTable, domain::Error> {
    let mut ranges: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
    for shard in shards {
        let (first, count) = ranges.entry(shard.class).or_insert((shard.shard, 0));
        *first = (*first).min(shard.shard);
        *count += 1;
    }
    let narrow = |number: u32| {
        u16::try_from(number).map_err(|_| domain::Error::Malformed {
            what: "shard range",
            value: number.to_string(),
            allowed: "numbers up to 65535",
        })
    };
    let ranges: Result<Vec<ShardRange>, domain::Error> = ranges
        .into_iter()
        .map(|(class, (first, count))| {
            let class = Class(narrow(class)?);
            Ok(ShardRange { class, first: ShardId(first), count: narrow(count)? })
        })
        .collect();
    ShardTable::new(ranges?)
}

/// Reads every owner row.
async fn owners(
    hands: &Hands,
    cluster_id: &str,
    shards: &[PutShard],
) -> BTreeMap<ShardId, OwnerRow> {
    let mut reads = JoinSet::new();
    for shard in shards {
        reads.spawn(owner(hands.clone(), cluster_id.to_owned(), shard.clone()));
    }
    let owners = most(reads).await;
    if owners.len() < shards.len() {
        let (read, of) = (owners.len(), shards.len());
        warn!(read, of, "leads without having read all owner rows; the others are read again");
    }
    owners
}

/// What is read until all have answered. Once half of them have, the others have as long as a store has for an answer: a
/// database that hangs does not keep those of the others from having a leader.
async fn most<T: Send + 'static>(mut reads: JoinSet<Option<(ShardId, T)>>) -> BTreeMap<ShardId, T> {
    let half = reads.len().div_ceil(2);
    let (mut read, mut answered, mut until) = (BTreeMap::new(), 0, None);
    loop {
        let over = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            next = reads.join_next() => match next {
                Some(next) => read.extend(next.ok().flatten()),
                None => return read,
            },
            () = over => return read,
        }
        answered += 1;
        if answered == half {
            until = Some(Instant::now() + Duration::from_millis(STORE_MS));
        }
    }
}

/// Reads it until it answers. None: its database is certainly broken. Then it stays unread, and so untouched.
async fn owner(hands: Hands, cluster_id: String, shard: PutShard) -> Option<(ShardId, OwnerRow)> {
    let mut backoff = Backoff::new();
    loop {
        match hands.owner(&cluster_id, &shard).await {
            Ok(row) => return Some((ShardId(shard.shard), row)),
            Err(error) if error.kind().is_retryable() => {
                hands.complain(shard.shard, "reading an owner row", &error);
                backoff.wait().await;
            }
            Err(error) if hands.is_final(&error) => return None,
            Err(error) => {
                error!(shard = shard.shard, %error, "cannot use a shard's database");
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use domain::Slot;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_database_that_hangs_holds_nobody_up_once_half_have_answered() {
        let mut reads = JoinSet::new();
        for shard in 0..4_u32 {
            reads.spawn(async move {
                match shard {
                    0 => std::future::pending().await,
                    1 => None,
                    _ => {
                        tokio::time::sleep(Duration::from_secs(60)).await;
                        Some((ShardId(shard), shard))
                    }
                }
            });
        }
        let began = Instant::now();
        assert_eq!(most(reads).await, BTreeMap::from([(ShardId(2), 2), (ShardId(3), 3)]));
        assert_eq!(began.elapsed(), Duration::from_millis(60_000 + STORE_MS));
    }

    #[tokio::test(start_paused = true)]
    async fn no_owner_row_is_waited_for_when_all_have_answered() {
        let mut reads = JoinSet::new();
        reads.spawn(async { Some((ShardId(7), ())) });
        let began = Instant::now();
        assert_eq!(most(reads).await.len(), 1);
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[test]
    fn the_rows_of_new_shards_say_what_the_table_says() {
        for count in [1, 3, 12, 64, 4_096] {
            let shards = new_shards(count, "main");
            let table = table(&shards).unwrap();
            assert_eq!(table, ShardTable::single(count).unwrap());
            for shard in &shards {
                for slot in [shard.slot_first, shard.slot_first + shard.slot_count - 1] {
                    let slot = Slot::new(u16::try_from(slot).unwrap()).unwrap();
                    assert_eq!(table.shard_of(Class(0), slot), Some(ShardId(shard.shard)));
                }
            }
            assert_eq!(shards.iter().map(|shard| shard.slot_count).sum::<u32>(), u32::from(SLOTS));
        }
    }
}
