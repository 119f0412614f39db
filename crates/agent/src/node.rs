//! All shards of this node: takes grants, hands messages to the right shard, follows the view, says what it holds.
//!
//! Never decides what it owns: it opens what is granted and drops what is lost.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use prost::Message;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::Semaphore;

use cluster::{Incoming, Peer, Reply};
use domain::view::{Applied, View};
use domain::{Epoch, Incarnation, Member, Reason, Role, ShardId};
use proto::kind;
use proto::link::{
    Beat, CapabilityOffer, Envelope, Grant, Held, StoreSilence, View as ViewMessage,
};
use store::Store;

use crate::awake::Awake;
use crate::config::{Config, PhasesConfig};
use crate::contact::{self, Contact, Place};
use crate::definitions::Definitions;
use crate::dispatch::{Dispatcher, DispatcherArgs};
use crate::held;
use crate::host::{self, HostArgs, HostMessage, HostReport};
use crate::pool::{Pools, PoolsArgs};
use crate::recovering::Recovering;
use crate::shard::{Context, TEXTS_BYTES_MAX, lock, refusal};
use crate::speech::Taken;
use crate::wire::Wire;
use crate::{Error, failures, metrics};

/// What the agents of a node need.
pub struct Args {
    pub config: Config,
    pub phases: PhasesConfig,
    pub me: Member,
    pub wire: Arc<dyn Wire>,
    /// By their names in grants.
    pub stores: BTreeMap<String, Arc<dyn Store>>,
    pub models: Arc<model::Registry>,
    pub tools: Arc<tool::Registry>,
    /// Hears each new view; must not block.
    pub on_view: Box<dyn Fn(&View) + Send + Sync>,
}

/// The agents of this node.
#[derive(Clone)]
pub struct Handle {
    inner: Arc<Inner>,
    supervisor: ActorRef<NodeMessage>,
}

/// A handle that keeps nothing alive.
struct WeakHandle {
    inner: Weak<Inner>,
    supervisor: ActorRef<NodeMessage>,
}

impl WeakHandle {
    fn upgrade(&self) -> Option<Handle> {
        let inner = self.inner.upgrade()?;
        Some(Handle { inner, supervisor: self.supervisor.clone() })
    }
}

struct Inner {
    context: Arc<Context>,
    pools: Pools,
    view: Mutex<Option<View>>,
    hosts: RwLock<HashMap<ShardId, Host>>,
    rolled_back: Mutex<HashMap<ShardId, RolledBack>>,
    contact: Arc<Contact>,
    on_view: Box<dyn Fn(&View) + Send + Sync>,
}

/// This process found less in the store than was acknowledged.
#[derive(Clone, Copy)]
struct RolledBack {
    epoch: Epoch,
    /// The leader has taken note, so that beats need not say so any more.
    is_noted: bool,
}

/// A shard that was granted.
#[derive(Clone)]
struct Host {
    epoch: Epoch,
    open: bool,
    place: Place,
    actor: ActorRef<HostMessage>,
}

enum NodeMessage {
    Start(Arc<Inner>),
    Grant(Grant, Option<Reply>),
    Report(ShardId, Epoch, HostReport),
    /// The view has the shard under a later epoch than this.
    Moved(ShardId, Epoch),
    DropAll,
}

impl ractor::Message for NodeMessage {}

/// Supervises the hosts and the pools.
struct Node;

struct NodeState {
    me: ActorRef<NodeMessage>,
    inner: Option<Arc<Inner>>,
    stores: BTreeMap<String, Arc<dyn Store>>,
    names: HashMap<ActorId, (ShardId, Epoch)>,
    /// The newest epoch of each shard that this process ever had: one epoch has one writer, ever.
    used: HashMap<ShardId, Epoch>,
}

