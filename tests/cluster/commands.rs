//! The client commands against a running cluster.

use std::time::Duration;

use proto::v1::SubmitRequest;
use serde_json::Value;
use tests::harness::{Dev, PATIENCE, Planted, eventually};
use tonic::Code;

use crate::{HARBOUR, PROGRAM, block_on, file, list, result_of, submit_and_watch, text};

const SUBMIT: [&str; 5] = ["submit", "--agent", "postchain", "--key", "k"];

fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    args.iter().chain(more).copied().collect()
}

#[test]
fn the_same_idempotency_key_is_the_same_work_and_never_another_input() {
    let dev = Dev::start(PROGRAM);
    let keyed = with(&SUBMIT, &["--idempotency-key", "once"]);
    let first = dev.run(&with(&keyed, &["--text", "A lamp stands here. Why?"])).document();
    let again = dev.run(&with(&keyed, &["--text", "A lamp stands here. Why?"])).document();
    assert_eq!(first["id"], again["id"]);
    // Another agent has keys of its own.
    let other = ["submit", "--agent", "postchain", "--key", "l", "--idempotency-key", "once"];
    let other = dev.run(&with(&other, &["--text", "A lamp stands here. Why?"])).document();
    assert_ne!(first["id"], other["id"]);

    let refused = dev.run(&with(&keyed, &["--text", "A chair stands here. Why?"]));
    refused.assert_error(4, &["key_reused", "once"]);
    let request = SubmitRequest {
        agent: "default/postchain/k".to_owned(),
        input: "A chair stands here. Why?".to_owned(),
        idempotency_key: "once".to_owned(),
        ..SubmitRequest::default()
    };
    let error = block_on(async { dev.client().submit(request).await.unwrap_err() });
    let client::Error::Refused { status, .. } = &error else { panic!("{error}") };
    assert_eq!(status.code(), Code::AlreadyExists, "{error}");
    let works = dev.run(&["work", "list", "--agent", "default/postchain/k"]).document();
    assert_eq!(list(&works["works"]).len(), 1, "a refused submit left something: {works}");
}

#[test]
fn works_and_agents_are_listed_newest_first_and_by_tenant() {
    let dev = Dev::start(PROGRAM);
    let submit = |tenant: &str, key: &str| {
        let args = ["submit", "--agent", "postchain", "--text", "A lamp. Why?", "--tenant", tenant];
        let work = dev.run(&with(&args, &["--key", key, "--watch"])).documents();
        text(&result_of(&work)["id"]).to_owned()
    };
    let ids = [submit("acme", "a"), submit("acme", "b"), submit("acme", "a")];
    let other = submit("bolt", "a");

    let ids_of = |page: &Value| -> Vec<String> {
        list(&page["works"]).iter().map(|work| text(&work["id"]).to_owned()).collect()
    };
    let all = dev.run(&["work", "list", "--tenant", "acme"]).document();
    let mut found = ids_of(&all);
    assert!(all.get("unreachable").is_none(), "{all}");
    found.sort();
    let mut expected = ids.to_vec();
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(ids_of(&dev.run(&["work", "list", "--tenant", "bolt"]).document()), [other]);
    let of_agent =
        dev.run(&["work", "list", "--tenant", "acme", "--agent", "acme/postchain/a"]).document();
    assert_eq!(ids_of(&of_agent), [ids[2].clone(), ids[0].clone()]);

    let agents = dev.run(&["agents", "--tenant", "acme"]).document();
    let mut names: Vec<_> = list(&agents["agents"]).iter().map(|a| text(&a["id"])).collect();
    names.sort_unstable();
    assert_eq!(names, ["acme/postchain/a", "acme/postchain/b"]);
    let agent = dev.run(&["agents", "get", "acme/postchain/a"]).document();
    assert_eq!(text(&agent["lastWork"]), ids[2]);
    assert!(["hot", "cold"].contains(&text(&agent["state"])), "{agent}");
    assert!(text(&agent["node"]).starts_with("node-"), "{agent}");
}

