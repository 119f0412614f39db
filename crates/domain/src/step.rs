//! What a step of a turn is called, and what is decided after one.

use std::fmt;

use crate::chain::{Phase, PhaseKey};
use crate::{Epoch, Reason, WorkId};

/// One outside effect of a turn. Their order is the one in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StepKey {
    /// Of a chain.
    Phase(PhaseKey),
    /// Of a loop: a call, by its round.
    Call(CallKey),
}

/// One call of a loop. Rounds and indices count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallKey {
    pub round: u32,
    pub of: Callee,
}

/// Who is called. A round begins with the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Callee {
    Model,
    /// The tool call of this index among those that the model asked for in this round.
    Tool(u32),
}

/// What a step is, for people and for lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepKind {
    Phase,
    Model,
    Tool,
}

/// One attempt at a step: what an answer is addressed to, whoever owns the agent when it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attempt {
    pub work: WorkId,
    pub step: StepKey,
    /// Of the owner that began it.
    pub epoch: Epoch,
    /// 1 for the first.
    pub number: u32,
}

/// What a turn does after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Onward {
    Step(StepKey),
    /// The answer.
    Answer(String),
    /// It may not go on.
    Stop(Reason),
}

impl StepKey {
    pub fn phase(cycle: u32, phase: Phase) -> Self {
        Self::Phase(PhaseKey { cycle, phase })
    }

    pub fn model(round: u32) -> Self {
        Self::Call(CallKey { round, of: Callee::Model })
    }

    pub fn tool(round: u32, index: u32) -> Self {
        Self::Call(CallKey { round, of: Callee::Tool(index) })
    }

    pub fn is_tool(self) -> bool {
        self.kind() == StepKind::Tool
    }

    pub fn kind(self) -> StepKind {
        match self {
            Self::Phase(_) => StepKind::Phase,
            Self::Call(CallKey { of: Callee::Model, .. }) => StepKind::Model,
            Self::Call(CallKey { of: Callee::Tool(_), .. }) => StepKind::Tool,
        }
    }

    /// Under which a provider or a tool knows it. The same for every attempt, so that whoever knows the key need not work
    /// twice.
    pub fn idempotency_key(self, work: &str) -> String {
        match self {
            Self::Phase(PhaseKey { cycle, phase }) => format!("{work}/{cycle}/{phase}"),
            Self::Call(CallKey { round, of: Callee::Model }) => format!("{work}/{round}/model"),
            Self::Call(CallKey { round, of: Callee::Tool(index) }) => {
                format!("{work}/{round}/tool-{index}")
            }
        }
    }
}

impl StepKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Phase => "phase",
            Self::Model => "model",
            Self::Tool => "tool",
        }
    }
}

impl fmt::Display for StepKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Phase(PhaseKey { cycle: 0, phase }) => write!(f, "phase {phase}"),
            Self::Phase(PhaseKey { cycle, phase }) => write!(f, "phase {phase} of cycle {cycle}"),
            Self::Call(CallKey { round, of: Callee::Model }) => {
                write!(f, "model call of round {round}")
            }
            Self::Call(CallKey { round, of: Callee::Tool(index) }) => {
                write!(f, "tool call {index} of round {round}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_ordered_as_they_come() {
        let calls =
            [StepKey::model(0), StepKey::tool(0, 0), StepKey::tool(0, 1), StepKey::model(1)];
        assert!(calls.is_sorted());
        let phases = [StepKey::phase(0, Phase::Yield), StepKey::phase(1, Phase::Action)];
        assert!(phases.is_sorted());
    }

    #[test]
    fn every_step_of_a_work_has_a_key_of_its_own() {
        let steps = [
            StepKey::phase(0, Phase::Action),
            StepKey::phase(1, Phase::Action),
            StepKey::model(0),
            StepKey::tool(0, 0),
            StepKey::tool(0, 1),
            StepKey::tool(1, 0),
        ];
        let keys: std::collections::BTreeSet<_> =
            steps.iter().map(|step| step.idempotency_key("w-0-000-1")).collect();
        assert_eq!(keys.len(), steps.len());
    }
}
