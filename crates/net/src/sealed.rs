use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio_rustls::TlsAcceptor;

/// An acceptor that lets nobody in: it has no certificate, so no handshake with it ever succeeds. For a listener that a
/// library opens and that cannot be switched off.
pub fn sealed() -> TlsAcceptor {
    crate::install_crypto_provider();
    let config = ServerConfig::builder().with_no_client_auth().with_cert_resolver(Arc::new(Nobody));
    TlsAcceptor::from(Arc::new(config))
}

#[derive(Debug)]
struct Nobody;

impl ResolvesServerCert for Nobody {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        None
    }
}
