//! A step in doubt: its tool is asked, then its definition, then a person.

use std::time::{Duration, Instant};

use prost::Message;
use ractor::ActorProcessingErr;

use cluster::Reply;
use domain::entry::{Entry, StepDoubted, Verdict};
use domain::round::Returned;
use domain::turn::Turn;
use domain::turn::doubt::{Reconciled, Signalled, Which};
use domain::{Attempt, Lsn, Position, Reason, StepKey};
use proto::link::{SignalAnswer, StepAnswer, WorkInfo};
use telemetry::fault::point;

use super::step::{Outcome, wanted};
use super::{AgentMessage, Answer, State, Told};
use crate::dispatch::{self, Order, Target};
use crate::worker::{DONE, NOT_DONE};
use crate::{clock, info, metrics, read};

/// After a probe that came to nothing.
const PROBE_AGAIN: Duration = Duration::from_millis(1_000);

/// What a person says about a step.
#[derive(Clone, Debug)]
pub(crate) struct Signal {
    pub which: Which,
    pub verdict: Verdict,
    /// What the step came to, if it was done.
    pub returned: Returned,
}

impl State {
    /// Journals that nobody knows whether a step was done.
    pub(super) fn doubt(&mut self, work: Lsn, doubted: StepDoubted) {
        metrics::DOUBTS.inc();
        let StepDoubted { step, attempt, reason } = doubted;
        tracing::warn!(agent = %self.args.id, work = work.0, %step, attempt, %reason, "a step is in doubt");
        self.journal(work, vec![Entry::StepDoubted(doubted)], None);
    }

