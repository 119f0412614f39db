//! A model that plays what the work's input says, round by round: for tests and measurements of loops.
//!
//! The input is JSON, `{"calls": [call or list of calls of a round, ...], "answer": "..."}`; a call is
//! `{"tool": "...", "arguments": ...}`. In the answer `{results}` stands for what the tools returned, in order.

use domain::round::{Said, ToolCall};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use serde::Deserialize;

use crate::{Chunk, Error, MessageRole, Model, Part, Request, Task, Usage};

const NAME: &str = "script";

#[derive(Clone, Copy, Debug)]
pub struct Script;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Program {
    #[serde(default)]
    calls: Vec<Round>,
    answer: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Round {
    Many(Vec<ToolCall>),
    One(ToolCall),
}

impl Model for Script {
    fn name(&self) -> &str {
        NAME
    }

    fn call<'a>(&'a self, request: &'a Request) -> BoxStream<'a, Result<Chunk, Error>> {
        let chunks = match play(request) {
            Ok(said) => {
                let calls = said.calls.into_iter().map(Chunk::Call);
                let text = std::iter::once(Chunk::Text(said.text));
                let usage = Usage { input_tokens: 0, output_tokens: 0, calls: 1 };
                text.chain(calls).chain([Chunk::Finished(usage)]).map(Ok).collect()
            }
            Err(error) => vec![Err(error)],
        };
        stream::iter(chunks).boxed()
    }
}

fn play(request: &Request) -> Result<Said, Error> {
    let refused = |reason: String| Error::Refused { model: NAME.to_owned(), reason };
    if request.task != Task::Answer {
        return Err(refused("it plays loops, no phases".to_owned()));
    }
    let input = request.messages.iter().find(|message| message.role == MessageRole::User);
    let input = input.map(crate::Message::joined).unwrap_or_default();
    let program: Program =
        serde_json::from_str(&input).map_err(|error| refused(format!("no program: {error}")))?;
    let of = |role| request.messages.iter().filter(move |message| message.role == role);
    let round = of(MessageRole::Assistant).count();
    Ok(match program.calls.into_iter().nth(round) {
        Some(Round::Many(calls)) => Said { text: String::new(), calls },
        Some(Round::One(call)) => Said { text: String::new(), calls: vec![call] },
        None => {
            let results = of(MessageRole::Tool).flat_map(|message| &message.parts);
            let results = results.filter_map(|part| match part {
                Part::Returned(returned) => Some(returned.output.as_str()),
                Part::Text(_) | Part::Call(_) => None,
            });
            let results = results.collect::<Vec<_>>().join(" ");
            Said { text: program.answer.replace("{results}", &results), calls: Vec::new() }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Message, complete};
    use domain::round::Returned;

    const PROGRAM: &str = r#"{"calls":[{"tool":"count","arguments":{"n":1}},
        [{"tool":"echo"},{"tool":"count"}]],"answer":"got {results}"}"#;

    fn request(rounds: &[usize]) -> Request {
        let mut messages = vec![Message::text(MessageRole::User, PROGRAM)];
        for calls in rounds {
            messages.push(Message { role: MessageRole::Assistant, parts: vec![] });
            for n in 0..*calls {
                let returned = Returned { output: n.to_string(), is_error: false };
                messages.push(Message {
                    role: MessageRole::Tool,
                    parts: vec![Part::Returned(returned)],
                });
            }
        }
        Request {
            task: Task::Answer,
            messages,
            tools: vec![],
            idempotency_key: String::new(),
            max_output_bytes: 256,
        }
    }

    #[tokio::test]
    async fn a_program_is_played_round_by_round() {
        let tools = async |rounds: &[usize]| {
            let completion = complete(&Script, &request(rounds)).await.unwrap();
            let tools: Vec<_> = completion.calls.into_iter().map(|call| call.tool).collect();
            (tools, completion.text)
        };
        assert_eq!(tools(&[]).await, (vec!["count".to_owned()], String::new()));
        let both = vec!["echo".to_owned(), "count".to_owned()];
        assert_eq!(tools(&[1]).await, (both, String::new()));
        assert_eq!(tools(&[1, 2]).await, (vec![], "got 0 0 1".to_owned()));
    }

    #[tokio::test]
    async fn what_is_no_program_is_refused() {
        let mut request = request(&[]);
        request.messages[0] = Message::text(MessageRole::User, "hello");
        assert!(matches!(complete(&Script, &request).await, Err(Error::Refused { .. })));
    }
}
