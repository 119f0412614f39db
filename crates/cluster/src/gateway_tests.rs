//! Two gateways in one process, wired to each other without a network: the protocol between them.

use std::sync::Mutex;

use domain::Incarnation;
use proto::link::Hello;
use ractor::concurrency::JoinHandle;
use tokio::sync::mpsc;

use super::*;
use crate::{Config, Error, Peer, Service};

const ECHO: u32 = 1;
const NEVER: u32 = 2;
const DROP: u32 = 3;
const PANIC: u32 = 4;
const DESCRIBE: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Record {
    events: Mutex<Vec<String>>,
    casts: Mutex<Vec<u64>>,
    kept: Mutex<Vec<Reply>>,
}

impl Service for Record {
    fn handle(&self, incoming: Incoming) {
        let Incoming { from, envelope, deadline, reply } = incoming;
        let Some(reply) = reply else {
            return self.casts.lock().unwrap().push(envelope.work);
        };
        match envelope.kind {
            ECHO => reply.send(envelope.payload),
            NEVER => self.kept.lock().unwrap().push(reply),
            PANIC => panic!("as it was told"),
            DESCRIBE => {
                let left = deadline.unwrap().saturating_duration_since(Instant::now());
                let text = format!("{from} {} {}", envelope.hops, left.as_secs());
                reply.send(text.into());
            }
            _ => drop(reply),
        }
    }

    fn link(&self, event: LinkEvent) {
        self.events.lock().unwrap().push(event.to_string());
    }
}

/// One side.
struct Side {
    hub: Arc<Hub>,
    record: Arc<Record>,
    gateway: ActorRef<GatewayMessage>,
    ending: JoinHandle<()>,
}

impl Side {
    async fn new(name: &str, config: Config) -> Self {
        let record = Arc::new(Record::default());
        let peer: Peer = name.parse().unwrap();
        let hub = Hub::new(peer, Incarnation(7), config, record.clone());
        let (gateway, ending) = Actor::spawn(None, Gateway, hub.clone()).await.unwrap();
        Self { hub, record, gateway, ending }
    }

    fn channel(&self, name: &str) -> Arc<Channel> {
        self.hub.find_or_make(&name.parse().unwrap())
    }

    fn opened(&self, name: &str, serial: u64, gateway: &ActorRef<GatewayMessage>) {
        let (channel, gateway) = (self.channel(name), gateway.clone());
        channel.expect_session();
        self.gateway.cast(GatewayMessage::Opened { channel, serial, gateway }).unwrap();
    }

    fn closed(&self, name: &str, serial: u64) {
        let channel = self.channel(name);
        self.gateway.cast(GatewayMessage::Closed { channel, serial }).unwrap();
    }

    fn events(&self) -> Vec<String> {
        self.record.events.lock().unwrap().clone()
    }

    async fn stop(self) {
        self.gateway.stop(None);
        self.ending.await.unwrap();
        self.hub.clear();
    }
}

async fn pair_with(config: Config) -> (Side, Side) {
    let a = Side::new("control/a", config.clone()).await;
    let b = Side::new("node/b", config).await;
    a.opened("node/b", 1, &b.gateway);
    b.opened("control/a", 1, &a.gateway);
    eventually("both are up", || a.channel("node/b").is_up() && b.channel("control/a").is_up())
        .await;
    (a, b)
}

async fn pair() -> (Side, Side) {
    pair_with(Config::default()).await
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "it never happened: {what}");
}

fn envelope(kind: u32) -> Envelope {
    Envelope { kind, payload: Bytes::from_static(b"hello"), ..Envelope::default() }
}

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

async fn call(channel: &Channel, envelope: Envelope) -> Result<Bytes, Failure> {
    let (_, answer) = channel.call(envelope, soon()).unwrap();
    tokio::time::timeout(PATIENCE, answer).await.unwrap().unwrap()
}

async fn refused(channel: &Channel, envelope: Envelope) -> Option<Reason> {
    match call(channel, envelope).await {
        Err(Failure::Refused(refusal)) => crate::reason_of(&refusal),
        other => panic!("{other:?}"),
    }
}

fn dropped(reason: &str) -> u64 {
    metrics::DROPPED.with_label_values(&[reason]).get()
}

/// Stands where the other gateway would, and only records what it gets.
struct Probe;
impl Actor for Probe {
    type Msg = GatewayMessage;
    type State = mpsc::UnboundedSender<Frame>;
    type Arguments = mpsc::UnboundedSender<Frame>;

    async fn pre_start(
        &self,
        _: ActorRef<GatewayMessage>,
        frames: mpsc::UnboundedSender<Frame>,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(frames)
    }

