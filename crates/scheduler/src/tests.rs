mod belonging;
mod replicas;
mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use cluster::{LinkEvent, Peer};
use domain::{Definition, DefinitionHash, Incarnation, Member, Reason, Role, ShardId};
use prost::Message as _;
use proto::kind;
use proto::link::read_control::Read;
use proto::link::{DefinitionRequest, DefinitionResponse, Envelope, Held, ReadControl, ReadShards};
use store::Store as _;

use crate::shared::envelope;
use crate::{Config, Error, Handle, Query};
use world::{Node, SHARDS, World, ask, eventually, name};

/// Beats of all nodes until `condition` gives something: a node that is silent is dead after two seconds.
async fn while_beating<T>(
    leader: &Handle,
    nodes: &[&Node],
    what: &str,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> T {
    eventually(what, async || {
        nodes.iter().for_each(|node| node.beat(leader));
        condition().await
    })
    .await
}

async fn state_of(leader: &Handle, node: &str) -> Option<(String, String)> {
    let nodes = leader.nodes().await;
    nodes.into_iter().find(|found| found.name == node).map(|found| (found.state, found.reason))
}

fn reason(reason: Reason) -> u32 {
    reason.code().into()
}

#[tokio::test]
async fn the_first_leader_makes_the_cluster_and_its_shards() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    assert_eq!(leader.leader().0, "control-1");
    assert_eq!(leader.beat_answer().0, Some(name("control-1")));
    let id = leader.cluster_id().unwrap();
    assert!(id.as_str().starts_with("c-") && id.as_str().len() == 18, "{id}");
    let read = ReadControl { read: Some(Read::Shards(ReadShards {})) };
    let shards = world.store.read_control(&read).await.unwrap().shards;
    assert_eq!(shards.len(), usize::from(SHARDS));
    assert_eq!((shards[3].store.as_str(), shards[3].database.as_str()), ("main", "shard-3"));
    assert!(world.owners().await.iter().all(|owner| owner.epoch == 0 && owner.node.is_empty()));
    assert_eq!(leader.shards().await.unwrap().len(), usize::from(SHARDS));
    assert_eq!(leader.view().unwrap().members.len(), 1);
    let store = leader.store_check().await;
    assert!(store.reachable && store.durability == "full", "{store:?}");
    leader.shutdown().await;
}

#[tokio::test]
async fn every_shard_is_granted_once_and_evenly() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let nodes = world.three_nodes(&leader).await;
    for node in &nodes {
        let notes = node.played.notes();
        let mut granted: Vec<u32> = notes.grants.iter().map(|grant| grant.shard).collect();
        granted.sort_unstable();
        granted.dedup();
        assert_eq!((granted.len(), notes.held.len()), (4, 4), "{}", node.name);
        assert!(notes.grants.iter().all(|grant| grant.epoch == 1 && grant.store == "main"));
    }
    assert!(world.owners().await.iter().all(|owner| owner.epoch == 1));
    let shards = leader.shards().await.unwrap();
    assert!(shards.iter().all(|shard| shard.state == "open" && shard.reason == "shard_opened"));
    leader.shutdown().await;
}

#[tokio::test]
async fn members_follow_the_view_by_deltas() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let nodes = world.three_nodes(&leader).await;
    eventually("every member has the leader's view", async || {
        let view = leader.view()?;
        nodes.iter().all(|node| node.played.notes().view.as_ref() == Some(&*view)).then_some(())
    })
    .await;
    let wanted =
        ask(&leader, nodes[0].peer(), Envelope { kind: kind::VIEW_WANTED, ..Envelope::default() });
    let whole = proto::link::View::decode(wanted.await.unwrap()).unwrap();
    assert_eq!((whole.base, whole.shards.len(), whole.members.len()), (0, 12, 4));
    leader.shutdown().await;
}

#[tokio::test]
async fn a_grant_is_repeated_until_it_is_held() {
    let world = World::new();
    let config = Config { shards: 1, nodes_expected: 1, tick_ms: 10, ..Config::default() };
    let leader = world.scheduler_with("control-1", config).await;
    let node = world.node("node-1").await;
    node.played.notes().ignores = 3;
    node.join(&leader).await.unwrap();
    while_beating(&leader, &[&node], "the shard is open", async || {
        leader.view()?.shards[&ShardId(0)].open.then_some(())
    })
    .await;
    assert!(node.played.notes().grants.iter().all(|grant| grant.epoch == 1));
    assert!(4 <= node.played.notes().grants.len());
    leader.shutdown().await;
}

