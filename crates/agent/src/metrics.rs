//! What the agents of this process count.

use std::sync::LazyLock;

use prometheus::{IntCounter, IntCounterVec, IntGauge};
use telemetry::metrics::{counter, counter_vec, gauge};

macro_rules! counters {
    ($($name:ident = $text:literal $help:literal;)*) => {
        $(pub(crate) static $name: LazyLock<IntCounter> = LazyLock::new(|| counter($text, $help));)*

        fn register_counters() {
            $(LazyLock::force(&$name);)*
        }
    };
}

counters! {
    ACTIVATED = "stagedoor_agent_activated_total" "Agents brought into memory.";
    EVICTED = "stagedoor_agent_evicted_total" "Agents put out of memory after they were idle.";
    RESTARTED = "stagedoor_agent_restarted_total" "Agents started again after a failure.";
    FAILURES_UNTOLD = "stagedoor_agent_failures_untold_total" "Failures of agents that no leader took note of.";
    QUARANTINED = "stagedoor_agent_quarantined_total" "Agents given up after too many failures.";
    RECOVERED = "stagedoor_agent_recovered_total" "Agents recovered with unfinished work when a shard was opened.";
    ACCEPTED = "stagedoor_agent_works_accepted_total" "Works accepted.";
    DUPLICATES = "stagedoor_agent_submits_duplicate_total" "Submits whose idempotency key was known.";
    STEPS = "stagedoor_agent_steps_total" "Steps journaled.";
    STEPS_REMOTE = "stagedoor_agent_steps_remote_total" "Steps journaled that ran on another node.";
    STEPS_LATE = "stagedoor_agent_answers_late_total" "Answers of steps that nobody waited for any more.";
    STEPS_EARLY = "stagedoor_agent_steps_early_total" "Steps begun before the entries that they rest on were acknowledged as committed: never.";
    STEPS_NAMED = "stagedoor_agent_steps_named_total" "Steps that workers had when a shard was opened.";
    STEPS_TAKEN_OVER = "stagedoor_agent_steps_taken_over_total" "Steps whose answer an owner before had asked for, journaled.";
    DOUBTS = "stagedoor_agent_doubts_total" "Steps that came to be in doubt.";
    INTENTS_RENEWED = "stagedoor_agent_intents_renewed_total" "Intents that were too old to be acted on and were journaled again.";
    JOBS = "stagedoor_agent_jobs_total" "Jobs taken by the pools of this node.";
    JOBS_LOST = "stagedoor_agent_jobs_lost_total" "Jobs lost with their worker.";
    JOBS_REFUSED = "stagedoor_agent_jobs_refused_total" "Jobs refused by a full queue.";
    JOBS_LATE = "stagedoor_agent_jobs_late_total" "Jobs not begun because they were past their deadline or too old.";
    WATCHES_RECENT = "stagedoor_agent_watches_recent_total" "Subscriptions to works that had ended which were told from memory, without the store.";
    TEXTS_CUT = "stagedoor_agent_texts_cut_total" "Attempts of models' calls that said more than the owner had room for: the step shows the rest once it is journaled.";
    ANSWERS_DROPPED = "stagedoor_agent_answers_dropped_total" "Answers that nobody had in a journal yet, let go for want of room.";
    ANSWERS_ROUTED = "stagedoor_agent_answers_routed_total" "Answers told to a later owner than the one that asked, and taken.";
    STOOD_STILL = "stagedoor_agent_stood_still_total" "How often this process stood still for more than a second.";
}

pub(crate) static HOT: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("stagedoor_agent_hot", "Agents in memory."));
pub(crate) static RECOVERING: LazyLock<IntGauge> = LazyLock::new(|| {
    gauge(
        "stagedoor_agent_recovering",
        "Agents that are being recovered now, of the room for them.",
    )
});
pub(crate) static SHARDS: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("stagedoor_agent_shards", "Shards that this node has opened."));
pub(crate) static STORE_SILENT_MS: LazyLock<IntGauge> = LazyLock::new(|| {
    gauge(
        "stagedoor_agent_store_silent_ms",
        "For how long the store has not answered this node, milliseconds; of several the one that is silent longest.",
    )
});
pub(crate) static ENDED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec("stagedoor_agent_works_ended_total", "Works ended.", &["state", "reason"])
});
pub(crate) static REFUSED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec("stagedoor_agent_refused_total", "Requests refused.", &["reason"])
});
pub(crate) static TOOL_CALLS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec("stagedoor_tool_calls_total", "Tool calls that were begun.", &["tool"])
});

/// Exports everything from 0, so that a series that is not there is a mistake of whoever looks for it.
pub(crate) fn register(tools: &tool::Registry) {
    register_counters();
    LazyLock::force(&HOT);
    LazyLock::force(&SHARDS);
    LazyLock::force(&STORE_SILENT_MS);
    LazyLock::force(&RECOVERING);
    for tool in tools.tools() {
        TOOL_CALLS.with_label_values(&[tool.name()]);
    }
}
