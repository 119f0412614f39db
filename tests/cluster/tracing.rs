//! One trace from the client's call to the last phase, across processes.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::tracing::Instrument;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use proto::v1::open_response::Response;
use proto::v1::{OpenWatch, SubmitRequest};
use tests::harness::{Dev, Options, PATIENCE, eventually};
use tokio::runtime::Runtime;

use crate::offers::await_waiting;
use crate::{PHASES, PROGRAM, list, text};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A span, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    /// `service.instance.id`: which process.
    process: String,
    name: String,
    id: Vec<u8>,
    parent: Vec<u8>,
}

#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Spans>>);

#[derive(Clone, Default)]
struct Spans {
    /// Of the trace that the test began.
    ours: BTreeSet<Seen>,
    /// Names of those that the processes began by themselves.
    others: BTreeSet<String>,
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|it| it.attributes).unwrap_or_default();
            let process = instance(&attributes);
            let mut seen = self.0.lock().unwrap();
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                if hex(&span.trace_id) != TRACE {
                    seen.others.insert(span.name);
                    continue;
                }
                let (process, name) = (process.clone(), span.name);
                seen.ours.insert(Seen {
                    process,
                    name,
                    id: span.span_id,
                    parent: span.parent_span_id,
                });
            }
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Receiver {
    fn seen(&self) -> Spans {
        self.0.lock().unwrap().clone()
    }

    /// Starts to listen; ends with the runtime.
    fn serve(&self, runtime: &Runtime) -> SocketAddr {
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let service = TraceServiceServer::new(self.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        runtime.spawn(server.serve_with_incoming(incoming));
        address
    }
}

fn instance(attributes: &[KeyValue]) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == "service.instance.id");
    match found.and_then(|attribute| attribute.value.clone()?.value) {
        Some(Value::StringValue(text)) => text,
        other => panic!("a span without a process: {other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn one_trace_spans_client_control_nodes_and_phases() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let receiver = Receiver::default();
    let endpoint = format!("http://{}", receiver.serve(&runtime));
    let env = ["STORE", "CONTROL", "NODE"]
        .map(|role| (format!("STAGEDOOR_{role}__TELEMETRY__OTLP_ENDPOINT"), endpoint.clone()));
    let dev = Dev::start_with(PROGRAM, &Options { env: env.to_vec(), ..Options::default() });

    // This process is the client: it has spans of its own below what a caller of it began.
    let config = telemetry::Config {
        otlp_endpoint: Some(endpoint),
        log_filter: "off".to_owned(),
        ..telemetry::Config::default()
    };
    let service = telemetry::Service { role: "client".to_owned(), name: "test".to_owned() };
    let guard = telemetry::init(&config, &service).unwrap();
    let span = ::tracing::info_span!("caller");
    telemetry::set_parent(&span, Some(PARENT));
    let request = |key: &str| SubmitRequest {
        agent: format!("default/postchain/{key}"),
        input: "A lamp stands here. Why is it lit?".to_owned(),
        ..SubmitRequest::default()
    };
    // One by a call, one on a stream.
    let client = dev.client();
    let works = runtime.block_on(
        async {
            let work = client.submit(request("called")).await.unwrap();
            let mut open = client.open();
            open.sender().submit(1, request("streamed"), OpenWatch::None).await.unwrap();
            let answer = open.next().await.unwrap().unwrap().response;
            let Some(Response::Accepted(accepted)) = answer else { panic!("{answer:?}") };
            [work.id, accepted.id]
        }
        .instrument(span),
    );
    let mut nodes = BTreeSet::new();
    for id in &works {
        dev.run(&["work", "watch", id]).documents();
        let work = dev.run(&["work", "get", id]).document();
        let steps = list(&work["steps"]).iter();
        nodes.extend(steps.map(|step| step["node"].as_str().unwrap().to_owned()));
    }
    guard.shutdown();

    let seen = eventually(PATIENCE, "every span has arrived", || {
        let Spans { ours, others } = receiver.seen();
        let mut missing = missing(&ours, &nodes);
        if !others.contains("place") {
            missing.push("place".to_owned());
        }
        if missing.is_empty() { Ok(ours) } else { Err(format!("{missing:?} missing in {ours:#?}")) }
    });
    // One tree: every span hangs on another one that was seen, but for the caller's, which hangs on the given one.
    let ids: BTreeSet<_> = seen.iter().map(|span| span.id.clone()).collect();
    for span in &seen {
        let is_root = hex(&span.parent) == "b7ad6b7169203331";
        assert!(is_root || ids.contains(&span.parent), "{span:?} hangs on nothing: {seen:#?}");
    }
    // Who takes over an open work says so, too.
    let definition = dev.scratch().join("image.toml");
    std::fs::write(&definition, "name = \"image\"\nmodality = \"image\"\n").unwrap();
    dev.run(&["apply", "-f", definition.to_str().unwrap()]).document();
    let submit =
        ["submit", "--agent", "image", "--key", "k", "--text", "A lamp.", "--timeout", "5m"];
    await_waiting(&dev, text(&dev.run(&submit).document()["id"]));
    let owner = dev.run(&["agents", "get", "default/image/k"]).document();
    dev.signal(owner["node"].as_str().unwrap(), rustix::process::Signal::KILL);
    eventually(PATIENCE, "an agent is recovered", || {
        let others = receiver.seen().others;
        if others.contains("recover") { Ok(()) } else { Err(format!("{others:?}")) }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
}

/// What has not arrived yet.
fn missing(seen: &BTreeSet<Seen>, nodes: &BTreeSet<String>) -> Vec<String> {
    let has = |process: &str, name: &str| {
        seen.iter().any(|span| span.process == process && span.name == name)
    };
    let mut missing = Vec::new();
    let ends =
        [("test", "caller"), ("test", "submit"), ("control-1", "submit"), ("control-1", "route")];
    for (process, name) in ends {
        if !has(process, name) {
            missing.push(format!("{name} of {process}"));
        }
    }
    missing.extend(nodes.iter().filter(|n| !has(n, "phase")).map(|n| format!("phase of {n}")));
    let begun = |span: &&Seen| span.process == "control-1" && span.name == "submit";
    if seen.iter().filter(begun).count() < 2 {
        missing.push("2 of submit of control-1".to_owned());
    }
    // An acceptance and six phases for each of two works.
    let (steps, commits) = (2 * PHASES.len(), 2 * (1 + PHASES.len()));
    for (name, least) in
        [("phase", steps), ("model", steps), ("commit", commits), ("turn", 2), ("route", 2)]
    {
        let count = seen.iter().filter(|span| span.name == name).count();
        if count < least {
            missing.push(format!("{} of {name}", least - count));
        }
    }
    missing
}
