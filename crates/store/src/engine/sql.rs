//! One connection to one database file, with its prepared statements.
//!
//! Every call blocks until SQLite is done, so it is only used on the threads of the engine.

use std::collections::HashMap;
use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use libsql::params::Params;
use libsql::{Builder, Connection, OpenFlags, Row, Statement, Value};

use crate::Error;

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

    /// Runs a statement that answers no rows; returns how many rows it changed.
    pub(crate) fn execute(&mut self, sql: &'static str, params: Vec<Value>) -> Result<u64, Error> {
        self.try_execute(sql, params).map_err(|error| self.failed(error))
    }

    /// The same, with SQLite's own error: a guard is told by the name in it.
    pub(crate) fn try_execute(
        &mut self,
        sql: &'static str,
        params: Vec<Value>,
    ) -> Result<u64, libsql::Error> {
        let statement = self.prepared(sql)?;
        let done = now(statement.execute(Params::Positional(params)));
        statement.reset();
        Ok(done? as u64)
    }

    /// Runs one statement for each of `rows`.
    pub(crate) fn execute_each(
        &mut self,
        sql: &'static str,
        rows: impl Iterator<Item = Result<Vec<Value>, Error>>,
    ) -> Result<(), Error> {
        let name = self.name.clone();
        let statement = self.prepared(sql).map_err(|error| Error::of_sqlite(&name, error))?;
        for row in rows {
            let done = now(statement.execute(Params::Positional(row?)));
            statement.reset();
            done.map_err(|error| Error::of_sqlite(&name, error))?;
        }
        Ok(())
    }

    /// Reads rows until there are no more, or until `read` answers that it has enough.
    pub(crate) fn each(
        &mut self,
        sql: &'static str,
        params: Vec<Value>,
        mut read: impl FnMut(&Row) -> Result<More, libsql::Error>,
    ) -> Result<(), Error> {
        let name = self.name.clone();
        let run = || {
            let statement = self.prepared(sql)?;
            let step = || {
                let mut rows = now(statement.query(Params::Positional(params)))?;
                while let Some(row) = now(rows.next())? {
                    if read(&row)? == More::No {
                        break;
                    }
                }
                Ok(())
            };
            let result = step();
            // A statement that is not reset holds its read lock, and the WAL could never be checkpointed.
            statement.reset();
            result
        };
        run().map_err(|error| Error::of_sqlite(&name, error))
    }

    pub(crate) fn rows<T>(
        &mut self,
        sql: &'static str,
        params: Vec<Value>,
        read: impl Fn(&Row) -> Result<T, libsql::Error>,
    ) -> Result<Vec<T>, Error> {
        let mut rows = Vec::new();
        self.each(sql, params, |row| {
            rows.push(read(row)?);
            Ok(More::Yes)
        })?;
        Ok(rows)
    }

    pub(crate) fn row<T>(
        &mut self,
        sql: &'static str,
        params: Vec<Value>,
        read: impl Fn(&Row) -> Result<T, libsql::Error>,
    ) -> Result<Option<T>, Error> {
        let mut found = None;
        self.each(sql, params, |row| {
            found = Some(read(row)?);
            Ok(More::No)
        })?;
        Ok(found)
    }

    /// The first column of the only row, a number.
    pub(crate) fn number(&mut self, sql: &'static str, params: Vec<Value>) -> Result<u64, Error> {
        Ok(self.row(sql, params, |row| u64_at(row, 0))?.unwrap_or(0))
    }

    /// Everything that `work` does, or nothing of it.
    ///
    /// If the flush at the end fails, what is on the disk is not known: that is [`Error::Unknown`].
    pub(crate) fn transaction<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.execute("BEGIN IMMEDIATE", Vec::new())?;
        let done = match work(self) {
            Ok(value) => match self.try_execute("COMMIT", Vec::new()) {
                Ok(_) => return Ok(value),
                Err(libsql::Error::SqliteFailure(code, detail)) if code & 0xff == IO_ERROR => {
                    Err(Error::unknown(format!("cannot flush {}: {detail}", self.name)))
                }
                Err(error) => Err(self.failed(error)),
            },
            Err(error) => Err(error),
        };
        if !self.connection.is_autocommit() {
            self.execute("ROLLBACK", Vec::new())?;
        }
        done
    }

    /// Several reads of one moment.
    pub(crate) fn snapshot<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
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
        self.execute("VACUUM INTO ?1", vec![Value::Text(path.to_owned())]).map(drop)
    }
}

const IO_ERROR: i32 = 10;

/// Whether to read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum More {
    Yes,
    No,
}

/// A number as SQLite keeps it.
///
/// # Errors
/// It is over 2^63 - 1: no number of ours gets there.
pub(crate) fn number(value: u64) -> Result<Value, Error> {
    let number = i64::try_from(value);
    number.map(Value::Integer).map_err(|_| Error::invalid(format!("number {value} is too large")))
}

pub(crate) fn text(value: &str) -> Value {
    Value::Text(value.to_owned())
}

pub(crate) fn blob(value: &[u8]) -> Value {
    Value::Blob(value.to_vec())
}

pub(crate) fn i64_at(row: &Row, column: i32) -> Result<i64, libsql::Error> {
    match row.get_value(column)? {
        Value::Integer(number) => Ok(number),
        Value::Null => Ok(0),
        Value::Real(_) | Value::Text(_) | Value::Blob(_) => Err(libsql::Error::InvalidColumnType),
    }
}

pub(crate) fn u64_at(row: &Row, column: i32) -> Result<u64, libsql::Error> {
    u64::try_from(i64_at(row, column)?).map_err(|_| libsql::Error::InvalidColumnType)
}

pub(crate) fn u32_at(row: &Row, column: i32) -> Result<u32, libsql::Error> {
    u32::try_from(i64_at(row, column)?).map_err(|_| libsql::Error::InvalidColumnType)
}

pub(crate) fn text_at(row: &Row, column: i32) -> Result<String, libsql::Error> {
    match row.get_value(column)? {
        Value::Text(text) => Ok(text),
        Value::Null => Ok(String::new()),
        Value::Integer(_) | Value::Real(_) | Value::Blob(_) => {
            Err(libsql::Error::InvalidColumnType)
        }
    }
}

pub(crate) fn blob_at(row: &Row, column: i32) -> Result<bytes::Bytes, libsql::Error> {
    match row.get_value(column)? {
        Value::Blob(bytes) => Ok(bytes.into()),
        Value::Null => Ok(bytes::Bytes::new()),
        Value::Integer(_) | Value::Real(_) | Value::Text(_) => {
            Err(libsql::Error::InvalidColumnType)
        }
    }
}
