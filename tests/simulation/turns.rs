//! The turns of the agents in memory: what is next is journaled or run, and what comes back is journaled. The shell
//! around [`domain::turn`].

use bytes::Bytes;
use domain::entry::{Entry, StepDone, Usage};
use domain::turn::doubt::Effect;
use domain::turn::{Failure, Next, Stop, Turn};
use domain::{ErrorKind, Lsn, Reason, Seq, StepKey, WorkState};

use crate::config::{Break, Fault};
use crate::host::{Asks, Host, Item};
use crate::message::{Job, Message};
use crate::phases;
use crate::world::{Address, World};

const JOB_MS: u64 = 400;
/// For how long an intent is young.
const YOUNG_MS: u64 = 400;

impl Host {
    /// Does what is next in the turn of `agent`, if nothing is under way.
    pub(crate) fn drive(&mut self, world: &mut World, asks: &mut Asks, agent: usize) {
        let Some(hot) = self.hot.get_mut(&agent) else { return };
        let Some(turn) = hot.agent.current() else { return };
        let is_waiting = turn.state() == WorkState::Waiting && world.now < hot.resumes_at;
        if hot.is_journaling || hot.job.is_some() || is_waiting || world.now < hot.settles_at {
            return;
        }
        let work = turn.id();
        let entry = match turn.next() {
            Next::Nothing => return,
            Next::Begin(began) => Entry::StepBegan(began),
            Next::Doubt(doubted) if world.breaks(Break::RepeatSilently) => {
                let (step, attempt) = (doubted.step, doubted.attempt);
                hot.job = Some((work, step, attempt, world.now));
                return self.run(world, asks, agent, work, step, attempt);
            }
            Next::Doubt(doubted) => Entry::StepDoubted(doubted),
            Next::End(ended) => Entry::Ended(ended),
            Next::Run { not_before_ms, .. } | Next::Settle { not_before_ms, .. }
                if now_ms(world) < not_before_ms =>
            {
                return;
            }
            Next::Settle { step, attempt, .. } => {
                return self.settle_doubt(world, asks, agent, step, attempt);
            }
            Next::Run { .. } if turn.state() == WorkState::Waiting => {
                Entry::Resumed(Reason::OfferAppeared)
            }
            Next::Run { .. } if world.is_faulty() && world.chance.permille(20) => {
                world.happen(Fault::NobodyOffered);
                hot.resumes_at = world.now + world.chance.between(20, 400);
                Entry::Waiting(Reason::NoOffer)
            }
            Next::Run { step, attempt, .. } => {
                if let Some(intent) = intent(world, turn, hot.intended, step, attempt) {
                    hot.intended = Some((step, attempt, world.now));
                    intent
                } else {
                    hot.job = Some((work, step, attempt, world.now));
                    return self.run(world, asks, agent, work, step, attempt);
                }
            }
        };
        if matches!(entry, Entry::StepDoubted(_)) {
            world.happen(Fault::StepInDoubt);
        }
        self.journal(world, asks, agent, work, vec![entry]);
    }

    fn run(
        &self,
        world: &mut World,
        asks: &Asks,
        agent: usize,
        work: Lsn,
        step: StepKey,
        attempt: u32,
    ) {
        let Some(hot) = self.hot.get(&agent) else { return };
        let Some(turn) = hot.agent.turn(work) else { return };
        let job = Job {
            owner: self.node,
            epoch: self.epoch,
            agent,
            work,
            step,
            attempt,
            input: turn.accepted().input.clone(),
            findings: hot.agent.findings().map(str::to_owned).collect(),
            sent_at: world.now,
            deadline: world.now + JOB_MS,
        };
        if 1 < attempt {
            world.happen(Fault::StepBegunAgain);
        }
        world.trace(|| format!("RUN shard {} {job:?}", self.shard));
        world.model.started(&job);
        let worker = Address::Node(world.chance.index(world.config.nodes));
        world.send(asks.from, worker, Message::Job(job));
        let is_once = phases::effect(step) == Effect::Once;
        if is_once && world.is_faulty() && world.chance.permille(50) {
            // Its client does not want it any more, while a call is under way that must not be made twice.
            world.send(Address::Clients, asks.from, Message::Cancel { agent, work });
        }
    }

    /// What must never be done: the last step that is in the journal, once more.
    pub(crate) fn run_again(&self, world: &mut World, asks: &Asks, agent: usize) {
        let turn = self.hot.get(&agent).and_then(|hot| hot.agent.current());
        let Some(turn) = turn else { return };
        let Some((_, done)) = turn.steps().last() else { return };
        self.run(world, asks, agent, turn.id(), done.step, done.attempts);
    }

