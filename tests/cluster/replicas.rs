//! Several control replicas, and nodes that leave because they are asked to: who leads may change at any moment, and who
//! has an agent, too, and nobody notices but by latency.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proto::v1::open_response::Response;
use proto::v1::work_event::Event;
use proto::v1::{
    CordonRequest, DrainRequest, OpenWatch, Shard, StatusResponse, SubmitRequest, Transition,
    UncordonRequest, Work, WorkEvent,
};
use rustix::process::Signal;
use telemetry::fault::{LEADER_POINTS, VARIABLE};
use tests::harness::{
    Clients, Fault, Heard, Lateness, Load, Mesh, MeshOptions, PATIENCE, Port, eventually,
    eventually_true, placed_at_once,
};

use crate::{PROGRAM, until_not_too_busy};

/// For what a fault has held up, and its end.
const REST_MAX: Duration = Duration::from_secs(120);

/// A call that takes longer has failed its caller.
const LIMIT: Duration = Duration::from_secs(10);

fn start(options: &MeshOptions) -> (Mesh, Clients) {
    start_with(options, LIMIT)
}

fn start_with(options: &MeshOptions, limit: Duration) -> (Mesh, Clients) {
    let mesh = Mesh::start(PROGRAM, options);
    let load = Load { clients: 4, agents: 60, works_max: 8, limit, ..Load::default() };
    let clients = Clients::start(&mesh, &load);
    more_end(&clients, 30);
    (mesh, clients)
}

fn placed() -> MeshOptions {
    MeshOptions { env: vec![placed_at_once()], ..MeshOptions::default() }
}

fn replicas() -> MeshOptions {
    MeshOptions { controls: 3, ..MeshOptions::default() }
}

fn more_end(clients: &Clients, count: u64) {
    let before = clients.ended();
    eventually(REST_MAX, &format!("{count} more works end"), || match clients.ended() - before {
        ended if count <= ended => Ok(()),
        ended => Err(ended),
    });
}

fn status(mesh: &Mesh) -> StatusResponse {
    eventually(PATIENCE, "the status is told", || mesh.status())
}

fn leader(mesh: &Mesh) -> (String, i64) {
    let leader = status(mesh).leader.unwrap_or_default();
    (leader.name, leader.term)
}

/// Waits until another than `before` leads.
fn next_leader(mesh: &Mesh, before: &str) -> (String, i64) {
    eventually(PATIENCE, "another replica leads", || match leader(mesh) {
        (name, term) if !name.is_empty() && name != before => Ok((name, term)),
        (name, _) => Err(format!("{name:?}")),
    })
}

/// Of every shard; a replica that has not heard of a leader yet tells of none.
fn epochs(mesh: &Mesh) -> Vec<(i32, i64)> {
    let epochs = |status: StatusResponse| -> Vec<_> {
        status.shards.iter().map(|shard: &Shard| (shard.id, shard.epoch)).collect()
    };
    eventually(PATIENCE, "every shard is told", || match epochs(status(mesh)) {
        all if all.len() == 12 => Ok(all),
        some => Err(format!("{some:?}")),
    })
}

/// Whether a leader other than `victim` could not write its beats, or did not hear all nodes in time while this machine
/// itself was late: it is too busy for what the test shows. That nothing is lost is shown all the same.
///
/// # Panics
/// A node was declared dead, and the machine was not late.
fn is_too_busy(mesh: &Mesh, victim: &str, late: &Lateness) -> bool {
    let controls = mesh.names().into_iter().filter(|name| name.starts_with("control"));
    let logs: Vec<_> = controls.filter(|name| name != victim).map(|name| mesh.log(&name)).collect();
    let told = |what: &str| logs.iter().any(|log| log.contains(what));
    let (is_unwritten, is_dead) = (told("beat_unwritten"), told("node is dead"));
    let longest = late.longest();
    let is_late = is_unwritten || Duration::from_millis(250) <= longest;
    assert!(is_late || !is_dead, "a node was declared dead, with a machine late by {longest:?}");
    let is_busy = is_unwritten || is_dead;
    if is_busy {
        eprintln!(
            "the machine is too busy: it was late by {longest:?}, beats unwritten: {is_unwritten}"
        );
    }
    is_busy
}

