//! What the simulated phase workers find, and so what the model expects: a function of the input alone.

use bytes::Bytes;
use domain::chain::{Phase, StepKey};

/// Whether the chain of this input goes back to Action after this cycle.
fn goes_back(input: &str, cycle: u32) -> bool {
    cycle == 0 && input.ends_with('+')
}

/// The step that is due after `last`; none after the end.
pub(crate) fn after(input: &str, last: Option<StepKey>) -> Option<StepKey> {
    let Some(StepKey { cycle, phase }) = last else { return Some(StepKey::FIRST) };
    let step = |cycle, phase| Some(StepKey { cycle, phase });
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

pub(crate) fn output(step: StepKey, input: &str) -> Bytes {
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
    format!("{input}: of {input}")
}
