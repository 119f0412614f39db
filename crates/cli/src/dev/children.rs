//! The processes of a cluster on this machine, as our children.
//!
//! A child ends when its standard input closes, which the system sees to even if we are killed: none is left behind.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use crate::exit::Failure;

/// How to start one.
#[derive(Clone, Debug)]
pub(crate) struct Start {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Where its standard error goes.
    pub(crate) log: PathBuf,
}

/// One that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) name: String,
    pub(crate) pid: u32,
    pub(crate) status: Option<ExitStatus>,
}

#[derive(Debug)]
struct Running {
    pid: u32,
    /// Dropped, it tells the child to end.
    stdin: Option<ChildStdin>,
    kill: oneshot::Sender<()>,
}

#[derive(Debug, Default)]
pub(crate) struct Children {
    running: BTreeMap<String, Running>,
    /// One task a child, which ends with it.
    ends: JoinSet<Ended>,
}

impl Children {
    pub(crate) fn start(&mut self, start: &Start) -> Result<u32, Failure> {
        let failed = |error| Failure::other(format!("cannot start {}", start.name)).why(error);
        let mut child = Command::new(&start.program)
            .args(&start.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(open_log(&start.log).map_err(failed)?)
            // A Ctrl-C in the terminal is for us: we end them in their order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let pid = child.id().expect("it was not waited for yet");
        let (kill, killed) = oneshot::channel();
        let running = Running { pid, stdin: child.stdin.take(), kill };
        self.running.insert(start.name.clone(), running);
        self.ends.spawn(wait(start.name.clone(), pid, child, killed));
        Ok(pid)
    }

    pub(crate) fn pid(&self, name: &str) -> Option<u32> {
        self.running.get(name).map(|running| running.pid)
    }

    /// The next one that ends. Waits for ever if none runs. Loses nothing when it is dropped.
    pub(crate) async fn next_end(&mut self) -> Ended {
        loop {
            match self.ends.join_next().await {
                Some(Ok(ended)) => {
                    self.running.remove(&ended.name);
                    return ended;
                }
                Some(Err(error)) => tracing::error!(%error, "lost sight of a child"),
                None => std::future::pending().await,
            }
        }
    }

    /// Tells these to end and waits until they have, or the time is over.
    pub(crate) async fn end(&mut self, which: impl Fn(&str) -> bool, deadline: Instant) {
        for (_, running) in self.running.iter_mut().filter(|(name, _)| which(name)) {
            running.stdin = None;
        }
        while self.running.keys().any(|name| which(name)) {
            if timeout_at(deadline, self.next_end()).await.is_err() {
                return;
            }
        }
    }

    /// Kills what still runs. Returns the names.
    pub(crate) async fn kill(&mut self) -> Vec<String> {
        let running = std::mem::take(&mut self.running);
        let names = running.keys().cloned().collect();
        for (_, running) in running {
            // One that ends at this moment needs no killing.
            _ = running.kill.send(());
        }
        while self.ends.join_next().await.is_some() {}
        names
    }
}

async fn wait(name: String, pid: u32, mut child: Child, killed: oneshot::Receiver<()>) -> Ended {
    let status = tokio::select! {
        status = child.wait() => status,
        Ok(()) = killed => {
            // It may have ended by itself just now.
            _ = child.start_kill();
            child.wait().await
        }
    };
    Ended { name, pid, status: status.ok() }
}

fn open_log(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn shell(dir: &Path, name: &str, script: &str) -> Start {
        Start {
            name: name.to_owned(),
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            log: dir.join(format!("{name}.log")),
        }
    }

    #[tokio::test]
    async fn a_child_ends_when_its_input_closes() {
        let dir = tempfile::tempdir().unwrap();
        let mut children = Children::default();
        children.start(&shell(dir.path(), "one", "read line; exit 0")).unwrap();
        children.start(&shell(dir.path(), "two", "read line; exit 0")).unwrap();
        children.end(|name| name == "one", Instant::now() + PATIENCE).await;
        assert!(children.pid("one").is_none() && children.pid("two").is_some());
        children.end(|_| true, Instant::now() + PATIENCE).await;
        assert!(children.kill().await.is_empty());
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let mut children = Children::default();
        children.start(&shell(dir.path(), "deaf", "exec sleep 1000")).unwrap();
        children.end(|_| true, Instant::now() + Duration::from_millis(50)).await;
        assert_eq!(children.kill().await, ["deaf"]);
    }

    #[tokio::test]
    async fn one_that_dies_is_named_with_pid_and_status() {
        let dir = tempfile::tempdir().unwrap();
        let mut children = Children::default();
        let pid = children.start(&shell(dir.path(), "one", "echo why >&2; exit 7")).unwrap();
        let ended = children.next_end().await;
        assert_eq!((ended.name.as_str(), ended.pid), ("one", pid));
        assert_eq!(ended.status.unwrap().code(), Some(7));
        assert_eq!(std::fs::read_to_string(dir.path().join("one.log")).unwrap(), "why\n");
    }
}
