//! What bad input gets: an error that names the thing and the remedy, and nothing half-done.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use client::Error;
use domain::Role;
use net::pki::{Ca, Validity};
use prost::Message;
use proto::v1::work_service_client::WorkServiceClient;
use proto::v1::{OpenRequest, OpenSubmit, OpenWatch, SubmitRequest, open_request, open_response};
use tests::harness::{Child, Dev, Options, Output, Program, Raw, eventually};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{PROGRAM, block_on, file, list};

fn one_node() -> Dev {
    Dev::start_with(PROGRAM, &Options { nodes: 1, ..Options::default() })
}

fn submit<'a>(agent: &'a str, key: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["submit", "--agent", agent, "--key", key], more].concat()
}

/// Starts a role that must refuse to start.
fn run_role(program: Program, role: &str, config: &Path) -> Output {
    program.run(&[role, "--config", config.to_str().unwrap(), "--stdin-guard"])
}

#[test]
fn what_does_not_exist_is_named() {
    let dev = one_node();
    let text = ["--text", "A lamp."];
    dev.run(&submit("nobody", "k", &text)).assert_error(4, &["nobody", "not_found", ";"]);
    let missing = "w-0-001-7b";
    dev.run(&["work", "get", missing]).assert_error(4, &[missing, "not_found"]);
    dev.run(&["work", "cancel", missing]).assert_error(4, &[missing]);
    dev.run(&["work", "watch", missing]).assert_error(4, &[missing]);
    dev.run(&["definitions", "nobody"]).assert_error(4, &["nobody", "stagedoor definitions"]);
    dev.run(&["agents", "get", "default/postchain/no"]).assert_error(4, &["default/postchain/no"]);
    dev.run(&["agents", "history", "default/postchain/no"])
        .assert_error(4, &["default/postchain/no"]);
    // Nothing was made by asking.
    let agents = dev.run(&["agents"]).document();
    assert_eq!(list(&agents["agents"]).len(), 0, "{agents}");
}

#[test]
fn what_is_malformed_is_refused_before_anything_is_sent() {
    let dev = one_node();
    let text = ["--text", "A lamp."];
    dev.run(&["work", "get", "nonsense"]).assert_error(2, &["nonsense"]);
    dev.run(&["agents", "get", "only/two"]).assert_error(2, &["only/two"]);
    dev.run(&submit("Postchain", "k", &text)).assert_error(2, &["Postchain", "a-z, 0-9"]);
    dev.run(&submit("postchain", "", &text)).assert_error(2, &["1 to 256"]);
    dev.run(&submit("postchain", "a\nb", &text)).assert_error(2, &["printable"]);
    dev.run(&submit("postchain", "k", &["--text", "x", "--tenant", "A"]))
        .assert_error(2, &["tenant"]);
    dev.run(&["why", "shard", "many"]).assert_error(2, &["many"]);
    dev.run(&["work", "get"]).assert_error(2, &["<ID>"]);
    dev.run(&submit("postchain", "k", &[])).assert_error(2, &["--file"]);
}

