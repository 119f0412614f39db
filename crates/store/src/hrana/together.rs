//! Reads of one database that come while another is under way go together, in one request, in a stream that the server
//! keeps open. A request of its own costs the server a new connection to the database, which is dearer than most reads.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Mutex as Turn, OwnedSemaphorePermit, oneshot};
use tokio::time::{Instant, timeout_at};

use super::lane::{Stream, read_request, take};
use super::server::{Failed, Server};
use crate::database::Database;
use crate::statement::{Rows, Statement};

/// Reads in one request.
const TOGETHER_MAX: usize = 64;
/// Reads that wait; those beyond go by themselves.
const WAITING_MAX: usize = 4_096;
/// A request that takes longer may have lost its connection: then everybody who waits goes by himself.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(super) struct Together {
    waiting: Mutex<VecDeque<Waiting>>,
    /// Whose turn it is reads for everybody who waits.
    stream: Turn<Option<Kept>>,
}

/// A stream that is kept, with the right to keep one: each costs the server a connection, of which it has few.
struct Kept {
    stream: Stream,
    permit: OwnedSemaphorePermit,
}

struct Waiting {
    statements: Vec<Statement>,
    rows: oneshot::Sender<Vec<Rows>>,
}

impl Together {
    /// What the statements find, all of one moment. None: they have to be asked for by themselves.
    pub(super) async fn read(
        &self,
        server: &Server,
        (database, name): (Database, &str),
        statements: &[Statement],
        deadline: Instant,
    ) -> Option<Vec<Rows>> {
        let mut receiver = self.wait(statements)?;
        loop {
            let mut stream = tokio::select! {
                biased;
                rows = &mut receiver => return rows.ok(),
                stream = timeout_at(deadline, self.stream.lock()) => stream.ok()?,
            };
            // Somebody may have read it before the turn came.
            match receiver.try_recv() {
                Ok(rows) => return Some(rows),
                Err(TryRecvError::Closed) => return None,
                Err(TryRecvError::Empty) => {}
            }
            let patience = deadline.min(Instant::now() + PATIENCE);
            self.answer(server, (database, name), &mut stream, patience).await;
        }
    }

    fn wait(&self, statements: &[Statement]) -> Option<oneshot::Receiver<Vec<Rows>>> {
        let (rows, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if WAITING_MAX <= waiting.len() {
            return None;
        }
        waiting.push_back(Waiting { statements: statements.to_vec(), rows });
        Some(receiver)
    }

    fn next(&self) -> Vec<Waiting> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let count = waiting.len().min(TOGETHER_MAX);
        let next = waiting.drain(..count);
        // Who has given up is not read for.
        next.filter(|one| !one.rows.is_closed()).collect()
    }

    /// Nobody waits for a server that does not answer: each asks by himself.
    fn give_up(&self) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Reads for those who have waited longest. Who gets no answer hears that, too.
    async fn answer(
        &self,
        server: &Server,
        (database, name): (Database, &str),
        kept: &mut Option<Kept>,
        deadline: Instant,
    ) {
        let some = self.next();
        let statements: Vec<Statement> =
            some.iter().flat_map(|one| one.statements.iter().cloned()).collect();
        loop {
            // Out of its place: if this future is dropped on the way, nobody knows the state of the stream.
            let (stream, permit) = match kept.take() {
                Some(Kept { stream, permit }) => (Some(stream), Some(permit)),
                None => (None, server.read_streams().try_acquire_owned().ok()),
            };
            let stream = stream.filter(Stream::is_fresh);
            let request = read_request(stream.as_ref(), &statements);
            let body = if permit.is_some() { request.and_keep() } else { request.and_close() };
            let mut answer = match server.batch(database, body, deadline).await {
                Ok(answer) => answer,
                // It expired: a new one is there at once.
                Err(Failed::Stream(_)) if stream.is_some() => continue,
                Err(_) => return self.give_up(),
            };
            let baton = answer.baton.take();
            let Ok(rows) = take(name, &statements, answer) else { return };
            *kept = baton
                .zip(permit)
                .map(|(baton, permit)| Kept { stream: Stream::new(baton), permit });
            let mut rows = rows.into_iter();
            for one in some {
                let its = rows.by_ref().take(one.statements.len()).collect();
                // Whoever has given up does not want it.
                _ = one.rows.send(its);
            }
            return;
        }
    }
}
