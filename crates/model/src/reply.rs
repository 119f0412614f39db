//! A built-in model's answer as JSON text: what the phase found, who found it and how.

use domain::Phase;
use domain::chain::{Action, Experience, Intention, Observation, Understanding, Yield};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use serde::Serialize;

use crate::{Chunk, Error, Usage};

/// What a phase found, one variant a phase; the types are those with which `domain` reads them.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Found {
    Action(Action),
    Experience(Experience),
    Intention(Intention),
    Observation(Observation),
    Understanding(Understanding),
    Yield(Yield),
}

#[derive(Serialize)]
struct Reply<'a> {
    phase: Phase,
    model: &'a str,
    note: &'a str,
    #[serde(flatten)]
    found: &'a Found,
}

pub(crate) fn json(phase: Phase, model: &str, note: &str, found: &Found) -> String {
    let reply = Reply { phase, model, note, found };
    serde_json::to_string(&reply).expect("strings and lists of strings are always JSON")
}

/// The phase of this name, or the error for a model that knows only the six.
pub(crate) fn known_phase(model: &str, name: &str) -> Result<Phase, Error> {
    name.parse::<Phase>()
        .map_err(|error| Error::Refused { model: model.to_owned(), reason: error.to_string() })
}

/// An answer that comes in one piece. No tokens are counted: a built-in model has none.
pub(crate) fn at_once<'a, F>(answer: F) -> BoxStream<'a, Result<Chunk, Error>>
where
    F: Future<Output = Result<String, Error>> + Send + 'a,
{
    let chunks = async {
        let usage = Usage { input_tokens: 0, output_tokens: 0, calls: 1 };
        stream::iter(match answer.await {
            Ok(text) => vec![Ok(Chunk::Text(text)), Ok(Chunk::Finished(usage))],
            Err(error) => vec![Err(error)],
        })
    };
    stream::once(chunks).flatten().boxed()
}
