//! What a shard may forget of its log: entries of finished works that are old, and younger ones when there is too much.

/// What a row of the log takes beside its payload, about, in bytes.
const ROW_BYTES: u64 = 40;

/// Some rows of a log, or of another table, that stand one after another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The lsn of the last one, and of the last row of the whole log.
    pub last: u64,
    pub head: u64,
    pub rows: u64,
    /// Of their payloads, in bytes.
    pub payload: u64,
    pub oldest_ms: i64,
}

impl Seen {
    /// About the bytes of the log from here on, as if all rows above were like these: summing it all up would read all of it.
    /// Old rows that have to stay leave holes between them, which do not count; if they fill a whole slice, the holes above
    /// it do, and what is old goes a little early.
    pub fn log_bytes(&self) -> u64 {
        let slice = u128::from(self.payload) + u128::from(self.rows) * u128::from(ROW_BYTES);
        let above = u128::from(self.head.saturating_sub(self.last));
        let above = slice.saturating_mul(above) / u128::from(self.rows.max(1));
        u64::try_from(slice.saturating_add(above)).unwrap_or(u64::MAX)
    }

    /// Entries of this slice from before which time may go. None: none of them. `bytes_max` 0 is no limit.
    pub fn goes_before(&self, before_ms: i64, bytes_max: u64) -> Option<i64> {
        // Over the limit of bytes even young entries go, the oldest first.
        let is_over = bytes_max != 0 && bytes_max < self.log_bytes();
        let before_ms = if is_over { i64::MAX } else { before_ms };
        (self.oldest_ms < before_ms).then_some(before_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Of rows that are all alike the estimate is right, wherever the slice ends and whatever is missing below it.
        #[test]
        fn the_estimate_of_like_rows_is_right(
            rows in 1_u64..5_000, above in 0_u64..1_000_000, payload in 0_u64..10_000, hole in 0_u64..1_000_000,
        ) {
            let last = hole + rows;
            let slice = Seen { last, head: last + above, rows, payload: payload * rows, oldest_ms: 0 };
            prop_assert_eq!(slice.log_bytes(), (rows + above) * (payload + ROW_BYTES));
        }

        /// What is old goes, and what is young only from a log over its limit: then up to the time of everything.
        #[test]
        fn what_is_young_goes_only_when_there_is_too_much(
            oldest_ms in 0_i64..1_000, before_ms in 0_i64..1_000, bytes_max in 0_u64..10_000, head in 10_u64..1_000,
        ) {
            let slice = Seen { last: 10, head, rows: 10, payload: 100, oldest_ms };
            let goes = slice.goes_before(before_ms, bytes_max);
            let is_over = bytes_max != 0 && bytes_max < slice.log_bytes();
            let until = if is_over { i64::MAX } else { before_ms };
            prop_assert_eq!(goes, (is_over || oldest_ms < before_ms).then_some(until));
        }
    }

    #[test]
    fn numbers_that_no_log_has_do_no_harm() {
        let slice = Seen { last: 0, head: u64::MAX, rows: 0, payload: u64::MAX, oldest_ms: 5 };
        assert_eq!(slice.log_bytes(), u64::MAX);
        assert_eq!(slice.goes_before(5, 0), None);
    }
}
