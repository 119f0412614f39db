//! One work as its agent handles it: the fold of its entries, and the decision what comes next.
//!
//! Pure: [`Turn::apply`] folds, [`Turn::next`] decides, [`Turn::failed`] decides about an attempt that came to nothing.
//! Who carries a decision out journals it first. What becomes of steps in doubt is decided in [`doubt`].

pub mod doubt;
#[cfg(test)]
mod tests;

use bytes::Bytes;

use crate::chain::{self, Output, PhaseKey};
use crate::definition::{Behaviour, Definition, Policy};
use crate::entry::{
    Accepted, Ended, Entry, Resolution, Stamp, StepBegan, StepDone, StepDoubted, Usage,
};
use crate::round::{self, Returned, Said, ToolCall};
use crate::step::{CallKey, Callee, Onward, StepKey, StepKind};
use crate::{Error, ErrorKind, Lsn, Reason, WorkState};

/// The most that a result may be.
pub const RESULT_BYTES_MAX: usize = 1 << 20;
/// How long after its own deadline a step in doubt is left alone: its call may be under way until then.
pub const DOUBT_HOLD_MS: i64 = 5_000;

/// What a definition allows a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub behaviour: Behaviour,
    pub cycles_max: u32,
    pub rounds_max: u32,
    pub attempts_max: u32,
    pub in_doubt: Policy,
}

impl Limits {
    /// Of a chain.
    pub fn chain(cycles_max: u32, attempts_max: u32) -> Self {
        let (behaviour, in_doubt) = (Behaviour::Chain, Policy::default());
        Self { behaviour, cycles_max, rounds_max: 0, attempts_max, in_doubt }
    }
}

impl From<&Definition> for Limits {
    fn from(definition: &Definition) -> Self {
        Self {
            behaviour: definition.behaviour,
            cycles_max: definition.cycles_max,
            rounds_max: definition.rounds_max,
            attempts_max: definition.attempts_max,
            in_doubt: definition.in_doubt,
        }
    }
}

/// The fold of one work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Every entry of the work, the acceptance first: what a watcher is sent.
    entries: Vec<(Stamp, Entry)>,
    limits: Limits,
    state: WorkState,
    reason: Reason,
    /// What comes next, decided when the entry before it was folded.
    onward: Onward,
    /// The last attempt of the next step that is known to have begun.
    begun: u32,
    /// Whether that attempt may have been cut off, so that the next one has to be journaled before it runs.
    interrupted: bool,
    usage: Usage,
    /// What the model asked for in the round that is under way.
    calls: Vec<ToolCall>,
    /// The next step was intended: until when its answer is waited for.
    intended_until_ms: Option<i64>,
    /// Nothing is done about the next step before that, as an attempt that was in doubt may still be under way.
    not_before_ms: i64,
    /// When the doubt that is open began, and how long those before it took: a person's time is not the work's.
    doubted_at_ms: i64,
    doubted_ms: i64,
}

/// What a turn wants done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run this step, not before that time; `attempt` is 1 for the first.
    Run { step: StepKey, attempt: u32, not_before_ms: i64 },
    /// Journal this, fold it, and ask again.
    Begin(StepBegan),
    /// The same: nobody knows whether an attempt was carried out.
    Doubt(StepDoubted),
    /// Find out what became of this attempt, not before that time: see [`Turn::judge`].
    Settle { step: StepKey, attempt: u32, not_before_ms: i64 },
    /// Journal this: the work is over.
    End(Ended),
    /// It is over.
    Nothing,
}

/// How an attempt of a step came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub kind: ErrorKind,
    pub reason: Reason,
    pub detail: String,
    /// It surely had no effect.
    pub is_harmless: bool,
}

/// Why a work is to end before its turn has come to an end of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Cancel,
    Deadline,
    Quarantine,
}

impl Stop {
    fn reason(self) -> Reason {
        match self {
            Self::Cancel => Reason::CancelRequested,
            Self::Deadline => Reason::DeadlineExceeded,
            Self::Quarantine => Reason::Quarantined,
        }
    }

    fn state(self) -> WorkState {
        match self {
            Self::Cancel => WorkState::Cancelled,
            Self::Deadline => WorkState::Failed,
            Self::Quarantine => WorkState::DeadLettered,
        }
    }
}

