//! A model that plays what the work's input says, round by round: for tests and measurements of loops.
//!
//! The input is JSON, `{"calls": [call or list of calls of a round, ...], "answer": "..."}`; a call is
//! `{"tool": "...", "arguments": ...}`. In the answer `{results}` stands for what the tools returned, in order. With
//! `"pause_ms": 20` the answer comes word by word, that long after one another.

use std::time::Duration;

use domain::round::{Said, ToolCall};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use serde::Deserialize;

use crate::{Chunk, Error, MessageRole, Model, Part, Request, Task, Usage};

const NAME: &str = "script";
/// Between two words.
const PAUSE_MS_MAX: u64 = 60_000;

#[derive(Clone, Copy, Debug)]
pub struct Script;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Program {
    #[serde(default)]
    calls: Vec<Round>,
    answer: String,
    #[serde(default)]
    pause_ms: u64,
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
        let (said, pause) = match play(request) {
            Ok(played) => played,
            Err(error) => return stream::iter([Err(error)]).boxed(),
        };
        let usage = Usage { input_tokens: 0, output_tokens: 0, calls: 1 };
        let calls = said.calls.into_iter().map(Chunk::Call).chain([Chunk::Finished(usage)]);
        let rest = stream::iter(calls.map(Ok));
        if pause.is_zero() {
            return stream::iter([Ok(Chunk::Text(said.text))]).chain(rest).boxed();
        }
        let words: Vec<_> = said.text.split_inclusive(' ').map(str::to_owned).collect();
        let words = stream::iter(words).then(move |word| async move {
            tokio::time::sleep(pause).await;
            Ok(Chunk::Text(word))
        });
        words.chain(rest).boxed()
    }
}

/// What is said in this round, and the pause between two words of it.
fn play(request: &Request) -> Result<(Said, Duration), Error> {
    let refused = |reason: String| Error::Refused { model: NAME.to_owned(), reason };
    if request.task != Task::Answer {
        return Err(refused("it plays loops, no phases".to_owned()));
    }
    let input = request.messages.iter().find(|message| message.role == MessageRole::User);
    let input = input.map(crate::Message::joined).unwrap_or_default();
    let program: Program =
        serde_json::from_str(&input).map_err(|error| refused(format!("no program: {error}")))?;
    if PAUSE_MS_MAX < program.pause_ms {
        return Err(refused(format!("pause_ms is over {PAUSE_MS_MAX}")));
    }
    let asks = |calls| (Said { text: String::new(), calls }, Duration::ZERO);
    let of = |role| request.messages.iter().filter(move |message| message.role == role);
    let round = of(MessageRole::Assistant).count();
    Ok(match program.calls.into_iter().nth(round) {
        Some(Round::Many(calls)) => asks(calls),
        Some(Round::One(call)) => asks(vec![call]),
        None => {
            let results = of(MessageRole::Tool).flat_map(|message| &message.parts);
            let results = results.filter_map(|part| match part {
                Part::Returned(returned) => Some(returned.output.as_str()),
                Part::Text(_) | Part::Call(_) => None,
            });
            let results = results.collect::<Vec<_>>().join(" ");
            let text = program.answer.replace("{results}", &results);
            (Said { text, calls: Vec::new() }, Duration::from_millis(program.pause_ms))
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
            let completion = complete(&Script, &request(rounds), |_| {}).await.unwrap();
            let tools: Vec<_> = completion.calls.into_iter().map(|call| call.tool).collect();
            (tools, completion.text)
        };
        assert_eq!(tools(&[]).await, (vec!["count".to_owned()], String::new()));
        let both = vec!["echo".to_owned(), "count".to_owned()];
        assert_eq!(tools(&[1]).await, (both, String::new()));
        assert_eq!(tools(&[1, 2]).await, (vec![], "got 0 0 1".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_with_a_pause_comes_word_by_word() {
        let mut request = request(&[]);
        let program = r#"{"answer":"one two  three","pause_ms":20}"#;
        request.messages[0] = Message::text(MessageRole::User, program);
        let (mut heard, begun) = (Vec::new(), tokio::time::Instant::now());
        let on_text = |piece: &str| heard.push((piece.to_owned(), begun.elapsed().as_millis()));
        let completion = complete(&Script, &request, on_text).await.unwrap();
        assert_eq!(completion.text, "one two  three");
        let expected = [("one ", 20), ("two ", 40), (" ", 60), ("three", 80)];
        assert_eq!(heard, expected.map(|(word, ms)| (word.to_owned(), ms)));
    }

    #[tokio::test]
    async fn what_is_no_program_is_refused() {
        for input in ["hello", r#"{"answer":"x","pause_ms":60001}"#] {
            let mut request = request(&[]);
            request.messages[0] = Message::text(MessageRole::User, input);
            let refused = complete(&Script, &request, |_| {}).await;
            assert!(matches!(refused, Err(Error::Refused { .. })), "{input}");
        }
    }
}
