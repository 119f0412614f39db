//! Tools whose calls must not be made twice, and the deaths of those who had called them.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proto::v1::SubmitRequest;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tests::harness::{Dev, Options, Output, PATIENCE, eventually};
use tool::Called;

use crate::{PROGRAM, block_on, list, text};

/// For how long the tool lets its callers wait: all of them are there then, and nobody has an answer.
const DELAY_MS: u64 = 5_000;
const TOOL_TIMEOUT_MS: u64 = 7_000;
/// For a work whose owner died and whose doubt is settled after its deadline and five seconds.
const SETTLED: Duration = Duration::from_secs(60);
const WORKS: usize = 9;
/// A program with one call.
const ONE_CALL: &str = r#"{"calls":[{"tool":"count"}],"answer":"got {results}"}"#;

/// How many calls a node makes at once.
const WORKERS: &str = "STAGEDOOR_NODE__PHASES__WORKERS";

/// A cluster whose nodes have the counting tool.
pub(crate) struct Desk {
    pub(crate) dev: Dev,
    folder: TempDir,
}

/// How the tool behaves.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tool {
    pub(crate) delay_before_ms: u64,
    pub(crate) delay_ms: u64,
    pub(crate) reconcile: bool,
}

impl Desk {
    fn start(tool: Tool) -> Self {
        Self::start_with(tool, TOOL_TIMEOUT_MS, Vec::new())
    }

    /// With these variables in the environment of every process.
    pub(crate) fn start_with(
        tool: Tool,
        timeout_ms: u64,
        variables: Vec<(String, String)>,
    ) -> Self {
        let options = Options { env: variables, ..Options::default() };
        Self::start_on(options, tool, timeout_ms)
    }

    fn start_on(mut options: Options, tool: Tool, timeout_ms: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("calls").display().to_string();
        let set = |name: &str, value: String| (format!("STAGEDOOR_NODE__{name}"), value);
        options.env.extend([
            set("TOOLS__COUNT__FILE", file),
            set("TOOLS__COUNT__RECONCILE", tool.reconcile.to_string()),
            set("TOOLS__COUNT__DELAY_MS", tool.delay_ms.to_string()),
            set("TOOLS__COUNT__DELAY_BEFORE_MS", tool.delay_before_ms.to_string()),
            set("AGENTS__TOOL_TIMEOUT_MS", timeout_ms.to_string()),
        ]);
        if !options.env.iter().any(|(name, _)| name == WORKERS) {
            options.env.push((WORKERS.to_owned(), "16".to_owned()));
        }
        Self { dev: Dev::start_with(PROGRAM, &options), folder }
    }

    pub(crate) fn apply(&self, name: &str, rest: &str) {
        let path = self.dev.scratch().join(format!("{name}.toml"));
        let tools = "tools = [\"count\", \"echo\"]";
        let text =
            format!("name = \"{name}\"\nbehaviour = \"loop\"\nmodel = \"script\"\n{tools}\n{rest}");
        fs::write(&path, text).unwrap();
        let output = self.dev.run(&["apply", "-f", path.to_str().unwrap()]);
        assert_eq!(output.code, Some(0), "{output}");
    }

    /// The calls that were begun, in their order.
    fn calls(&self) -> Vec<Called> {
        let text = fs::read_to_string(self.folder.path().join("calls")).unwrap_or_default();
        tool::calls(&text)
    }

    fn begun_of(&self, work: &str) -> Vec<Called> {
        let (calls, prefix) = (self.calls(), format!("{work}/"));
        calls.into_iter().filter(|called| called.key.starts_with(&prefix)).collect()
    }

    pub(crate) fn calls_of(&self, work: &str) -> usize {
        self.begun_of(work).len()
    }

    /// Calls that counted: a node that is stopped between its last look at the clock and the call makes it when it wakes,
    /// and only the tool can know that it comes late.
    pub(crate) fn made_of(&self, work: &str) -> usize {
        self.begun_of(work).iter().filter(|called| called.is_made).count()
    }

    /// What a work answers whose one call counted.
    pub(crate) fn answer_of(&self, work: &str) -> String {
        let prefix = format!("{work}/");
        let mut made = self.calls().into_iter().filter(|called| called.is_made);
        let number = made.position(|called| called.key.starts_with(&prefix));
        number.map_or("no call".to_owned(), |number| format!("got {}", number + 1))
    }

