//! The steps of leadership at the store: look, take, raise the beat, release. Each is a compare-and-set there.

use std::sync::Arc;
use std::time::Duration;

use domain::leadership::{LeaderRow, SILENT_MS, Taken, UNWRITTEN_MS};
use domain::time::Millis;
use domain::{ClusterId, Term};
use proto::link::control_write::Write;
use proto::link::read_control::Read;
use proto::link::{
    ControlBatch, RaiseBeat, ReadCluster, ReadControl, ReleaseLeadership, TakeLeadership,
};
use store::ControlOutcome;
use tokio::time::MissedTickBehavior;
use tracing::{debug, warn};

use crate::actor::{Inbox, Message};
use crate::clock::Backoff;
use crate::journal::Journal;
use crate::shared::{Shared, leader_row, row, within};

const RELEASE_MS: u64 = 1_000;

/// What a look at the control database showed.
#[derive(Default)]
pub(crate) struct Observed {
    /// None: nobody ever led.
    pub(crate) leader: Option<LeaderRow>,
    pub(crate) cluster_id: Option<ClusterId>,
    /// Whose certificates the cluster's members have; none: nobody has said so yet.
    pub(crate) authorities: Vec<String>,
}

/// Tells the actor of a refusal that no trying again ends: a newer version of this program made the database. True if
/// this is one.
pub(crate) fn is_final(inbox: &Inbox, error: &store::Error) -> bool {
    let is_final = matches!(error, store::Error::NewerSchema { .. });
    if is_final {
        // An actor that is gone has ended already.
        _ = inbox.cast(Message::Unusable(error.to_string()));
    }
    is_final
}

/// Why a store of another cluster cannot be used, and what to do.
pub(crate) fn foreign(cluster_id: &str) -> String {
    format!(
        "the store belongs to cluster {cluster_id}, whose certificates come from another authority: use a store of its \
         own for this cluster, or the certificates of that one"
    )
}

/// Lets time pass for the actor, until it is gone.
pub(crate) fn tick(tick_ms: u64, inbox: Inbox) {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(Duration::from_millis(tick_ms));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if inbox.cast(Message::Tick).is_err() {
                return;
            }
        }
    });
}

/// Reads the leader row, patiently: at a start the store may come up a moment after us.
pub(crate) async fn observe(shared: Arc<Shared>, inbox: Inbox) {
    let look = async {
        let mut backoff = Backoff::new();
        loop {
            match look(&shared).await {
                Ok(observed) => return Some(observed),
                Err(error) if is_final(&inbox, &error) => return None,
                Err(error) => debug!(%error, "cannot read the leader row; trying again"),
            }
            backoff.wait().await;
        }
    };
    let patience = Duration::from_millis(SILENT_MS);
    let observed = tokio::time::timeout(patience, look).await;
    if observed.is_err() {
        warn!("cannot read the leader row: the store does not answer");
    }
    _ = inbox.cast(Message::Observed(observed.ok().flatten()));
}

async fn look(shared: &Shared) -> Result<Observed, store::Error> {
    // Every answer of the control database carries the leader row.
    let read = ReadControl { read: Some(Read::Cluster(ReadCluster {})) };
    match shared.store.read_control(&read).await {
        Ok(answer) => Ok(Observed {
            leader: answer.leader.as_ref().map(leader_row),
            cluster_id: answer.cluster_id.parse().ok(),
            authorities: answer.authorities,
        }),
        // A fresh store: the first write makes it.
        Err(store::Error::NotFound { .. }) => Ok(Observed::default()),
        Err(error) => Err(error),
    }
}

pub(crate) async fn take(
    shared: Arc<Shared>,
    inbox: Inbox,
    expected_term: Term,
    expected_beat: u64,
) {
    let take = TakeLeadership {
        name: shared.me.name.to_string(),
        expected_term: expected_term.0,
        expected_beat,
    };
    let batch = ControlBatch { writes: vec![row(Write::Take(take))], ..ControlBatch::default() };
    let taken =
        match within(UNWRITTEN_MS, "taking the leadership", shared.store.control(&batch)).await {
            Ok(ControlOutcome::Done(_)) => Taken::Won,
            Ok(ControlOutcome::NotLeader(row)) => Taken::Lost(leader_row(&row)),
            Err(error) => {
                warn!(%error, "cannot take the leadership");
                Taken::Unknown
            }
        };
    _ = inbox.cast(Message::Taken(taken));
}

pub(crate) async fn raise_beat(shared: Arc<Shared>, inbox: Inbox, term: Term, sent: Millis) {
    let written = shared.write(term, vec![row(Write::Beat(RaiseBeat {}))], UNWRITTEN_MS).await;
    let message = match written {
        Ok(ControlOutcome::Done(_)) => Message::BeatWritten(term, sent),
        Ok(ControlOutcome::NotLeader(_)) => Message::Deposed(term),
        Err(error) => return warn!(%error, "cannot write the leader's beat"),
    };
    _ = inbox.cast(message);
}

/// Hands over cleanly: writes what is in line, then frees the row.
pub(crate) async fn release(shared: Arc<Shared>, term: Term, journal: Option<Journal>) {
    if let Some(journal) = journal {
        journal.finish().await;
    }
    let written =
        shared.write(term, vec![row(Write::Release(ReleaseLeadership {}))], RELEASE_MS).await;
    if let Err(error) = written {
        warn!(%error, "cannot free the leader row: a standby takes it in two seconds");
    }
}
