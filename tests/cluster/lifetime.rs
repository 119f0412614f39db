//! How processes begin, end and die, and what is left of them.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;
use tests::harness::{Dev, Options, PATIENCE, Planted, eventually, eventually_true};

use crate::{HARBOUR, PROGRAM, list, result_of, submit_and_watch, text};

fn is_alive(pid: u32) -> bool {
    // A zombie has ended; somebody has only not asked how.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn pids(dev: &Dev) -> Vec<u32> {
    let processes = list(&dev.ready()["processes"]);
    processes.iter().map(|p| u32::try_from(p["pid"].as_u64().unwrap()).unwrap()).collect()
}

fn assert_all_end(pids: &[u32]) {
    eventually(PATIENCE, "every process ends", || {
        let alive: Vec<_> = pids.iter().filter(|pid| is_alive(**pid)).collect();
        if alive.is_empty() { Ok(()) } else { Err(format!("{alive:?}")) }
    });
}

#[test]
fn children_end_by_themselves_when_dev_is_killed() {
    let mut dev = Dev::start(PROGRAM);
    let pids = pids(&dev);
    assert_eq!(pids.len(), 5);
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    dev.child().signal(Signal::KILL);
    dev.child().wait(PATIENCE);
    assert_all_end(&pids);
}

#[test]
fn dev_ends_clean_when_it_is_asked_to() {
    let mut dev = Dev::start(PROGRAM);
    submit_and_watch(&dev, "before", &Planted::new(HARBOUR, 512));
    let pids = pids(&dev);
    dev.child().signal(Signal::TERM);
    let status = dev.child().wait(PATIENCE);
    assert_eq!(status.code(), Some(0), "{:?}", dev.child().stderr());
    assert!(pids.iter().all(|pid| !is_alive(*pid)), "a child is left");
    let said = dev.child().stderr().join("\n");
    assert!(!said.contains("killed"), "{said}");
    for name in ["store-1", "control-1", "node-1", "node-2", "node-3"] {
        let log = dev.log(name);
        assert!(!log.contains("panicked"), "{log}");
        assert!(!log.contains("ERROR"), "{log}");
    }
}

#[test]
fn a_cluster_started_again_has_its_works_and_its_name() {
    let mut dev = Dev::start(PROGRAM);
    let events = submit_and_watch(&dev, "kept", &Planted::new(HARBOUR, 512));
    let id = text(&result_of(&events)["id"]).to_owned();
    let before = dev.run(&["work", "get", &id]).document();
    let cluster = dev.run(&["status"]).document()["clusterId"].clone();
    dev.restart();
    assert_eq!(dev.run(&["status"]).document()["clusterId"], cluster);
    assert_eq!(dev.run(&["work", "get", &id]).document(), before);
    let events = submit_and_watch(&dev, "kept", &Planted::new(HARBOUR, 512));
    assert_ne!(text(&result_of(&events)["id"]), id);
}

#[test]
fn a_child_that_dies_is_named_and_not_revived() {
    let mut dev = Dev::start(PROGRAM);
    let pid = dev.pid("node-3");
    dev.signal("node-3", Signal::KILL);
    eventually_true(PATIENCE, "dev names the dead", || {
        let said = dev.child().stderr().join("\n");
        said.contains("node-3") && said.contains(&pid.to_string())
    });
    // Its shards go to the others, which do all the work.
    eventually(PATIENCE, "the shards are with the living", || {
        let shards = dev.run(&["shards"]).document();
        let with_others = |shard: &serde_json::Value| {
            shard["state"] == "open" && shard["node"] != "node-3"
        };
        if list(&shards["shards"]).iter().all(with_others) { Ok(()) } else { Err(shards) }
    });
    let events = submit_and_watch(&dev, "after", &Planted::new(HARBOUR, 512));
    assert_eq!(result_of(&events)["state"], "WORK_STATE_SUCCEEDED");
    assert!(!is_alive(pid));
    let why = dev.run(&["why", "node", "node-3"]).document();
    let last = list(&why["transitions"]).last().unwrap();
    assert_eq!(last["to"], "dead", "{last}");
    let nodes = dev.run(&["nodes"]).document();
    let alive = list(&nodes["nodes"]).iter().filter(|node| node["state"] == "alive");
    assert_eq!(alive.count(), 2, "{nodes}");
}

#[test]
fn with_restart_a_dead_node_comes_back_as_a_new_incarnation() {
    let dev = Dev::start_with(PROGRAM, &Options { restart: true, ..Options::default() });
    let incarnation = || {
        let nodes = dev.run(&["nodes"]).document();
        let nodes = list(&nodes["nodes"]).to_vec();
        let alive = nodes.iter().find(|n| n["name"] == "node-1" && n["state"] == "alive");
        alive.map(|node| text(&node["incarnation"]).parse::<u64>().unwrap())
    };
    let first = incarnation().unwrap();
    dev.signal("node-1", Signal::KILL);
    let second = eventually(PATIENCE, "the node is back", || {
        incarnation().filter(|second| *second != first).ok_or("the old one, or none")
    });
    assert!(first < second);
}

#[test]
fn a_store_that_was_killed_costs_a_restart_and_no_work() {
    let dev = Dev::start_with(PROGRAM, &Options { restart: true, ..Options::default() });
    let events = submit_and_watch(&dev, "before", &Planted::new(HARBOUR, 512));
    let id = text(&result_of(&events)["id"]).to_owned();
    dev.signal("store-1", Signal::KILL);
    let submit = ["submit", "--agent", "postchain", "--key", "after", "--text", "A lamp. Why?"];
    let work = eventually(PATIENCE, "a work is accepted again", || {
        let output = dev.run(&submit);
        if output.code == Some(0) { Ok(output.document()) } else { Err(output) }
    });
    let after = dev.run(&["work", "watch", text(&work["id"])]).documents();
    assert_eq!(result_of(&after)["state"], "WORK_STATE_SUCCEEDED");
    assert_eq!(list(&dev.run(&["work", "get", &id]).document()["steps"]).len(), 6);
}

#[test]
fn a_stopped_node_loses_its_shards_and_does_no_harm_when_it_wakes() {
    let dev = Dev::start(PROGRAM);
    let of_stopped = || {
        let shards = dev.run(&["shards"]).document();
        list(&shards["shards"]).iter().filter(|shard| shard["node"] == "node-1").count()
    };
    assert!(0 < of_stopped());
    dev.signal("node-1", Signal::STOP);
    eventually_true(PATIENCE, "its shards are elsewhere", || of_stopped() == 0);
    let events = submit_and_watch(&dev, "meanwhile", &Planted::new(HARBOUR, 512));
    assert_eq!(result_of(&events)["state"], "WORK_STATE_SUCCEEDED");
    dev.signal("node-1", Signal::CONT);
    // It comes back as a new incarnation, and works still end well.
    eventually_true(Duration::from_secs(40), "it has joined again", || {
        let nodes = dev.run(&["nodes"]).document();
        list(&nodes["nodes"]).iter().filter(|node| node["state"] == "alive").count() == 3
    });
    for round in 0..3 {
        let key = format!("after-{round}");
        let events = submit_and_watch(&dev, &key, &Planted::new(HARBOUR, 512));
        assert_eq!(result_of(&events)["state"], "WORK_STATE_SUCCEEDED");
    }
}
