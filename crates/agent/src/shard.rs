//! What the agents of one shard share.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::Semaphore;

use domain::turn::Turn;
use domain::view::View;
use domain::writer::lost_to;
use domain::{
    AgentId, Class, DefinitionHash, Epoch, Lsn, Member, Position, Reason, ShardId, WorkState,
};
use proto::kind;
use proto::link::{DefinitionRequest, DefinitionResponse, Envelope, Refusal};
use store::writer::WriterHandle;

use crate::awake::{Awake, boot_ms};
use crate::config::Config;
use crate::definitions::{Definitions, Known};
use crate::dispatch::Dispatcher;
use crate::held::Held;
use crate::named::Named;
use crate::recent::Recent;
use crate::recovering::Recovering;
use crate::wire::Wire;
use crate::{Error, metrics};
use prost::Message;

/// What models say while their steps run, kept by a node for those who watch.
pub(crate) const TEXTS_BYTES_MAX: usize = 16 << 20;

/// What all shards of a node share.
pub(crate) struct Context {
    pub config: Config,
    pub name: domain::ProcessName,
    /// This process; its incarnation changes when it has to join anew.
    pub member: Mutex<Member>,
    pub wire: Arc<dyn Wire>,
    pub dispatcher: Arc<Dispatcher>,
    pub held: Arc<Held>,
    pub awake: Arc<Awake>,
    pub definitions: Definitions,
    pub view: Arc<ArcSwapOption<View>>,
    /// Bytes of inputs that may still be taken in.
    pub inputs: Arc<Semaphore>,
    /// Bytes that may still be kept of what models say while their steps run.
    pub texts: Arc<Semaphore>,
    pub recovering: Recovering,
    /// The control replicas, as last heard of.
    pub controls: Mutex<Vec<cluster::Peer>>,
    /// How many more failures of agents the leader may be told of at once.
    pub failures: Arc<Semaphore>,
}

/// One shard that this node owns, opened.
pub(crate) struct Shard {
    pub node: Arc<Context>,
    pub id: ShardId,
    pub class: Class,
    pub epoch: Epoch,
    pub database: String,
    pub store: Arc<dyn store::Store>,
    pub writer: WriterHandle,
    /// The largest row number of an agent that was given out.
    pub agent_max: AtomicU64,
    /// Reads for clients that may still begin.
    pub reads: Arc<Semaphore>,
    pub started: Instant,
    open: Mutex<HashMap<Lsn, OpenWork>>,
    waiting: Mutex<HashSet<AgentId>>,
    /// Works that ended last.
    pub recent: Recent,
    stored_definitions: Mutex<HashSet<DefinitionHash>>,
    /// Steps of open works that workers run for an owner before, or have answers of.
    named: Mutex<HashMap<Lsn, Named>>,
    /// When it was last seen that this node owns the shard, by the boot clock.
    owned_ms: AtomicU64,
    /// Held while that is looked up.
    proof: tokio::sync::Mutex<()>,
    /// Held while a definition is looked up.
    learning: tokio::sync::Mutex<()>,
}

/// A work that has not ended.
#[derive(Clone, Debug)]
pub(crate) struct OpenWork {
    pub agent: AgentId,
    pub deadline_ms: i64,
    pub state: WorkState,
    pub reason: Reason,
}

/// What [`Shard::new`] needs to know of the opening.
pub(crate) struct Opened {
    pub id: ShardId,
    pub class: Class,
    pub epoch: Epoch,
    pub database: String,
    pub agent_max: u64,
    pub named: HashMap<Lsn, Named>,
}