/// Lets another lead until it is this one.
fn until_leads(mesh: &mut Mesh, wanted: &str) -> (String, i64) {
    loop {
        let (name, term) = leader(mesh);
        if name == wanted {
            return (name, term);
        }
        assert!(term < 20, "{name} leads in {term}");
        mesh.kill(&name);
        next_leader(mesh, &name);
        mesh.start_again(&name);
    }
}

/// Lets the load end; nothing was lost or repeated, and no call failed or took longer than its caller waits.
fn finish_without_an_error(mesh: &Mesh, clients: Clients) {
    let heard = clients.finish(mesh, REST_MAX);
    // What a node counted goes with it.
    mesh.assert_sound(&heard, false);
    assert_no_call_failed(&heard);
}

/// Submits by their outcome: all were accepted, each in time.
fn assert_no_call_failed(heard: &Heard) {
    let longest = heard.accepted_after.iter().max().copied().unwrap_or_default();
    eprintln!("accepted {}, the last after {longest:?}", heard.accepted_after.len());
    assert!(heard.errors.is_empty(), "{:?}", heard.errors);
    assert!(longest < LIMIT, "a submit was accepted after {longest:?}");
}

#[test]
fn a_killed_leader_costs_nothing_and_moves_nothing() {
    until_not_too_busy(killed_leader);
}

/// Whether the machine was too busy.
fn killed_leader() -> bool {
    let (mut mesh, clients) = start(&replicas());
    let late = Lateness::watch();
    let (first, term) = leader(&mesh);
    let before = epochs(&mesh);
    mesh.kill(&first);
    // Whoever stands by takes works, also while nobody leads.
    more_end(&clients, 20);
    let (second, later) = next_leader(&mesh, &first);
    assert!(term < later, "{first} in {term}, {second} in {later}");
    more_end(&clients, 20);
    let after = epochs(&mesh);
    assert!(after == before || is_too_busy(&mesh, &first, &late), "{after:?}: a shard was moved");
    mesh.start_again(&first);
    more_end(&clients, 20);
    let leads = next_leader(&mesh, "");
    assert!(leads == (second, later) || is_too_busy(&mesh, &first, &late), "{leads:?} came back");
    let heard = clients.finish(&mesh, REST_MAX);
    let last = epochs(&mesh);
    assert!(last == before || is_too_busy(&mesh, &first, &late), "{last:?}: a shard was moved");
    mesh.assert_sound(&heard, last == before);
    is_too_busy(&mesh, &first, &late)
}

#[test]
fn a_move_that_was_under_way_when_the_leader_died_is_finished_by_the_next_one() {
    for point in LEADER_POINTS {
        until_not_too_busy(|| interrupted_move(point));
    }
}

/// The leader dies at `point` of the first move away from a node that drains. Whether the machine was too busy.
fn interrupted_move(point: &str) -> bool {
    let plan = format!("control-*:{point}:13:kill");
    let env = vec![(VARIABLE.to_owned(), plan), placed_at_once()];
    let (mut mesh, clients) = start_with(&MeshOptions { env, ..replicas() }, Load::default().limit);
    let late = Lateness::watch();
    let request = DrainRequest { name: "node-2".to_owned() };
    // Whoever is asked may be the one that dies of it.
    _ = mesh.block_on(mesh.client().with_timeout(Duration::from_secs(5)).drain(request));
    let first = eventually(PATIENCE, &format!("a leader dies at {point}"), || {
        let dead = mesh.dead();
        let control = dead.iter().find(|name| name.starts_with("control"));
        control.cloned().ok_or_else(|| format!("{dead:?}"))
    });
    next_leader(&mesh, &first);
    assert_eq!(mesh.wait_until_over("node-2").code(), Some(0), "{}", mesh.log("node-2"));
    eventually(PATIENCE, "every shard is open elsewhere", || {
        let status = status(&mesh);
        let is_open = |shard: &&Shard| shard.state == "open" && shard.node != "node-2";
        let open = status.shards.iter().filter(is_open).count();
        if open == 12 { Ok(()) } else { Err(format!("{open} are")) }
    });
    // What was fenced is granted as it was fenced, not fenced once more.
    let twice: Vec<_> = epochs(&mesh).into_iter().filter(|(_, epoch)| 2 < *epoch).collect();
    let is_busy = Duration::from_millis(250) <= late.longest();
    assert!(twice.is_empty() || is_busy, "{point}: moved twice: {twice:?}");
    mesh.start_again("node-2");
    more_end(&clients, 20);
    let heard = clients.finish(&mesh, REST_MAX);
    mesh.assert_sound(&heard, false);
    is_busy
}