    /// Submits works to many agents at once: their ids.
    fn submit_many(&self, agent: &str) -> Vec<String> {
        self.submit(agent, WORKS)
    }

    pub(crate) fn submit(&self, agent: &str, count: usize) -> Vec<String> {
        let client = self.dev.client();
        block_on(async {
            let submits = (0..count).map(|n| {
                let request = SubmitRequest {
                    agent: format!("default/{agent}/k{n}"),
                    idempotency_key: format!("key-{n}"),
                    input: ONE_CALL.to_owned(),
                    timeout: Some(Duration::from_secs(300).into()),
                    ..SubmitRequest::default()
                };
                client.submit(request)
            });
            let works = futures::future::join_all(submits).await;
            works.into_iter().map(|work| work.unwrap().id).collect()
        })
    }

    fn get(&self, id: &str) -> Value {
        self.dev.run(&["work", "get", id]).document()
    }

    pub(crate) fn ended(&self, id: &str) -> Value {
        eventually(SETTLED, "the work ends", || {
            let work = self.get(id);
            if work["endTime"].is_string() { Ok(work) } else { Err(work) }
        })
    }

    /// Who owns the most of these works, and who owns each.
    fn busiest(&self, works: &[String]) -> (String, Vec<String>) {
        let client = self.dev.client();
        let owner = async |id: &String| {
            let work = client.get(id).await.unwrap();
            client.agent(&work.agent).await.unwrap().node
        };
        let owners = block_on(futures::future::join_all(works.iter().map(owner)));
        let count = |node: &String| owners.iter().filter(|owner| *owner == node).count();
        (owners.iter().max_by_key(|node| count(node)).unwrap().clone(), owners)
    }

    /// Kills the node that owns most of these works: those that had not ended. In this process, as there is no time to lose.
    fn kill_an_owner(&self, works: &[String]) -> Vec<String> {
        let client = self.dev.client();
        let (busiest, owners) = self.busiest(works);
        self.dev.signal(&busiest, Signal::KILL);
        let of_dead = works.iter().zip(&owners).filter(|(_, owner)| **owner == busiest);
        let of_dead = of_dead.map(|(id, _)| client.get(id));
        let of_dead = block_on(futures::future::join_all(of_dead));
        let cut = of_dead.into_iter().map(Result::unwrap).filter(|it| it.end_time.is_none());
        let cut: Vec<_> = cut.map(|work| work.id).collect();
        assert!(3 <= cut.len(), "{owners:?}, {cut:?}");
        cut
    }

    fn await_calls(&self, count: usize) {
        eventually(PATIENCE, "every call is made", || {
            let calls = self.calls();
            if count <= calls.len() { Ok(()) } else { Err(format!("{calls:?}")) }
        });
    }

    /// Nodes have begun a call for each work: their tool may not have done it.
    fn await_begun(&self) {
        eventually(PATIENCE, "every call is begun", || {
            let begun = self.dev.node_metrics("stagedoor_tool_calls_total", &[]);
            if WORKS as f64 <= begun { Ok(()) } else { Err(begun) }
        });
    }

    /// Every work has been told what to call. One call of this node is made and not answered, and the others stand in
    /// line behind it.
    fn await_lines(&self, node: &str, works: &[String]) {
        eventually(PATIENCE, "calls stand in line", || {
            let has_step = |id: &&String| self.get(id)["steps"].is_array();
            let asked = works.iter().filter(has_step).count();
            let of = |node: &str| {
                self.dev.metrics(node).sum("stagedoor_tool_calls_total", &["tool=\"count\""])
            };
            let begun: f64 = ["node-1", "node-2", "node-3"].map(of).iter().sum();
            let made = self.calls().len();
            let stands = asked == works.len() && 1.0 <= of(node) && begun == made as f64;
            if stands { Ok(()) } else { Err(format!("{asked} asked, {begun} begun, {made} made")) }
        });
    }

    /// How many works of a node have not ended.
    fn open_of(&self, node: &str, works: &[String], owners: &[String]) -> usize {
        let client = self.dev.client();
        let of_node = works.iter().zip(owners).filter(|(_, owner)| *owner == node);
        let of_node = block_on(futures::future::join_all(of_node.map(|(id, _)| client.get(id))));
        of_node.into_iter().filter(|work| work.as_ref().unwrap().end_time.is_none()).count()
    }

