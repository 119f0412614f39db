//! The client against servers of its own API, over real TLS on loopback.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use domain::{ErrorKind, Role};
use net::pki::{Ca, Validity};
use net::{Identity, Listener, ListenerConfig, Protocol};
use proto::status::{Failure, POSITION};
use proto::v1::work_service_server::{WorkService, WorkServiceServer};
use proto::v1::{
    CancelRequest, CancelResponse, GetRequest, GetResponse, ListRequest, ListResponse, OpenRequest,
    OpenResponse, OpenWatch, Refused, SubmitRequest, SubmitResponse, WatchRequest, WatchResponse,
    Work, WorkEvent, WorkState, open_request, open_response, work_event,
};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use crate::{Client, Config, Error, Timeouts};

/// Credentials in a temporary folder, and the CA that they are from.
struct Fixture {
    ca: Ca,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        net::install_crypto_provider();
        let ca = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
        let fixture = Self { ca, dir: tempfile::tempdir().unwrap() };
        fixture.write_client(&fixture.ca, Validity::default());
        std::fs::write(fixture.path("ca.crt"), fixture.ca.certificate_pem()).unwrap();
        fixture
    }

    fn write_client(&self, ca: &Ca, validity: Validity) {
        let id = "spiffe://stagedoor.local/client/client-1".parse().unwrap();
        ca.issue(&id, validity).unwrap().write(self.dir.path(), "client").unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.dir.path()).join(name)
    }

    fn client(&self, servers: &[&Served]) -> Client {
        let api: Vec<String> = servers.iter().map(|server| server.address.clone()).collect();
        self.client_of(api)
    }

    fn client_of(&self, api: Vec<String>) -> Client {
        let timeouts = Timeouts {
            call: Duration::from_secs(20),
            unreached: Duration::from_millis(200),
            ..Timeouts::default()
        };
        let config = Config { api, credentials: self.dir.path().to_owned(), timeouts };
        Client::connect(&config).unwrap()
    }

    fn serve(&self, fake: &Arc<Fake>) -> Served {
        let id = "spiffe://stagedoor.local/control/control-1".parse().unwrap();
        let issued = self.ca.issue(&id, Validity::default()).unwrap();
        let identity =
            Identity::from_pem(&issued.certificate_pem, &issued.key_pem, self.ca.certificate_pem());
        Served::start(&identity.unwrap(), fake.clone())
    }
}

/// A server in a runtime of its own, so that it can die with all its connections.
struct Served {
    address: String,
    runtime: Option<Runtime>,
}

impl Served {
    fn start(identity: &Identity, fake: Arc<Fake>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let (ready, address) = std::sync::mpsc::channel();
        let identity = identity.clone();
        runtime.spawn(async move {
            let roles = [Role::Client];
            let config = ListenerConfig::default();
            let listener = Listener::bind(any, &identity, Protocol::Grpc, &roles, config);
            let listener = listener.await.unwrap();
            ready.send(listener.local_addr().to_string()).unwrap();
            tonic::transport::Server::builder()
                .add_service(WorkServiceServer::from_arc(fake))
                .serve_with_incoming(net::grpc::incoming(listener))
                .await
                .unwrap();
        });
        Self { address: address.recv().unwrap(), runtime: Some(runtime) }
    }

    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the servers of one test share.
#[derive(Default)]
struct Fake {
    /// Answers to submits before the good one.
    refusals: Arc<Mutex<Vec<Failure>>>,
    keys: Arc<Mutex<Vec<String>>>,
    cursors: Mutex<Vec<String>>,
    /// How many events a watch sends before it hangs.
    events: Mutex<usize>,
    /// What Get answers, in turn: a state, and where that stands.
    gets: Mutex<VecDeque<(WorkState, &'static str)>>,
    /// Whether Open answers submits, or only takes them.
    mute: Mutex<bool>,
}

const EVENTS: usize = 6;
/// A work that is watched.
const WORK: &str = "w-0-000-1";
/// A work whose result is its last event.
const ENDED: &str = "w-0-000-9";

fn event(number: usize) -> WorkEvent {
    let event = match number < EVENTS {
        true => work_event::Event::Phase(proto::v1::Step::default()),
        false => work_event::Event::Result(Work::default()),
    };
    let (work, cursor) = (WORK.to_owned(), number.to_string());
    WorkEvent { work, cursor, event: Some(event), ..WorkEvent::default() }
}

fn work(key: &str) -> Work {
    Work { id: format!("w-{key}"), ..Work::default() }
}

fn at<T>(position: &'static str, message: T) -> Response<T> {
    let mut response = Response::new(message);
    response.metadata_mut().insert(POSITION, position.parse().unwrap());
    response
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkService for Fake {
    async fn submit(
        &self,
        request: Request<SubmitRequest>,
    ) -> Result<Response<SubmitResponse>, Status> {
        let key = request.into_inner().idempotency_key;
        self.keys.lock().unwrap().push(key.clone());
        match self.refusals.lock().unwrap().pop() {
            Some(refusal) => Err(refusal.into()),
            None => Ok(at("2.7", SubmitResponse { work: Some(work(&key)) })),
        }
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let id = request.into_inner().id;
        let answer = self.gets.lock().unwrap().pop_front();
        if let Some((state, position)) = answer {
            let work = Work { id, state: state.into(), ..Work::default() };
            return Ok(at(position, GetResponse { work: Some(work) }));
        }
        if id == ENDED {
            let work = Work { id, state: WorkState::Succeeded.into(), ..Work::default() };
            return Ok(Response::new(GetResponse { work: Some(work) }));
        }
        Err(Failure::not_found(format!("no work {id}")).into())
    }

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        Ok(Response::new(ListResponse::default()))
    }

    type WatchStream = Answers<WatchResponse>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let cursor = request.into_inner().cursor;
        self.cursors.lock().unwrap().push(cursor.clone());
        let first = cursor.parse::<usize>().map_or(1, |seen| seen + 1);
        if EVENTS < first {
            return Ok(Response::new(Box::pin(tokio_stream::empty())));
        }
        let count = *self.events.lock().unwrap();
        let events = (first..=EVENTS).take(count);
        let events = tokio_stream::iter(events).map(|number| {
            Ok(WatchResponse { event: Some(event(number)), position: format!("2.{number}") })
        });
        Ok(Response::new(Box::pin(events.chain(tokio_stream::pending()))))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        Ok(Response::new(CancelResponse { work: Some(work(&request.into_inner().id)) }))
    }