/// Starts the agents of this node: no shard yet, all pools.
///
/// # Errors
/// An actor that does not start.
pub async fn spawn(args: Args) -> Result<Handle, Error> {
    let Args { config, phases, me, wire, stores, models, tools, on_view } = args;
    metrics::register(&tools);
    models.count_from_zero();
    let failed = |source| Error::Spawn { what: "the node's supervisor".to_owned(), source };
    let (ready, inner) = tokio::sync::oneshot::channel();
    let start = (stores.clone(), inner);
    let (supervisor, _) = Actor::spawn(None, Node, start).await.map_err(failed)?;
    let (held, awake) = (Arc::new(held::Held::default()), Awake::spawn());
    let this: Arc<OnceLock<WeakHandle>> = Arc::default();
    let teller = this.clone();
    let pools = PoolsArgs {
        config: &phases,
        me: &me.name,
        models,
        tools,
        held: held.clone(),
        awake: awake.clone(),
        tell: Arc::new(move |shard, text| {
            let handle = teller.get().and_then(WeakHandle::upgrade);
            Box::pin(async move {
                match handle {
                    Some(handle) => handle.tell_text(shard, text).await,
                    None => Taken::Again,
                }
            })
        }),
        supervisor: supervisor.get_cell(),
    };
    let pools = Pools::spawn(pools).await?;
    let view = Arc::new(ArcSwapOption::empty());
    let router = this.clone();
    let dispatcher = Dispatcher::new(DispatcherArgs {
        me: me.name.clone(),
        pools: pools.clone(),
        held: held.clone(),
        wire: wire.clone(),
        view: view.clone(),
        on_route: Arc::new(move |route| {
            if let Some(handle) = router.get().and_then(WeakHandle::upgrade) {
                handle.route(route);
            }
        }),
    });
    let context = Context {
        inputs: Arc::new(Semaphore::new(config.queued_bytes_max)),
        texts: Arc::new(Semaphore::new(TEXTS_BYTES_MAX)),
        recovering: Recovering::new(&config),
        dispatcher,
        held,
        awake,
        name: me.name.clone(),
        member: Mutex::new(me),
        definitions: Definitions::default(),
        view,
        controls: Mutex::default(),
        failures: Arc::new(Semaphore::new(failures::WAITING_MAX)),
        config,
        wire,
    };
    let inner = Inner {
        context: Arc::new(context),
        pools,
        view: Mutex::default(),
        hosts: RwLock::default(),
        rolled_back: Mutex::default(),
        contact: Arc::default(),
        on_view,
    };
    let inner = Arc::new(inner);
    let watched = Arc::downgrade(&inner);
    let places = move || watched.upgrade().map(|inner| inner.places());
    tokio::spawn(contact::watch(inner.contact.clone(), stores, places));
    _ = ready.send(inner.clone());
    let handle = Handle { inner, supervisor };
    _ = this.set(handle.downgrade());
    Ok(handle)
}

impl Handle {
    /// Takes in what a peer sent. Never blocks.
    pub fn incoming(&self, incoming: Incoming) {
        let Incoming { from, envelope, .. } = &incoming;
        match (envelope.kind, from.role) {
            (kind::STEP, Role::Node) => self.step(incoming),
            (kind::STEPS_WANTED, Role::Node) => self.steps_wanted(incoming),
            (kind::STEPS_KEPT, Role::Node) => self.steps_kept(incoming),
            (kind::STEP_ANSWERED | kind::STEP_TEXT, Role::Node) => self.to_shard(incoming),
            (kind::VIEW, Role::Control) => {
                self.view_message(from.clone(), envelope.payload.clone())
            }
            (kind::GRANT, Role::Control) => match Grant::decode(envelope.payload.clone()) {
                Ok(grant) => _ = self.supervisor.cast(NodeMessage::Grant(grant, incoming.reply)),
                Err(error) => refuse(
                    incoming.reply,
                    Reason::Malformed,
                    &format!("the grant is damaged: {error}"),
                ),
            },
            (
                kind::SUBMIT
                | kind::GET
                | kind::CANCEL
                | kind::LIST
                | kind::AGENTS
                | kind::HISTORY
                | kind::SUBSCRIBE
                | kind::UNSUBSCRIBE
                | kind::SIGNAL,
                Role::Control,
            ) => self.to_shard(incoming),
            (other, role) => {
                tracing::warn!(kind = other, %from, "a message that this node does not take");
                let why = format!("a node does not take messages of kind {other} from a {role}");
                refuse(incoming.reply, Reason::Malformed, &why);
            }
        }
    }

    /// Hands a message to its shard, if this node owns it under the epoch that the sender believes in.
    fn to_shard(&self, incoming: Incoming) {
        let shard = ShardId(incoming.envelope.shard);
        let host = {
            let hosts = self.inner.hosts.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            hosts.get(&shard).cloned()
        };
        let Some(host) = host else { return self.moved(shard, incoming.reply) };
        let believed = Epoch(incoming.envelope.epoch);
        if believed != Epoch(0) && believed != host.epoch {
            return self.moved(shard, incoming.reply);
        }
        // A host that is gone drops the message, and with it the reply, which then refuses.
        _ = host.actor.cast(HostMessage::Incoming(Box::new(incoming)));
    }

