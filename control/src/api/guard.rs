//! Who may call the API: clients. Other roles are let through TLS, so that they are told why they are refused.

use std::sync::LazyLock;

use domain::{ErrorKind, Reason, Role};
use net::grpc::PeerInfo;
use proto::status::Failure;
use telemetry::metrics::{IntCounterVec, counter_vec};
use tonic::{Request, Status};

static REFUSED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counter_vec(
        "stagedoor_control_api_refused_total",
        "Calls by certificates that may not call.",
        &["role"],
    )
});

/// Refuses whoever is no client, before the request is read.
pub(crate) fn guard(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = request.extensions().get::<PeerInfo>();
    match check(peer.map(|peer| peer.id.role)) {
        Ok(()) => Ok(request),
        Err(failure) => {
            let role = peer.map_or("none", |peer| peer.id.role.as_str());
            REFUSED.with_label_values(&[role]).inc();
            if let Some(PeerInfo { id, addr }) = peer {
                tracing::warn!(%addr, subject = %id, "refused a call of the API: no client certificate");
            }
            Err(failure.into())
        }
    }
}

fn check(role: Option<Role>) -> Result<(), Failure> {
    let who = match role {
        Some(Role::Client) => return Ok(()),
        Some(role @ (Role::Store | Role::Control | Role::Node)) => format!("a {role} certificate"),
        None => "a connection without a certificate".to_owned(),
    };
    let text = format!(
        "{who} may not call the API; use one that `stagedoor pki issue` made for client/<name>"
    );
    Err(Failure::new(ErrorKind::Denied, Reason::NotAuthorised, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_clients_may_call_and_others_are_told_why() {
        assert!(check(Some(Role::Client)).is_ok());
        for role in [Role::Store, Role::Control, Role::Node] {
            let failure = check(Some(role)).unwrap_err();
            assert_eq!((failure.kind, failure.reason), (ErrorKind::Denied, Reason::NotAuthorised));
            assert!(failure.message.contains(role.as_str()), "{}", failure.message);
        }
        assert!(guard(Request::new(())).is_err());
    }
}
