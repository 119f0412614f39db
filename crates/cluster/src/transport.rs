//! The stream under a session: what ractor_cluster reads and writes, with deadlines that it does not have.
//!
//! ractor_cluster never finds out that a peer hangs. It sends something at least every 5 s, so silence for longer than
//! the limit, or a write that makes no progress for as long, ends the session.

use std::io::{self, Cursor};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::task::AtomicWaker;
use ractor_cluster::{BoxRead, BoxWrite, ClusterBidiStream};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, BufReader, ReadBuf};
use tokio::time::{Instant, Sleep};

/// One TLS record. ractor_cluster reads eight bytes, then the rest.
const READ_BUFFER_BYTES: usize = 16 << 10;

/// What the two halves of a stream share with whoever may end it.
#[derive(Debug, Default)]
pub(crate) struct Connection {
    closed: AtomicBool,
    ended_by_peer: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Connection {
    /// Both halves fail from now on, and the session above them ends.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.reader.wake();
        self.writer.wake();
    }

    /// Whether the peer or the network ended it, and not we.
    pub(crate) fn ended_by_peer(&self) -> bool {
        self.ended_by_peer.load(Ordering::Acquire)
    }

    fn check(&self) -> io::Result<()> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the link was closed")),
            false => Ok(()),
        }
    }

    fn note_end(&self) {
        if !self.closed.load(Ordering::Acquire) {
            self.ended_by_peer.store(true, Ordering::Release);
        }
    }
}

/// A connection to a peer whose certificate, and whose claim if it dialled, were checked.
pub(crate) struct Guarded<S> {
    pub(crate) stream: S,
    /// What was read of it already.
    pub(crate) first: Vec<u8>,
    pub(crate) connection: Arc<Connection>,
    pub(crate) label: String,
    pub(crate) silence_max: Duration,
}

impl<S: AsyncRead + AsyncWrite + Send + 'static> ClusterBidiStream for Guarded<S> {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        let (reader, writer) = tokio::io::split(self.stream);
        let patience = || Patience::new(self.silence_max);
        let reader =
            Reader { inner: reader, connection: self.connection.clone(), patience: patience() };
        let connection = self.connection;
        let writer = Writer { inner: writer, connection, patience: patience(), stalled: false };
        let reader =
            BufReader::with_capacity(READ_BUFFER_BYTES, Cursor::new(self.first).chain(reader));
        (Box::new(reader), Box::new(writer))
    }

    fn peer_label(&self) -> Option<String> {
        Some(self.label.clone())
    }
}

/// Runs out when nothing was done for so long. Progress is only noted; the timer is set anew when it fires, so that a
/// busy stream costs no timer.
struct Patience {
    limit: Duration,
    last: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Patience {
    fn new(limit: Duration) -> Self {
        Self { limit, last: Instant::now(), timer: Box::pin(tokio::time::sleep(limit)) }
    }

    fn progress(&mut self) {
        self.last = Instant::now();
    }

    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let end = self.last + self.limit;
            if end <= Instant::now() {
                let text = "the peer is silent";
                return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            self.timer.as_mut().reset(end);
        }
        Poll::Pending
    }
}

struct Reader<R> {
    inner: R,
    connection: Arc<Connection>,
    patience: Patience,
}

impl<R: AsyncRead + Unpin> AsyncRead for Reader<R> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.connection.check()?;
        let before = buffer.filled().len();
        match Pin::new(&mut this.inner).poll_read(cx, buffer) {
            Poll::Ready(Ok(())) if before < buffer.filled().len() => {
                this.patience.progress();
                Poll::Ready(Ok(()))
            }
            Poll::Ready(end) => {
                this.connection.note_end();
                Poll::Ready(end)
            }
            Poll::Pending => {
                this.connection.reader.register(cx.waker());
                this.connection.check()?;
                let over = std::task::ready!(this.patience.poll_over(cx));
                this.connection.note_end();
                Poll::Ready(Err(over))
            }
        }
    }
}