    fn moved(&self, shard: ShardId, reply: Option<Reply>) {
        let view = self.inner.context.view.load_full();
        let owner = view.as_ref().and_then(|view| view.owner(shard));
        let mut refusal =
            refusal(Reason::Moved, format!("shard {shard} is not here under that epoch"));
        if let Some((owner, epoch)) = owner {
            refusal.moved_node = owner.name.to_string();
            refusal.moved_epoch = epoch.0;
        }
        if let Some(reply) = reply {
            reply.refuse(refusal);
        }
    }

    pub(crate) fn context(&self) -> &Context {
        &self.inner.context
    }

    fn downgrade(&self) -> WeakHandle {
        let (inner, supervisor) = (Arc::downgrade(&self.inner), self.supervisor.clone());
        WeakHandle { inner, supervisor }
    }

    /// Takes in a view; one with a gap before it makes this node ask for the whole.
    pub fn view_message(&self, from: Peer, payload: bytes::Bytes) {
        let delta =
            ViewMessage::decode(payload).ok().and_then(|view| proto::view::from_message(view).ok());
        let Some(delta) = delta else {
            tracing::warn!(%from, "a view that cannot be read");
            return;
        };
        let mut held = lock(&self.inner.view);
        match View::apply(&mut held, delta) {
            Applied::Old => {}
            Applied::Gap => self.ask_for_view(from),
            Applied::Changed => {
                let Some(view) = held.clone() else { return };
                // Under the lock, so that views are told in their order.
                self.changed(view);
            }
        }
    }

    fn changed(&self, view: View) {
        self.inner.context.dispatcher.retain(&view);
        for (shard, found) in lock(&self.inner.rolled_back).iter_mut() {
            // Stopped, or found out by a later owner, or released meanwhile.
            let is_known =
                |place: &domain::view::Place| place.stopped || found.epoch.next() < place.epoch;
            found.is_noted = view.shards.get(shard).is_some_and(is_known);
        }
        (self.inner.on_view)(&view);
        let view = Arc::new(view);
        self.inner.context.view.store(Some(view.clone()));
        for route in self.inner.context.held.moved(&view) {
            self.route(route);
        }
        let hosts = self.inner.hosts.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (shard, host) in hosts.iter() {
            let now = view.owner(*shard).map(|(_, epoch)| epoch);
            if now.is_some_and(|now| host.epoch < now) {
                _ = self.supervisor.cast(NodeMessage::Moved(*shard, host.epoch));
            } else {
                _ = host.actor.cast(HostMessage::ViewChanged);
            }
        }
    }

    fn ask_for_view(&self, from: Peer) {
        const WAIT: Duration = Duration::from_secs(2);
        let this = self.clone();
        tokio::spawn(async move {
            let envelope = Envelope { kind: kind::VIEW_WANTED, ..Envelope::default() };
            let answer =
                this.inner.context.wire.call(from.clone(), envelope, Instant::now() + WAIT).await;
            match answer {
                Ok(payload) => this.view_message(from, payload),
                // The next change of the view finds the same gap and asks again.
                Err(error) => tracing::warn!(%from, %error, "cannot get the whole view"),
            }
        });
    }

    /// The control replicas, for definitions that this node has not met.
    pub fn set_controls(&self, controls: Vec<Peer>) {
        *lock(&self.inner.context.controls) = controls;
    }

    pub fn capabilities(&self) -> Vec<CapabilityOffer> {
        self.inner.pools.capabilities()
    }

    /// This run of this process, as it joined.
    pub fn member(&self) -> Member {
        self.inner.context.me()
    }

    /// What the heartbeat says. Called on the heartbeat's own thread: takes a few short locks and asks nobody.
    pub fn beat(&self) -> Beat {
        let hosts = self.inner.hosts.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let held = hosts.iter().map(|(shard, host)| Held {
            shard: shard.0,
            epoch: host.epoch.0,
            open: host.open,
        });
        Beat {
            incarnation: self.member().incarnation.0,
            held: held.collect(),
            rolled_back: lock(&self.inner.rolled_back)
                .iter()
                .filter(|(_, found)| !found.is_noted)
                .map(|(shard, found)| Held { shard: shard.0, epoch: found.epoch.0, open: false })
                .collect(),
            hot_agents: u32::try_from(metrics::HOT.get()).unwrap_or(0),
            loads: self.inner.pools.loads(),
            stores: self.inner.contact.silent_ms().into_iter().map(silence).collect(),
            ..Beat::default()
        }
    }

    /// Whether nothing is hosted here, no job of anybody runs, and no answer is on its way to a later owner.
    pub fn is_idle(&self) -> bool {
        let hosts = self.inner.hosts.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let jobs = self.inner.pools.loads();
        let is_settled = self.inner.context.held.is_settled();
        is_settled
            && hosts.is_empty()
            && jobs.iter().all(|load| load.running == 0 && load.queued == 0)
    }

