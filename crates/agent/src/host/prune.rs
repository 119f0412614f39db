//! Deletes what is past its retention.

use std::sync::Arc;

use proto::link::Prune;

use crate::clock;
use crate::shard::Shard;

const PRUNE_CALLS_MAX: u32 = 100;
const DAY_MS: i64 = 24 * 3_600 * 1_000;
/// What a shard keeps of entries of finished works, at most.
const LOG_BYTES_MAX: u64 = 2 << 30;

/// Deletes what is past its retention: entries after a day, works after seven.
pub(super) fn prune(shard: Arc<Shard>) {
    let now_ms = clock::now_ms();
    let prune = Prune {
        epoch: shard.epoch.0,
        entries_before_ms: now_ms - DAY_MS,
        log_bytes_max: LOG_BYTES_MAX,
        works_before_ms: now_ms - 7 * DAY_MS,
        now_ms,
    };
    tokio::spawn(async move {
        // The store deletes a bounded number of slices a call, so that commits are not kept waiting.
        for _ in 0..PRUNE_CALLS_MAX {
            match shard.store.prune(&shard.database, &prune).await {
                Ok(0) => return,
                Ok(rows) => tracing::info!(shard = %shard.id, rows, "pruned"),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(shard = %shard.id, error, "cannot prune");
                    return;
                }
            }
        }
    });
}
