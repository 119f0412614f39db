//! The phases of a turn: which comes next, what each must find, and what each found.
//!
//! A phase's answer is a JSON object; its typed form here is the contract between models and agents. Nothing here calls a
//! model.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::step::{Onward, StepKey};
use crate::{Error, Reason};

/// The six phases of the PostChain, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// A first answer.
    Action,
    /// What is known from earlier.
    Experience,
    /// What is wanted.
    Intention,
    /// What the text shows.
    Observation,
    /// Whether that is enough.
    Understanding,
    /// The answer.
    Yield,
}

impl Phase {
    pub const ALL: [Self; 6] = [
        Self::Action,
        Self::Experience,
        Self::Intention,
        Self::Observation,
        Self::Understanding,
        Self::Yield,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Action => "action",
            Self::Experience => "experience",
            Self::Intention => "intention",
            Self::Observation => "observation",
            Self::Understanding => "understanding",
            Self::Yield => "yield",
        }
    }

    /// Its number on disk and on the wire, from 1.
    pub fn code(self) -> u32 {
        self as u32 + 1
    }

    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.code() == code)
    }

    /// The capability by which a pool for it is found.
    pub fn capability(self) -> String {
        format!("phase/{self}")
    }

    fn after(self) -> Option<Self> {
        Self::ALL.get(self as usize + 1).copied()
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Phase {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.into_iter().find(|phase| phase.as_str() == text);
        found.ok_or_else(|| {
            Error::malformed(
                "phase",
                text,
                "action, experience, intention, observation, understanding or yield",
            )
        })
    }
}

/// What Understanding decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    Yield,
    Action,
}

/// A first answer, and the sentences that it rests on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    pub draft: String,
    #[serde(default)]
    pub sentences: Vec<String>,
}

/// Earlier findings of this agent that bear on the text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experience {
    #[serde(default)]
    pub recalled: Vec<String>,
}

/// What the asker wants to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intention {
    #[serde(default)]
    pub questions: Vec<String>,
    #[serde(default)]
    pub goal: String,
}

/// Key terms, and the sentences that bear on them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    #[serde(default)]
    pub terms: Vec<String>,
    #[serde(default)]
    pub sentences: Vec<String>,
}

/// Whether to answer now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Understanding {
    pub decision: Decision,
    #[serde(default)]
    pub why: String,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Yield {
    pub answer: String,
}

/// The typed state of one phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Action(Action),
    Experience(Experience),
    Intention(Intention),
    Observation(Observation),
    Understanding(Understanding),
    Yield(Yield),
}

impl Output {
    /// Reads a model's answer for `phase`. Fields that this version does not know are passed over.
    ///
    /// # Errors
    /// The answer is not a JSON object with the fields that the phase needs.
    pub fn parse(phase: Phase, json: &[u8]) -> Result<Self, Error> {
        fn read<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, Error> {
            serde_json::from_slice(json).map_err(|_| {
                let shown = String::from_utf8_lossy(&json[..json.len().min(80)]);
                Error::malformed(
                    "answer of a phase",
                    &shown,
                    "a JSON object with the fields of the phase",
                )
            })
        }
        Ok(match phase {
            Phase::Action => Self::Action(read(json)?),
            Phase::Experience => Self::Experience(read(json)?),
            Phase::Intention => Self::Intention(read(json)?),
            Phase::Observation => Self::Observation(read(json)?),
            Phase::Understanding => Self::Understanding(read(json)?),
            Phase::Yield => Self::Yield(read(json)?),
        })
    }

    /// What it found, in one line of at most 160 characters.
    pub fn summary(&self) -> String {
        let text = match self {
            Self::Action(action) => action.draft.clone(),
            Self::Experience(experience) => match experience.recalled.len() {
                0 => "nothing recalled".to_owned(),
                n => format!("{n} recalled: {}", experience.recalled[0]),
            },
            Self::Intention(intention) => match intention.questions.first() {
                Some(question) => question.clone(),
                None => intention.goal.clone(),
            },
            Self::Observation(observation) => observation.terms.join(", "),
            Self::Understanding(Understanding { decision: Decision::Yield, why }) => {
                format!("yield: {why}")
            }
            Self::Understanding(Understanding { decision: Decision::Action, why }) => {
                format!("back to action: {why}")
            }
            Self::Yield(answer) => answer.answer.clone(),
        };
        one_line(&text, 160)
    }
}