/// A new owner asks whoever is in its view for the steps of its shard, and waits for them.
#[tokio::test]
async fn who_is_dead_is_told_before_what_it_had_is_granted() {
    let world = World::new();
    let (settle_ms, coalesce_ms) = (20_000, 1_000);
    let config = Config {
        shards: 12,
        nodes_expected: 3,
        settle_ms,
        coalesce_ms,
        tick_ms: 10,
        ..Config::default()
    };
    let leader = world.scheduler_with("control-1", config).await;
    eventually("it leads", async || leader.is_leading().then_some(())).await;
    let [dead, ann, bob] = world.three_nodes(&leader).await;
    let lost = dead.name.clone();
    dead.die(&leader);
    while_beating(&leader, &[&ann, &bob], "its shards are owned by others", async || {
        world.owners().await.iter().all(|owner| owner.node != lost.as_str()).then_some(())
    })
    .await;
    let again = |node: &Node| {
        let notes = node.played.notes();
        let grants = notes.grants.iter().zip(&notes.members);
        grants
            .filter(|(grant, _)| grant.epoch == 2)
            .map(|(_, members)| members.clone())
            .collect::<Vec<_>>()
    };
    let again = || -> Vec<Vec<_>> { [again(&ann), again(&bob)].concat() };
    while_beating(&leader, &[&ann, &bob], "all are granted", async || {
        (4 <= again().len()).then_some(())
    })
    .await;
    let again = again();
    assert!(
        again.iter().all(|members| !members.is_empty() && !members.contains(&lost)),
        "{again:?}"
    );
    leader.shutdown().await;
}

#[tokio::test]
async fn the_shards_of_a_dead_node_are_fenced_and_go_elsewhere() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let [dead, ann, bob] = world.three_nodes(&leader).await;
    let (lost, played): (Vec<u32>, _) =
        (dead.played.notes().held.keys().copied().collect(), dead.played.clone());
    dead.die(&leader);
    while_beating(&leader, &[&ann, &bob], "its shards are open elsewhere", async || {
        let view = leader.view()?;
        let is_open = |shard: &u32| {
            let place = &view.shards[&ShardId(*shard)];
            place.open && place.epoch.0 == 2
        };
        lost.iter().all(is_open).then_some(())
    })
    .await;
    for (shard, owner) in world.owners().await.iter().enumerate() {
        let was_lost = lost.contains(&u32::try_from(shard).unwrap());
        assert_eq!(owner.epoch, if was_lost { 2 } else { 1 });
        assert_ne!(owner.node, "node-1");
    }
    assert_eq!(state_of(&leader, "node-1").await, Some(("dead".into(), "port_refused".into())));
    assert!(!leader.view().unwrap().members.contains_key(&name("node-1")));
    assert!(played.notes().is_forgotten);
    assert_explained(&leader, lost[0]).await;

    let old = world.node_run("node-1", 1).await;
    assert_eq!(old.join(&leader).await.unwrap_err().reason, reason(Reason::Replaced));
    let new = world.node_run("node-1", 2).await;
    new.join(&leader).await.unwrap();
    leader.shutdown().await;
}

#[tokio::test]
async fn a_node_whose_run_is_over_is_told_after_which_it_may_come_back() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    world.node_run("node-1", 7).await.join(&leader).await.unwrap();
    let older = world.node_run("node-1", 3).await.join(&leader).await.unwrap_err();
    assert_eq!((older.reason, older.moved_epoch), (reason(Reason::Replaced), 7));
    world.node_run("node-1", older.moved_epoch + 1).await.join(&leader).await.unwrap();
    eventually("it is declared dead", async || {
        (state_of(&leader, "node-1").await?.0 == "dead").then_some(())
    })
    .await;
    let dead = world.node_run("node-1", 8).await.join(&leader).await.unwrap_err();
    assert_eq!((dead.reason, dead.moved_epoch), (reason(Reason::Replaced), 8));
    world.node_run("node-1", dead.moved_epoch + 1).await.join(&leader).await.unwrap();
    assert_eq!(state_of(&leader, "node-1").await.unwrap().0, "alive");
    leader.shutdown().await;
}

