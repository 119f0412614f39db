//! One server: sends requests to its databases, and says what an answer, or its absence, means for what was asked.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode};
use net::WebDialer;
use tokio::time::Instant;

use super::http::{Http, NoReply, Reply};
use super::target::{Parsed, Place, Target};
use super::together::ReadStreams;
use super::token::Token;
use super::wire::{self, Answer, Problem};
use crate::database::Database;
use crate::{Config, Error};

/// What the server says of a fault, for people: its beginning.
const TEXT_MAX: usize = 300;

pub(super) struct Server {
    http: Http,
    admin: Option<Http>,
    parsed: Parsed,
    token: Option<Arc<Token>>,
    admin_token: Option<Arc<Token>>,
    read_streams: ReadStreams,
}

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Failed {
    /// Certainly not done, and not before somebody acts, or the caller waits.
    Refused(Error),
    /// Certainly not done; may go well at the next try.
    Busy(String),
    /// Certainly not done: the stream that it named is gone.
    Stream(String),
    /// Certainly not done: what was asked for is more than the server answers at once.
    TooLarge,
    /// Nobody knows.
    Lost(String),
}

impl Failed {
    /// What the server's refusal of a statement means, while nothing was committed.
    pub(super) fn of(name: &str, problem: &Problem<'_>) -> Self {
        let what = name.to_owned();
        let message = short(&problem.message);
        match problem.code() {
            "SQLITE_BUSY" | "SQLITE_LOCKED" | "TRANSACTION_TIMEOUT" | "TRANSACTION_BUSY" => {
                Self::Busy(message)
            }
            "STREAM_EXPIRED" => Self::Stream(message),
            "RESPONSE_TOO_LARGE" => Self::TooLarge,
            "SQLITE_FULL" => Self::Refused(Error::Full { what }),
            "SQLITE_CORRUPT" | "SQLITE_NOTADB" => Self::Refused(Error::Corrupt { what }),
            code if code.contains("BLOCKED") => {
                Self::Refused(Error::unavailable(format!("{what}: {message}")))
            }
            code => Self::Refused(Error::internal(what, format!("{message} ({code})"))),
        }
    }
}

impl Server {
    /// Reads the tokens.
    pub(super) fn new(config: &Config, parsed: Parsed) -> Result<Self, Error> {
        let timeout = Duration::from_millis(config.connect_timeout_ms);
        let http = |target: &Target| -> Result<Http, Error> {
            let dialer = match target.is_tls {
                true => WebDialer::tls(config.ca_file.as_deref(), timeout)?,
                false => WebDialer::plaintext(timeout),
            };
            Ok(Http::new(dialer, config.connections_max))
        };
        let load = |path: &Option<std::path::PathBuf>, scheme| {
            path.as_ref().map(|path| Token::load(path, scheme)).transpose()
        };
        Ok(Self {
            http: http(&parsed.target)?,
            admin: parsed.admin.as_ref().map(http).transpose()?,
            parsed,
            token: load(&config.token_file, "Bearer")?,
            admin_token: load(&config.admin_token_file, "basic")?,
            read_streams: ReadStreams::default(),
        })
    }

    pub(super) fn read_streams(&self) -> &ReadStreams {
        &self.read_streams
    }

    pub(super) fn parsed(&self) -> &Parsed {
        &self.parsed
    }

