//! Processes that form a cluster: real sockets, certificates and signals.
//!
//! ractor's registries are process-wide, so one process is one member: the others are this test binary again, started
//! with a variable that makes its test `child` a member. The tests of this process take turns.
// What the tests share is no test, to clippy, and the line of a child is its answer.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use std::time::{Duration, Instant};

use cluster::{Config, Error};
use domain::{ErrorKind, Reason};
use support::*;

/// Makes this binary a member, and otherwise tests nothing.
#[test]
fn child() {
    support::child_main();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_go_both_ways_between_processes() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    let there =
        cluster.start("node/node-1", &["learn control/control-1", "keep control/control-1"], &here);
    here.eventually_linked(&there).await;
    assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
    // It asks back, and answers with what it got.
    assert_eq!(here.call(&there.peer, CALL_BACK, "back", SOON).await.unwrap(), "back");
    assert_eq!(here.events(), ["node/node-1#1 is up"]);
    let error = here.call(&there.peer, REFUSE, "", SOON).await.unwrap_err();
    let Error::Refused(refusal) = &error else { panic!("{error:?}") };
    assert_eq!(cluster::reason_of(refusal), Some(Reason::Moved));
    assert_eq!((refusal.moved_node.as_str(), error.kind()), ("node-7", ErrorKind::Fenced));
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_dials_a_peer_that_was_only_learned() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    let there = cluster.start("node/node-1", &[], &here);
    let unknown = here.echo(&there.peer).await.unwrap_err();
    assert!(matches!(unknown, Error::NoAddress { .. }), "{unknown}");
    here.learn(&there);
    assert!(!here.handle.is_linked(&there.peer));
    assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_peer_ends_its_calls_at_once_and_comes_back_under_its_name() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    for run in 0..3 {
        let mut there = cluster.start("node/node-1", &[], &here);
        here.learn(&there);
        assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
        let waiting = here.clone().spawn_call(&there.peer, NEVER);
        here.eventually_keeps(&there.peer, 1).await;
        there.kill();
        let error = waiting.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::PeerGone { .. }), "{error}");
        eventually("it is down", async || here.events().len() == 2 * (run + 1)).await;
    }
    let (up, down) = ("node/node-1#1 is up", "node/node-1 is down");
    assert_eq!(here.events(), [up, down, up, down, up, down]);
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_restarts_is_found_again_by_its_own_dial() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    for _ in 0..5 {
        let mut there = cluster.start(
            "node/node-1",
            &["learn control/control-1", "keep control/control-1"],
            &here,
        );
        // The end of the one before may not have been noticed yet: it answers nobody.
        eventually("the next one answers", async || {
            here.echo(&there.peer).await.is_ok_and(|it| it == "hello")
        })
        .await;
        there.kill();
    }
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_nobody_answers_ends_at_its_deadline() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    let there = cluster.start("node/node-1", &[], &here);
    here.learn(&there);
    assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
    let start = Instant::now();
    let limit = Duration::from_millis(100);
    let error = here.call(&there.peer, NEVER, "", limit).await.unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
    assert!(limit <= start.elapsed());
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_peer_overloads_at_once_and_its_link_ends_by_its_silence() {
    let cluster = Cluster::new().await;
    let config = Config { silence_timeout_ms: 1_500, ..Config::default() };
    let here = cluster.join("control/control-1", config).await;
    let there = cluster.start("node/node-1", &[], &here);
    here.learn(&there);
    assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
    let waiting = here.clone().spawn_call(&there.peer, NEVER);
    here.eventually_keeps(&there.peer, 1).await;
    there.signal("STOP");
    let refusal = loop {
        if let Err(refusal) = here.handle.cast(&there.peer, envelope(ECHO, "more")) {
            break refusal;
        }
    };
    assert!(matches!(refusal, Error::Overloaded { .. }), "{refusal}");
    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(error, Error::PeerGone { .. }), "{error}");
    there.signal("CONT");
    eventually("it is back", async || here.echo(&there.peer).await.is_ok()).await;
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_cannot_be_reached_is_said_to_be() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    let mut there = cluster.start("node/node-1", &[], &here);
    there.kill();
    here.learn(&there);
    let error = here.echo(&there.peer).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    here.handle.keep(there.peer.clone());
    let again = cluster.start_at("node/node-1", &[], &here, &there.address);
    here.eventually_linked(&again).await;
    here.handle.forget(again.peer.clone());
    eventually("it is forgotten", async || {
        matches!(here.echo(&again.peer).await, Err(Error::NoAddress { .. }))
    })
    .await;
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn if_both_dial_one_link_stays_and_no_call_is_lost() {
    let cluster = Cluster::new().await;
    // Once the smaller name is here, and once there.
    for me in ["control/control-1", "node/node-9"] {
        let here = cluster.join(me, Config::default()).await;
        for name in ["node/node-1", "node/node-2", "node/node-3"] {
            let mut there = cluster.start(name, &[&format!("learn {me}")], &here);
            here.learn(&there);
            there.tell(&format!("cast {me}"));
            assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
            eventually("its cast arrived", async || here.casts_of(&there.peer) == 1).await;
            assert_eq!(here.call(&there.peer, CALL_BACK, "back", SOON).await.unwrap(), "back");
            assert_eq!(here.events_of(&there.peer), [format!("{name}#1 is up")]);
        }
        here.leave().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_link_closes_and_comes_back_on_demand() {
    let cluster = Cluster::new().await;
    let config = Config { idle_timeout_ms: 10, ..Config::default() };
    let here = cluster.join("control/control-1", config).await;
    let there = cluster.start("node/node-1", &[], &here);
    here.learn(&there);
    for _ in 0..2 {
        assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
        eventually("it is closed", async || !here.handle.is_linked(&there.peer)).await;
    }
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_claims_the_name_of_another_is_refused_and_the_true_one_stays() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    let there = cluster.start("node/node-1", &[], &here);
    here.learn(&there);
    assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
    let before = refused("name_mismatch");
    let mut liar = cluster.dial("node/node-5", &here).await;
    say_name(&mut liar, "node/node-1@1-0").await;
    ends(liar).await;
    assert_eq!(refused("name_mismatch"), before + 1);
    assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
    assert_eq!(here.events(), ["node/node-1#1 is up"]);
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_cookie_is_refused_and_counted() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    let before = refused("wrong_cookie");
    let there = cluster.start(
        "node/node-1",
        &[
            "cookie not-the-cookie-of-this-cluster",
            "learn control/control-1",
            "keep control/control-1",
        ],
        &here,
    );
    eventually("it was counted", async || before < refused("wrong_cookie")).await;
    assert!(!here.handle.is_linked(&there.peer) && here.events().is_empty());
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stays_silent_after_its_name_is_ended_and_keeps_nobody_out() {
    let cluster = Cluster::new().await;
    let config = Config { session_timeout_ms: 500, ..Config::default() };
    let here = cluster.join("control/control-1", config).await;
    let before = refused("handshake_timeout");
    let mut silent = cluster.dial("node/node-5", &here).await;
    let mute = cluster.dial("node/node-6", &here).await;
    say_name(&mut silent, "node/node-5@1-0").await;
    let there =
        cluster.start("node/node-1", &["learn control/control-1", "keep control/control-1"], &here);
    here.eventually_linked(&there).await;
    ends(silent).await;
    // At least: on a busy machine an honest one may be too slow at first.
    assert!(before < refused("handshake_timeout"));
    drop(mute);
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_calls_at_once_are_all_answered() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    let there = cluster.start("node/node-1", &[], &here);
    here.learn(&there);
    let callers: Vec<_> = (0..512)
        .map(|_| {
            let (here, peer) = (here.clone(), there.peer.clone());
            tokio::spawn(async move {
                for _ in 0..20 {
                    assert_eq!(here.echo(&peer).await.unwrap(), "hello");
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    here.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_before_shutdown_arrives_and_nothing_is_left() {
    let cluster = Cluster::new().await;
    let here = cluster.join("control/control-1", Config::default()).await;
    let there = cluster.start("node/node-1", &[], &here);
    here.learn(&there);
    assert_eq!(here.echo(&there.peer).await.unwrap(), "hello");
    for _ in 0..500 {
        here.handle.cast(&there.peer, envelope(ECHO, "last words")).unwrap();
    }
    here.handle.shutdown().await;
    here.handle.ended().await;
    let error = here.echo(&there.peer).await.unwrap_err();
    assert!(matches!(error, Error::Closed), "{error}");
    assert_eq!(here.events(), ["node/node-1#1 is up", "node/node-1 is down"]);
    eventually("no task is left", async || {
        tokio::runtime::Handle::current().metrics().num_alive_tasks() == 0
    })
    .await;
    // Another run of this process asks what became of them.
    let again = cluster.join("control/control-2", Config::default()).await;
    again.learn(&there);
    assert_eq!(again.call(&there.peer, COUNT_CASTS, "", SOON).await.unwrap(), "500");
    again.leave().await;
}
