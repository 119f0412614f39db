//! What both engines run: statements, what may stop a batch of them, and how their rows are read.
//!
//! A write describes itself to a [`Sink`], statement by statement, and a read is a list of statements of one moment. So
//! the SQL stands once, and each engine runs it in its own way. Nothing here knows which engine that is.

pub(crate) use libsql::Value;

use crate::Error;

/// A statement that answers rows.
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    pub(crate) sql: &'static str,
    pub(crate) params: Vec<Value>,
    pub(crate) page: Option<Page>,
}

/// How much of its rows is wanted. The rows are the last parameter of the statement, its `LIMIT`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) rows: usize,
    /// Nothing is read after the row that reaches this.
    pub(crate) bytes: usize,
}

impl Page {
    /// Whether so many rows, of so many bytes, fill it.
    pub(crate) fn is_filled_by(self, rows: usize, bytes: usize) -> bool {
        self.rows <= rows || self.bytes <= bytes
    }
}

impl Statement {
    pub(crate) fn new(sql: &'static str, params: Vec<Value>) -> Self {
        Self { sql, params, page: None }
    }

    pub(crate) fn page(sql: &'static str, mut params: Vec<Value>, page: Page) -> Self {
        params.push(limit_value(page.rows));
        Self { sql, params, page: Some(page) }
    }

    /// The same with a limit of so many rows.
    pub(crate) fn with_rows(&self, rows: usize) -> Self {
        let Some(page) = self.page else { return self.clone() };
        let mut params = self.params.clone();
        params.pop();
        Self::page(self.sql, params, Page { rows, ..page })
    }
}

fn limit_value(rows: usize) -> Value {
    Value::Integer(i64::try_from(rows).unwrap_or(i64::MAX))
}

/// A read: statements of one moment, and what their rows mean.
pub(crate) trait Query: Send + Sync {
    /// Whether its rows are mostly few and small, so that it can go together with others. Where they are not, it is asked
    /// again by itself.
    const IS_SHORT: bool = false;

    type Answer: Send;

    fn statements(&self) -> Result<Vec<Statement>, Error>;

    /// Takes the rows of the statements, in their order.
    fn answer(&self, found: &mut Found) -> Result<Self::Answer, Error>;
}

/// A write: everything that it puts into the sink happens, or nothing of it.
pub(crate) trait Batch: Send + Sync {
    type Answer: Send;

    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop>;

    /// Takes what was kept, in its order.
    fn answer(&self, kept: &mut Found) -> Result<Self::Answer, Error>;
}

/// Takes the statements of a write, in order.
pub(crate) trait Sink {
    /// Rows of the log that one statement should insert.
    fn log_rows_max(&self) -> usize;