    async fn handle(
        &self,
        _: ActorRef<GatewayMessage>,
        message: GatewayMessage,
        frames: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        if let GatewayMessage::Frame(bytes) = message {
            _ = frames.send(Frame::decode(bytes).unwrap());
        }
        Ok(())
    }
}

/// A side `control/a` whose peer `node/b` is a probe that said hello.
struct Probed {
    side: Side,
    probe: ActorRef<GatewayMessage>,
    frames: mpsc::UnboundedReceiver<Frame>,
    /// What the side gave to the probe.
    token: Bytes,
}

impl Probed {
    async fn new() -> Self {
        let side = Side::new("control/a", Config::default()).await;
        let (sender, mut frames) = mpsc::unbounded_channel();
        let (probe, _) = Actor::spawn(None, Probe, sender).await.unwrap();
        side.opened("node/b", 1, &probe);
        let token = frames.recv().await.unwrap().hello.unwrap().token;
        let probed = Self { side, probe, frames, token };
        probed.send(Frame { hello: Some(hello([9; 16])), ..probed.frame() });
        eventually("it is up", || probed.channel().is_up()).await;
        probed
    }

    fn channel(&self) -> Arc<Channel> {
        self.side.channel("node/b")
    }

    fn frame(&self) -> Frame {
        Frame { token: self.token.clone(), sent_ms: clock::now_ms(), ..Frame::default() }
    }

    fn send(&self, frame: Frame) {
        let bytes = frame.encode_to_vec().into();
        self.side.gateway.cast(GatewayMessage::Frame(bytes)).unwrap();
    }

    /// The next frame with envelopes.
    async fn next(&mut self) -> Vec<Envelope> {
        loop {
            let frame = tokio::time::timeout(PATIENCE, self.frames.recv()).await.unwrap().unwrap();
            if !frame.envelopes.is_empty() {
                return frame.envelopes;
            }
        }
    }

    async fn stop(self) {
        self.probe.stop(None);
        self.side.stop().await;
    }
}

fn hello(token: Token) -> Hello {
    let token = Bytes::copy_from_slice(&token);
    Hello { token, incarnation: 3, version: 1, from: "node/b".to_owned() }
}

