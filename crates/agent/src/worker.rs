//! One worker of a pool: calls the model or the tool of a job, unless the job is too old to be begun.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use ractor::ActorProcessingErr;
use ractor::factory::{FactoryRef, Job, Worker, WorkerId};
use tokio::time::timeout_at;
use tracing::Instrument;

use domain::chain::PhaseKey;
use domain::round::{Returned, Said};
use domain::step::{CallKey, Callee};
use domain::{Attempt, ErrorKind, Phase, Reason, ShardId, StepKey};
use model::{Message, MessageRole, Part, Request};
use proto::link::{StepAnswer, StepJob};
use telemetry::fault::point;

use crate::awake::{Awake, boot_ms};
use crate::pool::{JobFailure, PoolJob, Task};
use crate::speech::{self, Speech, Tell};
use crate::{clock, metrics};

/// How a tool's word about a doubt stands on the wire.
pub(crate) const DONE: u32 = 1;
pub(crate) const NOT_DONE: u32 = 2;
pub(crate) const UNKNOWN: u32 = 3;

/// The most that one step may answer.
const OUTPUT_BYTES_MAX: usize = 2 << 20;

#[derive(Clone)]
pub(crate) struct StepWorker {
    pub me: String,
    pub models: Arc<model::Registry>,
    pub tools: Arc<tool::Registry>,
    pub awake: Arc<Awake>,
    pub tell: Tell,
}

impl Worker for StepWorker {
    type Key = ();
    type Message = PoolJob;
    type Arguments = ();
    type State = ();

    async fn pre_start(
        &self,
        _: WorkerId,
        _: &FactoryRef<(), PoolJob>,
        (): (),
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }

    async fn handle(
        &self,
        _: WorkerId,
        _: &FactoryRef<(), PoolJob>,
        job: Job<(), PoolJob>,
        (): &mut (),
    ) -> Result<(), ActorProcessingErr> {
        let PoolJob { task, answer } = job.msg;
        point(if task.attempt.step.is_tool() { "call-taken" } else { "step-taken" });
        if let Err(failure) = self.check(&task) {
            metrics::JOBS_LATE.inc();
            answer.send(Err(failure));
            return Ok(());
        }
        let done = match task.traceparent.is_empty() {
            true => self.run(task).await,
            false => {
                let span = self.span(&task);
                telemetry::set_parent(&span, Some(&task.traceparent));
                self.run(task).instrument(span).await
            }
        };
        answer.send(done);
        Ok(())
    }
}

impl StepWorker {
    /// What is too late to be of use, or may have been begun elsewhere by now, is not begun.
    fn check(&self, task: &Task) -> Result<(), JobFailure> {
        let refuse = |reason, why| Err(JobFailure::not_begun(ErrorKind::Unavailable, reason, why));
        if task.deadline <= Instant::now() {
            return refuse(
                Reason::DeadlineExceeded,
                "the deadline of the step passed in the queue",
            );
        }
        if self.awake.stood_still_since(task.taken_ms) {
            return refuse(Reason::TooOld, "the process stood still since it took the job");
        }
        if task.begin_by_ms.is_some_and(|by_ms| by_ms < boot_ms()) {
            return refuse(Reason::TooOld, "the intent is too old to be acted on");
        }
        Ok(())
    }

    fn span(&self, task: &Task) -> tracing::Span {
        let (work, node) = (&task.job.work, &self.me);
        match task.attempt.step {
            StepKey::Phase(PhaseKey { phase, .. }) => {
                tracing::info_span!("phase", phase = phase.as_str(), work, node)
            }
            StepKey::Call(CallKey { round, of: Callee::Model }) => {
                tracing::info_span!("round", round, work, node)
            }
            StepKey::Call(CallKey { round, of: Callee::Tool(_) }) => {
                let tool = task.job.tool.as_ref().map_or("", |tool| tool.name.as_str());
                tracing::info_span!("tool", tool, round, work, node)
            }
        }
    }

    async fn run(&self, task: Task) -> Result<StepAnswer, JobFailure> {
        let start_ms = clock::now_ms();
        let answer = match task.attempt.step {
            StepKey::Call(CallKey { of: Callee::Tool(_), .. }) => self.tool(task).await?,
            StepKey::Phase(_) | StepKey::Call(CallKey { of: Callee::Model, .. }) => {
                self.model(task.attempt, task.job).await?
            }
        };
        Ok(StepAnswer { node: self.me.clone(), start_ms, end_ms: clock::now_ms(), ..answer })
    }