    /// Appends entries of the agent's turn. Whether there was room.
    pub(crate) fn journal(
        &mut self,
        world: &mut World,
        asks: &mut Asks,
        agent: usize,
        work: Lsn,
        entries: Vec<Entry>,
    ) -> bool {
        let Some(hot) = self.hot.get(&agent) else { return false };
        let count = entries.len() as u64;
        let ends = entries.iter().filter_map(|entry| match entry {
            Entry::Ended(ended) => Some((work, ended.state)),
            _ => None,
        });
        let ends = ends.collect();
        let rows = entries.into_iter().map(|entry| (work, entry)).collect();
        let item = Item { ends, ..hot.item(agent, rows) };
        if !self.push(world, item) {
            return false;
        }
        if let Some(hot) = self.hot.get_mut(&agent) {
            hot.seq = Seq(hot.seq.0 + count);
            hot.is_journaling = true;
        }
        self.flush(world, asks);
        true
    }

    pub(crate) fn job_answered(
        &mut self,
        world: &mut World,
        asks: &mut Asks,
        job: &Job,
        output: Bytes,
        node: usize,
    ) {
        let Some(hot) = self.hot.get(&job.agent) else { return };
        let takes = |turn: &&Turn| match world.breaks(Break::JournalOldAnswer) {
            true => matches!(turn.next(), Next::Run { step, .. } if step == job.step),
            false => turn.takes(job.step, job.attempt),
        };
        let turn = hot.agent.turn(job.work).filter(|_| !hot.is_journaling).filter(takes);
        let Some(turn) = turn else { return world.happen(Fault::AnswerTooLate) };
        if job.epoch != self.epoch {
            world.happen(Fault::AnswerTakenOver);
        }
        if turn.state() == WorkState::InDoubt {
            world.happen(Fault::DoubtEndedByAnswer);
        }
        let done = StepDone {
            step: job.step,
            name: String::new(),
            output,
            node: format!("node-{node}"),
            attempts: job.attempt,
            start_ms: 0,
            end_ms: 0,
            usage: Usage::default(),
        };
        let end = turn.end_after(&done).map(Entry::Ended);
        let entries = [Entry::StepDone(done)].into_iter().chain(end).collect();
        if self.journal(world, asks, job.agent, job.work, entries)
            && let Some(hot) = self.hot.get_mut(&job.agent)
        {
            hot.job = None;
        }
    }

    pub(crate) fn cancel(&mut self, world: &mut World, asks: &mut Asks, agent: usize, work: Lsn) {
        let Some(hot) = self.hot.get(&agent).filter(|hot| !hot.is_journaling) else { return };
        let Some(turn) = hot.agent.turn(work) else { return };
        let (is_doubted, entries) = (turn.doubted().is_some(), turn.stopped(Stop::Cancel));
        let doubts = entries.iter().any(|entry| matches!(entry, Entry::StepDoubted(_)));
        if !self.journal(world, asks, agent, work, entries) {
            return;
        }
        world.happen(Fault::Cancelled);
        if is_doubted || doubts {
            world.happen(Fault::StoppedInDoubt);
        }
        if let Some(hot) = self.hot.get_mut(&agent) {
            hot.job = hot.job.filter(|(of, ..)| *of != work);
        }
    }

    pub(crate) fn give_up_job(&mut self, world: &mut World, asks: &mut Asks, agent: usize) {
        let Some(hot) = self.hot.get_mut(&agent) else { return };
        let Some((work, _, attempt, since)) = hot.job else { return };
        let Some(turn) = hot.agent.turn(work) else { return hot.job = None };
        if world.now < since + JOB_MS || hot.is_journaling {
            return;
        }
        let (kind, reason) = (ErrorKind::Unavailable, Reason::WorkerLost);
        // What was sent out may have been done.
        let failure = Failure { kind, reason, detail: String::new(), is_harmless: false };
        let Some(entry) = turn.failed(attempt, failure) else { return hot.job = None };
        if matches!(entry, Entry::StepDoubted(_)) {
            world.happen(Fault::StepInDoubt);
        }
        if self.journal(world, asks, agent, work, vec![entry])
            && let Some(hot) = self.hot.get_mut(&agent)
        {
            hot.job = None;
        }
    }
}

/// The intent that has to be in the journal before the step is begun, unless a young one is.
fn intent(
    world: &mut World,
    turn: &Turn,
    intended: Option<(StepKey, u32, u64)>,
    step: StepKey,
    attempt: u32,
) -> Option<Entry> {
    if phases::effect(step) == Effect::Idempotent {
        return None;
    }
    let is_young = intended.is_some_and(|(of, number, sent_at)| {
        (of, number) == (step, attempt) && world.now <= sent_at + YOUNG_MS
    });
    if !turn.needs_intent(Effect::Once) {
        if is_young {
            return None;
        }
        world.happen(Fault::IntentRenewed);
    }
    let deadline_ms = now_ms(world) + i64::try_from(JOB_MS).unwrap();
    turn.intend("w", attempt, deadline_ms).map(Entry::StepIntended)
}

pub(crate) fn now_ms(world: &World) -> i64 {
    i64::try_from(world.now).unwrap()
}
