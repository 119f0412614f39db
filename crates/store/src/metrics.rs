//! What this crate counts.

use std::sync::LazyLock;

use telemetry::metrics::{
    Histogram, IntCounter, IntCounterVec, IntGauge, LATENCY_BUCKETS_SECONDS, counter, counter_vec,
    gauge, histogram,
};

macro_rules! metric {
    ($name:ident: $kind:ty = $make:expr) => {
        pub(crate) static $name: LazyLock<$kind> = LazyLock::new(|| $make);
    };
}

metric!(OPEN_DATABASES: IntGauge = gauge("stagedoor_store_databases_open", "Database files open for writing."));
metric!(COMMITS: IntCounterVec = counter_vec("stagedoor_store_commits_total", "Commits that the engine was asked for.", &["outcome"]));
metric!(COMMITTED_ROWS: IntCounter = counter("stagedoor_store_committed_rows_total", "Log rows that the engine committed."));
metric!(ENGINE_SECONDS: Histogram = histogram("stagedoor_store_engine_commit_seconds", "Time of one commit in the engine.", LATENCY_BUCKETS_SECONDS));
metric!(PRUNED_ROWS: IntCounter = counter("stagedoor_store_pruned_rows_total", "Rows deleted because they were old."));
metric!(DENIED: IntCounter = counter("stagedoor_store_denied_total", "Requests refused for the role of their sender."));
metric!(RECONNECTS: IntCounter = counter("stagedoor_store_connections_total", "Connections that store clients opened."));

metric!(GATHERED: IntCounter = counter("stagedoor_store_writer_gathered_total", "How often a shard writer let more rows come because the store was busy."));
metric!(GROUPS: IntCounter = counter("stagedoor_store_writer_groups_total", "Groups that shard writers committed."));
metric!(GROUP_ROWS: IntCounter = counter("stagedoor_store_writer_rows_total", "Log rows that shard writers committed."));
metric!(GROUP_BYTES: IntCounter = counter("stagedoor_store_writer_bytes_total", "Payload bytes that shard writers committed."));
metric!(COMMIT_SECONDS: Histogram = histogram("stagedoor_store_writer_commit_seconds", "From the cut of a group to its acknowledgement.", LATENCY_BUCKETS_SECONDS));
metric!(WAITING_ROWS: IntGauge = gauge("stagedoor_store_writer_waiting_rows", "Rows that wait for a commit, all shards together."));
metric!(OVERLOADED: IntCounter = counter("stagedoor_store_writer_overloaded_total", "Appends refused because too much waited."));
metric!(UNKNOWN: IntCounter = counter("stagedoor_store_writer_unknown_total", "Commits whose answer was lost."));
metric!(FENCED: IntCounter = counter("stagedoor_store_writer_fenced_total", "Shard writers that were fenced."));

/// Exports everything from 0, so that a series that is not there is a mistake of whoever looks for it.
pub(crate) fn register() {
    for gauge in [&OPEN_DATABASES, &WAITING_ROWS] {
        LazyLock::force(gauge);
    }
    let engine = [&COMMITTED_ROWS, &PRUNED_ROWS, &DENIED, &RECONNECTS];
    let writer = [&GATHERED, &GROUPS, &GROUP_ROWS, &GROUP_BYTES, &OVERLOADED, &UNKNOWN, &FENCED];
    for counter in engine.into_iter().chain(writer) {
        LazyLock::force(counter);
    }
    for histogram in [&ENGINE_SECONDS, &COMMIT_SECONDS] {
        LazyLock::force(histogram);
    }
    for outcome in ["committed", "fenced", "head", "error"] {
        COMMITS.with_label_values(&[outcome]);
    }
}
