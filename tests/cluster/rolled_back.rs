//! A store that comes back older than what was acknowledged.

use std::fs;

use rustix::process::Signal;
use tests::harness::{Dev, Options, PATIENCE, Planted, eventually};

use crate::{HARBOUR, PROGRAM, list, result_of, submit_and_watch, text};

/// Ends the cluster, does something to its files, and starts it again.
fn meanwhile(dev: &mut Dev, options: &Options, what: impl FnOnce()) {
    dev.child().signal(Signal::TERM);
    assert_eq!(dev.child().wait(PATIENCE).code(), Some(0));
    what();
    dev.start_again(options);
}

#[test]
fn a_shard_whose_file_is_older_than_its_last_owner_is_stopped_until_it_is_released() {
    let options = Options { nodes: 1, ..Options::default() };
    let mut dev = Dev::start_with(PROGRAM, &options);
    let work = |dev: &Dev| {
        let events = submit_and_watch(dev, "one", &Planted::new(HARBOUR, 512));
        assert_eq!(result_of(&events)["state"], "WORK_STATE_SUCCEEDED");
        text(&result_of(&events)["id"]).to_owned()
    };
    let kept = work(&dev);
    let agents = dev.run(&["agents"]).document();
    let shard = list(&agents["agents"])[0]["shard"].as_u64().unwrap_or(0).to_string();
    let data = dev.dir().join("store");
    let (file, older) = (data.join(format!("shard-{shard}.db")), dev.scratch().join("older.db"));
    meanwhile(&mut dev, &options, || _ = fs::copy(&file, &older).unwrap());
    let lost = work(&dev);
    meanwhile(&mut dev, &options, || {
        fs::copy(&older, &file).unwrap();
        for left in ["-wal", "-shm"] {
            _ = fs::remove_file(data.join(format!("shard-{shard}.db{left}")));
        }
    });
    let state = |dev: &Dev| {
        let shards = dev.run(&["shards"]).document();
        let shard = list(&shards["shards"])
            .iter()
            .find(|found| found["location"].as_str().unwrap().ends_with(&format!("/shard-{shard}")))
            .unwrap();
        text(&shard["state"]).to_owned()
    };
    let until = |dev: &Dev, wanted: &str| {
        eventually(PATIENCE, "the shard is as it has to be", || {
            let found = state(dev);
            if found == wanted { Ok(()) } else { Err(found) }
        });
    };
    until(&dev, "stopped");
    eventually(PATIENCE, "it is told why", || {
        let why = dev.run(&["why", "shard", &shard]).document();
        let last = list(&why["transitions"]).last().unwrap().clone();
        let found = (text(&last["to"]), text(&last["reason"]));
        if found == ("stopped", "store_rolled_back") { Ok(()) } else { Err(last) }
    });
    let told = ["store_rolled_back", &format!("stagedoor release {shard}")];
    dev.run(&["work", "get", &kept]).assert_error(4, &told);
    // The next leader knows it, too.
    meanwhile(&mut dev, &options, || {});
    until(&dev, "stopped");
    let other = if shard == "0" { "1" } else { "0" };
    dev.run(&["release", other]).assert_error(4, &["not stopped"]);
    dev.run(&["release", "99"]).assert_error(4, &["shard/99"]);
    dev.run(&["release", &shard]).document();
    until(&dev, "open");
    assert_eq!(dev.run(&["work", "get", &kept]).document()["state"], "WORK_STATE_SUCCEEDED");
    dev.run(&["work", "get", &lost]).assert_error(4, &["not_found"]);
    work(&dev);
}