#[test]
fn a_history_holds_every_entry_of_an_agent_newest_first() {
    let dev = Dev::start(PROGRAM);
    let events = submit_and_watch(&dev, "history", &Planted::new(HARBOUR, 1_024));
    let id = text(&result_of(&events)["id"]).to_owned();
    let entries = dev.run(&["agents", "history", "default/postchain/history"]).documents();
    let entries: Vec<_> = entries.iter().filter(|e| e["work"] == id.as_str()).collect();
    // Accepted, six phases, ended.
    assert_eq!(entries.len(), 8, "{entries:#?}");
    let seqs: Vec<u64> = entries.iter().map(|e| text(&e["seq"]).parse().unwrap()).collect();
    assert_eq!(seqs, (1..=8).rev().collect::<Vec<_>>());
    for entry in entries {
        let content: Value = serde_json::from_str(text(&entry["content"])).unwrap();
        assert!(content.is_object(), "{entry}");
    }
    let two = ["agents", "history", "default/postchain/history", "--limit", "2"];
    assert_eq!(dev.run(&two).documents().len(), 2);
}

#[test]
fn a_work_that_waits_can_be_cancelled_and_one_that_ended_cannot() {
    let dev = crate::offers::start_without("yield");
    let work = dev.run(&with(&SUBMIT, &["--text", "A lamp. Why?"])).document();
    let id = text(&work["id"]);
    crate::offers::await_waiting(&dev, id);
    let cancelled = dev.run(&["work", "cancel", id]);
    let state = cancelled.lines()[0]["state"].clone();
    assert!(
        ["WORK_STATE_CANCELLING", "WORK_STATE_CANCELLED"].contains(&text(&state)),
        "{cancelled}"
    );
    // Following it ends with what became of it, and says so with the exit code.
    let watched = dev.run(&["work", "watch", id]);
    assert_eq!(watched.code, Some(1), "{watched}");
    let lines = watched.lines();
    let ended = result_of(&lines);
    assert_eq!(ended["state"], "WORK_STATE_CANCELLED");
    assert_eq!(ended["reason"], "cancel_requested");
    assert_eq!(list(&dev.run(&["work", "get", id]).lines()[0]["steps"]).len(), 5);

    let again = dev.run(&["work", "cancel", id]).lines()[0].clone();
    assert_eq!((&again["state"], &again["endTime"]), (&ended["state"], &ended["endTime"]));
}

#[test]
fn capabilities_are_found_by_name_version_and_attributes() {
    let dev = Dev::start(PROGRAM);
    let find = |args: &[&str]| -> Vec<(String, String)> {
        let found = dev.run(&with(&["capabilities"], args)).document();
        let found = list(&found["capabilities"]).iter();
        let mut found: Vec<_> =
            found.map(|it| (text(&it["name"]).to_owned(), text(&it["node"]).to_owned())).collect();
        found.sort();
        found
    };
    let pair = |name: &str, node: &str| (name.to_owned(), node.to_owned());
    // Each phase is left out by one node of three.
    assert_eq!(find(&["phase/*"]).len(), 12);
    let action = [pair("phase/action", "node-2"), pair("phase/action", "node-3")];
    assert_eq!(find(&["phase/action"]), action);
    assert_eq!(find(&["phase/action", "--attribute", "modality=text"]), action);
    assert_eq!(find(&["phase/action", "--version-min", "1"]), action);
    assert_eq!(find(&["phase/action", "--attribute", "modality=image"]), []);
    assert_eq!(find(&["phase/action", "--version-min", "99"]), []);
    assert_eq!(find(&["tool/echo", "--attribute", "idempotent=true"]).len(), 3);
    assert_eq!(find(&["skill/*"]), []);
}

