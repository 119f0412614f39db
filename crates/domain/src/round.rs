//! The rounds of a loop: the model answers, or asks for tools and is asked again with what they returned.
//!
//! What a model said and what a tool returned stand in the journal as JSON; their typed forms are here. Nothing here
//! calls anybody.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::chain::one_line;
use crate::step::{Onward, StepKey};
use crate::{Error, Reason};

/// The most tools that a model may ask for in one round.
pub const CALLS_MAX: usize = 16;

/// What a model said in one round.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    #[serde(default)]
    pub text: String,
    /// Called one after another, in this order. None: the text is the answer.
    #[serde(default)]
    pub calls: Vec<ToolCall>,
}

/// A tool that a model asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    pub tool: String,
    #[serde(default)]
    pub arguments: Value,
}

/// What a tool returned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Returned {
    pub output: String,
    /// The tool refused: the output says why. The model may find another way.
    #[serde(default)]
    pub is_error: bool,
}

impl Said {
    /// # Errors
    /// No JSON of this form, or too many calls.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let said: Self = read("answer of a model", json)?;
        if CALLS_MAX < said.calls.len() {
            let (len, max) = (said.calls.len(), CALLS_MAX);
            return Err(Error::TooLong { what: "list of tool calls", len, max });
        }
        Ok(said)
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("texts and JSON are always JSON")
    }

    /// In one line of at most 160 characters.
    pub fn summary(&self) -> String {
        let tools: Vec<&str> = self.calls.iter().map(|call| call.tool.as_str()).collect();
        let text = match tools.is_empty() {
            true => self.text.clone(),
            false => format!("calls {}", tools.join(", ")),
        };
        one_line(&text, 160)
    }
}

impl Returned {
    /// # Errors
    /// No JSON of this form.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        read("answer of a tool", json)
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a text is always JSON")
    }

    /// In one line of at most 160 characters.
    pub fn summary(&self) -> String {
        let refused = if self.is_error { "refused: " } else { "" };
        one_line(&format!("{refused}{}", self.output), 160)
    }
}

fn read<T: serde::de::DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(json).map_err(|_| {
        let shown = String::from_utf8_lossy(&json[..json.len().min(80)]);
        Error::malformed(what, &shown, "a JSON object with the fields of its kind")
    })
}

/// Decides what follows the model's call of `round`, in which it said `said`. In the last round no tool is called: nobody
/// would hear what it returns.
pub fn after_model(round: u32, said: &Said, rounds_max: u32) -> Onward {
    match said.calls.is_empty() {
        true => Onward::Answer(said.text.clone()),
        false if round + 1 < rounds_max => Onward::Step(StepKey::tool(round, 0)),
        false => Onward::Stop(Reason::RoundLimit),
    }
}

/// Decides what follows the call `index` of the `calls` that the model asked for in `round`.
pub fn after_tool(round: u32, index: u32, calls: usize) -> Onward {
    let next = index.saturating_add(1);
    Onward::Step(match usize::try_from(next).is_ok_and(|next| next < calls) {
        true => StepKey::tool(round, next),
        false => StepKey::model(round + 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> ToolCall {
        ToolCall { tool: "count".into(), arguments: Value::Null }
    }

    #[test]
    fn without_calls_the_text_is_the_answer() {
        let said = Said { text: "a".into(), calls: vec![] };
        assert_eq!(after_model(3, &said, 4), Onward::Answer("a".into()));
    }

    #[test]
    fn calls_come_one_after_another_and_then_the_next_round() {
        let said = Said { text: String::new(), calls: vec![call(), call()] };
        assert_eq!(after_model(0, &said, 5), Onward::Step(StepKey::tool(0, 0)));
        assert_eq!(after_tool(0, 0, 2), Onward::Step(StepKey::tool(0, 1)));
        assert_eq!(after_tool(0, 1, 2), Onward::Step(StepKey::model(1)));
    }

    #[test]
    fn rounds_have_a_cap() {
        let said = Said { text: String::new(), calls: vec![call()] };
        assert_eq!(after_model(4, &said, 5), Onward::Stop(Reason::RoundLimit));
    }

    #[test]
    fn what_a_model_said_is_read_within_its_limits() {
        let said = Said { text: "t".into(), calls: vec![call(); CALLS_MAX] };
        assert_eq!(Said::parse(&said.to_json()), Ok(said));
        let many = Said { text: String::new(), calls: vec![call(); CALLS_MAX + 1] };
        assert!(Said::parse(&many.to_json()).is_err());
        assert!(Said::parse(b"rubbish").is_err());
    }
}
