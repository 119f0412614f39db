//! A tool whose every call leaves a line in a file: it stands for whatever must not happen twice.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;

use crate::ledger::{self, Mark};
use crate::{Call, CountConfig, Error, Output, Reconciled, Tool};

const NAME: &str = "count";

/// Answers how many calls counted so far, its own included.
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
        let (path, made) = (self.config.file.clone(), call.clone());
        let added = tokio::task::spawn_blocking(move || make(&path, &made)).await;
        let broke = |reason: String| Error::Broke { tool: NAME.to_owned(), reason };
        let number = added
            .map_err(|error| broke(error.to_string()))?
            .map_err(|error| broke(format!("{}: {error}", self.config.file.display())))?;
        let Some(number) = number else {
            let reason = "a later attempt is known, or this one was said not to be made".to_owned();
            return Err(Error::Refused { tool: NAME.to_owned(), reason });
        };
        tokio::time::sleep(Duration::from_millis(self.config.delay_ms)).await;
        Ok(Output(number.to_string()))
    }

    async fn look(&self, call: &Call) -> Result<Reconciled, Error> {
        if !self.config.reconcile {
            return Ok(Reconciled::Unknown);
        }
        let (path, probe) = (self.config.file.clone(), call.clone());
        let found = tokio::task::spawn_blocking(move || find(&path, &probe)).await;
        let unavailable = |reason| Error::Unavailable { tool: NAME.to_owned(), reason };
        let found = found
            .map_err(|error| unavailable(error.to_string()))?
            .map_err(|error| unavailable(error.to_string()))?;
        Ok(found.map_or(Reconciled::NotDone, |number| Reconciled::Done(Output(number.to_string()))))
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

/// Makes a call: its number, or nothing if it does not count.
fn make(path: &Path, call: &Call) -> io::Result<Option<usize>> {
    ledger::add(path, call, Mark::Call, now_ms())?;
    ledger::number(path, call)
}

/// The number of the call of this key. If there is none, there will be none of this attempt.
fn find(path: &Path, call: &Call) -> io::Result<Option<usize>> {
    let key = &call.idempotency_key;
    if let Some(number) = ledger::number_of_key(path, key)? {
        return Ok(Some(number));
    }
    ledger::add(path, call, Mark::Fence, now_ms())?;
    // It may have come in between.
    ledger::number_of_key(path, key)
}

fn now_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
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

    fn call(key: &str, attempt: u32) -> Call {
        Call {
            idempotency_key: key.to_owned(),
            epoch: Epoch(3),
            attempt,
            arguments: serde_json::Value::Null,
            deadline: Instant::now() + Duration::from_secs(5),
        }
    }

    #[tokio::test]
    async fn every_call_leaves_a_line_with_its_key_and_attempt() {
        let folder = tempfile::tempdir().unwrap();
        let tool = tool(&folder, false);
        assert_eq!(tool.call(&call("a", 2)).await.unwrap(), Output("1".into()));
        assert_eq!(tool.call(&call("b", 1)).await.unwrap(), Output("2".into()));
        let text = std::fs::read_to_string(folder.path().join("calls")).unwrap();
        let calls = ledger::calls(&text);
        let calls: Vec<_> = calls.iter().map(|it| (&*it.key, it.epoch, it.attempt)).collect();
        assert_eq!(calls, [("a", 3, 2), ("b", 3, 1)]);
    }

    #[tokio::test]
    async fn it_knows_what_was_done_only_if_it_may_look() {
        let folder = tempfile::tempdir().unwrap();
        let (looks, blind) = (tool(&folder, true), tool(&folder, false));
        looks.call(&call("a", 1)).await.unwrap();
        let done = Reconciled::Done(Output("1".into()));
        assert_eq!(looks.reconcile(&call("a", 1)).await.unwrap(), done);
        assert_eq!(blind.reconcile(&call("a", 1)).await.unwrap(), Reconciled::Unknown);
    }

    #[tokio::test]
    async fn what_a_full_disk_left_of_a_line_swallows_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let tool = tool(&folder, true);
        std::fs::write(folder.path().join("calls"), "a 3 1 17").unwrap();
        assert_eq!(tool.reconcile(&call("a", 1)).await.unwrap(), Reconciled::NotDone);
        assert!(tool.call(&call("a", 1)).await.is_err());
        assert_eq!(tool.call(&call("b", 1)).await.unwrap(), Output("1".into()));
    }

    #[tokio::test]
    async fn what_it_said_was_not_done_is_refused_when_it_comes_late() {
        let folder = tempfile::tempdir().unwrap();
        let tool = tool(&folder, true);
        assert_eq!(tool.reconcile(&call("a", 1)).await.unwrap(), Reconciled::NotDone);
        let late = tool.call(&call("a", 1)).await;
        assert!(matches!(late, Err(Error::Refused { .. })), "{late:?}");
        assert_eq!(tool.call(&call("a", 2)).await.unwrap(), Output("1".into()));
    }
}
