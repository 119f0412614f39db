//! One shard on its owner: starts its agents, hands messages to them, starts them again when they fail, lets them go when
//! they are idle.
//!
//! Never touches a journal itself: it opens the shard and from then on only agents write.

mod incoming;
mod prune;
mod request;
mod slot;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use rand::RngExt;
use tokio::sync::Semaphore;

use cluster::Incoming;
use domain::agent::QUEUE_MAX;
use domain::restart::Verdict;
use domain::{AgentId, Reason, ShardId};
use proto::link::{AgentRow, Grant, ReadAgent};
use store::Store;
use store::writer::Event;

use crate::actor::{AgentActor, AgentArgs, AgentMessage, Glance};
use crate::open::{Open, open};
use crate::recovering::{self, Due};
use crate::shard::{Context, Shard, refusal};
use crate::{Error, clock, failures, metrics};

use incoming::refuse;
use prune::prune;
use slot::{Slot, Stage};

/// What a host tells its node.
pub(crate) type Report = Arc<dyn Fn(HostReport) + Send + Sync>;

/// What became of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostReport {
    Opened,
    /// It is not this node's any more.
    Lost(Reason),
}

pub(crate) enum HostMessage {
    Incoming(Box<Incoming>),
    Opened(Result<Open, Error>),
    Writer(Event),
    Tick,
    /// Somebody may offer now what nobody offered before.
    ViewChanged,
    /// An agent had something to do and did not go.
    Stayed(AgentId),
    /// Every append of an agent that failed is settled.
    Settled(AgentId),
    /// The backoff of an agent that failed is over.
    Restart(AgentId),
    /// The row of an agent that is not in memory has to be written.
    Stale(AgentId),
    /// The node has room to recover this agent now.
    Recover(AgentId, Box<Due>),
}

impl ractor::Message for HostMessage {}

pub(crate) struct HostArgs {
    pub node: Arc<Context>,
    pub store: Arc<dyn Store>,
    pub grant: Grant,
    pub report: Report,
}

struct ShardHost;

struct State {
    me: ActorRef<HostMessage>,
    id: ShardId,
    shard: Option<Arc<Shard>>,
    /// What came before the shard was open.
    early: Vec<Incoming>,
    report: Report,
    agents: HashMap<Arc<AgentId>, Slot>,
    /// The last one that was new.
    last: Option<Arc<AgentId>>,
    names: HashMap<ActorId, Arc<AgentId>>,
    ticks: u64,
}

const TICK: Duration = Duration::from_millis(200);
/// Agents that are let go at one tick: each writes its row, and works have to be accepted in between.
const LEAVING_MAX: usize = 512;
/// Ticks between two prunings: ten minutes.
const PRUNE_TICKS: u64 = 3_000;
/// Messages that wait for an agent that is not running, or not recovered yet.
const PARKED_MAX: usize = 2 * QUEUE_MAX;

/// Starts the host of a shard and begins to open it.
pub(crate) async fn spawn(
    args: HostArgs,
    supervisor: ActorCell,
) -> Result<ActorRef<HostMessage>, Error> {
    let what = format!("the host of shard {}", args.grant.shard);
    let spawned = Actor::spawn_linked(None, ShardHost, args, supervisor).await;
    spawned.map(|(actor, _)| actor).map_err(|source| Error::Spawn { what, source })
}

impl Actor for ShardHost {
    type Msg = HostMessage;
    type State = State;
    type Arguments = HostArgs;

    async fn pre_start(
        &self,
        me: ActorRef<HostMessage>,
        args: HostArgs,
    ) -> Result<State, ActorProcessingErr> {
        let HostArgs { node, store, grant, report } = args;
        let id = ShardId(grant.shard);
        let (opener, writer) = (me.clone(), me.clone());
        let events = Box::new(move |event| _ = writer.cast(HostMessage::Writer(event)));
        tokio::spawn(async move {
            let opened = open(node, store, grant, events).await;
            _ = opener.cast(HostMessage::Opened(opened));
        });
        Ok(State {
            me,
            id,
            shard: None,
            early: Vec::new(),
            report,
            agents: HashMap::new(),
            last: None,
            names: HashMap::new(),
            ticks: 0,
        })
    }

