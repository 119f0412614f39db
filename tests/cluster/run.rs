//! One text through the PostChain, and what is printed on the way.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;
use telemetry::fault::VARIABLE;
use tests::harness::{
    Child, Dev, Options, Output, PATIENCE, Planted, eventually, eventually_true, pids_with_mark,
    placed_at_once, starting,
};

use crate::{HARBOUR, ORCHARD, PHASES, PROGRAM, list, result_of, submit_and_watch, text};

fn names<'a>(steps: &'a [Value], field: &str) -> Vec<&'a str> {
    steps.iter().map(|step| text(&step[field])).collect()
}

#[test]
fn a_text_goes_through_six_phases_on_several_nodes_and_the_answer_names_what_is_in_it() {
    let dev = Dev::start(PROGRAM);
    let (harbour, orchard) = (Planted::new(HARBOUR, 2_048), Planted::new(ORCHARD, 2_048));
    let mut answers = Vec::new();
    for (key, planted) in [("harbour", &harbour), ("orchard", &orchard)] {
        let events = submit_and_watch(&dev, key, planted);
        let result = result_of(&events);
        assert_eq!(result["state"], "WORK_STATE_SUCCEEDED", "{result}");
        let answer = text(&result["result"]["text"]);
        planted.assert_found_in(answer);
        assert!(answer.to_lowercase().contains("extractive"), "it does not say so: {answer}");
        answers.push(answer.to_owned());

        let work = dev.run(&["work", "get", text(&result["id"])]).document();
        let steps = list(&work["steps"]);
        assert_eq!(names(steps, "name"), PHASES);
        assert!(2 <= names(steps, "node").into_iter().collect::<BTreeSet<_>>().len(), "{work}");
        assert!(steps.iter().all(|step| step["attempts"] == 1), "{work}");
    }
    assert_ne!(answers[0], answers[1]);
}

/// Accepted, then running because its turn began, then the first phase.
fn assert_begins_with_its_turn(events: &[Value]) {
    let told = |event: &Value| {
        let change = event.get("stateChange")?;
        Some((text(&change["state"]).to_owned(), text(&change["reason"]).to_owned()))
    };
    let changes: Vec<_> = events.iter().map_while(told).collect();
    let expected = [("WORK_STATE_ACCEPTED", "submitted"), ("WORK_STATE_RUNNING", "turn_began")];
    let expected = expected.map(|(state, reason)| (state.to_owned(), reason.to_owned()));
    assert_eq!(changes, expected, "{events:#?}");
    assert!(events[2].get("phase").is_some(), "{}", events[2]);
}

#[test]
fn a_watch_prints_one_event_a_line_and_the_result_last() {
    let dev = Dev::start(PROGRAM);
    let events = submit_and_watch(&dev, "watched", &Planted::new(HARBOUR, 2_048));
    let kinds = ["stateChange", "phase", "text", "result"];
    for event in &events {
        assert!(!text(&event["cursor"]).is_empty(), "{event}");
        let has = |kind: &&str| event.get(kind).is_some();
        assert_eq!(kinds.iter().filter(|kind| has(kind)).count(), 1, "{event}");
    }
    assert_begins_with_its_turn(&events);
    let phases: Vec<_> = events.iter().filter_map(|event| event.get("phase")).collect();
    let phases: Vec<_> = phases.into_iter().map(|step| text(&step["name"])).collect();
    assert_eq!(phases, PHASES);
    let results: Vec<_> = events.iter().filter(|event| event.get("result").is_some()).collect();
    assert_eq!(results.len(), 1);
    let work = result_of(&events);

    // A watch of a work that has ended shows the same, from its beginning or from any event.
    let id = text(&work["id"]);
    let again = dev.run(&["work", "watch", id]).documents();
    let cursors = |events: &[Value]| -> Vec<String> {
        events.iter().map(|event| text(&event["cursor"]).to_owned()).collect()
    };
    assert_eq!(text(&result_of(&again)["id"]), id);
    assert_begins_with_its_turn(&again);
    assert_eq!(cursors(&again), cursors(&events));
    let middle = cursors(&again)[again.len() / 2].clone();
    let rest = dev.run(&["work", "watch", id, "--cursor", &middle]).documents();
    assert_eq!(cursors(&rest), cursors(&again)[again.len() / 2 + 1..]);
}

