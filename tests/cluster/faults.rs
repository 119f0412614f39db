//! What breaks while a cluster works, one thing at a time, and that nothing comes of it but latency.

use std::time::Duration;

use proto::v1::{Node, SubmitRequest};
use rustix::process::Signal;
use tests::faults::{Options, Store};
use tests::harness::history::History;
use tests::harness::{
    Clients, Fault, Heard, Lateness, Load, Mesh, MeshOptions, PATIENCE, Port, eventually,
};

use crate::{PROGRAM, until_not_too_busy};

/// For what a fault has held up, and its end.
const REST_MAX: Duration = Duration::from_secs(120);
const VICTIM: &str = "node-2";

fn start() -> (Mesh, Clients) {
    let mesh = Mesh::start(PROGRAM, &MeshOptions::default());
    let load = Load { clients: 4, agents: 60, works_max: 8, ..Load::default() };
    let clients = Clients::start(&mesh, &load);
    more_end(&clients, 30);
    (mesh, clients)
}

/// Waits until so many more works have ended.
fn more_end(clients: &Clients, count: u64) {
    let before = clients.ended();
    let what = format!("{count} more works end");
    eventually(REST_MAX, &what, || match clients.ended() - before {
        ended if count <= ended => Ok(()),
        ended => Err(format!("{ended}")),
    });
}

fn node(mesh: &Mesh, name: &str) -> Node {
    let status = eventually(PATIENCE, "the status is told", || mesh.status());
    let node = status.nodes.into_iter().find(|node| node.name == name);
    node.unwrap_or_else(|| panic!("there is no {name}"))
}

/// Waits until others own all shards.
fn wait_until_replaced(mesh: &Mesh, name: &str) {
    wait_until_replaced_for(mesh, name, PATIENCE);
}

fn wait_until_replaced_for(mesh: &Mesh, name: &str, patience: Duration) {
    eventually(patience, "all shards are open elsewhere", || match mesh.status() {
        Ok(status) => {
            let is_elsewhere =
                |shard: &&proto::v1::Shard| shard.state == "open" && shard.node != name;
            let left = status.shards.iter().filter(|shard| !is_elsewhere(shard)).count();
            let all = status.shards.len();
            if all == 12 && left == 0 { Ok(()) } else { Err(format!("{left} of {all} are not")) }
        }
        Err(error) => Err(error.to_string()),
    });
}

/// Waits until it is alive as a later incarnation.
fn wait_until_back(mesh: &Mesh, before: &Node) {
    eventually(REST_MAX, "it is alive as a new incarnation", || {
        let now = node(mesh, &before.name);
        let is_back = now.state == "alive" && before.incarnation < now.incarnation;
        if is_back { Ok(()) } else { Err(format!("{now:?}")) }
    });
}

/// Works go on before the fault is mended and after, whom it hit comes back, and nothing of all that was wrong.
fn heal_and_finish(mesh: &mut Mesh, clients: Clients, before: &Node) {
    more_end(&clients, 60);
    mesh.heal();
    wait_until_back(mesh, before);
    more_end(&clients, 60);
    let heard = clients.finish(mesh, REST_MAX);
    assert_eq!(mesh.dead(), Vec::<String>::new());
    // A commit whose answer was lost, and whose writer was fenced meanwhile, is counted by nobody.
    let history = mesh.assert_sound(&heard, false);
    assert_no_step_ran_again(mesh, history);
}

/// No node was started again, so that the calls that they counted are all.
fn assert_no_step_ran_again(mesh: &Mesh, mut history: History) {
    history.counters.model_calls = Some(mesh.model_calls());
    assert_eq!(history.more_calls_than_attempts(), None);
    assert_eq!(history.check(), [].into());
}

fn incarnations(mesh: &Mesh) -> Vec<i64> {
    mesh.nodes().iter().map(|name| node(mesh, name).incarnation).collect()
}

fn deaths(mesh: &Mesh) -> Vec<String> {
    let told = mesh.nodes().into_iter().flat_map(|node| mesh.why("node", &node));
    let dead = told.filter(|one| one.to == "dead");
    dead.map(|one| format!("{} {} {}", one.subject, one.reason, one.cause)).collect()
}