    /// This node was declared dead: it drops every shard and is a new incarnation from now on.
    pub fn rejoin(&self, incarnation: Incarnation) {
        lock(&self.inner.context.member).incarnation = incarnation;
        *lock(&self.inner.view) = None;
        _ = self.supervisor.cast(NodeMessage::DropAll);
    }

    /// Stops every agent. Nothing is lost: whoever owns the shards next folds the same journals.
    pub async fn shutdown(&self) {
        _ = self.supervisor.stop_and_wait(None, Some(Duration::from_secs(5))).await;
    }
}

fn silence((store, silent_ms): (String, u64)) -> StoreSilence {
    StoreSilence { store, silent_ms }
}

fn refuse(reply: Option<Reply>, reason: Reason, why: &str) {
    if let Some(reply) = reply {
        reply.refuse(refusal(reason, why));
    }
}

impl Actor for Node {
    type Msg = NodeMessage;
    type State = NodeState;
    type Arguments = (BTreeMap<String, Arc<dyn Store>>, tokio::sync::oneshot::Receiver<Arc<Inner>>);

    async fn pre_start(
        &self,
        me: ActorRef<NodeMessage>,
        (stores, inner): Self::Arguments,
    ) -> Result<NodeState, ActorProcessingErr> {
        // The pools are linked to this actor, so it is there before what it supervises is complete.
        let starter = me.clone();
        tokio::spawn(async move {
            if let Ok(inner) = inner.await {
                _ = starter.cast(NodeMessage::Start(inner));
            }
        });
        let (names, used) = Default::default();
        Ok(NodeState { me, inner: None, stores, names, used })
    }

    async fn handle(
        &self,
        _: ActorRef<NodeMessage>,
        message: NodeMessage,
        state: &mut NodeState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            NodeMessage::Start(inner) => state.inner = Some(inner),
            NodeMessage::Grant(grant, reply) => state.grant(grant, reply).await,
            NodeMessage::Report(shard, epoch, report) => state.report(shard, epoch, report),
            NodeMessage::Moved(shard, epoch) => state.moved(shard, epoch),
            NodeMessage::DropAll => state.drop_all(),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<NodeMessage>,
        event: SupervisionEvent,
        state: &mut NodeState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorTerminated(cell, _, _) => {
                state.gone(cell.get_id(), Reason::OwnerDropped)
            }
            SupervisionEvent::ActorFailed(cell, error) => {
                tracing::error!(%error, "a shard's host or a phase pool failed");
                state.gone(cell.get_id(), Reason::Restarted);
            }
            SupervisionEvent::ActorStarted(_)
            | SupervisionEvent::ProcessGroupChanged(_)
            | SupervisionEvent::PidLifecycleEvent(_) => {}
        }
        Ok(())
    }
}

impl NodeState {
    /// Opens a shard that was granted. The same grant again only asks how far that is.
    async fn grant(&mut self, grant: Grant, reply: Option<Reply>) {
        let Some(inner) = self.inner.clone() else {
            return refuse(reply, Reason::ShuttingDown, "the node is starting");
        };
        let (shard, epoch) = (ShardId(grant.shard), Epoch(grant.epoch));
        if let Some(host) = inner.host(shard) {
            if epoch <= host.epoch {
                return answer_held(reply, shard, &host);
            }
            self.drop_shard(&inner, shard);
        }
        if self.used.get(&shard).is_some_and(|used| epoch <= *used) {
            let found = lock(&inner.rolled_back).get(&shard).copied();
            let reason = match found.is_some_and(|found| found.epoch == epoch) {
                true => Reason::StoreRolledBack,
                false => Reason::OwnerDropped,
            };
            inner.tell_controls(kind::DROPPED, shard, epoch, reason);
            return refuse(
                reply,
                Reason::OwnerDropped,
                "this process had that epoch and gave it up",
            );
        }
        let Some(store) = self.stores.get(&grant.store).cloned() else {
            let why = format!(
                "this node knows no store {:?}: add [stores.{}] to its config",
                grant.store, grant.store
            );
            tracing::error!(%shard, "{why}");
            return refuse(reply, Reason::StoreUnavailable, &why);
        };
        let place = Place { store: grant.store.clone(), database: grant.database.clone() };
        let me = self.me.clone();
        let report = Arc::new(move |report| _ = me.cast(NodeMessage::Report(shard, epoch, report)));
        let args = HostArgs { node: inner.context.clone(), store, grant, report };
        match host::spawn(args, self.me.get_cell()).await {
            Ok(actor) => {
                self.names.insert(actor.get_id(), (shard, epoch));
                self.used.insert(shard, epoch);
                let host = Host { epoch, open: false, place, actor };
                inner.write_hosts().insert(shard, host.clone());
                // A grant of the very next epoch may be one that was on its way.
                let is_past = |found: &RolledBack| found.is_noted || found.epoch.next() < epoch;
                lock(&inner.rolled_back).retain(|id, found| *id != shard || !is_past(found));
                answer_held(reply, shard, &host);
            }
            Err(error) => {
                tracing::error!(%shard, error = &error as &dyn std::error::Error, "cannot host shard");
                refuse(reply, error.reason(), &error.to_string());
            }
        }
    }

