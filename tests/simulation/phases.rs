//! What the simulated workers find, and so what the model expects: a function of the input alone.

use bytes::Bytes;
use domain::DefinitionHash;
use domain::StepKey;
use domain::chain::{Phase, PhaseKey};
use domain::round::{Returned, Said, ToolCall};
use domain::step::{CallKey, Callee};
use domain::turn::doubt::Effect;

/// A tool whose effect happens again when it is called again, and one that may be called twice.
const TOOLS: [(&str, Effect); 2] = [("once", Effect::Once), ("echo", Effect::Idempotent)];

/// Whether the chain of this input goes back to Action after this cycle.
fn goes_back(input: &str, cycle: u32) -> bool {
    cycle == 0 && input.ends_with('+')
}

/// Whether a work with this input is a loop: the model asks for both tools, then answers.
pub(crate) fn is_loop(input: &str) -> bool {
    input.ends_with('*')
}

/// The definition of works with this input.
pub(crate) fn definition(input: &str) -> DefinitionHash {
    DefinitionHash([u8::from(is_loop(input)); 32])
}

/// What happens when the tool of this step is called twice.
pub(crate) fn effect(step: StepKey) -> Effect {
    match step {
        StepKey::Call(CallKey { of: Callee::Tool(index), .. }) => TOOLS[index as usize].1,
        StepKey::Phase(_) | StepKey::Call(CallKey { of: Callee::Model, .. }) => Effect::Idempotent,
    }
}

/// The step that is due after `last`; none after the end.
pub(crate) fn after(input: &str, last: Option<StepKey>) -> Option<StepKey> {
    match last {
        None if is_loop(input) => Some(StepKey::model(0)),
        None => Some(StepKey::phase(0, Phase::Action)),
        Some(StepKey::Phase(key)) => after_phase(input, key),
        Some(StepKey::Call(CallKey { round: 0, of: Callee::Model })) => Some(StepKey::tool(0, 0)),
        Some(StepKey::Call(CallKey { of: Callee::Model, .. })) => None,
        Some(StepKey::Call(CallKey { round, of: Callee::Tool(index) })) => {
            let next = index + 1;
            let is_last = next as usize == TOOLS.len();
            Some(if is_last { StepKey::model(round + 1) } else { StepKey::tool(round, next) })
        }
    }
}

fn after_phase(input: &str, PhaseKey { cycle, phase }: PhaseKey) -> Option<StepKey> {
    let step = |cycle, phase| Some(StepKey::phase(cycle, phase));
    match phase {
        Phase::Action => step(cycle, Phase::Experience),
        Phase::Experience => step(cycle, Phase::Intention),
        Phase::Intention => step(cycle, Phase::Observation),
        Phase::Observation => step(cycle, Phase::Understanding),
        Phase::Understanding if goes_back(input, cycle) => step(cycle + 1, Phase::Action),
        Phase::Understanding => step(cycle, Phase::Yield),
        Phase::Yield => None,
    }
}

pub(crate) fn returned() -> Returned {
    Returned { output: "r".to_owned(), is_error: false }
}

pub(crate) fn output(step: StepKey, input: &str) -> Bytes {
    match step {
        StepKey::Phase(key) => phase_output(key, input),
        StepKey::Call(CallKey { round: 0, of: Callee::Model }) => {
            let call = |(tool, _): &(&str, Effect)| ToolCall {
                tool: (*tool).to_owned(),
                arguments: ().into(),
            };
            let said = Said { text: String::new(), calls: TOOLS.iter().map(call).collect() };
            said.to_json().into()
        }
        StepKey::Call(CallKey { of: Callee::Model, .. }) => {
            Said { text: format!("of {input}"), calls: vec![] }.to_json().into()
        }
        StepKey::Call(CallKey { of: Callee::Tool(_), .. }) => returned().to_json().into(),
    }
}

fn phase_output(step: PhaseKey, input: &str) -> Bytes {
    let text = match step.phase {
        Phase::Action => r#"{"draft":"d"}"#.to_owned(),
        Phase::Experience | Phase::Intention => "{}".to_owned(),
        Phase::Observation => format!(r#"{{"terms":["{input}"]}}"#),
        Phase::Understanding if goes_back(input, step.cycle) => {
            r#"{"decision":"action"}"#.to_owned()
        }
        Phase::Understanding => r#"{"decision":"yield"}"#.to_owned(),
        Phase::Yield => format!(r#"{{"answer":"of {input}"}}"#),
    };
    Bytes::from(text)
}

/// What an agent remembers of a work with this input that succeeded.
pub(crate) fn finding(input: &str) -> String {
    if is_loop(input) { format!("of {input}") } else { format!("{input}: of {input}") }
}