#[test]
fn the_api_refuses_the_same_with_details() {
    let dev = one_node();
    let check_error = |error: Error, code: Code, field: &str, parts: &[&str]| {
        let Error::Refused { status, .. } = &error else { panic!("{error}") };
        assert_eq!(status.code(), code, "{error}");
        for part in parts {
            assert!(status.message().contains(part), "{part} is missing in {}", status.message());
        }
        let details = status.get_error_details();
        assert!(details.error_info().is_some_and(|info| !info.reason.is_empty()), "{status:?}");
        let fields = details.bad_request().map(|bad| bad.field_violations[0].field.clone());
        assert_eq!(fields.unwrap_or_default(), field, "{status:?}");
    };
    let check = |request: SubmitRequest, code: Code, field: &str, parts: &[&str]| {
        let (client, again) = (dev.client(), request.clone());
        let error = block_on(async { client.submit(request).await.unwrap_err() });
        check_error(error, code, field, parts);
        // On a stream, too, where what is too large is not sent at all.
        let error = block_on(async {
            let mut open = client.open();
            if let Err(error) = open.sender().submit(1, again, OpenWatch::None).await {
                return error;
            }
            match open.next().await.unwrap().unwrap().response {
                Some(open_response::Response::Refused(refused)) => Error::of_refused(refused),
                other => panic!("{other:?}"),
            }
        });
        check_error(error, code, field, parts);
    };
    let request = |agent: &str, input: &str| SubmitRequest {
        agent: agent.to_owned(),
        input: input.to_owned(),
        ..SubmitRequest::default()
    };
    let invalid = Code::InvalidArgument;
    check(request("no-slashes", "x"), invalid, "agent", &["no-slashes"]);
    check(request("default/nobody/k", "x"), Code::NotFound, "agent", &["nobody"]);
    let long = "x".repeat((1 << 20) + 1);
    check(request("default/postchain/k", &long), invalid, "input", &["1048576"]);
    let keyed =
        SubmitRequest { idempotency_key: "k".repeat(257), ..request("default/postchain/k", "x") };
    check(keyed, invalid, "idempotency_key", &["256"]);
    let client = dev.client();
    let (get, cancel) = block_on(async { (client.get("w-x").await, client.cancel("w-x").await) });
    for error in [get.unwrap_err(), cancel.unwrap_err()] {
        check_error(error, invalid, "id", &["w-x"]);
    }
    let (agent, watched) = block_on(async {
        let watched = client.watch("w-0-001-1", "w-0-002-1.1").next().await.unwrap();
        (client.agent("a/b").await, watched)
    });
    check_error(agent.unwrap_err(), invalid, "id", &["a/b"]);
    check_error(watched.unwrap_err(), invalid, "cursor", &["belongs to work w-0-002-1"]);
    let works = dev.run(&["work", "list"]).document();
    assert_eq!(list(&works["works"]).len(), 0, "{works}");
}

/// Without our client, which refuses it before it is sent.
#[test]
fn the_api_itself_refuses_what_is_too_large_and_says_what_is_allowed() {
    const LARGE: [usize; 2] = [(1 << 20) + 1, 9 << 20];
    let dev = one_node();
    let submit = |bytes: usize| SubmitRequest {
        agent: "default/postchain/k".to_owned(),
        input: "x".repeat(bytes),
        ..SubmitRequest::default()
    };
    let open = |tag: i64, bytes: usize| {
        let submit = OpenSubmit { submit: Some(submit(bytes)), ..OpenSubmit::default() };
        OpenRequest { tag, request: Some(open_request::Request::Submit(submit)) }
    };
    let check = |status: &Status| {
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("1048576"), "{status}");
        let reason = proto::status::reason_of(status);
        assert_eq!(reason, Some(domain::Reason::InputTooLarge), "{status:?}");
        assert!(status.get_error_details().bad_request().is_some(), "{status:?}");
    };
    block_on(async {
        let mut works = WorkServiceClient::new(dial(&dev).await);
        for bytes in LARGE {
            check(&works.submit(submit(bytes)).await.unwrap_err());
        }
        let requests = tokio_stream::iter([open(1, 1), open(2, LARGE[1])]);
        let mut answers = works.open(requests).await.unwrap().into_inner();
        let first = answers.message().await.unwrap().unwrap();
        assert!(matches!(first.response, Some(open_response::Response::Accepted(_))), "{first:?}");
        check(&answers.message().await.unwrap_err());
    });
}

