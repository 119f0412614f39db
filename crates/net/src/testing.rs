//! What the tests of this crate share: a CA, identities, raw peers, patience.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use domain::Role;
use rustls::ClientConfig;
use rustls::client::WebPkiServerVerifier;
use rustls::version::TLS13;

use crate::pki::{self, Ca, Issued, Validity};
use crate::{Config, Dialer, Expected, Identity, Listener, ListenerConfig, Protocol, tls};

/// Longer than anything honest takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Fixture {
    pub(crate) ca: Ca,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self { ca: Ca::generate(&"stagedoor.local".parse().unwrap()).unwrap() }
    }

    pub(crate) fn issue(&self, role_and_name: &str) -> Issued {
        self.issue_for(role_and_name, Validity::default())
    }

    pub(crate) fn issue_for(&self, role_and_name: &str, validity: Validity) -> Issued {
        let id = format!("spiffe://stagedoor.local/{role_and_name}").parse().unwrap();
        self.ca.issue(&id, validity).unwrap()
    }

    /// An identity that trusts this CA.
    pub(crate) fn identity(&self, role_and_name: &str) -> Identity {
        self.identity_of(&self.issue(role_and_name))
    }

    pub(crate) fn identity_of(&self, issued: &Issued) -> Identity {
        let (certificate, key) = (&issued.certificate_pem, &issued.key_pem);
        Identity::from_pem(certificate, key, self.ca.certificate_pem()).unwrap()
    }

    /// A control process that lets nodes in.
    pub(crate) async fn control(&self, protocol: Protocol) -> Listener {
        self.control_with(protocol, ListenerConfig::default()).await
    }

    pub(crate) async fn control_with(
        &self,
        protocol: Protocol,
        config: ListenerConfig,
    ) -> Listener {
        let identity = self.identity("control/control-1");
        let any = "127.0.0.1:0".parse().unwrap();
        Listener::bind(any, &identity, protocol, &[Role::Node], config).await.unwrap()
    }

    pub(crate) fn node(&self, protocol: Protocol) -> Dialer {
        Dialer::new(&self.identity("node/node-1"), protocol)
    }
}

pub(crate) fn control() -> Expected {
    Expected::any(Role::Control)
}

pub(crate) fn yesterday() -> Validity {
    let day = Duration::from_hours(24);
    let now = SystemTime::now();
    Validity { not_before: now - 2 * day, not_after: now - day }
}

/// A CA and one certificate of it, in files.
pub(crate) fn issue_files(dir: &Path, role_and_name: &str) -> Config {
    let ca = pki::init(dir, &"stagedoor.local".parse().unwrap()).unwrap();
    let id = format!("spiffe://stagedoor.local/{role_and_name}").parse().unwrap();
    let written = ca.issue(&id, Validity::default()).unwrap().write(dir, "leaf").unwrap();
    Config { certificate: written.certificate, key: written.key, ca: dir.join("ca.crt") }
}

/// A client that shows no certificate and, unless told, no protocol.
pub(crate) fn anonymous(identity: &Identity) -> ClientConfig {
    let verifier = WebPkiServerVerifier::builder_with_provider(identity.roots(), tls::provider());
    ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_webpki_verifier(verifier.build().unwrap())
        .with_no_client_auth()
}

pub(crate) fn shared(config: ClientConfig) -> tokio_rustls::TlsConnector {
    Arc::new(config).into()
}

/// Waits until the condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "it never happened: {what}");
}
