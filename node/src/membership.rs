//! Joins the cluster, follows it, joins anew when this node was declared dead, and hands everything over before it goes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use cluster::beat::BeatSender;
use cluster::{LinkEvent, Peer};
use domain::hearing::Hearing;
use domain::joins::Joins;
use domain::time::Millis;
use domain::view::{Version, View, Word};
use domain::{Incarnation, Reason, Role, Term};
use proto::kind;
use proto::link::{DrainAnswer, Envelope, JoinRequest, JoinResponse};
use telemetry::Health;

use crate::Config;

pub(crate) enum Event {
    Link(LinkEvent),
    View(Arc<View>),
    /// An operator wants this node to hand everything over and end.
    DrainWanted,
}

/// Events for the membership. A full queue drops one: every link and view event is followed by a look at the whole.
#[derive(Clone)]
pub(crate) struct Events(mpsc::Sender<Event>);

impl Events {
    pub(crate) fn send(&self, event: Event) {
        if self.0.try_send(event).is_err() {
            tracing::warn!("the queue of membership events is full");
        }
    }
}

/// Of a control replica to a join.
type Answer = Result<JoinResponse, cluster::Error>;

const EVENTS_MAX: usize = 1_024;
const JOIN_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a node that is not a member tries again, and one that is looks whether it still is.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const UNREACHABLE: &str = "control_unreachable";
/// So long a node that drains looks for a control replica when none is linked: one may be just restarting.
const UNLINKED_MAX: Duration = Duration::from_secs(3);
/// How often a node that drains says so again: the leader may be another one by then.
const DRAIN_EVERY: Duration = Duration::from_millis(200);
const DRAIN_LOOK: Duration = Duration::from_millis(10);

pub(crate) fn channel() -> (Events, mpsc::Receiver<Event>) {
    let (sender, receiver) = mpsc::channel(EVENTS_MAX);
    (Events(sender), receiver)
}

pub(crate) fn tell_view(events: &Events, view: &View) {
    events.send(Event::View(Arc::new(view.clone())));
}

pub(crate) struct Membership {
    pub config: Config,
    pub cluster: cluster::Handle,
    pub agents: agent::Handle,
    pub beats: BeatSender,
    pub health: Health,
}

/// Whether there is anybody for the shards of a node that drains.
enum Takers {
    /// Somebody, or nobody has said yet.
    MayBe,
    None,
    /// No control replica is linked.
    Unknown,
}

struct State {
    began: Instant,
    /// The control replica that took this node in, and in which leadership. None: it is no member now.
    joined: Option<(Peer, Term)>,
    /// The version of the welcome: an older view does not say whether this run is a member.
    joined_at: Version,
    joins: Joins,
    /// The joins that are open.
    asking: FuturesUnordered<BoxFuture<'static, (Peer, Answer)>>,
    /// Control replicas: those of the config, and those that views name.
    controls: Vec<Peer>,
    /// Nodes that the last view named.
    nodes: Vec<Peer>,
    /// It hands everything over, and takes nothing new.
    is_draining: bool,
    hearing: Hearing,
    /// When a replica last took this node in.
    welcomed_at: Option<Instant>,
}

impl State {
    fn new(controls: Vec<Peer>) -> Self {
        Self {
            began: Instant::now(),
            joined: None,
            joined_at: Version::default(),
            joins: Joins::default(),
            asking: FuturesUnordered::new(),
            controls,
            nodes: Vec::new(),
            is_draining: false,
            hearing: Hearing::default(),
            welcomed_at: None,
        }
    }

