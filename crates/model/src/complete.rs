//! One whole answer from a model's stream, bounded and counted.

use std::sync::LazyLock;
use std::time::Instant;

use domain::Phase;
use domain::round::{CALLS_MAX, ToolCall};
use futures::StreamExt;
use telemetry::metrics::{self, HistogramVec, IntCounterVec, LATENCY_BUCKETS_SECONDS};
use tracing::Instrument;

use crate::{Chunk, Error, Model, Request, Task, Usage};

static CALLS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let help = "Model calls that were started.";
    metrics::counter_vec("stagedoor_model_calls_total", help, &["model", "task"])
});

static CALL_SECONDS: LazyLock<HistogramVec> = LazyLock::new(|| {
    let help = "Time of a model call until its answer was whole or failed.";
    let name = "stagedoor_model_call_seconds";
    metrics::histogram_vec(name, help, &["model"], LATENCY_BUCKETS_SECONDS)
});

/// Exports the calls of this model from 0.
pub(crate) fn count_from_zero(model: &dyn Model) {
    for task in Phase::ALL.map(Phase::as_str).into_iter().chain(["answer"]) {
        CALLS.with_label_values(&[model.name(), task]);
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    pub text: String,
    /// Tools that are to be called first.
    pub calls: Vec<ToolCall>,
    pub usage: Usage,
}

/// Calls `model` and collects its answer; `on_text` hears each piece of its text as it comes. Waits as long as the model
/// does: the deadline is the caller's, who drops this future.
pub async fn complete(
    model: &dyn Model,
    request: &Request,
    on_text: impl FnMut(&str) + Send,
) -> Result<Completion, Error> {
    let task = task_label(&request.task);
    CALLS.with_label_values(&[model.name(), task]).inc();
    let span = tracing::info_span!(
        "model",
        task,
        "gen_ai.request.model" = model.name(),
        "gen_ai.usage.input_tokens" = tracing::field::Empty,
        "gen_ai.usage.output_tokens" = tracing::field::Empty,
    );
    let started = Instant::now();
    let result = collect(model, request, on_text).instrument(span.clone()).await;
    CALL_SECONDS.with_label_values(&[model.name()]).observe(started.elapsed().as_secs_f64());
    if let Ok(completion) = &result {
        span.record("gen_ai.usage.input_tokens", completion.usage.input_tokens);
        span.record("gen_ai.usage.output_tokens", completion.usage.output_tokens);
    }
    result
}

async fn collect(
    model: &dyn Model,
    request: &Request,
    mut on_text: impl FnMut(&str) + Send,
) -> Result<Completion, Error> {
    let mut stream = model.call(request);
    let (mut text, mut calls) = (String::new(), Vec::new());
    // Calls count as what they weigh.
    let mut bytes = 0;
    while let Some(chunk) = stream.next().await {
        match chunk? {
            Chunk::Text(more) => {
                bytes += more.len();
                on_text(&more);
                text.push_str(&more);
            }
            Chunk::Call(call) => {
                bytes += call.tool.len() + call.arguments.to_string().len();
                calls.push(call);
            }
            Chunk::Finished(usage) => return Ok(Completion { text, calls, usage }),
        }
        if request.max_output_bytes < bytes || CALLS_MAX < calls.len() {
            let max_bytes = request.max_output_bytes;
            return Err(Error::AnswerTooLarge { model: model.name().to_owned(), max_bytes });
        }
    }
    Err(Error::Incomplete { model: model.name().to_owned(), received_bytes: text.len() })
}

/// Phase names come from definitions, that is from outside; labels are ours.
fn task_label(task: &Task) -> &'static str {
    match task {
        Task::Phase(name) => name.parse::<Phase>().map_or("other", Phase::as_str),
        Task::Answer => "answer",
    }
}

#[cfg(test)]
mod tests {
    use futures::stream::{self, BoxStream};

    use super::*;
    use crate::{Message, MessageRole};

    /// Answers with what it was given.
    struct Scripted {
        name: &'static str,
        chunks: Vec<Result<Chunk, Error>>,
    }

    impl Model for Scripted {
        fn name(&self) -> &str {
            self.name
        }

        fn call<'a>(&'a self, _request: &'a Request) -> BoxStream<'a, Result<Chunk, Error>> {
            stream::iter(self.chunks.clone()).boxed()
        }
    }

    fn text(text: &str) -> Result<Chunk, Error> {
        Ok(Chunk::Text(text.to_owned()))
    }

    const USAGE: Usage = Usage { input_tokens: 3, output_tokens: 2, calls: 1 };

    fn request(task: Task) -> Request {
        Request {
            task,
            messages: vec![Message::text(MessageRole::User, "hello")],
            tools: vec![],
            idempotency_key: "w-1/1".to_owned(),
            max_output_bytes: 8,
        }
    }

    async fn check(chunks: Vec<Result<Chunk, Error>>, expected: Result<&str, Error>) {
        let model = Scripted { name: "scripted", chunks };
        let expected =
            expected.map(|text| Completion { text: text.to_owned(), calls: vec![], usage: USAGE });
        let mut heard = String::new();
        let on_text = |piece: &str| heard.push_str(piece);
        assert_eq!(complete(&model, &request(Task::Answer), on_text).await, expected);
        if let Ok(expected) = expected {
            assert_eq!(heard, expected.text);
        }
    }

    #[tokio::test]
    async fn an_answer_is_whole_and_within_its_limit_or_an_error() {
        let model = || "scripted".to_owned();
        let gone = Error::Unavailable { model: model(), reason: "x".into(), retry_after_ms: None };
        let long = Error::AnswerTooLarge { model: model(), max_bytes: 8 };
        let cut = Error::Incomplete { model: model(), received_bytes: 4 };
        let end = || Ok(Chunk::Finished(USAGE));
        check(vec![text("1234"), text("5678"), end()], Ok("12345678")).await;
        check(vec![end()], Ok("")).await;
        check(vec![text("1234"), end(), text("5")], Ok("1234")).await;
        check(vec![text("1234"), text("56789"), end()], Err(long)).await;
        check(vec![text("1234")], Err(cut)).await;
        check(vec![text("1234"), Err(gone.clone()), end()], Err(gone)).await;
    }

    #[tokio::test]
    async fn every_call_that_was_started_counts_once() {
        let model = Scripted { name: "counted", chunks: vec![text("never whole")] };
        for task in ["action", "action", "yield", "made up"] {
            complete(&model, &request(Task::Phase(task.to_owned())), |_| {}).await.unwrap_err();
        }
        complete(&model, &request(Task::Answer), |_| {}).await.unwrap_err();
        let count = |task: &str| CALLS.with_label_values(&["counted", task]).get();
        assert_eq!(["action", "yield", "other", "answer"].map(count), [2, 1, 1, 1]);
        let text = metrics::text().unwrap();
        assert!(text.contains("stagedoor_model_calls_total{model=\"counted\",task=\"action\"} 2"));
        assert!(text.contains("stagedoor_model_call_seconds_count{model=\"counted\"} 5"));
    }
}