/// `text` with every run of white space as one space, cut to `chars_max` characters.
pub(crate) fn one_line(text: &str, chars_max: usize) -> String {
    let mut line = String::new();
    let mut chars = 0;
    for word in text.split_whitespace() {
        let space = usize::from(!line.is_empty());
        let len = word.chars().count();
        if chars_max < chars + space + len {
            let room = chars_max.saturating_sub(chars + space + 1);
            if space == 1 && 0 < room {
                line.push(' ');
            }
            line.extend(word.chars().take(room));
            line.push('…');
            return line.chars().take(chars_max).collect();
        }
        if space == 1 {
            line.push(' ');
        }
        line.push_str(word);
        chars += space + len;
    }
    line
}

/// One step of a chain: a phase, in which cycle (0 for the first).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PhaseKey {
    pub cycle: u32,
    pub phase: Phase,
}

impl PhaseKey {
    pub const FIRST: Self = Self { cycle: 0, phase: Phase::Action };
}

/// Decides what follows the step `done`, which found `output`.
pub fn onward(done: PhaseKey, output: &Output, cycles_max: u32) -> Onward {
    match output {
        Output::Yield(answer) => Onward::Answer(answer.answer.clone()),
        Output::Understanding(Understanding { decision: Decision::Action, .. })
            if done.cycle < cycles_max =>
        {
            Onward::Step(StepKey::phase(done.cycle + 1, Phase::Action))
        }
        Output::Understanding(Understanding { decision: Decision::Action, .. }) => {
            Onward::Stop(Reason::CycleLimit)
        }
        Output::Action(_)
        | Output::Experience(_)
        | Output::Intention(_)
        | Output::Observation(_)
        | Output::Understanding(Understanding { decision: Decision::Yield, .. }) => {
            let phase = done.phase.after().expect("only yield is last, and it answers");
            Onward::Step(StepKey::phase(done.cycle, phase))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn understanding(decision: Decision) -> Output {
        Output::Understanding(Understanding { decision, why: String::new() })
    }

    fn at(cycle: u32, phase: Phase) -> PhaseKey {
        PhaseKey { cycle, phase }
    }

    fn step(cycle: u32, phase: Phase) -> Onward {
        Onward::Step(StepKey::phase(cycle, phase))
    }

    #[test]
    fn phases_follow_each_other_and_yield_answers() {
        let action = Output::Action(Action { draft: "d".into(), sentences: vec![] });
        assert_eq!(onward(at(0, Phase::Action), &action, 0), step(0, Phase::Experience));
        let decided = understanding(Decision::Yield);
        assert_eq!(onward(at(1, Phase::Understanding), &decided, 3), step(1, Phase::Yield));
        let answer = Output::Yield(Yield { answer: "a".into() });
        assert_eq!(onward(at(1, Phase::Yield), &answer, 3), Onward::Answer("a".into()));
    }

    #[test]
    fn understanding_goes_back_to_action_until_the_cap() {
        let again = understanding(Decision::Action);
        assert_eq!(onward(at(0, Phase::Understanding), &again, 1), step(1, Phase::Action));
        assert_eq!(
            onward(at(1, Phase::Understanding), &again, 1),
            Onward::Stop(Reason::CycleLimit)
        );
        assert_eq!(
            onward(at(0, Phase::Understanding), &again, 0),
            Onward::Stop(Reason::CycleLimit)
        );
    }

    #[test]
    fn an_answer_is_read_by_its_phase() {
        let parsed = Output::parse(
            Phase::Understanding,
            br#"{"phase":"understanding","decision":"yield","x":1}"#,
        );
        assert_eq!(parsed, Ok(understanding(Decision::Yield)));
        assert!(Output::parse(Phase::Understanding, br#"{"decision":"perhaps"}"#).is_err());
        assert!(Output::parse(Phase::Yield, b"rubbish").is_err());
    }

    #[test]
    fn a_summary_is_one_short_line() {
        let long = Output::Yield(Yield { answer: "word \n".repeat(500) });
        assert!(long.summary().chars().count() <= 160);
        assert_eq!(one_line("a \n b", 10), "a b");
        assert_eq!(one_line("abcdefgh", 4), "abc…");
    }
}