    /// Asks the tool what became of an attempt.
    pub(super) fn settle(&mut self, work: Lsn, step: StepKey, number: u32) {
        let shard = self.shard().clone();
        if shard.must_prove() {
            return self.prove();
        }
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return };
        let attempt = self.attempt(turn, step, number);
        if self.asked.as_deref() == Some(&attempt) {
            return;
        }
        let hash = turn.accepted().definition;
        let Some(known) = shard.node.definitions.get(&hash) else { return self.fetch(hash) };
        let view = shard.node.view.load_full();
        let target = wanted(turn, step, &known.definition).map(|wanted| {
            shard.node.dispatcher.target(view.as_deref(), &wanted, &known.definition.modality)
        });
        let place = match target {
            Ok(Target::At(place, _)) => place,
            Ok(Target::Later) => return self.hold(PROBE_AGAIN),
            // Who could know may be about to come back.
            Ok(Target::Nowhere) => return self.probe_failed(attempt),
            Err(_) => {
                return self.judge(work, attempt.step, Reconciled::Unknown, StepAnswer::default());
            }
        };
        let mut job = self.job(turn, attempt, &known.definition);
        if let Some(tool) = &mut job.tool {
            tool.is_probe = true;
        }
        self.running = Some(Box::new(attempt));
        let traceparent = self.traceparent(work);
        let deadline = Instant::now() + Duration::from_millis(shard.node.config.tool_timeout_ms);
        let order = Order { job, attempt, traceparent, deadline, begin_by_ms: None };
        let me = self.me.clone();
        tokio::spawn(async move {
            point("doubt-before-probe");
            let outcome = shard.node.dispatcher.run(place.clone(), order).await;
            point("doubt-probed");
            let outcome = match outcome {
                dispatch::Outcome::Done(answer) => Outcome::Done(answer),
                dispatch::Outcome::NotRun { after } => Outcome::NotRun { after },
                dispatch::Outcome::Failed(failure) | dispatch::Outcome::Cut(failure) => {
                    Outcome::Failed(failure)
                }
            };
            _ = me.cast(AgentMessage::Probed(Box::new(Answer { attempt, place, outcome })));
        });
    }

    /// What the tool says, unless the doubt is over by now.
    pub(super) fn probed(&mut self, answer: Answer) -> Result<(), ActorProcessingErr> {
        let Answer { attempt, outcome, .. } = answer;
        let work = attempt.work.lsn;
        let is_expected = self.running.take_if(|running| **running == attempt).is_some();
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let is_doubted = turn.and_then(Turn::doubted).is_some_and(|doubted| {
            (doubted.step, doubted.attempt) == (attempt.step, attempt.number)
        });
        if !is_expected || !is_doubted || self.is_journaling(work) {
            return self.drive();
        }
        match outcome {
            Outcome::Done(answer) => {
                let reconciled = match answer.reconciled {
                    DONE => Reconciled::Done,
                    NOT_DONE => Reconciled::NotDone,
                    _ => Reconciled::Unknown,
                };
                self.judge(work, attempt.step, reconciled, answer);
            }
            // It was not asked.
            Outcome::NotRun { after } => self.hold(after.max(PROBE_AGAIN)),
            Outcome::Failed(_) | Outcome::Awaited(_) => self.probe_failed(attempt),
        }
        Ok(())
    }

    /// Nobody has said anything about the attempt. After some times that is its answer: nobody knows.
    fn probe_failed(&mut self, attempt: Attempt) {
        if self.probes.failed(attempt) {
            let none = StepAnswer::default();
            return self.judge(attempt.work.lsn, attempt.step, Reconciled::Unknown, none);
        }
        self.hold(PROBE_AGAIN);
    }

    fn judge(&mut self, work: Lsn, step: StepKey, reconciled: Reconciled, answer: StepAnswer) {
        let Some(turn) = self.fold.as_ref().and_then(|fold| fold.turn(work)) else { return };
        let attempt = turn.doubted().map_or(0, |doubted| doubted.attempt);
        let Some(verdict) = turn.judge(reconciled) else {
            tracing::warn!(agent = %self.args.id, work = work.0, %step, "a person has to say what became of a step");
            self.asked = Some(Box::new(self.attempt(turn, step, attempt)));
            return;
        };
        let none = || Returned { output: String::new(), is_error: false };
        let returned = Returned::parse(&answer.output).unwrap_or_else(|_| none());
        let entries = turn.resolve(verdict, &returned, &answer.node, clock::now_ms());
        self.journal(work, entries, None);
    }

    /// A person says what became of a step.
    pub(super) async fn signal(
        &mut self,
        work: Lsn,
        signal: Box<Signal>,
        reply: Reply,
    ) -> Result<(), ActorProcessingErr> {
        if let Err(error) = self.wake_known().await {
            self.refuse(reply, error.reason(), &error.to_string());
            return Ok(());
        }
        let turn = self.fold.as_ref().and_then(|fold| fold.turn(work));
        let Some(turn) = turn else {
            let shard = self.shard().clone();
            tokio::spawn(async move { read::signalled(&shard, work, &signal, reply).await });
            return Ok(());
        };
        if self.is_journaling(work) {
            // What is on its way may be the doubt, or its end.
            let (me, writer) = (self.me.clone(), self.shard().writer.clone());
            tokio::spawn(async move {
                writer.settled().await;
                _ = me.cast(AgentMessage::Signal(work, signal, reply));
            });
            return Ok(());
        }
        let Signal { which, verdict, returned } = &*signal;
        match turn.signal(which, *verdict, returned, clock::now_ms()) {
            Signalled::Journal(entries) => {
                // A probe that is under way is too late.
                (self.running, self.hold_until, self.asked) = (None, None, None);
                self.journal(work, entries, Some(Told::Signal(reply)));
            }
            Signalled::Known => {
                answer_signal(reply, info::of_turn(&self.args.id, turn), self.position());
            }
            Signalled::Refused => {
                let message = match turn.doubted() {
                    Some(doubted) => format!(
                        "the step in doubt is {} ({}), number {}, attempt {}",
                        doubted.step, doubted.tool, doubted.sequence, doubted.attempt
                    ),
                    None => format!("the work is {}, and no step of it in doubt", turn.state()),
                };
                self.refuse(reply, Reason::NotInDoubt, &message);
            }
        }
        Ok(())
    }
}

pub(crate) fn answer_signal(reply: Reply, work: WorkInfo, position: Position) {
    let Position { epoch, lsn } = position;
    let answer = SignalAnswer { work: Some(work), lsn: lsn.0, epoch: epoch.0 };
    reply.send(answer.encode_to_vec().into());
}
