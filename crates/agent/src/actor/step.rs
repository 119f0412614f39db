//! One step: found a pool for, intended if it must not be made twice, sent, answered, journaled.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ractor::{ActorProcessingErr, ActorStatus};

use cluster::Reply;
use domain::chain::PhaseKey;
use domain::contest::{self, OfAnswer};
use domain::entry::{Entry, StepDone, Usage};
use domain::round::Returned;
use domain::step::{CallKey, Callee};
use domain::turn::doubt::Effect;
use domain::turn::{Failure, Turn};
use domain::view::View;
use domain::{
    AgentId, Attempt, Definition, DefinitionHash, ErrorKind, Lsn, Phase, ProcessName, Reason,
    StepKey, WorkId, WorkState,
};
use proto::journal::StepNumbers;
use proto::link::{StepAnswer, StepJob, ToolCall};
use store::writer::Event;
use telemetry::fault::point;

use super::{AgentMessage, Answer, State, Told};
use crate::awake::{YOUNG_MS, boot_ms};
use crate::dispatch::{self, Order, Place, Target, lost};
use crate::host::HostMessage;
use crate::named::Named;
use crate::pool::{JobFailure, Wanted};
use crate::{clock, metrics};

/// How often it is looked whether a worker that is waited for still lives.
const LOOK: Duration = Duration::from_millis(100);

/// What became of one attempt.
pub(crate) enum Outcome {
    Done(StepAnswer),
    NotRun {
        after: Duration,
    },
    Failed(JobFailure),
    /// Its worker has it still, and sends its answer when there is one.
    Awaited(Named),
}

/// An answer that its worker brought to this owner.
pub(crate) struct Routed {
    pub attempt: Attempt,
    /// None: it came to nothing.
    pub answer: Option<StepAnswer>,
    pub worker: ProcessName,
}

