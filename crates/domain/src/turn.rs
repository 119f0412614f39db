//! One work as its agent handles it: the fold of its entries, and the decision what comes next.
//!
//! Pure: [`Turn::apply`] folds, [`Turn::next`] decides, [`Turn::failed`] decides about an attempt that came to nothing.
//! Who carries a decision out journals it first.

use bytes::Bytes;

use crate::chain::{self, Onward, Output, StepKey};
use crate::entry::{Accepted, Ended, Entry, PhaseDone, Stamp, StepBegan, Usage};
use crate::{Error, ErrorKind, Lsn, Reason, WorkState};

/// The most that a result may be.
pub const RESULT_BYTES_MAX: usize = 1 << 20;

/// What a definition allows a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub cycles_max: u32,
    pub attempts_max: u32,
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
}

/// What a turn wants done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run this step; `attempt` is 1 for the first.
    Run { step: StepKey, attempt: u32 },
    /// Journal this, fold it, and ask again.
    Begin(StepBegan),
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
}

impl Turn {
    /// The turn of a work that was just accepted.
    pub fn accept(accepted: Accepted, stamp: Stamp, limits: Limits) -> Self {
        Self {
            entries: vec![(stamp, Entry::Accepted(accepted))],
            limits,
            state: WorkState::Accepted,
            reason: Reason::Submitted,
            onward: Onward::Step(StepKey::FIRST),
            begun: 0,
            interrupted: false,
            usage: Usage::default(),
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

    /// How it ended, if it has.
    pub fn ended(&self) -> Option<(&Stamp, &Ended)> {
        let Some((stamp, Entry::Ended(ended))) = self.entries.last() else { return None };
        Some((stamp, ended))
    }

    /// The phases done so far, in order, with the stamp of each.
    pub fn phases(&self) -> impl Iterator<Item = (&Stamp, &PhaseDone)> {
        self.entries.iter().filter_map(|(stamp, entry)| {
            let Entry::PhaseDone(done) = entry else { return None };
            Some((stamp, done))
        })
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
                self.begun = began.attempt;
                self.interrupted = false;
                self.run(began.reason);
            }
            Entry::PhaseDone(done) => {
                if self.onward != Onward::Step(done.step) {
                    return refuse("another step is due");
                }
                let Ok(output) = Output::parse(done.step.phase, &done.output) else {
                    return refuse("its answer cannot be read");
                };
                self.onward = chain::onward(done.step, &output, self.limits.cycles_max);
                self.begun = 0;
                self.interrupted = false;
                self.usage += done.usage;
                self.run(Reason::TurnBegan);
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

    /// Decides what is to be done now.
    pub fn next(&self) -> Next {
        if self.state.is_final() {
            return Next::Nothing;
        }
        if self.state == WorkState::Cancelling {
            return Next::End(ended(WorkState::Cancelled, self.reason));
        }
        match &self.onward {
            Onward::Step(step) if self.interrupted => {
                match self.again(*step, self.begun, Reason::OwnerDied) {
                    Some(began) => Next::Begin(began),
                    None => Next::End(ended(WorkState::DeadLettered, Reason::WorkerLost)),
                }
            }
            Onward::Step(step) => Next::Run { step: *step, attempt: self.begun.max(1) },
            Onward::Stop(_) | Onward::Answer(_) => Next::End(end_of(&self.onward)),
        }
    }

    /// The end that follows `done` at once, so that both are journaled in one batch.
    pub fn end_after(&self, done: &PhaseDone) -> Option<Ended> {
        if self.onward != Onward::Step(done.step) || self.state == WorkState::Cancelling {
            return None;
        }
        let output = Output::parse(done.step.phase, &done.output).ok()?;
        match chain::onward(done.step, &output, self.limits.cycles_max) {
            Onward::Step(_) => None,
            onward @ (Onward::Answer(_) | Onward::Stop(_)) => Some(end_of(&onward)),
        }
    }

    /// Decides about attempt `attempt` of the step that is due, which came to nothing: again, or the end.
    pub fn failed(&self, attempt: u32, failure: Failure) -> Entry {
        let end = |state| {
            Entry::Ended(Ended { detail: failure.detail.clone(), ..ended(state, failure.reason) })
        };
        let Onward::Step(step) = &self.onward else { return end(WorkState::Failed) };
        if !failure.kind.is_retryable() {
            return end(WorkState::Failed);
        }
        match self.again(*step, attempt, failure.reason) {
            Some(began) => Entry::StepBegan(began),
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
        // A cancel that was asked for is not forgotten because a phase ended after it.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Phase;
    use crate::{Class, DefinitionHash, Epoch, Seq, Slot};

    const LIMITS: Limits = Limits { cycles_max: 1, attempts_max: 3 };

    fn stamp(n: u64) -> Stamp {
        Stamp { seq: Seq(n), lsn: Lsn(n), epoch: Epoch(1), ts_ms: 0 }
    }

    fn accepted() -> Turn {
        let accepted = Accepted {
            definition: DefinitionHash([0; 32]),
            input: Bytes::from_static(b"text"),
            key: "k".parse().unwrap(),
            deadline_ms: 1_000,
            traceparent: None,
            class: Class(0),
            slot: Slot::new(0).unwrap(),
        };
        let mut turn = Turn::accept(accepted, stamp(1), LIMITS);
        turn.begin();
        turn
    }

    fn done(cycle: u32, phase: Phase, output: &str) -> PhaseDone {
        PhaseDone {
            step: StepKey { cycle, phase },
            output: Bytes::copy_from_slice(output.as_bytes()),
            node: "node-1".into(),
            attempts: 1,
            start_ms: 0,
            end_ms: 1,
            usage: Usage { calls: 1, ..Usage::default() },
        }
    }

    fn output(phase: Phase) -> &'static str {
        match phase {
            Phase::Action => r#"{"draft":"d"}"#,
            Phase::Experience | Phase::Intention | Phase::Observation => "{}",
            Phase::Understanding => r#"{"decision":"yield"}"#,
            Phase::Yield => r#"{"answer":"a"}"#,
        }
    }

    fn until(phase: Phase) -> Turn {
        let mut turn = accepted();
        for (n, earlier) in
            Phase::ALL.into_iter().take_while(|earlier| *earlier < phase).enumerate()
        {
            turn.apply(Entry::PhaseDone(done(0, earlier, output(earlier))), stamp(n as u64 + 2))
                .unwrap();
        }
        turn
    }

    fn lost() -> Failure {
        Failure { kind: ErrorKind::Unavailable, reason: Reason::WorkerLost, detail: String::new() }
    }

    #[test]
    fn six_phases_and_the_end() {
        let mut turn = until(Phase::Yield);
        let last = done(0, Phase::Yield, output(Phase::Yield));
        let end = turn.end_after(&last).unwrap();
        assert_eq!((end.state, &end.result[..]), (WorkState::Succeeded, &b"a"[..]));
        turn.apply(Entry::PhaseDone(last), stamp(7)).unwrap();
        assert_eq!(turn.next(), Next::End(end.clone()));
        turn.apply(Entry::Ended(end), stamp(8)).unwrap();
        assert_eq!((turn.next(), turn.usage().calls), (Next::Nothing, 6));
    }

    #[test]
    fn every_entry_after_the_final_one_is_refused() {
        let mut turn = accepted();
        turn.apply(Entry::Ended(ended(WorkState::Failed, Reason::ModelRefused)), stamp(2)).unwrap();
        let before = turn.clone();
        for entry in [
            Entry::PhaseDone(done(0, Phase::Action, output(Phase::Action))),
            Entry::Waiting(Reason::NoOffer),
            Entry::Resumed(Reason::OfferAppeared),
            Entry::CancelRequested(Reason::CancelRequested),
            Entry::Ended(ended(WorkState::Succeeded, Reason::Completed)),
        ] {
            assert!(turn.apply(entry, stamp(3)).is_err());
        }
        assert_eq!(turn, before);
    }

    #[test]
    fn a_step_is_folded_once() {
        let mut turn = until(Phase::Experience);
        assert!(
            turn.apply(Entry::PhaseDone(done(0, Phase::Action, output(Phase::Action))), stamp(3))
                .is_err()
        );
        assert!(
            turn.apply(Entry::PhaseDone(done(0, Phase::Yield, output(Phase::Yield))), stamp(3))
                .is_err()
        );
    }

    #[test]
    fn an_interrupted_step_is_begun_again_in_the_journal() {
        let mut turn = until(Phase::Intention);
        turn.interrupt();
        let Next::Begin(began) = turn.next() else { panic!("{:?}", turn.next()) };
        assert_eq!((began.step.phase, began.attempt), (Phase::Intention, 2));
        turn.apply(Entry::StepBegan(began), stamp(4)).unwrap();
        let step = StepKey { cycle: 0, phase: Phase::Intention };
        assert_eq!(turn.next(), Next::Run { step, attempt: 2 });
    }

    #[test]
    fn attempts_end_in_a_dead_letter() {
        let mut turn = accepted();
        for attempt in 1..3 {
            let entry = turn.failed(attempt, lost());
            assert!(matches!(&entry, Entry::StepBegan(began) if began.attempt == attempt + 1));
            turn.apply(entry, stamp(u64::from(attempt) + 1)).unwrap();
        }
        let Entry::Ended(end) = turn.failed(3, lost()) else { panic!("a fourth attempt") };
        assert_eq!((end.state, end.reason), (WorkState::DeadLettered, Reason::WorkerLost));
        turn.interrupt();
        assert!(matches!(turn.next(), Next::End(end) if end.state == WorkState::DeadLettered));
    }

    #[test]
    fn a_refusal_of_the_model_is_the_end() {
        let refused = Failure {
            kind: ErrorKind::Invalid,
            reason: Reason::ModelRefused,
            detail: "why".into(),
        };
        let Entry::Ended(end) = accepted().failed(1, refused) else { panic!("tried again") };
        assert_eq!((end.state, end.detail.as_str()), (WorkState::Failed, "why"));
    }

    #[test]
    fn a_cancel_outlives_the_phase_that_ended_after_it() {
        let mut turn = accepted();
        turn.apply(Entry::CancelRequested(Reason::CancelRequested), stamp(2)).unwrap();
        turn.apply(Entry::PhaseDone(done(0, Phase::Action, output(Phase::Action))), stamp(3))
            .unwrap();
        assert!(matches!(turn.next(), Next::End(end) if end.state == WorkState::Cancelled));
    }

    #[test]
    fn a_result_over_the_limit_fails() {
        let turn = until(Phase::Yield);
        let answer = format!(r#"{{"answer":"{}"}}"#, "x".repeat(RESULT_BYTES_MAX + 1));
        let end = turn.end_after(&done(0, Phase::Yield, &answer)).unwrap();
        assert_eq!((end.state, end.reason), (WorkState::Failed, Reason::ResultTooLarge));
    }

    #[test]
    fn a_chain_that_never_yields_fails_at_its_cap() {
        let mut turn = until(Phase::Understanding);
        let again = |cycle| done(cycle, Phase::Understanding, r#"{"decision":"action"}"#);
        turn.apply(Entry::PhaseDone(again(0)), stamp(6)).unwrap();
        for phase in Phase::ALL.into_iter().take(4) {
            turn.apply(Entry::PhaseDone(done(1, phase, output(phase))), stamp(7)).unwrap();
        }
        let end = turn.end_after(&again(1)).unwrap();
        assert_eq!((end.state, end.reason), (WorkState::Failed, Reason::CycleLimit));
    }
}
