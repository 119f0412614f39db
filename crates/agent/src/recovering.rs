//! How much a node recovers at once: so many agents, and so many bytes of what they read.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::Config;

/// The room for recoveries on a node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Recovering {
    agents: Arc<Semaphore>,
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
        Self {
            agents: Arc::new(Semaphore::new(config.recovering_max)),
            bytes: Arc::new(Semaphore::new(config.recovering_bytes_max)),
            beyond: Arc::new(Semaphore::new(1)),
        }
    }

    /// Waits until one more agent may be recovered. None: the node ends.
    pub(crate) async fn begin(&self) -> Option<Share> {
        let agent = self.agents.clone().acquire_owned().await.ok()?;
        Some(Share { room: self.clone(), _agent: agent, bytes: Vec::new(), beyond: None })
    }
}

impl Share {
    /// Waits until so many bytes more may be read.
    pub(crate) async fn take(&mut self, bytes: usize) {
        if self.beyond.is_some() {
            return;
        }
        let count = u32::try_from(bytes).unwrap_or(u32::MAX);
        let (room, beyond) = (self.room.bytes.clone(), self.room.beyond.clone());
        tokio::select! {
            biased;
            permit = room.acquire_many_owned(count) => self.bytes.extend(permit.ok()),
            permit = beyond.acquire_owned() => self.beyond = permit.ok(),
        }
    }

    /// What was read is not kept: it is read again later.
    pub(crate) fn give_back(&mut self) {
        self.bytes.clear();
        self.beyond = None;
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn room(recovering_max: usize, recovering_bytes_max: usize) -> Recovering {
        Recovering::new(&Config { recovering_max, recovering_bytes_max, ..Config::default() })
    }

    #[tokio::test]
    async fn so_many_agents_are_recovered_at_once() {
        let room = room(1, 10);
        let first = room.begin().await;
        assert!(room.begin().now_or_never().is_none());
        drop(first);
        assert!(room.begin().now_or_never().is_some());
    }

    #[tokio::test]
    async fn only_one_goes_beyond_the_bytes_and_the_others_wait_for_it() {
        let room = room(8, 10);
        let (mut one, mut two) = (room.begin().await.unwrap(), room.begin().await.unwrap());
        let mut three = room.begin().await.unwrap();
        one.take(6).await;
        two.take(4).await;
        one.take(100).await;
        one.take(100).await;
        assert!(two.take(1).now_or_never().is_none() && three.take(1).now_or_never().is_none());
        drop(one);
        assert!(three.take(1).now_or_never().is_some());
        three.give_back();
        assert!(two.take(6).now_or_never().is_some());
    }
}