    async fn signal(
        &self,
        _: Request<proto::v1::SignalRequest>,
    ) -> Result<Response<proto::v1::SignalResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    type OpenStream = Answers<OpenResponse>;

    async fn open(
        &self,
        request: Request<Streaming<OpenRequest>>,
    ) -> Result<Response<Self::OpenStream>, Status> {
        let (answers, stream) = mpsc::channel(16);
        let mute = *self.mute.lock().unwrap();
        let (refusals, keys) = (self.refusals.clone(), self.keys.clone());
        let mut requests = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(OpenRequest { tag, request: Some(request) })) =
                requests.message().await
            {
                let open_request::Request::Submit(submit) = request else { continue };
                let key = submit.submit.unwrap_or_default().idempotency_key;
                let refusal = refusals.lock().unwrap().pop();
                keys.lock().unwrap().push(key.clone());
                if let Some(refusal) = refusal {
                    let refused = Refused {
                        code: proto::status::code(refusal.kind).into(),
                        reason: refusal.reason.to_string(),
                        message: refusal.message,
                        ..Refused::default()
                    };
                    let response = Some(open_response::Response::Refused(refused));
                    let refused = OpenResponse { tag, response, ..OpenResponse::default() };
                    if answers.send(Ok(refused)).await.is_err() {
                        return;
                    }
                    continue;
                }
                let accepted = open_response::Response::Accepted(work(&key));
                let end = open_response::Response::Event(event(EVENTS));
                for response in [accepted, end] {
                    let position = "2.9".to_owned();
                    let response = OpenResponse { tag, response: Some(response), position };
                    if !mute && answers.send(Ok(response)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

fn unused_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[tokio::test]
async fn a_submit_is_repeated_under_one_key() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let later = Failure::new(ErrorKind::Unavailable, domain::Reason::Unowned, "no owner");
    *fake.refusals.lock().unwrap() = vec![later.clone(), later];
    let served = fixture.serve(&fake);
    let work = fixture.client(&[&served]).submit(SubmitRequest::default()).await.unwrap();
    let keys = fake.keys.lock().unwrap();
    assert_eq!(keys.len(), 3);
    assert!(keys.iter().all(|key| *key == keys[0] && work.id == format!("w-{key}")), "{keys:?}");
}

#[tokio::test]
async fn an_answer_older_than_what_was_shown_is_asked_for_again() {
    for (shown, newest) in [("get", "2.5"), ("submit", "2.7"), ("watch", "2.6"), ("open", "2.9")] {
        let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
        *fake.events.lock().unwrap() = EVENTS;
        let served = fixture.serve(&fake);
        let client = fixture.client(&[&served]);
        let answers = |answers: &[_]| fake.gets.lock().unwrap().extend(answers);
        match shown {
            "get" => {
                answers(&[(WorkState::Succeeded, newest)]);
                client.get(WORK).await.unwrap();
            }
            "submit" => {
                let idempotency_key = "0-000-1".to_owned();
                let request = SubmitRequest { idempotency_key, ..SubmitRequest::default() };
                assert_eq!(client.submit(request).await.unwrap().id, WORK);
            }
            "watch" => {
                let mut watch = client.watch(WORK, "");
                while watch.next().await.is_some() {}
            }
            _ => {
                let (sender, mut receiver) = client.open().split();
                sender.submit(1, SubmitRequest::default(), OpenWatch::End).await.unwrap();
                drop(sender);
                while receiver.next().await.is_some() {}
            }
        }
        let late = [(WorkState::Running, "1.99"), (WorkState::Running, "2.4")];
        answers(&late);
        answers(&[(WorkState::Succeeded, newest)]);
        let work = client.get(WORK).await.unwrap();
        assert_eq!(work.state(), WorkState::Succeeded, "after {shown}");
        assert!(fake.gets.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_refusal_is_passed_on_with_its_reason() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let served = fixture.serve(&fake);
    let error = fixture.client(&[&served]).get("w-0-000-1").await.unwrap_err();
    assert!(error.is_refusal() && error.kind() == ErrorKind::NotFound, "{error:?}");
    assert_eq!(error.to_string(), "no work w-0-000-1");
}

#[tokio::test]
async fn a_cluster_that_is_not_there_is_not_reached_and_its_addresses_are_named() {
    let fixture = Fixture::new();
    let addresses = vec![unused_address(), unused_address()];
    let began = Instant::now();
    let error = fixture.client_of(addresses.clone()).get("w-0-000-1").await.unwrap_err();
    assert!(matches!(error, Error::NotReached { .. }), "{error:?}");
    assert!(addresses.iter().all(|address| error.to_string().contains(address)), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10), "it waited for the whole deadline");
}

/// A server that was stopped takes connections and says nothing.
#[tokio::test]
async fn one_that_says_nothing_holds_nobody_up_who_can_have_the_next() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let stopped = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let served = fixture.serve(&fake);
    let api = vec![stopped.local_addr().unwrap().to_string(), served.address.clone()];
    let timeouts = Timeouts { connect: Duration::from_secs(600), ..Timeouts::default() };
    let config = Config { api, credentials: fixture.dir.path().to_owned(), timeouts };
    let client = Client::connect(&config).unwrap();
    client.cancel("1").await.unwrap();
}

/// Its calls are over before the next address is tried beside the first.
#[tokio::test]
async fn who_has_little_time_begins_with_another_address_the_next_time() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let stopped = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let served = fixture.serve(&fake);
    let api = vec![stopped.local_addr().unwrap().to_string(), served.address.clone()];
    let call = Duration::from_millis(150);
    let timeouts = Timeouts { call, connect: Duration::from_secs(600), ..Timeouts::default() };
    let config = Config { api, credentials: fixture.dir.path().to_owned(), timeouts };
    let client = Client::connect(&config).unwrap();
    assert!(client.cancel("1").await.is_err(), "nobody answers there");
    for _ in 0..100 {
        if client.cancel("1").await.is_ok() {
            return;
        }
    }
    panic!("the other address is never tried");
}

#[tokio::test]
async fn the_next_address_is_tried() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let served = fixture.serve(&fake);
    let client = fixture.client_of(vec![unused_address(), served.address.clone()]);
    client.cancel("1").await.unwrap();
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_the_cluster() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let served = fixture.serve(&fake);
    let day = Duration::from_hours(24);
    let now = SystemTime::now();
    fixture.write_client(&fixture.ca, Validity { not_before: now - 2 * day, not_after: now - day });
    let error = fixture.client(&[&served]).get("w-0-000-1").await.unwrap_err();
    assert!(error.is_refusal() && error.kind() == ErrorKind::Denied, "{error:?}");
    assert!(error.to_string().contains("pki issue"), "{error}");
}

#[tokio::test]
async fn a_foreign_certificate_is_refused_by_the_cluster() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let served = fixture.serve(&fake);
    let foreign = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
    fixture.write_client(&foreign, Validity::default());
    let error = fixture.client(&[&served]).get("w-0-000-1").await.unwrap_err();
    assert!(error.is_refusal() && error.kind() == ErrorKind::Denied, "{error:?}");
}

#[tokio::test]
async fn a_foreign_cluster_is_not_asked_twice() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let served = Fixture::new().serve(&fake);
    let error = fixture.client(&[&served]).get("w-0-000-1").await.unwrap_err();
    assert!(error.is_for_good() && !error.is_refusal(), "{error:?}");
}

