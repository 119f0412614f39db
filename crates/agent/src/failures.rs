//! What the leader is told of agents that fail, so that it is written down where it can be found without the node.
//!
//! Told until somebody leads and has taken it, for a while; so many at once. What is left out is counted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt};
use prost::Message;

use domain::Reason;
use proto::kind;
use proto::link::{AgentFailed, Envelope};

use crate::metrics;
use crate::shard::{Context, Shard, lock};

/// Of all agents of a node that wait for the leader to take note.
pub(crate) const WAITING_MAX: usize = 1_024;
const TRIES: u32 = 20;
const AGAIN: Duration = Duration::from_millis(500);
const CALL_MAX: Duration = Duration::from_secs(2);
/// An error may quote what it could not read.
const DETAIL_CHARS_MAX: usize = 300;

/// An agent of `shard` failed, and `reason` is what follows.
pub(crate) fn tell(shard: &Shard, agent: String, reason: Reason, failures: u32, detail: &str) {
    let node = shard.node.clone();
    let Ok(room) = node.failures.clone().try_acquire_owned() else {
        return metrics::FAILURES_UNTOLD.inc();
    };
    let failed = AgentFailed {
        agent,
        shard: shard.id.0,
        epoch: shard.epoch.0,
        reason: reason.code().into(),
        failures,
        detail: detail.chars().take(DETAIL_CHARS_MAX).collect(),
    };
    tokio::spawn(async move {
        for _ in 0..TRIES {
            if is_taken(&node, &failed).await {
                return drop(room);
            }
            tokio::time::sleep(AGAIN).await;
        }
        metrics::FAILURES_UNTOLD.inc();
    });
}

/// Whether one of the control replicas leads, and has it or never will. All are asked at once: one that was stopped answers
/// nobody.
async fn is_taken(node: &Arc<Context>, failed: &AgentFailed) -> bool {
    let controls = lock(&node.controls).clone();
    let asked = controls.into_iter().map(|control| {
        let payload = failed.encode_to_vec().into();
        let envelope = Envelope { kind: kind::AGENT_FAILED, payload, ..Envelope::default() };
        node.wire.call(control, envelope, Instant::now() + CALL_MAX)
    });
    let mut answers: FuturesUnordered<_> = asked.collect();
    let mut is_malformed = false;
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(_) => return true,
            Err(cluster::Error::Refused(refusal))
                if cluster::reason_of(&refusal) == Some(Reason::Malformed) =>
            {
                tracing::warn!(
                    agent = failed.agent,
                    message = refusal.message,
                    "a control replica cannot read what it is told of a failure"
                );
                is_malformed = true;
            }
            Err(error) => {
                tracing::debug!(agent = failed.agent, %error, "a failure is not told yet")
            }
        }
    }
    if is_malformed {
        // Asking again changes nothing: it is of another version.
        metrics::FAILURES_UNTOLD.inc();
    }
    is_malformed
}
