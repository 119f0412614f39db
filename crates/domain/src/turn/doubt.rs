//! Steps that must not be made twice: which of them need an intent, when one is in doubt, and what becomes of it.
//!
//! Nobody probes or repeats a step in doubt before its own deadline and five seconds more: its call may be under way
//! until then.

use bytes::Bytes;

use super::{DOUBT_HOLD_MS, Onward, Stop, Turn, ended};
use crate::definition::Policy;
use crate::entry::{
    Ended, Entry, Resolution, Stamp, StepDone, StepDoubted, StepIntended, StepResolved, Usage,
    Verdict,
};
use crate::round::Returned;
use crate::step::StepKey;
use crate::{Attempt, Epoch, Reason, WorkState};

/// What happens when a step is run twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The same as when it is run once.
    Idempotent,
    /// Its effect happens again.
    Once,
}

/// What a tool says about an attempt that is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reconciled {
    Done,
    /// It was not, and will not be: should it come later, the tool refuses it.
    NotDone,
    Unknown,
}

/// A step that is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doubted<'a> {
    pub step: StepKey,
    pub attempt: u32,
    pub tool: &'a str,
    /// Its number within the work, from 1.
    pub sequence: u32,
}

/// So often a tool is asked that is not there, or breaks off; then nobody knows.
pub const PROBES_MAX: u32 = 10;

/// How often the tool of an attempt in doubt was asked in vain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probes(Option<(Attempt, u32)>);

impl Probes {
    /// Once more. Whether it is to be asked no more: what it says is [`Reconciled::Unknown`].
    pub fn failed(&mut self, attempt: Attempt) -> bool {
        let before = self.0.filter(|(known, _)| *known == attempt);
        let count = before.map_or(0, |(_, count)| count) + 1;
        self.0 = (count < PROBES_MAX).then_some((attempt, count));
        PROBES_MAX <= count
    }
}

/// Which step a signal is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Which {
    /// Its number within the work, from 1; 0: any.
    pub sequence: u32,
    /// Empty: any.
    pub name: String,
    /// Which attempt of it; 0: any. Without it a signal that is repeated may be taken for one about the next attempt.
    pub attempt: u32,
}

impl Which {
    pub fn is(&self, sequence: u32, name: &str, attempt: u32) -> bool {
        (self.sequence == 0 || self.sequence == sequence)
            && (self.name.is_empty() || self.name == name)
            && (self.attempt == 0 || self.attempt == attempt)
    }
}

/// What to do with a signal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signalled {
    Journal(Vec<Entry>),
    /// It was given before: the work is as it made it.
    Known,
    /// The work is not in doubt on that step.
    Refused,
}

impl Turn {
    /// Whether an intent has to be in the journal before the next step is begun.
    pub fn needs_intent(&self, effect: Effect) -> bool {
        effect == Effect::Once && !self.is_intended()
    }

    pub(super) fn is_intended(&self) -> bool {
        self.intended_until_ms.is_some()
    }

    /// Until when the answer of the step that was intended is waited for.
    pub fn intended_until_ms(&self) -> Option<i64> {
        self.intended_until_ms
    }

    /// The intent to begin `attempt` of the tool's call that is due.
    pub fn intend(&self, work: &str, attempt: u32, deadline_ms: i64) -> Option<StepIntended> {
        let (Onward::Step(step), Some(call)) = (&self.onward, self.tool_call()) else {
            return None;
        };
        let key = step.idempotency_key(work);
        Some(StepIntended { step: *step, attempt, tool: call.tool.clone(), key, deadline_ms })
    }

    pub(super) fn doubt(&mut self, doubted: &StepDoubted, stamp: Stamp) {
        let until_ms = self.intended_until_ms.unwrap_or(stamp.ts_ms);
        self.attempt(doubted.attempt);
        self.not_before_ms = until_ms.saturating_add(DOUBT_HOLD_MS);
        self.doubted_at_ms = stamp.ts_ms;
        self.enter(WorkState::InDoubt, doubted.reason);
    }

    /// How long an owner in `epoch` leaves the step in doubt alone after it opened the shard, by its own clock: as long as
    /// the call of the owner before it may take, and five seconds. Two machines' clocks may differ.
    pub fn hold_after_opening_ms(&self, epoch: Epoch) -> u64 {
        if self.not_before_ms == 0 {
            return 0;
        }
        let last = self.entries.iter().rev().find_map(|(stamp, entry)| match entry {
            Entry::StepIntended(intended) => Some((stamp, intended.deadline_ms)),
            Entry::ShardOpened(_)
            | Entry::Accepted(_)
            | Entry::StepBegan(_)
            | Entry::StepDone(_)
            | Entry::StepDoubted(_)
            | Entry::StepResolved(_)
            | Entry::Waiting(_)
            | Entry::Resumed(_)
            | Entry::CancelRequested(_)
            | Entry::Ended(_) => None,
        });
        let Some((stamp, deadline_ms)) = last.filter(|(stamp, _)| stamp.epoch < epoch) else {
            return 0;
        };
        let hold_ms = deadline_ms.saturating_sub(stamp.ts_ms).max(0).saturating_add(DOUBT_HOLD_MS);
        hold_ms.unsigned_abs()
    }

    pub(super) fn end_doubt(&mut self, stamp: Stamp) {
        if self.state == WorkState::InDoubt {
            // The owner's clock may have gone back.
            self.doubted_ms += stamp.ts_ms.saturating_sub(self.doubted_at_ms).max(0);
        }
    }