#[test]
fn what_a_leader_had_fenced_and_not_granted_the_next_one_grants() {
    // A leader that places all twelve shards dies at the next fence: of a shard that moves to a node that came late, or of
    // one whose node died.
    let fault = ("STAGEDOOR_FAULT_POINT".to_owned(), "control-*:leader-fenced:13:kill".to_owned());
    let options = MeshOptions { env: vec![fault], ..replicas() };
    let (mut mesh, clients) = start_with(&options, Load::default().limit);
    mesh.kill("node-2");
    let first = eventually(PATIENCE, "a leader dies between fence and grant", || {
        let dead = mesh.dead();
        let control = dead.iter().find(|name| name.starts_with("control"));
        control.cloned().ok_or_else(|| format!("{dead:?}"))
    });
    next_leader(&mesh, &first);
    eventually(PATIENCE, "every shard is open on a node that lives", || {
        let status = status(&mesh);
        let is_open = |shard: &&Shard| shard.state == "open" && shard.node != "node-2";
        let open = status.shards.iter().filter(is_open).count();
        if open == 12 { Ok(()) } else { Err(format!("{open} are")) }
    });
    more_end(&clients, 40);
    // Also what the dead leader did is told, though it could not write it down.
    for shard in status(&mesh).shards {
        let told = mesh.why("shard", &shard.id.to_string());
        let is_its = |one: &&Transition| one.to == "granted" && one.epoch == shard.epoch;
        let granted = told.iter().find(is_its).unwrap_or_else(|| panic!("{shard:?}: {told:?}"));
        assert_eq!(granted.node, shard.node);
    }
    mesh.start_again("node-2");
    let heard = clients.finish(&mesh, REST_MAX);
    mesh.assert_sound(&heard, false);
}

#[test]
fn a_leader_that_was_stopped_for_10_s_does_nothing_when_it_wakes() {
    until_not_too_busy(stopped_leader);
}

/// Whether the machine was too busy.
fn stopped_leader() -> bool {
    let (mut mesh, clients) = start(&replicas());
    let late = Lateness::watch();
    // Its links hold, and it answers nobody: whichever of the replicas it is, nodes do not wait for it to join the next.
    let (first, term) = until_leads(&mut mesh, "control-3");
    let before = epochs(&mesh);
    mesh.signal(&first, Signal::STOP);
    let stopped = Instant::now();
    let (second, later) = next_leader(&mesh, &first);
    assert!(term < later);
    let long = Duration::from_secs(10);
    eventually_true(PATIENCE, "it was stopped for 10 s", || long <= stopped.elapsed());
    mesh.signal(&first, Signal::CONT);
    eventually_true(PATIENCE, "it knows that it leads no more", || {
        mesh.count(&first, "stagedoor_scheduler_leads", &[]) == 0.0
    });
    more_end(&clients, 40);
    let (leads, after) = (leader(&mesh), epochs(&mesh));
    if !is_too_busy(&mesh, &first, &late) {
        assert_eq!(leads, (second, later));
        assert_eq!(after, before, "a shard was moved");
    }
    let heard = clients.finish(&mesh, REST_MAX);
    let last = epochs(&mesh);
    assert!(last == before || is_too_busy(&mesh, &first, &late), "{last:?}: a shard was moved");
    mesh.assert_sound(&heard, last == before);
    is_too_busy(&mesh, &first, &late)
}

#[test]
fn a_leader_that_hears_few_nodes_steps_back_for_one_that_hears_more() {
    until_not_too_busy(deaf_leader);
}

