//! What the agents of this process count.

use std::sync::LazyLock;

use prometheus::{IntCounter, IntCounterVec, IntGauge};
use telemetry::metrics::{counter, counter_vec, gauge};

macro_rules! counters {
    ($($name:ident = $text:literal $help:literal;)*) => {
        $(pub(crate) static $name: LazyLock<IntCounter> = LazyLock::new(|| counter($text, $help));)*
    };
}

counters! {
    ACTIVATED = "stagedoor_agent_activated_total" "Agents brought into memory.";
    EVICTED = "stagedoor_agent_evicted_total" "Agents put out of memory after they were idle.";
    RESTARTED = "stagedoor_agent_restarted_total" "Agents started again after a failure.";
    QUARANTINED = "stagedoor_agent_quarantined_total" "Agents given up after too many failures.";
    RECOVERED = "stagedoor_agent_recovered_total" "Agents recovered with unfinished work when a shard was opened.";
    ACCEPTED = "stagedoor_agent_works_accepted_total" "Works accepted.";
    DUPLICATES = "stagedoor_agent_submits_duplicate_total" "Submits whose idempotency key was known.";
    STEPS = "stagedoor_agent_steps_total" "Steps journaled.";
    STEPS_REMOTE = "stagedoor_agent_steps_remote_total" "Steps journaled that ran on another node.";
    STEPS_LATE = "stagedoor_agent_answers_late_total" "Answers of steps that nobody waited for any more.";
    STEPS_EARLY = "stagedoor_agent_steps_early_total" "Steps begun before the commit of the one they rest on: never.";
    JOBS = "stagedoor_agent_jobs_total" "Phase jobs taken by the pools of this node.";
    JOBS_LOST = "stagedoor_agent_jobs_lost_total" "Phase jobs lost with their worker.";
    JOBS_REFUSED = "stagedoor_agent_jobs_refused_total" "Phase jobs refused by a full queue.";
}

pub(crate) static HOT: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("stagedoor_agent_hot", "Agents in memory."));
pub(crate) static SHARDS: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("stagedoor_agent_shards", "Shards that this node has opened."));
pub(crate) static ENDED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec("stagedoor_agent_works_ended_total", "Works ended.", &["state", "reason"])
});
pub(crate) static REFUSED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec("stagedoor_agent_refused_total", "Requests refused.", &["reason"])
});
