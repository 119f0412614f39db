//! What can be set about the agents of a node.

use std::num::NonZeroU32;

use serde::Deserialize;

use crate::Error;

/// Of what is counted in bytes or milliseconds here.
const MOST: u64 = u32::MAX as u64;
/// Of what waits, or is asked at once.
const MANY: u64 = 1_000_000;
/// Workers are started with their pool, so many for each.
const WORKERS_MAX: u64 = 4_096;

/// Limits and times of the agents of one node.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// After this long without work an agent is evicted from memory, in milliseconds.
    pub idle_ms: u64,
    /// Inputs of works that are accepted and not ended, of all agents of the node, in bytes.
    pub queued_bytes_max: usize,
    /// Entries of one shard that wait to be committed; beyond that no work is accepted.
    pub waiting_entries_max: usize,
    /// Agents that are recovered at once.
    pub recovering_max: NonZeroU32,
    /// Bytes of their snapshots and journals that they read at once; a single agent may need more.
    pub recovering_bytes_max: usize,
    /// Reads of one shard on behalf of clients at once.
    pub reads_max: usize,
    /// A phase or a model's call that is not answered after this long is given to another worker, in milliseconds.
    pub phase_timeout_ms: u64,
    /// A tool's call is waited for this long, in milliseconds.
    pub tool_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            idle_ms: 10_000,
            queued_bytes_max: 64 << 20,
            waiting_entries_max: 8_192,
            recovering_max: const { NonZeroU32::new(1_024).unwrap() },
            recovering_bytes_max: 64 << 20,
            reads_max: 64,
            phase_timeout_ms: 60_000,
            tool_timeout_ms: 30_000,
        }
    }
}

impl Config {
    /// What the types cannot say.
    ///
    /// # Errors
    /// The field that is out of its range.
    pub fn check(&self) -> Result<(), Error> {
        in_range("agents.idle_ms", self.idle_ms, MOST)?;
        in_range("agents.queued_bytes_max", self.queued_bytes_max as u64, MOST)?;
        in_range("agents.waiting_entries_max", self.waiting_entries_max as u64, MANY)?;
        in_range("agents.recovering_max", self.recovering_max.get().into(), MANY)?;
        in_range("agents.recovering_bytes_max", self.recovering_bytes_max as u64, MOST)?;
        in_range("agents.reads_max", self.reads_max as u64, MANY)?;
        in_range("agents.phase_timeout_ms", self.phase_timeout_ms, MOST)?;
        in_range("agents.tool_timeout_ms", self.tool_timeout_ms, MOST)
    }
}

fn in_range(field: &'static str, value: u64, most: u64) -> Result<(), Error> {
    if (1..=most).contains(&value) { Ok(()) } else { Err(Error::Config { field, value, most }) }
}

/// Which phases this node offers.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PhasesConfig {
    /// Names of phases; all six by default.
    pub offer: Vec<domain::Phase>,
    /// What the pools work on.
    pub modality: String,
    /// Jobs of one phase, tool, or of all models, that run at once.
    pub workers: usize,
    /// Jobs of one pool that wait for a worker; more are refused.
    pub queue_max: usize,
    /// A worker that has not ended its job after this long is replaced, in milliseconds.
    pub stuck_ms: u64,
}

impl Default for PhasesConfig {
    fn default() -> Self {
        Self {
            offer: domain::Phase::ALL.to_vec(),
            modality: "text".to_owned(),
            workers: 4,
            queue_max: 2_048,
            stuck_ms: 120_000,
        }
    }
}

impl PhasesConfig {
    /// What the types cannot say.
    ///
    /// # Errors
    /// The field that is out of its range.
    pub fn check(&self) -> Result<(), Error> {
        in_range("phases.workers", self.workers as u64, WORKERS_MAX)?;
        in_range("phases.queue_max", self.queue_max as u64, MANY)?;
        in_range("phases.stuck_ms", self.stuck_ms, MOST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_of_its_range_is_named() {
        assert!(Config::default().check().is_ok() && PhasesConfig::default().check().is_ok());
        let named = |checked: Result<(), Error>, field: &str| {
            let text = checked.unwrap_err().to_string();
            assert!(text.contains(field), "{text}");
        };
        let agents = Config::default;
        named(Config { idle_ms: 0, ..agents() }.check(), "agents.idle_ms");
        named(Config { queued_bytes_max: usize::MAX, ..agents() }.check(), "queued_bytes_max");
        named(Config { waiting_entries_max: 0, ..agents() }.check(), "waiting_entries_max");
        named(Config { recovering_bytes_max: 0, ..agents() }.check(), "recovering_bytes_max");
        named(Config { reads_max: 0, ..agents() }.check(), "agents.reads_max");
        named(Config { phase_timeout_ms: 0, ..agents() }.check(), "agents.phase_timeout_ms");
        named(Config { tool_timeout_ms: 0, ..agents() }.check(), "agents.tool_timeout_ms");
        let phases = PhasesConfig::default;
        named(PhasesConfig { workers: 0, ..phases() }.check(), "phases.workers");
        named(PhasesConfig { workers: 4_097, ..phases() }.check(), "1 to 4096");
        named(PhasesConfig { queue_max: 0, ..phases() }.check(), "phases.queue_max");
        named(PhasesConfig { stuck_ms: 0, ..phases() }.check(), "phases.stuck_ms");
    }

    #[test]
    fn an_agent_leaves_memory_after_ten_seconds_without_work() {
        assert_eq!(Config::default().idle_ms, 10_000);
    }
}