    async fn handle(
        &self,
        _: ActorRef<HostMessage>,
        message: HostMessage,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            HostMessage::Incoming(incoming) => state.incoming(*incoming).await?,
            HostMessage::Opened(opened) => state.opened(opened).await?,
            HostMessage::Writer(event) => state.writer(event).await?,
            HostMessage::Tick => state.tick().await?,
            HostMessage::ViewChanged => state.view_changed(),
            HostMessage::Stayed(agent) => state.stayed(&agent),
            HostMessage::Settled(agent) => state.settled(&agent),
            HostMessage::Restart(agent) => state.restart(agent).await?,
            HostMessage::Recover(agent, due) => state.recover(agent, due).await?,
            HostMessage::Stale(agent) => state.tell(agent, AgentMessage::Persist).await?,
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<HostMessage>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorTerminated(cell, _, _) => state.gone(cell.get_id()).await?,
            SupervisionEvent::ActorFailed(cell, error) => state.failed(cell.get_id(), &error),
            SupervisionEvent::ActorStarted(_)
            | SupervisionEvent::ProcessGroupChanged(_)
            | SupervisionEvent::PidLifecycleEvent(_) => {}
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<HostMessage>,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        if let Some(shard) = &state.shard {
            shard.writer.stop();
            metrics::SHARDS.dec();
        }
        Ok(())
    }
}

impl State {
    async fn opened(&mut self, opened: Result<Open, Error>) -> Result<(), ActorProcessingErr> {
        let Open { shard, due } = match opened {
            Ok(open) => open,
            Err(error) => {
                tracing::warn!(shard = %self.id, error = &error as &dyn std::error::Error, "cannot open shard");
                self.give_up(error.reason());
                return Ok(());
            }
        };
        tracing::info!(shard = %self.id, epoch = shard.epoch.0, due = due.len(), "opened shard");
        metrics::SHARDS.inc();
        self.shard = Some(shard.clone());
        self.me.send_interval(TICK, || HostMessage::Tick);
        (self.report)(HostReport::Opened);
        let due: Vec<_> =
            due.into_iter().filter_map(|row| Some((self.named(&row)?, row))).collect();
        for (id, _) in &due {
            self.agents.insert(Arc::new(id.clone()), Slot::new(Stage::Due));
        }
        let me = self.me.clone();
        tokio::spawn(recovering::hand_out(shard, due, move |id, due| {
            me.cast(HostMessage::Recover(id, Box::new(due))).is_ok()
        }));
        let now = Instant::now();
        for early in std::mem::take(&mut self.early) {
            // Nobody waits any more for what is past its deadline.
            if early.deadline.is_none_or(|deadline| now < deadline) {
                self.incoming(early).await?;
            }
        }
        Ok(())
    }

    /// The node has room for an agent with unfinished work: it takes that up before anything else.
    async fn recover(&mut self, id: AgentId, due: Box<Due>) -> Result<(), ActorProcessingErr> {
        let slot = self.agents.get_mut(&id).filter(|slot| slot.stage == Stage::Due);
        let parked = slot.map(|slot| {
            slot.stage = Stage::Running;
            slot.take_parked()
        });
        self.tell(id.clone(), AgentMessage::Recover(due)).await?;
        for message in parked.into_iter().flatten() {
            self.tell(id.clone(), message).await?;
        }
        Ok(())
    }

    /// The id of an agent with unfinished work.
    fn named(&self, row: &AgentRow) -> Option<AgentId> {
        let id = format!("{}/{}/{}", row.tenant, row.name, row.key);
        let named = id.parse().ok();
        if named.is_none() {
            tracing::error!(shard = %self.id, agent = id, "an agent with unfinished work has no valid name");
        }
        named
    }

    async fn writer(&mut self, event: Event) -> Result<(), ActorProcessingErr> {
        match event {
            Event::Stopped(reason) => {
                tracing::warn!(shard = %self.id, %reason, "lost shard");
                self.give_up(reason);
            }
            Event::Stale(rows) => {
                for row in rows {
                    self.stale(row).await?;
                }
            }
        }
        Ok(())
    }

    /// The shard is not this node's, or not any more. Who takes the report stops this host: were it to end by itself, its end
    /// would be heard of before the reason.
    fn give_up(&mut self, reason: Reason) {
        for early in self.early.drain(..) {
            refuse(early.reply, refusal(Reason::Unowned, "the shard was not opened"));
        }
        (self.report)(HostReport::Lost(reason));
    }

