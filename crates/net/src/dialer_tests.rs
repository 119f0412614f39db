//! A dial reaches the peer that was meant, or says what stood in the way.

use tokio::net::TcpListener;

use super::*;
use crate::testing::{Fixture, PATIENCE, control};

fn named(name: &str) -> Expected {
    Expected::exactly(Role::Control, name.parse().unwrap())
}

#[tokio::test]
async fn the_name_is_checked_and_not_the_address() {
    let fixture = Fixture::new();
    let listener = fixture.control(Protocol::Link).await;
    let addr = format!("localhost:{}", listener.local_addr().port());
    let node = fixture.node(Protocol::Link);
    node.dial(&addr, &named("control-1")).await.unwrap();
    node.dial(&addr, &control()).await.unwrap();
    for wrong in [named("control-2"), Expected::any(Role::Store)] {
        let error = node.dial(&addr, &wrong).await.unwrap_err();
        assert!(matches!(error, Error::WrongPeer { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("control/control-1") && text.contains(&wrong.to_string()), "{text}");
    }
}

#[tokio::test]
async fn a_server_of_another_ca_is_not_trusted() {
    let (fixture, other) = (Fixture::new(), Fixture::new());
    let listener = other.control(Protocol::Link).await;
    let addr = listener.local_addr().to_string();
    let error = fixture.node(Protocol::Link).dial(&addr, &control()).await.unwrap_err();
    let found = matches!(error, Error::Untrusted { refusal: crate::Refusal::UnknownIssuer, .. });
    assert!(found, "{error:?}");
}

#[tokio::test]
async fn a_server_of_another_trust_domain_is_not_trusted() {
    let fixture = Fixture::new();
    let elsewhere = fixture.ca.issue_with_uris(&["spiffe://elsewhere.local/control/c".into()]);
    let server = fixture.identity_of(&elsewhere);
    let any = "127.0.0.1:0".parse().unwrap();
    let config = crate::ListenerConfig::default();
    let listener =
        crate::Listener::bind(any, &server, Protocol::Link, &[Role::Node], config).await.unwrap();
    let addr = listener.local_addr().to_string();
    let error = fixture.node(Protocol::Link).dial(&addr, &control()).await.unwrap_err();
    let found = matches!(error, Error::Untrusted { refusal: crate::Refusal::TrustDomain, .. });
    assert!(found, "{error:?}");
}

#[tokio::test]
async fn nobody_at_the_address_is_not_reached() {
    let fixture = Fixture::new();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap().to_string();
    drop(socket);
    let error = fixture.node(Protocol::Link).dial(&addr, &control()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&addr), "{error}");
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up_at_the_deadline() {
    let fixture = Fixture::new();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = silent.local_addr().unwrap().to_string();
    let node = fixture.node(Protocol::Link).with_timeout(Duration::from_millis(50));
    let expected = control();
    let dial = node.dial(&addr, &expected);
    let error = tokio::time::timeout(PATIENCE, dial).await.unwrap().unwrap_err();
    let Error::NotReached { source, .. } = error else { panic!("{error:?}") };
    assert_eq!(source.kind(), io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn an_address_without_a_port_is_refused() {
    let fixture = Fixture::new();
    let node = fixture.node(Protocol::Link);
    for addr in ["localhost", "localhost:", ":1", "localhost:http", ""] {
        let error = node.dial(addr, &control()).await.unwrap_err();
        assert!(matches!(error, Error::Address { .. }), "{addr:?}: {error:?}");
    }
}

#[test]
fn a_peer_that_answered_says_more_than_silence() {
    let wrong = |found: &str| Error::WrongPeer {
        addr: "a:1".into(),
        found: found.parse().unwrap(),
        expected: control(),
    };
    let first = more_telling(None, wrong("spiffe://stagedoor.local/node/node-1"));
    let kept = more_telling(Some(first), too_late("a:1"));
    assert_eq!(kept.kind(), ErrorKind::Denied);
}

#[test]
fn an_address_is_host_and_port() {
    let check = |text: &str, valid: bool| assert_eq!(is_address(text), valid, "{text:?}");
    check("127.0.0.1:7700", true);
    check("control.example:7700", true);
    check("[::1]:7700", true);
    check("127.0.0.1", false);
    check(":7700", false);
    check("127.0.0.1:0", false);
    check("http://127.0.0.1:7700", false);
    check("a b:1", false);
    check("::1", false);
}
