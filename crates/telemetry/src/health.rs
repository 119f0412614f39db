//! Whether a process can take work, and if not, why.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A reason may carry a name or an address; a process that is unwell for very many reasons need not list them all.
const REASONS_MAX: usize = 16;

/// Shared by whoever knows the state of the process and the admin listener that tells it.
#[derive(Clone, Debug)]
pub struct Health {
    /// Ready means that there is no reason not to be.
    reasons: Arc<Mutex<BTreeSet<String>>>,
}

impl Health {
    /// A process that has not come up yet.
    pub fn starting() -> Self {
        Self { reasons: Arc::new(Mutex::new(BTreeSet::from(["starting".to_owned()]))) }
    }

    /// Forgets every reason.
    pub fn set_ready(&self) {
        self.reasons().clear();
    }

    /// Adds a reason; the earlier ones stay until [`Health::set_ready`].
    pub fn set_not_ready(&self, reason: &str) {
        let mut reasons = self.reasons();
        if reasons.len() < REASONS_MAX {
            reasons.insert(reason.to_owned());
        }
    }

    pub fn is_ready(&self) -> bool {
        self.reasons().is_empty()
    }

    /// Sorted; empty when ready.
    pub fn reasons_not_ready(&self) -> Vec<String> {
        self.reasons().iter().cloned().collect()
    }

    fn reasons(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // A set of strings is whole at every moment, also when a holder panicked.
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_only_when_told_so() {
        let health = Health::starting();
        assert_eq!(health.reasons_not_ready(), ["starting"]);
        health.set_ready();
        assert!(health.is_ready());
        health.set_not_ready("store unreachable");
        health.set_not_ready("control unreachable");
        assert_eq!(health.reasons_not_ready(), ["control unreachable", "store unreachable"]);
    }

    #[test]
    fn the_list_of_reasons_is_bounded() {
        let health = Health::starting();
        (0..1_000).for_each(|n| health.set_not_ready(&format!("peer {n} is gone")));
        assert_eq!(health.reasons_not_ready().len(), REASONS_MAX);
    }
}