    fn report(&mut self, shard: ShardId, epoch: Epoch, report: HostReport) {
        let Some(inner) = self.inner.clone() else { return };
        match report {
            HostReport::Opened => {
                {
                    let mut hosts = inner.write_hosts();
                    let host = hosts.get_mut(&shard).filter(|host| host.epoch == epoch);
                    let Some(host) = host else { return };
                    host.open = true;
                }
                inner.tell_controls(kind::HELD, shard, epoch, Reason::ShardOpened);
            }
            HostReport::Lost(reason) => {
                tracing::warn!(%shard, epoch = epoch.0, %reason, "shard is not ours any more");
                if reason == Reason::StoreRolledBack {
                    // Beats say so from now on.
                    let found = RolledBack { epoch, is_noted: false };
                    lock(&inner.rolled_back).insert(shard, found);
                }
                if inner.host(shard).is_some_and(|host| host.epoch == epoch) {
                    self.drop_shard(&inner, shard);
                    inner.tell_controls(kind::DROPPED, shard, epoch, reason);
                }
            }
        }
    }

    /// The leader gave it to another node: whatever is still on its way here the store refuses.
    fn moved(&mut self, shard: ShardId, epoch: Epoch) {
        let Some(inner) = self.inner.clone() else { return };
        if inner.host(shard).is_some_and(|host| host.epoch == epoch) {
            tracing::info!(%shard, epoch = epoch.0, "shard went to another node");
            self.drop_shard(&inner, shard);
        }
    }

    fn drop_shard(&mut self, inner: &Inner, shard: ShardId) {
        if let Some(host) = inner.write_hosts().remove(&shard) {
            self.names.remove(&host.actor.get_id());
            host.actor.stop(None);
        }
    }

    fn drop_all(&mut self) {
        let Some(inner) = self.inner.clone() else { return };
        let shards: Vec<ShardId> = inner.write_hosts().keys().copied().collect();
        for shard in shards {
            self.drop_shard(&inner, shard);
        }
    }

    /// A host ended without having said why: the leader is told, so that the shard gets a new epoch.
    fn gone(&mut self, actor: ActorId, reason: Reason) {
        let Some((shard, epoch)) = self.names.remove(&actor) else { return };
        let Some(inner) = self.inner.clone() else { return };
        tracing::warn!(%shard, epoch = epoch.0, %reason, "the host of a shard ended");
        let mut hosts = inner.write_hosts();
        if hosts.get(&shard).is_some_and(|host| host.epoch == epoch) {
            hosts.remove(&shard);
            drop(hosts);
            inner.tell_controls(kind::DROPPED, shard, epoch, reason);
        }
    }
}

impl Inner {
    fn host(&self, shard: ShardId) -> Option<Host> {
        self.hosts.read().unwrap_or_else(std::sync::PoisonError::into_inner).get(&shard).cloned()
    }

    /// Where the shards that were granted are kept.
    fn places(&self) -> Vec<Place> {
        let hosts = self.hosts.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        hosts.values().map(|host| host.place.clone()).collect()
    }

    fn write_hosts(&self) -> std::sync::RwLockWriteGuard<'_, HashMap<ShardId, Host>> {
        self.hosts.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Beats say the same a little later; this only saves that time.
    fn tell_controls(&self, kind: u32, shard: ShardId, epoch: Epoch, reason: Reason) {
        let held = Held { shard: shard.0, epoch: epoch.0, open: kind == kind::HELD };
        let payload = held.encode_to_vec().into();
        // The reason travels where a message about a step has the step.
        let envelope =
            Envelope { kind, step: reason.code().into(), payload, ..Envelope::default() };
        for control in lock(&self.context.controls).iter() {
            _ = self.context.wire.cast(control, envelope.clone());
        }
    }
}

fn answer_held(reply: Option<Reply>, shard: ShardId, host: &Host) {
    let held = Held { shard: shard.0, epoch: host.epoch.0, open: host.open };
    if let Some(reply) = reply {
        reply.send(held.encode_to_vec().into());
    }
}
