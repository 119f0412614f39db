//! Lets peers in that have a certificate of ours, one task each until their name is checked.

use ractor::ActorRef;
use tokio::task::JoinSet;

use crate::hub::Hub;
use crate::link::Arrival;
use crate::links::LinksMessage;
use crate::name::{self, Refused};
use crate::{Peer, metrics};

/// Peers whose first message is awaited. They are members of the cluster, so this is not a defence.
const CHECKS_MAX: usize = 1_024;

/// Runs until the listener ends or the task is dropped.
pub(crate) async fn run(
    mut listener: net::Listener,
    hub: std::sync::Arc<Hub>,
    links: ActorRef<LinksMessage>,
) {
    let mut checks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if checks.len() < CHECKS_MAX => match accepted {
                Ok(accepted) => {
                    checks.spawn(check(accepted, hub.me.clone(), links.clone()));
                }
                Err(error) => {
                    tracing::error!(%error, "the cluster listener has ended");
                    return;
                }
            },
            Some(_) = checks.join_next() => {}
        }
    }
}

async fn check(accepted: net::Accepted, me: Peer, links: ActorRef<LinksMessage>) {
    let net::Accepted { stream, peer: id, addr } = accepted;
    let (peer, mut stream) = (Peer::from(&id), Box::new(stream));
    if peer == me {
        return metrics::refused("own_name", addr, id, "it has our own name");
    }
    match name::check(&mut stream, &peer).await {
        Ok(first) => {
            let arrival = Arrival { peer, subject: id.to_string(), address: addr, first, stream };
            _ = links.cast(LinksMessage::Arrived(Box::new(arrival)));
        }
        // Somebody asked only whether the port is open, or dialled another way meanwhile.
        Err(Refused::Left) => tracing::debug!(%addr, %id, "a peer left before it said its name"),
        Err(refused) => metrics::refused(refused.as_str(), addr, id, &refused),
    }
}
