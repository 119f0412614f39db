//! The node server of ractor_cluster as we use it: isolated, fed with our own connections only.

use std::path::Path;

use domain::Incarnation;
use ractor::{Actor, ActorCell, ActorId, ActorRef};
use ractor_cluster::node::{NodeConnectionMode, NodeServerSessionInformation};
use ractor_cluster::{
    IncomingEncryptionMode, NodeEventSubscription, NodeServer, NodeServerMessage,
};

use crate::gateway::{GROUP, GatewayMessage, SCOPE};
use crate::links::LinksMessage;
use crate::{Error, Peer};

const COOKIE_BYTES_MIN: usize = 16;

/// Proves to a peer that we belong to the same cluster. Never shown.
pub(crate) struct Cookie(String);

impl Cookie {
    pub(crate) async fn read(path: &Path) -> Result<Self, Error> {
        let text = tokio::fs::read_to_string(path).await;
        let text = text.map_err(|source| Error::Cookie { path: path.into(), source })?;
        let cookie = text.trim();
        if cookie.len() < COOKIE_BYTES_MIN {
            return Err(Error::CookieShort { path: path.into() });
        }
        Ok(Self(cookie.to_owned()))
    }
}

/// What follows the `@` in our name. ractor_cluster refuses peers with the same host and port, and we tell two runs of
/// a process apart by it.
pub(crate) fn instance(incarnation: Incarnation) -> String {
    format!("{incarnation}-{:016x}", rand::random::<u64>())
}

/// Starts the node server, which tells `links` of every session.
pub(crate) async fn spawn(
    me: &Peer,
    instance: &str,
    cookie: Cookie,
    links: ActorRef<LinksMessage>,
    supervisor: ActorCell,
) -> Result<ActorRef<NodeServerMessage>, ractor::SpawnErr> {
    // ractor_cluster opens a listener of its own that cannot be switched off; this lets nobody in.
    let encryption = IncomingEncryptionMode::Tls(net::sealed());
    let mode = NodeConnectionMode::Isolated;
    let (name, host) = (me.to_string(), instance.to_owned());
    let server = NodeServer::new(0, cookie.0, name, host, Some(encryption), Some(mode))
        .with_listen_addr([127, 0, 0, 1].into());
    let (server, _) = Actor::spawn_linked(None, server, (), supervisor).await?;
    let subscription = Box::new(Events(links));
    _ = server.cast(NodeServerMessage::SubscribeToEvents { id: "links".to_owned(), subscription });
    Ok(server)
}

/// The label of a connection: who is there, and the number under which we handed it over.
pub(crate) fn label(subject: &str, serial: u64) -> String {
    format!("{subject}#{serial}")
}

fn serial_of(label: &str) -> Option<u64> {
    label.rsplit_once('#')?.1.parse().ok()
}

/// What became of a session.
pub(crate) enum SessionEvent {
    Opened,
    Authenticated,
    Ready,
    Disconnected,
}

struct Events(ActorRef<LinksMessage>);

impl Events {
    fn tell(&self, event: SessionEvent, session: NodeServerSessionInformation) {
        match serial_of(&session.peer_addr) {
            Some(serial) => _ = self.0.cast(LinksMessage::Session { serial, event, session }),
            // It came through the sealed listener, which cannot be.
            None => session.actor.kill(),
        }
    }
}

impl NodeEventSubscription for Events {
    fn node_session_opened(&self, session: NodeServerSessionInformation) {
        self.tell(SessionEvent::Opened, session);
    }

    fn node_session_disconnected(&self, session: NodeServerSessionInformation) {
        self.tell(SessionEvent::Disconnected, session);
    }

    fn node_session_authenticated(&self, session: NodeServerSessionInformation) {
        self.tell(SessionEvent::Authenticated, session);
    }

    fn node_session_ready(&self, session: NodeServerSessionInformation) {
        self.tell(SessionEvent::Ready, session);
    }
}

/// The gateway at the other end of a session that is ready: the one group member that belongs to this session.
pub(crate) fn gateway_of(
    session: &NodeServerSessionInformation,
) -> Option<ActorRef<GatewayMessage>> {
    let belongs = |cell: &ActorCell| match cell.get_id() {
        ActorId::Remote { node_id, .. } => node_id == session.node_id,
        ActorId::Local(_) => false,
    };
    let members = ractor::pg::get_scoped_members(&SCOPE.to_owned(), &GROUP.to_owned());
    members.into_iter().find(belongs).map(ActorRef::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_gives_its_serial_back() {
        let label = label("spiffe://stagedoor.local/node/node-1", 17);
        assert_eq!(label, "spiffe://stagedoor.local/node/node-1#17");
        assert_eq!(serial_of(&label), Some(17));
        assert_eq!(serial_of("127.0.0.1:80"), None);
    }

    #[tokio::test]
    async fn a_cookie_is_read_without_its_line_end_and_never_too_short() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cookie");
        assert!(matches!(Cookie::read(&path).await, Err(Error::Cookie { .. })));
        std::fs::write(&path, "0123456789abcde\n").unwrap();
        assert!(matches!(Cookie::read(&path).await, Err(Error::CookieShort { .. })));
        std::fs::write(&path, "0123456789abcdef\n").unwrap();
        assert_eq!(Cookie::read(&path).await.unwrap_or_else(|_| panic!()).0, "0123456789abcdef");
    }

    #[test]
    fn two_runs_differ() {
        assert_ne!(instance(Incarnation(1)), instance(Incarnation(1)));
    }
}
