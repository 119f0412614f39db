//! A whole cluster whose store is a real sqld.

use rustix::process::Signal;
use serde_json::Value;
use tests::faults;
use tests::harness::{Child, Dev, Options, PATIENCE, Planted, Program, Sqld, eventually};

const PROGRAM: Program = Program(env!("CARGO_BIN_EXE_stagedoor-under-test"));

fn submit_and_watch(dev: &Dev, key: &str) -> Value {
    let planted = Planted::new(["tidal lock", "copper valve", "blue heron"], 2_048);
    let path = dev.scratch().join(format!("{key}.txt"));
    std::fs::write(&path, &planted.text).unwrap();
    let path = path.to_str().unwrap();
    let args = ["submit", "--agent", "postchain", "--key", key, "--file", path, "--watch"];
    let events = dev.run(&args).documents();
    let result = events.last().unwrap()["result"].clone();
    assert_eq!(result["state"], "WORK_STATE_SUCCEEDED", "{result}");
    planted.assert_found_in(result["result"]["text"].as_str().unwrap());
    result
}

fn options(sqld: &Sqld) -> Options {
    Options { args: sqld.dev_args(), ..Options::default() }
}

#[test]
fn a_cluster_on_sqld_does_its_work_and_survives_the_death_of_a_node() {
    let Some(sqld) = Sqld::start() else { return };
    let dev = Dev::start_with(PROGRAM, &options(&sqld));
    let processes = dev.ready()["processes"].as_array().unwrap();
    let roles: Vec<_> = processes.iter().map(|process| process["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["control", "node", "node", "node"]);
    let status = dev.run(&["status"]).document();
    assert_eq!(status["store"]["url"].as_str(), Some(sqld.url().as_str()), "{status}");
    let engine = status["store"]["engine"].as_str().unwrap_or_default();
    assert!(engine.contains("sqld 0.24"), "{status}");
    assert_eq!(status["store"]["durability"], "full", "{status}");
    // Nodes have no key to the admin API.
    let node = dev.config("node-1").to_string();
    assert!(node.contains("token_file") && !node.contains("admin_url"), "{node}");

    let first = submit_and_watch(&dev, "before");
    dev.signal("node-1", Signal::KILL);
    eventually(PATIENCE, "every shard is open on the other nodes", || {
        let status = dev.run(&["status"]).document();
        let shards = status["shards"].as_array().unwrap().clone();
        let lost = shards.iter().filter(|s| s["state"] != "open" || s["node"] == "node-1").count();
        if lost == 0 { Ok(()) } else { Err(format!("{lost} shards that are not")) }
    });
    let works: Vec<_> = (0..6).map(|n| submit_and_watch(&dev, &format!("after-{n}"))).collect();
    assert_eq!(works.len(), 6);
    // What was done before is still there.
    let id = first["id"].as_str().unwrap();
    let again = dev.run(&["work", "get", id]).document();
    assert_eq!(again["state"], "WORK_STATE_SUCCEEDED", "{again}");
}

#[test]
fn a_second_cluster_does_not_form_on_the_same_databases() {
    let Some(sqld) = Sqld::start() else { return };
    let first = Dev::start_with(PROGRAM, &Options { nodes: 1, ..options(&sqld) });
    let status = first.run(&["status"]).document();
    let mut command = PROGRAM.command();
    command.arg("dev").arg("--data-dir").arg(first.scratch().join("second"));
    command.args(["--nodes", "1", "--api", "127.0.0.1:0", "--output", "json"]);
    let mut second = Child::spawn("second", command.args(sqld.dev_args()));
    assert_eq!(second.wait(PATIENCE).code(), Some(1));
    let said = second.stderr().join("\n");
    let id = status["clusterId"].as_str().unwrap();
    assert!(said.contains(id) && said.contains("another authority"), "{said}");
    submit_and_watch(&first, "goes-on");
}

#[test]
fn random_faults_on_sqld_leave_a_sound_history() {
    if Sqld::start().is_none() {
        return;
    }
    let options = faults::Options::from_env(faults::Store::Sqld, 40);
    let report = faults::run(PROGRAM, &options).unwrap();
    eprintln!("{report}");
    assert!(report.is_sound(), "seed {}", options.seed);
    assert!(report.had_all, "{:?}", report.happened);
    assert!(0 < report.calls, "no call was made that must not be made twice");
}
