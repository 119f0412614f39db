//! What can be set about the agents of a node.

use std::num::NonZeroU32;

use serde::Deserialize;

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