#[test]
fn a_node_stopped_in_the_middle_of_commits_does_no_harm_when_it_wakes() {
    let (mut mesh, clients) = start();
    let before = node(&mesh, VICTIM);
    assert!(!before.shards.is_empty(), "it has nothing to lose");
    mesh.signal(VICTIM, Signal::STOP);
    wait_until_replaced(&mesh, VICTIM);
    more_end(&clients, 60);
    mesh.signal(VICTIM, Signal::CONT);
    wait_until_back(&mesh, &before);
    // What it had in hand was written by nobody, which the history shows below. Who tells it first is left to chance: the
    // store that refuses a write, a read of the owner row, or the view.
    assert!(0.0 < mesh.count(VICTIM, "stagedoor_agent_stood_still_total", &[]));
    more_end(&clients, 60);
    let heard = clients.finish(&mesh, REST_MAX);
    assert_eq!(mesh.dead(), Vec::<String>::new());
    // A commit that its writer was not told of any more is counted by nobody.
    let history = mesh.assert_sound(&heard, false);
    assert_no_step_ran_again(&mesh, history);
    assert!(!deaths(&mesh).is_empty());
}

#[test]
fn a_node_that_falls_silent_on_every_link_costs_no_work() {
    let (mut mesh, clients) = start();
    let before = node(&mesh, VICTIM);
    mesh.isolate(VICTIM, Fault::HALF_OPEN);
    wait_until_replaced(&mesh, VICTIM);
    heal_and_finish(&mut mesh, clients, &before);
}

#[test]
fn a_store_link_that_is_reset_over_and_over_only_slows_works_down() {
    until_not_too_busy(reset_links);
}

/// Whether the machine was too busy.
fn reset_links() -> bool {
    let late = Lateness::watch();
    let (mut mesh, clients) = start();
    let before = incarnations(&mesh);
    for _ in 0..20 {
        for name in mesh.names().iter().filter(|name| *name != "store-1") {
            mesh.reset(name, "store-1", Port::Main);
        }
        more_end(&clients, 5);
    }
    let heard = clients.finish(&mesh, REST_MAX);
    assert_eq!(mesh.dead(), Vec::<String>::new());
    is_as_before(&mesh, &heard, &before, &late)
}

/// Where nobody was declared dead, everything is counted, too. Whether the machine was too busy for beats: nothing else
/// excuses a death.
fn is_as_before(mesh: &Mesh, heard: &Heard, before: &[i64], late: &Lateness) -> bool {
    let deaths = deaths(mesh);
    let is_disturbed = incarnations(mesh) != before || !deaths.is_empty();
    mesh.assert_sound(heard, !is_disturbed);
    is_disturbed && is_excused(&deaths, late)
}

/// Beats are missed after a second and a half.
fn is_excused(deaths: &[String], late: &Lateness) -> bool {
    let longest = late.longest();
    assert!(
        Duration::from_millis(500) <= longest,
        "{deaths:?}, with a machine late by {longest:?}"
    );
    eprintln!("the machine is too busy: it was late by {longest:?}, {deaths:?}");
    true
}

#[test]
fn links_that_are_late_by_200_ms_lead_to_no_verdict() {
    until_not_too_busy(late_links);
}

/// Whether the machine was too busy.
fn late_links() -> bool {
    let late = Lateness::watch();
    let (mut mesh, clients) = start();
    let before = incarnations(&mesh);
    let slow = Fault::late(Duration::from_millis(200), Duration::from_millis(50));
    mesh.names().iter().for_each(|name| mesh.isolate(name, slow));
    more_end(&clients, 60);
    mesh.heal();
    let heard = clients.finish(&mesh, REST_MAX);
    assert_eq!(mesh.dead(), Vec::<String>::new());
    is_as_before(&mesh, &heard, &before, &late)
}

/// An operator need not wait until the leader relieves it.
#[test]
fn a_node_that_does_not_reach_the_store_can_be_drained() {
    let (mut mesh, clients) = start();
    mesh.fault(VICTIM, "store-1", Port::Main, Fault::HALF_OPEN);
    let request = proto::v1::DrainRequest { name: VICTIM.to_owned() };
    mesh.block_on(mesh.client().drain(request)).unwrap();
    assert_eq!(mesh.wait_until_over(VICTIM).code(), Some(0), "{}", mesh.log(VICTIM));
    wait_until_replaced(&mesh, VICTIM);
    more_end(&clients, 60);
    mesh.heal();
    mesh.start_again(VICTIM);
    let heard = clients.finish(&mesh, REST_MAX);
    mesh.assert_sound(&heard, false);
}

