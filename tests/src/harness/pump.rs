//! Both directions of one connection through the proxy.
//!
//! Bounded: what is held back stops the reading, and with it the sender.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::fault::{Door, Fault, Flow};
use super::proxy::State;

/// Of one direction of one connection, read and not yet forwarded, bytes.
const HELD_MAX: usize = 1 << 20;
const CHUNK: usize = 16 << 10;

/// Carries both directions until both have ended, or one broke.
pub(super) async fn join(
    near: &mut TcpStream,
    far: &mut TcpStream,
    mut state: watch::Receiver<State>,
) -> Door {
    _ = near.set_nodelay(true);
    let (near_read, near_write) = near.split();
    let (far_read, far_write) = far.split();
    let up = Pump::new(near_read, far_write, state.clone(), |fault| fault.up);
    let down = Pump::new(far_read, near_write, state.clone(), |fault| fault.down);
    if tokio::try_join!(up.run(), down.run()).is_ok() {
        return Door::Shut;
    }
    // That it broke is news, too.
    _ = state.wait_for(|state| !state.fault.is_silent()).await;
    Door::Reset
}

/// One direction of one connection.
struct Pump<'a> {
    from: ReadHalf<'a>,
    to: WriteHalf<'a>,
    state: watch::Receiver<State>,
    flow: fn(Fault) -> Flow,
    /// What was read, and when it is due.
    held: VecDeque<(Instant, Vec<u8>)>,
    held_bytes: usize,
    /// How reading ended.
    over: Option<io::Result<()>>,
    pause_until: Instant,
}

impl<'a> Pump<'a> {
    fn new(
        from: ReadHalf<'a>,
        to: WriteHalf<'a>,
        state: watch::Receiver<State>,
        flow: fn(Fault) -> Flow,
    ) -> Self {
        let (held, pause_until) = (VecDeque::new(), Instant::now());
        Self { from, to, state, flow, held, held_bytes: 0, over: None, pause_until }
    }

    async fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let flow = (self.flow)(self.state.borrow_and_update().fault);
            if self.held.is_empty() && flow != Flow::Silent && self.over.is_some() {
                self.over.take().expect("was just looked at")?;
                return self.to.shutdown().await;
            }
            let may_read = self.over.is_none() && self.held_bytes < HELD_MAX;
            let forward = forward(&mut self.to, self.held.front(), self.pause_until, flow);
            tokio::select! {
                read = self.from.read(&mut buffer), if may_read => match read {
                    Ok(0) => self.over = Some(Ok(())),
                    Ok(length) => self.hold(buffer[..length].to_vec(), flow),
                    Err(error) => self.over = Some(Err(error)),
                },
                written = forward => self.forwarded(written?, flow),
                changed = self.state.changed() => changed.map_err(io::Error::other)?,
            }
        }
    }

    fn hold(&mut self, bytes: Vec<u8>, flow: Flow) {
        let delay = match flow {
            Flow::Late { by, jitter } => by + jitter.mul_f64(rand::random::<f64>()),
            Flow::Pass | Flow::Silent | Flow::Slices { .. } => Duration::ZERO,
        };
        let last = self.held.back().map(|(due, _)| *due);
        let due = (Instant::now() + delay).max(last.unwrap_or_else(Instant::now));
        self.held_bytes += bytes.len();
        self.held.push_back((due, bytes));
    }

    fn forwarded(&mut self, length: usize, flow: Flow) {
        self.held_bytes -= length;
        if let Flow::Slices { pause, .. } = flow {
            self.pause_until = Instant::now() + pause;
        }
        let (_, bytes) = self.held.front_mut().expect("it was forwarded");
        bytes.drain(..length);
        if bytes.is_empty() {
            self.held.pop_front();
        }
    }
}

/// Writes what is due. Loses nothing when it is dropped.
async fn forward(
    to: &mut WriteHalf<'_>,
    first: Option<&(Instant, Vec<u8>)>,
    pause_until: Instant,
    flow: Flow,
) -> io::Result<usize> {
    let (Some((due, bytes)), true) = (first, flow != Flow::Silent) else {
        return std::future::pending().await;
    };
    let most = match flow {
        Flow::Slices { bytes: most, .. } => bytes.len().min(most.max(1)),
        Flow::Pass | Flow::Late { .. } | Flow::Silent => bytes.len(),
    };
    sleep_until(pause_until.max(*due)).await;
    to.write(&bytes[..most]).await
}
