//! What tells this process to end: SIGINT, SIGTERM, and for a child the end of its standard input.

use std::io::Read;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::exit::Failure;

/// Resolves when this process has to end. Made before anything else starts, so that no signal is missed.
pub(crate) struct Shutdown {
    interrupt: Signal,
    terminate: Signal,
    input: Option<oneshot::Receiver<()>>,
}

impl Shutdown {
    /// With `guarded`, also when standard input closes: a child must not outlive its parent.
    pub(crate) fn new(guarded: bool) -> Result<Self, Failure> {
        let failed = |error| Failure::other("cannot listen for signals").why(error);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            input: guarded.then(end_of_input),
        })
    }

    pub(crate) async fn wait(&mut self) {
        let input = async {
            match &mut self.input {
                Some(end) => _ = end.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            () = input => {}
        }
    }
}

/// On a thread of its own: a read of standard input cannot be cancelled, and would hold up the end of the runtime.
fn end_of_input() -> oneshot::Receiver<()> {
    let (ended, end) = oneshot::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        let mut input = std::io::stdin().lock();
        while matches!(input.read(&mut buffer), Ok(len) if 0 < len) {}
        // The receiver is gone when the process is ending anyway.
        _ = ended.send(());
    });
    end
}
