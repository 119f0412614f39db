//! A backup that is made while the cluster works, and a restore that takes its place.

use rustix::process::Signal;
use tests::harness::{Dev, Options, PATIENCE, Planted};

use crate::{HARBOUR, ORCHARD, PROGRAM, list, result_of, submit_and_watch, text};

fn work_of(dev: &Dev, key: &str, about: [&str; 3]) -> String {
    let events = submit_and_watch(dev, key, &Planted::new(about, 512));
    let result = result_of(&events);
    assert_eq!(result["state"], "WORK_STATE_SUCCEEDED", "{result}");
    text(&result["id"]).to_owned()
}

#[test]
fn a_cluster_goes_on_from_a_backup_and_gives_no_number_of_a_lost_work_away() {
    let mut dev = Dev::start(PROGRAM);
    let kept = work_of(&dev, "one", HARBOUR);
    let before = dev.run(&["work", "get", &kept]).document();
    let made = dev.run(&["store", "backup", "nightly"]).document();
    let databases: Vec<_> = list(&made["databases"]).iter().map(text).collect();
    assert_eq!((text(&made["name"]), databases.last()), ("nightly", Some(&"control")), "{made}");
    assert_eq!(databases.len(), 1 + list(&dev.run(&["shards"]).document()["shards"]).len());
    // The name is taken; another one that is no name is refused.
    dev.run(&["store", "backup", "nightly"]).assert_error(4, &["nightly", "another name"]);
    dev.run(&["store", "backup", "a/b"]).assert_error(4, &["a/b", "letters"]);
    let lost = work_of(&dev, "one", ORCHARD);

    let config = dev.dir().join("config/store-1.toml");
    let restore = ["store", "restore", "nightly", "--config", config.to_str().unwrap()];
    PROGRAM.run(&restore).assert_error(1, &["in use", "stop"]);
    dev.child().signal(Signal::TERM);
    assert_eq!(dev.child().wait(PATIENCE).code(), Some(0));
    let unknown = ["store", "restore", "weekly", "--config", config.to_str().unwrap()];
    PROGRAM.run(&unknown).assert_error(1, &["weekly", "backups"]);
    let restored = PROGRAM.run(&restore);
    assert_eq!(restored.code, Some(0), "{restored}");

    dev.start_again(&Options::default());
    assert_eq!(dev.run(&["work", "get", &kept]).document(), before);
    dev.run(&["work", "get", &lost]).assert_error(4, &[&lost, "not_found"]);
    // The same agent goes on, behind everything that it ever had.
    let later = work_of(&dev, "one", ORCHARD);
    let number = |id: &str| u64::from_str_radix(id.rsplit('-').next().unwrap(), 16).unwrap();
    assert!(number(&lost) < number(&later), "{lost}, then {later}");
    // The same backup once more, in the place of what came of it.
    dev.child().signal(Signal::TERM);
    assert_eq!(dev.child().wait(PATIENCE).code(), Some(0));
    let restored = PROGRAM.run(&restore);
    assert_eq!(restored.code, Some(0), "{restored}");
    dev.start_again(&Options::default());
    let latest = work_of(&dev, "one", ORCHARD);
    assert!(number(&later) < number(&latest), "{later}, then {latest}");
}