impl Shard {
    pub(crate) fn new(
        node: Arc<Context>,
        store: Arc<dyn store::Store>,
        writer: WriterHandle,
        opened: Opened,
    ) -> Self {
        let reads = Arc::new(Semaphore::new(node.config.reads_max));
        Self {
            node,
            id: opened.id,
            class: opened.class,
            epoch: opened.epoch,
            database: opened.database,
            store,
            writer,
            agent_max: AtomicU64::new(opened.agent_max),
            reads,
            started: Instant::now(),
            open: Mutex::default(),
            waiting: Mutex::default(),
            recent: Recent::default(),
            stored_definitions: Mutex::default(),
            named: Mutex::new(opened.named),
            owned_ms: AtomicU64::new(boot_ms()),
            proof: tokio::sync::Mutex::default(),
            learning: tokio::sync::Mutex::default(),
        }
    }

    /// Where a read of the store stands that begins after this is asked: everything up to this row is in it. An agent's
    /// fold may be behind, and has a position of its own.
    pub(crate) fn before_read(&self) -> Position {
        Position { epoch: self.epoch, lsn: self.writer.head() }
    }

    /// A row number that no agent of the shard has.
    pub(crate) fn next_row(&self) -> u64 {
        self.agent_max.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn opened(&self, work: Lsn, agent: AgentId, deadline_ms: i64) {
        let (state, reason) = (WorkState::Accepted, Reason::Submitted);
        lock(&self.open).insert(work, OpenWork { agent, deadline_ms, state, reason });
    }

    /// What an open work is now, for lists and for its deadline.
    pub(crate) fn shows(&self, turn: &Turn) {
        if let Some(open) = lock(&self.open).get_mut(&turn.id()) {
            (open.state, open.reason) = (turn.state(), turn.reason());
            open.deadline_ms = turn.deadline_ms();
        }
    }

    /// Open works that are in this state, below a number, newest first.
    pub(crate) fn in_state(
        &self,
        state: WorkState,
        below: u64,
        is_wanted: impl Fn(&AgentId) -> bool,
    ) -> Vec<Lsn> {
        let open = lock(&self.open);
        let found = open.iter().filter(|(lsn, work)| {
            work.state == state && (below == 0 || lsn.0 < below) && is_wanted(&work.agent)
        });
        let mut found: Vec<Lsn> = found.map(|(lsn, _)| *lsn).collect();
        found.sort_unstable_by(|a, b| b.cmp(a));
        found
    }

    /// The step of a work that a worker has, or has an answer of, although who asked for it is gone. Once.
    pub(crate) fn take_named(&self, work: Lsn) -> Option<Named> {
        lock(&self.named).remove(&work)
    }

    /// Whether it has to be looked up who owns the shard before anything is begun: after this process stood still, another
    /// node may.
    pub(crate) fn must_prove(&self) -> bool {
        self.node.awake.stood_still_since(self.owned_ms.load(Ordering::Acquire))
    }

    /// Looks up whether this node still owns the shard; if not, why.
    pub(crate) async fn prove(&self) -> Result<Option<Reason>, store::Error> {
        let _proof = self.proof.lock().await;
        if !self.must_prove() {
            return Ok(None);
        }
        let asked_ms = boot_ms();
        let owner = self.store.owner(&self.database).await?;
        let stored = Epoch(owner.epoch);
        // The next agent that asks has to hear the same.
        if stored != self.epoch {
            return Ok(Some(lost_to(self.epoch, stored)));
        }
        self.owned_ms.store(asked_ms, Ordering::Release);
        Ok(None)
    }

    pub(crate) fn state_of(&self, work: Lsn) -> Option<(WorkState, Reason)> {
        lock(&self.open).get(&work).map(|open| (open.state, open.reason))
    }

    pub(crate) fn ended(&self, work: Lsn) {
        lock(&self.open).remove(&work);
    }

    /// The agent of an open work.
    pub(crate) fn agent_of(&self, work: Lsn) -> Option<AgentId> {
        lock(&self.open).get(&work).map(|open| open.agent.clone())
    }

    /// Open works whose deadline passed.
    pub(crate) fn overdue(&self, now_ms: i64) -> Vec<(Lsn, AgentId)> {
        let open = lock(&self.open);
        let late = open.iter().filter(|(_, work)| work.deadline_ms <= now_ms);
        late.map(|(lsn, work)| (*lsn, work.agent.clone())).collect()
    }

    /// `agent` waits until somebody offers a phase.
    pub(crate) fn waits(&self, agent: AgentId) {
        lock(&self.waiting).insert(agent);
    }

    pub(crate) fn take_waiting(&self) -> Vec<AgentId> {
        lock(&self.waiting).drain().collect()
    }

    /// Whether the body of a definition has to go into the shard with the next acceptance that pins it.
    pub(crate) fn needs_definition(&self, hash: &DefinitionHash) -> bool {
        !lock(&self.stored_definitions).contains(hash)
    }

    pub(crate) fn has_definition(&self, hash: DefinitionHash) {
        lock(&self.stored_definitions).insert(hash);
    }

    /// A definition, from memory, from this shard, or from the control plane.
    pub(crate) async fn definition(&self, hash: DefinitionHash) -> Result<Known, Error> {
        if let Some(known) = self.node.definitions.get(&hash) {
            return Ok(known);
        }
        if let Some(known) = self.stored_definition(hash).await {
            return Ok(known);
        }
        match self.node.fetch_definition(hash).await {
            Some(body) => self.node.definitions.learn(hash, body).ok_or(missing(hash)),
            None => Err(missing(hash)),
        }
    }

    /// One after another: many agents that are recovered ask for the same one.
    async fn stored_definition(&self, hash: DefinitionHash) -> Option<Known> {
        let _turn = self.learning.lock().await;
        if let Some(known) = self.node.definitions.get(&hash) {
            return Some(known);
        }
        let row = self.store.definition(&self.database, hash.as_bytes()).await.ok()??;
        let known = self.node.definitions.learn(hash, row.body)?;
        self.has_definition(hash);
        Some(known)
    }
}

fn missing(hash: DefinitionHash) -> Error {
    Error::Definition { hash: hash.to_string(), reason: Reason::DefinitionMissing }
}

impl Context {
    /// This run of this process.
    pub(crate) fn me(&self) -> Member {
        lock(&self.member).clone()
    }