    /// Of each node.
    pub(crate) fn incarnations(&self) -> BTreeMap<String, String> {
        let nodes = self.dev.run(&["nodes"]).document();
        let told = |node: &Value, field: &str| text(&node[field]).to_owned();
        let all = list(&nodes["nodes"]).iter();
        all.map(|node| (told(node, "name"), told(node, "incarnation"))).collect()
    }

    pub(crate) fn await_return(&self, node: &str, before: &BTreeMap<String, String>) {
        eventually(PATIENCE, &format!("{node} is back as another"), || {
            let now = self.incarnations();
            if now[node] == before[node] { Err(format!("{now:?}")) } else { Ok(()) }
        });
    }

    /// Lets a node drain that has calls under way: the works, and the node.
    fn drain_in_the_middle(&self) -> (Vec<String>, String) {
        let works = self.submit_many("clerk");
        self.await_calls(WORKS);
        let (node, _) = self.busiest(&works);
        let output = self.dev.run(&["drain", &node]);
        assert_eq!(output.code, Some(0), "{output}");
        (works, node)
    }

    fn await_left(&self, node: &str, last_words: &str) {
        eventually(PATIENCE, &format!("{node} has left"), || {
            let nodes = self.dev.run(&["nodes"]).document();
            let found = list(&nodes["nodes"]).iter().find(|found| found["name"] == *node).cloned();
            let has_left = found.as_ref().is_some_and(|found| found["state"] == "left");
            if has_left { Ok(()) } else { Err(format!("{found:?}")) }
        });
        let log = self.dev.log(node);
        assert!(log.contains(last_words), "{log}");
    }

    fn in_doubt(&self) -> Vec<String> {
        let page = self.dev.run(&["work", "list", "--state", "in_doubt"]).document();
        let mut ids: Vec<_> =
            list(&page["works"]).iter().map(|work| text(&work["id"]).to_owned()).collect();
        ids.sort();
        ids
    }

    fn signal(&self, id: &str, rest: &[&str]) -> Output {
        self.dev.run(&[&["work", "signal", id], rest].concat())
    }

    /// What `why` says: to which state, and for what reason.
    fn why(&self, id: &str) -> Vec<(String, String)> {
        let why = self.dev.run(&["why", "work", id]).document();
        let pair = |it: &Value| (text(&it["to"]).to_owned(), text(&it["reason"]).to_owned());
        list(&why["transitions"]).iter().map(pair).collect()
    }
}

#[test]
fn a_loop_calls_its_tools_once_each_and_answers() {
    let desk = Desk::start(Tool::default());
    desk.apply("clerk", "");
    let program = r#"{"calls":[{"tool":"count"},[{"tool":"echo","arguments":7},{"tool":"count"}],
        {"tool":"stranger"}],"answer":"got {results}"}"#;
    let args = ["submit", "--agent", "clerk", "--key", "k", "--text", program, "--watch"];
    let events = desk.dev.run(&args).documents();
    let result = crate::result_of(&events);
    assert_eq!(result["state"], "WORK_STATE_SUCCEEDED", "{result}");
    let answer = text(&result["result"]["text"]);
    assert!(answer.starts_with("got 1 7 2 there is no tool \"stranger\""), "{answer}");
    let work = desk.get(text(&result["id"]));
    let steps: Vec<_> = list(&work["steps"])
        .iter()
        .map(|step| format!("{} {}", text(&step["kind"]), text(&step["name"])))
        .collect();
    let expected = [
        "model model",
        "tool count",
        "model model",
        "tool echo",
        "tool count",
        "model model",
        "tool stranger",
        "model model",
    ];
    assert_eq!(steps, expected);
    assert_eq!(desk.calls().len(), 2);
}

