//! What every service of the API stands on.

use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use domain::position::{Shown, Subject};
use domain::{Epoch, ErrorKind, Lsn, Position, Reason, WorkId};
use prost::Message;
use proto::convert;
use proto::link::{
    AgentInfo, AgentsAnswer, CancelAnswer, GetAnswer, HistoryAnswer, SignalAnswer, SubmitAnswer,
    SubmitCall, SubscribeAnswer, SubscribeCall, WatchMode, WorkInfo,
};
use proto::status::Failure;
use proto::{kind, v1};
use telemetry::metrics::{IntCounter, counter};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::follow::{Follow, without_steps};
use crate::hub::{Hub, Inbox, Ticket};
use crate::network::{Catalog, Network};
use crate::router::{At, Call, Router};
use crate::{edge, refusal};

/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct Desk {
    pub(crate) router: Router,
    pub(crate) hub: Arc<Hub>,
    catalog: Arc<dyn Catalog>,
    shown: Arc<Mutex<Shown>>,
    /// Cancelled when the server stops: streams end then.
    pub(crate) stop: CancellationToken,
}

/// Works and agents of which it is remembered how new the last answer was.
const SHOWN_MAX: usize = 16_384;
/// Before an answer that was too old is asked for again.
const PAUSE: Duration = Duration::from_millis(20);

/// A work that is durable.
pub(crate) struct Submitted {
    pub(crate) id: WorkId,
    pub(crate) work: v1::Work,
    pub(crate) position: Position,
    /// Its events, if they were wanted.
    pub(crate) ticket: Option<Ticket>,
}

/// Who wants which events of a work.
pub(crate) struct Wanted<'a> {
    pub(crate) mode: WatchMode,
    pub(crate) inbox: &'a Arc<Inbox>,
}

impl Desk {
    pub(crate) fn new(network: Arc<dyn Network>, hub: Arc<Hub>, catalog: Arc<dyn Catalog>) -> Self {
        let (router, stop) = (Router::new(network), CancellationToken::new());
        let shown = Arc::new(Mutex::new(Shown::new(SHOWN_MAX)));
        Self { router, hub, catalog, shown, stop }
    }

    /// Has a work accepted. Sent again and again under one key, so that no retry of ours makes a second work.
    pub(crate) async fn submit(
        &self,
        request: edge::Submit,
        wanted: Option<Wanted<'_>>,
        traceparent: Option<String>,
        deadline: Instant,
    ) -> Result<Submitted, Failure> {
        let agent = &request.agent;
        let known = self.catalog.definition(&agent.tenant, &agent.name, request.definition);
        let known = timeout_at(deadline, known).await.map_err(|_| late_definition())??;
        let hash = known.ok_or_else(|| edge::no_definition(agent, request.definition))?;
        let call = Call {
            tenant: agent.tenant.to_string(),
            agent: agent.to_string(),
            traceparent: traceparent.unwrap_or_default(),
            is_repeatable: request.key.is_some(),
            ..Call::new(kind::SUBMIT, At::agent(agent), deadline)
        };
        // A key that was made here and never sent need not be looked up; after the first attempt it may be known.
        let mut is_fresh = request.key.is_none();
        let key = request.key.map_or_else(|| uuid::Uuid::now_v7().to_string(), String::from);
        let mut message = SubmitCall {
            agent: call.agent.clone(),
            definition: hash.as_bytes().to_vec().into(),
            input: request.input,
            idempotency_key: key,
            timeout_ms: u64::try_from(request.timeout.as_millis()).unwrap_or(u64::MAX),
            ..SubmitCall::default()
        };
        let mut ticket = None;
        let (answer, _): (SubmitAnswer, _) = self
            .router
            .call_with(&call, &mut |seat| {
                message.key_is_fresh = std::mem::take(&mut is_fresh);
                if let Some(Wanted { mode, inbox }) = &wanted {
                    let registered = self.hub.register(seat, inbox);
                    message.subscription = registered.number();
                    message.mode = (*mode).into();
                    ticket = Some(registered);
                }
                message.encode_to_vec().into()
            })
            .await?;
        let position = position(answer.epoch, answer.lsn);
        let (id, work) = work_of(answer.work)?;
        // What a submit answers is what was accepted, which does not age, so it is never too old; what is asked for after
        // it must not be older.
        self.shown(id, position);
        Ok(Submitted { id, work, position, ticket })
    }

