//! Many works at once, also when a node dies meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use client::Client;
use pbjson_types::Duration as ProtoDuration;
use proto::v1::open_response::Response;
use proto::v1::work_event::Event;
use proto::v1::{OpenWatch, SubmitRequest, Work, WorkState};
use rustix::process::Signal;
use tests::harness::{Dev, Planted, history};
use tokio::time::timeout;

use crate::{HARBOUR, PHASES, PROGRAM, block_on};

const TIME_MAX: Duration = Duration::from_secs(120);

fn request(number: usize) -> SubmitRequest {
    SubmitRequest {
        agent: format!("default/postchain/load-{number}"),
        input: Planted::new(HARBOUR, 2_048).text,
        timeout: Some(ProtoDuration { seconds: 100, nanos: 0 }),
        ..SubmitRequest::default()
    }
}

/// Submits so many works at once and waits for all; `ended` hears how many have ended, after each.
async fn run_all(client: &Client, count: usize, mut ended: impl FnMut(usize)) -> Vec<Work> {
    let (sender, mut responses) = client.open().split();
    let sending = tokio::spawn(async move {
        for number in 0..count {
            let tag = i64::try_from(number).unwrap();
            sender.submit(tag, request(number), OpenWatch::End).await.unwrap();
        }
    });
    let mut works = Vec::new();
    while works.len() < count {
        let next = timeout(TIME_MAX, responses.next()).await;
        let next = next.unwrap_or_else(|_| panic!("{} of {count} have ended", works.len()));
        match next.expect("the stream goes on").unwrap().response {
            Some(Response::Event(event)) => {
                let Some(Event::Result(work)) = event.event else { panic!("{event:?}") };
                works.push(work);
                ended(works.len());
            }
            Some(Response::Refused(refused)) => panic!("{refused:?}"),
            Some(Response::Accepted(_)) | None => {}
        }
    }
    sending.await.unwrap();
    works
}

/// All works again, with their steps.
async fn read_back(client: &Client, works: &[Work]) -> Vec<Work> {
    let mut read = Vec::new();
    for work in works {
        read.push(client.get(&work.id).await.unwrap());
    }
    read
}

fn assert_six_steps(work: &Work, attempts_max: i32) {
    assert_eq!(work.state(), WorkState::Succeeded, "{work:?}");
    let names: Vec<_> = work.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(names, PHASES, "{}", work.id);
    let attempts = work.steps.iter().map(|step| step.attempts);
    assert!(attempts.into_iter().all(|a| (1..=attempts_max).contains(&a)), "{work:?}");
}

#[test]
fn two_hundred_works_at_once_all_succeed_with_six_model_calls_each() {
    let dev = Dev::start(PROGRAM);
    let works = block_on(async {
        let client = dev.client();
        let works = run_all(&client, 200, |_| ()).await;
        read_back(&client, &works).await
    });
    let ids: BTreeSet<_> = works.iter().map(|work| work.id.clone()).collect();
    assert_eq!(ids.len(), 200);
    works.iter().for_each(|work| assert_six_steps(work, 1));
    let nodes: BTreeSet<_> =
        works.iter().flat_map(|work| work.steps.iter().map(|step| step.node.clone())).collect();
    assert_eq!(nodes.len(), 3);
    assert_eq!(dev.node_metrics("stagedoor_model_calls_total", &[]), 1_200.0);
    assert_eq!(dev.node_metrics("stagedoor_agent_steps_early_total", &[]), 0.0);
    block_on(async { assert_sound(&dev.client(), &works).await });
}

#[test]
fn a_node_killed_in_the_middle_of_many_works_costs_none_of_them() {
    const WORKS: usize = 300;
    let dev = Dev::start(PROGRAM);
    let works = block_on(async {
        let client = dev.client();
        let kill = |ended| {
            if ended == WORKS / 10 {
                dev.signal("node-2", Signal::KILL);
            }
        };
        let works = run_all(&client, WORKS, kill).await;
        read_back(&client, &works).await
    });
    let ids: BTreeSet<_> = works.iter().map(|work| work.id.clone()).collect();
    assert_eq!(ids.len(), WORKS);
    works.iter().for_each(|work| assert_six_steps(work, 2));
    let killed_in_the_middle = works.iter().any(|work| {
        let on_the_dead = |index: usize| work.steps[index].node == "node-2";
        (0..5).any(on_the_dead) && !on_the_dead(5)
    });
    assert!(killed_in_the_middle, "nothing was on the node that was killed");
    let elsewhere = works.iter().flat_map(|work| &work.steps).filter(|step| 1 < step.epoch);
    assert!(0 < elsewhere.count(), "no shard was taken over");
    // What was committed was not run again, and nothing else is odd.
    block_on(async { assert_sound(&dev.client(), &works).await });
}

/// That what clients were told and what the journals say agree.
async fn assert_sound(client: &Client, works: &[Work]) {
    let mut journals = BTreeMap::new();
    for work in works {
        let mut entries = Vec::new();
        let mut read = client.history(&work.agent, 0);
        while let Some(entry) = read.next().await {
            entries.push(entry.unwrap());
        }
        entries.reverse();
        journals.insert(work.agent.clone(), entries);
    }
    let acknowledged = works.iter().map(|work| work.id.clone()).collect();
    let faults = history::check(&acknowledged, &journals);
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn works_of_one_agent_run_one_after_the_other_in_their_order() {
    const WORKS: usize = 20;
    let dev = Dev::start(PROGRAM);
    let works = block_on(async {
        let client = dev.client();
        let (sender, mut responses) = client.open().split();
        for number in 0..WORKS {
            let request = SubmitRequest {
                agent: "default/postchain/one".to_owned(),
                input: format!("Lamp number {number} is lit. Why?"),
                ..SubmitRequest::default()
            };
            sender.submit(i64::try_from(number).unwrap(), request, OpenWatch::End).await.unwrap();
        }
        drop(sender);
        let mut order = Vec::new();
        let mut ids = Vec::new();
        while let Some(response) = timeout(TIME_MAX, responses.next()).await.unwrap() {
            let response = response.unwrap();
            if let Some(Response::Event(event)) = response.response {
                order.push(response.tag);
                ids.push(Work { id: event.work, ..Work::default() });
            }
        }
        assert_eq!(order, (0..WORKS).map(|n| i64::try_from(n).unwrap()).collect::<Vec<_>>());
        read_back(&client, &ids).await
    });
    let moment = |time: &Option<pbjson_types::Timestamp>| {
        let time = time.as_ref().unwrap();
        (time.seconds, time.nanos)
    };
    for pair in works.windows(2) {
        let (end, start) = (&pair[0].steps[5].end_time, &pair[1].steps[0].start_time);
        assert!(moment(end) <= moment(start), "{} began before {} ended", pair[1].id, pair[0].id);
    }
}