fn deaf_leader() -> bool {
    few_nodes_are_heard(&replicas(), |mesh, node, first| {
        mesh.fault(node, first, Port::Beat, Fault::DEAF_UP);
    })
}

#[test]
fn a_leader_that_is_cut_off_from_half_of_the_nodes_steps_back_and_nothing_is_fenced() {
    until_not_too_busy(|| {
        let four = MeshOptions { nodes: 4, ..replicas() };
        few_nodes_are_heard(&four, |mesh, node, first| {
            for port in [Port::Beat, Port::Main] {
                mesh.fault(node, first, port, Fault::HALF_OPEN);
            }
        })
    });
}

/// Two nodes are not heard by the leader any more. Whether the machine was too busy.
fn few_nodes_are_heard(options: &MeshOptions, deafen: fn(&Mesh, &str, &str)) -> bool {
    let (mesh, clients) = start(options);
    let late = Lateness::watch();
    let (first, _) = leader(&mesh);
    let before = epochs(&mesh);
    for node in ["node-1", "node-2"] {
        deafen(&mesh, node, &first);
    }
    let (second, _) = next_leader(&mesh, &first);
    more_end(&clients, 40);
    let (after, told) = (epochs(&mesh), mesh.why("leader", &first));
    if !is_too_busy(&mesh, "", &late) {
        assert_eq!(after, before, "a node that lives was fenced");
        let last = told.last().expect("it led");
        assert_eq!((last.to.as_str(), last.reason.as_str()), ("standby", "hears_fewer"));
    }
    mesh.heal();
    more_end(&clients, 20);
    let leads = leader(&mesh).0;
    assert!(leads == second || is_too_busy(&mesh, "", &late), "{leads} leads");
    let heard = clients.finish(&mesh, REST_MAX);
    let last = epochs(&mesh);
    assert!(last == before || is_too_busy(&mesh, "", &late), "{last:?}: a shard was moved");
    mesh.assert_sound(&heard, last == before);
    is_too_busy(&mesh, "", &late)
}

#[test]
fn a_node_that_drains_costs_no_caller_anything_and_ends_well() {
    let (mut mesh, clients) = start(&placed());
    let request = DrainRequest { name: "node-2".to_owned() };
    let node = mesh.block_on(mesh.client().drain(request)).unwrap().node.unwrap();
    assert_eq!(node.admission, "draining");
    assert_eq!(mesh.wait_until_over("node-2").code(), Some(0), "{}", mesh.log("node-2"));
    more_end(&clients, 40);
    let moved = status(&mesh).shards;
    assert!(moved.iter().all(|shard| shard.node != "node-2"));
    let why = moved.iter().find(|shard| shard.epoch == 2).expect("some were moved");
    eventually(PATIENCE, "it is told why", || {
        let told = mesh.why("shard", &why.id.to_string());
        let is_told = told.iter().any(|one| one.reason == "owner_draining");
        if is_told { Ok(()) } else { Err(format!("{told:?}")) }
    });
    eventually(PATIENCE, "it is told that it left", || {
        let told = mesh.why("node", "node-2");
        // Where the machine is busy, beats come late.
        let is_late = |one: &&Transition| one.to == "suspect" || one.reason == "beats_again";
        let states: Vec<_> = told.iter().filter(|one| !is_late(one)).map(|one| &*one.to).collect();
        if states == ["alive", "draining", "left"] { Ok(()) } else { Err(format!("{told:?}")) }
    });
    // It may come back.
    mesh.start_again("node-2");
    more_end(&clients, 20);
    finish_without_an_error(&mesh, clients);
}

/// How many shards each node has, all of them open.
fn shares(mesh: &Mesh) -> Result<BTreeMap<String, usize>, String> {
    let mut shares = BTreeMap::new();
    for shard in status(mesh).shards {
        if shard.state != "open" {
            return Err(format!("{shard:?}"));
        }
        *shares.entry(shard.node).or_default() += 1;
    }
    Ok(shares)
}

fn until_shared(mesh: &Mesh, wanted: &[(&str, usize)]) {
    let wanted = wanted.iter().map(|(node, count)| ((*node).to_owned(), *count)).collect();
    eventually(PATIENCE, &format!("the shares are {wanted:?}"), || match shares(mesh)? {
        found if found == wanted => Ok(()),
        found => Err(format!("{found:?}")),
    });
}

