//! Joins the cluster, follows it, joins anew when this node was declared dead, and hands everything over before it goes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use tokio::sync::mpsc;

use cluster::beat::BeatSender;
use cluster::{LinkEvent, Peer};
use domain::hearing::Hearing;
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

const EVENTS_MAX: usize = 1_024;
const JOIN_TIMEOUT: Duration = Duration::from_secs(3);
/// After a join that failed; doubled with each, up to 64 times.
const JOIN_PAUSE_MIN: Duration = Duration::from_millis(25);
/// How often a node that is not a member tries again, and one that is looks whether it still is.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const UNREACHABLE: &str = "control_unreachable";
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

#[derive(Default)]
struct State {
    /// The control replica that took this node in, and in which leadership. None: it is no member now.
    joined: Option<(Peer, Term)>,
    /// The version of the welcome: an older view does not say whether this run is a member.
    joined_at: Version,
    /// Not before this is the next join tried: a refusal or a flapping link must not become a storm.
    not_before: Option<Instant>,
    /// Joins that failed one after another.
    failures: u32,
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

impl Membership {
    /// Until `shutdown` ends, or somebody wants this node to drain.
    pub(crate) async fn run(
        self,
        mut events: mpsc::Receiver<Event>,
        shutdown: impl Future<Output = ()> + Send,
    ) -> BeatSender {
        let mut state = State { controls: self.configured(), ..State::default() };
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
                    event @ (Event::Link(_) | Event::View(_)) => self.heard(event, &mut state).await,
                },
                _ = look.tick() => self.look(&mut state).await,
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

    async fn look(&self, state: &mut State) {
        // Every replica answers beats, and says who leads: a later leadership has to hear of this node.
        let newer = self.beats.last_answer().map(|(_, answer)| (answer.leader, Term(answer.term)));
        let is_left = |(leader, term): &(String, Term)| {
            !leader.is_empty() && state.joined.as_ref().is_some_and(|(_, joined)| joined < term)
        };
        if newer.as_ref().is_some_and(is_left) {
            state.joined = None;
        }
        if state.joined.is_none() {
            self.join(state).await;
        }
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

    async fn heard(&self, event: Event, state: &mut State) {
        match event {
            Event::Link(LinkEvent::Up { peer, .. }) if peer.role == Role::Control => {
                if state.joined.is_none() {
                    self.join(state).await;
                }
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
            return;
        }
        match view.word_to(&me, state.joined_at) {
            Word::Nothing => {}
            Word::JoinAgain => state.joined = None,
            Word::Dead => {
                tracing::warn!(%me, "this node was declared dead: it drops its shards and joins anew");
                self.agents.rejoin(me.incarnation.next());
                state.joined = None;
            }
        }
    }

    /// Asks the control replicas that are linked; the leader takes this node in, the others name it.
    async fn join(&self, state: &mut State) {
        if state.not_before.is_some_and(|not_before| Instant::now() < not_before) {
            return;
        }
        let mut candidates = state.controls.clone();
        // Whoever is not linked is heard of when it is, and asked at once.
        if !candidates.iter().any(|control| self.cluster.is_linked(control)) {
            return;
        }
        while let Some(control) = candidates.pop() {
            if !self.cluster.is_linked(&control) {
                continue;
            }
            // Who drains looks after its shards meanwhile.
            let within = if state.is_draining { DRAIN_EVERY } else { JOIN_TIMEOUT };
            match self.join_at(&control, within).await {
                Ok(welcome) => return self.welcome(control, welcome, state),
                Err(cluster::Error::Refused(refusal)) => {
                    let reason = cluster::reason_of(&refusal);
                    if reason == Some(Reason::Moved) {
                        tracing::debug!(%control, leader = refusal.moved_node, "another replica leads");
                        // Next of all, if it has not been asked yet.
                        candidates.sort_by_key(|peer| peer.name.as_str() == refusal.moved_node);
                        continue;
                    }
                    tracing::warn!(%control, ?reason, message = refusal.message, "the join was refused");
                    if reason == Some(Reason::Replaced) {
                        // The refusal names the incarnation that is known; only a larger one is taken in.
                        let known =
                            Incarnation(refusal.moved_epoch).max(self.agents.member().incarnation);
                        self.agents.rejoin(known.next());
                    }
                }
                Err(error) => tracing::warn!(%control, %error, "cannot join yet"),
            }
        }
        state.failures = state.failures.saturating_add(1);
        let pause = JOIN_PAUSE_MIN * 2_u32.pow(state.failures.min(6));
        state.not_before = Some(Instant::now() + pause);
    }

    async fn join_at(
        &self,
        control: &Peer,
        within: Duration,
    ) -> Result<JoinResponse, cluster::Error> {
        let answer = self.ask(control, kind::JOIN, within).await?;
        JoinResponse::decode(answer).map_err(|_| cluster::Error::PeerGone { peer: control.clone() })
    }

    async fn ask(&self, to: &Peer, kind: u32, within: Duration) -> Result<Bytes, cluster::Error> {
        let payload = self.request().encode_to_vec().into();
        let envelope = Envelope { kind, payload, ..Envelope::default() };
        self.cluster.call(to, envelope, Instant::now() + within).await
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
        state.failures = 0;
        state.not_before = None;
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
        let mut look = tokio::time::interval(DRAIN_LOOK);
        let mut belong = tokio::time::interval(LOOK_EVERY);
        while Instant::now() < deadline {
            tokio::select! {
                Some(event) = events.recv() => self.heard(event, state).await,
                _ = say.tick() => {
                    if !self.has_takers(state).await {
                        tracing::info!("nobody can take over what is here");
                        return;
                    }
                }
                // A leader that began meanwhile drains only its members.
                _ = belong.tick() => self.look(state).await,
                _ = look.tick() => {
                    if self.agents.is_idle() {
                        return tracing::info!("everything is handed over");
                    }
                }
            }
        }
        tracing::warn!("not everything was handed over in time");
    }

    /// Says that this node drains, to whoever leads now. Whether there is anybody for its shards, or may be.
    async fn has_takers(&self, state: &State) -> bool {
        let linked = state.controls.iter().filter(|control| self.cluster.is_linked(control));
        let mut is_reached = false;
        for control in linked {
            is_reached = true;
            if let Ok(answer) = self.ask(control, kind::DRAIN, DRAIN_EVERY).await
                && let Ok(answer) = DrainAnswer::decode(answer)
            {
                return 0 < answer.targets;
            }
        }
        is_reached
    }

    /// Tells the leader that this node goes, so that nobody has to find out.
    async fn leave(&self, state: &State) {
        const WAIT: Duration = Duration::from_millis(500);
        for control in state.controls.iter().filter(|control| self.cluster.is_linked(control)) {
            if self.ask(control, kind::LEAVE, WAIT).await.is_ok() {
                return;
            }
        }
    }
}