#[test]
fn a_step_in_doubt_is_listed_and_a_person_resolves_it() {
    let desk = Desk::start(Tool { delay_ms: DELAY_MS, ..Tool::default() });
    desk.apply("clerk", "");
    let works = desk.submit_many("clerk");
    desk.await_calls(WORKS);
    let mut cut = desk.kill_an_owner(&works);
    cut.sort();
    eventually(SETTLED, "they are in doubt", || {
        let listed = desk.in_doubt();
        if listed == cut { Ok(()) } else { Err(format!("{listed:?}, not {cut:?}")) }
    });
    let [done, retry, fail] = [0, 1, 2].map(|index| cut[index].as_str());
    let work = desk.get(done);
    let step = list(&work["steps"]).last().unwrap();
    assert_eq!((text(&step["kind"]), text(&step["reason"])), ("tool", "in_doubt"), "{work}");
    assert_eq!((step["attempts"].as_i64(), step["sequence"].as_i64()), (Some(1), Some(2)));

    let wrong = desk.signal(done, &["--retry", "--step", "echo"]);
    assert_eq!(wrong.code, Some(4), "{wrong}");
    assert!(wrong.to_string().contains("not_in_doubt"), "{wrong}");
    for (id, rest) in
        [(done, vec!["--done", "42"]), (retry, vec!["--retry"]), (fail, vec!["--fail"])]
    {
        let output = desk.signal(id, &rest);
        assert_eq!(output.code, Some(0), "{output}");
    }
    let [of_done, of_retry, of_fail] = [done, retry, fail].map(|id| desk.ended(id));
    assert_eq!(text(&of_done["result"]["text"]), "got 42", "{of_done}");
    assert_eq!(of_retry["state"], "WORK_STATE_SUCCEEDED", "{of_retry}");
    let failed = (text(&of_fail["state"]), text(&of_fail["reason"]));
    assert_eq!(failed, ("WORK_STATE_FAILED", "step_in_doubt"));
    let calls = [done, retry, fail].map(|id| desk.calls_of(id));
    assert_eq!(calls, [1, 2, 1], "only what a person lets run again is made again");
    let again = list(&of_retry["steps"]).iter().find(|step| step["kind"] == "tool").unwrap();
    assert_eq!(again["attempts"].as_i64(), Some(2), "{of_retry}");

    // The same again is answered alike; another one is refused.
    assert_eq!(desk.signal(fail, &["--fail"]).code, Some(0));
    assert_eq!(desk.signal(done, &["--done", "42", "--step", "2"]).code, Some(0));
    assert_eq!(desk.signal(done, &["--fail"]).code, Some(4));
    let why = desk.why(retry);
    for pair in [("in_doubt", "owner_died"), ("running", "signalled_retry")] {
        let pair = (pair.0.to_owned(), pair.1.to_owned());
        assert!(why.contains(&pair), "{why:?}");
    }
    for id in cut.iter().skip(3) {
        assert_eq!(desk.signal(id, &["--fail"]).code, Some(0));
    }
    // Nobody else noticed.
    for id in works.iter().filter(|id| !cut.contains(id)) {
        assert_eq!(desk.ended(id)["state"], "WORK_STATE_SUCCEEDED");
        assert_eq!(desk.calls_of(id), 1);
    }
}

/// All works succeed, each with exactly one call, although an owner was killed in the middle of its calls.
fn a_tool_settles_it(tool: Tool, reason: &str) {
    let desk = Desk::start(Tool { reconcile: true, ..tool });
    desk.apply("clerk", "");
    let works = desk.submit_many("clerk");
    match tool.delay_before_ms {
        0 => desk.await_calls(WORKS),
        _ => desk.await_begun(),
    }
    let cut = desk.kill_an_owner(&works);
    for id in &works {
        let work = desk.ended(id);
        assert_eq!(work["state"], "WORK_STATE_SUCCEEDED", "{work}");
        assert_eq!(desk.calls_of(id), 1, "{id} of {cut:?}");
    }
    for id in &cut {
        let why = desk.why(id);
        assert!(why.contains(&("running".to_owned(), reason.to_owned())), "{why:?}");
    }
    assert_eq!(desk.in_doubt(), Vec::<String>::new());
}

#[test]
fn a_tool_that_says_that_it_was_done_settles_the_doubt() {
    a_tool_settles_it(Tool { delay_ms: DELAY_MS, ..Tool::default() }, "reconciled_done");
}

#[test]
fn a_tool_that_says_that_it_was_not_done_is_called_again() {
    let tool = Tool { delay_before_ms: DELAY_MS, ..Tool::default() };
    a_tool_settles_it(tool, "reconciled_not_done");
}