impl Turn {
    /// The turn of a work that was just accepted.
    pub fn accept(accepted: Accepted, stamp: Stamp, limits: Limits) -> Self {
        let first = match limits.behaviour {
            Behaviour::Chain => StepKey::Phase(PhaseKey::FIRST),
            Behaviour::Loop => StepKey::model(0),
        };
        Self {
            entries: vec![(stamp, Entry::Accepted(accepted))],
            limits,
            state: WorkState::Accepted,
            reason: Reason::Submitted,
            onward: Onward::Step(first),
            begun: 0,
            interrupted: false,
            usage: Usage::default(),
            calls: Vec::new(),
            intended_until_ms: None,
            not_before_ms: 0,
            doubted_at_ms: 0,
            doubted_ms: 0,
        }
    }

    pub fn accepted(&self) -> &Accepted {
        let Entry::Accepted(accepted) = &self.entries[0].1 else {
            unreachable!("the first entry of a turn is its acceptance")
        };
        accepted
    }

    /// The lsn of its acceptance.
    pub fn id(&self) -> Lsn {
        self.entries[0].0.lsn
    }

    pub fn create_ms(&self) -> i64 {
        self.entries[0].0.ts_ms
    }

    pub fn entries(&self) -> &[(Stamp, Entry)] {
        &self.entries
    }

    pub fn state(&self) -> WorkState {
        self.state
    }

    pub fn reason(&self) -> Reason {
        self.reason
    }

    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// When it fails if it has not ended. Time in doubt does not count: nobody is at work then.
    pub fn deadline_ms(&self) -> i64 {
        match self.state {
            WorkState::InDoubt => i64::MAX,
            WorkState::Accepted
            | WorkState::Running
            | WorkState::Waiting
            | WorkState::Cancelling
            | WorkState::Succeeded
            | WorkState::Failed
            | WorkState::Cancelled
            | WorkState::DeadLettered => {
                self.accepted().deadline_ms.saturating_add(self.doubted_ms)
            }
        }
    }

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<(&Stamp, &Ended)> {
        let Some((stamp, Entry::Ended(ended))) = self.entries.last() else { return None };
        Some((stamp, ended))
    }

    /// The steps done so far, in order, with the stamp of each.
    pub fn steps(&self) -> impl Iterator<Item = (&Stamp, &StepDone)> {
        self.entries.iter().filter_map(|(stamp, entry)| {
            let Entry::StepDone(done) = entry else { return None };
            Some((stamp, done))
        })
    }

    /// The call of a tool that is due, as the model asked for it.
    pub fn tool_call(&self) -> Option<&ToolCall> {
        let Onward::Step(StepKey::Call(CallKey { of: Callee::Tool(index), .. })) = self.onward
        else {
            return None;
        };
        self.calls.get(usize::try_from(index).ok()?)
    }

    /// Folds one entry.
    ///
    /// # Errors
    /// An entry that cannot follow, above all any entry after the final one. Nothing is changed then.
    pub fn apply(&mut self, entry: Entry, stamp: Stamp) -> Result<(), Error> {
        let refuse = |why| Err(Error::Sequence { entry: entry.name(), why });
        if self.state.is_final() {
            return refuse("the work has ended");
        }
        match &entry {
            Entry::ShardOpened(_) => return refuse("it belongs to no work"),
            Entry::Accepted(_) => return refuse("the work was accepted before"),
            Entry::StepBegan(began) => {
                if self.onward != Onward::Step(began.step) {
                    return refuse("another step is due");
                }
                if began.attempt <= self.begun {
                    return refuse("a later attempt was begun before");
                }
                if self.state == WorkState::InDoubt {
                    return refuse("nobody has said what became of the attempt before");
                }
                self.attempt(began.attempt);
                self.run(began.reason);
            }
            Entry::StepIntended(intended) => {
                if let Err(why) = self.may_follow(intended.step, intended.attempt) {
                    return refuse(why);
                }
                if self.state == WorkState::InDoubt {
                    return refuse("nobody has said what became of the attempt before");
                }
                self.attempt(intended.attempt);
                self.intended_until_ms = Some(intended.deadline_ms);
                self.run(Reason::TurnBegan);
            }
            Entry::StepDoubted(doubted) => {
                if let Err(why) = self.may_follow(doubted.step, doubted.attempt) {
                    return refuse(why);
                }
                self.doubt(doubted, stamp);
            }
            Entry::StepResolved(resolved) => {
                if self.state != WorkState::InDoubt || self.onward != Onward::Step(resolved.step) {
                    return refuse("it is not in doubt");
                }
                self.end_doubt(stamp);
                if resolved.verdict.resolution() == Resolution::Retry {
                    self.attempt(resolved.attempt + 1);
                }
                self.run(resolved.verdict.reason());
            }
            Entry::StepDone(done) => {
                if let Err(why) = self.may_follow(done.step, done.attempts) {
                    return refuse(why);
                }
                let Ok(onward) = self.onward_after(done) else {
                    return refuse("its answer cannot be read");
                };
                self.done(done, onward, stamp);
            }
            Entry::Waiting(reason) => self.enter(WorkState::Waiting, *reason),
            Entry::Resumed(reason) => self.enter(WorkState::Running, *reason),
            Entry::CancelRequested(reason) => self.enter(WorkState::Cancelling, *reason),
            Entry::Ended(ended) if !ended.state.is_final() => {
                return refuse("its state is not final");
            }
            Entry::Ended(ended) => self.enter(ended.state, ended.reason),
        }
        self.entries.push((stamp, entry));
        Ok(())
    }

