//! The gRPC services: parse, call a handle, answer. Nothing is decided here.

pub(crate) mod agent;
mod cluster;
mod guard;
mod registry;
mod serve;
pub(crate) mod work;

use domain::{AgentId, Position};
use proto::status::POSITION;
use tonic::{Extensions, Request, Response};

pub(crate) use serve::{Services, serve};

/// The span of one submit, a child of the caller's.
pub(crate) fn submit_span(agent: &AgentId, parent: Option<&str>) -> tracing::Span {
    let span = tracing::info_span!("submit", %agent);
    telemetry::set_parent(&span, parent);
    span
}

/// The `traceparent` of a request.
fn parent<T>(request: &Request<T>) -> Option<String> {
    proto::trace::extract(request.metadata()).map(str::to_owned)
}

/// Who calls, as the audit names it: the SPIFFE id of the certificate.
fn caller<T>(request: &Request<T>) -> String {
    let peer = request.extensions().get::<net::grpc::PeerInfo>();
    peer.map(|peer| peer.id.to_string()).unwrap_or_default()
}

/// As the messages of a stream carry a position.
pub(crate) fn text(position: Option<Position>) -> String {
    position.map(|position| position.to_string()).unwrap_or_default()
}

fn positioned<T>(message: T, position: Position) -> Response<T> {
    let mut metadata = tonic::metadata::MetadataMap::new();
    if let Ok(text) = position.to_string().parse() {
        metadata.insert(POSITION, text);
    }
    Response::from_parts(metadata, message, Extensions::new())
}

#[cfg(test)]
mod tests {
    use domain::{Epoch, Lsn};

    use super::*;

    #[test]
    fn an_answer_tells_its_position() {
        let response = positioned((), Position { epoch: Epoch(3), lsn: Lsn(17) });
        assert_eq!(response.metadata().get(POSITION).unwrap(), "3.17");
    }
}