#[test]
fn a_definition_is_applied_once_listed_and_used() {
    let dev = Dev::start(PROGRAM);
    let path = file(
        &dev,
        "brief.toml",
        "name = \"brief\"\nbehaviour = \"chain\"\nmodel = \"noop\"\ninstructions = \"Be brief.\"\n",
    );
    let apply = ["apply", "-f", path.to_str().unwrap()];
    let applied = dev.run(&apply).document();
    assert_eq!(dev.run(&apply).document()["hash"], applied["hash"], "the same content is new");
    let page = dev.run(&["definitions"]).document();
    let names: Vec<_> =
        list(&page["versions"]).iter().map(|it| text(&it["definition"]["name"])).collect();
    assert!(names.contains(&"brief") && names.contains(&"postchain"), "{page}");
    let shown = dev.run(&["definitions", "brief"]).document();
    assert_eq!(shown["definition"]["model"], "noop");

    let args = ["submit", "--agent", "brief", "--key", "k", "--text", "A lamp.", "--watch"];
    let events = dev.run(&args).documents();
    assert_eq!(result_of(&events)["definitionHash"], applied["hash"]);
    // Another version is another hash; the old one can still be asked for.
    file(&dev, "brief.toml", "name = \"brief\"\nbehaviour = \"chain\"\nmodel = \"extractive\"\n");
    let second = dev.run(&apply).document();
    assert_ne!(second["hash"], applied["hash"]);
    let old = with(&args, &["--definition-hash", text(&applied["hash"])]);
    assert_eq!(result_of(&dev.run(&old).documents())["definitionHash"], applied["hash"]);
    assert_eq!(result_of(&dev.run(&args).documents())["definitionHash"], second["hash"]);
}

#[test]
fn why_tells_every_transition_of_a_work_an_agent_a_shard_and_a_node() {
    let dev = Dev::start(PROGRAM);
    let events = submit_and_watch(&dev, "why", &Planted::new(HARBOUR, 1_024));
    let id = text(&result_of(&events)["id"]).to_owned();
    let why = |kind: &str, id: &str| -> Vec<Value> {
        let answer = dev.run(&["why", kind, id]).document();
        let transitions = list(&answer["transitions"]).to_vec();
        assert!(!transitions.is_empty(), "{kind} {id} has no transition");
        for transition in &transitions {
            assert!(!text(&transition["reason"]).is_empty(), "{transition}");
            assert!(!text(&transition["time"]).is_empty(), "{transition}");
        }
        transitions
    };
    let states = |transitions: &[Value]| -> Vec<String> {
        transitions.iter().map(|it| text(&it["to"]).to_owned()).collect()
    };
    assert_eq!(states(&why("work", &id)), ["accepted", "running", "succeeded"]);
    assert!(!why("agent", "default/postchain/why").is_empty());
    // What a leader did is written down behind its back.
    for (kind, id, to) in
        [("shard", "3", "open"), ("node", "node-1", "alive"), ("leader", "control-1", "leader")]
    {
        eventually(PATIENCE, &format!("{kind} {id} is told to be {to}"), || {
            let told = states(&why(kind, id));
            if told.iter().any(|state| state == to) { Ok(()) } else { Err(told.join(", ")) }
        });
    }
    assert_eq!(states(&why("leader", "control-1"))[0], "leader");
    // However the number is written.
    assert_eq!(why("shard", "003"), why("shard", "3"));
    let placement = dev.run(&["why", "shard", "3"]).document();
    for node in ["node-1", "node-2", "node-3"] {
        let says = |line: &Value| text(line).starts_with(&format!("{node}: score"));
        assert!(list(&placement["placement"]).iter().any(says), "{placement}");
    }
    for (kind, id) in [("node", "node-99"), ("shard", "4000"), ("agent", "default/postchain/no")] {
        dev.run(&["why", kind, id]).assert_error(4, &[id]);
    }
}

