//! Several control replicas: who stands by serves as well, and leadership goes to whoever hears the nodes.

use domain::{Reason, Role};

use super::world::{Node, World, eventually, name};
use super::{Peer, kind, support, while_beating};
use crate::shared::envelope;
use crate::{Admit, Error, Query};

/// A leader with three nodes, and a replica that stands by and has its view.
async fn pair(world: &World) -> (crate::Handle, crate::Handle, [Node; 3]) {
    let leader = world.leader("control-1").await;
    let standby = world.scheduler("control-2").await;
    let nodes = world.three_nodes(&leader).await;
    let all: Vec<&Node> = nodes.iter().collect();
    while_beating(&leader, &all, "the standby has the leader's view", async || {
        let (theirs, ours) = (leader.view()?, standby.view()?);
        (theirs == ours && ours.members.contains_key(&name("control-2"))).then_some(())
    })
    .await;
    (leader, standby, nodes)
}

/// The leader goes, and who stood by leads.
async fn hand_over(world: &World, leader: crate::Handle, standby: &crate::Handle) {
    leader.shutdown().await;
    world.links.controls().remove(&name("control-1"));
    eventually("the standby leads", async || standby.is_leading().then_some(())).await;
}

#[tokio::test]
async fn who_stands_by_serves_what_the_leader_knows() {
    let world = World::new();
    let (leader, standby, _nodes) = pair(&world).await;
    assert!(!standby.is_leading());
    assert_eq!(standby.leader(), leader.leader());
    assert_eq!(standby.nodes().await, leader.nodes().await);
    assert_eq!(standby.shards().await.unwrap(), leader.shards().await.unwrap());
    let offers = standby.find(Query::default()).await.unwrap();
    assert_eq!((offers.len(), &offers), (3, &leader.find(Query::default()).await.unwrap()));
    let placement = standby.explain("shard", "3").await.unwrap().placement;
    assert_eq!(placement.len(), 4);
    let applied = standby.apply_definition("ann".into(), "acme".parse().unwrap(), support("x"));
    assert_eq!(applied.await.unwrap().name, "support");
    leader.shutdown().await;
    standby.shutdown().await;
}

#[tokio::test]
async fn every_node_is_told_of_every_replica() {
    let world = World::new();
    let (leader, standby, nodes) = pair(&world).await;
    let welcome = nodes[0].join(&leader).await.unwrap();
    assert_eq!(welcome.beats, ["control-1:9", "control-2:9"]);
    standby.shutdown().await;
    leader.link(cluster::LinkEvent::Down { peer: Peer::new(Role::Control, name("control-2")) });
    let all: Vec<&Node> = nodes.iter().collect();
    while_beating(&leader, &all, "the replica is gone from the view", async || {
        (!leader.view()?.members.contains_key(&name("control-2"))).then_some(())
    })
    .await;
    leader.shutdown().await;
}

#[tokio::test]
async fn leadership_goes_to_the_replica_that_hears_more_nodes() {
    let world = World::new();
    let (leader, standby, [ann, bob, eve]) = pair(&world).await;
    // Two of three beat to the standby only; none of their shards may be fenced by the leader.
    eventually("the standby leads", async || {
        eve.beat(&leader);
        [&ann, &bob, &eve].into_iter().for_each(|node| node.beat(&standby));
        standby.is_leading().then_some(())
    })
    .await;
    assert!(!leader.is_leading());
    assert_eq!(standby.leader().0, "control-2");
    assert!(world.owners().await.iter().all(|owner| owner.epoch == 1), "nothing was fenced");
    let transitions = standby.explain("leader", "control-1").await.unwrap().transitions;
    let last = transitions.last().unwrap();
    assert_eq!((last.to.as_str(), last.reason), ("standby", Reason::HearsFewer.code().into()));
    leader.shutdown().await;
    standby.shutdown().await;
}

#[tokio::test]
async fn a_leader_that_hears_as_many_as_the_others_goes_on() {
    let world = World::new();
    let (leader, standby, [ann, bob, eve]) = pair(&world).await;
    ann.die(&leader);
    bob.die(&leader);
    while_beating(&leader, &[&eve], "all shards are at the last node", async || {
        eve.beat(&standby);
        let owners = world.owners().await;
        owners.iter().all(|owner| owner.node == "node-3").then_some(())
    })
    .await;
    assert!(leader.is_leading());
    leader.shutdown().await;
    standby.shutdown().await;
}

#[tokio::test]
async fn a_node_that_drains_gives_everything_away_and_offers_nothing() {
    let world = World::new();
    let (leader, standby, nodes) = pair(&world).await;
    let [ann, bob, eve] = &nodes;
    let node = standby.admit("ann".into(), name("node-1"), Admit::Drain).await.unwrap();
    assert_eq!(node.admission, "draining");
    assert!(ann.played.notes().is_wanted_to_drain);
    let all = [ann, bob, eve];
    while_beating(&leader, &all, "nothing is left at the node", async || {
        let view = leader.view()?;
        let is_away = |place: &domain::view::Place| {
            place.open && place.owner.as_ref().is_some_and(|owner| owner.name != ann.name)
        };
        (view.shards.values().all(is_away) && view.members[&ann.name].offers.is_empty())
            .then_some(())
    })
    .await;
    let answer = super::ask(&leader, ann.peer(), envelope(kind::DRAIN, &ann.join_request()));
    let answer = <proto::link::DrainAnswer as prost::Message>::decode(answer.await.unwrap());
    assert_eq!(answer.unwrap().targets, 2);
    let transitions = leader.explain("node", "node-1").await.unwrap().transitions;
    let last = transitions.last().unwrap();
    assert_eq!((last.to.as_str(), last.reason), ("draining", Reason::DrainRequested.code().into()));
    let moved = leader.shards().await.unwrap().into_iter().filter(|shard| shard.epoch == 2);
    assert_eq!(moved.count(), 4);
    leader.shutdown().await;
    standby.shutdown().await;
}