#[test]
fn what_a_tool_said_was_not_done_does_not_count_when_a_stopped_node_does_it_later() {
    let tool = Tool { delay_before_ms: DELAY_MS, reconcile: true, ..Tool::default() };
    let desk = Desk::start(tool);
    desk.apply("clerk", "");
    let works = desk.submit_many("clerk");
    desk.await_begun();
    let (victim, _) = desk.busiest(&works);
    desk.dev.signal(&victim, Signal::STOP);
    for id in &works {
        assert_eq!(desk.ended(id)["state"], "WORK_STATE_SUCCEEDED");
    }
    desk.dev.signal(&victim, Signal::CONT);
    eventually(PATIENCE, "it does what it was about to do", || {
        let begun = desk.calls();
        if WORKS < begun.len() { Ok(()) } else { Err(format!("{begun:?}")) }
    });
    for id in &works {
        assert_eq!(desk.made_of(id), 1, "{id}: {:?}", desk.begun_of(id));
    }
}

#[test]
fn a_definition_settles_doubts_by_itself() {
    let desk = Desk::start(Tool { delay_ms: DELAY_MS, ..Tool::default() });
    desk.apply("eager", "in_doubt = \"retry\"");
    desk.apply("strict", "in_doubt = \"fail\"");
    let (eager, strict) = (desk.submit_many("eager"), desk.submit_many("strict"));
    desk.await_calls(2 * WORKS);
    let all: Vec<_> = eager.iter().chain(&strict).cloned().collect();
    let cut = desk.kill_an_owner(&all);
    for id in &all {
        let work = desk.ended(id);
        let (is_cut, is_eager) = (cut.contains(id), eager.contains(id));
        let state = if is_cut && !is_eager { "WORK_STATE_FAILED" } else { "WORK_STATE_SUCCEEDED" };
        assert_eq!(work["state"], state, "{work}");
        let begun = desk.begun_of(id);
        assert_eq!(begun.len(), 1 + usize::from(is_cut && is_eager), "{work}");
        if let [first, second] = &begun[..] {
            // The call's own time begins with its intent, a moment before it.
            let until_ms = first.time_ms + TOOL_TIMEOUT_MS + 5_000 - 1_000;
            assert!(until_ms <= second.time_ms, "{begun:?}");
        }
    }
}

#[test]
fn a_node_that_drains_leaves_when_the_last_call_has_answered() {
    let desk = Desk::start(Tool { delay_ms: DELAY_MS, ..Tool::default() });
    desk.apply("clerk", "");
    let (works, node) = desk.drain_in_the_middle();
    for id in &works {
        assert_eq!(desk.ended(id)["state"], "WORK_STATE_SUCCEEDED");
        assert_eq!(desk.calls_of(id), 1, "{id}");
        let why = desk.why(id);
        assert!(why.iter().all(|(to, _)| to != "in_doubt"), "{why:?}");
    }
    desk.await_left(&node, "everything is handed over");
}

#[test]
fn a_node_that_may_not_wait_for_its_calls_leaves_and_their_doubts_are_settled() {
    let limit = ("STAGEDOOR_NODE__DRAIN_TIMEOUT_MS".to_owned(), "1000".to_owned());
    let tool = Tool { delay_ms: DELAY_MS, reconcile: true, ..Tool::default() };
    let desk = Desk::start_with(tool, TOOL_TIMEOUT_MS, vec![limit]);
    desk.apply("clerk", "");
    let (works, node) = desk.drain_in_the_middle();
    desk.await_left(&node, "not everything was handed over in time");
    let mut doubted = 0;
    for id in &works {
        assert_eq!(desk.ended(id)["state"], "WORK_STATE_SUCCEEDED");
        assert_eq!(desk.calls_of(id), 1, "{id}");
        doubted += usize::from(desk.why(id).iter().any(|(to, _)| to == "in_doubt"));
    }
    assert_ne!(doubted, 0, "no call was under way");
}

