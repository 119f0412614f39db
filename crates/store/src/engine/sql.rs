//! One connection to one database file, with its prepared statements.
//!
//! Every call blocks until SQLite is done, so it is only used on the threads of the engine.

use std::collections::HashMap;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use libsql::params::Params;
use libsql::{Builder, Connection, OpenFlags, Statement};

use crate::Error;
use crate::statement::{
    Batch, Found, Guard, Outcome, Page, Query, Row, Rows, Sink, Stop, Value, value_bytes,
};

/// Only this process opens the file; a lock held longer than this is a bug, not contention.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How a connection uses the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    ReadWrite,
    ReadOnly,
}

pub(crate) struct Sql {
    /// Before the connection: statements hold on to it.
    statements: HashMap<&'static str, Statement>,
    connection: Connection,
    name: String,
}

/// The local calls of libsql do their work when first polled and are ready then.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        std::thread::yield_now();
    }
}

impl Sql {
    pub(crate) fn open(path: &Path, name: &str, access: Access) -> Result<Self, Error> {
        let flags = match access {
            Access::ReadWrite => OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE,
            Access::ReadOnly => OpenFlags::SQLITE_OPEN_READ_ONLY,
        };
        let failed = |error| Error::of_sqlite(name, error);
        let database = now(Builder::new_local(path).flags(flags).build()).map_err(failed)?;
        let connection = database.connect().map_err(failed)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
        Ok(Self { statements: HashMap::new(), connection, name: name.to_owned() })
    }

    /// The database, for errors.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn failed(&self, error: libsql::Error) -> Error {
        Error::of_sqlite(&self.name, error)
    }

    /// Runs statements without parameters that are not worth keeping.
    pub(crate) fn batch(&self, sql: &str) -> Result<(), Error> {
        now(self.connection.execute_batch(sql)).map(drop).map_err(|error| self.failed(error))
    }

    /// The statement, prepared at its first use.
    fn prepared(&mut self, sql: &'static str) -> Result<&Statement, libsql::Error> {
        if !self.statements.contains_key(sql) {
            let statement = now(self.connection.prepare(sql))?;
            self.statements.insert(sql, statement);
        }
        Ok(&self.statements[sql])
    }

    /// Runs a statement; returns how many rows it changed.
    fn execute(&mut self, sql: &'static str, params: Vec<Value>) -> Result<u64, libsql::Error> {
        let statement = self.prepared(sql)?;
        let done = now(statement.execute(Params::Positional(params)));
        statement.reset();
        Ok(done? as u64)
    }

    /// Runs a statement and reads its rows, of a page as many as it may have.
    fn rows(
        &mut self,
        sql: &'static str,
        params: Vec<Value>,
        page: Option<Page>,
    ) -> Result<Rows, libsql::Error> {
        let statement = self.prepared(sql)?;
        let step = || -> Result<(Vec<Row>, bool), libsql::Error> {
            let (mut found, mut bytes) = (Vec::new(), 0);
            let mut rows = now(statement.query(Params::Positional(params)))?;
            let columns = rows.column_count();
            while let Some(row) = now(rows.next())? {
                let values: Result<Vec<_>, _> =
                    (0..columns).map(|column| row.get_value(column)).collect();
                let values = values?;
                bytes += values.iter().map(value_bytes).sum::<usize>();
                found.push(Row::new(values));
                if page.is_some_and(|page| page.is_filled_by(found.len(), bytes)) {
                    return Ok((found, true));
                }
            }
            Ok((found, false))
        };
        let result = step();
        // A statement that is not reset holds its read lock, and the WAL could never be checkpointed.
        statement.reset();
        let (rows, is_full) = result?;
        Ok(Rows { rows, changed: self.connection.changes(), is_full })
    }

    /// Everything that the query asks, of one moment.
    pub(crate) fn read<Q: Query>(&mut self, query: &Q) -> Result<Q::Answer, Error> {
        let statements = query.statements()?;
        let is_one = statements.len() == 1;
        let mut each = Vec::with_capacity(statements.len());
        let run = |sql: &mut Self| {
            for statement in statements {
                each.push(sql.rows(statement.sql, statement.params, statement.page)?);
            }
            Ok(())
        };
        let done = if is_one { run(self) } else { self.snapshot(run) };
        done.map_err(|error| self.failed(error))?;
        query.answer(&mut Found::new(&self.name, each))
    }

    /// The whole batch, or nothing of it.
    pub(crate) fn write<B: Batch>(&mut self, batch: &B) -> Result<Outcome<B::Answer>, Error> {
        let mut kept = Vec::new();
        let mut stopped = None;
        let done =
            self.transaction(|sql| match batch.write(&mut Direct { sql, kept: &mut kept }) {
                Ok(()) => Ok(()),
                Err(Stop::Error(error)) => Err(error),
                Err(Stop::Guard(guard)) => {
                    stopped = Some(guard);
                    Err(Error::invalid("a guard fired"))
                }
            });
        if let Some(guard) = stopped {
            return Ok(Outcome::Stopped(guard));
        }
        done?;
        batch.answer(&mut Found::new(&self.name, kept)).map(Outcome::Done)
    }

    /// Everything that `work` does, or nothing of it.
    ///
    /// If the flush at the end fails, what is on the disk is not known: that is [`Error::Unknown`].
    fn transaction<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.execute("BEGIN IMMEDIATE", Vec::new()).map_err(|error| self.failed(error))?;
        let done = match work(self) {
            Ok(value) => match self.execute("COMMIT", Vec::new()) {
                Ok(_) => return Ok(value),
                Err(libsql::Error::SqliteFailure(code, detail)) if code & 0xff == IO_ERROR => {
                    Err(Error::unknown(format!("cannot flush {}: {detail}", self.name)))
                }
                Err(error) => Err(self.failed(error)),
            },
            Err(error) => Err(error),
        };
        if !self.connection.is_autocommit() {
            self.execute("ROLLBACK", Vec::new()).map_err(|error| self.failed(error))?;
        }
        done
    }

    /// Several reads of one moment.
    fn snapshot<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, libsql::Error>,
    ) -> Result<T, libsql::Error> {
        self.execute("BEGIN", Vec::new())?;
        let result = work(self);
        if !self.connection.is_autocommit() {
            self.execute("COMMIT", Vec::new())?;
        }
        result
    }

    /// Whether a transaction was left open: then the connection must not be used again.
    pub(crate) fn is_in_transaction(&self) -> bool {
        !self.connection.is_autocommit()
    }

    /// Makes a copy of the whole database, of one moment.
    pub(crate) fn copy_into(&mut self, path: &str) -> Result<(), Error> {
        let done = self.execute("VACUUM INTO ?1", vec![Value::Text(path.to_owned())]);
        done.map(drop).map_err(|error| self.failed(error))
    }
}