#[test]
fn a_work_has_the_fields_that_programs_read() {
    let dev = Dev::start(PROGRAM);
    let events = submit_and_watch(&dev, "fields", &Planted::new(HARBOUR, 2_048));
    let id = text(&result_of(&events)["id"]).to_owned();
    assert!(id.starts_with("w-"), "{id}");
    let work = dev.run(&["work", "get", &id]).document();
    assert_eq!(text(&work["agent"]), "default/postchain/fields");
    assert_eq!(text(&work["reason"]), "completed");
    let hash = text(&work["definitionHash"]);
    assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{hash}");
    assert!(text(&work["createTime"]) <= text(&work["endTime"]), "{work}");
    for (index, step) in list(&work["steps"]).iter().enumerate() {
        assert_eq!(step["sequence"], index + 1);
        assert_eq!(step["kind"], "phase");
        assert_eq!(step["reason"], "completed");
        assert!(text(&step["node"]).starts_with("node-"), "{step}");
        // 64-bit numbers are texts in the JSON of protobuf.
        assert!(1 <= text(&step["epoch"]).parse::<u64>().unwrap(), "{step}");
        assert!(text(&step["startTime"]) <= text(&step["endTime"]), "{step}");
    }

    // What submit prints without a watch: the same work, just begun.
    let submit = ["submit", "--agent", "postchain", "--key", "fields", "--text", "A lamp. Why?"];
    let begun = dev.run(&submit).document();
    assert_eq!(text(&begun["agent"]), "default/postchain/fields");
    assert!(begun.get("steps").is_none() && begun.get("result").is_none(), "{begun}");
}

#[test]
fn the_ready_line_and_the_status_have_the_shape_that_programs_read() {
    let options = Options { env: vec![placed_at_once()], ..Options::default() };
    let dev = Dev::start_with(PROGRAM, &options);
    let ready = dev.ready();
    assert_eq!(ready["ready"], true);
    assert!(dev.api().split(',').all(|address| address.starts_with("127.0.0.1:")), "{ready}");
    assert!(dev.credentials().join("client.crt").is_file(), "{ready}");
    let roles: Vec<_> = list(&ready["processes"]).iter().map(|p| text(&p["role"])).collect();
    assert_eq!(roles, ["store", "control", "node", "node", "node"]);
    let processes: Vec<_> = list(&ready["processes"]).iter().map(|p| text(&p["name"])).collect();
    assert_eq!(processes, ["store-1", "control-1", "node-1", "node-2", "node-3"]);

    let status = dev.run(&["status"]).document();
    assert!(!text(&status["clusterId"]).is_empty(), "{status}");
    assert!(processes.contains(&text(&status["leader"]["name"])), "{status}");
    assert!(1 <= text(&status["leader"]["term"]).parse::<u64>().unwrap(), "{status}");
    assert_eq!(list(&status["nodes"]).len(), 3);
    assert!(list(&status["nodes"]).iter().all(|node| node["state"] == "alive"), "{status}");
    assert_eq!(list(&status["shards"]).len(), 12);
    assert!(list(&status["shards"]).iter().all(|shard| shard["state"] == "open"), "{status}");
    assert_eq!(status["store"]["reachable"], true, "{status}");
    // Who owns a shard is one of the nodes, and every node owns some.
    let owners: BTreeSet<_> =
        list(&status["shards"]).iter().map(|shard| text(&shard["node"])).collect();
    assert_eq!(owners.into_iter().collect::<Vec<_>>(), ["node-1", "node-2", "node-3"]);
}

