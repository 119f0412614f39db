//! Our listener and dialer in the shapes that tonic asks for. Tonic's own TLS is never used.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use tokio_stream::Stream;
use tonic::transport::Uri;
use tonic::transport::server::Connected;
use tower::Service;

use crate::{Accepted, Dialer, Error, Expected, Listener, SpiffeId};

/// Who sent a request. In the extensions of every request that came in through [`incoming`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    pub id: SpiffeId,
    pub addr: SocketAddr,
}

/// One verified connection of a gRPC server.
#[derive(Debug)]
pub struct GrpcStream {
    stream: TlsStream<TcpStream>,
    peer: PeerInfo,
}

/// The connections of a listener, for `serve_with_incoming`. Ends with the listener.
pub fn incoming(listener: Listener) -> impl Stream<Item = Result<GrpcStream, io::Error>> + Send {
    Incoming(listener)
}

/// Connects a tonic `Endpoint` (`http://host:port`: the TLS is here, not in tonic) to the peer that is expected.
///
/// A failure carries a [`enum@Error`] in its source chain: [`Error::find`] tells a refusal from silence. The server
/// has to send its settings first, as tonic's does unless it also accepts HTTP/1.
pub fn connector(dialer: Dialer, expected: Expected) -> Connector {
    Connector { dialer, expected }
}

/// See [`connector`].
#[derive(Clone, Debug)]
pub struct Connector {
    dialer: Dialer,
    expected: Expected,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let Self { dialer, expected } = self.clone();
        Box::pin(async move {
            let Some(authority) = uri.authority() else {
                return Err(Error::Address { addr: uri.to_string() });
            };
            let dialed = dialer.dial(authority.as_str(), &expected).await?;
            Ok(TokioIo::new(dialed.stream))
        })
    }
}

struct Incoming(Listener);

impl Stream for Incoming {
    type Item = Result<GrpcStream, io::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_accept(cx).map(|accepted| accepted.map(|accepted| Ok(accepted.into())))
    }
}

impl From<Accepted> for GrpcStream {
    fn from(accepted: Accepted) -> Self {
        let peer = PeerInfo { id: accepted.peer, addr: accepted.addr };
        Self { stream: accepted.stream, peer }
    }
}

impl Connected for GrpcStream {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl AsyncRead for GrpcStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for GrpcStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use domain::ErrorKind;
    use tonic::service::interceptor::InterceptedService;
    use tonic::transport::{Channel, Endpoint, Server};
    use tonic::{Request, Status};
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;

    use super::*;
    use crate::Protocol;
    use crate::testing::{Fixture, control};

    /// A gRPC server that answers nodes only with who they are, as an error.
    async fn server(fixture: &Fixture) -> (tokio::task::JoinHandle<()>, Endpoint) {
        let listener = fixture.control(Protocol::Grpc).await;
        let endpoint = Endpoint::from_shared(format!("http://{}", listener.local_addr())).unwrap();
        let (_, health) = tonic_health::server::health_reporter();
        let who = |request: Request<()>| -> Result<Request<()>, Status> {
            match request.extensions().get::<PeerInfo>() {
                Some(peer) => Err(Status::aborted(peer.id.to_string())),
                None => Err(Status::internal("nobody")),
            }
        };
        let router = Server::builder().add_service(InterceptedService::new(health, who));
        let serving = router.serve_with_incoming(incoming(listener));
        (tokio::spawn(async { serving.await.unwrap() }), endpoint)
    }

    async fn call(channel: Channel) -> Status {
        let mut client = HealthClient::new(channel);
        client.check(HealthCheckRequest::default()).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_request_carries_the_identity_of_its_sender() {
        let fixture = Fixture::new();
        let (serving, endpoint) = server(&fixture).await;
        let connector = connector(fixture.node(Protocol::Grpc), control());
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        assert_eq!(call(channel).await.message(), "spiffe://stagedoor.local/node/node-1");
        serving.abort();
    }

    #[tokio::test]
    async fn refused_and_not_reached_can_be_told_apart() {
        let fixture = Fixture::new();
        let (serving, endpoint) = server(&fixture).await;
        let dialer = Dialer::new(&fixture.identity("client/ann"), Protocol::Grpc);
        let stranger = connector(dialer, control());
        let eager = endpoint.connect_with_connector(stranger.clone()).await.unwrap_err();
        assert_eq!(Error::find(&eager).map(Error::kind), Some(ErrorKind::Denied), "{eager:?}");
        let lazy = call(endpoint.connect_with_connector_lazy(stranger)).await;
        assert_eq!(Error::find(&lazy).map(Error::kind), Some(ErrorKind::Denied), "{lazy:?}");

        serving.abort();
        assert!(serving.await.unwrap_err().is_cancelled());
        let known = connector(fixture.node(Protocol::Grpc), control());
        let gone = async || {
            let result = endpoint.connect_with_connector(known.clone()).await;
            let error = result.err()?;
            Error::find(&error).map(Error::kind)
        };
        crate::testing::eventually("the server is gone", async || {
            gone().await == Some(ErrorKind::Unavailable)
        })
        .await;
    }
}
