use std::collections::BTreeMap;
use std::time::Duration;

use domain::Reason;
use prost::Message;
use proto::link::{Events, SubmitAnswer, SubmitCall, WorkInfo};
use proto::v1::SubmitRequest;
use tonic::Code;

use super::*;
use crate::follow::tests::{ended, last};
use crate::hub::Hub;
use crate::network::Missed;
use crate::testing::{FakeCatalog, FakeNetwork, refuse, view};

fn desk(network: &Arc<FakeNetwork>) -> Desk {
    Desk::new(network.clone(), Hub::spawn(network.clone()), Arc::new(FakeCatalog))
}

fn submit(tag: i64, agent: &str, watch: OpenWatch) -> OpenRequest {
    let submit = SubmitRequest {
        agent: format!("default/{agent}"),
        input: tag.to_string(),
        ..SubmitRequest::default()
    };
    let submit = OpenSubmit { submit: Some(submit), watch: watch.into() };
    OpenRequest { tag, request: Some(open_request::Request::Submit(submit)) }
}

fn stream(desk: Desk, requests: Vec<OpenRequest>) -> OpenStream {
    open(desk, tokio_stream::iter(requests.into_iter().map(Ok)), None)
}

#[tokio::test]
async fn a_request_that_cannot_be_read_ends_the_stream_with_what_is_wrong() {
    let network =
        FakeNetwork::new(view(1, &[("node-1", 1)]), |_, _, envelope| accept(&call_in(envelope)));
    let requests = vec![
        Ok(submit(1, "bench/a", OpenWatch::None)),
        Err(Status::out_of_range("decoded message length too large")),
        Ok(submit(2, "bench/b", OpenWatch::None)),
    ];
    let mut stream = open(desk(&network), tokio_stream::iter(requests), None);
    assert_eq!(stream.next().await.unwrap().unwrap().tag, 1, "what came before is answered");
    let status = stream.next().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(proto::status::reason_of(&status), Some(Reason::InputTooLarge));
}

