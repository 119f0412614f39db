//! What the leader writes down for people and for its successors: nodes and transitions, in order, behind its back.
//!
//! Never holds up a decision: safety rests on the owner rows, not on what is written here. Too many rows are counted
//! and left out.

use std::sync::Arc;
use std::time::Duration;

use domain::{Epoch, Reason, Term};
use proto::link::{ControlWrite, PutNode, PutTransition, control_write::Write};
use store::ControlOutcome;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{error, warn};

use crate::actor::{Inbox, Message};
use crate::clock::{Backoff, wall_ms};
use crate::metrics;
use crate::shared::{Shared, row};

/// Rows of one batch.
const BATCH_ROWS_MAX: usize = 256;
const WRITE_MS: u64 = 5_000;
/// How long a leader that hands over waits for what is in line.
const FINISH: Duration = Duration::from_secs(1);

/// A change of a thing, but for when and in which term.
pub(crate) struct Transition<'a> {
    pub(crate) subject: String,
    pub(crate) from: &'a str,
    pub(crate) to: &'a str,
    pub(crate) reason: Reason,
    pub(crate) cause: String,
    pub(crate) epoch: Epoch,
    pub(crate) node: String,
}

/// The rows of one term in line for the control database.
pub(crate) struct Journal {
    term: Term,
    queue: mpsc::Sender<ControlWrite>,
    writer: JoinHandle<()>,
}

impl Journal {
    pub(crate) fn open(term: Term, shared: Arc<Shared>, inbox: Inbox) -> Self {
        let (queue, rows) = mpsc::channel(shared.config.journal_rows_max);
        let writer = tokio::spawn(write_all(term, shared, inbox, rows));
        Self { term, queue, writer }
    }

    pub(crate) fn node(&self, node: PutNode) {
        self.put(Write::Node(node));
    }

    pub(crate) fn transition(&self, transition: Transition<'_>) {
        metrics::TRANSITIONS.inc();
        self.put(Write::Transition(PutTransition {
            subject: transition.subject,
            from: transition.from.to_owned(),
            to: transition.to.to_owned(),
            reason: transition.reason.code().into(),
            cause: transition.cause,
            epoch: transition.epoch.0,
            node: transition.node,
            at_ms: wall_ms(),
            term: self.term.0,
        }));
    }

    pub(crate) fn put(&self, write: Write) {
        if self.queue.try_send(row(write)).is_err() {
            lost(1, "too many wait for the store");
        }
    }

    /// Writes what is in line, for a moment.
    pub(crate) async fn finish(self) {
        let Self { queue, mut writer, .. } = self;
        drop(queue);
        if tokio::time::timeout(FINISH, &mut writer).await.is_err() {
            writer.abort();
            warn!("gave up writing the last transitions: the store does not answer");
        }
    }

    /// Leaves what is in line: another leads.
    pub(crate) fn abandon(self) {
        self.writer.abort();
    }
}

fn lost(rows: usize, why: &str) {
    metrics::ROWS_LOST.inc_by(rows as u64);
    warn!(rows, why, "left rows of the control database unwritten");
}

async fn write_all(
    term: Term,
    shared: Arc<Shared>,
    inbox: Inbox,
    mut rows: mpsc::Receiver<ControlWrite>,
) {
    let mut batch = Vec::new();
    while 0 < rows.recv_many(&mut batch, BATCH_ROWS_MAX).await {
        if !write(term, &shared, std::mem::take(&mut batch)).await {
            // The actor may be gone already; then nothing is left to stop.
            _ = inbox.cast(Message::Deposed(term));
            return;
        }
    }
}

/// Writes one batch. False: we do not lead any more.
///
/// A batch whose outcome is unknown is sent again; rows of nodes are the same then, a transition may stand there twice.
async fn write(term: Term, shared: &Shared, batch: Vec<ControlWrite>) -> bool {
    let mut backoff = Backoff::new();
    loop {
        match shared.write(term, batch.clone(), WRITE_MS).await {
            Ok(ControlOutcome::Done(_)) => return true,
            Ok(ControlOutcome::NotLeader(_)) => return false,
            Err(error) if error.kind().is_retryable() => {
                warn!(%error, "cannot write transitions; trying again");
                backoff.wait().await;
            }
            Err(error) => {
                error!(%error, "the store refused transitions");
                lost(batch.len(), "the store refused them");
                return true;
            }
        }
    }
}
