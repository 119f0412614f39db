//! What an agent is.

use std::str::FromStr;

use crate::{DefinitionName, Error};

/// How an agent works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// A chain of phases.
    Chain,
    /// The model answers, or asks for tools and is asked again.
    Loop,
}

/// What becomes of a step in doubt when the tool does not know either.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The work fails.
    Fail,
    /// The step is run again.
    Retry,
    /// A person is waited for.
    #[default]
    Ask,
}

impl Policy {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Retry => "retry",
            Self::Ask => "ask",
        }
    }
}

impl FromStr for Policy {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let found = [Self::Fail, Self::Retry, Self::Ask].into_iter().find(|it| it.as_str() == text);
        found.ok_or_else(|| Error::malformed("policy", text, "fail, retry or ask"))
    }
}

/// One version of a definition. Checked: a value that exists can be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    pub name: DefinitionName,
    pub behaviour: Behaviour,
    pub model: String,
    pub instructions: String,
    pub modality: String,
    /// How often a chain may go back to Action.
    pub cycles_max: u32,
    /// How often a step is begun before its work is given up.
    pub attempts_max: u32,
    /// Which tools a loop may call.
    pub tools: Vec<String>,
    /// How often the model of a loop is asked. 0 for a chain.
    pub rounds_max: u32,
    pub in_doubt: Policy,
}

/// The name of the definition that every tenant has.
pub const POSTCHAIN: &str = "postchain";

/// The models that every node has.
pub const BUILT_IN_MODELS: [&str; 3] = ["extractive", "noop", "script"];

/// How often the model of a loop is asked, unless its definition says otherwise.
pub const ROUNDS_DEFAULT: u32 = 10;
const TOOLS_MAX: usize = 64;

const INSTRUCTIONS_BYTES_MAX: usize = 64 * 1024;

/// Which field of a definition is wrong, and how.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field {field}: {why}")]
pub struct Invalid {
    pub field: &'static str,
    pub why: String,
}

impl Definition {
    /// The built-in PostChain.
    pub fn postchain() -> Self {
        Self {
            name: POSTCHAIN.parse().expect("a valid name"),
            behaviour: Behaviour::Chain,
            model: "extractive".to_owned(),
            instructions: String::new(),
            modality: "text".to_owned(),
            cycles_max: 3,
            attempts_max: 5,
            tools: Vec::new(),
            rounds_max: 0,
            in_doubt: Policy::default(),
        }
    }

    /// # Errors
    /// A limit that is not kept.
    pub fn check(self) -> Result<Self, Invalid> {
        let refuse = |field, why: String| Err(Invalid { field, why });
        if INSTRUCTIONS_BYTES_MAX < self.instructions.len() {
            return refuse(
                "instructions",
                format!("at most {INSTRUCTIONS_BYTES_MAX} bytes are allowed"),
            );
        }
        if 100 < self.cycles_max {
            return refuse("cycles_max", "0 to 100 are allowed".to_owned());
        }
        if self.attempts_max == 0 || 100 < self.attempts_max {
            return refuse("attempts_max", "1 to 100 are allowed".to_owned());
        }
        self.check_behaviour()?;
        for (field, text) in [("model", &self.model), ("modality", &self.modality)] {
            let valid: Result<DefinitionName, Error> = text.parse();
            if let Err(error) = valid {
                return refuse(field, error.to_string());
            }
        }
        Ok(self)
    }

    fn check_behaviour(&self) -> Result<(), Invalid> {
        let refuse = |field, why: String| Err(Invalid { field, why });
        match self.behaviour {
            Behaviour::Chain if !self.tools.is_empty() => {
                refuse("tools", "only a loop calls tools".to_owned())
            }
            Behaviour::Chain if self.rounds_max != 0 => {
                refuse("rounds_max", "only a loop has rounds".to_owned())
            }
            Behaviour::Chain if self.in_doubt != Policy::default() => {
                refuse("in_doubt", "only a loop has steps that can be in doubt".to_owned())
            }
            Behaviour::Chain => Ok(()),
            Behaviour::Loop if self.rounds_max == 0 || 100 < self.rounds_max => {
                refuse("rounds_max", "1 to 100 are allowed".to_owned())
            }
            Behaviour::Loop if self.cycles_max != 0 => {
                refuse("cycles_max", "only a chain has cycles".to_owned())
            }
            Behaviour::Loop if TOOLS_MAX < self.tools.len() => {
                refuse("tools", format!("at most {TOOLS_MAX} are allowed"))
            }
            Behaviour::Loop => {
                let names = self.tools.iter().map(|tool| tool.parse::<DefinitionName>());
                match names.collect::<Result<Vec<_>, _>>() {
                    Ok(_) => Ok(()),
                    Err(error) => refuse("tools", error.to_string()),
                }
            }
        }
    }
}
