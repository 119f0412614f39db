//! A node dies at every place of a turn at which that could cost something, and another is stopped there and wakes.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use telemetry::fault::{
    COMMIT, DOUBT_POINTS, LOST_POINTS, OWNER_POINTS, POINTS, PROOF_POINTS, VARIABLE,
};
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

/// How many clusters are up at once: most of the time they wait.
const AT_ONCE: usize = 2;

#[test]
fn wherever_nodes_die_or_stop_every_call_is_made_once_and_no_work_is_lost() {
    let points = POINTS.into_iter().filter(|point| !point.starts_with("writer"));
    // The third of whatever kind it is: others are under way, and none of them is first.
    each(points, |point| sweep(point, 3, ""));
}

#[test]
fn wherever_a_writer_dies_or_stops_every_call_is_made_once_and_no_work_is_lost() {
    let points = POINTS.into_iter().filter(|point| point.starts_with("writer"));
    each(points.chain(LOST_POINTS), |point| {
        if !LOST_POINTS.contains(&point) {
            return sweep(point, OPENINGS + 3, "");
        }
        let injected = if point == "writer-backing-off" { "refuse" } else { "lose" };
        sweep(point, 1, &format!("{COMMIT}:{}:{injected}", OPENINGS + 3));
    });
}

#[test]
fn wherever_who_stood_still_dies_or_stops_every_call_is_made_once_and_no_work_is_lost() {
    // Too short for a verdict, and long enough to be unsure of its shards.
    each(PROOF_POINTS, |point| sweep(point, 1, "step-before:5:block-1300"));
}

#[test]
fn wherever_the_next_owner_dies_or_stops_the_one_after_it_loses_and_repeats_nothing() {
    each(deaths(&OWNER_POINTS), |(point, action)| {
        // Four it opens before anything has happened, and two of the dead node's.
        let pass = if point.starts_with("open") { OPENINGS } else { 1 };
        let plan = format!("node-1:call-answered:3:kill,node-2:{point}:{pass}:{action}");
        run(point, Tool { reconcile: true, ..Tool::default() }, plan, action == "stop");
    });
}

#[test]
fn wherever_a_doubt_is_cut_short_every_call_is_made_once_and_no_work_is_lost() {
    // Many calls are under way on who dies first, so that who comes next has doubts to settle.
    let tool = Tool { reconcile: true, delay_ms: 1_000, ..Tool::default() };
    each(deaths(&DOUBT_POINTS), |(point, action)| {
        let plan = format!("node-1:tool-returned:1:kill,node-2:{point}:1:{action}");
        run(point, tool, plan, action == "stop");
    });
}

fn deaths(points: &[&'static str]) -> Vec<(&'static str, &'static str)> {
    let both = |point: &&'static str| ["kill", "stop"].map(|action| (*point, action));
    points.iter().flat_map(both).collect()
}

/// Runs every case, a few at a time.
fn each<T: Send>(cases: impl IntoIterator<Item = T>, run: impl Fn(T) + Sync) {
    let cases: Mutex<VecDeque<T>> = Mutex::new(cases.into_iter().collect());
    let next = || cases.lock().unwrap().pop_front();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(case) = next() {
                    run(case);
                }
            });
        }
    });
}

/// Two nodes get to `point`, after what else is planned for both: one dies there, the other is stopped.
fn sweep(point: &str, pass: usize, before: &str) {
    let plan = |node: &str, action: &str| {
        let before = if before.is_empty() { String::new() } else { format!("{node}:{before},") };
        format!("{before}{node}:{point}:{pass}:{action}")
    };
    let plan = format!("{},{}", plan("node-1", "kill"), plan("node-2", "stop"));
    run(point, Tool { reconcile: true, ..Tool::default() }, plan, true);
}

/// Two nodes get to what is planned for them; every work ends all the same.
fn run(point: &str, tool: Tool, plan: String, wakes: bool) {
    // Every node opens as many shards as it was planned for.
    let env = vec![(VARIABLE.to_owned(), plan.clone()), placed_at_once()];
    let desk = Desk::start_with(tool, TOOL_TIMEOUT_MS, env);
    desk.apply("clerk", "");
    let before = desk.incarnations();
    let works = desk.submit("clerk", WORKS);
    for node in ["node-1", "node-2"] {
        let last = plan.split(',').rfind(|plan| plan.starts_with(node)).unwrap_or_default();
        let last = last.split(':').nth(1).unwrap_or_default();
        eventually(PATIENCE, &format!("{node} gets to {last}"), || {
            let log = desk.dev.log(node);
            let is_there = |line: &str| line.contains("a planned fault") && line.contains(last);
            if log.lines().any(is_there) { Ok(()) } else { Err(log) }
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
        // Whatever it still had to do it has done by then.
        desk.await_return("node-2", &before);
    }
    let ended: Vec<_> = works.iter().map(|id| desk.ended(id)).collect();
    for (id, work) in works.iter().zip(ended) {
        assert_eq!(work["state"], "WORK_STATE_SUCCEEDED", "{point}: {work}");
        // Where nobody wakes, nobody is late with a call.
        let calls = if wakes { desk.made_of(id) } else { desk.calls_of(id) };
        assert_eq!(calls, 1, "{point}: {work}");
        assert_eq!(
            text(&work["result"]["text"]),
            desk.answer_of(id),
            "{point}: the call's own answer"
        );
    }
}