    async fn stale(&mut self, row: u64) -> Result<(), ActorProcessingErr> {
        let hot =
            self.agents.iter().find(|(_, slot)| slot.glance.row.load(Ordering::Relaxed) == row);
        if let Some(id) = hot.map(|(id, _)| AgentId::clone(id)) {
            return self.tell(id, AgentMessage::Persist).await;
        }
        let (Some(shard), me) = (self.shard.clone(), self.me.clone()) else { return Ok(()) };
        tokio::spawn(async move {
            let read = ReadAgent { id: row, ..ReadAgent::default() };
            let Ok(answer) = shard.store.agent(&shard.database, &read).await else { return };
            let Some(row) = answer.agent else { return };
            if let Ok(id) = format!("{}/{}/{}", row.tenant, row.name, row.key).parse() {
                _ = me.cast(HostMessage::Stale(id));
            }
        });
        Ok(())
    }

    /// Sends a message to an agent, waking it; parks it while the agent is on its way out or back.
    async fn tell(&mut self, id: AgentId, message: AgentMessage) -> Result<(), ActorProcessingErr> {
        match self.agents.get_mut(&id) {
            Some(Slot { stage: Stage::Quarantined, actor: Some(actor), .. }) => {
                _ = actor.cast(message);
                return Ok(());
            }
            Some(slot) if slot.stage != Stage::Running => {
                let parked = &mut slot.rare().parked;
                if parked.len() < PARKED_MAX {
                    parked.push(message);
                }
                let is_first = parked.len() == 1;
                // One in quarantine that failed once more has a successor only when it is asked for.
                if slot.stage == Stage::Quarantined && is_first {
                    self.restart_settled(id);
                }
                return Ok(());
            }
            Some(_) | None => {}
        }
        let actor = self.start(id, false).await?;
        _ = actor.cast(message);
        Ok(())
    }

    /// The id that the map has; a new one shares with the last what most have in common.
    fn shared(&mut self, id: AgentId) -> Arc<AgentId> {
        if let Some((known, _)) = self.agents.get_key_value(&id) {
            return known.clone();
        }
        let AgentId { mut tenant, mut name, key } = id;
        if let Some(last) = &self.last {
            tenant = if last.tenant == tenant { last.tenant.clone() } else { tenant };
            name = if last.name == name { last.name.clone() } else { name };
        }
        let id = Arc::new(AgentId { tenant, name, key });
        self.last = Some(id.clone());
        id
    }

    /// The actor of an agent, started if it is not in memory.
    async fn start(
        &mut self,
        id: AgentId,
        quarantined: bool,
    ) -> Result<ActorRef<AgentMessage>, ActorProcessingErr> {
        let shard = self.shard.clone().ok_or("agents are started after their shard is opened")?;
        if let Some(actor) = self.agents.get(&id).and_then(|slot| slot.actor.clone()) {
            return Ok(actor);
        }
        let (id, glance) = (self.shared(id), Arc::new(Glance::default()));
        let args =
            AgentArgs { id: id.clone(), shard, host: self.me.clone(), glance: glance.clone() };
        let (actor, _) = Actor::spawn_linked(None, AgentActor, args, self.me.get_cell()).await?;
        self.names.insert(actor.get_id(), id.clone());
        let slot = self.agents.entry(id).or_insert_with(|| Slot::new(Stage::Running));
        slot.actor = Some(actor.clone());
        slot.glance = glance;
        slot.stage = if quarantined { Stage::Quarantined } else { Stage::Running };
        slot.room = Arc::new(Semaphore::new(QUEUE_MAX));
        Ok(actor)
    }

    /// An agent went because it was idle; what came meanwhile wakes it again.
    async fn gone(&mut self, actor: ActorId) -> Result<(), ActorProcessingErr> {
        let Some(id) = self.names.remove(&actor) else { return Ok(()) };
        let Some(slot) = self.agents.get_mut(&id) else { return Ok(()) };
        slot.actor = None;
        if slot.stage == Stage::Quarantined {
            return Ok(());
        }
        slot.stage = Stage::Running;
        let parked = slot.take_parked();
        if parked.is_empty() && slot.failures() == 0 {
            self.agents.remove(&id);
        }
        for message in parked {
            self.tell(AgentId::clone(&id), message).await?;
        }
        Ok(())
    }

    /// An agent failed: once everything that it appended is settled, it is started again, or given up.
    fn failed(&mut self, actor: ActorId, error: &ActorProcessingErr) {
        let Some(id) = self.names.remove(&actor) else { return };
        tracing::error!(agent = %id, %error, "an agent failed");
        if let Some(slot) = self.agents.get_mut(&id) {
            slot.actor = None;
            slot.rare().failure = chain(&**error);
            slot.rare().parked.clear();
            if slot.stage == Stage::Quarantined {
                return;
            }
            slot.stage = Stage::Resting;
        }
        let (Some(shard), me) = (self.shard.clone(), self.me.clone()) else { return };
        tokio::spawn(async move {
            shard.writer.settled().await;
            _ = me.cast(HostMessage::Settled(AgentId::clone(&id)));
        });
    }