#[tokio::test]
async fn a_database_of_a_newer_version_ends_the_scheduler() {
    for database in ["shard-3", "control"] {
        let world = World::new();
        let leader = world.leader("control-1").await;
        leader.shutdown().await;
        let world = world.with_newer(database).await;
        let older = world.scheduler("control-2").await;
        let ended = tokio::time::timeout(Duration::from_secs(30), older.stopped()).await;
        let why = ended.expect("it goes on with a newer database").unwrap();
        assert!(why.contains("newer version"), "{database}: {why}");
        assert!(!older.is_leading());
    }
}

async fn assert_explained(leader: &Handle, shard: u32) {
    let shard = shard.to_string();
    let explained = eventually("the transitions are written", async || {
        let explained = leader.explain("shard", &shard).await.unwrap();
        (explained.transitions.len() == 4).then_some(explained)
    })
    .await;
    let (transitions, placement) = (explained.transitions, explained.placement);
    let steps: Vec<(&str, &str, u64)> =
        transitions.iter().map(|t| (t.from.as_str(), t.to.as_str(), t.epoch)).collect();
    assert_eq!(
        steps[..3],
        [("unowned", "granted", 1), ("granted", "open", 1), ("open", "granted", 2)]
    );
    assert_eq!(transitions[2].reason, reason(Reason::OwnerDied));
    assert!(
        transitions[2].cause.contains("node-1#1 dead port_refused"),
        "{}",
        transitions[2].cause
    );
    assert!(placement[0].contains("stays where it is") && placement.len() == 3, "{placement:?}");
    let node = leader.explain("node", "node-1").await.unwrap().transitions;
    let states: Vec<&str> = node.iter().map(|t| t.to.as_str()).collect();
    assert_eq!(states, ["alive", "suspect", "dead"]);
    assert!(matches!(leader.explain("work", "w-0-000-1").await, Err(Error::UnknownKind { .. })));
    assert!(matches!(leader.explain("node", "nobody").await, Err(Error::UnknownSubject { .. })));
}

#[tokio::test]
async fn a_node_that_falls_silent_is_dead_even_if_its_port_is_open() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let [silent, ann, bob] = world.three_nodes(&leader).await;
    while_beating(&leader, &[&ann, &bob], "the silent one is dead", async || {
        (state_of(&leader, "node-1").await?.1 == "silent").then_some(())
    })
    .await;
    drop(silent);
    leader.shutdown().await;
}

#[tokio::test]
async fn a_standby_takes_over_and_leaves_healthy_owners_alone() {
    let world = World::new();
    let first = world.leader("control-1").await;
    let nodes = world.three_nodes(&first).await;
    let second = world.scheduler("control-2").await;
    eventually("the standby knows the leader", async || {
        (second.leader().0 == "control-1").then_some(())
    })
    .await;
    let refusal = nodes[0].join(&second).await.unwrap_err();
    assert_eq!((refusal.reason, refusal.moved_node.as_str()), (reason(Reason::Moved), "control-1"));
    first.inbox.kill();
    world.links.controls().remove(&name("control-1"));
    eventually("the standby leads", async || second.is_leading().then_some(())).await;
    assert_eq!((second.leader().0.as_str(), second.leader().1.0), ("control-2", 2));
    assert_eq!(second.cluster_id(), first.cluster_id());
    let before = second.view().unwrap();
    assert_eq!(before.members.len(), 4, "the members of the leader before are awaited");
    for node in &nodes {
        node.join(&second).await.unwrap();
    }
    let all: Vec<&Node> = nodes.iter().collect();
    while_beating(&second, &all, "every shard is open again", async || {
        second.view()?.shards.values().all(|place| place.open).then_some(())
    })
    .await;
    assert!(world.owners().await.iter().all(|owner| owner.epoch == 1 && owner.term == 1));
    let last = eventually("the opening is written down", async || {
        let transitions = second.explain("shard", "0").await.unwrap().transitions;
        transitions.last().filter(|last| last.term == 2).cloned()
    })
    .await;
    assert!(last.cause.starts_with("read by a new leader"), "{}", last.cause);
    second.shutdown().await;
}

