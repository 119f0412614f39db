//! What a replica does while another one leads: says there that it is here, keeps the view for its API server, and
//! listens to the heartbeats, so that the leader can ask whether its silence is everybody's.
//!
//! Decides nothing: it follows what the leader of the newest term says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster::Peer;
use domain::membership::Sightings;
use domain::time::Millis;
use domain::view::{Applied, Delta, View};
use domain::{ProcessName, Role, Term};
use prost::Message as _;
use proto::kind;
use proto::link::{Envelope, JoinResponse, StandbyRequest};
use tracing::{debug, warn};

use crate::actor::{Inbox, Message};
use crate::shared::{Shared, envelope};

/// How long the leader's answer is waited for, and how long after a failure it is asked again.
const ANNOUNCE_MS: u64 = 1_000;
const AGAIN_MS: u64 = 250;

#[derive(Default)]
pub(crate) struct Standby {
    pub(crate) sightings: Sightings,
    /// The leadership that knows of us.
    announced: Option<(ProcessName, Term)>,
    asked: Option<Millis>,
    view: Option<View>,
}

impl Standby {
    /// Begins to stand by, from the view that was held before.
    pub(crate) fn resume(&mut self, view: Option<Arc<View>>) {
        self.announced = None;
        self.view = view.map(|view| View::clone(&view));
    }

    /// Makes itself known to whoever leads, unless it is.
    pub(crate) fn tick(&mut self, shared: &Arc<Shared>, inbox: &Inbox, now: Millis) {
        let status = shared.status();
        let Ok(leader) = status.leader.parse::<ProcessName>() else { return };
        let is_known = self.announced.as_ref() == Some(&(leader.clone(), status.term));
        let is_early = self.asked.is_some_and(|asked| now.since(asked) < AGAIN_MS);
        if leader == shared.me.name || is_known || is_early {
            return;
        }
        self.asked = Some(now);
        tokio::spawn(announce(shared.clone(), inbox.clone(), leader, status.term));
    }

    /// The leader took note of us, and sent its view.
    pub(crate) fn announced(
        &mut self,
        shared: &Shared,
        leader: ProcessName,
        term: Term,
        welcome: JoinResponse,
    ) {
        let from = control_peer(&leader);
        self.announced = Some((leader, term));
        let view = welcome.view.map(|view| Bytes::from(view.encode_to_vec()));
        self.view_message(shared, &from, view.unwrap_or_default());
    }

    /// The link to a replica is gone: if it leads, it has to be told of us again.
    pub(crate) fn unlinked(&mut self, name: &ProcessName) {
        self.announced.take_if(|(leader, _)| leader == name);
    }

    /// Takes in a view; one with a gap before it makes us ask for the whole.
    pub(crate) fn view_message(&mut self, shared: &Shared, from: &Peer, payload: Bytes) {
        let Some(delta) = read_view(payload) else {
            return warn!(%from, "a view that cannot be read");
        };
        match View::apply(&mut self.view, delta) {
            Applied::Old => {}
            Applied::Changed => {
                let Some(view) = &self.view else { return };
                shared.views.send_replace(Some(Arc::new(view.clone())));
            }
            Applied::Gap => {
                let wanted = Envelope { kind: kind::VIEW_WANTED, ..Envelope::default() };
                if let Err(error) = shared.links.cast(from, wanted) {
                    debug!(%from, %error, "cannot ask for the whole view");
                }
            }
        }
    }
}

fn read_view(payload: Bytes) -> Option<Delta> {
    let view = proto::link::View::decode(payload).ok()?;
    proto::view::from_message(view).ok()
}

pub(crate) fn control_peer(name: &ProcessName) -> Peer {
    Peer::new(Role::Control, name.clone())
}

async fn announce(shared: Arc<Shared>, inbox: Inbox, leader: ProcessName, term: Term) {
    let request = StandbyRequest {
        name: shared.me.name.to_string(),
        incarnation: shared.me.incarnation.0,
        address: shared.links.address(),
        beat: shared.beat.clone(),
    };
    let deadline = Instant::now() + Duration::from_millis(ANNOUNCE_MS);
    let (peer, request) = (control_peer(&leader), envelope(kind::STANDBY, &request));
    let welcome = match shared.links.call(&peer, request, deadline).await {
        Ok(payload) => JoinResponse::decode(payload).ok(),
        Err(error) => {
            return debug!(%leader, %error, "the leader does not know of this replica yet");
        }
    };
    if let Some(welcome) = welcome {
        _ = inbox.cast(Message::Announced(leader, term, Box::new(welcome)));
    }
}
