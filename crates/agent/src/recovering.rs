//! How much a node recovers at once: so many agents, and so many bytes of what they read. Agents of a shard are recovered
//! several at a time, so that one read serves them all.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use domain::{AgentId, Lsn};
use proto::link::{AgentRow, LogRow, ReadHistories, ReadHistory};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::config::Config;
use crate::metrics;
use crate::shard::Shard;

/// Agents whose entries are read together. The store cuts an answer that is too large; who is not in it reads by itself.
const AGENTS_A_READ: usize = 256;
/// Entries of each: what an agent has that was idle lately. Of those with more the rest is read one by one.
const AHEAD_ROWS: u32 = 32;

/// For so long agents that were read wait for the next read.
const PATIENCE: Duration = Duration::from_millis(200);

/// An agent with unfinished work, and what is known of it.
pub(crate) struct Due {
    pub row: AgentRow,
    /// The newest of its entries after its snapshot, newest first; what is missing it reads itself.
    pub ahead: Vec<LogRow>,
    pub share: Share,
}

/// Gives the agents to `hand`, while that takes them: as many together as the node has room for. What the first of them
/// commit would be in the way of the reads of the others, and the more go on at once, the more goes into one commit.
pub(crate) async fn hand_out(
    shard: Arc<Shard>,
    due: Vec<(AgentId, AgentRow)>,
    hand: impl Fn(AgentId, Due) -> bool,
) {
    let room = shard.node.recovering.clone();
    let mut due = due.into_iter().peekable();
    let mut read = Vec::new();
    let give = |read: &mut Vec<(AgentId, Due)>| read.drain(..).all(|(id, due)| hand(id, due));
    while due.peek().is_some() {
        let some: Vec<_> = due.by_ref().take(AGENTS_A_READ.min(room.agents_max)).collect();
        let shares = match room.begin_now(some.len()) {
            Some(shares) => shares,
            // Those that wait here have what is waited for.
            None if !give(&mut read) => return,
            None => match room.begin(some.len()).await {
                Some(shares) => shares,
                None => return,
            },
        };
        let mut ahead = {
            let reading = ahead(&shard, &some);
            tokio::pin!(reading);
            match timeout(PATIENCE, &mut reading).await {
                Ok(ahead) => ahead,
                // A store that has become slow keeps nobody waiting who was read already.
                Err(_) if !give(&mut read) => return,
                Err(_) => reading.await,
            }
        };
        for ((id, row), mut share) in some.into_iter().zip(shares) {
            let ahead = ahead.remove(&row.id).unwrap_or_default();
            let bytes = ahead.iter().map(|row| row.payload.len()).sum();
            if !share.take_now(bytes) {
                if !give(&mut read) {
                    return;
                }
                share.take(bytes).await;
            }
            read.push((id, Due { row, ahead, share }));
        }
    }
    give(&mut read);
}

/// The newest entries of these agents, by the row of the agent. Nothing, if the store does not answer: then each agent
/// asks by itself, and waits.
async fn ahead(shard: &Shard, some: &[(AgentId, AgentRow)]) -> HashMap<u64, Vec<LogRow>> {
    let history = |(_, row): &(AgentId, AgentRow)| {
        let from = shard.writer.head_of(row.id).unwrap_or(Lsn(row.head)).0;
        ReadHistory { from, above: row.snap_lsn, limit: AHEAD_ROWS }
    };
    let each = some.iter().map(history).filter(|of| of.above < of.from).collect();
    let mut ahead: HashMap<u64, Vec<LogRow>> = HashMap::new();
    match shard.store.histories(&shard.database, &ReadHistories { each }).await {
        // What a later owner wrote is nothing to go on with; the agents find out who that is.
        Ok(page) if page.epoch != shard.epoch.0 => {}
        Ok(page) => {
            for row in page.rows {
                ahead.entry(row.agent).or_default().push(row);
            }
        }
        Err(error) => {
            tracing::debug!(shard = %shard.id, error = &error as &dyn std::error::Error, "cannot read ahead");
        }
    }
    for rows in ahead.values_mut() {
        rows.sort_unstable_by_key(|row| std::cmp::Reverse(row.lsn));
    }
    ahead
}