    fn may_follow(&self, step: StepKey, attempt: u32) -> Result<(), &'static str> {
        if self.onward != Onward::Step(step) {
            return Err("another step is due");
        }
        if attempt < self.begun {
            return Err("a later attempt was begun before");
        }
        Ok(())
    }

    fn attempt(&mut self, attempt: u32) {
        self.begun = attempt;
        self.interrupted = false;
        self.intended_until_ms = None;
    }

    fn done(&mut self, done: &StepDone, onward: Onward, stamp: Stamp) {
        if done.step.kind() == StepKind::Model {
            self.calls = Said::parse(&done.output).map(|said| said.calls).unwrap_or_default();
        }
        self.end_doubt(stamp);
        self.onward = onward;
        self.attempt(0);
        self.not_before_ms = 0;
        self.usage += done.usage;
        self.run(Reason::TurnBegan);
    }

    /// What comes after `done`.
    fn onward_after(&self, done: &StepDone) -> Result<Onward, Error> {
        let Limits { cycles_max, rounds_max, .. } = self.limits;
        Ok(match done.step {
            StepKey::Phase(key) => {
                chain::onward(key, &Output::parse(key.phase, &done.output)?, cycles_max)
            }
            StepKey::Call(CallKey { round, of: Callee::Model }) => {
                round::after_model(round, &Said::parse(&done.output)?, rounds_max)
            }
            StepKey::Call(CallKey { round, of: Callee::Tool(index) }) => {
                Returned::parse(&done.output)?;
                round::after_tool(round, index, self.calls.len())
            }
        })
    }

    /// Whether `output` is an answer that `step` can have.
    ///
    /// # Errors
    /// It is none.
    pub fn check_output(step: StepKey, output: &[u8]) -> Result<(), Error> {
        match step {
            StepKey::Phase(key) => Output::parse(key.phase, output).map(drop),
            StepKey::Call(CallKey { of: Callee::Model, .. }) => Said::parse(output).map(drop),
            StepKey::Call(CallKey { of: Callee::Tool(_), .. }) => Returned::parse(output).map(drop),
        }
    }

    /// Its turn came: it is the oldest open work of its agent.
    pub fn begin(&mut self) {
        if self.state == WorkState::Accepted {
            self.enter(WorkState::Running, Reason::TurnBegan);
        }
    }

    /// It was found in the journal by a new owner: what was being done when the old one ended is not known.
    ///
    /// A work whose turn had come may have begun its next step, so that attempt counts; one that waited had not.
    pub fn interrupt(&mut self) {
        let may_have_begun = self.state == WorkState::Running;
        if may_have_begun && matches!(self.onward, Onward::Step(_)) {
            self.begun = self.begun.max(1);
            self.interrupted = true;
        }
    }

    /// The worker of the attempt that was interrupted is known to have it: its answer is waited for.
    pub fn await_worker(&mut self) {
        self.interrupted = false;
    }

    /// Whether an answer of this attempt is one that the turn waits for: an answer of an attempt after which another was
    /// begun is not journaled.
    pub fn takes(&self, step: StepKey, attempt: u32) -> bool {
        let is_waiting = matches!(self.state, WorkState::Running | WorkState::InDoubt);
        is_waiting && self.onward == Onward::Step(step) && attempt == self.begun.max(1)
    }

    /// Decides what is to be done now.
    pub fn next(&self) -> Next {
        if self.state.is_final() {
            return Next::Nothing;
        }
        if self.state == WorkState::Cancelling {
            return Next::End(ended(WorkState::Cancelled, self.reason));
        }
        let (attempt, not_before_ms) = (self.begun.max(1), self.not_before_ms);
        match &self.onward {
            Onward::Step(step) if self.state == WorkState::InDoubt => {
                Next::Settle { step: *step, attempt, not_before_ms }
            }
            Onward::Step(step) if self.interrupted && self.is_intended() => {
                Next::Doubt(StepDoubted { step: *step, attempt, reason: Reason::OwnerDied })
            }
            Onward::Step(step) if self.interrupted => {
                match self.again(*step, self.begun, Reason::OwnerDied) {
                    Some(began) => Next::Begin(began),
                    None => Next::End(ended(WorkState::DeadLettered, Reason::WorkerLost)),
                }
            }
            Onward::Step(step) => Next::Run { step: *step, attempt, not_before_ms },
            Onward::Stop(_) | Onward::Answer(_) => Next::End(end_of(&self.onward)),
        }
    }

    /// The end that follows `done` at once, so that both are journaled in one batch.
    pub fn end_after(&self, done: &StepDone) -> Option<Ended> {
        if self.onward != Onward::Step(done.step) || self.state == WorkState::Cancelling {
            return None;
        }
        match self.onward_after(done).ok()? {
            Onward::Step(_) => None,
            onward @ (Onward::Answer(_) | Onward::Stop(_)) => Some(end_of(&onward)),
        }
    }

    /// Decides about attempt `attempt` of the step that is due, which came to nothing: again, in doubt, or the end. None: it
    /// is in doubt already, and stays so.
    pub fn failed(&self, attempt: u32, failure: Failure) -> Option<Entry> {
        let end = |state| {
            let detail = failure.detail.clone();
            Some(Entry::Ended(Ended { detail, ..ended(state, failure.reason) }))
        };
        let Onward::Step(step) = &self.onward else { return end(WorkState::Failed) };
        if self.state == WorkState::InDoubt {
            return None;
        }
        if self.is_intended() && !failure.is_harmless {
            let (step, reason) = (*step, failure.reason);
            return Some(Entry::StepDoubted(StepDoubted { step, attempt, reason }));
        }
        if !failure.kind.is_retryable() {
            return end(WorkState::Failed);
        }
        match self.again(*step, attempt, failure.reason) {
            Some(began) => Some(Entry::StepBegan(began)),
            None => end(WorkState::DeadLettered),
        }
    }

    /// The attempt after `attempt`, if the definition allows one.
    fn again(&self, step: StepKey, attempt: u32, reason: Reason) -> Option<StepBegan> {
        (attempt < self.limits.attempts_max).then_some(StepBegan {
            step,
            attempt: attempt + 1,
            reason,
        })
    }

    fn run(&mut self, reason: Reason) {
        // A cancel that was asked for is not forgotten because a step ended after it.
        if self.state != WorkState::Cancelling {
            self.enter(WorkState::Running, reason);
        }
    }

    fn enter(&mut self, state: WorkState, reason: Reason) {
        self.state = state;
        self.reason = reason;
    }
}

fn end_of(onward: &Onward) -> Ended {
    match onward {
        Onward::Answer(text) if text.len() <= RESULT_BYTES_MAX => Ended {
            result: Bytes::copy_from_slice(text.as_bytes()),
            ..ended(WorkState::Succeeded, Reason::Completed)
        },
        Onward::Answer(text) => Ended {
            detail: format!(
                "the result has {} bytes, at most {RESULT_BYTES_MAX} are allowed",
                text.len()
            ),
            ..ended(WorkState::Failed, Reason::ResultTooLarge)
        },
        Onward::Stop(reason) => ended(WorkState::Failed, *reason),
        Onward::Step(_) => unreachable!("a step that is due is no end"),
    }
}

/// An end without a result.
pub fn ended(state: WorkState, reason: Reason) -> Ended {
    Ended { state, reason, result: Bytes::new(), detail: String::new() }
}
