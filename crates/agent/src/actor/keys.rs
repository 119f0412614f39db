//! The idempotency keys of one activation, by their order: an agent with few pays for few.

use domain::{IdempotencyKey, Lsn};

/// A key, its work, and the fingerprint of its input.
type Known = (IdempotencyKey, Lsn, [u8; 32]);

#[derive(Default)]
pub(super) struct Keys(Vec<Known>);

impl Keys {
    /// Beyond that they are looked up in the store.
    const MAX: usize = 1_024;

    pub(super) fn is_full(&self) -> bool {
        Self::MAX <= self.0.len()
    }

    pub(super) fn get(&self, key: &IdempotencyKey) -> Option<(Lsn, [u8; 32])> {
        let at = self.find(key).ok()?;
        let (_, work, input) = &self.0[at];
        Some((*work, *input))
    }

    /// Keeps it, unless there are too many.
    pub(super) fn insert(&mut self, key: IdempotencyKey, work: Lsn, input: [u8; 32]) {
        if self.is_full() {
            return;
        }
        match self.find(&key) {
            Ok(at) => self.0[at] = (key, work, input),
            Err(at) => {
                self.0.reserve_exact(1);
                self.0.insert(at, (key, work, input));
            }
        }
    }

    fn find(&self, key: &IdempotencyKey) -> Result<usize, usize> {
        self.0.binary_search_by(|(known, ..)| known.cmp(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: usize) -> IdempotencyKey {
        format!("k{number}").parse().unwrap()
    }

    #[test]
    fn what_was_kept_is_found_and_the_last_word_counts() {
        let mut keys = Keys::default();
        for number in [3, 1, 2] {
            keys.insert(key(number), Lsn(number as u64), [0; 32]);
        }
        keys.insert(key(2), Lsn(7), [1; 32]);
        assert_eq!(keys.get(&key(1)), Some((Lsn(1), [0; 32])));
        assert_eq!(keys.get(&key(2)), Some((Lsn(7), [1; 32])));
        assert_eq!(keys.get(&key(4)), None);
    }

    #[test]
    fn there_is_an_end_to_them() {
        let mut keys = Keys::default();
        for number in 0..=Keys::MAX {
            assert_eq!(keys.is_full(), number == Keys::MAX);
            keys.insert(key(number), Lsn(1), [0; 32]);
        }
        assert_eq!(keys.get(&key(Keys::MAX)), None);
    }
}
