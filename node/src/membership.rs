//! Joins the cluster, follows it, and joins anew when this node was declared dead.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use tokio::sync::mpsc;

use cluster::beat::BeatSender;
use cluster::{LinkEvent, Peer};
use domain::view::{Version, View, Word};
use domain::{Incarnation, Reason, Role, Term};
use proto::kind;
use proto::link::{Envelope, JoinRequest, JoinResponse};
use telemetry::Health;

use crate::Config;

pub(crate) enum Event {
    Link(LinkEvent),
    View(Arc<View>),
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
    joined: bool,
    /// The version of the welcome: an older view does not say whether this run is a member.
    joined_at: Version,
    /// Not before this is the next join tried: a refusal or a flapping link must not become a storm.
    not_before: Option<Instant>,
    /// Joins that failed one after another.
    failures: u32,
    /// Peers that the last view named.
    known: Vec<Peer>,
}

impl Membership {
    /// Until `shutdown` ends.
    pub(crate) async fn run(
        self,
        mut events: mpsc::Receiver<Event>,
        shutdown: impl Future<Output = ()> + Send,
    ) -> BeatSender {
        let controls = match self.config.controls() {
            Ok(controls) => controls,
            Err(error) => {
                tracing::error!(%error, "cannot look for the cluster");
                Vec::new()
            }
        };
        for (control, address) in &controls {
            self.cluster.learn(control.clone(), vec![address.clone()]);
            self.cluster.keep(control.clone());
        }
        let controls: Vec<Peer> = controls.into_iter().map(|(control, _)| control).collect();
        self.agents.set_controls(controls.clone());
        let mut state = State::default();
        let mut look = tokio::time::interval(LOOK_EVERY);
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(event) = events.recv() => self.heard(event, &mut state, &controls).await,
                _ = look.tick() => {
                    if !state.joined {
                        self.join(&controls, &mut state).await;
                    }
                }
            }
        }
        self.leave(&controls).await;
        self.beats
    }

    async fn heard(&self, event: Event, state: &mut State, controls: &[Peer]) {
        match event {
            Event::Link(LinkEvent::Up { peer, .. }) if peer.role == Role::Control => {
                self.join(controls, state).await;
            }
            Event::Link(LinkEvent::Up { .. }) => {}
            Event::Link(LinkEvent::Down { peer }) if peer.role == Role::Control => {
                // A later leader has to hear of this node; the join is the same for one that knows it.
                state.joined = false;
                self.health.set_not_ready("control_unreachable");
            }
            Event::Link(LinkEvent::Down { .. }) => {}
            Event::View(view) => self.follow(&view, state),
        }
    }

    /// Learns where the others are; sees whether this node is still a member.
    fn follow(&self, view: &View, state: &mut State) {
        let me = self.agents.member();
        let others =
            view.members.iter().filter(|(name, info)| **name != me.name && info.role == Role::Node);
        let mut known = Vec::new();
        for (name, info) in others {
            let peer = Peer::new(Role::Node, name.clone());
            self.cluster.learn(peer.clone(), vec![info.address.clone()]);
            known.push(peer);
        }
        for gone in state.known.iter().filter(|peer| !known.contains(peer)) {
            self.cluster.forget(gone.clone());
        }
        state.known = known;
        if !state.joined {
            return;
        }
        match view.word_to(&me, state.joined_at) {
            Word::Nothing => {}
            Word::JoinAgain => state.joined = false,
            Word::Dead => {
                tracing::warn!(%me, "this node was declared dead: it drops its shards and joins anew");
                self.agents.rejoin(me.incarnation.next());
                state.joined = false;
            }
        }
    }

    /// Asks every control replica that is linked; the leader takes this node in.
    async fn join(&self, controls: &[Peer], state: &mut State) {
        if state.not_before.is_some_and(|not_before| Instant::now() < not_before) {
            return;
        }
        for control in controls.iter().filter(|control| self.cluster.is_linked(control)) {
            match self.join_at(control).await {
                Ok(welcome) => return self.welcome(control, welcome, state),
                Err(cluster::Error::Refused(refusal)) => {
                    let reason = cluster::reason_of(&refusal);
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

    async fn join_at(&self, control: &Peer) -> Result<JoinResponse, cluster::Error> {
        let envelope = Envelope {
            kind: kind::JOIN,
            payload: self.request().encode_to_vec().into(),
            ..Envelope::default()
        };
        let answer = self.cluster.call(control, envelope, Instant::now() + JOIN_TIMEOUT).await?;
        JoinResponse::decode(answer).map_err(|_| cluster::Error::PeerGone { peer: control.clone() })
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

    fn welcome(&self, control: &Peer, welcome: JoinResponse, state: &mut State) {
        tracing::info!(%control, cluster = welcome.cluster_id, "joined");
        state.joined = true;
        state.failures = 0;
        state.not_before = None;
        self.beats.set_targets(welcome.beats);
        if let Some(view) = welcome.view {
            state.joined_at = Version { term: Term(view.term), number: view.number };
            self.agents.view_message(control.clone(), view.encode_to_vec().into());
        }
        self.health.set_ready();
    }

    /// Tells the leader that this node goes, so that nobody has to find out.
    async fn leave(&self, controls: &[Peer]) {
        const WAIT: Duration = Duration::from_millis(500);
        for control in controls.iter().filter(|control| self.cluster.is_linked(control)) {
            let envelope = Envelope {
                kind: kind::LEAVE,
                payload: self.request().encode_to_vec().into(),
                ..Envelope::default()
            };
            if self.cluster.call(control, envelope, Instant::now() + WAIT).await.is_ok() {
                return;
            }
        }
    }
}
