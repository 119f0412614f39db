//! Who may not come in at the cluster port: refused, logged with address and subject, counted; and who may, comes in
//! while all the others knock.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime};

use domain::Role;
use net::pki::{Ca, Validity};
use net::{Dialer, Expected, Identity, Protocol};
use prost::Message;
use tests::harness::{Dev, Node, NodeOptions, Options, PATIENCE, eventually, eventually_true};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{PHASES, PROGRAM, block_on, list};

const NODE: &str = "spiffe://stagedoor.local/node/node-7";

fn one_node() -> Dev {
    Dev::start_with(PROGRAM, &Options { nodes: 1, ..Options::default() })
}

/// An identity from `ca` that trusts the cluster's own CA.
fn identity(dev: &Dev, ca: &Ca, id: &str, validity: Validity) -> Identity {
    let issued = ca.issue(&id.parse().unwrap(), validity).unwrap();
    let trusted = dev.ca();
    Identity::from_pem(&issued.certificate_pem, &issued.key_pem, trusted.certificate_pem()).unwrap()
}

/// How often the control process turned somebody away for this reason.
fn refused(dev: &Dev, metric: &str, reason: &str) -> f64 {
    dev.metrics("control-1").sum(metric, &[&format!("reason=\"{reason}\"")])
}

fn await_refusal(dev: &Dev, metric: &str, reason: &str, before: f64) {
    eventually(PATIENCE, &format!("{metric} counts {reason}"), || {
        let now = refused(dev, metric, reason);
        if before < now { Ok(()) } else { Err(now) }
    });
}

/// A line of the log that has all these parts.
fn await_log(dev: &Dev, parts: &[&str]) {
    eventually(PATIENCE, &format!("a line with {parts:?}"), || {
        let log = dev.log("control-1");
        let found = log.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        if found { Ok(()) } else { Err(log) }
    });
}

/// Dials the cluster port and must not get in.
fn assert_turned_away(dev: &Dev, identity: &Identity, protocol: Protocol, reason: &str) {
    const NET: &str = "stagedoor_net_refused_total";
    let before = refused(dev, NET, reason);
    let address = dev.control_address("cluster");
    let dialer = Dialer::new(identity, protocol);
    let expected = Expected::any(Role::Control);
    let dialed = block_on(dialer.dial(&address, &expected));
    let error = dialed.map(|dialed| dialed.peer).unwrap_err();
    assert_eq!(error.kind(), domain::ErrorKind::Denied, "{error}");
    await_refusal(dev, NET, reason, before);
    // A wrong protocol is refused before any certificate is shown.
    let subject = if reason == "alpn" { String::new() } else { identity.id().to_string() };
    await_log(dev, &["addr=127.0.0.1:", &format!("reason=\"{reason}\""), &subject]);
}

#[test]
fn whoever_has_no_valid_certificate_of_a_peer_is_turned_away_counted_and_logged() {
    let dev = one_node();
    let ca = dev.ca();
    let stranger = Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap();
    let foreign = identity(&dev, &stranger, NODE, Validity::default());
    assert_turned_away(&dev, &foreign, Protocol::Link, "unknown_issuer");

    let now = SystemTime::now();
    let hour = Duration::from_hours(1);
    let past = Validity { not_before: now - 3 * hour, not_after: now - hour };
    let expired = identity(&dev, &ca, NODE, past);
    assert_turned_away(&dev, &expired, Protocol::Link, "expired");

    let client = identity(&dev, &ca, "spiffe://stagedoor.local/client/ann", Validity::default());
    assert_turned_away(&dev, &client, Protocol::Link, "role");

    let lost = identity(&dev, &ca, NODE, Validity::default());
    assert_turned_away(&dev, &lost, Protocol::Grpc, "alpn");
    // The cluster goes on.
    dev.run(&["status"]).document();
}

#[test]
fn a_node_with_a_wrong_cookie_does_not_join() {
    const CLUSTER: &str = "stagedoor_cluster_refused_total";
    let dev = one_node();
    let cookie = Some("the-cookie-of-some-other-cluster".to_owned());
    let intruder =
        Node::start(&dev, &NodeOptions { cookie, ..NodeOptions::new("node-7", &PHASES) });
    await_refusal(&dev, CLUSTER, "wrong_cookie", 0.0);
    await_log(&dev, &["wrong_cookie", "address=127.0.0.1:", NODE]);
    let nodes = dev.run(&["nodes"]).document();
    assert!(list(&nodes["nodes"]).iter().all(|node| node["name"] != "node-7"), "{nodes}");
    assert!(!dev.log("control-1").contains("some-other-cluster"), "the cookie is in the log");
    assert!(!intruder.log().contains("some-other-cluster"), "the cookie is in the log");
}