#[tokio::test]
async fn a_new_leader_tells_those_it_awaits_that_its_term_began() {
    let world = World::new();
    let first = world.leader("control-1").await;
    let nodes = world.three_nodes(&first).await;
    first.inbox.kill();
    let second = world.leader("control-2").await;
    eventually("every node has a view of the new term", async || {
        let term = |node: &Node| node.played.notes().view.as_ref().map(|view| view.version.term.0);
        nodes.iter().all(|node| term(node) == Some(2)).then_some(())
    })
    .await;
    second.shutdown().await;
}

#[tokio::test]
async fn a_node_that_beats_and_is_no_member_is_told_so() {
    let world = World::new();
    let config = Config { shards: 1, nodes_expected: 1, tick_ms: 10, ..Config::default() };
    let leader = world.scheduler_with("control-1", config).await;
    let node = world.node("node-1").await;
    node.join(&leader).await.unwrap();
    let member = Member { name: node.name.clone(), incarnation: Incarnation(1) };
    let is_live = || node.played.notes().view.as_ref().is_some_and(|view| view.is_live(&member));
    eventually("it is declared dead", async || {
        (state_of(&leader, "node-1").await?.0 == "dead").then_some(())
    })
    .await;
    assert!(is_live(), "it does not know");
    while_beating(&leader, &[&node], "it knows", async || (!is_live()).then_some(())).await;
    leader.shutdown().await;
}

#[tokio::test]
async fn a_node_that_comes_back_as_a_new_run_over_its_old_link_gets_shards() {
    let world = World::new();
    let config = Config { shards: 1, nodes_expected: 1, tick_ms: 10, ..Config::default() };
    let leader = world.scheduler_with("control-1", config).await;
    let mut node = world.node("node-1").await;
    leader.link(LinkEvent::Up { peer: node.peer(), incarnation: Incarnation(1) });
    node.join(&leader).await.unwrap();
    eventually("it is declared dead", async || {
        (state_of(&leader, "node-1").await?.0 == "dead").then_some(())
    })
    .await;
    node.incarnation = 2;
    node.played.notes().held.clear();
    node.join(&leader).await.unwrap();
    while_beating(&leader, &[&node], "the shard is open again", async || {
        let view = leader.view()?;
        let place = &view.shards[&ShardId(0)];
        let owner = place.owner.as_ref()?;
        (place.open && owner.incarnation == Incarnation(2)).then_some(())
    })
    .await;
    leader.shutdown().await;
}

#[tokio::test]
async fn whom_a_new_leader_awaits_in_vain_is_dead() {
    let world = World::new();
    let first = world.leader("control-1").await;
    let [_gone, ann, bob] = world.three_nodes(&first).await;
    first.shutdown().await;
    let config = Config { nodes_expected: 3, settle_ms: 3_000, tick_ms: 10, ..Config::default() };
    let second = world.scheduler_with("control-2", config).await;
    eventually("the second leads", async || second.is_leading().then_some(())).await;
    for node in [&ann, &bob] {
        node.join(&second).await.unwrap();
    }
    while_beating(&second, &[&ann, &bob], "its shards are elsewhere", async || {
        let owners = world.owners().await;
        owners.iter().all(|owner| owner.node != "node-1").then_some(())
    })
    .await;
    while_beating(&second, &[&ann, &bob], "it is known to be dead", async || {
        let state = state_of(&second, "node-1").await?;
        (state == ("dead".into(), "silent".into())).then_some(())
    })
    .await;
    second.shutdown().await;
}

