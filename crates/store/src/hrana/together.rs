//! Reads of one database that come while another is under way go together, in one request, in a stream that the server
//! keeps open. A request of its own costs the server a new connection to the database, which is dearer than most reads.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Mutex as Turn, oneshot};
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
const READ_STREAMS_MAX: usize = 8;
/// The server has closed a stream that was not used for so long.
const STREAM_FORGOTTEN: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Together {
    waiting: Mutex<VecDeque<Waiting>>,
    /// Whose turn it is reads for everybody who waits.
    stream: Turn<Option<Stream>>,
}

/// Which databases have a stream open for reads. Each is one of the connections that sqld takes, 128 from all processes
/// together, and a fence must find room for one.
#[derive(Default)]
pub(super) struct ReadStreams(Mutex<HashMap<Database, Instant>>);

impl ReadStreams {
    /// Whether `database` may keep one: if it has one still, or few others have.
    fn may_keep(&self, database: Database, now: Instant) -> bool {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        used.retain(|_, at| now < *at + STREAM_FORGOTTEN);
        let may = used.len() < READ_STREAMS_MAX || used.contains_key(&database);
        if may {
            used.insert(database, now);
        }
        may
    }
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
        kept: &mut Option<Stream>,
        deadline: Instant,
    ) {
        let some = self.next();
        let statements: Vec<Statement> =
            some.iter().flat_map(|one| one.statements.iter().cloned()).collect();
        loop {
            // Out of its place: if this future is dropped on the way, nobody knows the state of the stream.
            let stream = kept.take().filter(Stream::is_fresh);
            let request = read_request(stream.as_ref(), &statements);
            let body = match server.read_streams().may_keep(database, Instant::now()) {
                true => request.and_keep(),
                false => request.and_close(),
            };
            let mut answer = match server.batch(database, body, deadline).await {
                Ok(answer) => answer,
                // It expired: a new one is there at once.
                Err(Failed::Stream(_)) if stream.is_some() => continue,
                Err(_) => return self.give_up(),
            };
            let baton = answer.baton.take();
            let Ok(rows) = take(name, &statements, answer) else { return };
            *kept = baton.map(Stream::new);
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

#[cfg(test)]
mod tests {
    use domain::ShardId;

    use super::*;

    #[test]
    fn few_databases_keep_a_stream_and_one_that_is_quiet_makes_room() {
        let (streams, begin) = (ReadStreams::default(), Instant::now());
        let shard = |number: usize| Database::Shard(ShardId(u32::try_from(number).unwrap()));
        for number in 0..READ_STREAMS_MAX {
            assert!(streams.may_keep(shard(number), begin));
        }
        let later = begin + Duration::from_secs(5);
        assert!(!streams.may_keep(shard(99), later));
        assert!(streams.may_keep(shard(0), later));
        let quiet = begin + STREAM_FORGOTTEN;
        assert!(streams.may_keep(shard(99), quiet));
        assert_eq!(streams.0.lock().unwrap().len(), 2, "the one in use, and the new one");
    }
}
