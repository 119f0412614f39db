//! A tool whose every call leaves a line in a file: it stands for whatever must not happen twice.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;

use crate::{Call, CountConfig, Error, Output, Reconciled, Tool};

const NAME: &str = "count";

/// Answers how many lines the file has, its own included.
#[derive(Clone, Debug)]
pub struct Count {
    config: CountConfig,
}

impl Count {
    pub fn new(config: CountConfig) -> Self {
        Self { config }
    }

    async fn count(&self, call: &Call) -> Result<Output, Error> {
        tokio::time::sleep(Duration::from_millis(self.config.delay_before_ms)).await;
        let path = self.config.file.clone();
        let line = line(call);
        let added = tokio::task::spawn_blocking(move || add(&path, &line)).await;
        let broke = |reason: String| Error::Broke { tool: NAME.to_owned(), reason };
        let lines = added
            .map_err(|error| broke(error.to_string()))?
            .map_err(|error| broke(format!("{}: {error}", self.config.file.display())))?;
        tokio::time::sleep(Duration::from_millis(self.config.delay_ms)).await;
        Ok(Output(lines.to_string()))
    }

    async fn look(&self, call: &Call) -> Result<Reconciled, Error> {
        if !self.config.reconcile {
            return Ok(Reconciled::Unknown);
        }
        let (path, key) = (self.config.file.clone(), call.idempotency_key.clone());
        let found = tokio::task::spawn_blocking(move || find(&path, &key)).await;
        match found {
            Ok(Ok(Some(line))) => Ok(Reconciled::Done(Output(line.to_string()))),
            Ok(Ok(None)) => Ok(Reconciled::NotDone),
            Ok(Err(error)) => {
                Err(Error::Unavailable { tool: NAME.to_owned(), reason: error.to_string() })
            }
            Err(error) => {
                Err(Error::Unavailable { tool: NAME.to_owned(), reason: error.to_string() })
            }
        }
    }
}

impl Tool for Count {
    fn name(&self) -> &str {
        NAME
    }

    fn is_idempotent(&self) -> bool {
        false
    }

    fn call<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Output, Error>> {
        Box::pin(self.count(call))
    }

    fn reconcile<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Reconciled, Error>> {
        Box::pin(self.look(call))
    }
}

/// Key, epoch, attempt, and milliseconds since the Unix epoch.
fn line(call: &Call) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    format!("{} {} {} {now}\n", call.idempotency_key, call.epoch, call.attempt)
}

/// Adds a line, durably, and counts the lines. One write with O_APPEND is never mixed with another process's.
fn add(path: &Path, line: &str) -> io::Result<usize> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(line.as_bytes())?;
    file.sync_all()?;
    Ok(fs::read_to_string(path)?.lines().count())
}

/// The number of the first line of a key.
fn find(path: &Path, key: &str) -> io::Result<Option<usize>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read?,
    };
    let is_of_key = |line: &str| line.split(' ').next() == Some(key);
    Ok(text.lines().position(is_of_key).map(|index| index + 1))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use domain::Epoch;

    fn tool(folder: &tempfile::TempDir, reconcile: bool) -> Count {
        let file = folder.path().join("calls");
        Count::new(CountConfig { file, reconcile, delay_ms: 0, delay_before_ms: 0 })
    }

    fn call(key: &str) -> Call {
        Call {
            idempotency_key: key.to_owned(),
            epoch: Epoch(3),
            attempt: 2,
            arguments: serde_json::Value::Null,
            deadline: Instant::now() + Duration::from_secs(5),
        }
    }

    #[tokio::test]
    async fn every_call_leaves_a_line_with_its_key_and_attempt() {
        let folder = tempfile::tempdir().unwrap();
        let tool = tool(&folder, false);
        assert_eq!(tool.call(&call("a")).await.unwrap(), Output("1".into()));
        assert_eq!(tool.call(&call("b")).await.unwrap(), Output("2".into()));
        let text = fs::read_to_string(folder.path().join("calls")).unwrap();
        let lines: Vec<_> = text.lines().map(|line| line.rsplit_once(' ').unwrap().0).collect();
        assert_eq!(lines, ["a 3 2", "b 3 2"]);
    }

    #[tokio::test]
    async fn it_knows_what_was_done_only_if_it_may_look() {
        let folder = tempfile::tempdir().unwrap();
        let (looks, blind) = (tool(&folder, true), tool(&folder, false));
        assert_eq!(looks.reconcile(&call("a")).await.unwrap(), Reconciled::NotDone);
        looks.call(&call("a")).await.unwrap();
        assert_eq!(
            looks.reconcile(&call("a")).await.unwrap(),
            Reconciled::Done(Output("1".into()))
        );
        assert_eq!(blind.reconcile(&call("a")).await.unwrap(), Reconciled::Unknown);
    }
}
