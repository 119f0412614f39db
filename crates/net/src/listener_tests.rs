//! Who is let in, who is not, and that one cannot keep out the other.

use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::*;
use crate::pki::Issued;
use crate::testing::{Fixture, PATIENCE, anonymous, control, eventually, shared, yesterday};
use crate::{Dialer, refusal};

fn refused(refusal: Refusal) -> u64 {
    refusal::REFUSED.with_label_values(&[refusal.as_str()]).get()
}

fn few(handshakes_max: usize) -> ListenerConfig {
    let handshakes_max = NonZeroUsize::new(handshakes_max).unwrap();
    ListenerConfig { handshakes_max, ..ListenerConfig::default() }
}

/// Dials as `intruder` and expects to be refused for the reason, on both sides.
async fn check(fixture: &Fixture, intruder: &Identity, refusal: Refusal, told: &str) {
    let mut listener = fixture.control(Protocol::Link).await;
    let before = refused(refusal);
    let addr = listener.local_addr().to_string();
    let error = Dialer::new(intruder, Protocol::Link).dial(&addr, &control()).await.unwrap_err();
    assert_eq!(error.kind(), domain::ErrorKind::Denied, "{error:?}");
    assert!(error.to_string().contains(told) && error.to_string().contains(&addr), "{error}");
    eventually("the refusal is counted", async || before < refused(refusal)).await;
    // The door is as open as before for one that is in order, and the intruder never came through.
    let honest = fixture.node(Protocol::Link).dial(&addr, &control()).await.unwrap();
    assert_eq!(honest.peer.to_string(), "spiffe://stagedoor.local/control/control-1");
    let accepted = listener.accept().await.unwrap();
    assert_eq!(accepted.peer.to_string(), "spiffe://stagedoor.local/node/node-1");
}

#[tokio::test]
async fn both_sides_see_each_other() {
    let fixture = Fixture::new();
    let mut listener = fixture.control(Protocol::Link).await;
    let addr = listener.local_addr().to_string();
    let mut dialed = fixture.node(Protocol::Link).dial(&addr, &control()).await.unwrap();
    let mut accepted = listener.accept().await.unwrap();
    assert_eq!(dialed.peer.to_string(), "spiffe://stagedoor.local/control/control-1");
    assert_eq!(accepted.peer.to_string(), "spiffe://stagedoor.local/node/node-1");
    assert_eq!(dialed.stream.get_ref().0.local_addr().unwrap(), accepted.addr);
    assert_eq!(dialed.addr, listener.local_addr());

    let mut heard = [0; 4];
    dialed.stream.write_all(b"ping").await.unwrap();
    accepted.stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"ping");
    accepted.stream.write_all(b"pong").await.unwrap();
    dialed.stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"pong", "the greeting is not part of the stream");
    assert!(accepted.stream.get_ref().0.nodelay().unwrap());
    assert!(SockRef::from(accepted.stream.get_ref().0).keepalive().unwrap());
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused() {
    let (fixture, other) = (Fixture::new(), Fixture::new());
    let foreign = fixture.identity_of(&other.issue("node/node-1"));
    check(&fixture, &foreign, Refusal::UnknownIssuer, "another CA").await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let fixture = Fixture::new();
    let expired = fixture.identity_of(&fixture.issue_for("node/node-9", yesterday()));
    check(&fixture, &expired, Refusal::Expired, "not valid now").await;
}

#[tokio::test]
async fn a_wrong_role_is_refused() {
    let fixture = Fixture::new();
    let client = fixture.identity("client/ann");
    check(&fixture, &client, Refusal::Role, "does not allow our role").await;
}

/// The verdict on a client, seen from inside: reason and subject. It also holds that the client was told.
async fn verdict(fixture: &Fixture, client: ClientConfig) -> (Refusal, Option<String>) {
    let identity = fixture.identity("control/control-1");
    let config = tls::server_config(&identity, Protocol::Link, &[Role::Node]);
    let door = Door {
        tls: TlsAcceptor::from(Arc::new(config)),
        protocol: Protocol::Link,
        timeout: PATIENCE,
        keepalive: keepalive(10_000, 5_000),
        accepted: mpsc::channel(1).0,
    };
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = socket.local_addr().unwrap();
    let (theirs, ours) = tokio::join!(TcpStream::connect(addr), socket.accept());
    let (ours, addr) = ours.unwrap();
    let knock = async {
        let mut stream = shared(client).connect(tls::server_name(), theirs.unwrap()).await?;
        stream.read_u8().await
    };
    let (told, verdict) =
        timeout(PATIENCE, async { tokio::join!(knock, door.handshake(ours, addr)) }).await.unwrap();
    assert!(told.is_err());
    let rejection = verdict.unwrap_err();
    (rejection.refusal, rejection.subject)
}

