//! One database of a server: its tables made ready once, its writes in line, its reads beside them.

use std::time::Duration;

use tokio::sync::{Mutex, OnceCell};
use tokio::time::{Instant, sleep, timeout_at};

use super::server::{Failed, Server};
use super::steps::{Durability, Steps};
use super::together::Together;
use super::wire::{self, Answer, Request, When};
use crate::Error;
use crate::database::Database;
use crate::engine::Missing;
use crate::schema::{Create, Migrate, Need, Version, need};
use crate::statement::{Batch, Found, Guard, Outcome, Page, Query, Rows, Statement};

/// The server forgets a stream that was not used for 10 s.
const STREAM_IDLE_MAX: Duration = Duration::from_secs(8);
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Several processes may bring one database up to date: each finds the other's work done.
const STEPS_TO_READY_MAX: usize = 64;
/// sqld shows a namespace that another replica is making a moment before it is set to flush: so it is looked at again,
/// for about a second, by those who can have made it.
const RELAXED_MAX: u32 = 8;
/// Reads of a connection that broke are repeated on another, since the first may have been cut while it was idle.
const READS_LOST_MAX: u32 = 1;

/// Which stream a write goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// After the writes that wait, in the stream that is kept.
    InLine,
    /// At once, in a stream of its own: a fence must not wait for the commits that it is to end.
    Before,
}

pub(super) struct Lane {
    database: Database,
    name: String,
    /// Its tables are there and of this version, and the server flushes.
    ready: OnceCell<()>,
    /// Who holds it writes. Without a stream the next write opens one.
    stream: Mutex<Option<Stream>>,
    together: Together,
}

/// A connection that the server keeps open to the database, for whoever names it.
pub(super) struct Stream {
    baton: String,
    used: Instant,
}

impl Stream {
    pub(super) fn new(baton: String) -> Self {
        Self { baton, used: Instant::now() }
    }

    /// Whether the server has it still.
    pub(super) fn is_fresh(&self) -> bool {
        self.used.elapsed() < STREAM_IDLE_MAX
    }
}

/// Jittered, and doubles.
struct Pause(Duration);

impl Pause {
    /// Answers whether there is time for another try.
    async fn wait(&mut self, deadline: Instant) -> bool {
        let pause = self.0.mul_f64(rand::random_range(0.5..1.5));
        self.0 = (self.0 * 2).min(PAUSE_MAX);
        if deadline <= Instant::now() + pause {
            return false;
        }
        sleep(pause).await;
        true
    }
}

impl Lane {
    pub(super) fn new(database: Database) -> Self {
        let name = database.to_string();
        let (ready, stream, together) = Default::default();
        Self { database, name, ready, stream, together }
    }

    /// The whole batch, or nothing of it.
    pub(super) async fn write<B: Batch>(
        &self,
        server: &Server,
        order: Order,
        batch: &B,
        deadline: Instant,
    ) -> Result<Outcome<B::Answer>, Error> {
        let steps = Steps::of(batch)?;
        match order {
            Order::InLine => {
                let waiting = timeout_at(deadline, self.stream.lock()).await;
                let mut stream = waiting.map_err(|_| {
                    Error::unavailable(format!("other writes of {} take too long", self.name))
                })?;
                self.write_in(server, &mut stream, true, &steps, batch, deadline).await
            }
            Order::Before => self.write_in(server, &mut None, false, &steps, batch, deadline).await,
        }
    }

    async fn write_in<B: Batch>(
        &self,
        server: &Server,
        kept: &mut Option<Stream>,
        is_kept: bool,
        steps: &Steps,
        batch: &B,
        deadline: Instant,
    ) -> Result<Outcome<B::Answer>, Error> {
        let mut pause = Pause(PAUSE_MIN);
        loop {
            // If this future is dropped on the way, nobody knows the state of the stream: it is out of its place.
            let stream = kept.take().filter(Stream::is_fresh);
            let durability = match server.parsed().is_checked && stream.is_none() {
                true => Durability::Check,
                false => Durability::Known,
            };
            let baton = stream.as_ref().map(|stream| stream.baton.as_str());
            let request = steps.request(baton, durability);
            let body = if is_kept { request.and_keep() } else { request.and_close() };
            let failed = match server.batch(self.database, body, deadline).await {
                Ok(mut answer) => {
                    let baton = answer.baton.take().filter(|_| is_kept);
                    let (outcome, is_clean) = steps.outcome(batch, &self.name, durability, answer);
                    *kept = baton.filter(|_| is_clean).map(Stream::new);
                    match outcome {
                        Ok(Outcome::Stopped(Guard::Durability)) => {
                            *kept = None;
                            return Err(server.not_durable(self.database));
                        }
                        Ok(outcome) => return Ok(outcome),
                        Err(failed) => failed,
                    }
                }
                Err(failed) => failed,
            };
            let why = match failed {
                // A stream that expired costs no time: a new one is there at once.
                Failed::Stream(_) if stream.is_some() => continue,
                Failed::Stream(why) | Failed::Busy(why) => why,
                Failed::Refused(_) | Failed::TooLarge | Failed::Lost(_) => {
                    return Err(failed.into_write_error());
                }
            };
            *kept = None;
            if !pause.wait(deadline).await {
                return Err(Error::unavailable(format!("{}: {why}", self.name)));
            }
        }
    }

