//! A machine whose network dies while it works.

use serde_json::Value;
use tests::harness::{MeshOptions, PATIENCE, Planted, Spaces, eventually};

use crate::{HARBOUR, PROGRAM, list};

const VICTIM: &str = "node-2";

fn submit(spaces: &Spaces, key: usize) -> String {
    let path = spaces.scratch().join("input.txt");
    let (key, path) = (key.to_string(), path.to_str().unwrap());
    let args =
        ["submit", "--agent", "postchain", "--key", &key, "--file", path, "--timeout", "120s"];
    let work = spaces.client(&args).document();
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
    let mut works: Vec<String> = (0..12).map(|key| submit(&spaces, key)).collect();
    spaces.unplug(VICTIM);
    // Some of these wait until somebody else has their shard.
    works.extend((12..24).map(|key| submit(&spaces, key)));
    works.iter().for_each(|id| assert_succeeded(&spaces, id));
    let why = spaces.client(&["why", "node", VICTIM]).stdout.join("");
    assert!(why.contains("\"silent\""), "{why}");

    spaces.plug(VICTIM);
    eventually(PATIENCE, "it is back as a new incarnation", || {
        let now = victim(&spaces)?;
        let is_back = now["state"] == "alive" && now["incarnation"] != before["incarnation"];
        if is_back { Ok(()) } else { Err(now.to_string()) }
    });
    assert_succeeded(&spaces, &submit(&spaces, 24));
}