/// A client that shows a certificate which no `Identity` accepts.
fn showing(fixture: &Fixture, issued: &Issued) -> ClientConfig {
    let leaf = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
    let certified = CertifiedKey::from_der(vec![leaf], key, &tls::provider()).unwrap();
    let mut config = anonymous(&fixture.identity("node/node-1"));
    config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certified));
    config.alpn_protocols = vec![Protocol::Link.alpn().to_vec()];
    config
}

#[tokio::test]
async fn a_refusal_knows_whom_it_refused() {
    let (fixture, other) = (Fixture::new(), Fixture::new());
    let id = |name: &str| Some(format!("spiffe://stagedoor.local/{name}"));
    let foreign = showing(&fixture, &other.issue("node/node-7"));
    assert_eq!(verdict(&fixture, foreign).await, (Refusal::UnknownIssuer, id("node/node-7")));
    let expired = showing(&fixture, &fixture.issue_for("node/node-8", yesterday()));
    assert_eq!(verdict(&fixture, expired).await, (Refusal::Expired, id("node/node-8")));
    let client = showing(&fixture, &fixture.issue("client/ann"));
    assert_eq!(verdict(&fixture, client).await, (Refusal::Role, id("client/ann")));
}

#[tokio::test]
async fn a_certificate_of_another_trust_domain_is_refused() {
    let fixture = Fixture::new();
    let id = "spiffe://elsewhere.local/node/node-1".to_owned();
    let elsewhere = showing(&fixture, &fixture.ca.issue_with_uris(std::slice::from_ref(&id)));
    assert_eq!(verdict(&fixture, elsewhere).await, (Refusal::TrustDomain, Some(id)));
}

