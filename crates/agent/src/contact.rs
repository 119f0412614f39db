//! Whether the stores of this node's shards answer it. The heartbeat says for how long one has not: the leader moves the
//! shards of a node that alone does not reach its store.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use domain::ErrorKind;
use store::Store;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::metrics;
use crate::shard::lock;

/// How often each store is asked something.
const ASK_EVERY: Duration = Duration::from_secs(2);
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// Where a shard is kept: the name of a store, and a database of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) store: String,
    pub(crate) database: String,
}

/// What is known of one store.
struct Known {
    /// The database that was asked last.
    database: String,
    /// For how long it was asked in vain. A process that stood still has asked nobody meanwhile.
    silent: Duration,
    looked: Instant,
}

/// By the names of stores; those of which this node never had a shard are not in it.
#[derive(Default)]
pub(crate) struct Contact(Mutex<BTreeMap<String, Known>>);

impl Contact {
    /// For how long each store has not answered, milliseconds.
    pub(crate) fn silent_ms(&self) -> BTreeMap<String, u64> {
        let ms = |silent: Duration| u64::try_from(silent.as_millis()).unwrap_or(u64::MAX);
        lock(&self.0).iter().map(|(store, known)| (store.clone(), ms(known.silent))).collect()
    }

    /// What to ask now: of each store the database after the one that was asked last, so that one that hangs does not
    /// speak for its store; when there is none any more, that one again.
    fn next(&self, mut places: Vec<Place>) -> Vec<Place> {
        places.sort();
        let mut known = lock(&self.0);
        for place in &places {
            known.entry(place.store.clone()).or_insert_with(|| Known {
                database: place.database.clone(),
                silent: Duration::ZERO,
                looked: Instant::now(),
            });
        }
        for (store, known) in known.iter_mut() {
            let mut own = places.iter().filter(|place| place.store == *store);
            let first = own.clone().next();
            let next = own.find(|place| known.database < place.database).or(first);
            if let Some(next) = next {
                known.database.clone_from(&next.database);
            }
        }
        let place = |(store, known): (&String, &Known)| Place {
            store: store.clone(),
            database: known.database.clone(),
        };
        known.iter().map(place).collect()
    }

    fn asked(&self, store: &str, has_answered: bool) {
        let mut known = lock(&self.0);
        let Some(known) = known.get_mut(store) else { return };
        let since = known.looked.elapsed().min(ASK_EVERY + ANSWER_MAX);
        known.silent = if has_answered { Duration::ZERO } else { known.silent + since };
        known.looked = Instant::now();
    }
}

/// Asks the stores of `places` until that answers None.
pub(crate) async fn watch(
    contact: Arc<Contact>,
    stores: BTreeMap<String, Arc<dyn Store>>,
    places: impl Fn() -> Option<Vec<Place>>,
) {
    let mut ticks = interval(ASK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(places) = places() else { return };
        let mut asked = JoinSet::new();
        for place in contact.next(places) {
            let Some(store) = stores.get(&place.store).cloned() else { continue };
            asked.spawn(async move {
                let has_answered = answers(store.as_ref(), &place.database).await;
                (place.store, has_answered)
            });
        }
        while let Some(answered) = asked.join_next().await {
            if let Ok((store, has_answered)) = answered {
                contact.asked(&store, has_answered);
            }
        }
        let silent_ms = contact.silent_ms().into_values().max().unwrap_or(0);
        metrics::STORE_SILENT_MS.set(i64::try_from(silent_ms).unwrap_or(i64::MAX));
    }
}

/// A refusal is an answer, too.
async fn answers(store: &dyn Store, database: &str) -> bool {
    match timeout(ANSWER_MAX, store.owner(database)).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() != ErrorKind::Unavailable,
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(store: &str, database: &str) -> Place {
        Place { store: store.to_owned(), database: database.to_owned() }
    }

    #[test]
    fn databases_take_turns_and_the_last_one_stands_for_its_store() {
        let contact = Contact::default();
        let all = [place("a", "shard-1"), place("a", "shard-2"), place("b", "shard-3")];
        let asked = |places: &[Place]| contact.next(places.to_vec());
        assert_eq!(asked(&[]), []);
        let databases = |asked: Vec<Place>| -> Vec<String> {
            asked.into_iter().map(|place| place.database).collect()
        };
        assert_eq!(databases(asked(&all)), ["shard-2", "shard-3"]);
        assert_eq!(databases(asked(&all)), ["shard-1", "shard-3"]);
        assert_eq!(databases(asked(&all)), ["shard-2", "shard-3"]);
        assert_eq!(databases(asked(&[])), ["shard-2", "shard-3"]);
        assert_eq!(databases(asked(&all[..1])), ["shard-1", "shard-3"]);
    }

    #[test]
    fn a_store_is_silent_for_as_long_as_it_was_asked_in_vain() {
        let contact = Contact::default();
        assert!(contact.silent_ms().is_empty(), "no shard, no store");
        contact.next(vec![place("a", "shard-1"), place("b", "shard-2")]);
        let pass = |seconds| {
            for known in lock(&contact.0).values_mut() {
                known.looked = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            }
        };
        let silent = || {
            let ms = contact.silent_ms().into_values();
            ms.map(|ms| ms / 1_000).collect::<Vec<_>>()
        };
        for _ in 0..3 {
            pass(4);
            contact.asked("a", false);
            contact.asked("b", true);
        }
        assert_eq!(silent(), [12, 0]);
        // It stood still, and asked nobody for that time.
        pass(60);
        contact.asked("a", false);
        assert_eq!(silent(), [17, 0]);
        contact.asked("a", true);
        assert_eq!(silent(), [0, 0]);
    }
}
