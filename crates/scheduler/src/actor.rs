//! The scheduler of one control replica: stands by, or leads.
//!
//! Owns the machines of `domain` and carries out what they want; whatever takes time is a task that comes back as a
//! message. Stopping it loses nothing: the next leader reads the owner rows and goes on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::Peer;
use domain::leadership::{self, Action, LeaderRow, Leadership, Taken};
use domain::time::Millis;
use domain::{Epoch, ProcessName, Reason, Role, ShardId, Term};
use proto::kind;
use proto::link::{AgentFailed, Held, JoinRequest, JoinResponse, SightAnswer, StandbyRequest};
use proto::v1;
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::journal::{Journal, Transition};
use crate::leader::{Admit, Hands, Leader, Outcome, Query, load, read_held};
use crate::links::{Request, malformed, overloaded, refusal};
use crate::metrics;
use crate::read::{read_beat, read_message, why_dropped};
use crate::shared::{Shared, Status, encoded, envelope};
use crate::standby::{Standby, control_peer};
use crate::{Error, steps};

pub(crate) type Inbox = ActorRef<Message>;

/// Requests that wait for a replica that is about to lead.
const WAITING_MAX: usize = 256;

/// Everything it hears.
pub(crate) enum Message {
    Tick,
    /// Send out the view, if it changed.
    Publish,
    Request(Request, OwnedSemaphorePermit),
    /// The link to a peer is up, or that to another control replica is gone.
    Linked(Peer),
    Unlinked(Peer),
    /// The leader of this term took note of us.
    Announced(ProcessName, Term, Box<JoinResponse>),
    Pulse(Pulse, OwnedSemaphorePermit),
    /// What a look at the leader row gave; none: the store does not answer.
    Observed(Option<steps::Observed>),
    Taken(Taken),
    BeatWritten(Term, Millis),
    /// The store says that we do not lead in this term any more.
    Deposed(Term),
    /// A database that this program can never use, and what to do: the process has to end.
    Unusable(String),
    Done(Term, Outcome),
    Nodes(RpcReplyPort<Vec<v1::Node>>),
    Shards(RpcReplyPort<Vec<v1::Shard>>),
    Find(Query, RpcReplyPort<Result<Vec<v1::Capability>, Error>>),
    Placement(ShardId, RpcReplyPort<Vec<String>>),
    /// Who wants what of which node.
    Admit(String, ProcessName, Admit, RpcReplyPort<Result<v1::Node, Error>>),
    /// Who wants a stopped shard to have an owner again.
    Release(String, ShardId, RpcReplyPort<Result<v1::Shard, Error>>),
    Shutdown(RpcReplyPort<()>),
}

// Local only: nothing of it ever travels.
impl ractor::Message for Message {}

/// What a heartbeat connection brought.
pub(crate) struct Pulse {
    pub(crate) from: ProcessName,
    /// None: the connection is gone.
    pub(crate) beat: Option<proto::link::Beat>,
    pub(crate) at: Instant,
}

pub(crate) struct Scheduler;

/// What this replica is.
enum Part {
    Standby,
    /// It leads, and reads what it needs before it acts.
    Loading(Loading),
    Leading(Box<Leader>),
}

struct Loading {
    hands: Hands,
    journal: Journal,
    /// Ends with it.
    _task: JoinSet<()>,
}

pub(crate) struct State {
    shared: Arc<Shared>,
    inbox: Inbox,
    leadership: Leadership,
    part: Part,
    standby: Standby,
    /// Why we take the leadership, while we do.
    taking: Option<Reason>,
    is_looking: bool,
    is_publish_due: bool,
    waiting: VecDeque<(Request, OwnedSemaphorePermit)>,
    /// In whose favour we step back.
    successor: Option<ProcessName>,
    /// Who waits for our end, and what has to be written before.
    shutdown: Option<RpcReplyPort<()>>,
    closing: Option<Journal>,
    /// It gave up, and ends in a moment.
    is_over: bool,
    last: LastKnown,
}

/// What people are shown while nobody is known to lead: the cluster as this replica last led it.
#[derive(Default)]
struct LastKnown {
    nodes: Vec<v1::Node>,
    shards: Vec<v1::Shard>,
}

impl Actor for Scheduler {
    type Msg = Message;
    type State = State;
    type Arguments = Arc<Shared>;