#[tokio::test]
async fn a_certificate_has_exactly_one_spiffe_id() {
    let fixture = Fixture::new();
    let id = |name: &str| format!("spiffe://stagedoor.local/node/{name}");
    let other = "https://stagedoor.local/node/node-1".to_owned();
    for uris in
        [vec![id("node-1"), id("node-2")], vec![id("node-1"), other.clone()], vec![other], vec![]]
    {
        let issued = fixture.ca.issue_with_uris(&uris);
        let (refusal, _) = verdict(&fixture, showing(&fixture, &issued)).await;
        assert_eq!(refusal, Refusal::NoSpiffeId, "{uris:?}");
        let (certificate, key) = (&issued.certificate_pem, &issued.key_pem);
        assert!(Identity::from_pem(certificate, key, fixture.ca.certificate_pem()).is_err());
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let fixture = Fixture::new();
    let mut client = anonymous(&fixture.identity("node/node-1"));
    client.alpn_protocols = vec![Protocol::Link.alpn().to_vec()];
    assert_eq!(verdict(&fixture, client).await, (Refusal::NoCertificate, None));
}

#[tokio::test]
async fn a_client_that_names_no_protocol_is_refused() {
    let fixture = Fixture::new();
    let mut client = showing(&fixture, &fixture.issue("node/node-1"));
    client.alpn_protocols.clear();
    let subject = Some("spiffe://stagedoor.local/node/node-1".to_owned());
    assert_eq!(verdict(&fixture, client).await, (Refusal::Alpn, subject));
}

#[tokio::test]
async fn a_client_of_another_protocol_is_told_so() {
    let fixture = Fixture::new();
    let listener = fixture.control(Protocol::Link).await;
    let before = refused(Refusal::Alpn);
    let addr = listener.local_addr().to_string();
    for protocol in [Protocol::Beat, Protocol::Grpc] {
        let error = fixture.node(protocol).dial(&addr, &control()).await.unwrap_err();
        assert!(error.to_string().contains("another protocol"), "{error}");
    }
    eventually("both are counted", async || before + 2 <= refused(Refusal::Alpn)).await;
}

#[tokio::test]
async fn silent_clients_keep_nobody_out() {
    let fixture = Fixture::new();
    let mut listener = fixture.control(Protocol::Link).await;
    let addr = listener.local_addr();
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    let node = fixture.node(Protocol::Link);
    let addr = addr.to_string();
    // They are not let go before: each has five seconds.
    let dial = timeout(Duration::from_secs(4), async { node.dial(&addr, &control()).await });
    dial.await.expect("in time").unwrap();
    listener.accept().await.unwrap();
    drop(silent);
}

#[tokio::test]
async fn when_all_places_are_taken_the_oldest_silent_client_goes() {
    let fixture = Fixture::new();
    let mut listener = fixture.control_with(Protocol::Link, few(4)).await;
    let addr = listener.local_addr();
    let before = refused(Refusal::Crowded);
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    fixture.node(Protocol::Link).dial(&addr.to_string(), &control()).await.unwrap();
    listener.accept().await.unwrap();
    assert!(before + 5 <= refused(Refusal::Crowded));
    let closed = timeout(PATIENCE, silent[0].read_u8()).await.unwrap();
    assert!(closed.is_err(), "the oldest is closed long before its deadline");
}

#[tokio::test]
async fn a_silent_client_is_dropped_at_its_deadline() {
    let fixture = Fixture::new();
    let config = ListenerConfig { handshake_timeout_ms: 50, ..ListenerConfig::default() };
    let listener = fixture.control_with(Protocol::Link, config).await;
    let before = refused(Refusal::Timeout);
    let mut silent = TcpStream::connect(listener.local_addr()).await.unwrap();
    assert!(timeout(PATIENCE, silent.read_u8()).await.unwrap().is_err());
    eventually("the refusal is counted", async || before < refused(Refusal::Timeout)).await;
}

#[tokio::test]
async fn a_peer_that_nobody_takes_is_refused_in_time() {
    let fixture = Fixture::new();
    let backlog_max = NonZeroUsize::MIN;
    // Long enough for the handshakes of a debug build on a busy machine.
    let config =
        ListenerConfig { backlog_max, handshake_timeout_ms: 2_000, ..ListenerConfig::default() };
    let mut listener = fixture.control_with(Protocol::Link, config).await;
    let addr = listener.local_addr().to_string();
    let before = refused(Refusal::Backlog);
    let node = fixture.node(Protocol::Link).with_timeout(PATIENCE);
    node.dial(&addr, &control()).await.unwrap();
    let error = node.dial(&addr, &control()).await.unwrap_err();
    assert_eq!(error.kind(), domain::ErrorKind::Unavailable, "{error:?}");
    eventually("the refusal is counted", async || before < refused(Refusal::Backlog)).await;
    listener.accept().await.unwrap();
    node.dial(&addr, &control()).await.unwrap();
}

#[tokio::test]
async fn an_address_in_use_is_named_with_the_remedy() {
    let fixture = Fixture::new();
    let listener = fixture.control(Protocol::Link).await;
    let addr = listener.local_addr();
    let identity = fixture.identity("control/control-2");
    let config = ListenerConfig::default();
    let again = Listener::bind(addr, &identity, Protocol::Link, &[Role::Node], config).await;
    let error = again.unwrap_err().to_string();
    assert!(error.contains(&addr.to_string()) && error.contains("in use; stop"), "{error}");
}

#[tokio::test]
async fn a_dropped_listener_closes_its_port_and_its_handshakes() {
    let fixture = Fixture::new();
    let listener = fixture.control(Protocol::Link).await;
    let addr = listener.local_addr();
    let mut silent = TcpStream::connect(addr).await.unwrap();
    drop(listener);
    eventually("the port is closed", async || TcpStream::connect(addr).await.is_err()).await;
    assert!(timeout(PATIENCE, silent.read_u8()).await.unwrap().is_err());
}

#[test]
fn a_config_with_no_places_is_refused() {
    assert!(toml::from_str::<ListenerConfig>("handshakes_max = 0").is_err());
    assert!(toml::from_str::<ListenerConfig>("unknown = 1").is_err());
    assert_eq!(toml::from_str::<ListenerConfig>("").unwrap(), ListenerConfig::default());
}
