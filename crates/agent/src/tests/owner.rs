//! What an owner says of a work: where its answers stand, when a turn began, and what it has no room for.

use proto::link::{AgentsAnswer, AgentsCall};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn who_watches_a_work_whose_entries_were_deleted_is_sent_the_whole_of_it() {
    let config = Config { idle_ms: 20, ..Config::default() };
    let mut bench = bench_with(Arc::new(Scripted::new()), config, &Phase::ALL).await;
    let mut works = Vec::new();
    for key in ["k1", "k2"] {
        works.push(bench.submit(A, "text", key).await.unwrap().lsn);
        bench.ended(works[works.len() - 1]).await;
    }
    let later_ms = crate::clock::now_ms() + 60_000;
    let prune = proto::link::Prune {
        epoch: bench.epoch,
        entries_before_ms: later_ms,
        log_bytes_max: u64::MAX,
        works_before_ms: 0,
        now_ms: later_ms,
    };
    // Only what the agent's row holds is deleted.
    bench
        .eventually("the first work's entries are deleted", async || {
            bench.store.prune(DATABASE, &prune).await.unwrap();
            let read = ReadHistory { from: works[0], above: works[0] - 1, limit: 1 };
            bench.store.history(DATABASE, &read).await.unwrap().rows.is_empty()
        })
        .await;
    // Who owns it now has not seen it end.
    bench.own().await;
    let whole = async |subscription, mode: WatchMode| {
        let (work, mode) = (works[0], mode.into());
        let call = SubscribeCall { subscription, work, mode, ..SubscribeCall::default() };
        bench.call(kind::SUBSCRIBE, &call).await.unwrap();
        bench
            .eventually("its end is sent", async || {
                told(&bench, subscription).iter().any(|events| events.ended.is_some())
            })
            .await;
        told(&bench, subscription)[0].whole.as_ref().map(|whole| whole.steps.len())
    };
    assert_eq!(whole(7, WatchMode::All).await, Some(6));
    assert_eq!(whole(8, WatchMode::End).await, None);
}

