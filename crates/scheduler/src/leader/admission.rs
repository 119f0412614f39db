//! Which nodes may have shards: cordoned by an operator, or draining because they are about to go.

use bytes::Bytes;
use cluster::Peer;
use domain::membership::{NodeView, Standing};
use domain::place::Admission;
use domain::time::Millis;
use domain::{Epoch, Member, ProcessName, Reason};
use proto::kind;
use proto::link::control_write::Write;
use proto::link::{DrainAnswer, Envelope, JoinRequest, PutAudit, Refusal};
use proto::v1;
use tracing::info;

use super::roster::{ALIVE, is_in, read_join};
use super::{Leader, api_node, check_sender};
use crate::Error;
use crate::clock::wall_ms;
use crate::journal::Transition;
use crate::links::refusal;
use crate::shared::{encoded, node_peer};

/// What an operator wants of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admit {
    Cordon,
    Uncordon,
    Drain,
}

impl Admit {
    fn method(self) -> &'static str {
        match self {
            Self::Cordon => "Cordon",
            Self::Uncordon => "Uncordon",
            Self::Drain => "Drain",
        }
    }
}

impl Leader {
    /// Does what an operator wants of a node, and notes who did.
    pub(crate) fn admit(
        &mut self,
        actor: String,
        node: &ProcessName,
        admit: Admit,
        now: Millis,
    ) -> Result<v1::Node, Error> {
        let subject = format!("node/{node}");
        let Some(row) = self.roster.rows.get(node) else {
            return Err(Error::UnknownSubject { subject });
        };
        let member = self.membership.nodes().map(|node| node.member()).find(|m| m.name == *node);
        let member = member.cloned();
        let is_draining = member.as_ref().is_some_and(|member| self.roster.is_draining(member));
        if is_draining && admit != Admit::Drain {
            return Err(Error::Draining { node: node.to_string() });
        }
        if admit == Admit::Drain && member.is_none() {
            return Err(Error::NotRunning { node: node.to_string(), state: row.state.clone() });
        }
        self.journal.put(Write::Audit(PutAudit {
            at_ms: wall_ms(),
            actor: actor.clone(),
            action: admit.method().to_owned(),
            subject,
            term: self.term().0,
        }));
        match (admit, member) {
            (Admit::Cordon | Admit::Uncordon, _) => {
                self.cordon(node, admit == Admit::Cordon, &actor, now);
            }
            (Admit::Drain, Some(member)) => {
                self.drain(&member, format!("asked by {actor}"), now);
                self.roster.drains(member);
                self.tell_drains(now);
            }
            (Admit::Drain, None) => {}
        }
        let alive = self.membership.nodes().find(|alive| alive.member().name == *node);
        let row = self.roster.rows.get(node);
        row.map(|row| api_node(row, alive, Vec::new())).ok_or(Error::Silent)
    }

    /// Tells the nodes that an operator wants to drain, until they say that they do: a message may get lost.
    pub(super) fn tell_drains(&mut self, now: Millis) {
        for node in self.roster.drains_to_tell(now) {
            let wanted = Envelope { kind: kind::DRAIN_WANTED, ..Envelope::default() };
            // Not sent, it is sent the next time.
            _ = self.hands.shared.links.cast(&node_peer(&node), wanted);
        }
    }

    /// What this very run was doing under the leader before.
    pub(super) fn drain_on(&mut self, member: &Member) {
        if !self.roster.is_draining(member) {
            return;
        }
        self.roster.withdraw(member);
        if self.membership.drain(member) {
            self.roster.drains(member.clone());
        }
    }

    fn cordon(&mut self, node: &ProcessName, is_cordoned: bool, actor: &str, now: Millis) {
        if !self.membership.cordon(node, is_cordoned) {
            return;
        }
        let reason = if is_cordoned { Reason::Cordoned } else { Reason::Uncordoned };
        info!(%node, %reason, actor, "node");
        let admission = if is_cordoned { Admission::Cordoned } else { Admission::Open };
        self.note_admission(node, admission, reason, format!("asked by {actor}"));
        self.candidates_changed(now);
    }

    /// A node says that it is about to go, or an operator wants it to.
    pub(crate) fn drain_asked(
        &mut self,
        from: &Peer,
        request: JoinRequest,
        now: Millis,
    ) -> Result<Bytes, Refusal> {
        check_sender(from, &request.name)?;
        let member = read_join(request)?.joining.member;
        if self.membership.node(&member).is_none() {
            return Err(refusal(Reason::NotFound, format!("{member} is no member: join first")));
        }
        self.drain(&member, "the process was told to end".to_owned(), now);
        self.roster.drains_itself(&member);
        // Also those that are suspected: most of them answer again in a moment.
        let may_take = |node: &&NodeView| {
            node.admission == Admission::Open && node.standing() != Standing::Storeless
        };
        let takers = self.membership.nodes().filter(may_take);
        let targets = u32::try_from(takers.count()).unwrap_or(u32::MAX);
        let is_settled = self.hands.shared.config.settle_ms <= now.since(self.began);
        if targets == 0 && !is_settled {
            return Err(refusal(Reason::NoTarget, "the nodes have not all joined yet"));
        }
        Ok(encoded(&DrainAnswer { targets }))
    }

    fn drain(&mut self, member: &Member, cause: String, now: Millis) {
        if !self.membership.drain(member) {
            return;
        }
        info!(%member, cause, "node drains");
        self.note_admission(&member.name, Admission::Draining, Reason::DrainRequested, cause);
        self.roster.withdraw(member);
        self.is_dirty = true;
        self.candidates_changed(now);
    }

    fn note_admission(
        &mut self,
        node: &ProcessName,
        admission: Admission,
        reason: Reason,
        cause: String,
    ) {
        let Some(row) = self.roster.rows.get_mut(node) else { return };
        let before = std::mem::replace(&mut row.admission, admission.as_str().to_owned());
        let row = row.clone();
        let state = |admission: &str| match admission {
            "" if is_in(&row) => row.state.clone(),
            "" => ALIVE.to_owned(),
            other => other.to_owned(),
        };
        let (from, to) = (state(&before), state(admission.as_str()));
        self.journal.node(row);
        self.journal.transition(Transition {
            subject: format!("node/{node}"),
            from: &from,
            to: &to,
            reason,
            cause,
            epoch: Epoch(0),
            node: node.to_string(),
        });
    }
}
