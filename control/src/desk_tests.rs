use std::collections::VecDeque;

use bytes::Bytes;
use domain::{AgentId, WorkState};
use proto::journal;
use proto::link::Events;
use proto::v1::{
    OpenRequest, OpenSubmit, OpenWatch, SubmitRequest, WatchRequest, open_request, work_event,
};
use tokio_stream::StreamExt;

use super::*;
use crate::follow::tests::{accepted, ended, last, work};
use crate::testing::{FakeCatalog, FakeNetwork, refuse, view};
use crate::{api, deadline, open, watch};

/// One owner that answers each Get as it is told to: state, epoch, lsn.
struct Fixture {
    network: Arc<FakeNetwork>,
    desk: Desk,
    answers: Arc<Mutex<VecDeque<(WorkState, u64, u64)>>>,
    subscription: Arc<Mutex<u64>>,
}

fn info(state: WorkState) -> Option<WorkInfo> {
    let state = journal::state_code(state);
    Some(WorkInfo { lsn: 1, slot: 1, state, ..WorkInfo::default() })
}

impl Fixture {
    fn new() -> Self {
        let answers: Arc<Mutex<VecDeque<(WorkState, u64, u64)>>> = Arc::default();
        let (queue, subscription) = (answers.clone(), Arc::new(Mutex::new(0)));
        let noted = subscription.clone();
        let network = FakeNetwork::new(view(1, &[("node-1", 1)]), move |_, _, envelope| {
            let bytes: Bytes = match envelope.kind {
                kind::GET => {
                    let Some((state, epoch, lsn)) = queue.lock().unwrap().pop_front() else {
                        return refuse(Reason::NotFound);
                    };
                    GetAnswer { work: info(state), lsn, epoch }.encode_to_vec().into()
                }
                kind::AGENTS | kind::HISTORY => {
                    let (_, epoch, lsn) = queue.lock().unwrap().pop_front().unwrap();
                    let agent = AgentInfo { lsn, ..AgentInfo::default() };
                    match envelope.kind {
                        kind::AGENTS => AgentsAnswer { agents: vec![agent], epoch }.encode_to_vec(),
                        _ => {
                            HistoryAnswer { lsn, epoch, ..HistoryAnswer::default() }.encode_to_vec()
                        }
                    }
                    .into()
                }
                kind::SUBMIT => {
                    let work = info(WorkState::Accepted);
                    SubmitAnswer { work, duplicate: false, lsn: 5, epoch: 2 }.encode_to_vec().into()
                }
                _ => {
                    let call = SubscribeCall::decode(envelope.payload.clone()).unwrap();
                    *noted.lock().unwrap() = call.subscription;
                    SubscribeAnswer {}.encode_to_vec().into()
                }
            };
            Ok(bytes)
        });
        let hub = Hub::spawn(network.clone());
        let desk = Desk::new(network.clone(), hub, Arc::new(FakeCatalog));
        Self { network, desk, answers, subscription }
    }

    /// What a Get shows to which the owner gives these answers, one after the other. All of them are asked for.
    async fn get(&self, answers: &[(WorkState, u64, u64)]) -> (WorkState, String) {
        self.answers.lock().unwrap().extend(answers);
        let shown = api::work::get(&self.desk, work(), deadline::by_default()).await;
        let (info, position) = shown.unwrap();
        assert!(self.answers.lock().unwrap().is_empty(), "it was not asked again");
        (journal::state_from_code(info.state).unwrap(), position.to_string())
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_older_than_one_that_was_shown_is_dropped_and_asked_for_again() {
    let fixture = Fixture::new();
    let dropped = OLD.get();
    assert_eq!(
        fixture.get(&[(WorkState::Succeeded, 2, 10)]).await,
        (WorkState::Succeeded, "2.10".to_owned())
    );
    // It was fenced, and does not know it yet.
    let late = [(WorkState::Running, 1, 99), (WorkState::Succeeded, 2, 10)];
    assert_eq!(fixture.get(&late).await, (WorkState::Succeeded, "2.10".to_owned()));
    assert_eq!(fixture.network.calls().len(), 3);
    assert!(dropped < OLD.get());
}

#[tokio::test(start_paused = true)]
async fn an_answer_about_an_agent_that_is_older_than_one_that_was_shown_is_dropped() {
    let fixture = Fixture::new();
    let agent: AgentId = "default/postchain/a".parse().unwrap();
    let found = async |answers: &[(WorkState, u64, u64)]| {
        fixture.answers.lock().unwrap().extend(answers);
        let (_, position) =
            api::agent::get(&fixture.desk, &agent, deadline::by_default()).await.unwrap();
        assert!(fixture.answers.lock().unwrap().is_empty(), "it was not asked again");
        position.to_string()
    };
    let any = WorkState::Running;
    assert_eq!(found(&[(any, 2, 10)]).await, "2.10");
    assert_eq!(found(&[(any, 1, 99), (any, 2, 9), (any, 2, 10)]).await, "2.10");
    // Its journal is of the same agent.
    fixture.answers.lock().unwrap().extend([(any, 2, 9), (any, 3, 4)]);
    let (page, position) =
        api::agent::newest(&fixture.desk, &agent, deadline::by_default()).await.unwrap();
    assert_eq!((page.lsn, position.to_string().as_str()), (4, "3.4"));
}

#[tokio::test(start_paused = true)]
async fn an_answer_older_than_an_event_that_was_shown_is_dropped() {
    let fixture = Fixture::new();
    let request = WatchRequest { id: work().to_string(), cursor: String::new() };
    let mut stream =
        watch::watch(&fixture.desk, &request, deadline::by_default()).await.ok().unwrap();
    let subscription = *fixture.subscription.lock().unwrap();
    let node = "node-1".parse().unwrap();
    let entries = vec![accepted(1)];
    fixture.desk.hub.events(&node, Events { subscription, entries, ..Events::default() });
    assert_eq!(stream.next().await.unwrap().unwrap().position, "1.1");
    let (entries, ended) = (vec![last(3)], ended());
    fixture.desk.hub.events(&node, Events { subscription, entries, ended, ..Events::default() });
    let result = stream.next().await.unwrap().unwrap();
    assert!(matches!(result.event.unwrap().event, Some(work_event::Event::Result(_))));
    assert_eq!(result.position, "1.103");
    let late = [(WorkState::Running, 1, 102), (WorkState::Succeeded, 1, 103)];
    assert_eq!(fixture.get(&late).await.0, WorkState::Succeeded);
}

#[tokio::test(start_paused = true)]
async fn an_answer_older_than_the_acceptance_on_an_open_stream_is_dropped() {
    let fixture = Fixture::new();
    let submit =
        SubmitRequest { agent: "default/postchain/a".to_owned(), ..SubmitRequest::default() };
    let submit = OpenSubmit { submit: Some(submit), watch: OpenWatch::None.into() };
    let request = OpenRequest { tag: 1, request: Some(open_request::Request::Submit(submit)) };
    let requests = tokio_stream::iter([Ok(request)]);
    let responses: Vec<_> = open::open(fixture.desk.clone(), requests, None).collect().await;
    let positions: Vec<_> = responses.into_iter().flatten().map(|one| one.position).collect();
    assert_eq!(positions, ["2.5"]);
    let late = [(WorkState::Accepted, 1, 9), (WorkState::Running, 2, 5)];
    assert_eq!(fixture.get(&late).await.0, WorkState::Running);
}