/// Its links to the new leader may not work yet: it is one of the nodes as long as it beats.
#[tokio::test]
async fn who_beats_and_comes_late_to_a_new_leader_keeps_what_it_has() {
    let world = World::new();
    let first = world.leader("control-1").await;
    let [gone, ann, bob] = world.three_nodes(&first).await;
    let before = world.owners().await;
    first.shutdown().await;
    let config = Config { nodes_expected: 3, settle_ms: 100, tick_ms: 10, ..Config::default() };
    let second = world.scheduler_with("control-2", config).await;
    eventually("the second leads", async || second.is_leading().then_some(())).await;
    let late = [&ann, &bob];
    // By then nobody is waited for any more.
    while_beating(&second, &late, "who is silent is dead", async || {
        let state = state_of(&second, gone.name.as_str()).await?;
        (state == ("dead".into(), "silent".into())).then_some(())
    })
    .await;
    for node in late {
        node.join(&second).await.unwrap();
        assert_eq!(state_of(&second, node.name.as_str()).await.unwrap().0, "alive");
    }
    assert!([&gone, &ann, &bob].iter().all(|node| node.played.notes().empty_views == 0));
    while_beating(&second, &late, "the dead one's shards are elsewhere", async || {
        let owners = world.owners().await;
        owners.iter().all(|owner| owner.node != gone.name.as_str()).then_some(())
    })
    .await;
    let kept = before.iter().zip(world.owners().await);
    for (before, after) in kept.filter(|(before, _)| before.node != gone.name.as_str()) {
        assert_eq!(before, &after, "who lives keeps what it has");
    }
    second.shutdown().await;
}

#[tokio::test]
async fn a_clean_shutdown_hands_over_at_once() {
    let world = World::new();
    let first = world.leader("control-1").await;
    first.shutdown().await;
    assert_eq!(first.stopped().await, None);
    let second = world.leader("control-2").await;
    assert_eq!(second.leader().1.0, 2);
    let first = second.explain("leader", "control-1").await.unwrap().transitions;
    assert_eq!(first[0].to, "leader");
    second.shutdown().await;
}

#[tokio::test]
async fn a_leader_without_its_store_stops_acting_and_says_so() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    assert!(leader.store_check().await.reachable);
    let nodes = world.three_nodes(&leader).await;
    world.store.close().await;
    eventually("it does not lead", async || (!leader.is_leading()).then_some(())).await;
    assert_eq!(leader.beat_answer().0, None);
    let (known, shards) = (leader.nodes().await, leader.shards().await.unwrap());
    assert_eq!((known.len(), shards.len()), (nodes.len(), usize::from(SHARDS)));
    assert!(shards.iter().all(|shard| shard.state == "open"), "as it last led them");
    let check = leader.store_check().await;
    assert!(!check.reachable && check.durability == "full", "{check:?}");
    leader.shutdown().await;
}

#[tokio::test]
async fn a_node_speaks_for_itself_only() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let node = world.node("node-1").await;
    let join = || envelope(kind::JOIN, &node.join_request());
    for (role, other) in [(Role::Node, "node-2"), (Role::Control, "node-1")] {
        let refusal = ask(&leader, Peer::new(role, name(other)), join()).await.unwrap_err();
        assert_eq!(refusal.reason, reason(Reason::NotAuthorised));
    }
    let refusal =
        ask(&leader, node.peer(), envelope(kind::DROPPED, &Held::default())).await.unwrap_err();
    assert_eq!(refusal.reason, reason(Reason::NotAuthorised));
    let refusal = ask(&leader, node.peer(), envelope(kind::SUBMIT, &())).await.unwrap_err();
    assert_eq!(refusal.reason, reason(Reason::Malformed));
    let damaged = Envelope { kind: kind::JOIN, payload: "\u{7f}".into(), ..Envelope::default() };
    assert_eq!(
        ask(&leader, node.peer(), damaged).await.unwrap_err().reason,
        reason(Reason::Malformed)
    );
    assert!(leader.nodes().await.is_empty());
    leader.shutdown().await;
}

#[tokio::test]
async fn a_shard_that_was_given_up_is_fenced_anew_unless_its_store_lost_commits() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let nodes = world.three_nodes(&leader).await;
    let node = &nodes[0];
    let shards: Vec<u32> = node.played.notes().held.keys().copied().collect();
    let drop_it = async |shard: u32, why: Option<Reason>| {
        let held = node.played.notes().held.remove(&shard).unwrap();
        let mut message = envelope(kind::DROPPED, &held);
        message.step = why.map_or(0, reason);
        ask(&leader, node.peer(), message).await.unwrap();
    };
    drop_it(shards[0], None).await;
    drop_it(shards[1], Some(Reason::StoreRolledBack)).await;
    let all: Vec<&Node> = nodes.iter().collect();
    while_beating(&leader, &all, "it is open again", async || {
        let view = leader.view()?;
        let place = &view.shards[&ShardId(shards[0])];
        (place.open && place.epoch.0 == 2).then_some(())
    })
    .await;
    let stopped = |shard: u32| {
        let place = leader.view().unwrap().shards[&ShardId(shard)].clone();
        (place.stopped, place.open, place.epoch.0)
    };
    assert_eq!(stopped(shards[1]), (true, false, 1));
    // Where that word got lost, the beats say so.
    {
        let mut notes = node.played.notes();
        let held = notes.held.remove(&shards[2]).unwrap();
        notes.rolled_back.push(Held { open: false, ..held });
    }
    node.beat(&leader);
    eventually("it is stopped, too", async || {
        nodes.iter().for_each(|node| node.beat(&leader));
        (stopped(shards[2]) == (true, false, 1)).then_some(())
    })
    .await;
    leader.shutdown().await;
}

