use crate::Error;

/// How this control replica leads.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Shards of the class `{}`, 1 to 4096. Counts when the cluster is made; later its store says how many there are.
    pub shards: u16,
    /// Shards that were never owned are placed as soon as so many nodes are in, or after `settle_ms`.
    pub nodes_expected: u32,
    /// How long a new leader waits for nodes that it has not heard yet, milliseconds; two seconds at least.
    pub settle_ms: u64,
    /// Shards that may be on their way from one live node to another at once.
    pub moves_max: usize,
    /// How long after one such move the next may begin, milliseconds.
    pub move_every_ms: u64,
    /// How often time passes for the machines, milliseconds; at most 100.
    pub tick_ms: u64,
    /// How long a TCP connect to a suspect may take, milliseconds.
    pub probe_timeout_ms: u64,
    /// How long the answer to a grant is waited for, milliseconds.
    pub grant_timeout_ms: u64,
    /// Changes of the view that come within this time go out together, milliseconds.
    pub coalesce_ms: u64,
    /// Rows that may wait for the control database; what comes on top is counted and not written.
    pub journal_rows_max: usize,
    /// Messages of other processes that may wait, and heartbeats; what comes on top is refused, or not counted.
    pub messages_max: usize,
    /// Shard databases that are read or made at once.
    pub store_calls_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            shards: 64,
            nodes_expected: 1,
            settle_ms: 2_000,
            moves_max: 4,
            move_every_ms: 20,
            tick_ms: 50,
            probe_timeout_ms: 300,
            grant_timeout_ms: 500,
            coalesce_ms: 5,
            journal_rows_max: 4_096,
            messages_max: 1_024,
            store_calls_max: 16,
        }
    }
}

impl Config {
    /// # Errors
    /// A number that is out of its range.
    pub fn check(&self) -> Result<(), Error> {
        let refuse = |field, value: u64, allowed| {
            Err(Error::Config { field, value: value.to_string(), allowed })
        };
        if self.shards == 0 || domain::slot::SLOTS < self.shards {
            return refuse("shards", self.shards.into(), "1 to 4096");
        }
        if self.tick_ms == 0 || 100 < self.tick_ms {
            return refuse("tick_ms", self.tick_ms, "1 to 100");
        }
        let counts = [
            ("journal_rows_max", self.journal_rows_max),
            ("messages_max", self.messages_max),
            ("moves_max", self.moves_max),
            ("store_calls_max", self.store_calls_max),
        ];
        for (field, count) in counts {
            if count == 0 || 1_000_000 < count {
                return refuse(field, count as u64, "1 to 1000000");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_allowed_and_what_is_out_of_range_is_named() {
        assert!(Config::default().check().is_ok());
        let check = |config: Config, field: &str| {
            let text = config.check().unwrap_err().to_string();
            assert!(text.contains(field), "{text}");
        };
        check(Config { shards: 0, ..Config::default() }, "shards");
        check(Config { shards: 4_097, ..Config::default() }, "shards");
        check(Config { tick_ms: 101, ..Config::default() }, "tick_ms");
        check(Config { messages_max: 0, ..Config::default() }, "messages_max");
    }
}