#[tokio::test]
async fn calls_go_both_ways_and_name_their_sender() {
    let (a, b) = pair().await;
    let answer = call(&a.channel("node/b"), envelope(DESCRIBE)).await.unwrap();
    assert!(answer.starts_with(b"control/a 1 "), "{answer:?}");
    let answer = call(&b.channel("control/a"), envelope(DESCRIBE)).await.unwrap();
    assert!(answer.starts_with(b"node/b 1 "), "{answer:?}");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn every_up_has_one_down() {
    let (a, b) = pair().await;
    for _ in 0..2 {
        a.closed("node/b", 1);
    }
    eventually("it is down", || !a.channel("node/b").is_up()).await;
    b.closed("control/a", 1);
    a.opened("node/b", 2, &b.gateway);
    b.opened("control/a", 2, &a.gateway);
    eventually("it is up again", || a.channel("node/b").is_up()).await;
    assert_eq!(a.events(), ["node/b#7 is up", "node/b is down", "node/b#7 is up"]);
    assert_eq!(&*call(&a.channel("node/b"), envelope(ECHO)).await.unwrap(), b"hello");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_link_that_ends_ends_its_calls() {
    let (a, b) = pair().await;
    let (_, answer) = a.channel("node/b").call(envelope(NEVER), soon()).unwrap();
    eventually("it arrived", || !b.record.kept.lock().unwrap().is_empty()).await;
    a.closed("node/b", 1);
    assert!(matches!(answer.await.unwrap(), Err(Failure::Gone)));
    // The answer comes after all, over a session that is no more.
    b.record.kept.lock().unwrap().pop().unwrap().send(Bytes::new());
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_reply_that_is_dropped_is_a_refusal() {
    let (a, b) = pair().await;
    assert_eq!(refused(&a.channel("node/b"), envelope(DROP)).await, Some(Reason::AnswerLost));
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_service_that_panics_loses_one_message() {
    let (a, b) = pair().await;
    assert_eq!(refused(&a.channel("node/b"), envelope(PANIC)).await, Some(Reason::AnswerLost));
    assert_eq!(&*call(&a.channel("node/b"), envelope(ECHO)).await.unwrap(), b"hello");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn casts_arrive_in_order_and_share_frames() {
    let (a, b) = pair().await;
    let frames = metrics::FRAMES.get();
    for work in 0..1_000 {
        a.channel("node/b").cast(Envelope { work, ..envelope(ECHO) }).unwrap();
    }
    let casts = || b.record.casts.lock().unwrap().len();
    eventually("all arrived", || casts() == 1_000).await;
    assert!(b.record.casts.lock().unwrap().iter().copied().eq(0..1_000));
    assert!(metrics::FRAMES.get() - frames < 500);
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn more_than_the_window_is_refused_at_once_and_room_comes_back() {
    let mut probed = Probed::new().await;
    let channel = probed.channel();
    let mut sent = 0_u64;
    while channel.cast(envelope(ECHO)).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 1_024);
    let overloaded = channel.call(envelope(ECHO), soon()).unwrap_err();
    assert!(matches!(overloaded, Error::Overloaded { .. }), "{overloaded}");
    let mut got = 0;
    while got < sent {
        got += probed.next().await.len() as u64;
        probed.send(Frame { acknowledged: got, ..probed.frame() });
    }
    eventually("there is room", || channel.cast(envelope(ECHO)).is_ok()).await;
    probed.stop().await;
}

#[tokio::test]
async fn what_is_on_its_way_to_us_is_acknowledged_in_time() {
    let (a, b) = pair().await;
    let acknowledging = tokio::spawn(crate::hub::Acknowledgements::run(b.hub.clone()));
    a.channel("node/b").cast(envelope(ECHO)).unwrap();
    eventually("it is acknowledged", || a.channel("node/b").is_drained()).await;
    acknowledging.abort();
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_frame_without_a_valid_token_is_dropped_and_counted() {
    let probed = Probed::new().await;
    let before = (dropped("token"), dropped("malformed"));
    let envelopes = vec![envelope(ECHO)];
    for token in [Bytes::new(), Bytes::from_static(&[9; 16]), Bytes::from_static(b"short")] {
        probed.send(Frame { token, envelopes: envelopes.clone(), ..Frame::default() });
    }
    probed.side.gateway.cast(GatewayMessage::Frame(Bytes::from_static(&[0xff; 9]))).unwrap();
    eventually("they were counted", || {
        before.0 + 3 <= dropped("token") && before.1 < dropped("malformed")
    })
    .await;
    assert!(probed.side.record.casts.lock().unwrap().is_empty());
    probed.send(Frame { envelopes, ..probed.frame() });
    eventually("the true one arrives", || !probed.side.record.casts.lock().unwrap().is_empty())
        .await;
    probed.stop().await;
}

#[tokio::test]
async fn who_claims_to_be_a_peer_learns_nothing_and_changes_nothing() {
    let a = Side::new("control/a", Config::default()).await;
    let b = Side::new("node/b", Config::default()).await;
    a.opened("node/b", 1, &b.gateway);
    // A third one says that it is node/b. What is answered goes to node/b, for whom it means nothing.
    let claim = Frame { hello: Some(hello([5; 16])), ..Frame::default() };
    let before = dropped("token");
    a.gateway.cast(GatewayMessage::Frame(claim.encode_to_vec().into())).unwrap();
    eventually("node/b dropped it", || before < dropped("token")).await;
    assert!(!a.channel("node/b").is_up());
    b.opened("control/a", 1, &a.gateway);
    eventually("the true one is up", || {
        a.channel("node/b").is_up() && b.channel("control/a").is_up()
    })
    .await;
    assert_eq!(&*call(&a.channel("node/b"), envelope(ECHO)).await.unwrap(), b"hello");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn what_comes_after_its_deadline_is_refused_and_not_delivered() {
    let mut probed = Probed::new().await;
    let call = |id, deadline_ms| Envelope { id, deadline_ms, ..envelope(ECHO) };
    // Its clock is an hour ahead of ours, which makes nothing late.
    let theirs = clock::now_ms() + 3_600_000;
    let envelopes = vec![call(1, theirs + 60_000)];
    probed.send(Frame { sent_ms: theirs, envelopes, ..probed.frame() });
    let answers = probed.next().await;
    assert_eq!((answers[0].answers, &answers[0].refusal), (1, &None));
    let envelopes = vec![call(2, theirs - 1_000)];
    probed.send(Frame { sent_ms: theirs, envelopes, ..probed.frame() });
    let answers = probed.next().await;
    let reason = answers[0].refusal.as_ref().and_then(crate::reason_of);
    assert_eq!((answers[0].answers, reason), (2, Some(Reason::DeadlineExceeded)));
    probed.stop().await;
}

#[tokio::test]
async fn what_was_passed_on_too_often_is_refused() {
    let (a, b) = pair().await;
    let often = |hops| Envelope { hops, ..envelope(ECHO) };
    assert_eq!(&*call(&a.channel("node/b"), often(31)).await.unwrap(), b"hello");
    assert_eq!(refused(&a.channel("node/b"), often(32)).await, Some(Reason::TooManyHops));
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_peer_with_too_many_open_calls_is_refused() {
    let (a, b) = pair_with(Config { calls_max: 4, ..Config::default() }).await;
    let channel = a.channel("node/b");
    let waiting: Vec<_> = (0..4).map(|_| channel.call(envelope(NEVER), soon()).unwrap()).collect();
    let overloaded = channel.call(envelope(ECHO), soon()).unwrap_err();
    assert!(matches!(overloaded, Error::Overloaded { .. }), "{overloaded}");
    // Who stops waiting here is still being answered there.
    waiting.into_iter().for_each(|(id, _)| channel.forget_call(id));
    assert_eq!(refused(&channel, envelope(ECHO)).await, Some(Reason::Overloaded));
    b.record.kept.lock().unwrap().clear();
    assert_eq!(&*call(&channel, envelope(ECHO)).await.unwrap(), b"hello");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn too_large_a_message_is_refused_and_too_large_an_answer_is_a_refusal() {
    let (a, b) = pair().await;
    let channel = a.channel("node/b");
    let large = |bytes: usize| Envelope { payload: vec![0; bytes].into(), ..envelope(ECHO) };
    assert!(matches!(channel.cast(large(8 << 20)), Err(Error::TooLarge { .. })));
    assert_eq!(call(&channel, large(7 << 20)).await.unwrap().len(), 7 << 20);
    let (_, answer) = channel.call(envelope(NEVER), soon()).unwrap();
    eventually("it arrived", || !b.record.kept.lock().unwrap().is_empty()).await;
    b.record.kept.lock().unwrap().pop().unwrap().send(vec![0; 9 << 20].into());
    let Err(Failure::Refused(refusal)) = answer.await.unwrap() else { panic!() };
    assert_eq!(crate::reason_of(&refusal), Some(Reason::ResultTooLarge));
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn whoever_acknowledges_what_was_not_sent_breaks_the_protocol() {
    let probed = Probed::new().await;
    let before = dropped("acknowledged");
    probed.send(Frame { acknowledged: 1, ..probed.frame() });
    eventually("it was counted", || before < dropped("acknowledged")).await;
    probed.stop().await;
}

#[tokio::test]
async fn another_version_does_not_come_up() {
    let side = Side::new("control/a", Config::default()).await;
    let (sender, mut frames) = mpsc::unbounded_channel();
    let (probe, _) = Actor::spawn(None, Probe, sender).await.unwrap();
    side.opened("node/b", 1, &probe);
    let token = frames.recv().await.unwrap().hello.unwrap().token;
    let before = dropped("version");
    let later = Hello { version: 2, ..hello([9; 16]) };
    let frame = Frame { token, hello: Some(later), ..Frame::default() };
    side.gateway.cast(GatewayMessage::Frame(frame.encode_to_vec().into())).unwrap();
    eventually("it was counted", || before < dropped("version")).await;
    assert!(!side.channel("node/b").is_up());
    probe.stop(None);
    side.stop().await;
}

#[tokio::test]
async fn without_an_address_or_after_the_end_nothing_is_queued() {
    let side = Side::new("control/a", Config::default()).await;
    let channel = side.channel("node/b");
    assert!(matches!(channel.cast(envelope(ECHO)), Err(Error::NoAddress { .. })));
    channel.set_addresses(vec!["127.0.0.1:1".to_owned()]);
    channel.cast(envelope(ECHO)).unwrap();
    let (_, answer) = channel.call(envelope(ECHO), soon()).unwrap();
    channel.unreachable();
    assert!(matches!(answer.await.unwrap(), Err(Failure::Unreachable)));
    assert!(matches!(channel.cast(envelope(ECHO)), Err(Error::Unreachable { .. })));
    channel.shut();
    assert!(matches!(channel.cast(envelope(ECHO)), Err(Error::Closed)));
    side.stop().await;
}

#[tokio::test]
async fn what_waits_for_a_session_that_never_comes_was_not_sent() {
    let side = Side::new("control/a", Config::default()).await;
    let channel = side.channel("node/b");
    channel.set_addresses(vec!["127.0.0.1:1".to_owned()]);
    channel.expect_session();
    let (_, answer) = channel.call(envelope(ECHO), soon()).unwrap();
    channel.shut();
    assert!(matches!(answer.await.unwrap(), Err(Failure::Unreachable)));
    side.stop().await;
}

#[test]
fn only_frames_cross_the_network() {
    let frame = GatewayMessage::Frame(Bytes::from_static(b"bytes"));
    let serialized = ractor::Message::serialize(frame).unwrap();
    match <GatewayMessage as ractor::Message>::deserialize(serialized).unwrap() {
        GatewayMessage::Frame(bytes) => assert_eq!(&*bytes, b"bytes"),
        GatewayMessage::Opened { .. }
        | GatewayMessage::Closed { .. }
        | GatewayMessage::Idle { .. } => panic!(),
    }
}