    /// Everything that the query asks, of one moment; a short one together with others.
    pub(super) async fn read<Q: Query>(
        &self,
        server: &Server,
        query: &Q,
        deadline: Instant,
    ) -> Result<Q::Answer, Error> {
        let statements = query.statements()?;
        if Q::IS_SHORT {
            let of = (self.database, self.name.as_str());
            if let Some(rows) = self.together.read(server, of, &statements, deadline).await {
                return query.answer(&mut Found::new(&self.name, rows));
            }
        }
        self.read_alone(server, query, deadline).await
    }

    /// The same, in a request of its own.
    pub(super) async fn read_alone<Q: Query>(
        &self,
        server: &Server,
        query: &Q,
        deadline: Instant,
    ) -> Result<Q::Answer, Error> {
        let mut statements = query.statements()?;
        let mut pause = Pause(PAUSE_MIN);
        let mut lost = 0;
        loop {
            let body = read_request(None, &statements).and_close();
            let failed = match server.batch(self.database, body, deadline).await {
                Ok(answer) => match take(&self.name, &statements, answer) {
                    Ok(each) => return query.answer(&mut Found::new(&self.name, each)),
                    Err(failed) => failed,
                },
                Err(failed) => failed,
            };
            match failed {
                Failed::TooLarge if shrink(&mut statements) => continue,
                Failed::Lost(_) if lost < READS_LOST_MAX => lost += 1,
                Failed::Busy(_) | Failed::Stream(_) => {}
                Failed::TooLarge | Failed::Lost(_) | Failed::Refused(_) => {
                    return Err(failed.into_read_error());
                }
            }
            if !pause.wait(deadline).await {
                return Err(failed_in_time(&self.name));
            }
        }
    }

    /// Makes sure, once, that the database can be used: that it and its tables are there, of this version, and that the
    /// server flushes its commits.
    pub(super) async fn ready(
        &self,
        server: &Server,
        missing: Missing,
        deadline: Instant,
    ) -> Result<(), Error> {
        let make = self.ready.get_or_try_init(|| self.make_ready(server, missing, deadline));
        // Boxed: it is used once, and would make every other future large.
        Box::pin(make).await.map(drop)
    }

