//! Agents come and go in memory; what they know stays.

use tests::harness::{Dev, Options, PATIENCE, Planted, eventually};

use crate::{HARBOUR, ORCHARD, PROGRAM, list, result_of, submit_and_watch, text};

/// Agents are put out of memory soon after their last work.
fn forgetful() -> Dev {
    let env = vec![("STAGEDOOR_NODE__AGENTS__IDLE_MS".to_owned(), "200".to_owned())];
    Dev::start_with(PROGRAM, &Options { env, ..Options::default() })
}

#[test]
fn an_idle_agent_goes_cold_and_wakes_with_all_that_it_knew() {
    let dev = forgetful();
    let first = submit_and_watch(&dev, "sleeper", &Planted::new(HARBOUR, 1_024));
    eventually(PATIENCE, "the agent is cold", || {
        let agent = dev.run(&["agents", "get", "default/postchain/sleeper"]).document();
        if agent["state"] == "cold" { Ok(()) } else { Err(agent) }
    });
    let evicted = || dev.node_metrics("stagedoor_agent_evicted_total", &[]);
    let activated = || dev.node_metrics("stagedoor_agent_activated_total", &[]);
    assert_eq!((activated(), evicted()), (1.0, 1.0));

    let second = submit_and_watch(&dev, "sleeper", &Planted::new(ORCHARD, 1_024));
    assert_eq!(activated(), 2.0);
    // Its own earlier findings are recalled, and no stranger's.
    let answer = text(&result_of(&second)["result"]["text"]);
    assert!(answer.contains("Recalled") && answer.contains(HARBOUR[0]), "{answer}");
    let stranger = submit_and_watch(&dev, "stranger", &Planted::new(ORCHARD, 1_024));
    let answer = text(&result_of(&stranger)["result"]["text"]);
    assert!(!answer.contains(HARBOUR[0]), "{answer}");
    // Its journal goes on where it ended.
    let history = dev.run(&["agents", "history", "default/postchain/sleeper"]).documents();
    let seqs: Vec<u64> = history.iter().map(|e| text(&e["seq"]).parse().unwrap()).collect();
    assert_eq!(seqs, (1..=16).rev().collect::<Vec<_>>());
    // Each time that it came into memory and left it is written down.
    eventually(PATIENCE, "it is cold once more", || {
        let why = dev.run(&["why", "agent", "default/postchain/sleeper"]).document();
        let passages = list(&why["transitions"]).iter().filter(|one| {
            let is_of_agent = text(&one["subject"]) == "agent/default/postchain/sleeper";
            is_of_agent && one.get("epoch").is_some() && one.get("time").is_some()
        });
        let told: Vec<_> = passages.map(|one| text(&one["reason"]).to_owned()).collect();
        if told == ["activated", "idle", "activated", "idle"] { Ok(()) } else { Err(why) }
    });
    let first = text(&result_of(&first)["id"]);
    assert_eq!(list(&dev.run(&["work", "get", first]).document()["steps"]).len(), 6);
}

#[test]
fn an_idempotency_key_is_known_to_an_agent_that_was_cold() {
    let dev = forgetful();
    let args = ["submit", "--agent", "postchain", "--key", "k", "--text", "A lamp. Why?"];
    let args = [&args[..], &["--idempotency-key", "once"]].concat();
    let first = dev.run(&args).document();
    dev.run(&["work", "watch", text(&first["id"])]).documents();
    eventually(PATIENCE, "the agent is cold", || {
        let agent = dev.run(&["agents", "get", "default/postchain/k"]).document();
        if agent["state"] == "cold" { Ok(()) } else { Err(agent) }
    });
    let again = dev.run(&args).document();
    assert_eq!(again["id"], first["id"]);
    assert_eq!(again["state"], "WORK_STATE_SUCCEEDED");
}
