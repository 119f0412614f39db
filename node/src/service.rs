//! What comes in over the links, handed on.

use std::sync::OnceLock;

use cluster::{Incoming, LinkEvent};
use domain::{Reason, Role};
use proto::kind;
use proto::link::Refusal;

use crate::membership::{Event, Events};

/// Messages that come before the agents are there are refused; the links come first.
#[derive(Default)]
pub(crate) struct Service(OnceLock<(agent::Handle, Events)>);

impl Service {
    pub(crate) fn attach(&self, agents: agent::Handle, events: Events) {
        _ = self.0.set((agents, events));
    }
}

impl cluster::Service for Service {
    fn handle(&self, incoming: Incoming) {
        let Some((agents, events)) = self.0.get() else {
            if let Some(reply) = incoming.reply {
                let message = "the node is starting".to_owned();
                let reason = Reason::ShuttingDown.code().into();
                reply.refuse(Refusal { reason, message, ..Refusal::default() });
            }
            return;
        };
        if incoming.envelope.kind == kind::DRAIN_WANTED && incoming.from.role == Role::Control {
            return events.send(Event::DrainWanted);
        }
        agents.incoming(incoming);
    }

    fn link(&self, event: LinkEvent) {
        if let Some((_, events)) = self.0.get() {
            events.send(Event::Link(event));
        }
    }
}