    async fn make_ready(
        &self,
        server: &Server,
        missing: Missing,
        deadline: Instant,
    ) -> Result<(), Error> {
        let (mut pause, mut relaxed) = (Pause(PAUSE_MIN), 0);
        for _ in 0..STEPS_TO_READY_MAX {
            let (found, synchronous) = match self.look(server, deadline).await {
                Err(Error::NotFound { .. }) if missing == Missing::Create => {
                    server.create(self.database, deadline).await?;
                    (None, self.synchronous(server, deadline).await?)
                }
                found => found?,
            };
            if synchronous != FLUSHES_COMMITS {
                relaxed += 1;
                let may_change = server.parsed().admin.is_some() && relaxed < RELAXED_MAX;
                if may_change && pause.wait(deadline).await {
                    continue;
                }
                return Err(server.not_durable(self.database));
            }
            let done = match need(self.database, found, missing)? {
                Need::Nothing => return Ok(()),
                Need::Create => {
                    let create = Create { database: self.database };
                    self.write(server, Order::Before, &create, deadline).await.map(drop)
                }
                Need::Migrate(from) => {
                    let migrate = Migrate { database: self.database, from };
                    self.write(server, Order::Before, &migrate, deadline).await.map(drop)
                }
            };
            match done {
                Ok(()) => {
                    tracing::info!(database = self.name, ?found, "brought the schema up to date")
                }
                // Somebody else was faster, or the answer was lost: look again.
                Err(Error::Unknown { .. }) => {}
                Err(Error::Internal { detail, .. }) if detail.contains("already exists") => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::unavailable(format!("{} is being changed by others", self.name)))
    }

    /// The version of its tables, none without tables, and how the server flushes it. One request where there are tables:
    /// a new owner waits for it.
    async fn look(&self, server: &Server, deadline: Instant) -> Result<(Option<u32>, u64), Error> {
        let found = match server.parsed().is_checked {
            true => self.read_alone(server, &Look, deadline).await,
            false => {
                let version = self.read_alone(server, &Version, deadline).await;
                version.map(|version| (version, FLUSHES_COMMITS))
            }
        };
        match found {
            Err(Error::Internal { detail, .. }) if detail.contains("no such table") => {
                Ok((None, self.synchronous(server, deadline).await?))
            }
            found => found.map(|(version, synchronous)| (Some(version), synchronous)),
        }
    }

    /// How the server flushes it. One that is trusted is not asked: it may not answer that.
    async fn synchronous(&self, server: &Server, deadline: Instant) -> Result<u64, Error> {
        match server.parsed().is_checked {
            true => self.read_alone(server, &Synchronous, deadline).await,
            false => Ok(FLUSHES_COMMITS),
        }
    }
}

fn failed_in_time(name: &str) -> Error {
    Error::unavailable(format!("{name} could not be read in time"))
}

/// The statements in one transaction, if they are several.
pub(super) fn read_request(stream: Option<&Stream>, statements: &[Statement]) -> Request {
    let texts: Vec<_> =
        statements.iter().map(|one| wire::statement(one.sql, &one.params, true)).collect();
    let bytes: usize = texts.iter().map(String::len).sum();
    let baton = stream.map(|stream| stream.baton.as_str());
    let mut request = Request::new(baton, bytes + 512);
    if let [one] = texts.as_slice() {
        request.step(one, When::Always);
        return request;
    }
    let bare = |sql| wire::statement(sql, &[], false);
    let mut last = request.step(&bare("BEGIN"), When::Always);
    for text in &texts {
        last = request.step(text, When::Ok(last));
    }
    request.step(&bare("COMMIT"), When::InTransaction);
    request
}

/// The rows of the statements, pages cut to their bytes.
pub(super) fn take(
    name: &str,
    statements: &[Statement],
    answer: Answer,
) -> Result<Vec<Rows>, Failed> {
    let first = if statements.len() == 1 { 0 } else { 1 };
    let mut each = Vec::with_capacity(statements.len());
    let mut steps = answer.steps.into_iter();
    for step in steps.by_ref().take(first) {
        if let Some(Err(problem)) = step {
            return Err(Failed::of(name, &problem));
        }
    }
    for (statement, step) in statements.iter().zip(steps) {
        match step {
            Some(Ok(mut rows)) => {
                if let Some(page) = statement.page {
                    cut(&mut rows, page);
                }
                each.push(rows);
            }
            Some(Err(problem)) => return Err(Failed::of(name, &problem)),
            None => return Err(Failed::Lost("a statement did not run".to_owned())),
        }
    }
    match each.len() == statements.len() {
        true => Ok(each),
        false => Err(Failed::Lost("the answer has another length".to_owned())),
    }
}

/// Leaves of the rows what the page holds.
fn cut(rows: &mut Rows, page: Page) {
    let (mut count, mut bytes) = (0, 0);
    for row in &rows.rows {
        (count, bytes) = (count + 1, bytes + row.bytes());
        if page.is_filled_by(count, bytes) {
            rows.is_full = true;
            break;
        }
    }
    rows.rows.truncate(count);
}

/// Asks for fewer rows. Answers whether that was possible.
fn shrink(statements: &mut [Statement]) -> bool {
    let mut is_smaller = false;
    for statement in statements {
        if let Some(page) = statement.page.filter(|page| 1 < page.rows) {
            *statement = statement.with_rows((page.rows / 4).max(1));
            is_smaller = true;
        }
    }
    is_smaller
}

/// How the server flushes this database.
struct Synchronous;

/// What [`Synchronous`] answers where every commit is flushed.
const FLUSHES_COMMITS: u64 = 2;

impl Query for Synchronous {
    type Answer = u64;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        Ok(vec![Statement::new("PRAGMA synchronous", Vec::new())])
    }

    fn answer(&self, found: &mut Found) -> Result<u64, Error> {
        found.number()
    }
}

/// The version of a database that has tables, and how the server flushes it.
struct Look;

impl Query for Look {
    type Answer = (u32, u64);

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let mut statements = Version.statements()?;
        statements.extend(Synchronous.statements()?);
        Ok(statements)
    }

    fn answer(&self, found: &mut Found) -> Result<(u32, u64), Error> {
        Ok((Version.answer(found)?, Synchronous.answer(found)?))
    }
}
