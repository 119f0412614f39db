//! The gRPC services: parse, call a handle, answer. Nothing is decided here.

mod agent;
mod cluster;
mod guard;
mod registry;
mod serve;
pub(crate) mod work;

use domain::AgentId;
use tonic::{Extensions, Request, Response};

pub(crate) use serve::{Services, serve};

use crate::desk::Position;

/// The place in the log that an answer shows, as metadata: `<epoch>.<lsn>`.
const POSITION: &str = "stagedoor-position";

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

fn positioned<T>(message: T, position: Position) -> Response<T> {
    let mut metadata = tonic::metadata::MetadataMap::new();
    if let Ok(text) = format!("{}.{}", position.epoch, position.lsn).parse() {
        metadata.insert(POSITION, text);
    }
    Response::from_parts(metadata, message, Extensions::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_tells_its_position() {
        let response = positioned((), Position { epoch: 3, lsn: 17 });
        assert_eq!(response.metadata().get(POSITION).unwrap(), "3.17");
    }
}