struct Writer<W> {
    inner: W,
    connection: Arc<Connection>,
    patience: Patience,
    /// The last write made no progress: from then on patience counts, not from the last time there was work.
    stalled: bool,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    /// `polled` is what the stream said; a stream that takes nothing for too long has failed.
    fn judge<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(result) = polled {
            self.stalled = false;
            if result.is_err() {
                self.connection.note_end();
            }
            return Poll::Ready(result);
        }
        if !self.stalled {
            self.stalled = true;
            self.patience.progress();
        }
        self.connection.writer.register(cx.waker());
        self.connection.check()?;
        let over = std::task::ready!(self.patience.poll_over(cx));
        self.connection.note_end();
        Poll::Ready(Err(over))
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Writer<W> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.connection.check()?;
        let polled = Pin::new(&mut this.inner).poll_write(cx, bytes);
        this.judge(cx, polled)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.connection.check()?;
        let polled = Pin::new(&mut this.inner).poll_flush(cx);
        this.judge(cx, polled)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.inner).poll_shutdown(cx);
        this.judge(cx, polled)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(12);

    fn guarded(first: &[u8]) -> (Arc<Connection>, BoxRead, BoxWrite, tokio::io::DuplexStream) {
        let (ours, theirs) = tokio::io::duplex(64);
        let connection = Arc::new(Connection::default());
        let stream = Guarded {
            stream: ours,
            first: first.to_vec(),
            connection: connection.clone(),
            label: "peer".to_owned(),
            silence_max: LIMIT,
        };
        let (reader, writer) = Box::new(stream).split();
        (connection, reader, writer, theirs)
    }

    #[tokio::test]
    async fn what_was_read_already_comes_first() {
        let (_, mut reader, _writer, mut theirs) = guarded(b"one ");
        theirs.write_all(b"two").await.unwrap();
        let mut read = [0; 7];
        reader.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"one two");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_a_read_and_a_byte_in_time_does_not() {
        let (connection, mut reader, _writer, mut theirs) = guarded(b"");
        let start = Instant::now();
        let chatter = tokio::spawn(async move {
            tokio::time::sleep(LIMIT * 2 / 3).await;
            theirs.write_all(b"x").await.unwrap();
            theirs
        });
        assert_eq!(reader.read_u8().await.unwrap(), b'x');
        let error = reader.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(LIMIT + LIMIT / 2 < start.elapsed() && start.elapsed() < LIMIT * 2);
        assert!(connection.ended_by_peer());
        drop(chatter.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_makes_no_progress_ends() {
        let (connection, _reader, mut writer, _theirs) = guarded(b"");
        let error = writer.write_all(&[0; 1_000]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(connection.ended_by_peer());
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_after_a_long_rest_has_its_full_time() {
        let (_, _reader, mut writer, mut theirs) = guarded(b"");
        tokio::time::sleep(LIMIT * 3).await;
        let reading = tokio::spawn(async move {
            tokio::time::sleep(LIMIT / 2).await;
            theirs.read_exact(&mut [0; 100]).await.unwrap();
        });
        writer.write_all(&[0; 100]).await.unwrap();
        reading.await.unwrap();
    }

    #[tokio::test]
    async fn closing_ends_both_halves_and_is_ours() {
        let (connection, mut reader, mut writer, _theirs) = guarded(b"");
        let reading = tokio::spawn(async move { reader.read_u8().await });
        let writing = tokio::spawn(async move { writer.write_all(&[0; 1_000]).await });
        tokio::task::yield_now().await;
        connection.close();
        assert_eq!(reading.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(writing.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert!(!connection.ended_by_peer());
    }

    #[tokio::test]
    async fn a_peer_that_hangs_up_is_told_from_us() {
        let (connection, mut reader, _writer, theirs) = guarded(b"");
        drop(theirs);
        assert!(reader.read_u8().await.is_err());
        assert!(connection.ended_by_peer());
    }
}