/// The events of one subscription so far.
fn told(bench: &Bench, subscription: u64) -> Vec<Events> {
    let events = lock(&bench.wire.events);
    events.iter().filter(|events| events.subscription == subscription).cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_beginning_of_a_turn_is_told_to_those_who_watch_all_of_it() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Action, gate.clone()));
    let model = Arc::new(Scripted { held, ..Scripted::new() });
    let bench = bench(model.clone()).await;
    for (subscription, mode) in [(7, WatchMode::All), (8, WatchMode::All), (9, WatchMode::End)] {
        let submit = call(A, "text", &format!("k{subscription}"));
        let submit = SubmitCall { subscription, mode: mode.into(), ..submit };
        bench.submit_with(submit).await.unwrap();
    }
    bench.eventually("the first step runs", async || model.calls(Phase::Action) == 1).await;
    let began = |subscription| {
        let told = told(&bench, subscription);
        told.iter().map(|events| events.began_ms != 0).collect::<Vec<_>>()
    };
    assert_eq!(began(7), [false, true], "the acceptance, and that its turn began");
    assert_eq!(began(8), [false], "it waits for its turn");
    gate.add_permits(100);
    let is_over = |subscription| told(&bench, subscription).iter().any(|one| one.ended.is_some());
    bench.eventually("all have ended", async || [7, 8, 9].into_iter().all(is_over)).await;
    for subscription in [7, 8] {
        let began = began(subscription);
        assert!(began[1] && began.iter().filter(|began| **began).count() == 1, "{began:?}");
    }
    assert_eq!(began(9), [false], "who wants the end is told the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_stands_no_further_than_what_is_in_it() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Action, gate.clone()));
    let bench = bench(Arc::new(Scripted { held, ..Scripted::new() })).await;
    let submitted = async |agent: &str| {
        let bytes = bench.call(kind::SUBMIT, &call(agent, "text", "k")).await.unwrap();
        let answer = SubmitAnswer::decode(bytes).unwrap();
        (answer.work.unwrap().lsn, answer.epoch, answer.lsn)
    };
    let shown = async |work: u64| {
        let bytes = bench.call(kind::GET, &GetCall { work, ..GetCall::default() }).await.unwrap();
        let answer = GetAnswer::decode(bytes).unwrap();
        (state(&answer.work.unwrap()), answer.epoch, answer.lsn)
    };
    let (first, epoch, lsn) = submitted(A).await;
    assert_eq!((epoch, lsn), (bench.epoch, first));
    let (other, ..) = submitted("acme/postchain/b").await;
    assert!(first < other, "the shard is further than the first agent");
    assert_eq!(shown(first).await, (WorkState::Running, bench.epoch, first));
    assert_eq!(submitted(A).await, (first, bench.epoch, first), "the acceptance does not age");
    gate.add_permits(100);
    bench.ended(first).await;
    let end = bench.log().await.iter().rfind(|row| row.work == first).unwrap().lsn;
    let (state, _, lsn) = shown(first).await;
    assert!(state == WorkState::Succeeded && end <= lsn, "{lsn} is before its end {end}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_without_room_for_entries_refuses_works_at_once_and_keeps_nothing_of_them() {
    let config = Config { waiting_entries_max: 0, queued_bytes_max: 16, ..Config::default() };
    let bench = bench_with(Arc::new(Scripted::new()), config, &Phase::ALL).await;
    // More than the queue of the agent and the room for inputs could hold.
    for n in 0..2 * domain::agent::QUEUE_MAX {
        let refused = bench.submit(A, "text", &format!("k{n}")).await.unwrap_err();
        assert_eq!(reason(refused.reason), Reason::Overloaded, "{}", refused.message);
        assert_ne!(refused.retry_after_ms, 0);
    }
    assert_eq!(bench.log().await.len(), 1, "the shard was opened, and nothing else");
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_of_works_that_have_not_ended_take_room_on_whatever_node_owns_them() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Action, gate.clone()));
    let config = Config { queued_bytes_max: 10, ..Config::default() };
    let model = Arc::new(Scripted { held, ..Scripted::new() });
    let mut bench = bench_with(model.clone(), config, &Phase::ALL).await;
    let first = bench.submit(A, "seven b", "k").await.unwrap().lsn;
    let is_full = async |bench: &Bench| {
        let refused = bench.submit("acme/postchain/b", "seven b", "k").await.unwrap_err();
        assert_eq!(reason(refused.reason), Reason::NodeFull, "{}", refused.message);
    };
    is_full(&bench).await;
    bench.own().await;
    let call = AgentsCall { agent: A.into(), ..AgentsCall::default() };
    bench
        .eventually("it is in memory again", async || {
            let bytes = bench.call(kind::AGENTS, &call).await.unwrap();
            AgentsAnswer::decode(bytes).unwrap().agents[0].open_works == 1
        })
        .await;
    is_full(&bench).await;
    gate.add_permits(100);
    bench.ended(first).await;
    let second = bench.submit("acme/postchain/b", "seven b", "k").await.unwrap().lsn;
    assert_eq!(state(&bench.ended(second).await), WorkState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_work_that_was_refused_for_want_of_room_leaves_no_gap() {
    let config = Config { waiting_entries_max: 3, ..Config::default() };
    let bench = bench_with(Arc::new(Scripted::new()), config, &Phase::ALL).await;
    let submit = async |agent: usize, n: usize| {
        loop {
            match bench.submit(&format!("acme/postchain/{agent}"), "text", &n.to_string()).await {
                Ok(answer) => return answer.lsn,
                Err(refused) => assert_eq!(reason(refused.reason), Reason::Overloaded),
            }
        }
    };
    let submits = (0..16).map(|n| submit(n % 8, n));
    for work in futures::future::join_all(submits).await {
        assert_eq!(state(&bench.ended(work).await), WorkState::Succeeded);
    }
    let mut numbers: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for row in bench.log().await.iter().filter(|row| row.agent != 0) {
        numbers.entry(row.agent).or_default().push(row.seq);
    }
    assert_eq!(numbers.len(), 8);
    for numbers in numbers.values() {
        assert_eq!(*numbers, (1..=16).collect::<Vec<u64>>(), "two works of eight entries each");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_does_not_end_its_job_is_replaced() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Some((Phase::Action, gate.clone()));
    let model = Arc::new(Scripted { held, ..Scripted::new() });
    let phases = PhasesConfig { workers: 1, stuck_ms: 200, ..PhasesConfig::default() };
    let bench = bench_of(model.clone(), Config::default(), phases).await;
    bench.submit(A, "text", "k").await.unwrap();
    bench.submit("acme/postchain/b", "text", "k").await.unwrap();
    bench.eventually("the only worker is stuck", async || 1 <= model.calls(Phase::Action)).await;
    bench.eventually("another takes the next job", async || 2 <= model.calls(Phase::Action)).await;
    assert_eq!(gate.available_permits(), 0, "nobody was let go");
    gate.add_permits(1_000);
}