#[test]
fn a_node_that_alone_does_not_reach_the_store_is_relieved_until_it_does() {
    until_not_too_busy(relieved_node);
}

/// Whether the machine was too busy.
fn relieved_node() -> bool {
    let late = Lateness::watch();
    let (mesh, clients) = start();
    let before = node(&mesh, VICTIM);
    assert!(!before.shards.is_empty(), "it has nothing to lose");
    mesh.fault(VICTIM, "store-1", Port::Main, Fault::HALF_OPEN);
    wait_until_replaced_for(&mesh, VICTIM, REST_MAX);
    more_end(&clients, 60);
    eventually(PATIENCE, "it is storeless", || match node(&mesh, VICTIM) {
        now if now.state == "storeless" => Ok(()),
        now => Err(format!("{now:?}")),
    });
    mesh.heal();
    eventually(REST_MAX, "it has shards again", || match node(&mesh, VICTIM) {
        now if now.state == "alive" && !now.shards.is_empty() => Ok(()),
        now => Err(format!("{now:?}")),
    });
    more_end(&clients, 60);
    // Where the machine is busy, beats come late, and what is known is said again.
    let mut told: Vec<_> = mesh.why("node", VICTIM).into_iter().map(|one| one.reason).collect();
    told.retain(|reason| !["beats_missed", "session_lost", "beats_again"].contains(&&**reason));
    told.dedup();
    let is_disturbed = node(&mesh, VICTIM).incarnation != before.incarnation;
    if !is_disturbed {
        assert_eq!(told, ["joined", "storeless", "store_answers"]);
    }
    let heard = clients.finish(&mesh, REST_MAX);
    mesh.assert_sound(&heard, false);
    is_disturbed && is_excused(&deaths(&mesh), &late)
}

#[test]
fn a_node_whose_beats_are_not_heard_is_replaced_and_comes_back() {
    let (mut mesh, clients) = start();
    let before = node(&mesh, VICTIM);
    mesh.fault(VICTIM, "control-1", Port::Beat, Fault::DEAF_UP);
    wait_until_replaced(&mesh, VICTIM);
    heal_and_finish(&mut mesh, clients, &before);
}

/// A firewall may do that: its beats are heard, and nobody gets a word to it or from it otherwise.
#[test]
fn a_node_that_beats_and_that_nobody_reaches_is_replaced_and_comes_back() {
    let (mut mesh, clients) = start();
    let before = node(&mesh, VICTIM);
    for other in mesh.names().iter().filter(|name| *name != VICTIM) {
        mesh.fault(VICTIM, other, Port::Main, Fault::HALF_OPEN);
        mesh.fault(other, VICTIM, Port::Main, Fault::HALF_OPEN);
    }
    // Its links are silent for 12 s before they are given up, and then for 30 s more.
    wait_until_replaced_for(&mesh, VICTIM, REST_MAX);
    let told = eventually(PATIENCE, "its death is told", || match deaths(&mesh) {
        told if told.is_empty() => Err("nobody died"),
        told => Ok(told),
    });
    assert!(told[0].contains("node/node-2 unlinked"), "{told:?}");
    heal_and_finish(&mut mesh, clients, &before);
}

/// Nothing on the runtime of a node runs for a while; its beats, which have their own, go on.
#[test]
fn a_runtime_that_stands_still_is_slow_for_half_a_minute_and_dead_after() {
    until_not_too_busy(stalled_runtimes);
}

/// Whether the machine was too busy.
fn stalled_runtimes() -> bool {
    let late = Lateness::watch();
    let plan = "node-2:step-answered:20:block-20000,node-3:step-answered:20:block-35000";
    let env = vec![("STAGEDOOR_FAULT_POINT".to_owned(), plan.to_owned())];
    let mut mesh = Mesh::start(PROGRAM, &MeshOptions { env, ..MeshOptions::default() });
    let (slow, dead) = (node(&mesh, "node-2"), node(&mesh, "node-3"));
    let load = Load { clients: 4, agents: 60, works_max: 8, ..Load::default() };
    let clients = Clients::start(&mesh, &load);
    wait_until_back(&mesh, &dead);
    for name in ["node-2", "node-3"] {
        assert!(mesh.log(name).contains("a planned fault"), "{name} did not stand still");
    }
    more_end(&clients, 60);
    let heard = clients.finish(&mesh, REST_MAX);
    assert_eq!(mesh.dead(), Vec::<String>::new());
    mesh.assert_sound(&heard, false);
    // Of the two only one stood still for too long: that is never a matter of how busy the machine is.
    let (stalled, others): (Vec<_>, Vec<_>) =
        deaths(&mesh).into_iter().partition(|death| death.contains("runtime_stalled"));
    assert_eq!(stalled.len(), 1, "{stalled:?}, {others:?}");
    assert!(stalled[0].contains("node/node-3"), "{stalled:?}");
    let is_disturbed = !others.is_empty() || node(&mesh, "node-2").incarnation != slow.incarnation;
    is_disturbed && is_excused(&others, &late)
}

