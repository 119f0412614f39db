//! The gRPC server over our own listener.

use std::time::Duration;

use domain::view::View;
use net::Listener;
use net::grpc::incoming;
use proto::v1::agent_service_server::AgentServiceServer;
use proto::v1::cluster_service_server::ClusterServiceServer;
use proto::v1::registry_service_server::RegistryServiceServer;
use proto::v1::work_service_server::WorkServiceServer;
use std::sync::Arc;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tonic::{Code, Status};
use tonic_health::ServingStatus;
use tower::util::MapResponseLayer;

use super::agent::Agents;
use super::cluster::Cluster;
use super::guard::guard;
use super::registry::Registry;
use super::work::Works;
use crate::Error;
use crate::config::Limits;
use crate::desk::Desk;
use crate::refusal;

/// What is told of in reflection, and of whose health.
const SERVICES: [&str; 4] = [
    "stagedoor.v1.WorkService",
    "stagedoor.v1.AgentService",
    "stagedoor.v1.RegistryService",
    "stagedoor.v1.ClusterService",
];
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// What the services stand on.
pub(crate) struct Services {
    pub(crate) desk: Desk,
    pub(crate) scheduler: scheduler::Handle,
    /// Where the store is, for people.
    pub(crate) store_url: String,
}

/// Serves until the desk is stopped, and then until every call is answered.
pub(crate) async fn serve(
    services: Services,
    listener: Listener,
    limits: &Limits,
) -> Result<(), Error> {
    let Services { desk, scheduler, store_url } = services;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS);
    let reflection =
        SERVICES.into_iter().fold(reflection, |builder, name| builder.with_service_name(name));
    let reflection = reflection.build_v1().map_err(Error::Reflection)?;
    let (reporter, health) = tonic_health::server::health_reporter();
    tokio::spawn(report(scheduler.views(), reporter));
    let bytes = limits.message_bytes_max;
    let stop = desk.stop.clone();
    let agents = Agents { desk: desk.clone(), scheduler: scheduler.clone() };
    let cluster = Cluster { desk: desk.clone(), scheduler: scheduler.clone(), store_url };
    let router = Server::builder()
        .max_concurrent_streams(limits.streams_max)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .layer(InterceptorLayer::new(guard))
        .layer(MapResponseLayer::new(with_details))
        .add_service(WorkServiceServer::new(Works { desk }).max_decoding_message_size(bytes))
        .add_service(AgentServiceServer::new(agents).max_decoding_message_size(bytes))
        .add_service(
            RegistryServiceServer::new(Registry { scheduler }).max_decoding_message_size(bytes),
        )
        .add_service(ClusterServiceServer::new(cluster).max_decoding_message_size(bytes))
        .add_service(health)
        .add_service(reflection);
    let serving = router.serve_with_incoming_shutdown(incoming(listener), stop.cancelled_owned());
    serving.await.map_err(Error::Serve)
}

/// What tonic answers to a message over the limit, or to one that is none, has no details; what we answer has.
fn with_details(response: http::Response<Body>) -> http::Response<Body> {
    let headers = response.headers();
    let code = headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
    if headers.contains_key("grpc-status-details-bin") {
        return response;
    }
    match (code, Status::from_header_map(headers)) {
        (Some(Code::OutOfRange | Code::Internal), Some(status)) => {
            refusal::unread(status).into_http()
        }
        (Some(_) | None, _) => response,
    }
}

/// The services are healthy while there is a view: without one no call finds an owner.
async fn report(
    mut views: watch::Receiver<Option<Arc<View>>>,
    reporter: tonic_health::server::HealthReporter,
) {
    loop {
        let has_view = views.borrow_and_update().is_some();
        let status = if has_view { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in SERVICES.into_iter().chain([""]) {
            reporter.set_service_status(name, status).await;
        }
        // A view is never taken back.
        if has_view || views.changed().await.is_err() {
            return;
        }
    }
}