    fn run(&mut self, sql: &'static str, params: Vec<Value>) -> Result<(), Stop>;

    /// The same, and keeps its rows, and how many rows it changed.
    fn keep(&mut self, sql: &'static str, params: Vec<Value>) -> Result<(), Stop>;

    /// A statement that violates the constraint of the guard exactly when the batch must not happen.
    fn guard(&mut self, guard: Guard, sql: &'static str, params: Vec<Value>) -> Result<(), Stop>;

    /// A statement that has to change one row, or the batch must not happen.
    fn run_one(&mut self, guard: Guard, sql: &'static str, params: Vec<Value>) -> Result<(), Stop>;
}

/// Why a batch was not written.
#[derive(Debug)]
pub(crate) enum Stop {
    Guard(Guard),
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// What a batch makes sure of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guard {
    /// The owner row has the epoch of the batch.
    Epoch,
    /// The log ends where the batch believes.
    Head,
    /// The leader row is as the batch believes.
    Leader,
    /// The shard belongs to no other cluster.
    Cluster,
    /// The work of this id exists.
    Work(u64),
    /// Nobody else has migrated the schema meanwhile.
    Schema,
    /// The server flushes what it commits.
    Durability,
}

impl Guard {
    /// The text of the failure of its constraint. `fenced` and `head` are tables that never hold a row.
    pub(crate) fn fired(self, message: &str) -> bool {
        let constraint = match self {
            Self::Head => "CHECK constraint failed: head",
            Self::Epoch
            | Self::Leader
            | Self::Cluster
            | Self::Work(_)
            | Self::Schema
            | Self::Durability => "CHECK constraint failed: fenced",
        };
        message.ends_with(constraint)
    }
}

/// What became of a batch that an engine ran.
#[derive(Debug)]
pub(crate) enum Outcome<T> {
    Done(T),
    /// Nothing was written.
    Stopped(Guard),
}

/// What the statements of a query, or the kept ones of a batch, found.
pub(crate) struct Found {
    /// The database, for errors.
    name: String,
    each: std::vec::IntoIter<Rows>,
}

/// What one statement found.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    pub(crate) rows: Vec<Row>,
    pub(crate) changed: u64,
    /// They fill their page: there may be more.
    pub(crate) is_full: bool,
}

impl Found {
    pub(crate) fn new(name: &str, each: Vec<Rows>) -> Self {
        Self { name: name.to_owned(), each: each.into_iter() }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn next(&mut self) -> Rows {
        self.each.next().unwrap_or_default()
    }

    /// Every row of the next statement.
    pub(crate) fn rows<T>(
        &mut self,
        read: impl Fn(&mut Row) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Error> {
        let rows = self.next().rows.into_iter();
        let rows: Result<_, Malformed> = rows.map(|mut row| read(&mut row)).collect();
        rows.map_err(|_| self.malformed())
    }

    /// The rows of the next statement, and whether there may be more than its page holds.
    pub(crate) fn page<T>(
        &mut self,
        read: impl Fn(&mut Row) -> Result<T, Malformed>,
    ) -> Result<(Vec<T>, bool), Error> {
        let is_full = self.each.as_slice().first().is_some_and(|rows| rows.is_full);
        Ok((self.rows(read)?, is_full))
    }

    /// The first row of the next statement.
    pub(crate) fn row<T>(
        &mut self,
        read: impl Fn(&mut Row) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Error> {
        let row = self.next().rows.into_iter().next();
        row.map(|mut row| read(&mut row)).transpose().map_err(|_| self.malformed())
    }

    /// The first column of the only row of the next statement, a number.
    pub(crate) fn number(&mut self) -> Result<u64, Error> {
        Ok(self.row(Row::u64)?.unwrap_or(0))
    }

    /// How many rows the next statement changed.
    pub(crate) fn changed(&mut self) -> u64 {
        self.next().changed
    }

    pub(crate) fn corrupt(&self, what: &str) -> Error {
        Error::Corrupt { what: format!("{}: {what}", self.name) }
    }

    fn malformed(&self) -> Error {
        Error::internal(self.name(), "a column has another type than it should")
    }
}

/// One row, read from its first column to its last.
#[derive(Debug)]
pub(crate) struct Row(std::vec::IntoIter<Value>);

/// A column has another type than it should, or is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

impl Row {
    pub(crate) fn new(values: Vec<Value>) -> Self {
        Self(values.into_iter())
    }

    /// What is left of it takes so much of a page.
    pub(crate) fn bytes(&self) -> usize {
        self.0.as_slice().iter().map(value_bytes).sum()
    }

    pub(crate) fn i64(&mut self) -> Result<i64, Malformed> {
        match self.0.next() {
            Some(Value::Integer(number)) => Ok(number),
            Some(Value::Null) => Ok(0),
            Some(Value::Real(_) | Value::Text(_) | Value::Blob(_)) | None => Err(Malformed),
        }
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        u64::try_from(self.i64()?).map_err(|_| Malformed)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        u32::try_from(self.i64()?).map_err(|_| Malformed)
    }

    pub(crate) fn text(&mut self) -> Result<String, Malformed> {
        match self.0.next() {
            Some(Value::Text(text)) => Ok(text),
            Some(Value::Null) => Ok(String::new()),
            Some(Value::Integer(_) | Value::Real(_) | Value::Blob(_)) | None => Err(Malformed),
        }
    }

    pub(crate) fn blob(&mut self) -> Result<bytes::Bytes, Malformed> {
        match self.0.next() {
            Some(Value::Blob(bytes)) => Ok(bytes.into()),
            Some(Value::Null) => Ok(bytes::Bytes::new()),
            Some(Value::Integer(_) | Value::Real(_) | Value::Text(_)) | None => Err(Malformed),
        }
    }
}

/// What a value takes of a page.
pub(crate) fn value_bytes(value: &Value) -> usize {
    match value {
        Value::Text(text) => text.len(),
        Value::Blob(bytes) => bytes.len(),
        Value::Null | Value::Integer(_) | Value::Real(_) => size_of::<i64>(),
    }
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
