//! Whose cluster a store has, who is told who leads, and what is written down of agents.

use std::time::Duration;

use domain::Reason;
use proto::kind;
use proto::link::AgentFailed;

use super::world::{World, ask, eventually};
use super::{reason, while_beating};
use crate::shared::envelope;
use crate::{Config, Handle};

fn config() -> Config {
    Config { tick_ms: 10, ..Config::default() }
}

/// Why it ended.
async fn end_of(scheduler: &Handle) -> String {
    let ended = tokio::time::timeout(Duration::from_secs(30), scheduler.stopped()).await;
    ended.expect("it goes on with the store of another cluster").unwrap()
}

#[tokio::test]
async fn a_second_cluster_cannot_form_on_the_same_store() {
    let world = World::new();
    let first = world.leader("control-1").await;
    let id = first.cluster_id().unwrap().to_string();
    let second = world.scheduler_of(&["theirs"], "control-2", config()).await;
    let why = end_of(&second).await;
    assert!(why.contains(&id) && why.contains("another authority"), "{why}");
    assert!(first.is_leading());
    first.shutdown().await;
    let second = world.scheduler_of(&["theirs"], "control-2", config()).await;
    end_of(&second).await;
    assert!(!second.is_leading(), "nor when nobody leads");
}

#[tokio::test]
async fn an_authority_is_replaced_by_way_of_both() {
    let world = World::new();
    world.leader("control-1").await.shutdown().await;
    for authorities in [&["ours", "new"][..], &["new"]] {
        let next = world.scheduler_of(authorities, "control-1", config()).await;
        eventually("it leads and has read its databases", async || next.view().map(drop)).await;
        next.shutdown().await;
    }
    end_of(&world.scheduler_of(&["ours"], "control-2", config()).await).await;
}

#[tokio::test]
async fn who_joins_a_replica_that_just_starts_is_told_who_leads() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let node = world.node("node-1").await;
    let standby = world.scheduler_with("control-2", config()).await;
    let refusal = node.join(&standby).await.unwrap_err();
    assert_eq!((refusal.reason, refusal.moved_node.as_str()), (reason(Reason::Moved), "control-1"));
    standby.shutdown().await;
    leader.shutdown().await;
}

#[tokio::test]
async fn what_becomes_of_an_agent_that_fails_is_written_down() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let nodes = world.three_nodes(&leader).await;
    let failed = |reason: Reason, failures| AgentFailed {
        agent: "acme/support/7".to_owned(),
        shard: 3,
        epoch: 1,
        reason: reason.code().into(),
        failures,
        detail: "it cannot be folded".to_owned(),
    };
    let tell =
        async |failed| ask(&leader, nodes[0].peer(), envelope(kind::AGENT_FAILED, &failed)).await;
    tell(failed(Reason::Restarted, 1)).await.unwrap();
    tell(failed(Reason::Quarantined, 6)).await.unwrap();
    let wrong = tell(failed(Reason::Idle, 1)).await.unwrap_err();
    assert_eq!(wrong.reason, reason(Reason::Malformed));
    let all: Vec<_> = nodes.iter().collect();
    let told = while_beating(&leader, &all, "both are written", async || {
        let told = leader.explain("agent", "acme/support/7").await.unwrap().transitions;
        (told.len() == 2).then_some(told)
    })
    .await;
    assert_eq!((told[0].to.as_str(), told[1].to.as_str()), ("restarting", "quarantined"));
    assert_eq!((told[1].reason, told[1].epoch), (reason(Reason::Quarantined), 1));
    assert!(told[1].node == "node-1" && told[1].cause.contains("cannot be folded"), "{told:?}");
    let none = leader.explain("agent", "acme/support/8").await.unwrap().transitions;
    assert!(none.is_empty());
    leader.shutdown().await;
}