    /// The step that is in doubt.
    pub fn doubted(&self) -> Option<Doubted<'_>> {
        let Onward::Step(step) = self.onward else { return None };
        if self.state != WorkState::InDoubt {
            return None;
        }
        let tool = self.tool_call().map_or("", |call| call.tool.as_str());
        let sequence = u32::try_from(self.steps().count() + 1).unwrap_or(u32::MAX);
        Some(Doubted { step, attempt: self.begun, tool, sequence })
    }

    /// What is journaled when the work is stopped. A call that must not be made twice and may be under way goes into doubt
    /// before: whoever reads the end must not take it for a call that was not made.
    pub fn stopped(&self, stop: Stop) -> Vec<Entry> {
        let (state, reason) = (stop.state(), stop.reason());
        let mut entries = Vec::new();
        let mut detail = String::new();
        if let Onward::Step(step) = self.onward
            && (self.is_intended() || self.state == WorkState::InDoubt)
        {
            let tool = self.tool_call().map_or("", |call| call.tool.as_str());
            detail = format!("whether {step} ({tool}) was done is not known");
            if self.state != WorkState::InDoubt {
                entries.push(Entry::StepDoubted(StepDoubted { step, attempt: self.begun, reason }));
            }
        }
        if stop == Stop::Cancel {
            entries.push(Entry::CancelRequested(reason));
        }
        entries.push(Entry::Ended(Ended { detail, ..ended(state, reason) }));
        entries
    }

    /// What becomes of the step in doubt, now that its tool was asked. None: a person has to say.
    pub fn judge(&self, reconciled: Reconciled) -> Option<Verdict> {
        match (reconciled, self.limits.in_doubt) {
            (Reconciled::Done, _) => Some(Verdict::ToolDone),
            (Reconciled::NotDone, _) => Some(Verdict::ToolNotDone),
            (Reconciled::Unknown, Policy::Fail) => Some(Verdict::PolicyFail),
            (Reconciled::Unknown, Policy::Retry) => Some(Verdict::PolicyRetry),
            (Reconciled::Unknown, Policy::Ask) => None,
        }
    }

    /// What is journaled when the doubt is resolved. `returned` is what the step came to if it was done, `node` who says so.
    pub fn resolve(
        &self,
        verdict: Verdict,
        returned: &Returned,
        node: &str,
        now_ms: i64,
    ) -> Vec<Entry> {
        let Some(Doubted { step, attempt, tool, .. }) = self.doubted() else { return Vec::new() };
        let resolved = Entry::StepResolved(StepResolved { step, attempt, verdict });
        let end = |state, reason| {
            let detail = format!("whether {step} ({tool}) was done is not known");
            Entry::Ended(Ended { detail, ..ended(state, reason) })
        };
        // A person may try as often as they like.
        let is_spent = self.limits.attempts_max <= attempt && verdict != Verdict::PersonRetry;
        match verdict.resolution() {
            Resolution::Retry if is_spent => {
                vec![resolved, end(WorkState::DeadLettered, Reason::WorkerLost)]
            }
            Resolution::Retry => vec![resolved],
            Resolution::Fail => vec![resolved, end(WorkState::Failed, Reason::StepInDoubt)],
            Resolution::Done => {
                let done = StepDone {
                    step,
                    name: tool.to_owned(),
                    output: Bytes::from(returned.to_json()),
                    node: node.to_owned(),
                    attempts: attempt,
                    start_ms: self.doubted_at_ms,
                    end_ms: now_ms,
                    usage: Usage::default(),
                };
                vec![resolved, Entry::StepDone(done)]
            }
        }
    }

    /// A person says what became of a step.
    pub fn signal(
        &self,
        which: &Which,
        verdict: Verdict,
        returned: &Returned,
        now_ms: i64,
    ) -> Signalled {
        match self.doubted() {
            Some(doubted) if which.is(doubted.sequence, doubted.tool, doubted.attempt) => {
                Signalled::Journal(self.resolve(verdict, returned, "", now_ms))
            }
            Some(_) | None if self.was_resolved(which, verdict) => Signalled::Known,
            Some(_) | None => Signalled::Refused,
        }
    }

    fn was_resolved(&self, which: &Which, verdict: Verdict) -> bool {
        self.verdicts().any(|(step, given)| {
            given == verdict && which.is(step.sequence, step.tool, step.attempt)
        })
    }

    /// The verdicts so far, each with the step that it was about.
    fn verdicts(&self) -> impl Iterator<Item = (Doubted<'_>, Verdict)> {
        let (mut sequence, mut tool) = (1, "");
        self.entries.iter().filter_map(move |(_, entry)| match entry {
            Entry::StepDone(_) => {
                sequence += 1;
                None
            }
            Entry::StepIntended(intended) => {
                tool = &intended.tool;
                None
            }
            Entry::StepResolved(StepResolved { step, attempt, verdict }) => {
                let (step, attempt) = (*step, *attempt);
                Some((Doubted { step, attempt, tool, sequence }, *verdict))
            }
            Entry::ShardOpened(_)
            | Entry::Accepted(_)
            | Entry::StepBegan(_)
            | Entry::StepDoubted(_)
            | Entry::Waiting(_)
            | Entry::Resumed(_)
            | Entry::CancelRequested(_)
            | Entry::Ended(_) => None,
        })
    }
}

#[cfg(test)]
mod tests;
