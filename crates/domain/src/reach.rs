//! Whether an owner stays out of reach of one process, while it goes on owning for all others.

use crate::time::Millis;

/// So long an owner may be out of reach and go on owning. Longer than a dead one does, even if its leader died with it: then
/// the fault lies between it and who calls, and another process may reach it.
pub const UNREACHED_MS: u64 = 8_000;

/// Which owner no word gets to, and since when. `O` is an owner of a shard in an epoch.
#[derive(Debug)]
pub struct Unreached<O>(Option<(O, Millis)>);

impl<O> Default for Unreached<O> {
    fn default() -> Self {
        Self(None)
    }
}

impl<O: PartialEq> Unreached<O> {
    /// No word got to this one. Whether it is so for longer than it may be.
    pub fn missed(&mut self, owner: O, now: Millis) -> bool {
        match &self.0 {
            Some((before, since)) if *before == owner => UNREACHED_MS <= now.since(*since),
            Some(_) | None => {
                self.0 = Some((owner, now));
                false
            }
        }
    }

    /// It said something, or there is none.
    pub fn reached(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_stays_and_is_never_reached_is_missed_for_long() {
        let mut unreached = Unreached::default();
        assert!(!unreached.missed("node-1", Millis(10)));
        assert!(!unreached.missed("node-1", Millis(9 + UNREACHED_MS)));
        assert!(unreached.missed("node-1", Millis(10 + UNREACHED_MS)));
        assert!(
            !unreached.missed("node-2", Millis(10 + UNREACHED_MS)),
            "another owner has its time"
        );
        unreached.reached();
        assert!(!unreached.missed("node-2", Millis(60_000)), "it was reached meanwhile");
    }
}