    /// Sends one batch to a database.
    pub(super) async fn batch(
        &self,
        database: Database,
        body: String,
        deadline: Instant,
    ) -> Result<Answer, Failed> {
        let namespace = self.parsed.namespace(database);
        let place = self.parsed.target.place(&namespace);
        let body = Bytes::from(body);
        let token = self.token.as_ref();
        let reply =
            send(&self.http, &place, Method::POST, "/v3/pipeline", body, token, deadline).await?;
        if reply.status == StatusCode::OK {
            return match wire::read(&reply.body) {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(problem)) => Err(of_batch(&database.to_string(), &problem)),
                Err(error) => Err(Failed::Lost(error.to_string())),
            };
        }
        Err(self.refusal(&namespace, &reply))
    }

    /// What an answer means that is no result.
    fn refusal(&self, namespace: &str, reply: &Reply) -> Failed {
        let text = short(&String::from_utf8_lossy(&reply.body));
        let status = reply.status.as_u16();
        let file = || match &self.token {
            Some(token) => format!("the token in {}", token.path().display()),
            None => "a request without a token; set token_file".to_owned(),
        };
        match status {
            400 if text.contains("STREAM_EXPIRED") || text.contains("baton") => {
                Failed::Stream(text)
            }
            401 => Failed::Refused(Error::Denied {
                what: format!("the server did not take {} (expired, or of another key)", file()),
            }),
            403 => Failed::Refused(Error::Denied {
                what: format!("the server does not let {} use namespace {namespace}", file()),
            }),
            404 => Failed::Refused(Error::NotFound { what: self.missing(namespace) }),
            413 => Failed::Refused(Error::invalid("the server does not take requests this large")),
            429 => Failed::Busy(format!("the server has too much to do: {text}")),
            500.. => Failed::Lost(format!("the server answered {status}: {text}")),
            _ => Failed::Refused(Error::internal(
                "the server",
                format!("it answered {status}: {text}"),
            )),
        }
    }

    fn missing(&self, namespace: &str) -> String {
        let remedy = match (&self.parsed.admin, &self.token) {
            (Some(_), Some(_)) => "or is not open to the token",
            (Some(_), None) => "yet",
            (None, _) => "(make it beforehand, or set admin_url, and check what the token is for)",
        };
        format!("namespace {namespace} {remedy}")
    }

    /// Makes the namespace of a database, flushing every commit. Done already is as good.
    pub(super) async fn create(&self, database: Database, deadline: Instant) -> Result<(), Error> {
        let namespace = self.parsed.namespace(database);
        let (Some(target), Some(admin)) = (&self.parsed.admin, &self.admin) else {
            return Err(Error::NotFound { what: self.missing(&namespace) });
        };
        let path = format!("/v1/namespaces/{namespace}/create");
        let body = Bytes::from_static(br#"{"durability_mode":"strong","txn_timeout_s":5}"#);
        let token = self.admin_token.as_ref();
        let place = target.itself();
        let sent = send(admin, &place, Method::POST, &path, body, token, deadline).await;
        let reply = sent.map_err(Failed::into_read_error)?;
        let text = short(&String::from_utf8_lossy(&reply.body));
        match reply.status.as_u16() {
            200..300 => {
                tracing::info!(namespace, "made a namespace");
                Ok(())
            }
            _ if text.contains("already exists") => Ok(()),
            401 | 403 => {
                let what = "the admin API did not take the token of admin_token_file";
                Err(Error::Denied { what: what.to_owned() })
            }
            status @ (429 | 500..) => Err(Error::unavailable(format!(
                "the admin API answered {status} for namespace {namespace}: {text}"
            ))),
            status => Err(Error::internal(
                "the admin API",
                format!("it answered {status} for namespace {namespace}: {text}"),
            )),
        }
    }

    /// The server does not flush what it commits.
    pub(super) fn not_durable(&self, database: Database) -> Error {
        let namespace = self.parsed.namespace(database);
        let what = format!(
            "namespace {namespace} does not flush its commits; set it with the server's admin API: \
             POST /v1/namespaces/{namespace}/config with \"durability_mode\":\"strong\" and all other fields as they \
             are, or vouch for the server with durability = \"trusted\""
        );
        Error::NotDurable { what }
    }

    /// What the server says that it is.
    pub(super) async fn version(&self, deadline: Instant) -> String {
        let place = self.parsed.target.place(&self.parsed.namespace(Database::Control));
        let token = self.token.as_ref();
        let sent =
            send(&self.http, &place, Method::GET, "/version", Bytes::new(), token, deadline).await;
        match sent {
            Ok(reply) if reply.status == StatusCode::OK => {
                let text = String::from_utf8_lossy(&reply.body);
                let words: Vec<_> = text.split_whitespace().take(2).collect();
                short(&words.join(" "))
            }
            // Not every server says it.
            Ok(_) | Err(_) => "Hrana server".to_owned(),
        }
    }
}

/// Sends a request, and once more with a new token if the file has one.
async fn send(
    http: &Http,
    place: &Place,
    method: Method,
    path: &str,
    body: Bytes,
    token: Option<&Arc<Token>>,
    deadline: Instant,
) -> Result<Reply, Failed> {
    loop {
        let header = token.map(|token| token.header());
        let request = request(place, &method, path, body.clone(), header.as_ref());
        let request =
            request.map_err(|error| Failed::Refused(Error::internal("a request", error)))?;
        let reply = http.send(place, request, deadline).await.map_err(|none| match none {
            NoReply::NotSent(error) => Failed::Refused(error),
            NoReply::Lost(what) => Failed::Lost(what),
        })?;
        let refused = token.zip(header).filter(|_| reply.status == StatusCode::UNAUTHORIZED);
        let Some((token, header)) = refused else { return Ok(reply) };
        // Tokens expire; whoever renews them writes the file.
        if !token.renew(&header).await.map_err(Failed::Refused)? {
            return Ok(reply);
        }
        tracing::info!(file = %token.path().display(), "read a new token");
    }
}

impl Failed {
    /// What it means where nothing was to be changed.
    pub(super) fn into_read_error(self) -> Error {
        match self {
            Self::Refused(error) => error,
            Self::Busy(why) | Self::Stream(why) | Self::Lost(why) => Error::unavailable(why),
            Self::TooLarge => Error::internal("a read", "one row is more than the server answers"),
        }
    }

    /// What it means for a write that is not tried again.
    pub(super) fn into_write_error(self) -> Error {
        match self {
            Self::Lost(what) => Error::unknown(what),
            Self::Refused(_) | Self::Busy(_) | Self::Stream(_) | Self::TooLarge => {
                self.into_read_error()
            }
        }
    }
}

/// The server refused the whole batch. Unless it says why, some of it may have run.
fn of_batch(name: &str, problem: &Problem<'_>) -> Failed {
    let failed = Failed::of(name, problem);
    if let Failed::Refused(Error::Internal { detail, .. }) = failed {
        return Failed::Lost(detail);
    }
    failed
}

fn request(
    place: &Place,
    method: &Method,
    path: &str,
    body: Bytes,
    token: Option<&HeaderValue>,
) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
    let mut request = Request::builder().method(method).uri(path).header(HOST, &place.authority);
    if let Some(namespace) = &place.namespace {
        request = request.header("x-namespace", namespace);
    }
    if let Some(token) = token {
        request = request.header(AUTHORIZATION, token);
    }
    request.header(CONTENT_TYPE, "application/json").body(Full::new(body))
}

fn short(text: &str) -> String {
    text.trim().chars().take(TEXT_MAX).collect()
}