/// As many replicas as are asked for; the command line goes on at another.
#[test]
fn a_watch_of_the_command_line_goes_on_when_the_replica_that_serves_it_is_killed() {
    let tool = Tool { delay_ms: DELAY_MS, ..Tool::default() };
    let desk = Desk::start_on(Options { controls: 3, ..Options::default() }, tool, TOOL_TIMEOUT_MS);
    desk.apply("clerk", "");
    let args = ["submit", "--agent", "clerk", "--key", "k", "--text", ONE_CALL, "--watch"];
    let events = std::thread::scope(|scope| {
        let watch = scope.spawn(|| desk.dev.run(&args).documents());
        desk.await_calls(1);
        // The first of the addresses: it serves the watch, and may lead, too.
        desk.dev.signal("control-1", Signal::KILL);
        watch.join().unwrap()
    });
    let result = crate::result_of(&events);
    assert_eq!(result["state"], "WORK_STATE_SUCCEEDED", "{result}");
    let cursors: Vec<_> = events.iter().filter_map(|event| event["cursor"].as_str()).collect();
    let different: std::collections::BTreeSet<_> = cursors.iter().collect();
    assert_eq!(different.len(), cursors.len(), "no event twice: {cursors:?}");
    let steps = events.iter().filter(|event| event["step"].is_object()).count();
    assert_eq!(steps, 3, "model, tool, model: {events:#?}");
    let leader = eventually(PATIENCE, "another leads", || {
        let status = desk.dev.run(&["status"]).document();
        match status["leader"]["name"].as_str().unwrap_or_default() {
            "" | "control-1" => Err(status),
            name => Ok(name.to_owned()),
        }
    });
    assert!(["control-2", "control-3"].contains(&leader.as_str()), "{leader}");
    assert_eq!(desk.ended(&desk.submit("clerk", 1)[0])["state"], "WORK_STATE_SUCCEEDED");
}

#[test]
fn a_node_that_was_stopped_begins_no_call_of_what_it_had_in_hand_when_it_wakes() {
    let desk = Desk::start(Tool { delay_ms: DELAY_MS, reconcile: true, ..Tool::default() });
    desk.apply("clerk", "");
    let before = desk.incarnations();
    let works = desk.submit_many("clerk");
    desk.await_calls(WORKS);
    // Each waits for its tool now, and asks its model again when that has answered.
    let (victim, owners) = desk.busiest(&works);
    let begun = || {
        let metrics = desk.dev.metrics(&victim);
        ["model", "tool"].map(|of| metrics.sum(&format!("stagedoor_{of}_calls_total"), &[]))
    };
    let begun_before = begun();
    desk.dev.signal(&victim, Signal::STOP);
    assert_ne!(desk.open_of(&victim, &works, &owners), 0, "it had nothing in hand");
    for id in &works {
        assert_eq!(desk.ended(id)["state"], "WORK_STATE_SUCCEEDED");
    }
    desk.dev.signal(&victim, Signal::CONT);
    desk.await_return(&victim, &before);
    assert_eq!(begun(), begun_before, "calls of models and tools");
    for id in &works {
        assert_eq!(desk.calls_of(id), 1, "{id}");
    }
}

#[test]
fn a_node_that_was_stopped_begins_no_call_that_stands_in_line_when_it_wakes() {
    let tool = Tool { delay_ms: 2_000, reconcile: true, ..Tool::default() };
    let workers = (WORKERS.to_owned(), "1".to_owned());
    // Calls have time left when it wakes: what keeps them back is not that they are late.
    let desk = Desk::start_with(tool, 15_000, vec![workers]);
    desk.apply("clerk", "");
    let before = desk.incarnations();
    let works = desk.submit_many("clerk");
    let (victim, owners) = desk.busiest(&works);
    desk.await_lines(&victim, &works);
    desk.dev.signal(&victim, Signal::STOP);
    assert!(2 <= desk.open_of(&victim, &works, &owners), "nothing stands in line");
    eventually(PATIENCE, "it owns nothing any more", || {
        let shards = desk.dev.run(&["shards"]).document();
        let left = list(&shards["shards"]).iter().filter(|shard| shard["node"] == *victim).count();
        if left == 0 { Ok(()) } else { Err(format!("{left} shards")) }
    });
    let woken_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    desk.dev.signal(&victim, Signal::CONT);
    desk.await_return(&victim, &before);
    for (id, _) in works.iter().zip(&owners).filter(|(_, owner)| **owner == victim) {
        let work = desk.ended(id);
        assert_eq!(work["state"], "WORK_STATE_SUCCEEDED");
        // Its model was asked by the node that was stopped then.
        let old = list(&work["steps"])[0]["epoch"].as_str().unwrap().parse::<u64>().unwrap();
        let begun = desk.begun_of(id);
        assert_eq!(begun.len(), 1, "{id}");
        let is_in_time =
            |called: &Called| u128::from(called.time_ms) < woken_ms || old < called.epoch;
        assert!(begun.iter().all(is_in_time), "{id}: {begun:?}");
    }
}
