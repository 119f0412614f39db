use std::thread;

use tokio::sync::oneshot;

use crate::Error;

/// An OS thread with a runtime of its own. What runs there ends when this is dropped.
#[derive(Debug)]
pub(super) struct BeatThread {
    stop: Option<oneshot::Sender<()>>,
    ended: Option<oneshot::Receiver<()>>,
}

impl BeatThread {
    /// Runs the future that `work` makes, on the new thread, to its end or until this is dropped.
    pub(super) fn spawn<F: Future<Output = ()>>(
        name: &'static str,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> Result<Self, Error> {
        let failed = |error: std::io::Error| Error::Start { what: name, why: error.to_string() };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (stop, stopped) = oneshot::channel();
        let (ending, ended) = oneshot::channel();
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = work() => {}
                    _ = stopped => {}
                }
            });
            drop(runtime);
            _ = ending.send(());
        };
        thread::Builder::new().name(name.to_owned()).spawn(run).map_err(failed)?;
        Ok(Self { stop: Some(stop), ended: Some(ended) })
    }

    /// Ends it and waits until nothing of it is left.
    pub(super) async fn shutdown(mut self) {
        self.stop = None;
        if let Some(ended) = self.ended.take() {
            _ = ended.await;
        }
    }
}
