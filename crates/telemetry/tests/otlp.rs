//! Traces leave the process as OTLP and stay one trace across processes. One test: the subscriber is process-wide.

use std::net::SocketAddr;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use tokio::sync::mpsc;

const REMOTE_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const REMOTE_SPAN: &str = "b7ad6b7169203331";

struct Receiver(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0
            .send(request.into_inner())
            .await
            .map_err(|_| tonic::Status::cancelled("test ended"))?;
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn receive() -> (SocketAddr, mpsc::Receiver<ExportTraceServiceRequest>) {
    let (sender, receiver) = mpsc::channel(16);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("a bound address");
    let server =
        tonic::transport::Server::builder().add_service(TraceServiceServer::new(Receiver(sender)));
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(server.serve_with_incoming(incoming));
    (addr, receiver)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_span_is_exported_as_the_child_of_its_remote_parent() {
    let (addr, mut received) = receive().await;
    let config = telemetry::Config {
        otlp_endpoint: Some(format!("http://{addr}")),
        log_filter: "off".to_owned(),
        ..telemetry::Config::default()
    };
    let service = telemetry::Service { role: "node".to_owned(), name: "node-1".to_owned() };
    let guard = telemetry::init(&config, &service).unwrap();
    let again = telemetry::init(&config, &service).unwrap_err();
    assert_eq!(again.kind(), domain::ErrorKind::Conflict);
    assert_eq!(telemetry::current_traceparent(), None, "there is no span here");

    let turn = tracing::info_span!("turn", work = "w-1");
    telemetry::set_parent(&turn, Some(&format!("00-{REMOTE_TRACE}-{REMOTE_SPAN}-01")));
    let carried = turn.in_scope(telemetry::current_traceparent).unwrap();
    assert!(carried.starts_with(&format!("00-{REMOTE_TRACE}-")), "{carried}");
    // The other side of a message: it has only the text.
    let phase = tracing::info_span!(parent: None, "phase");
    telemetry::set_parent(&phase, Some(&carried));
    phase.in_scope(|| ());
    let unrelated = tracing::info_span!(parent: None, "place");
    telemetry::set_parent(&unrelated, Some("00-rubbish"));
    telemetry::set_parent(&unrelated, None);
    let own = unrelated.in_scope(telemetry::current_traceparent).unwrap();
    assert!(!own.contains(REMOTE_TRACE), "{own}");
    let unsampled = tracing::info_span!(parent: None, "unsampled");
    telemetry::set_parent(&unsampled, Some(&format!("00-{REMOTE_TRACE}-{REMOTE_SPAN}-00")));
    assert_eq!(unsampled.in_scope(telemetry::current_traceparent), None);
    drop((turn, phase, unrelated, unsampled));

    // The flush blocks this thread, on which the receiver lives: as in a program, it is the last act.
    tokio::task::spawn_blocking(|| guard.shutdown());
    let mut spans = Vec::new();
    while spans.len() < 3 {
        let request =
            tokio::time::timeout(Duration::from_secs(20), received.recv()).await.unwrap().unwrap();
        for resource in request.resource_spans {
            let attributes = resource.resource.unwrap().attributes;
            let attribute = |key: &str| {
                let found = attributes.iter().find(|attribute| attribute.key == key);
                found.and_then(|attribute| attribute.value.clone()?.value)
            };
            let text = |text: &str| Some(Value::StringValue(text.to_owned()));
            assert_eq!(attribute("service.name"), text("stagedoor-node"));
            assert_eq!(attribute("service.instance.id"), text("node-1"));
            spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
    }
    let span = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    assert_eq!(hex(&span("turn").trace_id), REMOTE_TRACE);
    assert_eq!(hex(&span("turn").parent_span_id), REMOTE_SPAN);
    assert_eq!(hex(&span("phase").trace_id), REMOTE_TRACE);
    assert_eq!(span("phase").parent_span_id, span("turn").span_id);
    assert_eq!(carried, format!("00-{REMOTE_TRACE}-{}-01", hex(&span("turn").span_id)));
    assert!(span("place").parent_span_id.is_empty());
    assert!(spans.iter().all(|span| span.name != "unsampled"));
}