#[test]
fn a_store_that_was_away_for_10_s_has_lost_nothing() {
    store_is_away_for(Duration::from_secs(10));
}

#[test]
fn a_store_that_was_away_for_a_minute_has_lost_nothing() {
    store_is_away_for(Duration::from_secs(60));
}

fn store_is_away_for(time: Duration) {
    let (mut mesh, clients) = start();
    let mut pids = mesh.pids();
    for number in 0..WARM {
        let (agent, input) = (warm(number), "Is anybody there?".to_owned());
        let request = SubmitRequest { agent, input, ..SubmitRequest::default() };
        mesh.block_on(mesh.client().submit(request)).unwrap();
    }
    mesh.kill("store-1");
    let began = std::time::Instant::now();
    let (mut refused, mut asked) = (0, 0);
    while began.elapsed() < time {
        asked += 1;
        refused += u32::from(is_refused(&mesh, asked));
    }
    // How many are told so before their own time is over is a matter of how busy the machine is.
    eprintln!("{refused} of {asked} were told when to come back");
    assert_ne!(refused, 0, "nobody of {asked} was told when to come back");
    mesh.start_again("store-1");
    more_end(&clients, 60);
    let heard = clients.finish(&mesh, REST_MAX);
    assert_eq!(mesh.dead(), Vec::<String>::new());
    pids.insert("store-1".to_owned(), mesh.pid("store-1"));
    assert_eq!(mesh.pids(), pids, "another process was started again");
    mesh.wait_until_ready();
    assert!(!heard.told.is_empty() && heard.told.iter().all(|told| told.end.is_some()));
    // Of calls there are more than these journals know: for the works that were in flight.
    assert_eq!(mesh.record(&heard, true).check(), [].into());
}

/// Agents that are in memory when the store goes.
const WARM: u32 = 6;

fn warm(number: u32) -> String {
    format!("default/postchain/warm-{}", number % WARM)
}

/// Without a store nothing is accepted: who asks is told to come back, or waits until its own time is over.
fn is_refused(mesh: &Mesh, number: u32) -> bool {
    let client = mesh.client().with_timeout(Duration::from_secs(2));
    let request = SubmitRequest {
        // Every other one is to an agent that was in memory before. What is in flight when the store goes is accepted when it
        // is back, though nobody is told, so these are none of those whose journals are looked at.
        agent: match number % 2 {
            0 => format!("default/postchain/meanwhile-{number}"),
            _ => warm(number),
        },
        input: "Is anybody there?".to_owned(),
        ..SubmitRequest::default()
    };
    match mesh.block_on(client.submit(request)) {
        Ok(work) => panic!("{work:?} was accepted without a store"),
        // Whoever serves it gives up a moment before its caller.
        Err(client::Error::Refused { status, .. })
            if status.code() == tonic::Code::DeadlineExceeded =>
        {
            false
        }
        Err(client::Error::Refused { status, retry_after, .. }) => {
            assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
            assert!(retry_after.is_some(), "it does not say when to come back: {status}");
            true
        }
        // On a busy machine the connection alone may take as long.
        Err(client::Error::Deadline { .. } | client::Error::NotReached { .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn random_faults_leave_a_sound_history() {
    let options = Options::from_env(Store::Files, 60);
    let report = tests::faults::run(PROGRAM, &options).unwrap();
    eprintln!("{report}");
    assert!(report.is_sound(), "seed {}", options.seed);
    assert!(report.had_all, "{:?}", report.happened);
    assert!(0 < report.calls, "no call was made that must not be made twice");
}
