//! The built-in model: takes sentences, key terms and questions out of a text. Needs no network.
//!
//! No language model: it never says anything that the text does not, and every answer says so. The same request always
//! gets the same answer.

mod analysis;
mod markdown;
mod phases;
mod sentences;
mod terms;
mod words;

use domain::Phase;
use futures::stream::BoxStream;

use crate::{Chunk, Error, Model, Request, Task, reply};
use phases::Given;

const NAME: &str = "extractive";
const NOTE: &str =
    "extractive: sentences and terms taken from the text; no language model was used";

/// A smaller text is read in less time than it takes to hand it to another thread.
const INLINE_BYTES_MAX: usize = 32 * 1_024;

#[derive(Clone, Copy, Debug)]
pub struct Extractive;

impl Model for Extractive {
    fn name(&self) -> &str {
        NAME
    }

    fn call<'a>(&'a self, request: &'a Request) -> BoxStream<'a, Result<Chunk, Error>> {
        reply::at_once(answer(request))
    }
}

async fn answer(request: &Request) -> Result<String, Error> {
    let phase = match &request.task {
        Task::Phase(name) => Some(reply::known_phase(NAME, name)?),
        Task::Answer => None,
    };
    let given = Given::read(&request.messages);
    if given.bytes() <= INLINE_BYTES_MAX {
        return Ok(work(phase, &given));
    }
    let work = tokio::task::spawn_blocking(move || work(phase, &given));
    work.await.map_err(|error| Error::Unavailable {
        model: NAME.to_owned(),
        reason: error.to_string(),
        retry_after_ms: None,
    })
}

/// The answer for a phase, or the plain one.
fn work(phase: Option<Phase>, given: &Given) -> String {
    match phase {
        Some(phase) => reply::json(phase, NAME, NOTE, &phases::found(phase, given)),
        None => phases::answer(given),
    }
}

#[cfg(test)]
mod tests;