#[test]
fn a_cordoned_node_gets_nothing_new_and_one_that_joins_gets_its_share_bit_by_bit() {
    let (mut mesh, clients) = start(&MeshOptions::default());
    until_shared(&mesh, &[("node-1", 4), ("node-2", 4), ("node-3", 4)]);
    let request = CordonRequest { name: "node-3".to_owned() };
    let node = mesh.block_on(mesh.client().cordon(request)).unwrap().node.unwrap();
    assert_eq!((node.state.as_str(), node.admission.as_str()), ("alive", "cordoned"));
    mesh.kill("node-2");
    until_shared(&mesh, &[("node-1", 8), ("node-3", 4)]);
    let request = UncordonRequest { name: "node-3".to_owned() };
    mesh.block_on(mesh.client().uncordon(request)).unwrap();
    until_shared(&mesh, &[("node-1", 6), ("node-3", 6)]);
    mesh.start_again("node-2");
    until_shared(&mesh, &[("node-1", 4), ("node-2", 4), ("node-3", 4)]);
    more_end(&clients, 20);
    // Two when it was uncordoned, four when the other came back.
    let told = (0..12).flat_map(|shard| mesh.why("shard", &shard.to_string()));
    let moved = told.filter(|one| one.to == "granted" && one.reason == "rebalanced");
    assert!(6 <= moved.count());
    let told = mesh.why("node", "node-3");
    let reasons = told.iter().map(|one| one.reason.as_str());
    let reasons: Vec<_> = reasons.filter(|reason| reason.ends_with("cordoned")).collect();
    assert_eq!(reasons, ["cordoned", "uncordoned"]);
    // What the killed node counted went with it.
    let heard = clients.finish(&mesh, REST_MAX);
    mesh.assert_sound(&heard, false);
}

/// How soon a shard moves again in the test below.
const SOON: Duration = Duration::from_millis(100);
/// So often it is tried to be as soon as that.
const TRIES_MAX: usize = 3;

#[test]
fn shards_that_move_twice_within_100_ms_end_on_the_node_that_is_left() {
    for _ in 0..TRIES_MAX {
        let after = moved_twice();
        eprintln!("the second move came {after:?} after the first");
        if after < SOON {
            return;
        }
    }
    // That the second began before the first was over was shown each time.
}

/// A node drains, and who gets something from it is killed while it opens that. How soon that went on,
/// before anybody had opened it.
fn moved_twice() -> Duration {
    // It opened four of the twelve shards before.
    let plan = (VARIABLE.to_owned(), "node-2:open-read:5:stop".to_owned());
    let options = MeshOptions { env: vec![placed_at_once(), plan], ..MeshOptions::default() };
    let (mut mesh, clients) = start_with(&options, Load::default().limit);
    let request = DrainRequest { name: "node-1".to_owned() };
    mesh.block_on(mesh.client().drain(request)).unwrap();
    eventually(PATIENCE, "it opens what it got", || {
        let is_there = mesh.log("node-2").contains("a planned fault");
        if is_there { Ok(()) } else { Err(format!("{:?}", status(&mesh).shards)) }
    });
    mesh.kill("node-2");
    eventually(PATIENCE, "all are on the node that is left", || {
        let shards = status(&mesh).shards;
        let left = shards.iter().filter(|shard| shard.node == "node-3" && shard.state == "open");
        if left.count() == 12 { Ok(()) } else { Err(format!("{shards:?}")) }
    });
    let (mut gaps, mut was_open) = (Vec::new(), false);
    for shard in 0..12 {
        let told = eventually(PATIENCE, "its moves are told", || {
            let told = mesh.why("shard", &shard.to_string());
            let is_open = |one: &Transition| one.to == "open" && one.epoch == 2;
            was_open = told.iter().any(is_open);
            let granted: Vec<_> = told.into_iter().filter(|one| one.to == "granted").collect();
            let last = granted.last();
            let is_last = last.is_some_and(|one| one.node == "node-3");
            if is_last { Ok(granted) } else { Err(format!("{granted:?}")) }
        });
        let why: Vec<_> = told.iter().map(|one| (one.epoch, one.reason.as_str())).collect();
        let (leaving, died) = ("owner_draining", "owner_died");
        let moves = [(1, "first_placement"), (2, leaving), (3, died)];
        assert!(why == moves[..why.len()] || why == [moves[0], (2, died)], "{told:?}");
        if let ([_, second, third], false) = (&told[..], was_open) {
            let time = |one: &Transition| {
                let time = one.time.expect("every transition has one");
                Duration::new(time.seconds.cast_unsigned(), time.nanos.cast_unsigned())
            };
            gaps.push(time(third).saturating_sub(time(second)));
        }
    }
    // One node leaves phases out, so what is left waits until the others are back.
    assert_eq!(mesh.wait_until_over("node-1").code(), Some(0), "{}", mesh.log("node-1"));
    ["node-1", "node-2"].into_iter().for_each(|node| mesh.start_again(node));
    mesh.wait_until_ready();
    more_end(&clients, 40);
    let heard = clients.finish(&mesh, REST_MAX);
    mesh.assert_sound(&heard, false);
    gaps.into_iter().min().expect("a shard moved twice, and was not open in between")
}

