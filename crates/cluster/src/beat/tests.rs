use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use domain::Term;
use net::pki::{Ca, Validity};
use proto::link::Beat;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

struct Fixture {
    ca: Ca,
}

impl Fixture {
    fn new() -> Self {
        Self { ca: Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap() }
    }

    fn identity(&self, name: &str) -> net::Identity {
        let id = format!("spiffe://stagedoor.local/{name}").parse().unwrap();
        let issued = self.ca.issue(&id, Validity::default()).unwrap();
        net::Identity::from_pem(&issued.certificate_pem, &issued.key_pem, self.ca.certificate_pem())
            .unwrap()
    }

    async fn listener(&self, listen: &str) -> (BeatListener, Receiver<BeatEvent>) {
        let (sender, events) = channel();
        let sender = Mutex::new(sender);
        let sink: BeatSink = Arc::new(move |event| _ = sender.lock().unwrap().send(event));
        let answer: BeatAnswerSource = Arc::new(|| (Some("control-1".parse().unwrap()), Term(4)));
        let config =
            ListenerConfig { listen: listen.parse().unwrap(), ..ListenerConfig::default() };
        let identity = self.identity("control/control-1");
        (BeatListener::spawn(config, &identity, sink, answer).await.unwrap(), events)
    }

    fn sender(&self, name: &str, targets: &[String]) -> BeatSender {
        let config = SenderConfig { period_ms: 20, redial_ms: 10, ..SenderConfig::default() };
        let source: BeatSource = Arc::new(|| Beat { incarnation: 9, ..Beat::default() });
        BeatSender::spawn(config, &self.identity(name), targets.to_vec(), source).unwrap()
    }
}

/// Blocks the runtime that it is called on until the event comes, as a main runtime that is stuck would.
fn wait_for(events: &Receiver<BeatEvent>, mut wanted: impl FnMut(&BeatEvent) -> bool) -> BeatEvent {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = events.recv_timeout(left).expect("the event never came");
        if wanted(&event) {
            return event;
        }
    }
}

fn beat(event: &BeatEvent) -> Option<&Beat> {
    match &event.what {
        What::Beat(beat) => Some(beat),
        What::Lost => None,
    }
}

#[tokio::test]
async fn a_beat_names_its_node_and_is_answered() {
    let fixture = Fixture::new();
    let (listener, events) = fixture.listener("127.0.0.1:0").await;
    let sender = fixture.sender("node/node-7", &[listener.addr().to_string()]);
    let event = wait_for(&events, |event| beat(event).is_some_and(|it| 2 <= it.number));
    assert_eq!((event.from.as_str(), beat(&event).unwrap().incarnation), ("node-7", 9));
    wait_for(&events, |event| beat(event).is_some_and(|it| 4 <= it.number));
    let (_, answer) = sender.last_answer().unwrap();
    assert_eq!((answer.leader.as_str(), answer.term), ("control-1", 4));
    sender.shutdown().await;
    wait_for(&events, |event| event.what == What::Lost);
    listener.shutdown().await;
}

#[tokio::test]
async fn beats_go_on_and_tell_while_the_main_runtime_is_blocked() {
    let fixture = Fixture::new();
    let (listener, events) = fixture.listener("127.0.0.1:0").await;
    let sender = fixture.sender("node/node-1", &[listener.addr().to_string()]);
    let silent =
        |event: &BeatEvent, more: u64| beat(event).is_some_and(|it| more <= it.runtime_silent_ms);
    // This thread is the main runtime, and does not return to it.
    wait_for(&events, |event| silent(event, 50));
    let later = wait_for(&events, |event| silent(event, 200));
    assert!(7 <= beat(&later).unwrap().number);
    let answers = |event: &BeatEvent| beat(event).is_some_and(|it| it.runtime_silent_ms == 0);
    let deadline = Instant::now() + PATIENCE;
    while !events.try_recv().is_ok_and(|event| answers(&event)) {
        assert!(Instant::now() < deadline, "the runtime answers again, and nobody says so");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    sender.shutdown().await;
    listener.shutdown().await;
}

#[tokio::test]
async fn a_sender_finds_its_listener_again() {
    let fixture = Fixture::new();
    let (first, events) = fixture.listener("127.0.0.1:0").await;
    let addr = first.addr().to_string();
    let sender = fixture.sender("node/node-1", std::slice::from_ref(&addr));
    wait_for(&events, |event| beat(event).is_some());
    first.shutdown().await;
    let (second, events) = fixture.listener(&addr).await;
    wait_for(&events, |event| beat(event).is_some());
    sender.shutdown().await;
    second.shutdown().await;
}

#[tokio::test]
async fn a_newer_connection_of_a_node_replaces_the_older_without_a_loss() {
    let fixture = Fixture::new();
    let (listener, events) = fixture.listener("127.0.0.1:0").await;
    let targets = [listener.addr().to_string()];
    let older = fixture.sender("node/node-1", &targets);
    wait_for(&events, |event| beat(event).is_some());
    // So slow to redial that it does not take the place back.
    let config = SenderConfig { period_ms: 20, ..SenderConfig::default() };
    let source: BeatSource = Arc::new(|| Beat { incarnation: 10, ..Beat::default() });
    let identity = fixture.identity("node/node-1");
    let newer = BeatSender::spawn(config, &identity, targets.to_vec(), source).unwrap();
    let mut lost = false;
    wait_for(&events, |event| {
        lost |= event.what == What::Lost;
        beat(event).is_some_and(|it| it.incarnation == 10)
    });
    assert!(!lost);
    older.shutdown().await;
    newer.shutdown().await;
    listener.shutdown().await;
}

#[tokio::test]
async fn targets_can_change() {
    let fixture = Fixture::new();
    let (one, events_one) = fixture.listener("127.0.0.1:0").await;
    let (two, events_two) = fixture.listener("127.0.0.1:0").await;
    let sender = fixture.sender("node/node-1", &[one.addr().to_string()]);
    wait_for(&events_one, |event| beat(event).is_some());
    sender.set_targets(vec![two.addr().to_string()]);
    wait_for(&events_two, |event| beat(event).is_some());
    wait_for(&events_one, |event| event.what == What::Lost);
    sender.shutdown().await;
    one.shutdown().await;
    two.shutdown().await;
}

#[tokio::test]
async fn a_control_process_may_not_beat() {
    let fixture = Fixture::new();
    let (listener, _) = fixture.listener("127.0.0.1:0").await;
    let identity = fixture.identity("control/control-2");
    let dialer = net::Dialer::new(&identity, net::Protocol::Beat);
    let expected = net::Expected::any(domain::Role::Control);
    let error = dialer.dial(&listener.addr().to_string(), &expected).await.unwrap_err();
    assert_eq!(error.kind(), domain::ErrorKind::Denied);
    listener.shutdown().await;
}