/// What ractor_cluster sends first, as far as the guard reads it.
#[derive(Clone, PartialEq, Message)]
struct NetworkMessage {
    #[prost(message, optional, tag = "1")]
    auth: Option<AuthenticationMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct AuthenticationMessage {
    #[prost(message, optional, tag = "1")]
    name: Option<NameMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct NameMessage {
    #[prost(string, tag = "1")]
    name: String,
}

fn framed(name: &str) -> Vec<u8> {
    let name = NameMessage { name: name.to_owned() };
    let auth = AuthenticationMessage { name: Some(name) };
    let body = NetworkMessage { auth: Some(auth) }.encode_to_vec();
    [&u64::try_from(body.len()).unwrap().to_be_bytes()[..], &body].concat()
}

#[test]
fn a_valid_certificate_cannot_take_the_name_of_another() {
    const CLUSTER: &str = "stagedoor_cluster_refused_total";
    let dev = one_node();
    let thief = identity(&dev, &dev.ca(), NODE, Validity::default());
    let address = dev.control_address("cluster");
    let from: SocketAddr = block_on(async {
        let dialer = Dialer::new(&thief, Protocol::Link);
        let mut dialed = dialer.dial(&address, &Expected::any(Role::Control)).await.unwrap();
        let from = dialed.stream.get_ref().0.local_addr().unwrap();
        dialed.stream.write_all(&framed("node/node-1@1-aa")).await.unwrap();
        // The other side hangs up without a word.
        let mut answer = Vec::new();
        let read = dialed.stream.read_to_end(&mut answer);
        _ = tokio::time::timeout(PATIENCE, read).await.expect("it hangs up");
        assert!(answer.is_empty());
        from
    });
    await_refusal(&dev, CLUSTER, "name_mismatch", 0.0);
    await_log(&dev, &["name_mismatch", &from.to_string(), NODE, "node/node-1"]);
    // The one whose name it is was not disturbed.
    let nodes = dev.run(&["nodes"]).document();
    assert_eq!(list(&nodes["nodes"]).len(), 1, "{nodes}");
    assert_eq!(list(&nodes["nodes"])[0]["state"], "alive", "{nodes}");
}

#[test]
fn a_silent_client_is_cut_off_counted_and_logged() {
    const NET: &str = "stagedoor_net_refused_total";
    let dev = one_node();
    for part in ["cluster", "beat", "api"] {
        let before = refused(&dev, NET, "timeout");
        let silent = TcpStream::connect(dev.control_address(part)).unwrap();
        let from = silent.local_addr().unwrap();
        await_refusal(&dev, NET, "timeout", before);
        await_log(&dev, &[&format!("addr={from}"), "reason=\"timeout\""]);
    }
}

/// Starts a node and waits until it is alive.
fn join(dev: &Dev, name: &str) -> (Node, Duration) {
    let client = dev.client();
    let began = Instant::now();
    let node = Node::start(dev, &NodeOptions::new(name, &PHASES));
    let took = block_on(async {
        loop {
            let nodes = client.nodes().await.unwrap().nodes;
            if nodes.iter().any(|node| node.name == name && node.state == "alive") {
                return began.elapsed();
            }
            assert!(began.elapsed() < PATIENCE, "it does not join");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    (node, took)
}

#[test]
fn an_honest_node_joins_in_two_seconds_while_two_hundred_silent_clients_are_connected() {
    const TRIALS: usize = 3;
    let dev = one_node();
    let address: SocketAddr = dev.control_address("cluster").parse().unwrap();
    let cut_off = || {
        let counted = ["timeout", "crowded"]
            .map(|reason| refused(&dev, "stagedoor_net_refused_total", reason));
        counted.iter().sum::<f64>()
    };
    // A machine that is too busy for a moment is not what they do to it.
    let trial = |number: usize| {
        let before = cut_off();
        let silent: Vec<_> = (0..200).map(|_| TcpStream::connect(address).unwrap()).collect();
        let (_node, took) = join(&dev, &format!("node-{}", 6 + number));
        // They are still there: it is the server that cuts them off.
        eventually_true(PATIENCE, "the silent ones are cut off and counted", || {
            before + 200.0 <= cut_off()
        });
        drop(silent);
        took
    };
    let mut took = Vec::new();
    while took.last().is_none_or(|took| Duration::from_secs(2) <= *took) {
        assert!(took.len() < TRIALS, "{took:?}");
        took.push(trial(took.len()));
    }
}