#[tokio::test]
async fn offers_are_found_with_their_load() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let nodes = world.three_nodes(&leader).await;
    let query = Query { name: "phase/*".into(), ..Query::default() };
    let all: Vec<&Node> = nodes.iter().collect();
    let found = while_beating(&leader, &all, "the loads are known", async || {
        let found = leader.find(query.clone()).await.unwrap();
        found.iter().all(|offer| offer.load == 3).then_some(found)
    })
    .await;
    let by_node: BTreeMap<&str, i32> =
        found.iter().map(|offer| (offer.node.as_str(), offer.capacity)).collect();
    assert_eq!(by_node, BTreeMap::from([("node-1", 4), ("node-2", 4), ("node-3", 4)]));
    leader.shutdown().await;
}

fn support(instructions: &str) -> Definition {
    Definition {
        name: "support".parse().unwrap(),
        instructions: instructions.to_owned(),
        ..Definition::postchain()
    }
}

#[tokio::test]
async fn the_same_definition_again_changes_nothing() {
    let world = World::new();
    let leader = world.leader("control-1").await;
    let tenant = || "acme".parse().unwrap();
    let apply = async |definition| {
        leader.apply_definition("ann".to_owned(), tenant(), definition).await.unwrap()
    };
    let first = apply(support("be kind")).await;
    assert_eq!(apply(support("be kind")).await, first);
    let second = apply(support("be brief")).await;
    assert_ne!(second.hash, first.hash);
    assert_eq!(apply(support("be kind")).await.hash, first.hash);
    let read =
        async |hash| leader.definition(tenant(), "support".parse().unwrap(), hash).await.unwrap();
    assert_eq!(read(None).await.unwrap().hash, first.hash);
    let hash = DefinitionHash::try_from(&second.hash[..]).unwrap();
    assert_eq!(read(Some(hash)).await.unwrap().body, second.body);
    assert_eq!(read(Some(DefinitionHash([9; 32]))).await, None);

    let refused = leader
        .apply_definition("ann".to_owned(), tenant(), Definition::postchain())
        .await
        .unwrap_err();
    assert!(matches!(refused, Error::BuiltIn { .. }), "{refused}");
    let names = async |after, limit| {
        let found = leader.definitions(tenant(), after, limit).await.unwrap();
        found.into_iter().map(|definition| definition.name).collect::<Vec<_>>()
    };
    assert_eq!(names("", 10).await, ["postchain", "support"]);
    assert_eq!(names("", 1).await, ["postchain"]);
    assert_eq!(names("postchain", 10).await, ["support"]);
    apply(Definition { name: "early".parse().unwrap(), ..support("x") }).await;
    assert_eq!(names("", 10).await, ["early", "postchain", "support"]);

    let body = async |hash: bytes::Bytes| {
        let message = envelope(kind::DEFINITION, &DefinitionRequest { hash });
        let answer = ask(&leader, Peer::new(Role::Node, name("node-1")), message).await;
        answer.map(|payload| DefinitionResponse::decode(payload).unwrap().body)
    };
    assert_eq!(body(second.hash.clone()).await.unwrap(), second.body);
    let (postchain, canonical) = proto::convert::canonical(&Definition::postchain());
    assert_eq!(body(postchain.as_bytes().to_vec().into()).await.unwrap(), canonical);
    assert_eq!(body(vec![9; 32].into()).await.unwrap_err().reason, reason(Reason::NotFound));
    leader.shutdown().await;
}