#[tokio::test]
async fn a_watch_goes_on_at_another_address_with_no_event_twice_and_none_missing() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    *fake.events.lock().unwrap() = 2;
    let (mut one, two) = (fixture.serve(&fake), fixture.serve(&fake));
    let mut watch = fixture.client(&[&one, &two]).watch("w-0-000-1", "");
    let mut seen = Vec::new();
    while let Some(event) = watch.next().await {
        seen.push(event.unwrap().cursor);
        if seen.len() == 2 {
            *fake.events.lock().unwrap() = EVENTS;
            one.kill();
        }
    }
    assert_eq!(seen, ["1", "2", "3", "4", "5", "6"]);
    assert_eq!(*fake.cursors.lock().unwrap(), ["", "2"]);
}

#[tokio::test]
async fn an_open_stream_repeats_what_was_not_answered_at_another_address() {
    let fixture = Fixture::new();
    let (mute, fake) = (Arc::new(Fake::default()), Arc::new(Fake::default()));
    *mute.mute.lock().unwrap() = true;
    let (mut one, two) = (fixture.serve(&mute), fixture.serve(&fake));
    let (sender, mut receiver) = fixture.client(&[&one, &two]).open().split();
    for tag in 0..100 {
        sender.submit(tag, SubmitRequest::default(), OpenWatch::End).await.unwrap();
    }
    drop(sender);
    one.kill();
    let (mut accepted, mut ended) = (Vec::new(), Vec::new());
    while let Some(response) = receiver.next().await {
        let response = response.unwrap();
        match response.response.unwrap() {
            open_response::Response::Accepted(_) => accepted.push(response.tag),
            open_response::Response::Event(_) => ended.push(response.tag),
            open_response::Response::Refused(refused) => panic!("{refused:?}"),
        }
    }
    let all: Vec<i64> = (0..100).collect();
    assert_eq!((accepted, ended), (all.clone(), all));
}