#[test]
fn a_message_that_is_none_of_ours_is_called_so() {
    let dev = one_node();
    let submit = SubmitRequest {
        agent: "default/postchain/k".to_owned(),
        input: "x".to_owned(),
        ..SubmitRequest::default()
    };
    // The last byte is the input: text must be UTF-8.
    let not_text = |mut bytes: Vec<u8>| {
        assert_eq!(bytes.pop(), Some(b'x'));
        bytes.push(0xff);
        Bytes::from(bytes)
    };
    let open = OpenSubmit { submit: Some(submit.clone()), ..OpenSubmit::default() };
    let open = OpenRequest { tag: 1, request: Some(open_request::Request::Submit(open)) };
    let (submit, open) = (not_text(submit.encode_to_vec()), not_text(open.encode_to_vec()));
    let check = |status: &Status| {
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        let reason = proto::status::reason_of(status);
        assert_eq!(reason, Some(domain::Reason::Malformed), "{status:?}");
        let details = status.get_error_details();
        let field = details.bad_request().map(|bad| bad.field_violations[0].field.clone());
        assert_eq!(field.as_deref(), Some("request"), "{status:?}");
    };
    block_on(async {
        let mut grpc = tonic::client::Grpc::new(dial(&dev).await);
        let path = |name| PathAndQuery::from_static(name);
        for bytes in [submit, Bytes::from_static(b"\xff\xff\xff")] {
            grpc.ready().await.unwrap();
            let request = tonic::Request::new(bytes);
            let answer = grpc.unary(request, path("/stagedoor.v1.WorkService/Submit"), Raw).await;
            check(&answer.unwrap_err());
        }
        grpc.ready().await.unwrap();
        let request = tonic::Request::new(tokio_stream::iter([open]));
        let answers = grpc.streaming(request, path("/stagedoor.v1.WorkService/Open"), Raw).await;
        check(&answers.unwrap().into_inner().message().await.unwrap_err());
    });
}

/// A connection to the API that knows nothing of it.
async fn dial(dev: &Dev) -> Channel {
    let file = |name| dev.credentials().join(name);
    let (certificate, key, ca) = (file("client.crt"), file("client.key"), file("ca.crt"));
    let identity = net::Identity::load(&net::Config { certificate, key, ca }).unwrap();
    let dialer = net::Dialer::new(&identity, net::Protocol::Grpc);
    let connector = net::grpc::connector(dialer, net::Expected::any(Role::Control));
    let endpoint = Endpoint::from_shared(format!("http://{}", dev.api())).unwrap();
    endpoint.connect_with_connector(connector).await.unwrap()
}

#[test]
fn input_of_one_mebibyte_is_taken_and_one_byte_more_is_not() {
    let dev = one_node();
    let filler = "The lamp is lit at the pier. ";
    let mut text = filler.repeat((1 << 20) / filler.len() + 1);
    text.truncate(1 << 20);
    let path = file(&dev, "big.txt", &text);
    let path = path.to_str().unwrap();
    let taken = dev.run(&submit("postchain", "big", &["--file", path]));
    taken.document();
    file(&dev, "big.txt", &format!("{text}!"));
    let refused = dev.run(&submit("postchain", "bigger", &["--file", path]));
    refused.assert_error(2, &["big.txt", "1 MiB", ";"]);
}

#[test]
fn an_unknown_field_of_a_definition_is_named_with_its_line() {
    let dev = one_node();
    let path =
        file(&dev, "brief.toml", "name = \"brief\"\nbehaviour = \"chain\"\nmodle = \"noop\"\n");
    let apply = ["apply", "-f", path.to_str().unwrap()];
    dev.run(&apply).assert_error(2, &["brief.toml", "line 3", "modle", ";"]);
    file(&dev, "brief.toml", "name = \"brief\"\nbehaviour = \"chain\"\nphases = [\"sleep\"]\n");
    dev.run(&apply).assert_error(4, &["phases", "PostChain"]);
    file(&dev, "brief.toml", "name = \"brief\"\nbehaviour = \"swarm\"\nmodel = \"noop\"\n");
    dev.run(&apply).assert_error(4, &["behaviour", "loop"]);
    let page = dev.run(&["definitions"]).document();
    assert!(!page.to_string().contains("brief"), "{page}");
}

