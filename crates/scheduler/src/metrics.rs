use std::sync::LazyLock;

use telemetry::metrics::{
    IntCounter, IntCounterVec, IntGauge, IntGaugeVec, counter, counter_vec, gauge, gauge_vec,
};

pub(crate) static TERM: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("stagedoor_scheduler_term", "The leadership that is known here."));
pub(crate) static LEADS: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("stagedoor_scheduler_leads", "1 while this replica leads."));
pub(crate) static MEMBERS: LazyLock<IntGaugeVec> = LazyLock::new(|| {
    gauge_vec("stagedoor_scheduler_members", "Nodes that are not dead, by state.", &["state"])
});
pub(crate) static UNLINKED: LazyLock<IntGauge> = LazyLock::new(|| {
    gauge("stagedoor_scheduler_nodes_unlinked", "Nodes that beat and to which no link works.")
});
pub(crate) static SHARDS: LazyLock<IntGaugeVec> =
    LazyLock::new(|| gauge_vec("stagedoor_scheduler_shards", "Shards by state.", &["state"]));
pub(crate) static FENCES: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec("stagedoor_scheduler_fences_total", "Fences by what became of them.", &["outcome"])
});
pub(crate) static GRANTS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec(
        "stagedoor_scheduler_grants_total",
        "Grants that were sent, by whether the node answered that it holds the shard.",
        &["outcome"],
    )
});
pub(crate) static JOINS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec("stagedoor_scheduler_joins_total", "Joins by what became of them.", &["outcome"])
});
pub(crate) static TRANSITIONS: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "stagedoor_scheduler_transitions_total",
        "Transitions that were put in line for the store.",
    )
});
pub(crate) static ROWS_LOST: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "stagedoor_scheduler_rows_lost_total",
        "Rows of the control database that were not written because too many waited or the store refused them.",
    )
});
pub(crate) static MESSAGES_REFUSED: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "stagedoor_scheduler_messages_refused_total",
        "Messages that came while too many waited.",
    )
});
pub(crate) static VIEW: LazyLock<IntGauge> = LazyLock::new(|| {
    gauge("stagedoor_scheduler_view_number", "The number of the view within its term.")
});
