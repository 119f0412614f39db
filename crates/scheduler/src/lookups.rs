//! Lookups of one thing share a read. It begins after all of them have asked, so none is told what was old already: a
//! lookup that comes while a read is under way waits for the next one, with all others that do.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Mutex as Turn;

/// Lookups by what they look for. Holds only what somebody waits for.
pub(crate) struct Lookups<K, V>(Mutex<HashMap<K, Asking<V>>>);

struct Asking<V> {
    lookup: Arc<Lookup<V>>,
    /// So many wait for it.
    count: usize,
}

struct Lookup<V> {
    asked: AtomicU64,
    last: Turn<Last<V>>,
}

/// The last read that has ended, and up to which of those who asked it is for.
struct Last<V> {
    covers: u64,
    found: Option<V>,
}

impl<K, V> Default for Lookups<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<V> Default for Asking<V> {
    fn default() -> Self {
        let last = Turn::new(Last { covers: 0, found: None });
        Self { lookup: Arc::new(Lookup { asked: AtomicU64::new(0), last }), count: 0 }
    }
}

impl<K: Clone + Eq + Hash, V: Clone> Lookups<K, V> {
    /// What `read` finds, or the read of somebody else who asks for `key` now.
    pub(crate) async fn get<F>(&self, key: K, read: impl FnOnce() -> F) -> V
    where
        F: Future<Output = V>,
    {
        let asked = self.ask(key);
        let mut last = asked.lookup.last.lock().await;
        if let Some(found) = last.found.as_ref().filter(|_| asked.number <= last.covers) {
            return found.clone();
        }
        // Whoever has a number by now has asked before the read begins.
        let covers = asked.lookup.asked.load(Ordering::Relaxed);
        let found = read().await;
        *last = Last { covers, found: Some(found.clone()) };
        found
    }

    fn ask(&self, key: K) -> Asked<'_, K, V> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let asking = all.entry(key.clone()).or_default();
        asking.count += 1;
        let number = asking.lookup.asked.fetch_add(1, Ordering::Relaxed) + 1;
        Asked { lookups: self, key, lookup: asking.lookup.clone(), number }
    }
}

/// One who asks, until he knows or has given up.
struct Asked<'a, K: Eq + Hash, V> {
    lookups: &'a Lookups<K, V>,
    key: K,
    lookup: Arc<Lookup<V>>,
    number: u64,
}

impl<K: Eq + Hash, V> Drop for Asked<'_, K, V> {
    fn drop(&mut self) {
        let mut all = self.lookups.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(asking) = all.get_mut(&self.key) else { return };
        asking.count -= 1;
        if asking.count == 0 {
            all.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;
    use tokio::sync::{Semaphore, oneshot};

    use super::*;

    #[tokio::test]
    async fn those_who_wait_share_a_read_that_began_after_they_had_asked() {
        let (lookups, reads) = (Lookups::<u8, u64>::default(), AtomicU64::new(0));
        let gate = Semaphore::new(0);
        let get = || {
            lookups.get(7, async || {
                let number = reads.fetch_add(1, Ordering::Relaxed) + 1;
                gate.acquire().await.unwrap().forget();
                number
            })
        };
        let (first, others, opened) = tokio::join!(
            get(),
            // They have asked when the first read is under way already.
            join_all((0..100).map(|_| get())),
            async { gate.add_permits(2) },
        );
        assert_eq!((first, opened), (1, ()));
        assert!(others.iter().all(|number| *number == 2), "{others:?}");
        gate.add_permits(1);
        assert_eq!(get().await, 3, "nothing is kept");
        assert!(lookups.0.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn who_gives_up_takes_nobody_with_him() {
        let lookups = Arc::new(Lookups::<u8, u64>::default());
        let (begun, has_begun) = oneshot::channel();
        let given_up = tokio::spawn({
            let lookups = lookups.clone();
            async move {
                let stuck = async || {
                    begun.send(()).unwrap();
                    std::future::pending().await
                };
                lookups.get(7, stuck).await
            }
        });
        has_begun.await.unwrap();
        let waiting = tokio::spawn({
            let lookups = lookups.clone();
            async move { lookups.get(7, async || 5).await }
        });
        given_up.abort();
        assert!(given_up.await.is_err());
        assert_eq!(waiting.await.unwrap(), 5);
        assert!(lookups.0.lock().unwrap().is_empty());
    }
}