    async fn pre_start(
        &self,
        myself: Inbox,
        shared: Arc<Shared>,
    ) -> Result<State, ActorProcessingErr> {
        metrics::LEADS.set(0);
        steps::tick(shared.config.tick_ms, myself.clone());
        Ok(State {
            shared,
            inbox: myself,
            leadership: Leadership::new(),
            part: Part::Standby,
            standby: Standby::default(),
            taking: None,
            is_looking: false,
            is_publish_due: false,
            waiting: VecDeque::new(),
            successor: None,
            shutdown: None,
            closing: None,
            is_over: false,
            last: LastKnown::default(),
        })
    }

    async fn handle(
        &self,
        _: Inbox,
        message: Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let now = state.shared.clock.now();
        state.step_down_in_time(now);
        match message {
            Message::Tick => state.tick(now),
            Message::Publish => state.publish(),
            Message::Request(request, room) => state.request(request, room, now),
            Message::Linked(peer) => state.linked(&peer),
            Message::Unlinked(peer) => state.unlinked(&peer),
            Message::Announced(leader, term, welcome) => state.announced(leader, term, *welcome),
            Message::Pulse(pulse, _room) => state.pulse(pulse),
            Message::Observed(observed) => state.observed(observed, now),
            Message::Taken(taken) => state.taken(taken, now),
            Message::BeatWritten(term, sent) => state.beat_written(term, sent),
            Message::Deposed(term) => state.deposed(term),
            Message::Unusable(why) => state.give_up(&why),
            Message::Done(term, outcome) => state.done(term, outcome, now),
            Message::Nodes(reply) => {
                let last = || state.last.nodes.clone();
                _ = reply.send(state.leader().map_or_else(last, Leader::nodes));
            }
            Message::Shards(reply) => {
                let last = || state.last.shards.clone();
                _ = reply.send(state.leader().map_or_else(last, Leader::shards));
            }
            Message::Find(query, reply) => {
                let nobody = || Error::NotLeader { leader: String::new() };
                _ = reply.send(state.leader().map(|leader| leader.find(&query)).ok_or_else(nobody));
            }
            Message::Placement(shard, reply) => {
                _ = reply
                    .send(state.leader().map(|leader| leader.placement(shard)).unwrap_or_default());
            }
            Message::Admit(actor, node, admit, reply) => {
                let done = state.leader_mut().map(|leader| leader.admit(actor, &node, admit, now));
                let nobody = || Error::NotLeader { leader: String::new() };
                _ = reply.send(done.unwrap_or_else(|| Err(nobody())));
            }
            Message::Release(actor, shard, reply) => {
                let done = state.leader_mut().map(|leader| leader.release(actor, shard, now));
                let nobody = || Error::NotLeader { leader: String::new() };
                _ = reply.send(done.unwrap_or_else(|| Err(nobody())));
            }
            Message::Shutdown(reply) => state.shut_down(reply),
        }
        state.follow_up(now);
        Ok(())
    }
}

impl State {
    fn leader(&self) -> Option<&Leader> {
        match &self.part {
            Part::Leading(leader) => Some(leader),
            Part::Standby | Part::Loading(_) => None,
        }
    }

    fn leader_mut(&mut self) -> Option<&mut Leader> {
        match &mut self.part {
            Part::Leading(leader) => Some(leader),
            Part::Standby | Part::Loading(_) => None,
        }
    }

    fn term(&self) -> Option<Term> {
        match &self.part {
            Part::Leading(leader) => Some(leader.term()),
            Part::Loading(loading) => Some(loading.hands.term),
            Part::Standby => None,
        }
    }

    /// A leader that was stopped for a while must not act on what it believed before.
    fn step_down_in_time(&mut self, now: Millis) {
        if self.term().is_some() && self.leadership.leads(now).is_none() {
            let actions = self.leadership.tick(now);
            self.carry(actions);
        }
    }

    fn tick(&mut self, now: Millis) {
        let actions = self.leadership.tick(now);
        self.carry(actions);
        match &mut self.part {
            Part::Leading(leader) => leader.tick(now),
            Part::Standby => self.standby.tick(&self.shared, &self.inbox, now),
            Part::Loading(_) => {}
        }
        self.waiting.retain(|(request, _)| {
            request.deadline.is_none_or(|deadline| Instant::now() < deadline)
        });
    }