    /// Asks about one work or agent until the answer is not older than what this server has said of it: an owner that was
    /// stopped and lost its shard answers from what it knew before.
    pub(crate) async fn ask<A: About>(
        &self,
        subject: impl Into<Subject>,
        call: &Call,
        request: &impl Message,
    ) -> Result<(Option<A::Found>, Position), Failure> {
        let subject = subject.into();
        loop {
            let answer: A = self.router.call(call, request).await?;
            let (found, position) = answer.parts();
            if self.shows(subject.clone(), position) {
                return Ok((found, position));
            }
            OLD.inc();
            if call.deadline <= Instant::now() + PAUSE {
                let text = "only answers older than what was shown before came in time";
                return Err(Failure::new(ErrorKind::Deadline, Reason::Moved, text));
            }
            sleep(PAUSE).await;
        }
    }

    /// Something about a work that stands there was shown and cannot be too old: an entry, or an acceptance.
    pub(crate) fn shown(&self, id: WorkId, position: Position) {
        _ = self.shows(id.into(), position);
    }

    /// Whether an answer may be shown; if so it counts as shown.
    fn shows(&self, subject: Subject, position: Position) -> bool {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).show(subject, position)
    }

    /// Asks the owner for the events of a work. They wait in the hub until the ticket is released.
    pub(crate) async fn subscribe(
        &self,
        inbox: &Arc<Inbox>,
        follow: &Follow,
        deadline: Instant,
    ) -> Result<Ticket, Failure> {
        let WorkId { class, slot, lsn } = follow.work;
        let call =
            Call { work: lsn.0, ..Call::new(kind::SUBSCRIBE, At::work(follow.work), deadline) };
        let mut ticket = None;
        let (SubscribeAnswer {}, _) = self
            .router
            .call_with(&call, &mut |seat| {
                let registered = self.hub.register(seat, inbox);
                let message = SubscribeCall {
                    subscription: registered.number(),
                    work: lsn.0,
                    slot: slot.get().into(),
                    class: class.0.into(),
                    after_seq: follow.last(),
                    mode: follow.mode.into(),
                };
                ticket = Some(registered);
                message.encode_to_vec().into()
            })
            .await?;
        Ok(ticket.expect("a call that was answered was prepared"))
    }
}

static OLD: LazyLock<IntCounter> = LazyLock::new(|| {
    let help = "Answers dropped because they were older than what was shown before.";
    counter("stagedoor_control_old_answers_total", help)
});

fn position(epoch: u64, lsn: u64) -> Position {
    Position { epoch: Epoch(epoch), lsn: Lsn(lsn) }
}

/// What an owner answers about one work or agent.
pub(crate) trait About: Message + Default {
    type Found;

    fn parts(self) -> (Option<Self::Found>, Position);
}

impl About for GetAnswer {
    type Found = WorkInfo;

    fn parts(self) -> (Option<WorkInfo>, Position) {
        (self.work, position(self.epoch, self.lsn))
    }
}

impl About for CancelAnswer {
    type Found = WorkInfo;

    fn parts(self) -> (Option<WorkInfo>, Position) {
        (self.work, position(self.epoch, self.lsn))
    }
}

impl About for SignalAnswer {
    type Found = WorkInfo;

    fn parts(self) -> (Option<WorkInfo>, Position) {
        (self.work, position(self.epoch, self.lsn))
    }
}

/// The one agent that was asked for.
impl About for AgentsAnswer {
    type Found = AgentInfo;

    fn parts(self) -> (Option<AgentInfo>, Position) {
        let found = self.agents.into_iter().next();
        let lsn = found.as_ref().map_or(0, |agent| agent.lsn);
        (found, position(self.epoch, lsn))
    }
}

/// The newest page of a journal.
impl About for HistoryAnswer {
    type Found = Self;

    fn parts(self) -> (Option<Self>, Position) {
        let position = position(self.epoch, self.lsn);
        (Some(self), position)
    }
}

fn late_definition() -> Failure {
    let text = "no answer in time: the store has not told which definition is the newest";
    Failure::new(ErrorKind::Deadline, Reason::StoreUnavailable, text)
}

/// The work of an answer, without its steps, and its id.
pub(crate) fn work_of(info: Option<WorkInfo>) -> Result<(WorkId, v1::Work), Failure> {
    let info = info.ok_or_else(|| refusal::unreadable("an answer", &"it has no work"))?;
    let id = convert::work_id(info.class, info.slot, info.lsn);
    let id = id.map_err(|error| refusal::unreadable("an answer", &error))?;
    Ok((id, without_steps(info)))
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;