#[test]
fn a_rolling_restart_of_every_process_but_the_store_fails_no_call() {
    let options = MeshOptions { controls: 2, nodes: 4, ..MeshOptions::default() };
    let (mut mesh, clients) = start(&options);
    let names: Vec<_> = mesh.names().into_iter().filter(|name| name != "store-1").collect();
    for name in names {
        mesh.signal(&name, Signal::TERM);
        assert_eq!(mesh.wait_until_over(&name).code(), Some(0), "{}", mesh.log(&name));
        mesh.start_again(&name);
        mesh.wait_until_ready();
        more_end(&clients, 10);
    }
    finish_without_an_error(&mesh, clients);
}

/// One replica does not reach a node that owns shards, which goes on for all others.
#[test]
fn who_asks_a_replica_that_does_not_reach_an_owner_goes_on_at_another() {
    let mesh = Mesh::start(PROGRAM, &MeshOptions { controls: 2, ..MeshOptions::default() });
    let (leads, _) = leader(&mesh);
    let other = if leads == "control-1" { "control-2" } else { "control-1" };
    for (from, to) in [("node-2", other), (other, "node-2")] {
        mesh.fault(from, to, Port::Main, Fault::CUT);
        mesh.reset(from, to, Port::Main);
    }
    let before = epochs(&mesh);
    let client = mesh.client_at(other);
    let heard: Vec<_> = mesh.block_on(async {
        let mut open = client.open();
        for tag in 0..12 {
            let request = SubmitRequest {
                agent: format!("default/postchain/k{tag}"),
                input: "Who is there?".to_owned(),
                ..SubmitRequest::default()
            };
            open.sender().submit(tag, request, OpenWatch::All).await.unwrap();
        }
        let mut results = Vec::new();
        while results.len() < 12 {
            let response = open.next().await.unwrap().unwrap();
            match response.response {
                Some(Response::Event(event)) => results.extend(result_in(event)),
                Some(Response::Accepted(_)) | None => {}
                Some(Response::Refused(refused)) => panic!("{refused:?}"),
            }
        }
        results
    });
    let owned: Vec<_> =
        status(&mesh).nodes.into_iter().find(|node| node.name == "node-2").unwrap().shards;
    assert!(!owned.is_empty(), "node-2 owned nothing all the time");
    // A watch of each that begins where it is not reached.
    for work in &heard {
        let client = mesh.client_at(other);
        let told = mesh.block_on(async {
            let mut watch = client.watch(&work.id, "");
            let mut told = Vec::new();
            while let Some(event) = watch.next().await {
                told.push(event.unwrap().cursor);
            }
            told
        });
        // Its acceptance, the begin of its turn, six phases, its end.
        assert_eq!(told.len(), 9, "{told:?}");
    }
    assert_eq!(epochs(&mesh), before, "nobody else noticed");
}

fn result_in(event: WorkEvent) -> Option<Work> {
    match event.event {
        Some(Event::Result(work)) => Some(work),
        _ => None,
    }
}