    /// What may follow from any message.
    fn follow_up(&mut self, now: Millis) {
        if let Some(successor) = self.leader().and_then(Leader::successor).cloned() {
            self.successor = Some(successor);
            let actions = self.leadership.step_back(now);
            self.carry(actions);
        }
        if self.leader().is_some_and(|leader| leader.outranked().is_some()) {
            let actions = self.leadership.deposed();
            self.carry(actions);
        }
        if !self.waiting.is_empty() && self.is_elsewhere() {
            for (request, room) in std::mem::take(&mut self.waiting) {
                self.redirect(request, room);
            }
        }
        if self.leader().is_some_and(Leader::is_dirty) && !self.is_publish_due {
            self.is_publish_due = true;
            let (inbox, wait_ms) = (self.inbox.clone(), self.shared.config.coalesce_ms);
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(wait_ms)).await;
                _ = inbox.cast(Message::Publish);
            });
        }
    }

    fn publish(&mut self) {
        self.is_publish_due = false;
        if let Some(leader) = self.leader_mut() {
            leader.publish(None);
        }
    }

    // Leadership.

    fn carry(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Observe => self.look(),
                Action::Take { expected_term, expected_beat, reason } => {
                    self.taking = Some(reason);
                    let (shared, inbox) = (self.shared.clone(), self.inbox.clone());
                    tokio::spawn(steps::take(shared, inbox, expected_term, expected_beat));
                }
                Action::RaiseBeat { term, sent } => {
                    let (shared, inbox) = (self.shared.clone(), self.inbox.clone());
                    tokio::spawn(steps::raise_beat(shared, inbox, term, sent));
                }
                Action::Release { term } => self.release(term),
                Action::Began(term) => self.began(term),
                Action::Ended(reason) => self.ended(reason),
            }
        }
    }

    fn look(&mut self) {
        if !std::mem::replace(&mut self.is_looking, true) {
            tokio::spawn(steps::observe(self.shared.clone(), self.inbox.clone()));
        }
    }

    fn observed(&mut self, observed: Option<steps::Observed>, now: Millis) {
        self.is_looking = false;
        let Some(observed) = observed else { return };
        if !leadership::is_of_cluster(&self.shared.authorities, &observed.authorities) {
            let cluster_id = observed.cluster_id.map(String::from).unwrap_or_default();
            return self.give_up(&steps::foreign(&cluster_id));
        }
        if self.term().is_none() {
            let row = observed.leader.clone().unwrap_or_default();
            if row.name.as_ref().is_some_and(|name| *name != self.shared.me.name) {
                self.last = LastKnown::default();
            }
            self.know(row, observed.cluster_id);
        }
        let actions = self.leadership.observe(observed.leader.as_ref(), now);
        self.carry(actions);
    }

    /// Notes who leads, when it is not us.
    fn know(&self, row: LeaderRow, cluster_id: Option<domain::ClusterId>) {
        let leader = row.name.map(String::from).unwrap_or_default();
        self.shared.status.send_if_modified(|status| {
            let cluster_id = cluster_id.or(status.cluster_id.take());
            let known = Status { leader, term: row.term, leads: false, cluster_id };
            std::mem::replace(status, known.clone()) != known
        });
        metrics::TERM.set(row.term.0.cast_signed());
    }

    fn taken(&mut self, taken: Taken, now: Millis) {
        let actions = self.leadership.taken(taken, now);
        self.carry(actions);
    }

    fn began(&mut self, term: Term) {
        let reason = self.taking.take().unwrap_or(Reason::LeaderFree);
        info!(%term, %reason, leader = %self.shared.me.name, "leading");
        metrics::TERM.set(term.0.cast_signed());
        metrics::LEADS.set(1);
        let before = self.shared.status();
        self.shared.status.send_modify(|status| {
            status.leader = self.shared.me.name.to_string();
            status.term = term;
            status.leads = true;
        });
        let journal = Journal::open(term, self.shared.clone(), self.inbox.clone());
        journal.transition(Transition {
            subject: format!("leader/{}", self.shared.me.name),
            from: "standby",
            to: "leader",
            reason,
            cause: match before.leader.as_str() {
                "" => String::new(),
                leader => format!("{leader} led in term {}", before.term),
            },
            epoch: Epoch(0),
            node: String::new(),
        });
        let hands = Hands::new(term, self.shared.clone(), self.inbox.clone());
        let mut task = JoinSet::new();
        task.spawn(load(hands.clone()));
        self.part = Part::Loading(Loading { hands, journal, _task: task });
    }

    fn ended(&mut self, reason: Reason) {
        let part = std::mem::replace(&mut self.part, Part::Standby);
        let journal = match part {
            Part::Standby => return,
            Part::Loading(loading) => loading.journal,
            Part::Leading(leader) => {
                self.last = LastKnown { nodes: leader.nodes(), shards: leader.shards() };
                leader.into_journal()
            }
        };
        metrics::LEADS.set(0);
        self.shared.status.send_modify(|status| {
            status.leads = false;
            status.leader.clear();
        });
        self.standby.resume(self.shared.view());
        if reason == Reason::HearsFewer {
            journal.transition(Transition {
                subject: format!("leader/{}", self.shared.me.name),
                from: "leader",
                to: "standby",
                reason,
                cause: String::new(),
                epoch: Epoch(0),
                node: String::new(),
            });
        }
        if [Reason::ShuttingDown, Reason::HearsFewer].contains(&reason) {
            self.closing = Some(journal);
        } else {
            journal.abandon();
            warn!(%reason, "not leading any more");
        }
    }

    fn beat_written(&mut self, term: Term, sent: Millis) {
        if self.term() == Some(term) {
            self.leadership.beat_written(sent);
        }
    }

    fn deposed(&mut self, term: Term) {
        if self.term() == Some(term) {
            let actions = self.leadership.deposed();
            self.carry(actions);
        }
    }

    /// Ends, and hands the leadership over before if it is here: a newer program may stand by.
    fn give_up(&mut self, why: &str) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        error!(why, "a database cannot be used: the scheduler ends");
        _ = self.shared.unusable.set(why.to_owned());
        self.waiting.clear();
        let was_here = self.term().is_some();
        let actions = self.leadership.resign();
        self.carry(actions);
        if !was_here {
            self.inbox.stop(None);
        }
    }

    fn shut_down(&mut self, reply: RpcReplyPort<()>) {
        self.shutdown = Some(reply);
        self.waiting.clear();
        let actions = self.leadership.resign();
        self.carry(actions);
        if let Some(reply) = self.shutdown.take() {
            _ = reply.send(());
            self.inbox.stop(None);
        }
    }

    fn release(&mut self, term: Term) {
        let (shared, inbox) = (self.shared.clone(), self.inbox.clone());
        let (journal, reply) = (self.closing.take(), self.shutdown.take());
        let (successor, ends) = (self.successor.take(), self.is_over || reply.is_some());
        tokio::spawn(async move {
            steps::release(shared.clone(), term, journal).await;
            if let Some(successor) = successor {
                let invitation = envelope(kind::TAKE_OVER, &());
                // Without it the successor looks half a second later.
                _ = shared.links.cast(&control_peer(&successor), invitation);
            }
            if let Some(reply) = reply {
                _ = reply.send(());
            }
            if ends {
                inbox.stop(None);
            }
        });
    }

    fn done(&mut self, term: Term, outcome: Outcome, now: Millis) {
        if self.term() != Some(term) {
            return;
        }
        match (std::mem::replace(&mut self.part, Part::Standby), outcome) {
            (Part::Loading(loading), Outcome::Loaded(loaded)) => {
                self.begin(loading, *loaded, now);
            }
            (Part::Leading(mut leader), outcome) => {
                leader.done(outcome, now);
                self.part = Part::Leading(leader);
            }
            (part @ (Part::Loading(_) | Part::Standby), _) => self.part = part,
        }
    }

    fn begin(&mut self, loading: Loading, loaded: crate::leader::Loaded, now: Millis) {
        let leader = Leader::new(loading.hands, loading.journal, loaded, now);
        self.shared
            .status
            .send_modify(|status| status.cluster_id = Some(leader.cluster_id().clone()));
        self.part = Part::Leading(Box::new(leader));
        self.last = LastKnown::default();
        for (request, room) in std::mem::take(&mut self.waiting) {
            self.request(request, room, now);
        }
    }

    // What other processes say.

    fn request(&mut self, request: Request, room: OwnedSemaphorePermit, now: Millis) {
        if let Some(request) = self.request_of_replica(request, now)
            && let Some(request) = self.request_of_leader(request, now)
        {
            self.redirect(request, room);
        }
    }

    /// What one control replica wants of another, whichever of them leads. Gives back what is not of that kind.
    fn request_of_replica(&mut self, request: Request, now: Millis) -> Option<Request> {
        if request.from.role != Role::Control {
            return Some(request);
        }
        match request.envelope.kind {
            kind::SIGHT => {
                let heard = match self.leader() {
                    Some(leader) => leader.answering(),
                    None => self.standby.sightings.count(now),
                };
                let nodes = u32::try_from(heard).unwrap_or(u32::MAX);
                request.answer(Ok(encoded(&SightAnswer { nodes })));
            }
            kind::TAKE_OVER => {
                let actions = self.leadership.invited();
                self.carry(actions);
                request.answer(Ok(bytes::Bytes::new()));
            }
            kind::VIEW => {
                if matches!(self.part, Part::Standby) {
                    let payload = request.envelope.payload.clone();
                    self.standby.view_message(&self.shared, &request.from, payload);
                }
            }
            _ => return Some(request),
        }
        None
    }

    /// What any process wants of the leader. Gives it back where we do not lead.
    fn request_of_leader(&mut self, request: Request, now: Millis) -> Option<Request> {
        let Some(leader) = self.leader_mut() else { return Some(request) };
        let (from, payload) = (&request.from, request.envelope.payload.clone());
        let answer = match request.envelope.kind {
            kind::JOIN => {
                let joined = read_message(payload)
                    .and_then(|join: JoinRequest| leader.join(from, join, now));
                let outcome = if joined.is_ok() { "joined" } else { "refused" };
                metrics::JOINS.with_label_values(&[outcome]).inc();
                if let Err(refusal) = &joined {
                    warn!(%from, reason = refusal.message, "refused a join");
                }
                joined
            }
            kind::LEAVE => {
                read_message(payload).and_then(|join: JoinRequest| leader.leave(from, join, now))
            }
            kind::VIEW_WANTED => Ok(leader.whole_view()),
            kind::DROPPED => read_message(payload).and_then(|held: Held| {
                let reason = why_dropped(&request.envelope);
                leader.dropped(from, read_held(held), reason, now)
            }),
            kind::HELD => read_message(payload)
                .and_then(|held: Held| leader.opened(from, read_held(held), now)),
            kind::AGENT_FAILED => read_message(payload)
                .and_then(|failed: AgentFailed| leader.agent_failed(from, failed)),
            kind::DRAIN => read_message(payload)
                .and_then(|join: JoinRequest| leader.drain_asked(from, join, now)),
            kind::STANDBY => read_message(payload)
                .and_then(|standby: StandbyRequest| leader.standby(from, standby)),
            other => Err(malformed(format!("kind {other} is not for the leader"))),
        };
        self.answer(request, answer);
        None
    }

    fn answer(&self, request: Request, answer: Result<bytes::Bytes, proto::link::Refusal>) {
        // Whoever wants the view without waiting for an answer gets it as everybody gets views.
        if let (kind::VIEW_WANTED, None, Ok(view)) =
            (request.envelope.kind, &request.respond, &answer)
        {
            let mut message = envelope(kind::VIEW, &());
            message.payload = view.clone();
            _ = self.shared.links.cast(&request.from, message);
        }
        request.answer(answer);
    }

    /// Whether another leads, as far as is known.
    fn is_elsewhere(&self) -> bool {
        let leader = self.shared.status().leader;
        self.term().is_none() && !leader.is_empty() && leader != self.shared.me.name.as_str()
    }

    /// Names the leader; where that may be us in a moment, the request waits until it is known.
    fn redirect(&mut self, request: Request, room: OwnedSemaphorePermit) {
        if self.is_elsewhere() {
            let status = self.shared.status();
            let message = format!("{} leads, not {}", status.leader, self.shared.me.name);
            let mut refusal = refusal(Reason::Moved, message);
            refusal.moved_node = status.leader;
            refusal.moved_epoch = status.term.0;
            return request.refuse(refusal);
        }
        if WAITING_MAX <= self.waiting.len() {
            return request.refuse(overloaded());
        }
        self.waiting.push_back((request, room));
    }

    fn linked(&mut self, peer: &Peer) {
        if let Some(leader) = self.leader_mut() {
            leader.linked(peer);
        }
    }

    fn unlinked(&mut self, peer: &Peer) {
        self.standby.unlinked(&peer.name);
        if let Some(leader) = self.leader_mut() {
            leader.unlinked(&peer.name);
        }
    }

    fn announced(&mut self, leader: ProcessName, term: Term, welcome: JoinResponse) {
        if matches!(self.part, Part::Standby) {
            self.standby.announced(&self.shared, leader, term, welcome);
        }
    }

    fn pulse(&mut self, pulse: Pulse) {
        let at = self.shared.clock.at(pulse.at);
        match (&mut self.part, pulse.beat) {
            (Part::Leading(leader), Some(beat)) => leader.beat(read_beat(pulse.from, beat), at),
            (Part::Leading(leader), None) => leader.session_lost(&pulse.from, at),
            (Part::Standby | Part::Loading(_), Some(_)) => {
                self.standby.sightings.heard(&pulse.from, at);
            }
            (Part::Standby | Part::Loading(_), None) => self.standby.sightings.lost(&pulse.from),
        }
    }
}