#[tokio::test]
async fn a_cordon_outlasts_the_leader_and_the_run_of_the_node() {
    let world = World::new();
    let (leader, standby, nodes) = pair(&world).await;
    let all: Vec<&Node> = nodes.iter().collect();
    leader.admit("ann".into(), name("node-1"), Admit::Cordon).await.unwrap();
    let unknown = leader.admit("ann".into(), name("node-9"), Admit::Cordon).await;
    assert!(matches!(unknown, Err(Error::UnknownSubject { .. })));
    while_beating(&leader, &all, "it is written down", async || {
        let transitions = leader.explain("node", "node-1").await.ok()?.transitions;
        (transitions.last()?.to == "cordoned").then_some(())
    })
    .await;
    hand_over(&world, leader, &standby).await;
    for node in &nodes {
        node.join(&standby).await.unwrap();
    }
    let admission = async || {
        let nodes = standby.nodes().await;
        nodes.into_iter().find(|node| node.name == "node-1").map(|node| node.admission)
    };
    assert_eq!(admission().await.as_deref(), Some("cordoned"));
    world.node_run("node-1", 2).await.join(&standby).await.unwrap();
    assert_eq!(admission().await.as_deref(), Some("cordoned"));
    standby.admit("ann".into(), name("node-1"), Admit::Uncordon).await.unwrap();
    assert_eq!(admission().await.as_deref(), Some(""));
    standby.shutdown().await;
}

#[tokio::test]
async fn whom_nobody_can_follow_yet_is_not_let_go_before_others_had_time_to_join() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let node = world.node_run("node-1", 1).await;
    let drain = || envelope(kind::DRAIN, &node.join_request());
    let reason = |refused: proto::link::Refusal| refused.reason;
    let refused = super::ask(&leader, node.peer(), drain()).await.map_err(reason);
    assert_eq!(refused, Err(Reason::NotFound.code().into()), "it has not joined");
    node.join(&leader).await.unwrap();
    let refused = super::ask(&leader, node.peer(), drain()).await.map_err(reason);
    assert_eq!(refused, Err(Reason::NoTarget.code().into()));
    leader.shutdown().await;
}

#[tokio::test]
async fn a_node_is_told_to_drain_until_it_says_that_it_does_also_by_the_next_leader() {
    let world = World::new();
    let (leader, standby, nodes) = pair(&world).await;
    let [ann, bob, eve] = &nodes;
    let is_told = || std::mem::take(&mut ann.played.notes().is_wanted_to_drain);
    leader.admit("ann".into(), name("node-1"), Admit::Drain).await.unwrap();
    assert!(is_told());
    let all = [ann, bob, eve];
    while_beating(&leader, &all, "it is told again", async || is_told().then_some(())).await;
    let cordon = leader.admit("ann".into(), name("node-1"), Admit::Uncordon).await;
    assert!(matches!(cordon, Err(Error::Draining { .. })), "{cordon:?}");
    while_beating(&leader, &all, "it is written down", async || {
        let transitions = leader.explain("node", "node-1").await.ok()?.transitions;
        (transitions.last()?.to == "draining").then_some(())
    })
    .await;
    hand_over(&world, leader, &standby).await;
    // The next leader knows it from the one before.
    is_told();
    while_beating(&standby, &all, "it is told", async || is_told().then_some(())).await;
    assert!(standby.view().unwrap().members[&ann.name].offers.is_empty());
    ann.join(&standby).await.unwrap();
    assert!(standby.view().unwrap().members[&ann.name].offers.is_empty());
    let drain = || envelope(kind::DRAIN, &ann.join_request());
    let answer = super::ask(&standby, ann.peer(), drain()).await.unwrap();
    let answer = <proto::link::DrainAnswer as prost::Message>::decode(answer).unwrap();
    assert_eq!(answer.targets, 2);
    standby.shutdown().await;
}

#[tokio::test]
async fn a_standby_says_how_many_nodes_it_hears() {
    let world = World::new();
    let (leader, standby, [ann, bob, _]) = pair(&world).await;
    let heard = async || {
        let from = Peer::new(Role::Control, name("control-1"));
        let answer = super::ask(&standby, from, envelope(kind::SIGHT, &())).await.unwrap();
        <proto::link::SightAnswer as prost::Message>::decode(answer).unwrap().nodes
    };
    ann.beat(&standby);
    bob.beat(&standby);
    eventually("both are counted", async || (heard().await == 2).then_some(())).await;
    eventually("who is silent is not counted", async || (heard().await == 0).then_some(())).await;
    leader.shutdown().await;
    standby.shutdown().await;
}