#[test]
fn every_list_is_one_document_of_json_and_a_table_for_people() {
    let dev = Dev::start(PROGRAM);
    submit_and_watch(&dev, "lists", &Planted::new(HARBOUR, 512));
    for command in ["status", "nodes", "shards", "capabilities", "definitions", "agents"] {
        assert!(dev.run(&[command]).document().is_object(), "{command}");
        let mut people = dev.program().command();
        people.args([command, "--api", dev.api(), "--credentials"]).arg(dev.credentials());
        let output = people.output().unwrap();
        assert!(output.status.success(), "{command}");
        assert!(2 <= String::from_utf8(output.stdout).unwrap().lines().count(), "{command}");
    }
}

#[test]
fn the_folder_of_the_dev_cluster_is_found_without_flags() {
    let dev = Dev::start(PROGRAM);
    let home = dev.scratch().join("home");
    std::fs::create_dir_all(home.join("stagedoor")).unwrap();
    std::os::unix::fs::symlink(dev.dir(), home.join("stagedoor/dev")).unwrap();
    let run = |name: &str, value: &std::path::Path| {
        let mut command = dev.program().command();
        command.env(name, value).args(["status", "--output", "json"]);
        tests::harness::Output::of(&mut command)
    };
    run("XDG_DATA_HOME", &home).document();
    run("STAGEDOOR_CREDENTIALS", &dev.credentials()).document();
    // Of several addresses the one that answers is taken.
    let dead = tests::harness::free_address();
    let both = format!("{dead},{}", dev.api());
    let mut command = dev.program().command();
    command.args(["status", "--output", "json", "--api", &both, "--credentials"]);
    tests::harness::Output::of(command.arg(dev.credentials())).document();
}

#[test]
fn the_api_answers_health_checks_and_describes_itself() {
    use net::grpc::connector;
    use net::{Dialer, Expected, Protocol};
    use tonic::transport::Endpoint;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1 as reflection;

    let dev = Dev::start(PROGRAM);
    let folder = dev.credentials();
    let identity = net::Identity::load(&net::Config {
        certificate: folder.join("client.crt"),
        key: folder.join("client.key"),
        ca: folder.join("ca.crt"),
    });
    let dialer = Dialer::new(&identity.unwrap(), Protocol::Grpc);
    let connector = connector(dialer, Expected::any(domain::Role::Control));
    let endpoint = Endpoint::from_shared(format!("http://{}", dev.api())).unwrap();
    block_on(async {
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        let mut health = HealthClient::new(channel.clone());
        let answer = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);

        let mut client = reflection::server_reflection_client::ServerReflectionClient::new(channel);
        let request = reflection::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(
                reflection::server_reflection_request::MessageRequest::ListServices(String::new()),
            ),
        };
        let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
        let answer = answers.into_inner().message().await.unwrap().unwrap();
        let Some(reflection::server_reflection_response::MessageResponse::ListServicesResponse(
            services,
        )) = answer.message_response
        else {
            panic!("{answer:?}")
        };
        let names: Vec<_> = services.service.into_iter().map(|service| service.name).collect();
        for name in ["WorkService", "AgentService", "RegistryService", "ClusterService"] {
            assert!(names.contains(&format!("stagedoor.v1.{name}")), "{names:?}");
        }
    });
}

#[test]
fn a_deadline_is_kept_by_submit() {
    let dev = crate::offers::start_without("action");
    let began = std::time::Instant::now();
    let args = with(&SUBMIT, &["--text", "A lamp. Why?", "--timeout", "1s", "--watch"]);
    let output = dev.run(&args);
    assert_eq!(output.code, Some(1), "{output}");
    let lines = output.lines();
    assert_eq!(result_of(&lines)["state"], "WORK_STATE_FAILED");
    assert_eq!(result_of(&lines)["reason"], "deadline_exceeded");
    assert!(Duration::from_millis(900) <= began.elapsed(), "it ended before its time");
}