    async fn model(&self, attempt: Attempt, job: StepJob) -> Result<StepAnswer, JobFailure> {
        let model = self.models.get(&job.model).ok_or_else(|| {
            let (model, names) = (&job.model, self.models.names().join(", "));
            let why = format!("there is no model {model:?}: use one of {names}");
            JobFailure::not_begun(ErrorKind::Invalid, Reason::ModelRefused, why)
        })?;
        let shard = ShardId(job.shard);
        let request = request(attempt.step, job)?;
        let call = async {
            match attempt.step {
                // Its answer is JSON, nothing to read.
                StepKey::Phase(_) => model::complete(&*model, &request, |_| {}).await,
                StepKey::Call(_) => self.say(&*model, &request, shard, attempt).await,
            }
        };
        let completion = match tracing::Span::current().is_none() {
            true => call.await,
            false => call.instrument(tracing::info_span!("model", model = model.name())).await,
        };
        let completion = completion.map_err(|error| JobFailure {
            kind: error.kind(),
            reason: reason_of(&error),
            detail: error.to_string(),
            is_harmless: false,
        })?;
        let output = match attempt.step {
            StepKey::Phase(_) => completion.text.into_bytes(),
            StepKey::Call(_) => Said { text: completion.text, calls: completion.calls }.to_json(),
        };
        Ok(StepAnswer {
            output: Bytes::from(output),
            calls: completion.usage.calls,
            input_tokens: completion.usage.input_tokens,
            output_tokens: completion.usage.output_tokens,
            ..StepAnswer::default()
        })
    }

    /// Asks the model, and tells the owner what it says meanwhile.
    async fn say(
        &self,
        model: &dyn model::Model,
        request: &Request,
        shard: ShardId,
        attempt: Attempt,
    ) -> Result<model::Completion, model::Error> {
        let speech = Speech::default();
        tokio::select! {
            // First, so that what is said at once is told with the answer only.
            biased;
            completion = model::complete(model, request, |text| speech.push(text)) => completion,
            never = speech::tell(&speech, &self.tell, shard, attempt) => match never {},
        }
    }

    async fn tool(&self, task: Task) -> Result<StepAnswer, JobFailure> {
        let wanted = task.job.tool.unwrap_or_default();
        let tool = self.tools.get(&wanted.name).ok_or_else(|| {
            let why = format!("this node has no tool {:?}", wanted.name);
            JobFailure::not_begun(ErrorKind::Unavailable, Reason::NoOffer, why)
        })?;
        let arguments = serde_json::from_slice(&wanted.arguments).map_err(|error| {
            let why = format!("the arguments are no JSON: {error}");
            JobFailure::not_begun(ErrorKind::Invalid, Reason::Malformed, why)
        })?;
        let call = tool::Call {
            idempotency_key: task.attempt.step.idempotency_key(&task.job.work),
            epoch: task.attempt.epoch,
            attempt: task.attempt.number,
            arguments,
            deadline: task.deadline,
        };
        match wanted.is_probe {
            true => probe(&*tool, &call).await,
            false => make(&*tool, &call).await,
        }
    }
}

async fn make(tool: &dyn tool::Tool, call: &tool::Call) -> Result<StepAnswer, JobFailure> {
    metrics::TOOL_CALLS.with_label_values(&[tool.name()]).inc();
    // Nobody waits for it any longer, and who asked goes by that.
    let called = timeout_at(call.deadline.into(), tool.call(call)).await.unwrap_or_else(|_| {
        let reason = "the deadline of the call passed".to_owned();
        Err(tool::Error::Broke { tool: tool.name().to_owned(), reason })
    });
    point("tool-returned");
    let returned = match called {
        Ok(output) => Returned { output: output.0, is_error: false },
        // The model is told, and may find another way.
        Err(error @ tool::Error::Refused { .. }) => {
            Returned { output: error.to_string(), is_error: true }
        }
        Err(error) => return Err(failure(&error)),
    };
    if OUTPUT_BYTES_MAX < returned.output.len() {
        let output = format!("the output has more than {OUTPUT_BYTES_MAX} bytes");
        return Ok(answer(&Returned { output, is_error: true }, 0));
    }
    Ok(answer(&returned, 0))
}

async fn probe(tool: &dyn tool::Tool, call: &tool::Call) -> Result<StepAnswer, JobFailure> {
    let none = Returned { output: String::new(), is_error: false };
    match tool.reconcile(call).await {
        Ok(tool::Reconciled::Done(output)) => {
            Ok(answer(&Returned { output: output.0, is_error: false }, DONE))
        }
        Ok(tool::Reconciled::NotDone) => Ok(answer(&none, NOT_DONE)),
        Ok(tool::Reconciled::Unknown) => Ok(answer(&none, UNKNOWN)),
        Err(error) => Err(failure(&error)),
    }
}

