//! Logs, traces and metrics of a process: set up once by `main`, carried across processes as a W3C `traceparent`.
//!
//! Never decides anything, never blocks the work that it watches (a full span queue drops spans) and never listens on
//! anything but loopback. Health and metrics work without [`init`].

pub mod admin;
mod export;
pub mod fault;
mod health;
pub mod metrics;
mod trace;

use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;

pub use health::Health;
pub use trace::{current_traceparent, set_parent};

/// What a process says about itself, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How a log line on standard error looks.
    pub log_format: LogFormat,
    /// Which events are logged: comma-separated `target=level`, the last matching one wins.
    pub log_filter: String,
    /// Where traces go, as OTLP over gRPC without TLS, for example `http://127.0.0.1:4317`. Without it no span is
    /// recorded.
    pub otlp_endpoint: Option<String>,
    /// Where health and metrics are served over plain HTTP; loopback only. Port 0 takes a free one.
    pub admin: SocketAddr,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            log_format: LogFormat::Text,
            // The transports below us tell every frame at `info` or `debug`, and the actor library warns of every link that
            // ends, which our own log says better.
            log_filter:
                "info,hyper=warn,h2=warn,tower=warn,tonic=warn,ractor=error,ractor_cluster=error"
                    .to_owned(),
            otlp_endpoint: None,
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// Who speaks: `role` becomes `service.name = "stagedoor-<role>"`, `name` becomes `service.instance.id`.
#[derive(Clone, Debug)]
pub struct Service {
    pub role: String,
    pub name: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("telemetry is set up already; init it once in a process")]
    InitTwice,
    #[error("log filter {filter:?} is not valid; write it like \"info,cluster=debug\"")]
    LogFilter { filter: String, source: tracing_subscriber::filter::ParseError },
    #[error(
        "cannot export traces to {endpoint:?}; otlp_endpoint is a plain http address like \"http://127.0.0.1:4317\""
    )]
    Endpoint { endpoint: String, source: opentelemetry_otlp::ExporterBuildError },
    #[error("cannot start the thread that exports traces")]
    ExportThread(#[source] std::io::Error),
    #[error(
        "admin address {addr} is not loopback; it serves without TLS, so use 127.0.0.1 or [::1]"
    )]
    AdminNotLoopback { addr: SocketAddr },
    #[error("cannot listen on admin address {addr}; choose another port, or 0 for a free one")]
    AdminListen { addr: SocketAddr, source: std::io::Error },
}

impl Error {
    pub fn kind(&self) -> domain::ErrorKind {
        match self {
            Self::InitTwice => domain::ErrorKind::Conflict,
            Self::LogFilter { .. } | Self::Endpoint { .. } | Self::AdminNotLoopback { .. } => {
                domain::ErrorKind::Invalid
            }
            Self::AdminListen { .. } => domain::ErrorKind::Unavailable,
            Self::ExportThread(_) => domain::ErrorKind::Internal,
        }
    }
}

/// Sends what is still queued when the process ends. `main` holds it.
#[must_use = "dropping the guard ends the export of traces"]
#[derive(Debug)]
pub struct Guard {
    exporter: Option<export::Exporter>,
}

impl Guard {
    /// Sends the spans that are still queued, for at most two seconds, and blocks meanwhile: call it last. A drop does
    /// the same.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(exporter) = self.exporter.take() {
            trace::disable();
            exporter.shutdown();
        }
    }
}

/// Sets up logs on standard error and, with an endpoint, the export of traces. Works in and outside a tokio runtime:
/// the exporter has a thread of its own, so that a stalled program still tells what it did.
pub fn init(config: &Config, service: &Service) -> Result<Guard, Error> {
    fault::named(&service.name);
    let filter = EnvFilter::builder()
        .parse(&config.log_filter)
        .map_err(|source| Error::LogFilter { filter: config.log_filter.clone(), source })?;
    let exporter = match &config.otlp_endpoint {
        Some(endpoint) => Some(export::Exporter::start(endpoint, service)?),
        None => None,
    };
    let traced = exporter.is_some();
    let subscriber = Registry::default()
        .with(exporter.as_ref().map(export::Exporter::layer))
        .with(log_layer(config.log_format).with_filter(filter));
    match tracing::subscriber::set_global_default(subscriber) {
        Ok(()) if traced => trace::enable(),
        Ok(()) => {}
        Err(_) => {
            if let Some(exporter) = exporter {
                exporter.shutdown();
            }
            return Err(Error::InitTwice);
        }
    }
    Ok(Guard { exporter })
}

fn log_layer<S>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    let layer = fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => layer.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_span_list(false).boxed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_config_key_is_refused_by_name() {
        let error = toml::from_str::<Config>("log_fromat = \"json\"").unwrap_err();
        assert!(error.to_string().contains("log_fromat"), "{error}");
    }

    #[test]
    fn a_config_sets_only_what_differs() {
        let config: Config = toml::from_str("log_format = \"json\"").unwrap();
        assert_eq!(config, Config { log_format: LogFormat::Json, ..Config::default() });
    }

    #[test]
    fn a_written_config_is_read_back() {
        let config =
            Config { otlp_endpoint: Some("http://127.0.0.1:4317".to_owned()), ..Config::default() };
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
    }

    #[test]
    fn a_wrong_filter_or_endpoint_is_an_error_that_names_it() {
        let service = Service { role: "node".to_owned(), name: "node-1".to_owned() };
        let check = |config: Config, named: &str| {
            let error = init(&config, &service).unwrap_err();
            assert_eq!(error.kind(), domain::ErrorKind::Invalid);
            assert!(error.to_string().contains(named), "{error}");
        };
        let default = Config::default;
        check(Config { log_filter: "info,x=loud".to_owned(), ..default() }, "x=loud");
        check(Config { otlp_endpoint: Some("not an address".to_owned()), ..default() }, "not an");
        check(Config { otlp_endpoint: Some("https://a:1".to_owned()), ..default() }, "https://a:1");
    }
}