#[test]
fn only_a_valid_client_certificate_of_this_ca_may_call_the_api() {
    let dev = one_node();
    let client = "spiffe://stagedoor.local/client/ann";
    // Any name of a client will do.
    let good = dev.issue_client(client, Validity::default());
    dev.run_as(&good, &["status"]).document();

    let now = SystemTime::now();
    let hour = Duration::from_hours(1);
    let past = Validity { not_before: now - 3 * hour, not_after: now - hour };
    let expired = dev.issue_client(client, past);
    dev.run_as(&expired, &["status"]).assert_error(4, &["not valid now", "stagedoor pki issue"]);

    let other = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
    let stranger = other.issue(&client.parse().unwrap(), Validity::default()).unwrap();
    let foreign = dev.issue_client(client, Validity::default());
    stranger.write(&foreign, "client").unwrap();
    dev.run_as(&foreign, &["status"]).assert_error(4, &["from another CA", "issue one"]);
    // Whoever trusts another CA refuses the cluster, not the other way round.
    fs::write(foreign.join("ca.crt"), other.certificate_pem()).unwrap();
    dev.run_as(&foreign, &["status"]).assert_error(3, &["same CA", "--credentials"]);

    for role in ["node", "store", "control"] {
        let id = format!("spiffe://stagedoor.local/{role}/{role}-1");
        let wrong = dev.issue_client(&id, Validity::default());
        dev.run_as(&wrong, &["status"]).assert_error(4, &[role, "client"]);
        let labels = [format!("role=\"{role}\"")];
        let labels: Vec<_> = labels.iter().map(String::as_str).collect();
        let counted = dev.metrics("control-1").sum("stagedoor_control_api_refused_total", &labels);
        assert!(1.0 <= counted, "{role}: {counted}");
        let log = dev.log("control-1");
        let is_told = |line: &str| line.contains("addr=127.0.0.1:") && line.contains(&id);
        assert!(log.lines().any(is_told), "{id} is not in {log}");
    }
    let gone = dev.scratch().join("gone");
    dev.run_as(&gone, &["status"]).assert_error(2, &["gone", "--credentials"]);
}

#[test]
fn a_cluster_that_is_not_there_is_not_reached() {
    let dev = one_node();
    let nobody = tests::harness::free_address().to_string();
    let mut command = dev.program().command();
    command.args(["status", "--api", &nobody, "--credentials"]).arg(dev.credentials());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains(&nobody) && error.contains("--api"), "{error}");
}

#[test]
fn a_config_with_an_unknown_key_is_refused_with_file_and_key() {
    let dev = one_node();
    for (role, name) in [("store", "store-1"), ("control", "control-1"), ("node", "node-1")] {
        let mut config = dev.config(name);
        config.insert("lisen".to_owned(), toml::Value::Integer(1));
        let path = file(&dev, &format!("{role}.toml"), &config.to_string());
        let output = run_role(PROGRAM, role, &path);
        output.assert_error(2, &["lisen", &format!("{role}.toml"), "--check-config"]);
        let mut config = dev.config(name);
        let net = config.get_mut("net").and_then(toml::Value::as_table_mut).unwrap();
        net.insert("cerificate".to_owned(), toml::Value::Integer(1));
        let path = file(&dev, &format!("{role}.toml"), &config.to_string());
        run_role(PROGRAM, role, &path).assert_error(2, &["cerificate", &format!("{role}.toml")]);
        // The config that dev made is in order.
        let path = dev.dir().join("config").join(format!("{name}.toml"));
        let checked = PROGRAM.run(&[role, "--config", path.to_str().unwrap(), "--check-config"]);
        assert_eq!(checked.code, Some(0), "{checked}");
    }
}

