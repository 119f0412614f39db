//! Requests on an open stream that the cluster could not take just now: when each is sent again, and how long at all.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::retry::Patience;
use crate::{Error, Timeouts};

/// By tag. As large as what is unanswered, which is bounded.
#[derive(Debug)]
pub(crate) struct Later {
    timeouts: Timeouts,
    patience: BTreeMap<i64, Patience>,
    due: BTreeSet<(Instant, i64)>,
}

impl Later {
    pub(crate) fn new(timeouts: &Timeouts) -> Self {
        Self { timeouts: timeouts.clone(), patience: BTreeMap::new(), due: BTreeSet::new() }
    }

    /// A request that is to be answered within `limit`, if that is shorter than the deadline of every call.
    pub(crate) fn begin(&mut self, tag: i64, limit: Option<Duration>) {
        let call = limit.map_or(self.timeouts.call, |limit| limit.min(self.timeouts.call));
        let timeouts = Timeouts { call, ..self.timeouts.clone() };
        self.patience.insert(tag, Patience::new(&timeouts));
    }

    /// The cluster could not take it: it is due again after a pause, unless its time is over.
    pub(crate) fn postpone(&mut self, tag: i64, error: Error) -> Result<(), Error> {
        let begin = || Patience::new(&self.timeouts);
        let pause = self.patience.entry(tag).or_insert_with(begin).pause(error, true)?;
        self.due.insert((Instant::now() + pause, tag));
        Ok(())
    }

    /// It was answered, or will not be: there is nothing to repeat.
    pub(crate) fn end(&mut self, tag: i64) {
        self.patience.remove(&tag);
    }

    /// On a new connection everything is sent at once, so that nothing is due.
    pub(crate) fn reconnected(&mut self) {
        self.due.clear();
    }

    /// Resolves with a request that is due; never, if none will be. Loses nothing when it is dropped.
    pub(crate) async fn next(&self) -> (Instant, i64) {
        match self.due.first() {
            Some(&(at, tag)) => {
                tokio::time::sleep_until(at).await;
                (at, tag)
            }
            None => std::future::pending().await,
        }
    }

    pub(crate) fn take(&mut self, due: (Instant, i64)) {
        self.due.remove(&due);
    }
}