const IO_ERROR: i32 = 10;

/// Runs the statements of a write as they come.
struct Direct<'a> {
    sql: &'a mut Sql,
    kept: &'a mut Vec<Rows>,
}

impl Direct<'_> {
    fn execute(&mut self, sql: &'static str, params: Vec<Value>) -> Result<u64, Stop> {
        let done = self.sql.execute(sql, params);
        done.map_err(|error| Stop::Error(self.sql.failed(error)))
    }
}

impl Sink for Direct<'_> {
    /// Larger statements are no faster here.
    fn log_rows_max(&self) -> usize {
        16
    }

    fn run(&mut self, sql: &'static str, params: Vec<Value>) -> Result<(), Stop> {
        self.execute(sql, params).map(drop)
    }

    fn keep(&mut self, sql: &'static str, params: Vec<Value>) -> Result<(), Stop> {
        let rows = self.sql.rows(sql, params, None);
        self.kept.push(rows.map_err(|error| Stop::Error(self.sql.failed(error)))?);
        Ok(())
    }

    fn guard(&mut self, guard: Guard, sql: &'static str, params: Vec<Value>) -> Result<(), Stop> {
        match self.sql.execute(sql, params) {
            Ok(_) => Ok(()),
            Err(libsql::Error::SqliteFailure(_, text)) if guard.fired(&text) => {
                Err(Stop::Guard(guard))
            }
            Err(error) => Err(Stop::Error(self.sql.failed(error))),
        }
    }

    fn run_one(&mut self, guard: Guard, sql: &'static str, params: Vec<Value>) -> Result<(), Stop> {
        match self.execute(sql, params)? {
            1 => Ok(()),
            _ => Err(Stop::Guard(guard)),
        }
    }
}
