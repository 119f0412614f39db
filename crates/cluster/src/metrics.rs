//! What this crate counts.

use std::fmt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicI64, Ordering};

use telemetry::metrics::{IntCounter, IntCounterVec, IntGauge, counter, counter_vec, gauge};

use crate::clock;

pub(crate) static REFUSED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec(
        "stagedoor_cluster_refused_total",
        "Sessions that were turned away after their TLS handshake.",
        &["reason"],
    )
});
pub(crate) static DROPPED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec(
        "stagedoor_cluster_dropped_total",
        "Frames and envelopes that were dropped.",
        &["reason"],
    )
});
pub(crate) static LINKS: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("stagedoor_cluster_links", "Links that are up."));
pub(crate) static DIALS_FAILED: LazyLock<IntCounter> = LazyLock::new(|| {
    counter("stagedoor_cluster_dials_failed_total", "Attempts to reach a peer that failed.")
});
pub(crate) static OVERLOADED: LazyLock<IntCounter> = LazyLock::new(|| {
    counter(
        "stagedoor_cluster_overloaded_total",
        "Calls and casts refused because the window of their peer is full.",
    )
});
pub(crate) static FRAMES: LazyLock<IntCounter> =
    LazyLock::new(|| counter("stagedoor_cluster_frames_total", "Frames sent."));
pub(crate) static ENVELOPES: LazyLock<IntCounter> =
    LazyLock::new(|| counter("stagedoor_cluster_envelopes_total", "Envelopes sent."));

/// Why sessions are turned away: the values of the label `reason`.
const REASONS: [&str; 13] = [
    "own_name",
    "name_timeout",
    "left",
    "malformed_name",
    "name_mismatch",
    "no_gateway",
    "handshake_timeout",
    "wrong_cookie",
    "ended_by_peer",
    "version",
    "malformed_hello",
    "early",
    "acknowledged",
];

/// Exports refusals from 0, so that they can be compared with it.
pub(crate) fn register() {
    for reason in REASONS {
        REFUSED.with_label_values(&[reason]);
    }
}

/// Counts a session that was turned away, and says so to who may have to act.
pub(crate) fn refused(
    reason: &'static str,
    address: impl fmt::Display,
    subject: impl fmt::Display,
    why: impl fmt::Display,
) {
    REFUSED.with_label_values(&[reason]).inc();
    tracing::warn!(reason, %address, %subject, "refused a session: {why}");
}

/// Counts something that was dropped; logs at most one of a kind a second, since a stranger decides how often.
pub(crate) fn dropped(reason: &'static str, count: usize, last_logged_ms: &AtomicI64) {
    DROPPED.with_label_values(&[reason]).inc_by(count as u64);
    let now = clock::now_ms();
    let last = last_logged_ms.load(Ordering::Relaxed);
    let exchange =
        |now| last_logged_ms.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed);
    if last + 1_000 <= now && exchange(now).is_ok() {
        tracing::warn!(reason, count, "dropped from the cluster");
    }
}
