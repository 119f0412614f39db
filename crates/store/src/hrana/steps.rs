//! A write as one self-contained batch: it begins a transaction, makes sure, writes, and commits if all of it went well.
//!
//! Nothing of it waits for us, so a client that stops or is cut off holds no lock.

use super::server::Failed;
use super::wire::{self, Answer, Problem, Request, When};
use crate::Error;
use crate::statement::{Batch, Found, Guard, Outcome, Rows, Sink, Stop, Value};

/// The statements of a batch, as they are sent.
pub(super) struct Steps {
    steps: Vec<Step>,
    bytes: usize,
}

struct Step {
    statement: String,
    guard: Option<Guard>,
    is_kept: bool,
}

/// Conditions know errors and no numbers of rows: so a statement that should have changed one row fails here.
const GUARD_CHANGED: &str = "INSERT INTO fenced SELECT 'unchanged' WHERE changes() <> 1";
/// 2 is FULL: every commit is flushed before it is answered. The server tells it, and lets no client set it.
const GUARD_DURABILITY: &str =
    "INSERT INTO fenced SELECT 'relaxed' WHERE (SELECT synchronous FROM pragma_synchronous) <> 2";
/// The number of the first statement of ours: one begins the transaction before it.
const FIRST: usize = 1;
/// The conditions and what is around the statements.
const STEP_BYTES: usize = 64;

/// Whether a batch also makes sure that the server flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    Check,
    Known,
}

impl Steps {
    pub(super) fn of<B: Batch>(batch: &B) -> Result<Self, Error> {
        let mut steps = Self { steps: Vec::new(), bytes: 0 };
        match batch.write(&mut steps) {
            Ok(()) => Ok(steps),
            Err(Stop::Error(error)) => Err(error),
            Err(Stop::Guard(guard)) => {
                Err(Error::internal("a batch", format!("{guard:?} fired before it was sent")))
            }
        }
    }

    fn push(&mut self, guard: Option<Guard>, is_kept: bool, sql: &str, params: &[Value]) {
        let statement = wire::statement(sql, params, is_kept);
        self.bytes += statement.len() + STEP_BYTES;
        self.steps.push(Step { statement, guard, is_kept });
    }

    /// The whole batch, to be run in the stream that `baton` names, or in a new one.
    pub(super) fn request(&self, baton: Option<&str>, durability: Durability) -> Request {
        let mut request = Request::new(baton, self.bytes + 1_024);
        let bare = |sql| wire::statement(sql, &[], false);
        let mut last = request.step(&bare("BEGIN IMMEDIATE"), When::Always);
        for step in &self.steps {
            last = request.step(&step.statement, When::Ok(last));
        }
        // At the end: the batch may have made the table that this needs.
        if durability == Durability::Check {
            last = request.step(&bare(GUARD_DURABILITY), When::Ok(last));
        }
        request.step(&bare("COMMIT"), When::Ok(last));
        request.step(&bare("ROLLBACK"), When::InTransaction);
        request
    }

    /// What became of the batch, and whether its stream can be used again.
    pub(super) fn outcome<B: Batch>(
        &self,
        batch: &B,
        name: &str,
        durability: Durability,
        answer: Answer,
    ) -> (Result<Outcome<B::Answer>, Failed>, bool) {
        let commit = FIRST + self.steps.len() + usize::from(durability == Durability::Check);
        if answer.steps.len() != commit + 2 {
            return (Err(Failed::Lost("the answer has another length".to_owned())), false);
        }
        let mut kept = Vec::new();
        let mut is_committed = false;
        let mut failed = None;
        let mut is_clean = true;
        for (number, result) in answer.steps.into_iter().enumerate() {
            match result {
                None => {}
                Some(Ok(rows)) if number == commit => {
                    is_committed = true;
                    drop::<Rows>(rows);
                }
                Some(Ok(rows)) => {
                    let step = number.checked_sub(FIRST).and_then(|index| self.steps.get(index));
                    if step.is_some_and(|step| step.is_kept) {
                        kept.push(rows);
                    }
                }
                Some(Err(_)) if number == commit + 1 => is_clean = false,
                Some(Err(problem)) => failed = failed.or(Some((number, problem))),
            }
        }
        let outcome = match failed {
            _ if is_committed => {
                let answer = batch.answer(&mut Found::new(name, kept));
                answer.map(Outcome::Done).map_err(Failed::Refused)
            }
            // A commit that failed for another reason than a lock may have reached the disk.
            Some((number, problem)) if number == commit => match Failed::of(name, &problem) {
                Failed::Busy(why) => Err(Failed::Busy(why)),
                Failed::Refused(_) | Failed::Stream(_) | Failed::TooLarge | Failed::Lost(_) => {
                    Err(Failed::Lost(problem.message.into_owned()))
                }
            },
            Some((number, problem)) => self.stopped(name, number, &problem),
            None => Err(Failed::Lost("the batch neither failed nor committed".to_owned())),
        };
        (outcome, is_clean)
    }

    /// Step `number` failed, and so nothing was committed.
    fn stopped<T>(
        &self,
        name: &str,
        number: usize,
        problem: &Problem<'_>,
    ) -> Result<Outcome<T>, Failed> {
        let guard = match number.checked_sub(FIRST) {
            Some(index) if index == self.steps.len() => Some(Guard::Durability),
            Some(index) => self.steps.get(index).and_then(|step| step.guard),
            None => None,
        };
        match guard {
            Some(guard) if guard.fired(&problem.message) => Ok(Outcome::Stopped(guard)),
            _ => Err(Failed::of(name, problem)),
        }
    }
}

impl Sink for Steps {
    /// A step costs the server more than a row.
    fn log_rows_max(&self) -> usize {
        128
    }

    fn run(&mut self, sql: &'static str, params: Vec<Value>) -> Result<(), Stop> {
        self.push(None, false, sql, &params);
        Ok(())
    }

    fn keep(&mut self, sql: &'static str, params: Vec<Value>) -> Result<(), Stop> {
        self.push(None, true, sql, &params);
        Ok(())
    }

    fn guard(&mut self, guard: Guard, sql: &'static str, params: Vec<Value>) -> Result<(), Stop> {
        self.push(Some(guard), false, sql, &params);
        Ok(())
    }

    fn run_one(&mut self, guard: Guard, sql: &'static str, params: Vec<Value>) -> Result<(), Stop> {
        self.push(None, false, sql, &params);
        self.push(Some(guard), false, GUARD_CHANGED, &[]);
        Ok(())
    }
}
