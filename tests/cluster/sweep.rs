//! A node dies at every place of a turn at which that could cost something, and another is stopped there and wakes.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use telemetry::fault::{OWNER_POINTS, POINTS, VARIABLE};
use tests::harness::{PATIENCE, eventually, placed_at_once};

use crate::steps::{Desk, Tool};
use crate::{list, text};

const WORKS: usize = 24;
/// How long a node is stopped at least, before it wakes.
const STOPPED: Duration = Duration::from_secs(5);
/// Calls of the tool are short here; doubts end soon after.
const TOOL_TIMEOUT_MS: u64 = 2_000;
/// A writer passes its places once for each shard that it opens before anything else.
const OPENINGS: usize = 6;

#[test]
fn wherever_nodes_die_or_stop_every_call_is_made_once_and_no_work_is_lost() {
    for point in POINTS {
        sweep(point);
    }
}

#[test]
fn wherever_the_next_owner_dies_or_stops_the_one_after_it_loses_and_repeats_nothing() {
    for point in OWNER_POINTS {
        // Four it opens before anything has happened, and two of the dead node's.
        let pass = if point.starts_with("open") { OPENINGS } else { 1 };
        for action in ["kill", "stop"] {
            let plan = format!("node-1:turn-answered:3:kill,node-2:{point}:{pass}:{action}");
            run(point, plan, action == "stop");
        }
    }
}

fn sweep(point: &str) {
    let pass = if point.starts_with("writer") { OPENINGS + 3 } else { 3 };
    run(point, format!("node-1:{point}:{pass}:kill,node-2:{point}:{pass}:stop"), true);
}

/// Two nodes get to what is planned for them; every work ends all the same.
fn run(point: &str, plan: String, wakes: bool) {
    let tool = Tool { reconcile: true, ..Tool::default() };
    // Every node opens as many shards as it was planned for.
    let env = vec![(VARIABLE.to_owned(), plan), placed_at_once()];
    let desk = Desk::start_with(tool, TOOL_TIMEOUT_MS, env);
    desk.apply("clerk", "");
    let works = desk.submit("clerk", WORKS);
    for node in ["node-1", "node-2"] {
        eventually(PATIENCE, &format!("{node} gets to {point}"), || {
            let log = desk.dev.log(node);
            if log.contains("a planned fault") { Ok(()) } else { Err(log) }
        });
    }
    let since = Instant::now();
    eventually(PATIENCE, "who was stopped counts as dead", || {
        let nodes = desk.dev.run(&["nodes"]).document();
        let alive = list(&nodes["nodes"]).iter().filter(|node| node["state"] == "alive");
        let alive: Vec<_> = alive.map(|node| text(&node["name"]).to_owned()).collect();
        if alive == ["node-3"] { Ok(()) } else { Err(format!("{alive:?} live")) }
    });
    if wakes {
        // Long dead for the others, and what it was about to do is old.
        std::thread::sleep(STOPPED.saturating_sub(since.elapsed()));
        desk.dev.signal("node-2", Signal::CONT);
    }
    for id in &works {
        let work = desk.ended(id);
        assert_eq!(work["state"], "WORK_STATE_SUCCEEDED", "{point}: {work}");
        // Where nobody wakes, nobody is late with a call.
        let calls = if wakes { desk.made_of(id) } else { desk.calls_of(id) };
        assert_eq!(calls, 1, "{point}: {work}");
    }
}
