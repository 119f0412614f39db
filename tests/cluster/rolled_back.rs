//! A store that comes back older than what was acknowledged.

use std::fs;

use proto::v1::SubmitRequest;
use rustix::process::Signal;
use tests::harness::{Dev, Mesh, MeshOptions, Options, PATIENCE, Planted, eventually};

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

#[test]
fn a_shard_whose_file_becomes_older_while_its_owner_runs_is_stopped() {
    let mut mesh = Mesh::start(PROGRAM, &MeshOptions::default());
    let submit = |mesh: &Mesh, agent: &str, number: u32| {
        let request = SubmitRequest {
            agent: format!("default/postchain/{agent}"),
            input: format!("Who is number {number}?"),
            ..SubmitRequest::default()
        };
        let client = mesh.client().with_timeout(PATIENCE);
        mesh.block_on(async move {
            let work = client.submit(request).await?;
            let mut watch = client.watch(&work.id, "");
            while watch.next().await.transpose()?.is_some() {}
            Ok::<_, client::Error>(())
        })
    };
    let agent_in = |mesh: &Mesh, agent: &str| {
        let name = format!("default/postchain/{agent}");
        mesh.block_on(mesh.client().agent(&name)).unwrap().shard
    };
    submit(&mesh, "one", 1).unwrap();
    let shard = agent_in(&mesh, "one");
    let others = (0..100).map(|number| format!("other-{number}"));
    let other = others.into_iter().find(|name| {
        submit(&mesh, name, 0).unwrap();
        agent_in(&mesh, name) != shard
    });
    let files = ["", "-wal"].map(|suffix| {
        let name = format!("shard-{shard}.db{suffix}");
        (mesh.scratch().join("store").join(&name), mesh.scratch().join(name))
    });
    // A moment when nothing is written is copied, and comes back after more was acknowledged.
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        _ = fs::remove_file(to);
        if from.exists() {
            fs::copy(from, to).unwrap();
        }
    };
    mesh.kill("store-1");
    files.iter().for_each(|(file, older)| copy(file, older));
    mesh.start_again("store-1");
    submit(&mesh, "one", 2).unwrap();
    let pids = mesh.pids();
    mesh.kill("store-1");
    files.iter().for_each(|(file, older)| copy(older, file));
    _ = fs::remove_file(mesh.scratch().join("store").join(format!("shard-{shard}.db-shm")));
    mesh.start_again("store-1");
    // Its owner notices with the next commit, and callers are told.
    eventually(PATIENCE, "the shard is stopped", || match submit(&mesh, "one", 3) {
        Err(client::Error::Refused {
            status,
            reason: Some(domain::Reason::StoreRolledBack),
            ..
        }) if status.message().contains(&format!("stagedoor release {shard}")) => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let last = eventually(PATIENCE, "it is told why", || {
        let told = mesh.why("shard", &shard.to_string());
        let last = told.last().cloned().unwrap_or_default();
        let is_it = (&*last.to, &*last.reason) == ("stopped", "store_rolled_back");
        if is_it { Ok(last) } else { Err(format!("{told:?}")) }
    });
    assert_eq!(last.epoch, 1, "nobody had it after the owner who noticed");
    submit(&mesh, &other.unwrap(), 4).unwrap();
    let now = mesh.pids().into_iter().filter(|(name, _)| name != "store-1");
    let before = pids.into_iter().filter(|(name, _)| name != "store-1");
    assert!(now.eq(before), "a process was started again");
}
