//! A store that is reached over TLS, as one on the web is: sqld speaks none itself, so a server in front of it does.

use std::path::Path;
use std::sync::Arc;

use domain::ErrorKind;
use rcgen::{CertifiedKey, KeyPair};
use store::Config;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use crate::doors::Doors;
use crate::fixture::{control_config, node_config, store};
use crate::rows::SHARD;
use crate::suite;

/// Speaks TLS with whoever comes, and passes on what they say to the server at `url`: its own URL.
async fn front(url: &str, made: &CertifiedKey<KeyPair>) -> String {
    let target = url.trim_start_matches("http://").to_owned();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let (acceptor, target) = (acceptor.clone(), target.clone());
            tokio::spawn(async move {
                let Ok(mut near) = acceptor.accept(near).await else { return };
                let Ok(mut far) = TcpStream::connect(target).await else { return };
                _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    format!("https://localhost:{port}")
}

fn trusting(ca: &Path, config: Config) -> Config {
    Config { ca_file: Some(ca.to_owned()), ..config }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls_a_store_promises_the_same_to_who_trusts_its_authority() {
    let Some(mut doors) = Doors::any().await else { return };
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let sqld = doors.sqld();
    let url = front(&sqld.url(), &made).await;
    let admin_url = Some(front(&sqld.admin_url(), &made).await);
    let node = Config { url: url.clone(), ..node_config(sqld) };
    let control = Config { url: url.clone(), admin_url, ..control_config(sqld) };
    let ca = doors.folder.path().join("ca.pem");
    std::fs::write(&ca, made.cert.pem()).unwrap();
    doors.node = store(trusting(&ca, node.clone()));
    doors.control = store(trusting(&ca, control));
    suite::a_recovery_finds_what_was_written(&doors).await;

    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let strange = doors.folder.path().join("other.pem");
    std::fs::write(&strange, other.cert.pem()).unwrap();
    let refused = store(trusting(&strange, node.clone())).owner(SHARD).await.unwrap_err();
    assert_ne!(refused.kind(), ErrorKind::NotFound, "{refused}");
    // The same server by a name that is not in its certificate.
    let url = url.replace("localhost", "127.0.0.1");
    let refused = store(trusting(&ca, Config { url, ..node })).owner(SHARD).await.unwrap_err();
    assert_ne!(refused.kind(), ErrorKind::NotFound, "{refused}");
    doors.end().await;
}
