//! The turns of the agents in memory: what is next is journaled or run, and what comes back is journaled. The shell
//! around [`domain::turn`].

use bytes::Bytes;
use domain::chain::StepKey;
use domain::entry::{Entry, PhaseDone, Usage};
use domain::turn::{Failure, Next};
use domain::{ErrorKind, Lsn, Reason, Seq, WorkState};

use crate::config::Fault;
use crate::host::{Asks, Host, Item};
use crate::message::{Job, Message};
use crate::world::{Address, World};

const JOB_MS: u64 = 400;

impl Host {
    /// Does what is next in the turn of `agent`, if nothing is under way.
    pub(crate) fn drive(&mut self, world: &mut World, asks: &mut Asks, agent: usize) {
        let Some(hot) = self.hot.get_mut(&agent) else { return };
        let Some(turn) = hot.agent.current() else { return };
        if turn.state() == WorkState::Cancelling {
            hot.job = None;
        }
        let is_waiting = turn.state() == WorkState::Waiting && world.now < hot.resumes_at;
        if hot.is_journaling || hot.job.is_some() || is_waiting {
            return;
        }
        let work = turn.id();
        let entry = match turn.next() {
            Next::Nothing => return,
            Next::Begin(began) => Entry::StepBegan(began),
            Next::End(ended) => Entry::Ended(ended),
            Next::Run { .. } if turn.state() == WorkState::Waiting => {
                Entry::Resumed(Reason::OfferAppeared)
            }
            Next::Run { .. } if world.is_faulty() && world.chance.permille(20) => {
                world.happen(Fault::NobodyOffered);
                hot.resumes_at = world.now + world.chance.between(20, 400);
                Entry::Waiting(Reason::NoOffer)
            }
            Next::Run { step, attempt } => {
                hot.job = Some((work, step, attempt, world.now));
                return self.run(world, asks, agent, work, step, attempt);
            }
        };
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
        };
        if 1 < attempt {
            world.happen(Fault::StepBegunAgain);
        }
        world.trace(|| format!("RUN shard {} {job:?}", self.shard));
        world.model.started(&job);
        let worker = Address::Node(world.chance.index(world.config.nodes));
        world.send(asks.from, worker, Message::Job(job));
    }

    /// What must never be done: the last step that is in the journal, once more.
    pub(crate) fn run_again(&self, world: &mut World, asks: &Asks, agent: usize) {
        let turn = self.hot.get(&agent).and_then(|hot| hot.agent.current());
        let Some(turn) = turn else { return };
        let Some((_, done)) = turn.phases().last() else { return };
        self.run(world, asks, agent, turn.id(), done.step, done.attempts);
    }

    /// Appends entries of the agent's turn. Whether there was room.
    fn journal(
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
        let is_awaited = hot.job.is_some_and(|(work, step, attempt, _)| {
            (work, step, attempt) == (job.work, job.step, job.attempt)
        });
        let turn = hot.agent.turn(job.work).filter(|_| is_awaited && !hot.is_journaling);
        let Some(turn) = turn else { return world.happen(Fault::AnswerTooLate) };
        let done = PhaseDone {
            step: job.step,
            output,
            node: format!("node-{node}"),
            attempts: job.attempt,
            start_ms: 0,
            end_ms: 0,
            usage: Usage::default(),
        };
        let end = turn.end_after(&done).map(Entry::Ended);
        let entries = [Entry::PhaseDone(done)].into_iter().chain(end).collect();
        if self.journal(world, asks, job.agent, job.work, entries)
            && let Some(hot) = self.hot.get_mut(&job.agent)
        {
            hot.job = None;
        }
    }

    pub(crate) fn cancel(&mut self, world: &mut World, asks: &mut Asks, agent: usize, work: Lsn) {
        let Some(hot) = self.hot.get(&agent) else { return };
        let is_open =
            hot.agent.turn(work).is_some_and(|turn| turn.state() != WorkState::Cancelling);
        if is_open && !hot.is_journaling {
            world.happen(Fault::Cancelled);
            let entry = Entry::CancelRequested(Reason::CancelRequested);
            self.journal(world, asks, agent, work, vec![entry]);
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
        let entry = turn.failed(attempt, Failure { kind, reason, detail: String::new() });
        if self.journal(world, asks, agent, work, vec![entry])
            && let Some(hot) = self.hot.get_mut(&agent)
        {
            hot.job = None;
        }
    }
}
