//! A model that answers at once and without looking, so that measurements show only our own work.

use domain::Phase;
use domain::chain::{Action, Decision, Experience, Intention, Observation, Understanding, Yield};
use futures::stream::BoxStream;

use crate::reply::{self, Found};
use crate::{Chunk, Error, Model, Request, Task};

const NAME: &str = "noop";
const NOTE: &str = "noop: a constant; the text was not read and no language model was used";

#[derive(Clone, Copy, Debug)]
pub struct Noop;

impl Model for Noop {
    fn name(&self) -> &str {
        NAME
    }

    fn call<'a>(&'a self, request: &'a Request) -> BoxStream<'a, Result<Chunk, Error>> {
        reply::at_once(std::future::ready(answer(&request.task)))
    }
}

fn answer(task: &Task) -> Result<String, Error> {
    match task {
        Task::Phase(name) => {
            let phase = reply::known_phase(NAME, name)?;
            Ok(reply::json(phase, NAME, NOTE, &found(phase)))
        }
        Task::Answer => Ok(NOTE.to_owned()),
    }
}

fn found(phase: Phase) -> Found {
    match phase {
        Phase::Action => Found::Action(Action { draft: NAME.to_owned(), sentences: vec![] }),
        Phase::Experience => Found::Experience(Experience { recalled: vec![] }),
        Phase::Intention => {
            Found::Intention(Intention { questions: vec![], goal: NAME.to_owned() })
        }
        Phase::Observation => Found::Observation(Observation { terms: vec![], sentences: vec![] }),
        Phase::Understanding => {
            Found::Understanding(Understanding { decision: Decision::Yield, why: NAME.to_owned() })
        }
        Phase::Yield => Found::Yield(Yield { answer: NOTE.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Registry, complete};

    #[tokio::test]
    async fn every_phase_gets_a_small_object_that_names_phase_and_model() {
        let model = Registry::default().get("noop").unwrap();
        for phase in Phase::ALL {
            let task = Task::Phase(phase.as_str().to_owned());
            let request = Request {
                task,
                messages: vec![],
                idempotency_key: String::new(),
                tools: vec![],
                max_output_bytes: 256,
            };
            let completion = complete(model.as_ref(), &request, |_| {}).await.unwrap();
            assert_eq!(completion.usage.calls, 1);
            let json: serde_json::Value = serde_json::from_str(&completion.text).unwrap();
            assert_eq!(json["phase"], phase.as_str());
            assert_eq!(json["model"], "noop");
            match phase {
                Phase::Understanding => assert_eq!(json["decision"], "yield"),
                Phase::Yield => assert!(json["answer"].is_string()),
                Phase::Action => assert!(json["draft"].is_string()),
                Phase::Experience | Phase::Intention | Phase::Observation => {}
            }
        }
    }

    #[tokio::test]
    async fn an_unknown_phase_is_refused_by_name() {
        let error = answer(&Task::Phase("dream".to_owned())).unwrap_err();
        assert!(error.to_string().contains("dream"), "{error}");
    }
}
