//! The other control replicas: who stands by, and what they hear when we hear little.

use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster::Peer;
use domain::brake::{self, ASK_MS};
use domain::time::Millis;
use domain::view::MemberInfo;
use domain::{Incarnation, ProcessName, Role};
use proto::kind;
use proto::link::{Envelope, JoinResponse, Refusal, SightAnswer, StandbyRequest};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::Leader;
use super::hands::{Hands, Outcome};
use crate::links::{malformed, refusal};
use crate::shared::encoded;
use crate::standby::control_peer;

impl Leader {
    /// A replica stands by: it gets every view from now on, and nodes beat to it, too.
    pub(crate) fn standby(
        &mut self,
        from: &Peer,
        request: StandbyRequest,
    ) -> Result<Bytes, Refusal> {
        let name: ProcessName =
            request.name.parse().map_err(|error: domain::Error| malformed(error.to_string()))?;
        if from.role != Role::Control || from.name != name || name == self.hands.shared.me.name {
            let message = format!("{from} may not speak for control replica {name}");
            return Err(refusal(domain::Reason::NotAuthorised, message));
        }
        info!(replica = %name, incarnation = request.incarnation, "a control replica stands by");
        let info = MemberInfo {
            role: Role::Control,
            incarnation: Incarnation(request.incarnation),
            address: request.address,
            beat: request.beat,
            offers: [].into(),
        };
        self.is_dirty |= self.standbys.insert(name, info.clone()) != Some(info);
        self.behind.remove(from);
        self.publish(Some(from));
        Ok(self.welcome())
    }

    /// What a process that joined is answered.
    pub(super) fn welcome(&self) -> Bytes {
        let beats = std::iter::once(&self.hands.shared.beat);
        let beats = beats.chain(self.standbys.values().map(|standby| &standby.beat));
        encoded(&JoinResponse {
            cluster_id: self.cluster_id.to_string(),
            view: Some(proto::view::to_message(&self.view.whole())),
            beats: beats.cloned().collect(),
        })
    }

    /// The link to a replica is gone; when it is back it says again that it stands by.
    pub(crate) fn unlinked(&mut self, name: &ProcessName) {
        if self.standbys.remove(name).is_some() {
            info!(replica = %name, "a control replica is gone");
            self.behind.remove(&control_peer(name));
            self.is_dirty = true;
        }
    }

    /// The replica in whose favour we should step back.
    pub(crate) fn successor(&self) -> Option<&ProcessName> {
        self.successor.as_ref()
    }

    pub(super) fn brake(&mut self, now: Millis) {
        let brake = self.membership.brake(now);
        let actions = self.brakes.tick(brake, now);
        if let (false, domain::membership::Brake::On { silent, of }) = (actions.is_empty(), brake) {
            warn!(silent, of, "most nodes fell silent at once");
        }
        self.apply_brake(actions);
    }

    pub(super) fn sighted(&mut self, heard: &[(ProcessName, usize)]) {
        let actions = self.brakes.answered(self.answering(), heard);
        self.apply_brake(actions);
    }

    /// How many nodes beat here.
    pub(crate) fn answering(&self) -> usize {
        self.membership.nodes().filter(|node| node.is_heard()).count()
    }

    fn apply_brake(&mut self, actions: Vec<brake::Action>) {
        for action in actions {
            match action {
                brake::Action::Hold => self.ownership.hold(true),
                brake::Action::Release => self.ownership.hold(false),
                brake::Action::Ask => {
                    let replicas = self.standbys.keys().cloned().collect();
                    self.tasks.spawn(self.hands.clone().sight(replicas));
                }
                brake::Action::HandOver(name) => {
                    warn!(replica = %name, "it hears more nodes: leadership goes there");
                    self.successor = Some(name);
                }
            }
        }
    }
}

impl Hands {
    /// Asks replicas how many nodes they hear. Who does not answer in time hears none.
    async fn sight(self, replicas: Vec<ProcessName>) {
        let deadline = Instant::now() + Duration::from_millis(ASK_MS * 4 / 5);
        let mut asks = JoinSet::new();
        for replica in replicas {
            let shared = self.shared.clone();
            asks.spawn(async move {
                let envelope = Envelope { kind: kind::SIGHT, ..Envelope::default() };
                let answer = shared.links.call(&control_peer(&replica), envelope, deadline).await;
                let answer = <SightAnswer as prost::Message>::decode(answer.ok()?).ok()?;
                Some((replica, answer.nodes as usize))
            });
        }
        let mut heard = Vec::new();
        while let Some(answer) = asks.join_next().await {
            heard.extend(answer.ok().flatten());
        }
        self.report(Outcome::Sighted(heard));
    }
}