#[tokio::test]
async fn a_submit_on_an_open_stream_outlives_a_store_that_is_away_for_a_while() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let away = Failure::new(ErrorKind::Unavailable, domain::Reason::StoreUnavailable, "no store");
    *fake.refusals.lock().unwrap() = vec![away.clone(), away.clone(), away];
    let served = fixture.serve(&fake);
    let (sender, mut receiver) = fixture.client(&[&served]).open().split();
    sender.submit(1, SubmitRequest::default(), OpenWatch::End).await.unwrap();
    drop(sender);
    let mut heard = Vec::new();
    while let Some(response) = receiver.next().await {
        heard.push(response.unwrap().response.unwrap());
    }
    assert!(matches!(heard[..], [open_response::Response::Accepted(_), _]), "{heard:?}");
    let keys = fake.keys.lock().unwrap();
    assert!(keys.len() == 4 && keys.iter().all(|key| *key == keys[0]), "{keys:?}");
}

#[tokio::test]
async fn a_submit_on_an_open_stream_is_refused_when_its_time_is_over_or_its_queue_full() {
    for kind in [ErrorKind::Unavailable, ErrorKind::Exhausted] {
        let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
        let no = Failure::new(kind, domain::Reason::QueueFull, "no");
        *fake.refusals.lock().unwrap() = vec![no; 1000];
        let served = fixture.serve(&fake);
        let (sender, mut receiver) = fixture.client(&[&served]).open().split();
        let timeout = Some(Duration::from_secs(2).into());
        let request = SubmitRequest { timeout, ..SubmitRequest::default() };
        sender.submit(1, request, OpenWatch::End).await.unwrap();
        drop(sender);
        let response = receiver.next().await.unwrap().unwrap().response.unwrap();
        assert!(matches!(response, open_response::Response::Refused(_)), "{response:?}");
        assert!(receiver.next().await.is_none());
        let times = fake.keys.lock().unwrap().len();
        assert_eq!(times == 1, kind == ErrorKind::Exhausted, "{kind:?} was sent {times} times");
    }
}

#[tokio::test]
async fn a_watch_after_the_result_ends_without_an_event_and_without_an_error() {
    let (fixture, fake) = (Fixture::new(), Arc::new(Fake::default()));
    let served = fixture.serve(&fake);
    let mut watch = fixture.client(&[&served]).watch(ENDED, &EVENTS.to_string());
    assert!(watch.next().await.is_none());
}

#[tokio::test]
async fn an_open_stream_to_nobody_ends_with_the_reason() {
    let fixture = Fixture::new();
    let mut open = fixture.client_of(vec![unused_address()]).open();
    let error = open.next().await.unwrap().unwrap_err();
    assert!(matches!(error, Error::NotReached { .. }), "{error:?}");
    assert!(open.next().await.is_none());
    let error = open.sender().cancel(1, "w-0-000-1").await.unwrap_err();
    assert!(matches!(error, Error::Ended), "{error:?}");
}