#[test]
fn the_demo_shows_an_answer_and_leaves_neither_process_nor_file() {
    let dir = tempfile::tempdir().unwrap();
    let temporary = dir.path().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let planted = Planted::new(HARBOUR, 4_096);
    let path = dir.path().join("harbour.txt");
    fs::write(&path, &planted.text).unwrap();
    let mark = format!("STAGEDOOR_TEST_MARK={}", dir.path().display());
    let (name, value) = mark.split_once('=').unwrap();
    let mut command = PROGRAM.command();
    command.env("TMPDIR", &temporary).env(name, value).arg("demo").arg(&path);
    let starting = starting();
    let output = Output::of(&mut command);
    drop(starting);
    assert_eq!(output.code, Some(0), "{output}");
    let shown = output.stdout.join("\n");
    planted.assert_found_in(&shown);
    for phase in PHASES {
        let line = output.stdout.iter().find(|line| line.trim_start().starts_with(phase));
        let line = line.unwrap_or_else(|| panic!("{phase} is missing in {shown}"));
        assert!(line.contains("node-") && line.contains(" ms"), "{line}");
    }
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "a directory is left");
    assert_eq!(pids_with_mark(&mark), [0; 0], "a process is left");
}

#[test]
fn the_demo_shows_phases_while_others_are_still_to_come() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("harbour.txt");
    fs::write(&path, Planted::new(HARBOUR, 2_048).text).unwrap();
    let mark = format!("STAGEDOOR_TEST_MARK={}", dir.path().display());
    let (name, value) = mark.split_once('=').unwrap();
    // Whoever owns the agent stands still in the middle of its turn, and another goes on seconds later.
    let plan = ["node-1", "node-2", "node-3"].map(|node| format!("{node}:step-answered:5:stop"));
    let mut command = PROGRAM.command();
    command.env("TMPDIR", dir.path()).env(name, value).env(VARIABLE, plan.join(","));
    let starting = starting();
    let mut demo = Child::spawn("demo", command.arg("demo").arg(&path));
    eventually_true(PATIENCE, "its processes listen", || !demo.stdout().is_empty());
    drop(starting);
    let is_over = |shown: &[String]| shown.iter().any(|line| line.starts_with("succeeded"));
    eventually(PATIENCE, "phases are shown and the answer is not", || {
        let stands_still = pids_with_mark(&mark).into_iter().any(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
        });
        let shown = demo.stdout();
        let has_phase = shown.iter().any(|line| line.trim_start().starts_with(PHASES[0]));
        if stands_still && has_phase && !is_over(&shown) { Ok(()) } else { Err(shown.join("\n")) }
    });
    assert!(demo.wait(PATIENCE).success(), "{}", demo.stderr().join("\n"));
    assert!(is_over(&demo.stdout()), "{:?}", demo.stdout());
    assert_eq!(pids_with_mark(&mark), [0; 0], "a process is left");
}

#[test]
fn each_step_of_a_work_is_a_commit_of_its_own() {
    let idle = ("STAGEDOOR_NODE__AGENTS__IDLE_MS".to_owned(), "3600000".to_owned());
    let env = vec![idle, placed_at_once()];
    let dev = Dev::start_with(PROGRAM, &Options { env, ..Options::default() });
    let groups = || dev.node_metrics("stagedoor_store_writer_groups_total", &[]);
    let before = groups();
    let works = 3;
    for n in 0..works {
        submit_and_watch(&dev, &format!("commits-{n}"), &Planted::new(HARBOUR, 2_048));
    }
    // The acceptance, six phases of which the last ends the work, and the row of the agent. Nobody else has anything to
    // commit, so fewer would mean that two of them were in one.
    let expected = f64::from(8 * works);
    eventually(PATIENCE, "all is committed", || {
        let committed = groups() - before;
        if committed == expected { Ok(()) } else { Err(committed) }
    });
}
