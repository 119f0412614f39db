//! Phases that nobody offers, and nodes that come to offer them.

use tests::harness::{Dev, Node, NodeOptions, Options, PATIENCE, eventually, eventually_true};

use crate::{PHASES, PROGRAM, list, text};

/// A cluster of one node that offers every phase but one.
pub(crate) fn start_without(phase: &str) -> Dev {
    let offered: Vec<_> = PHASES.iter().filter(|offered| **offered != phase).copied().collect();
    let offered = format!("[{}]", offered.join(","));
    let env = vec![("STAGEDOOR_NODE__PHASES__OFFER".to_owned(), offered)];
    Dev::start_with(PROGRAM, &Options { nodes: 1, env, ..Options::default() })
}

/// Waits until a work waits for an offer.
pub(crate) fn await_waiting(dev: &Dev, id: &str) {
    eventually(PATIENCE, "the work waits", || {
        let work = dev.run(&["work", "get", id]).lines()[0].clone();
        match work["state"] == "WORK_STATE_WAITING" && work["reason"] == "no_offer" {
            true => Ok(()),
            false => Err(work),
        }
    });
}

/// Waits until a node of this name is alive.
pub(crate) fn await_alive(dev: &Dev, name: &str) {
    eventually(PATIENCE, &format!("{name} joins"), || {
        let nodes = dev.run(&["nodes"]).document();
        let alive = |node: &serde_json::Value| node["name"] == name && node["state"] == "alive";
        if list(&nodes["nodes"]).iter().any(alive) { Ok(()) } else { Err(nodes) }
    });
}

#[test]
fn a_work_waits_for_a_phase_that_nobody_offers_until_a_node_brings_it() {
    let dev = start_without("observation");
    let args = ["submit", "--agent", "postchain", "--key", "k", "--text", "A lamp. Why?"];
    let work = dev.run(&args).document();
    let id = text(&work["id"]);
    await_waiting(&dev, id);
    let _node = Node::start(&dev, &NodeOptions::new("node-9", &["observation"]));
    let events = dev.run(&["work", "watch", id]).documents();
    assert_eq!(crate::result_of(&events)["state"], "WORK_STATE_SUCCEEDED");
    let work = dev.run(&["work", "get", id]).document();
    let nodes: Vec<_> = list(&work["steps"]).iter().map(|step| text(&step["node"])).collect();
    let expected = ["node-1", "node-1", "node-1", "node-9", "node-1", "node-1"];
    assert_eq!(nodes, expected);
    let why = dev.run(&["why", "work", id]).document();
    let reasons: Vec<_> = list(&why["transitions"]).iter().map(|it| text(&it["reason"])).collect();
    assert!(reasons.contains(&"no_offer") && reasons.contains(&"offer_appeared"), "{reasons:?}");
}

#[test]
fn an_offer_goes_with_its_node() {
    let dev = start_without("observation");
    let find = || {
        let found = dev.run(&["capabilities", "phase/observation"]).document();
        list(&found["capabilities"]).len()
    };
    assert_eq!(find(), 0);
    let mut node = Node::start(&dev, &NodeOptions::new("node-9", &["observation"]));
    await_alive(&dev, "node-9");
    eventually_true(PATIENCE, "the offer is found", || find() == 1);
    node.child().signal(rustix::process::Signal::KILL);
    node.child().wait(PATIENCE);
    eventually_true(PATIENCE, "the offer is gone", || find() == 0);
    let args = ["submit", "--agent", "postchain", "--key", "k", "--text", "A lamp. Why?"];
    await_waiting(&dev, text(&dev.run(&args).document()["id"]));
}

#[test]
fn a_node_that_is_told_to_end_says_goodbye() {
    let dev = Dev::start_with(PROGRAM, &Options { nodes: 1, ..Options::default() });
    let mut node = Node::start(&dev, &NodeOptions::new("node-9", &PHASES));
    await_alive(&dev, "node-9");
    node.child().signal(rustix::process::Signal::TERM);
    let status = node.child().wait(PATIENCE);
    assert!(status.success(), "{status}\n{}", node.log());
    eventually(PATIENCE, "the node has left", || {
        let nodes = dev.run(&["nodes"]).document();
        let it = list(&nodes["nodes"]).iter().find(|node| node["name"] == "node-9").cloned();
        match it {
            Some(node) if node["state"] == "alive" || node["state"] == "suspect" => Err(node),
            _ => Ok(()),
        }
    });
    // Its shards are with the other, and work goes on.
    let args =
        ["submit", "--agent", "postchain", "--key", "k", "--text", "A lamp. Why?", "--watch"];
    let events = dev.run(&args).documents();
    assert_eq!(crate::result_of(&events)["state"], "WORK_STATE_SUCCEEDED");
}