#[tokio::test]
async fn a_stream_that_broke_is_not_called_a_wrong_request() {
    let network = FakeNetwork::new(view(1, &[("node-1", 1)]), |_, _, _| refuse(Reason::NotFound));
    let requests = vec![Err(Status::unavailable("the connection was reset"))];
    let mut stream = open(desk(&network), tokio_stream::iter(requests), None);
    assert_eq!(stream.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
}

/// The work of a submit has the number in its input as its id.
fn accept(call: &SubmitCall) -> Result<bytes::Bytes, Missed> {
    let lsn: u64 = std::str::from_utf8(&call.input).unwrap().parse().unwrap();
    let work = WorkInfo { lsn, slot: 1, agent: call.agent.clone(), ..WorkInfo::default() };
    Ok(SubmitAnswer { work: Some(work), ..SubmitAnswer::default() }.encode_to_vec().into())
}

fn call_in(envelope: &proto::link::Envelope) -> SubmitCall {
    SubmitCall::decode(envelope.payload.clone()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_order_holds_per_agent_over_retries() {
    // What arrived at the owner and was accepted, by agent.
    let accepted: Arc<Mutex<BTreeMap<String, Vec<u64>>>> = Arc::default();
    let seen = accepted.clone();
    let network = FakeNetwork::new(view(1, &[("node-1", 1)]), move |network, _, envelope| {
        let call = call_in(envelope);
        // Two of three attempts fail.
        if !network.calls().len().is_multiple_of(3) {
            return refuse(Reason::Moved);
        }
        let number = std::str::from_utf8(&call.input).unwrap().parse().unwrap();
        seen.lock().unwrap().entry(call.agent.clone()).or_default().push(number);
        accept(&call)
    });
    let requests =
        (1..=60).map(|tag| submit(tag, &format!("postchain/{}", tag % 3), OpenWatch::None));
    let responses: Vec<_> = stream(desk(&network), requests.collect()).collect().await;
    assert_eq!(responses.len(), 60);
    assert!(responses.iter().flatten().all(|response| {
        matches!(response.response, Some(open_response::Response::Accepted(_)))
    }));
    let accepted = accepted.lock().unwrap();
    assert_eq!(accepted.len(), 3);
    assert!(accepted.values().all(|works| works.len() == 20 && works.is_sorted()), "{accepted:?}");
}

#[tokio::test(start_paused = true)]
async fn a_retry_has_the_same_key_and_only_the_first_attempt_calls_it_fresh() {
    let calls: Arc<Mutex<Vec<SubmitCall>>> = Arc::default();
    let seen = calls.clone();
    let network = FakeNetwork::new(view(1, &[("node-1", 1)]), move |_, _, envelope| {
        let call = call_in(envelope);
        seen.lock().unwrap().push(call.clone());
        if seen.lock().unwrap().len() < 3 {
            Err(Missed::Gone("reset".into()))
        } else {
            accept(&call)
        }
    });
    let responses: Vec<_> =
        stream(desk(&network), vec![submit(1, "postchain/a", OpenWatch::None)]).collect().await;
    assert_eq!(responses.len(), 1);
    let calls = calls.lock().unwrap();
    assert!(!calls[0].idempotency_key.is_empty());
    assert!(calls.iter().all(|call| call.idempotency_key == calls[0].idempotency_key));
    assert_eq!(
        calls.iter().map(|call| call.key_is_fresh).collect::<Vec<_>>(),
        [true, false, false]
    );
}

#[tokio::test(start_paused = true)]
async fn a_refusal_names_its_tag_and_the_stream_goes_on() {
    let network = FakeNetwork::new(view(1, &[("node-1", 1)]), |_, _, envelope| {
        match call_in(envelope).agent.as_str() {
            "default/postchain/full" => refuse(Reason::QueueFull),
            _ => accept(&call_in(envelope)),
        }
    });
    let requests = vec![
        submit(1, "postchain/full", OpenWatch::None),
        submit(2, "unknown/a", OpenWatch::None),
        submit(3, "postchain/", OpenWatch::None),
        OpenRequest { tag: 4, request: None },
        submit(5, "postchain/a", OpenWatch::None),
    ];
    let responses: Vec<_> = stream(desk(&network), requests).collect().await;
    let by_tag: BTreeMap<i64, _> =
        responses.into_iter().flatten().map(|response| (response.tag, response.response)).collect();
    let refused = |tag: i64| match &by_tag[&tag] {
        Some(open_response::Response::Refused(refused)) => (refused.code, refused.reason.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(1), (tonic::Code::ResourceExhausted.into(), "queue_full".to_owned()));
    assert_eq!(refused(2), (tonic::Code::NotFound.into(), "not_found".to_owned()));
    assert_eq!(refused(3), (tonic::Code::InvalidArgument.into(), "malformed".to_owned()));
    assert_eq!(refused(4), (tonic::Code::InvalidArgument.into(), "malformed".to_owned()));
    assert!(matches!(by_tag[&5], Some(open_response::Response::Accepted(_))));
}

#[tokio::test(start_paused = true)]
async fn the_acceptance_comes_before_the_events_even_if_they_are_faster() {
    let slot: Arc<Mutex<Option<Arc<Hub>>>> = Arc::default();
    let hub_slot = slot.clone();
    let network = FakeNetwork::new(view(1, &[("node-1", 1)]), move |_, node, envelope| {
        let call = call_in(envelope);
        assert_eq!(call.mode(), WatchMode::End);
        let events = Events {
            subscription: call.subscription,
            entries: vec![last(3)],
            ended: ended(),
            ..Events::default()
        };
        let hub = hub_slot.lock().unwrap().clone().unwrap();
        hub.events(&node.parse().unwrap(), events);
        accept(&call)
    });
    let desk = desk(&network);
    *slot.lock().unwrap() = Some(desk.hub.clone());
    let hub = desk.hub.clone();
    let responses: Vec<_> =
        stream(desk, vec![submit(1, "postchain/a", OpenWatch::End)]).collect().await;
    slot.lock().unwrap().take();
    let kinds: Vec<_> = responses
        .into_iter()
        .map(|response| match response.unwrap().response {
            Some(open_response::Response::Accepted(_)) => "accepted",
            Some(open_response::Response::Event(_)) => "event",
            Some(open_response::Response::Refused(_)) | None => "other",
        })
        .collect();
    assert_eq!(kinds, ["accepted", "event"]);
    assert_eq!(hub.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_with_too_much_unanswered_is_not_read() {
    let network =
        FakeNetwork::new(view(1, &[("node-1", 1)]), |_, _, envelope| accept(&call_in(envelope)));
    network.make_silent("node-1");
    let taken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = taken.clone();
    let requests = tokio_stream::iter(1..).map(move |tag| {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(submit(tag, &format!("postchain/{tag}"), OpenWatch::None))
    });
    let stream = open(desk(&network), requests, None);
    network.called(UNANSWERED_MAX).await;
    tokio::time::advance(Duration::from_secs(5)).await;
    tokio::task::yield_now().await;
    assert!(taken.load(std::sync::atomic::Ordering::Relaxed) <= UNANSWERED_MAX + 1);
    drop(stream);
}