fn answer(returned: &Returned, reconciled: u32) -> StepAnswer {
    StepAnswer { output: returned.to_json().into(), reconciled, ..StepAnswer::default() }
}

fn failure(error: &tool::Error) -> JobFailure {
    JobFailure {
        kind: error.kind(),
        reason: error.reason(),
        detail: error.to_string(),
        is_harmless: error.is_harmless(),
    }
}

fn reason_of(error: &model::Error) -> Reason {
    match error.kind() {
        ErrorKind::Unavailable | ErrorKind::Exhausted | ErrorKind::Deadline | ErrorKind::Fenced => {
            Reason::ModelUnavailable
        }
        ErrorKind::Internal => Reason::ModelAnswerInvalid,
        ErrorKind::Invalid | ErrorKind::NotFound | ErrorKind::Conflict | ErrorKind::Denied => {
            Reason::ModelRefused
        }
    }
}

fn invalid(detail: &str) -> JobFailure {
    JobFailure::not_begun(ErrorKind::Invalid, Reason::Malformed, detail)
}

fn utf8(bytes: Bytes) -> Result<String, JobFailure> {
    String::from_utf8(bytes.into()).map_err(|_| invalid("a text of the job is not UTF-8"))
}

fn request(step: StepKey, job: StepJob) -> Result<Request, JobFailure> {
    let text = |role, text: String| Message { role, parts: vec![Part::Text(text)] };
    let idempotency_key = step.idempotency_key(&job.work);
    let mut messages = vec![text(MessageRole::System, job.instructions)];
    if !job.findings.is_empty() {
        let findings = serde_json::json!({ "findings": job.findings });
        messages.push(text(MessageRole::System, findings.to_string()));
    }
    messages.push(text(MessageRole::User, utf8(job.input)?));
    let task = match step {
        StepKey::Phase(PhaseKey { phase, .. }) => {
            for earlier in job.earlier {
                messages.push(text(MessageRole::Assistant, utf8(earlier)?));
            }
            model::Task::Phase(Phase::as_str(phase).to_owned())
        }
        StepKey::Call(_) => {
            said_so_far(job.earlier, &mut messages)?;
            model::Task::Answer
        }
    };
    Ok(Request {
        task,
        messages,
        tools: job.tools,
        idempotency_key,
        max_output_bytes: OUTPUT_BYTES_MAX,
    })
}

/// What a loop came to so far: after what the model said in a round stands what each of its tools returned.
fn said_so_far(earlier: Vec<Bytes>, messages: &mut Vec<Message>) -> Result<(), JobFailure> {
    let mut returning = 0;
    for output in earlier {
        if 0 < returning {
            returning -= 1;
            let returned = Returned::parse(&output).map_err(|error| invalid(&error.to_string()))?;
            messages
                .push(Message { role: MessageRole::Tool, parts: vec![Part::Returned(returned)] });
            continue;
        }
        let said = Said::parse(&output).map_err(|error| invalid(&error.to_string()))?;
        returning = said.calls.len();
        let parts = std::iter::once(Part::Text(said.text));
        let parts = parts.chain(said.calls.into_iter().map(Part::Call)).collect();
        messages.push(Message { role: MessageRole::Assistant, parts });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use domain::Epoch;
    use futures::future::BoxFuture;

    use super::*;

    /// Never answers.
    struct Mute;

    impl tool::Tool for Mute {
        fn name(&self) -> &str {
            "mute"
        }

        fn is_idempotent(&self) -> bool {
            false
        }

        fn call<'a>(
            &'a self,
            _: &'a tool::Call,
        ) -> BoxFuture<'a, Result<tool::Output, tool::Error>> {
            Box::pin(std::future::pending())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_ends_at_its_deadline_and_may_have_been_made() {
        let call = tool::Call {
            idempotency_key: "w-0-000-1/0/tool-0".to_owned(),
            epoch: Epoch(1),
            attempt: 1,
            arguments: serde_json::Value::Null,
            deadline: Instant::now() + Duration::from_secs(7),
        };
        let made = tokio::time::timeout(Duration::from_secs(8), make(&Mute, &call)).await;
        let failure = made.expect("it ends by itself").unwrap_err();
        assert_eq!((failure.reason, failure.is_harmless), (Reason::ToolBroke, false));
    }
}
