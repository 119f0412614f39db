//! The way out to servers that are no processes of the cluster: a database server on this machine, or one on the web.
//!
//! Such a server has no SPIFFE id. Over TLS it is known by the name that it was asked for and a public CA, or one that
//! is configured; in the clear it is not known at all, so whoever asks for that decides whether it may be.

use std::fmt;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::{Error, tls};

/// A connection, in the shape that hyper takes.
pub type WebStream = TokioIo<Stream>;

/// Reaches servers of one kind. Cheap to clone.
#[derive(Clone)]
pub struct WebDialer {
    tls: Option<TlsConnector>,
    timeout: Duration,
}

impl fmt::Debug for WebDialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls.is_some() { "WebDialer(TLS)" } else { "WebDialer(plaintext)" })
    }
}

impl WebDialer {
    /// Without TLS. A dial takes at most `timeout`.
    pub fn plaintext(timeout: Duration) -> Self {
        Self { tls: None, timeout }
    }

    /// With TLS 1.3, to servers whose certificates are of a CA in `ca`, a file in PEM, or else of one that this machine
    /// trusts. Reads files: it is called once, at the start.
    ///
    /// # Errors
    /// There is no CA to trust.
    pub fn tls(ca: Option<&Path>, timeout: Duration) -> Result<Self, Error> {
        let roots = match ca {
            Some(path) => roots_of(path)?,
            None => roots_of_this_machine()?,
        };
        let config = tls::web_client_config(roots);
        Ok(Self { tls: Some(TlsConnector::from(Arc::new(config))), timeout })
    }

    /// Connects to a host: a name, which is resolved anew each time, or an address.
    ///
    /// # Errors
    /// It was not reached, or is not who it should be. Nothing was sent to it that counts.
    pub async fn dial(&self, host: &str, port: u16) -> Result<WebStream, Error> {
        let addr = format!("{host}:{port}");
        let dialing = self.attempt(host, port);
        let dialed = timeout(self.timeout, dialing).await.unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::TimedOut, "it did not answer in time"))
        });
        let stream = dialed.map_err(|source| Error::of_dial(&addr, source))?;
        Ok(TokioIo::new(stream))
    }

    async fn attempt(&self, host: &str, port: u16) -> io::Result<Stream> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((bare, port)).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return Ok(Stream::Plain(stream)) };
        let name = ServerName::try_from(bare.to_owned()).map_err(io::Error::other)?;
        Ok(Stream::Tls(Box::new(tls.connect(name, stream).await?)))
    }
}

fn roots_of(path: &Path) -> Result<RootCertStore, Error> {
    let origin = path.display().to_string();
    let unusable = |why: String| Error::unusable("CA certificate", &origin, why);
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unusable(error.to_string()));
    let mut roots = RootCertStore::empty();
    for certificate in certificates? {
        roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
    }
    match roots.is_empty() {
        true => Err(unusable("no certificate in PEM is in it".to_owned())),
        false => Ok(roots),
    }
}

fn roots_of_this_machine() -> Result<RootCertStore, Error> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    match roots.is_empty() {
        true => Err(Error::unusable(
            "CA certificates",
            "of this machine",
            "there are none; install ca-certificates, or name a file with the CA of the server",
        )),
        false => Ok(roots),
    }
}

/// With or without TLS.
#[derive(Debug)]
pub enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use domain::ErrorKind;
    use rustls::ServerConfig;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    /// A server with a certificate for `localhost` of a CA of its own; the CA in PEM, and the port.
    async fn server() -> (String, u16, tokio::task::JoinHandle<()>) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der());
        let config = ServerConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.unwrap())
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let byte = stream.read_u8().await.unwrap();
                stream.write_u8(byte + 1).await.unwrap();
                stream.shutdown().await.unwrap();
            }
        });
        (made.cert.pem(), port, serving)
    }

    #[tokio::test]
    async fn a_server_is_known_by_its_name_and_a_ca_that_is_trusted() {
        let (ca, port, serving) = server().await;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        std::fs::write(&path, ca).unwrap();
        let dialer = WebDialer::tls(Some(&path), TIMEOUT).unwrap();
        let mut stream = dialer.dial("localhost", port).await.unwrap().into_inner();
        stream.write_u8(4).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), 5);
        // The same server under another name.
        let refused = dialer.dial("127.0.0.1", port).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
        // And under a CA of somebody else.
        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&path, other.cert.pem()).unwrap();
        let stranger = WebDialer::tls(Some(&path), TIMEOUT).unwrap();
        let refused = stranger.dial("localhost", port).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
        serving.abort();
    }

    #[tokio::test]
    async fn nobody_there_is_not_reached_and_a_file_without_a_ca_is_named() {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let dialed = WebDialer::plaintext(TIMEOUT).dial("127.0.0.1", closed).await;
        assert_eq!(dialed.unwrap_err().kind(), ErrorKind::Unavailable);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty.pem");
        std::fs::write(&path, "").unwrap();
        for path in [path, dir.path().join("missing.pem")] {
            let error = WebDialer::tls(Some(&path), TIMEOUT).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
}
