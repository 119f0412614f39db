//! The TLS configurations, and the two verifiers in which peers are authorised.
//!
//! Authorisation happens inside the handshake, so that a peer which is refused gets a TLS alert and can say why.

use std::cell::RefCell;
use std::sync::{Arc, LazyLock};

use domain::{Role, TrustDomain};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
};

use crate::refusal::Refusal;
use crate::{Identity, Protocol, spiffe};

/// The DNS name that every leaf carries beside its SPIFFE id, and that every dialer asks for.
///
/// Names of machines and addresses come and go, so none of them is certified. But webpki verifies a server against a
/// DNS name, and its verifier is the one to trust: so all servers share this name, and who a server is stands in its
/// SPIFFE id alone, which is checked next.
pub(crate) const SERVER_NAME: &str = "stagedoor";

/// Makes aws-lc-rs the provider of this process, for the libraries that ask for one. May be called again.
pub fn install_crypto_provider() {
    // An error says that there is one already, which is as good.
    _ = aws_lc_rs::default_provider().install_default();
}

/// What our own configurations use, whether or not it is installed.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));
    PROVIDER.clone()
}

pub(crate) fn server_name() -> ServerName<'static> {
    ServerName::try_from(SERVER_NAME).expect("the constant is a DNS name")
}

/// Demands a certificate of our CA for one of the roles.
pub(crate) fn server_config(
    identity: &Identity,
    protocol: Protocol,
    allowed: &[Role],
) -> ServerConfig {
    let inner = WebPkiClientVerifier::builder_with_provider(identity.roots(), provider())
        .build()
        .expect("an identity has at least one root");
    let verifier = ClientVerifier {
        inner,
        trust_domain: identity.id().trust_domain.clone(),
        allowed: allowed.to_vec(),
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider offers TLS 1.3")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![protocol.alpn().to_vec()];
    // A resumed session is not verified again, and so could outlive its certificate.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

pub(crate) fn client_config(identity: &Identity, protocol: Protocol) -> ClientConfig {
    let inner = WebPkiServerVerifier::builder_with_provider(identity.roots(), provider())
        .build()
        .expect("an identity has at least one root");
    let verifier = ServerVerifier { inner, trust_domain: identity.id().trust_domain.clone() };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider offers TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified())));
    config.alpn_protocols = vec![protocol.alpn().to_vec()];
    config.resumption = Resumption::disabled();
    config
}

/// For servers that are no processes of ours: known by their DNS names and a CA of the web.
pub(crate) fn web_client_config(roots: RootCertStore) -> ClientConfig {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider offers TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}

/// What the verifier learned of a peer: rustls keeps nothing of a handshake that failed.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) subject: Option<String>,
    pub(crate) refusal: Option<Refusal>,
}

tokio::task_local! {
    static SEEN: RefCell<Seen>;
}

/// Runs a handshake and returns with its outcome what the verifier saw in it.
pub(crate) async fn observed<F: Future>(handshake: F) -> (F::Output, Seen) {
    let handshake = async {
        let output = handshake.await;
        (output, SEEN.with(RefCell::take))
    };
    SEEN.scope(RefCell::default(), handshake).await
}

fn note(write: impl FnOnce(&mut Seen)) {
    // Outside of `observed` nobody wants to know.
    _ = SEEN.try_with(|seen| write(&mut seen.borrow_mut()));
}

/// Checks a client: its chain first, then who it is.
#[derive(Debug)]
struct ClientVerifier {
    inner: Arc<dyn ClientCertVerifier>,
    trust_domain: TrustDomain,
    allowed: Vec<Role>,
}

impl ClientVerifier {
    fn authorise(&self, certificate: &[u8]) -> Result<(), Refusal> {
        let id = spiffe::id_within(certificate, &self.trust_domain)?;
        match self.allowed.contains(&id.role) {
            true => Ok(()),
            false => Err(Refusal::Role),
        }
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        note(|seen| seen.subject = spiffe::subject_of(end_entity));
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        match self.authorise(end_entity) {
            Ok(()) => Ok(verified),
            Err(refusal) => {
                note(|seen| seen.refusal = Some(refusal));
                // This variant becomes the alert `access_denied`, the one that fits.
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Checks a server: its chain first, then that it has a SPIFFE id of ours. Which one it has to be is the dial's affair.
#[derive(Debug)]
struct ServerVerifier {
    inner: Arc<WebPkiServerVerifier>,
    trust_domain: TrustDomain,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let name = server_name();
        let verified =
            self.inner.verify_server_cert(end_entity, intermediates, &name, ocsp_response, now)?;
        match spiffe::id_within(end_entity, &self.trust_domain) {
            Ok(_) => Ok(verified),
            Err(refusal) => Err(CertificateError::Other(OtherError(Arc::new(refusal))).into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_provider_may_be_installed_twice() {
        install_crypto_provider();
        install_crypto_provider();
        assert!(CryptoProvider::get_default().is_some());
    }
}
