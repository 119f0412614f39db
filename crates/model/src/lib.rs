//! Models behind one trait: a request goes in, an answer comes out as a stream.
//!
//! Never decides what is asked or what follows from an answer (that is `domain`), never retries, and keeps nothing
//! between two calls.

mod complete;
mod extractive;
mod noop;
mod registry;
mod reply;
mod script;

use domain::ErrorKind;
use domain::round::{Returned, ToolCall};
use futures::stream::BoxStream;

pub use complete::{Completion, complete};
pub use extractive::Extractive;
pub use noop::Noop;
pub use registry::Registry;
pub use script::Script;

/// One model. Answers are streams, so that providers can pass tokens on as they come.
pub trait Model: Send + Sync + 'static {
    /// What definitions call it; also a metric label.
    fn name(&self) -> &str;

    /// Begins a call; nothing happens before the stream is polled, and dropping the stream ends the call. A whole
    /// answer ends with [`Chunk::Finished`].
    fn call<'a>(&'a self, request: &'a Request) -> BoxStream<'a, Result<Chunk, Error>>;
}

#[derive(Clone, Debug)]
pub struct Request {
    pub task: Task,
    /// Instructions, the submitted text, then what came of it so far: each earlier phase's JSON answer, or what the model
    /// said in each round and what the tools returned.
    pub messages: Vec<Message>,
    /// The tools that may be asked for, by name.
    pub tools: Vec<String>,
    /// The same for every attempt at the same step, so that a provider that knows it charges and answers once.
    pub idempotency_key: String,
    pub max_output_bytes: usize,
}

/// What is asked for; a provider turns it into instructions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// The JSON answer of the phase of this name, for example `action`.
    Phase(String),
    /// An answer to read.
    Answer,
}

#[derive(Clone, Debug)]
pub struct Message {
    pub role: MessageRole,
    pub parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageRole {
    System,
    User,
    Assistant,
    /// What a tool returned.
    Tool,
}

/// A piece of a message. Modalities other than text will be further variants.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    Text(String),
    /// A tool that the model asked for.
    Call(ToolCall),
    /// What it returned.
    Returned(Returned),
}

impl Message {
    pub fn text(role: MessageRole, text: impl Into<String>) -> Self {
        Self { role, parts: vec![Part::Text(text.into())] }
    }

    /// The text parts, each on a line of its own.
    fn joined(&self) -> String {
        let parts = self.parts.iter().filter_map(|part| match part {
            Part::Text(text) => Some(text.as_str()),
            Part::Call(_) | Part::Returned(_) => None,
        });
        parts.collect::<Vec<_>>().join("\n")
    }
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Chunk {
    /// The next text of the answer.
    Text(String),
    /// A tool that is to be called before the model is asked again.
    Call(ToolCall),
    /// The answer is whole; nothing follows.
    Finished(Usage),
}

/// What a call cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub calls: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("model {model} refuses the request: {reason}")]
    Refused { model: String, reason: String },
    #[error("model {model} is not available: {reason}; try again later")]
    Unavailable { model: String, reason: String, retry_after_ms: Option<u64> },
    #[error(
        "the answer of model {model} is longer than {max_bytes} bytes; ask for less or raise the limit"
    )]
    AnswerTooLarge { model: String, max_bytes: usize },
    #[error("the answer of model {model} broke off after {received_bytes} bytes; try again")]
    Incomplete { model: String, received_bytes: usize },
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { .. } | Self::AnswerTooLarge { .. } => ErrorKind::Invalid,
            Self::Unavailable { .. } | Self::Incomplete { .. } => ErrorKind::Unavailable,
        }
    }
}