    /// From whichever control replica is first: one that was stopped keeps its links and answers nobody.
    async fn fetch_definition(&self, hash: DefinitionHash) -> Option<Bytes> {
        let controls = lock(&self.controls).clone();
        let asked = controls.into_iter().map(|control| self.fetch_definition_from(control, hash));
        let answers: FuturesUnordered<_> = asked.collect();
        let mut bodies = std::pin::pin!(answers.filter_map(std::future::ready));
        bodies.next().await
    }

    async fn fetch_definition_from(
        &self,
        control: cluster::Peer,
        hash: DefinitionHash,
    ) -> Option<Bytes> {
        const WAIT: std::time::Duration = std::time::Duration::from_secs(2);
        let request = DefinitionRequest { hash: Bytes::copy_from_slice(hash.as_bytes()) };
        let payload = request.encode_to_vec().into();
        let envelope = Envelope { kind: kind::DEFINITION, payload, ..Envelope::default() };
        let answer = self.wire.call(control, envelope, Instant::now() + WAIT).await.ok()?;
        let body = DefinitionResponse::decode(answer).ok()?.body;
        (!body.is_empty()).then_some(body)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A refusal, counted.
pub(crate) fn refusal(reason: Reason, message: impl Into<String>) -> Refusal {
    metrics::REFUSED.with_label_values(&[reason.as_str()]).inc();
    const FULL: [Reason; 3] = [Reason::QueueFull, Reason::NodeFull, Reason::Overloaded];
    let retry_after_ms = if FULL.contains(&reason) {
        100
    } else if reason == Reason::StoreUnavailable {
        500
    } else {
        0
    };
    Refusal {
        reason: reason.code().into(),
        message: message.into(),
        retry_after_ms,
        ..Refusal::default()
    }
}