    fn now(&self) -> Millis {
        Millis(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

impl Membership {
    /// Until `shutdown` ends, or somebody wants this node to drain.
    pub(crate) async fn run(
        self,
        mut events: mpsc::Receiver<Event>,
        shutdown: impl Future<Output = ()> + Send,
    ) -> BeatSender {
        let mut state = State::new(self.configured());
        self.agents.set_controls(state.controls.clone());
        let mut look = tokio::time::interval(LOOK_EVERY);
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(event) = events.recv() => match event {
                    Event::DrainWanted => {
                        tracing::info!("asked to drain");
                        break;
                    }
                    event @ (Event::Link(_) | Event::View(_)) => self.heard(event, &mut state),
                },
                Some((control, answer)) = state.asking.next() => {
                    self.answered(control, answer, &mut state);
                }
                _ = look.tick() => self.look(&mut state),
            }
        }
        self.health.set_not_ready("draining");
        state.is_draining = true;
        self.drain(&mut events, &mut state).await;
        self.leave(&state).await;
        self.beats
    }

    fn configured(&self) -> Vec<Peer> {
        let controls = self.config.controls().unwrap_or_else(|error| {
            tracing::error!(%error, "cannot look for the cluster");
            Vec::new()
        });
        for (control, address) in &controls {
            self.cluster.learn(control.clone(), vec![address.clone()]);
            self.cluster.keep(control.clone());
        }
        controls.into_iter().map(|(control, _)| control).collect()
    }

    fn look(&self, state: &mut State) {
        // Every replica answers beats, and says who leads: a later leadership has to hear of this node.
        let newer = self.beats.last_answer().map(|(_, answer)| (answer.leader, Term(answer.term)));
        let is_left = |(leader, term): &(String, Term)| {
            !leader.is_empty() && state.joined.as_ref().is_some_and(|(_, joined)| joined < term)
        };
        if newer.as_ref().is_some_and(is_left) {
            state.joined = None;
        }
        state.joins.led(newer.map_or(Term(0), |(_, term)| term));
        self.join(state);
        if !state.is_draining {
            self.tell_whether_heard(state);
        }
    }

    fn tell_whether_heard(&self, state: &mut State) {
        let answered = self.beats.last_answer().map(|(at, _)| at);
        let silent = answered.max(state.welcomed_at).map(|at| at.elapsed().as_millis());
        let silent_ms = silent.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX));
        match state.hearing.look(silent_ms) {
            Some(false) => {
                tracing::warn!("no control replica answers");
                self.health.set_not_ready(UNREACHABLE);
            }
            Some(true) if state.joined.is_some() => self.health.set_ready(),
            Some(true) | None => {}
        }
    }

    fn heard(&self, event: Event, state: &mut State) {
        match event {
            Event::Link(LinkEvent::Up { peer, .. }) if peer.role == Role::Control => {
                self.join(state);
            }
            Event::Link(LinkEvent::Down { peer }) if peer.role == Role::Control => {
                // A later leader has to hear of this node; the join is the same for one that knows it.
                if state.joined.take_if(|(joined, _)| *joined == peer).is_some() {
                    self.health.set_not_ready(UNREACHABLE);
                }
            }
            Event::Link(LinkEvent::Up { .. } | LinkEvent::Down { .. }) | Event::DrainWanted => {}
            Event::View(view) => self.follow(&view, state),
        }
    }

    /// Learns where the others are; sees whether this node is still a member.
    fn follow(&self, view: &View, state: &mut State) {
        let me = self.agents.member();
        let (mut nodes, mut beats) = (Vec::new(), Vec::new());
        for (name, info) in view.members.iter().filter(|(name, _)| **name != me.name) {
            let peer = Peer::new(info.role, name.clone());
            self.cluster.learn(peer.clone(), vec![info.address.clone()]);
            if info.role == Role::Node {
                nodes.push(peer);
                continue;
            }
            beats.push(info.beat.clone());
            if !state.controls.contains(&peer) {
                self.cluster.keep(peer.clone());
                state.controls.push(peer);
                self.agents.set_controls(state.controls.clone());
            }
        }
        for gone in state.nodes.iter().filter(|peer| !nodes.contains(peer)) {
            self.cluster.forget(gone.clone());
        }
        state.nodes = nodes;
        if !beats.is_empty() {
            self.beats.set_targets(beats);
        }
        if state.joined.is_none() {
            state.joins.led(view.version.term);
            return self.join(state);
        }
        match view.word_to(&me, state.joined_at) {
            Word::Nothing => {}
            Word::JoinAgain => state.joined = None,
            Word::Dead => {
                tracing::warn!(%me, "this node was declared dead: it drops its shards and joins anew");
                self.begin_anew(me.incarnation, state);
                state.joined = None;
            }
        }
    }

    /// Asks the control replicas that are linked, if this node is no member; the leader takes it in.
    fn join(&self, state: &mut State) {
        if state.joined.is_some() {
            return;
        }
        let now = state.now();
        let State { controls, joins, asking, .. } = state;
        let linked = controls.iter().filter(|control| self.cluster.is_linked(control));
        for control in linked.filter(|control| joins.ask(&control.name, now)) {
            asking.push(join_at(self.cluster.clone(), control.clone(), self.request()).boxed());
        }
    }

    fn answered(&self, control: Peer, answer: Answer, state: &mut State) {
        let error = match answer {
            Ok(welcome) => return self.welcome(control, welcome, state),
            Err(error) => error,
        };
        let now = state.now();
        state.joins.failed(&control.name, now);
        let cluster::Error::Refused(refusal) = error else {
            return tracing::warn!(%control, %error, "cannot join yet");
        };
        let reason = cluster::reason_of(&refusal);
        if reason == Some(Reason::Moved) {
            tracing::debug!(%control, leader = refusal.moved_node, "another replica leads");
            state.joins.led(Term(refusal.moved_epoch));
            return self.join(state);
        }
        tracing::warn!(%control, ?reason, message = refusal.message, "the join was refused");
        if reason == Some(Reason::Replaced) {
            // The refusal names the incarnation that is known; only a larger one is taken in.
            self.begin_anew(Incarnation(refusal.moved_epoch), state);
        }
    }

    /// Goes on as the run after `known` and all that this node was.
    fn begin_anew(&self, known: Incarnation, state: &mut State) {
        self.agents.rejoin(known.max(self.agents.member().incarnation).next());
        state.asking.clear();
        state.joins.withdrawn();
    }

    /// What the control replicas that are linked answer, as it comes: one of them leads.
    fn ask_controls(
        &self,
        kind: u32,
        within: Duration,
        state: &State,
    ) -> FuturesUnordered<impl Future<Output = Result<Bytes, cluster::Error>>> {
        let linked = state.controls.iter().filter(|control| self.cluster.is_linked(control));
        let asked = linked.map(|control| {
            let (cluster, control, request) =
                (self.cluster.clone(), control.clone(), self.request());
            async move { ask(&cluster, &control, kind, &request, within).await }
        });
        asked.collect()
    }

    fn request(&self) -> JoinRequest {
        let me = self.agents.member();
        JoinRequest {
            name: me.name.to_string(),
            incarnation: me.incarnation.0,
            zone: self.config.zone.clone(),
            capacity: self.config.capacity,
            address: self.cluster.address().to_owned(),
            capabilities: self.agents.capabilities(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn welcome(&self, control: Peer, welcome: JoinResponse, state: &mut State) {
        tracing::info!(%control, cluster = welcome.cluster_id, "joined");
        state.asking.clear();
        state.joins.welcomed();
        self.beats.set_targets(welcome.beats);
        if let Some(view) = welcome.view {
            state.joined_at = Version { term: Term(view.term), number: view.number };
            self.agents.view_message(control.clone(), view.encode_to_vec().into());
        }
        state.joined = Some((control, state.joined_at.term));
        state.welcomed_at = Some(Instant::now());
        state.hearing = Hearing::default();
        if !state.is_draining {
            self.health.set_ready();
        }
    }

    /// Gives every shard to others, without waiting for calls in flight, then lets the jobs end that others gave to this
    /// node. Ends early when nobody could take anything, and in any case after a while: whatever is left is recovered
    /// elsewhere as after a crash.
    async fn drain(&self, events: &mut mpsc::Receiver<Event>, state: &mut State) {
        let deadline = Instant::now() + Duration::from_millis(self.config.drain_timeout_ms);
        let mut say = tokio::time::interval(DRAIN_EVERY);
        say.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look = tokio::time::interval(DRAIN_LOOK);
        let mut belong = tokio::time::interval(LOOK_EVERY);
        let mut unlinked: Option<Instant> = None;
        while Instant::now() < deadline {
            tokio::select! {
                Some(event) = events.recv() => self.heard(event, state),
                Some((control, answer)) = state.asking.next() => {
                    self.answered(control, answer, state);
                }
                _ = say.tick() => match self.takers(state).await {
                    Takers::MayBe => unlinked = None,
                    Takers::Unknown
                        if unlinked.get_or_insert_with(Instant::now).elapsed() < UNLINKED_MAX => {}
                    Takers::None | Takers::Unknown => {
                        return tracing::info!("nobody can take over what is here");
                    }
                },
                // A leader that began meanwhile drains only its members.
                _ = belong.tick() => self.look(state),
                _ = look.tick() => {
                    if self.agents.is_idle() {
                        return tracing::info!("everything is handed over");
                    }
                }
            }
        }
        tracing::warn!("not everything was handed over in time");
    }

    /// Says that this node drains, to whoever leads now.
    async fn takers(&self, state: &State) -> Takers {
        let mut answers = self.ask_controls(kind::DRAIN, DRAIN_EVERY, state);
        if answers.is_empty() {
            return Takers::Unknown;
        }
        while let Some(answer) = answers.next().await {
            if let Ok(answer) = answer
                && let Ok(answer) = DrainAnswer::decode(answer)
            {
                return if 0 < answer.targets { Takers::MayBe } else { Takers::None };
            }
        }
        Takers::MayBe
    }

    /// Tells the leader that this node goes, so that nobody has to find out.
    async fn leave(&self, state: &State) {
        const WAIT: Duration = Duration::from_millis(500);
        let mut answers = self.ask_controls(kind::LEAVE, WAIT, state);
        while let Some(answer) = answers.next().await {
            if answer.is_ok() {
                return;
            }
        }
    }
}

async fn join_at(cluster: cluster::Handle, control: Peer, request: JoinRequest) -> (Peer, Answer) {
    let answer = ask(&cluster, &control, kind::JOIN, &request, JOIN_TIMEOUT).await;
    let gone = |_| cluster::Error::PeerGone { peer: control.clone() };
    let answer = answer.and_then(|answer| JoinResponse::decode(answer).map_err(gone));
    (control, answer)
}

async fn ask(
    cluster: &cluster::Handle,
    to: &Peer,
    kind: u32,
    request: &JoinRequest,
    within: Duration,
) -> Result<Bytes, cluster::Error> {
    let payload = request.encode_to_vec().into();
    let envelope = Envelope { kind, payload, ..Envelope::default() };
    cluster.call(to, envelope, Instant::now() + within).await
}