#[test]
fn a_port_in_use_is_named_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dev_dir = dir.path().join("dev");
    let args = ["dev", "--data-dir", dev_dir.to_str().unwrap(), "--api", &address];
    PROGRAM.run(&args).assert_error(1, &[&address, "--api"]);

    let dev = one_node();
    for (role, name, part) in [
        ("control", "control-1", "api"),
        ("control", "control-1", "cluster"),
        ("control", "control-1", "beat"),
        ("node", "node-1", "cluster"),
    ] {
        let mut config = dev.config(name);
        let listen = config.get_mut(part).and_then(toml::Value::as_table_mut).unwrap();
        listen.insert("listen".to_owned(), toml::Value::String(address.clone()));
        // Its other ports are taken by the one that runs.
        for free in ["api", "cluster", "beat"].iter().filter(|free| **free != part) {
            if let Some(table) = config.get_mut(*free).and_then(toml::Value::as_table_mut) {
                table.insert("listen".to_owned(), toml::Value::String("127.0.0.1:0".to_owned()));
            }
        }
        config.remove("telemetry");
        let path = file(&dev, "taken.toml", &config.to_string());
        let output = run_role(PROGRAM, role, &path);
        assert!(output.stderr.contains(&address), "{role} {part}: {output}");
        output.assert_error(1, &["in use", "choose another"]);
    }
    for (role, name) in [("store", "store-1"), ("control", "control-1"), ("node", "node-1")] {
        let mut config = dev.config(name);
        let telemetry = config.get_mut("telemetry").and_then(toml::Value::as_table_mut).unwrap();
        telemetry.insert("admin".to_owned(), toml::Value::String(address.clone()));
        if role == "store" {
            let data = dev.scratch().join("other").to_str().unwrap().to_owned();
            config.insert("data_dir".to_owned(), toml::Value::String(data));
        }
        let path = file(&dev, "taken.toml", &config.to_string());
        let output = run_role(PROGRAM, role, &path);
        assert!(output.stderr.contains(&address), "{role} admin: {output}");
        output.assert_error(1, &["in use", "choose another"]);
    }
    let mut config = dev.config("store-1");
    config.insert("listen".to_owned(), toml::Value::String(address.clone()));
    let data = dev.scratch().join("third").to_str().unwrap().to_owned();
    config.insert("data_dir".to_owned(), toml::Value::String(data));
    config.remove("telemetry");
    let output = run_role(PROGRAM, "store", &file(&dev, "taken.toml", &config.to_string()));
    assert!(output.stderr.contains(&address), "{output}");
    output.assert_error(1, &["in use", "choose another"]);
}

#[test]
fn a_node_with_a_certificate_that_is_refused_says_which_and_what_to_do() {
    let dev = one_node();
    let id = "spiffe://stagedoor.local/node/node-9";
    let now = SystemTime::now();
    let hour = Duration::from_hours(1);
    let past = Validity { not_before: now - 3 * hour, not_after: now - hour };
    let expired = dev.issue_client(id, past);
    let other = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
    let foreign = dev.issue_client(id, Validity::default());
    let stranger = other.issue(&id.parse().unwrap(), Validity::default()).unwrap();
    stranger.write(&foreign, "client").unwrap();
    for (folder, parts) in
        [(&expired, &["expired", "pki issue"][..]), (&foreign, &["do not trust each other"][..])]
    {
        let mut config = dev.config("node-1");
        config.insert("name".to_owned(), toml::Value::String("node-9".to_owned()));
        let net = config.get_mut("net").and_then(toml::Value::as_table_mut).unwrap();
        for (key, name) in [("certificate", "client.crt"), ("key", "client.key"), ("ca", "ca.crt")]
        {
            let path = folder.join(name).to_str().unwrap().to_owned();
            net.insert(key.to_owned(), toml::Value::String(path));
        }
        for part in ["cluster", "telemetry"] {
            let key = if part == "cluster" { "listen" } else { "admin" };
            let table = config.get_mut(part).and_then(toml::Value::as_table_mut).unwrap();
            table.insert(key.to_owned(), toml::Value::String("127.0.0.1:0".to_owned()));
        }
        let path = file(&dev, "node-9.toml", &config.to_string());
        let log = dev.scratch().join("node-9.log");
        let mut command = dev.program().command();
        command.args(["node", "--config"]).arg(&path);
        let _child = Child::spawn_logging("node-9", &mut command, &log);
        eventually(Duration::from_secs(60), "the node names its certificate", || {
            let text = fs::read_to_string(&log).unwrap();
            if parts.iter().all(|part| text.contains(part)) { Ok(()) } else { Err(text) }
        });
    }
}

