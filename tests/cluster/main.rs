//! Clusters of real processes: what the whole promises, shown from outside.
//!
//! Never looks into a process; what is asserted was printed, answered, logged or counted by it.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod agents;
mod backup;
mod by_hand;
mod commands;
mod faults;
mod intruders;
mod lifetime;
mod load;
mod namespaces;
mod offers;
mod refusals;
mod replicas;
mod rolled_back;
mod run;
mod spoken;
mod steps;
mod sweep;
mod tracing;

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tests::harness::{Dev, Planted, Program};

/// What cargo has just built.
const PROGRAM: Program = Program(env!("CARGO_BIN_EXE_stagedoor-under-test"));
const PHASES: [&str; 6] =
    ["action", "experience", "intention", "observation", "understanding", "yield"];

/// Three things that a text may be about.
const HARBOUR: [&str; 3] = ["tidal lock", "copper valve", "blue heron"];
const ORCHARD: [&str; 3] = ["stone press", "amber cider", "grafted quince"];

/// Puts a text into a file of the cluster's own.
fn file(dev: &Dev, name: &str, text: &str) -> PathBuf {
    let path = dev.scratch().join(name);
    fs::write(&path, text).unwrap();
    path
}

/// Submits a text to an agent of its own and waits for the end: the events.
fn submit_and_watch(dev: &Dev, key: &str, text: &Planted) -> Vec<Value> {
    let path = file(dev, &format!("{key}.txt"), &text.text);
    let path = path.to_str().unwrap();
    let args = ["submit", "--agent", "postchain", "--key", key, "--file", path, "--watch"];
    dev.run(&args).documents()
}

/// The work that the last event of a watch carries.
fn result_of(events: &[Value]) -> &Value {
    let result = &events.last().unwrap()["result"];
    assert!(result.is_object(), "the last event is no result: {events:#?}");
    result
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn list(value: &Value) -> &[Value] {
    // An empty list is a default value, and left out.
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Runs a trial again that says that the machine was too busy for what it shows: that has to be shown once.
fn until_not_too_busy(trial: impl Fn() -> bool) {
    let trials = 3;
    let is_shown = (0..trials).any(|_| !trial());
    assert!(is_shown, "the machine was too busy {trials} times");
}

/// Runs something asynchronous to its end.
fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(Box::pin(work))
}
