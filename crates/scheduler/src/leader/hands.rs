//! What a leader does outside: each a task, whose result comes back as a message that names the term.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use domain::membership::{Held, Probe};
use domain::ownership::{FenceResult, OwnerRow, STORE_MS};
use domain::{Epoch, Incarnation, Member, ProcessName, ShardId, Term};
use prost::Message as _;
use proto::kind;
use proto::link::{Fence, Grant, Provision, PutShard};
use store::FenceOutcome;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::actor::{Inbox, Message};
use crate::shared::{Shared, envelope, node_peer, within};
use crate::steps;

const COMPLAINT_MS: u64 = 1_000;

/// What became of something that the leader of a term did.
pub(crate) enum Outcome {
    Loaded(Box<super::Loaded>),
    OwnerRead(ShardId, Option<OwnerRow>),
    Fenced(ShardId, FenceResult),
    Granted(Member, ShardId, Epoch, Option<Held>),
    Probed(Member, Probe),
    /// How many nodes each replica that answered hears.
    Sighted(Vec<(ProcessName, usize)>),
}

/// Cheap to clone: a task takes one.
#[derive(Clone)]
pub(crate) struct Hands {
    pub(crate) term: Term,
    pub(crate) shared: Arc<Shared>,
    inbox: Inbox,
    store_calls: Arc<Semaphore>,
    /// When we last complained of the store, in milliseconds of our clock: an outage is one line a second, not one for
    /// each shard and attempt.
    complained: Arc<AtomicU64>,
}

impl Hands {
    pub(crate) fn new(term: Term, shared: Arc<Shared>, inbox: Inbox) -> Self {
        let store_calls = Arc::new(Semaphore::new(shared.config.store_calls_max));
        Self { term, shared, inbox, store_calls, complained: Arc::default() }
    }

    pub(crate) fn report(&self, outcome: Outcome) {
        // An actor that is gone needs no results.
        _ = self.inbox.cast(Message::Done(self.term, outcome));
    }

    pub(crate) fn deposed(&self) {
        _ = self.inbox.cast(Message::Deposed(self.term));
    }

    /// The store turned out to be another cluster's.
    pub(crate) fn foreign(&self, cluster_id: &str) {
        _ = self.inbox.cast(Message::Unusable(steps::foreign(cluster_id)));
    }

    /// Whether nothing will ever come of asking again; then the scheduler ends.
    pub(crate) fn is_final(&self, error: &store::Error) -> bool {
        steps::is_final(&self.inbox, error)
    }

    pub(crate) fn complain(&self, shard: u32, what: &'static str, error: &store::Error) {
        if self.is_final(error) {
            return;
        }
        let now = self.shared.clock.now().0.saturating_add(COMPLAINT_MS);
        let last = self.complained.load(Ordering::Relaxed);
        if now < last.saturating_add(COMPLAINT_MS) {
            return debug!(shard, what, %error, "the store failed; trying again");
        }
        self.complained.store(now, Ordering::Relaxed);
        warn!(shard, what, %error, "the store failed; trying again");
    }

    /// Reads the owner row; makes the database if it is missing.
    pub(crate) async fn owner(
        &self,
        cluster_id: &str,
        shard: &PutShard,
    ) -> Result<OwnerRow, store::Error> {
        // Closed never: it lives as long as we do.
        let _permit = self.store_calls.acquire().await;
        let provision = Provision { cluster_id: cluster_id.to_owned(), shard: shard.shard };
        let call = self.shared.store.provision(&shard.database, &provision);
        within(STORE_MS, "reading an owner row", call).await.and_then(owner_row)
    }

    pub(crate) async fn read_owner(self, cluster_id: String, shard: PutShard) {
        let row = self.owner(&cluster_id, &shard).await;
        let row =
            row.inspect_err(|error| self.complain(shard.shard, "reading an owner row", error));
        self.report(Outcome::OwnerRead(ShardId(shard.shard), row.ok()));
    }

    /// Fences never wait for reads: a dead node's agents wait for them.
    pub(crate) async fn fence(self, shard: PutShard, expected: Epoch, above: Epoch, to: Member) {
        let fence = Fence {
            expected: expected.0,
            node: to.name.to_string(),
            incarnation: to.incarnation.0,
            term: self.term.0,
            above: above.0,
        };
        let call = self.shared.store.fence(&shard.database, &fence);
        let outcome = within(STORE_MS, "a fence", call).await;
        let result = match outcome {
            Ok(FenceOutcome::Fenced(row)) => owner_row(row).map(FenceResult::Fenced),
            Ok(FenceOutcome::Lost(row)) => owner_row(row).map(FenceResult::Lost),
            Err(error) => Err(error),
        };
        let result = result.unwrap_or_else(|error| {
            self.complain(shard.shard, "a fence", &error);
            FenceResult::Failed
        });
        self.report(Outcome::Fenced(ShardId(shard.shard), result));
    }

    pub(crate) async fn grant(self, shard: PutShard, epoch: Epoch, to: Member) {
        let grant = Grant {
            shard: shard.shard,
            epoch: epoch.0,
            term: self.term.0,
            store: shard.store,
            database: shard.database,
            class: shard.class,
        };
        let mut message = envelope(kind::GRANT, &grant);
        message.shard = shard.shard;
        message.epoch = epoch.0;
        let deadline = Instant::now() + Duration::from_millis(self.shared.config.grant_timeout_ms);
        let answer = self.shared.links.call(&node_peer(&to.name), message, deadline).await;
        let held = match answer {
            Ok(payload) => proto::link::Held::decode(payload).ok().filter(|held| held.epoch != 0),
            Err(error) => {
                debug!(shard = shard.shard, %to, %epoch, %error, "a grant was not taken yet");
                None
            }
        };
        self.report(Outcome::Granted(to, ShardId(shard.shard), epoch, held.map(read_held)));
    }

    /// Whether somebody listens where the node did.
    pub(crate) async fn probe(self, member: Member, address: String) {
        let timeout = Duration::from_millis(self.shared.config.probe_timeout_ms);
        let probe = match tokio::time::timeout(timeout, TcpStream::connect(&address)).await {
            Ok(Ok(_)) => Probe::Connected,
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Probe::Refused
            }
            Ok(Err(_)) | Err(_) => Probe::Failed,
        };
        self.report(Outcome::Probed(member, probe));
    }
}

pub(crate) fn read_held(held: proto::link::Held) -> Held {
    Held { shard: ShardId(held.shard), epoch: Epoch(held.epoch), is_open: held.open }
}

fn owner_row(row: proto::link::OwnerRow) -> Result<OwnerRow, store::Error> {
    let member = match row.node.as_str() {
        "" => None,
        name => {
            let name = name.parse().map_err(|error: domain::Error| store::Error::Corrupt {
                what: format!("an owner row: {error}"),
            })?;
            Some(Member { name, incarnation: Incarnation(row.incarnation) })
        }
    };
    Ok(OwnerRow { epoch: Epoch(row.epoch), member, term: Term(row.term) })
}