impl State {
    /// Finds out who can run a step, or says in the journal that nobody offers it.
    pub(super) fn run(&mut self, work: Lsn, step: StepKey, number: u32) {
        let shard = self.shard().clone();
        if shard.must_prove() {
            return self.prove();
        }
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return };
        let hash = turn.accepted().definition;
        let Some(known) = shard.node.definitions.get(&hash) else { return self.fetch(hash) };
        let definition = known.definition;
        let wanted = match wanted(turn, step, &definition) {
            Ok(wanted) => wanted,
            Err(output) => return self.not_offered(work, step, number, output),
        };
        let view = shard.node.view.load_full();
        let target = shard.node.dispatcher.target(view.as_deref(), &wanted, &definition.modality);
        let is_waiting = turn.state() == WorkState::Waiting;
        match target {
            Target::Nowhere if is_waiting => self.wait_for_offer(view.as_ref()),
            Target::Nowhere => self.journal(work, vec![Entry::Waiting(Reason::NoOffer)], None),
            Target::Later => self.again_after(Duration::from_millis(50)),
            Target::At(..) if is_waiting => {
                self.journal(work, vec![Entry::Resumed(Reason::OfferAppeared)], None);
            }
            Target::At(place, Effect::Idempotent) => {
                let deadline = self.step_deadline(work, step);
                self.send(work, step, number, place, &definition, deadline, None);
            }
            Target::At(place, Effect::Once) => {
                self.run_once(work, step, number, place, &definition)
            }
        }
    }

    /// A call that must not be made twice is made while the intent to make it is young.
    fn run_once(
        &mut self,
        work: Lsn,
        step: StepKey,
        number: u32,
        place: Place,
        definition: &Definition,
    ) {
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return };
        let attempt = self.attempt(turn, step, number);
        let sent_ms = self.intended.as_deref().filter(|(of, _)| *of == attempt).map(|it| it.1);
        let begin_by_ms = sent_ms.map(|sent_ms| sent_ms + YOUNG_MS);
        let is_young = begin_by_ms.is_some_and(|by_ms| boot_ms() <= by_ms);
        if let (true, false, Some(until_ms)) =
            (is_young, turn.needs_intent(Effect::Once), turn.intended_until_ms())
        {
            let deadline = clock::instant_at(until_ms);
            return self.send(work, step, number, place, definition, deadline, begin_by_ms);
        }
        if !turn.needs_intent(Effect::Once) {
            metrics::INTENTS_RENEWED.inc();
        }
        let timeout = i64::try_from(self.shard().node.config.tool_timeout_ms).unwrap_or(i64::MAX);
        let until_ms = clock::now_ms().saturating_add(timeout).min(turn.deadline_ms());
        let Some(intent) = turn.intend(&attempt.work.to_string(), number, until_ms) else { return };
        self.intended = Some(Box::new((attempt, boot_ms())));
        self.journal(work, vec![Entry::StepIntended(intent)], None);
    }

    pub(super) fn attempt(&self, turn: &Turn, step: StepKey, number: u32) -> Attempt {
        let accepted = turn.accepted();
        let work = WorkId { class: accepted.class, slot: accepted.slot, lsn: turn.id() };
        Attempt { work, step, epoch: self.shard().epoch, number }
    }

    /// After this process stood still, another node may own the shard: nothing is begun before that is known.
    pub(super) fn prove(&self) {
        let (shard, me, host) = (self.shard().clone(), self.me.clone(), self.args.host.clone());
        tokio::spawn(async move {
            point("proof-before-read");
            let proof = shard.prove().await;
            point("proof-read");
            match proof {
                Ok(None) => {}
                Ok(Some(reason)) => {
                    _ = host.cast(HostMessage::Writer(Event::Stopped(reason)));
                    return;
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
            _ = me.cast(AgentMessage::Drive);
        });
    }

    /// Gets a definition that was crowded out of memory, then looks again. Until the deadline: it may come from a control
    /// replica that is away now.
    pub(super) fn fetch(&self, hash: DefinitionHash) {
        let (shard, me) = (self.shard().clone(), self.me.clone());
        tokio::spawn(async move {
            if shard.definition(hash).await.is_err() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            _ = me.cast(AgentMessage::Drive);
        });
    }

    /// Is woken by the next view; if that came while this one was looked at, looks again at once.
    fn wait_for_offer(&self, seen: Option<&Arc<View>>) {
        let shard = self.shard();
        shard.waits(AgentId::clone(&self.args.id));
        let now = shard.node.view.load_full();
        let is_same = match (seen, &now) {
            (Some(seen), Some(now)) => Arc::ptr_eq(seen, now),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if !is_same {
            _ = self.me.cast(AgentMessage::Drive);
        }
    }

    /// The model asked for a tool that its definition does not have: it is told so, and nothing is called.
    fn not_offered(&mut self, work: Lsn, step: StepKey, number: u32, output: String) {
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return };
        let name = turn.tool_call().map(|call| call.tool.clone()).unwrap_or_default();
        let now_ms = clock::now_ms();
        let done = StepDone {
            step,
            name,
            output: Returned { output, is_error: true }.to_json().into(),
            node: self.shard().node.name.to_string(),
            attempts: number,
            start_ms: now_ms,
            end_ms: now_ms,
            usage: Usage::default(),
        };
        self.journal(work, vec![Entry::StepDone(done)], None);
    }

    pub(super) fn job(&self, turn: &Turn, attempt: Attempt, definition: &Definition) -> StepJob {
        let step = attempt.step;
        let recalls = matches!(step, StepKey::Phase(PhaseKey { phase: Phase::Experience, .. }));
        let fold = self.fold.as_ref().filter(|_| recalls);
        let findings = fold.map(|fold| fold.findings().map(str::to_owned).collect());
        let StepNumbers { phase, cycle, round, index } = step.into();
        let tool = turn.tool_call().map(|call| ToolCall {
            name: call.tool.clone(),
            arguments: call.arguments.to_string().into(),
            ..ToolCall::default()
        });
        StepJob {
            work: attempt.work.to_string(),
            phase,
            cycle,
            round,
            index,
            attempt: attempt.number,
            model: definition.model.clone(),
            modality: definition.modality.clone(),
            instructions: definition.instructions.clone(),
            input: turn.accepted().input.clone(),
            earlier: turn.steps().map(|(_, done)| done.output.clone()).collect(),
            findings: findings.unwrap_or_default(),
            shard: self.shard().id.0,
            epoch: attempt.epoch.0,
            tools: definition.tools.clone(),
            tool,
            left_ms: 0,
        }
    }

    #[expect(clippy::too_many_arguments, reason = "all of it makes the order")]
    fn send(
        &mut self,
        work: Lsn,
        step: StepKey,
        number: u32,
        place: Place,
        definition: &Definition,
        deadline: Instant,
        begin_by_ms: Option<u64>,
    ) {
        self.count_if_early();
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return };
        let attempt = self.attempt(turn, step, number);
        let job = self.job(turn, attempt, definition);
        self.running = Some(Box::new(attempt));
        let traceparent = self.traceparent(work);
        let order = Order { job, attempt, traceparent, deadline, begin_by_ms };
        let (shard, me) = (self.shard().clone(), self.me.clone());
        tokio::spawn(async move {
            let node = &shard.node;
            point(if step.is_tool() { "call-before" } else { "step-before" });
            let outcome = match node.dispatcher.run(place.clone(), order).await {
                dispatch::Outcome::Done(answer) => Outcome::Done(answer),
                dispatch::Outcome::NotRun { after } => Outcome::NotRun { after },
                dispatch::Outcome::Failed(failure) => Outcome::Failed(failure),
                dispatch::Outcome::Cut(failure) => {
                    node.after_cut(&place, shard.id, attempt, failure).await
                }
            };
            _ = me.cast(AgentMessage::Answered(Box::new(Answer { attempt, place, outcome })));
        });
    }

    /// A step rests on all that is folded. The writer knows better than the fold what is committed, so it is asked.
    fn count_if_early(&self) {
        let rests_on = self.fold.as_ref().map_or(Lsn(0), |fold| fold.head);
        if !self.shard().writer.is_acknowledged(rests_on) {
            metrics::STEPS_EARLY.inc();
        }
    }

    fn step_deadline(&self, work: Lsn, step: StepKey) -> Instant {
        let config = &self.shard().node.config;
        let timeout_ms = match step {
            StepKey::Call(CallKey { of: Callee::Tool(_), .. }) => config.tool_timeout_ms,
            StepKey::Phase(_) | StepKey::Call(CallKey { of: Callee::Model, .. }) => {
                config.phase_timeout_ms
            }
        };
        let latest = Instant::now() + Duration::from_millis(timeout_ms);
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        turn.map_or(latest, |turn| clock::instant_at(turn.deadline_ms()).min(latest))
    }

    /// From an append of the work's turn until it is durable.
    pub(super) fn commit_span(&self, work: Lsn) -> tracing::Span {
        let began = self.began.as_ref().filter(|began| began.work == work);
        match began.and_then(|began| began.span.as_ref()) {
            Some(turn) => tracing::info_span!(parent: turn, "commit"),
            None => tracing::Span::none(),
        }
    }

    /// The trace context of the turn's span, made when the turn begins; empty when nobody traces.
    pub(super) fn traceparent(&mut self, work: Lsn) -> String {
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let Some(parent) = turn.and_then(|turn| turn.accepted().traceparent.clone()) else {
            return String::new();
        };
        let (agent, shard) = (self.args.id.clone(), self.shard().clone());
        let Some(began) = self.began.as_mut().filter(|began| began.work == work) else {
            return parent;
        };
        let span = began.span.get_or_insert_with(|| {
            let node = shard.node.name.as_str();
            let span = tracing::info_span!("turn", %agent, work = work.0, node);
            telemetry::set_parent(&span, Some(&parent));
            span
        });
        span.in_scope(telemetry::current_traceparent).unwrap_or(parent)
    }

    /// A worker may have the step that the owner before had asked for: then it is waited for, not asked for again.
    pub(super) fn take_over(&mut self) {
        let turn = self.fold.as_ref().and_then(|fold| fold.current());
        let Some(named) = turn.and_then(|turn| self.shard().take_named(turn.id())) else { return };
        let attempt = named.attempt;
        if !turn.is_some_and(|turn| turn.takes(attempt.step, attempt.number)) {
            return;
        }
        if let Some(fold) = &mut self.fold {
            fold.await_worker();
        }
        let place = named.place.clone();
        self.running = Some(Box::new(attempt));
        let outcome = match named.answer.clone() {
            Some(answer) => Outcome::Done(answer),
            None => Outcome::Awaited(named),
        };
        _ = self.me.cast(AgentMessage::Answered(Box::new(Answer { attempt, place, outcome })));
    }

    /// Until its deadline, and as long as its worker lives: the answer comes by itself.
    fn await_worker(&self, named: Named) {
        let (shard, me) = (self.shard().clone(), self.me.clone());
        tokio::spawn(async move {
            let Named { attempt, place, deadline, .. } = named;
            while Instant::now() < deadline && shard.node.is_there(&place) {
                if me.get_status() != ActorStatus::Running {
                    return;
                }
                tokio::time::sleep(LOOK).await;
            }
            let outcome = Outcome::Failed(lost("its worker is gone, or did not answer in time"));
            _ = me.cast(AgentMessage::Answered(Box::new(Answer { attempt, place, outcome })));
        });
    }

    /// Journals what came of a step; an answer that nobody waits for is dropped.
    pub(super) fn answered(&mut self, answer: Answer) -> Result<(), ActorProcessingErr> {
        let Answer { attempt, place, outcome } = answer;
        let work = attempt.work.lsn;
        let is_taken = self.running.as_deref() == Some(&attempt);
        let verdict = contest::of_answer(is_taken, self.underway(work));
        if is_taken && verdict != OfAnswer::AskAgain && !matches!(outcome, Outcome::Awaited(_)) {
            self.running = None;
        }
        if verdict == OfAnswer::PassOver {
            metrics::STEPS_LATE.inc();
            self.shard().node.dispatcher.kept(&place, attempt);
            return self.drive();
        }
        if verdict == OfAnswer::AskAgain {
            let again = Answer { attempt, place, outcome };
            self.me
                .send_after(Duration::from_millis(5), || AgentMessage::Answered(Box::new(again)));
            return Ok(());
        }
        point(if attempt.step.is_tool() { "call-answered" } else { "step-answered" });
        match outcome {
            Outcome::Done(answer) => {
                let told = Told::Pool(place.clone(), attempt);
                self.done(attempt, answer, &place, told);
            }
            Outcome::NotRun { after } => self.again_after(after),
            Outcome::Failed(failure) => self.step_failed(attempt, failure),
            Outcome::Awaited(named) => self.await_worker(named),
        }
        Ok(())
    }

    /// An answer that its worker brings, because its asker is gone or the link to it broke.
    pub(super) async fn routed(
        &mut self,
        routed: Routed,
        reply: Reply,
    ) -> Result<(), ActorProcessingErr> {
        if let Err(error) = self.wake_known().await {
            self.refuse(reply, error.reason(), &error.to_string());
            return Ok(());
        }
        let Routed { attempt, answer, worker } = routed;
        let work = attempt.work.lsn;
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let is_taken = turn.is_some_and(|turn| turn.takes(attempt.step, attempt.number));
        match (contest::of_answer(is_taken, self.underway(work)), answer) {
            (OfAnswer::PassOver, _) => {
                metrics::STEPS_LATE.inc();
                self.refuse(reply, Reason::Superseded, "nobody waits for it any more");
            }
            (OfAnswer::AskAgain, _) => {
                self.refuse(reply, Reason::Overloaded, "the work is being journaled");
            }
            (OfAnswer::Journal, Some(answer)) => {
                (self.running, self.hold_until) = (None, None);
                let place = if worker == self.shard().node.name {
                    Place::Here
                } else {
                    Place::There(worker)
                };
                self.done(attempt, answer, &place, Told::Worker(reply));
            }
            (OfAnswer::Journal, None) => {
                reply.send(Bytes::new());
                if self.running.take_if(|running| **running == attempt).is_some() {
                    self.step_failed(attempt, lost("its worker failed"));
                }
            }
        }
        self.drive()
    }

    fn done(&mut self, attempt: Attempt, answer: StepAnswer, place: &Place, told: Told) {
        let (work, step) = (attempt.work.lsn, attempt.step);
        if let Err(error) = Turn::check_output(step, &answer.output) {
            self.shard().node.dispatcher.kept(place, attempt);
            if let Some(reply) = told.reply() {
                reply.send(Bytes::new());
            }
            let (kind, reason) = (ErrorKind::Invalid, Reason::ModelAnswerInvalid);
            let detail = error.to_string();
            return self
                .step_failed(attempt, JobFailure { kind, reason, detail, is_harmless: false });
        }
        metrics::STEPS.inc();
        if *place != Place::Here {
            metrics::STEPS_REMOTE.inc();
        }
        if attempt.epoch != self.shard().epoch {
            metrics::STEPS_TAKEN_OVER.inc();
        }
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let tool = turn.and_then(Turn::tool_call);
        let done = StepDone {
            step,
            name: tool.map(|call| call.tool.clone()).unwrap_or_default(),
            output: answer.output,
            node: answer.node,
            attempts: attempt.number,
            start_ms: answer.start_ms,
            end_ms: answer.end_ms,
            usage: Usage {
                calls: answer.calls,
                input_tokens: answer.input_tokens,
                output_tokens: answer.output_tokens,
            },
        };
        let ended = turn.and_then(|turn| turn.end_after(&done));
        let mut entries = vec![Entry::StepDone(done)];
        entries.extend(ended.map(Entry::Ended));
        self.journal(work, entries, Some(told));
    }

    fn step_failed(&mut self, attempt: Attempt, failure: JobFailure) {
        let (work, number) = (attempt.work.lsn, attempt.number);
        tracing::warn!(agent = %self.args.id, work = work.0, attempt = number, reason = %failure.reason, "a step failed");
        if matches!(failure.reason, Reason::ModelUnavailable | Reason::ToolUnavailable) {
            self.hold(Duration::from_millis(100 << number.min(6)));
        }
        let JobFailure { kind, reason, detail, is_harmless } = failure;
        let failure = Failure { kind, reason, detail, is_harmless };
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        match turn.and_then(|turn| turn.failed(number, failure)) {
            Some(Entry::StepDoubted(doubted)) => self.doubt(work, doubted),
            Some(entry) => self.journal(work, vec![entry], None),
            // It is in doubt already: what is next is to find out.
            None => _ = self.me.cast(AgentMessage::Drive),
        }
    }
}

/// What the step needs; if the model asked for a tool that the definition does not have, what it is told.
pub(super) fn wanted(
    turn: &Turn,
    step: StepKey,
    definition: &Definition,
) -> Result<Wanted, String> {
    match step {
        StepKey::Phase(PhaseKey { phase, .. }) => Ok(Wanted::Phase(phase)),
        StepKey::Call(CallKey { of: Callee::Model, .. }) => {
            Ok(Wanted::Model(definition.model.clone()))
        }
        StepKey::Call(CallKey { of: Callee::Tool(_), .. }) => {
            let tool = turn.tool_call().map(|call| call.tool.clone()).unwrap_or_default();
            match definition.tools.contains(&tool) {
                true => Ok(Wanted::Tool(tool)),
                false => Err(format!(
                    "there is no tool {tool:.80?}: {} is allowed",
                    definition.tools.join(" or ")
                )),
            }
        }
    }
}
