//! What an agent is.

use crate::{DefinitionName, Error};

/// How an agent works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// A chain of phases.
    Chain,
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
}

/// The name of the definition that every tenant has.
pub const POSTCHAIN: &str = "postchain";

/// The models that every node has.
pub const BUILT_IN_MODELS: [&str; 2] = ["extractive", "noop"];

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
        for (field, text) in [("model", &self.model), ("modality", &self.modality)] {
            let valid: Result<DefinitionName, Error> = text.parse();
            if let Err(error) = valid {
                return refuse(field, error.to_string());
            }
        }
        Ok(self)
    }
}
