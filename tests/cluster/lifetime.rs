//! How processes begin, end and die, and what is left of them.

use std::collections::BTreeMap;
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
    // Long before `dev` kills what does not end.
    let env = vec![("STAGEDOOR_NODE__DRAIN_TIMEOUT_MS".to_owned(), "5000".to_owned())];
    let mut dev = Dev::start_with(PROGRAM, &Options { env, ..Options::default() });
    submit_and_watch(&dev, "before", &Planted::new(HARBOUR, 512));
    let pids = pids(&dev);
    dev.child().signal(Signal::TERM);
    let status = dev.child().wait(PATIENCE);
    assert_eq!(status.code(), Some(0), "{:?}", dev.child().stderr());
    assert!(pids.iter().all(|pid| !is_alive(*pid)), "a child is left");
    let said = dev.child().stderr().join("\n");
    assert!(!said.contains("killed"), "{said}");
    let cookie = fs::read_to_string(dev.dir().join("cookie")).unwrap();
    for name in ["store-1", "control-1", "node-1", "node-2", "node-3"] {
        let log = dev.log(name);
        assert!(!log.contains("panicked"), "{log}");
        assert!(!log.contains("ERROR"), "{log}");
        assert!(!log.contains(cookie.trim()), "the cookie is in the log of {name}");
    }
}

#[test]
fn logs_are_json_when_that_is_asked_for() {
    let env = ["STORE", "CONTROL", "NODE"]
        .map(|role| (format!("STAGEDOOR_{role}__TELEMETRY__LOG_FORMAT"), "json".to_owned()));
    let options = Options { nodes: 1, env: env.to_vec(), ..Options::default() };
    let dev = Dev::start_with(PROGRAM, &options);
    for name in ["store-1", "control-1", "node-1"] {
        let log = dev.log(name);
        assert!(!log.is_empty());
        for line in log.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(!text(&line["level"]).is_empty() && line["message"].is_string(), "{line}");
        }
    }
}

#[test]
fn everything_listens_on_loopback_only() {
    let dev = Dev::start(PROGRAM);
    let listeners = listeners();
    let mut ports = 0;
    for pid in pids(&dev) {
        for link in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(link.path()).unwrap_or_default();
            let target = target.to_str().unwrap_or_default();
            let inode = target.strip_prefix("socket:[").and_then(|it| it.strip_suffix(']'));
            let Some(address) = inode.and_then(|inode| listeners.get(inode)) else { continue };
            // As the kernel writes 127.0.0.1.
            assert!(address.starts_with("0100007F:"), "process {pid} listens on {address}");
            ports += 1;
        }
    }
    // An admin port each, the store, three of control and one a node at least.
    assert!(12 <= ports, "{ports}");
}

/// The addresses that are listened on, in the kernel's own writing, by the inodes of their sockets.
fn listeners() -> BTreeMap<String, String> {
    const LISTEN: &str = "0A";
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
    let tables: Vec<_> = tables.into_iter().flatten().collect();
    let rows = tables.iter().flat_map(|table| table.lines().skip(1));
    let rows = rows.map(|row| row.split_whitespace().collect::<Vec<_>>());
    let listening = rows.filter(|row| row.get(3) == Some(&LISTEN));
    listening.map(|row| (row[9].to_owned(), row[1].to_owned())).collect()
}

#[test]
fn works_that_were_acknowledged_outlive_the_death_of_every_process() {
    let mut dev = crate::offers::start_without("understanding");
    let ids: Vec<_> = (0..5)
        .map(|number| {
            let (key, lamp) = (format!("k{number}"), format!("Lamp {number} is lit. Why?"));
            let args = ["submit", "--agent", "postchain", "--key", &key, "--text", &lamp];
            let work = dev.run(&[&args[..], &["--timeout", "5m"]].concat()).document();
            text(&work["id"]).to_owned()
        })
        .collect();
    for name in ["store-1", "control-1", "node-1"] {
        dev.signal(name, Signal::KILL);
    }
    dev.child().signal(Signal::KILL);
    dev.child().wait(PATIENCE);
    dev.start_again(&Options::default());
    for id in ids {
        let events = dev.run(&["work", "watch", &id]).documents();
        assert_eq!(result_of(&events)["state"], "WORK_STATE_SUCCEEDED");
        let work = dev.run(&["work", "get", &id]).document();
        assert_eq!(list(&work["steps"]).len(), 6, "{work}");
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
        let with_others =
            |shard: &serde_json::Value| shard["state"] == "open" && shard["node"] != "node-3";
        if list(&shards["shards"]).iter().all(with_others) { Ok(()) } else { Err(shards) }
    });
    let events = submit_and_watch(&dev, "after", &Planted::new(HARBOUR, 512));
    assert_eq!(result_of(&events)["state"], "WORK_STATE_SUCCEEDED");
    assert!(!is_alive(pid));
    eventually(PATIENCE, "its death is told", || {
        let why = dev.run(&["why", "node", "node-3"]).document();
        let last = list(&why["transitions"]).last().cloned().unwrap_or_default();
        if last["to"] == "dead" { Ok(()) } else { Err(why) }
    });
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

#[test]
fn a_node_that_hears_no_control_replica_says_so_and_goes_on() {
    // Its link holds for longer than anybody waits here.
    let silence = "STAGEDOOR_NODE__CLUSTER__SILENCE_TIMEOUT_MS".to_owned();
    let env = vec![(silence, "120000".to_owned())];
    let dev = Dev::start_with(PROGRAM, &Options { nodes: 1, env, ..Options::default() });
    let until = |wanted: &str| {
        eventually(PATIENCE, &format!("it says {wanted}"), || match dev.readiness("node-1") {
            told if told == wanted => Ok(()),
            told => Err(told),
        });
    };
    until("ready");
    dev.signal("control-1", Signal::STOP);
    until("control_unreachable");
    dev.signal("control-1", Signal::CONT);
    until("ready");
}