/// The room for recoveries on a node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Recovering {
    agents: Arc<Semaphore>,
    agents_max: usize,
    bytes: Arc<Semaphore>,
    /// One recovery at a time may go beyond the bytes: if each waited for what the others hold, none would end.
    beyond: Arc<Semaphore>,
}

/// What one recovery holds.
pub(crate) struct Share {
    room: Recovering,
    _agent: OwnedSemaphorePermit,
    bytes: Vec<OwnedSemaphorePermit>,
    beyond: Option<OwnedSemaphorePermit>,
}

impl Recovering {
    pub(crate) fn new(config: &Config) -> Self {
        let agents_max = config.recovering_max.get() as usize;
        Self {
            agents: Arc::new(Semaphore::new(agents_max)),
            agents_max,
            bytes: Arc::new(Semaphore::new(config.recovering_bytes_max)),
            beyond: Arc::new(Semaphore::new(1)),
        }
    }

    /// Waits until one more agent may be recovered. None: the node ends.
    pub(crate) async fn begin_one(&self) -> Option<Share> {
        self.begin(1).await?.pop()
    }

    /// Waits until so many more agents may be recovered, no more than may be at all. None: the node ends.
    async fn begin(&self, count: usize) -> Option<Vec<Share>> {
        let agents = self.agents.clone().acquire_many_owned(permits(count)).await.ok()?;
        Some(self.shares(agents))
    }

    /// The same, if there is room now.
    fn begin_now(&self, count: usize) -> Option<Vec<Share>> {
        let agents = self.agents.clone().try_acquire_many_owned(permits(count)).ok()?;
        Some(self.shares(agents))
    }

    fn shares(&self, mut agents: OwnedSemaphorePermit) -> Vec<Share> {
        let share = |agent| {
            metrics::RECOVERING.inc();
            Share { room: self.clone(), _agent: agent, bytes: Vec::new(), beyond: None }
        };
        (0..agents.num_permits()).map_while(|_| agents.split(1)).map(share).collect()
    }
}

fn permits(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl Drop for Share {
    fn drop(&mut self) {
        metrics::RECOVERING.dec();
    }
}

impl Share {
    /// Whether so many bytes more may be read now.
    fn take_now(&mut self, bytes: usize) -> bool {
        let permit = self.room.bytes.clone().try_acquire_many_owned(permits(bytes));
        let is_taken = permit.is_ok();
        self.bytes.extend(permit);
        is_taken
    }

    /// Waits until so many bytes more may be read.
    pub(crate) async fn take(&mut self, bytes: usize) {
        if self.beyond.is_some() {
            return;
        }
        let count = permits(bytes);
        let (room, beyond) = (self.room.bytes.clone(), self.room.beyond.clone());
        tokio::select! {
            biased;
            permit = room.acquire_many_owned(count) => self.bytes.extend(permit.ok()),
            permit = beyond.acquire_owned() => self.beyond = permit.ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn room(agents_max: u32, recovering_bytes_max: usize) -> Recovering {
        let recovering_max = agents_max.try_into().unwrap();
        Recovering::new(&Config { recovering_max, recovering_bytes_max, ..Config::default() })
    }

    #[tokio::test]
    async fn so_many_agents_are_recovered_at_once() {
        let room = room(2, 10);
        let mut first = room.begin(2).await.unwrap();
        assert!(room.begin(1).now_or_never().is_none() && room.begin_now(1).is_none());
        first.pop();
        assert_eq!(room.begin(1).now_or_never().flatten().unwrap().len(), 1);
        assert!(room.begin(2).now_or_never().is_none());
    }

    #[tokio::test]
    async fn only_one_goes_beyond_the_bytes_and_the_others_wait_for_it() {
        let room = room(8, 10);
        let shares: [Share; 3] = room.begin(3).await.unwrap().try_into().ok().unwrap();
        let [mut one, mut two, mut three] = shares;
        one.take(6).await;
        assert!(!two.take_now(5) && two.take_now(4));
        one.take(100).await;
        one.take(100).await;
        assert!(two.take(1).now_or_never().is_none() && three.take(1).now_or_never().is_none());
        drop(one);
        assert!(three.take(1).now_or_never().is_some());
        drop(three);
        assert!(two.take(6).now_or_never().is_some());
    }
}
