//! Sends spans to an OTLP collector from threads of its own.
//!
//! Never makes the program wait: a span that finds the queue full is dropped, and the log says so.

use std::thread::JoinHandle;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider,
};
use tokio::sync::oneshot;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::registry::LookupSpan;

use crate::{Error, Service};

/// Some 8 MiB of waiting spans.
const QUEUE_SPANS_MAX: usize = 8_192;
const BATCH_SPANS_MAX: usize = 512;
const BATCH_DELAY: Duration = Duration::from_millis(500);
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) struct Exporter {
    provider: SdkTracerProvider,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Exporter {
    pub(crate) fn start(endpoint: &str, service: &Service) -> Result<Self, Error> {
        // The channel's tasks need a runtime that still turns while the program's own is blocked by the last flush.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::ExportThread)?;
        let exporter = {
            let _entered = runtime.enter();
            SpanExporter::builder()
                .with_tonic()
                .with_endpoint(endpoint)
                .with_timeout(EXPORT_TIMEOUT)
                .build()
                .map_err(|source| Error::Endpoint { endpoint: endpoint.to_owned(), source })
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("otlp".to_owned())
            .spawn(move || {
                let _ = runtime.block_on(stopped);
                // A name look-up that hangs must not hold up the end of the process.
                runtime.shutdown_background();
            })
            .map_err(Error::ExportThread)?;
        let provider = provider(exporter?, service);
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        Ok(Self { provider, stop, thread })
    }

    /// Turns tracing's spans into exported ones. Transports are left out: a span for each frame would drown the
    /// work's own, and exporting the exporter's would never end.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    {
        const SILENT: [&str; 7] =
            ["h2", "hyper", "opentelemetry", "ractor", "rustls", "tonic", "tower"];
        let targets = Targets::new()
            .with_default(LevelFilter::INFO)
            .with_targets(SILENT.map(|target| (target, LevelFilter::OFF)));
        let tracer: SdkTracer = self.provider.tracer("stagedoor");
        OpenTelemetryLayer::new(tracer)
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(targets)
    }

    pub(crate) fn shutdown(self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(%error, "the last spans were not exported");
        }
        drop(self.stop);
        let _ = self.thread.join();
    }
}

fn provider(exporter: SpanExporter, service: &Service) -> SdkTracerProvider {
    let batches = BatchConfigBuilder::default()
        .with_max_queue_size(QUEUE_SPANS_MAX)
        .with_max_export_batch_size(BATCH_SPANS_MAX)
        .with_scheduled_delay(BATCH_DELAY)
        .build();
    let resource = Resource::builder_empty()
        .with_attributes([
            KeyValue::new("service.name", format!("stagedoor-{}", service.role)),
            KeyValue::new("service.instance.id", service.name.clone()),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        ])
        .build();
    SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
        .with_resource(resource)
        .with_span_processor(
            BatchSpanProcessor::builder(exporter).with_batch_config(batches).build(),
        )
        .build()
}