#[test]
fn a_data_directory_of_a_newer_version_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("version"), "99\n").unwrap();
    let path = dir.path().to_str().unwrap();
    let output = PROGRAM.run(&["dev", "--data-dir", path, "--api", "127.0.0.1:0"]);
    output.assert_error(2, &[path, "version 99", ";"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    // The same for the store's own.
    let dev = one_node();
    let mut config = dev.config("store-1");
    let data = dev.scratch().join("newer");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("version"), "99\n").unwrap();
    config.insert("data_dir".to_owned(), toml::Value::String(data.to_str().unwrap().to_owned()));
    config.insert("listen".to_owned(), toml::Value::String("127.0.0.1:0".to_owned()));
    config.remove("telemetry");
    let config = file(&dev, "newer.toml", &config.to_string());
    let output = run_role(PROGRAM, "store", &config);
    output.assert_error(2, &[data.to_str().unwrap(), "99", "newer version of stagedoor"]);
}

#[test]
fn a_second_cluster_in_the_same_directory_is_refused_with_the_pid_of_the_first() {
    let mut dev = one_node();
    let pid = dev.child().pid().to_string();
    let dir = dev.dir();
    let args = ["dev", "--data-dir", dir.to_str().unwrap(), "--api", "127.0.0.1:0"];
    PROGRAM.run(&args).assert_error(1, &[dir.to_str().unwrap(), &pid, "--data-dir"]);
    dev.run(&["status"]).document();
    // The same for the store's own.
    let mut config = dev.config("store-1");
    config.insert("listen".to_owned(), toml::Value::String("127.0.0.1:0".to_owned()));
    config.remove("telemetry");
    let path = file(&dev, "second.toml", &config.to_string());
    let store = dev.pid("store-1").to_string();
    run_role(PROGRAM, "store", &path).assert_error(1, &[&store, "choose another"]);
}

#[test]
fn a_role_with_the_certificate_of_another_is_refused() {
    let dev = one_node();
    let check = |role: &str, name: &str, id: &str, code: i32| {
        let mut config = dev.config(name);
        let issued = dev.ca().issue(&id.parse().unwrap(), Validity::default()).unwrap();
        let written = issued.write(dev.scratch(), &id.replace(['/', ':'], "-")).unwrap();
        let net = config["net"].as_table_mut().unwrap();
        let path = |path: &Path| toml::Value::String(path.display().to_string());
        net.insert("certificate".to_owned(), path(&written.certificate));
        net.insert("key".to_owned(), path(&written.key));
        config.remove("telemetry");
        let path = file(&dev, "other.toml", &config.to_string());
        run_role(PROGRAM, role, &path).assert_error(code, &[id, role]);
    };
    // The name of another, and the role of another.
    check("node", "node-1", "spiffe://stagedoor.local/node/node-7", 2);
    check("node", "node-1", "spiffe://stagedoor.local/control/node-1", 2);
    check("node", "node-1", "spiffe://stagedoor.local/client/node-1", 2);
    check("control", "control-1", "spiffe://stagedoor.local/control/control-7", 2);
    check("control", "control-1", "spiffe://stagedoor.local/node/control-1", 2);
    check("store", "store-1", "spiffe://stagedoor.local/node/store-1", 2);
}