    fn settled(&mut self, id: &AgentId) {
        let Some(shard) = &self.shard else { return };
        let now_ms = u64::try_from(shard.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let Some(slot) = self.agents.get_mut(id) else { return };
        let jitter = rand::rng().random_range(0..=1_000);
        let rare = slot.rare();
        let verdict = rare.intensity.failed(now_ms, jitter);
        let (reason, total) = (verdict.reason(), rare.intensity.total());
        failures::tell(shard, id.to_string(), reason, total, &rare.failure);
        match verdict {
            Verdict::Restart { after_ms } => {
                metrics::RESTARTED.inc();
                let id = id.clone();
                self.me
                    .send_after(Duration::from_millis(after_ms), move || HostMessage::Restart(id));
            }
            Verdict::Quarantine => {
                metrics::QUARANTINED.inc();
                tracing::error!(agent = %id, reason = %Reason::Quarantined, "an agent failed too often");
                slot.stage = Stage::Quarantined;
                let id = id.clone();
                self.me.send_after(Duration::ZERO, move || HostMessage::Restart(id));
            }
        }
    }

    /// Starts it once everything that it appended is settled.
    fn restart_settled(&self, id: AgentId) {
        let (Some(shard), me) = (self.shard.clone(), self.me.clone()) else { return };
        tokio::spawn(async move {
            shard.writer.settled().await;
            _ = me.cast(HostMessage::Restart(id));
        });
    }

    /// Starts an agent again that failed; one in quarantine is started once more, to end its works.
    async fn restart(&mut self, id: AgentId) -> Result<(), ActorProcessingErr> {
        let Some(slot) = self.agents.get_mut(&id) else { return Ok(()) };
        // Asked for twice, it is started once.
        let parked = slot.take_parked();
        if let Some(actor) = &slot.actor {
            for message in parked {
                _ = actor.cast(message);
            }
            return Ok(());
        }
        let quarantined = slot.stage == Stage::Quarantined;
        let actor = self.start(id, quarantined).await?;
        let first = if quarantined { AgentMessage::Quarantine } else { AgentMessage::Resume };
        for message in std::iter::once(first).chain(parked) {
            _ = actor.cast(message);
        }
        Ok(())
    }

    fn stayed(&mut self, id: &AgentId) {
        let Some(slot) = self.agents.get_mut(id) else { return };
        if slot.stage == Stage::Leaving {
            slot.stage = Stage::Running;
        }
        if slot.actor.is_none() {
            return;
        }
        let parked = slot.take_parked();
        let Some(actor) = &slot.actor else { return };
        for message in parked {
            _ = actor.cast(message);
        }
    }

    /// Ends works whose deadline passed; lets go who was idle.
    async fn tick(&mut self) -> Result<(), ActorProcessingErr> {
        let Some(shard) = self.shard.clone() else { return Ok(()) };
        self.ticks += 1;
        if self.ticks.is_multiple_of(PRUNE_TICKS) {
            prune(shard.clone());
        }
        let now_ms = u64::try_from(shard.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        for (work, id) in shard.overdue(clock::now_ms()) {
            let slot = self.agents.get_mut(&id).filter(|slot| slot.stage == Stage::Quarantined);
            // There all works are being ended. One that fails at that has no successor for every tick.
            if slot.is_some_and(|slot| !slot.rare().intensity.wakes(now_ms)) {
                continue;
            }
            self.tell(id, AgentMessage::Overdue(work)).await?;
        }
        let mut leaving = 0;
        for slot in self.agents.values_mut() {
            if leaving == LEAVING_MAX {
                break;
            }
            let idle =
                slot.glance.active_ms.load(Ordering::Relaxed) + shard.node.config.idle_ms < now_ms;
            let busy = slot.glance.busy.load(Ordering::Relaxed);
            if slot.stage != Stage::Running || !idle || busy {
                continue;
            }
            if let Some(actor) = &slot.actor {
                leaving += 1;
                slot.stage = Stage::Leaving;
                _ = actor.cast(AgentMessage::Passivate);
            }
        }
        Ok(())
    }

    fn view_changed(&mut self) {
        let Some(shard) = &self.shard else { return };
        for id in shard.take_waiting() {
            if let Some(actor) = self.agents.get(&id).and_then(|slot| slot.actor.as_ref()) {
                _ = actor.cast(AgentMessage::Drive);
            }
        }
    }
}

/// An error with what it came from.
fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
