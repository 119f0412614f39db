//! A machine whose network dies while it works.

use serde_json::Value;
use tests::harness::{Child, MeshOptions, PATIENCE, Planted, Spaces, eventually, eventually_true};

use crate::{HARBOUR, PROGRAM, list};

const VICTIM: &str = "node-2";

/// Submits without waiting for the answer; many of these are under way at once.
fn submit(spaces: &Spaces, key: usize) -> Child {
    let path = spaces.scratch().join("input.txt");
    let (key, path) = (key.to_string(), path.to_str().unwrap());
    let args =
        ["submit", "--agent", "postchain", "--key", &key, "--file", path, "--timeout", "120s"];
    spaces.start_client(&args)
}

fn id_of(mut submitting: Child) -> String {
    let status = submitting.wait(PATIENCE * 4);
    assert!(status.success(), "{status}: {:?}", submitting.stderr());
    let work: Value = serde_json::from_str(&submitting.stdout()[0]).unwrap();
    work["id"].as_str().unwrap().to_owned()
}

fn assert_succeeded(spaces: &Spaces, id: &str) {
    let work = eventually(PATIENCE * 4, &format!("{id} ends"), || {
        let work = spaces.client(&["work", "get", id]).document();
        if work["endTime"].is_string() { Ok(work) } else { Err(work) }
    });
    assert_eq!(work["state"], "WORK_STATE_SUCCEEDED", "{work}");
    assert_eq!(list(&work["steps"]).len(), 6, "{work}");
}

fn victim(spaces: &Spaces) -> Result<Value, String> {
    let nodes = spaces.client(&["nodes"]).document();
    let found = list(&nodes["nodes"]).iter().find(|node| node["name"] == VICTIM);
    found.cloned().ok_or_else(|| nodes.to_string())
}

#[test]
fn a_machine_whose_network_dies_costs_no_work_and_comes_back_as_another() {
    let Some(spaces) = Spaces::start(PROGRAM, &MeshOptions::default()) else { return };
    let text = Planted::new(HARBOUR, 2_048).text;
    std::fs::write(spaces.scratch().join("input.txt"), text).unwrap();
    let before = victim(&spaces).unwrap();
    let mut submits: Vec<Child> = (0..12).map(|key| submit(&spaces, key)).collect();
    eventually_true(PATIENCE, "one is accepted", || !submits[0].stdout().is_empty());
    // The others are at any stage by now, and some wait until somebody else has their shard.
    spaces.unplug(VICTIM);
    submits.extend((12..24).map(|key| submit(&spaces, key)));
    submits.into_iter().for_each(|submit| assert_succeeded(&spaces, &id_of(submit)));
    let why = spaces.client(&["why", "node", VICTIM]).stdout.join("");
    assert!(why.contains("\"silent\""), "{why}");

    spaces.plug(VICTIM);
    eventually(PATIENCE, "it is back as a new incarnation", || {
        let now = victim(&spaces)?;
        let is_back = now["state"] == "alive" && now["incarnation"] != before["incarnation"];
        if is_back { Ok(()) } else { Err(now.to_string()) }
    });
    assert_succeeded(&spaces, &id_of(submit(&spaces, 24)));
}
