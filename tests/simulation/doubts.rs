//! Steps that a new owner finds begun: workers are asked what they have, tools and people what became of the rest. The
//! shell around [`domain::turn::doubt`].

use domain::StepKey;
use domain::entry::Verdict;
use domain::turn::doubt::{Reconciled, Signalled, Which};

use crate::config::Fault;
use crate::host::{Asks, Host};
use crate::message::{Job, Message};
use crate::phases;
use crate::turns::now_ms;
use crate::world::{Address, World};

/// How long a new owner waits for word of its steps.
const NAMED_MS: u64 = 200;
/// How long a person thinks, at most.
const PERSON_MS: u64 = 2_000;

impl Host {
    pub(crate) fn ask_workers(&mut self, world: &mut World, asks: &Asks) {
        self.asked_until = world.now + NAMED_MS;
        for node in 0..world.config.nodes {
            let (shard, epoch, owner) = (self.shard, self.epoch, self.node);
            let message = Message::StepsWanted { shard, epoch, owner };
            world.send(asks.from, Address::Node(node), message);
        }
    }

    pub(crate) fn steps_held(&mut self, world: &mut World, asks: &mut Asks, jobs: Vec<Job>) {
        // What comes later is not waited for; an answer may come all the same.
        if self.asked_until <= world.now {
            return;
        }
        let agents: Vec<usize> = jobs.iter().map(|job| job.agent).collect();
        self.named.extend(jobs);
        for agent in agents {
            self.take_over(world, asks, agent);
        }
    }

    /// A step that a worker has is waited for as if this owner had asked for it.
    pub(crate) fn take_over(&mut self, world: &mut World, asks: &mut Asks, agent: usize) {
        let Some(hot) = self.hot.get_mut(&agent) else { return };
        let takes = |job: &&Job| {
            let turn = hot.agent.current().filter(|turn| turn.id() == job.work);
            job.agent == agent && turn.is_some_and(|turn| turn.takes(job.step, job.attempt))
        };
        let found = self.named.iter().find(takes).map(|job| (job.work, job.step, job.attempt));
        if let Some((work, step, attempt)) = found
            && !hot.is_journaling
            && hot.job.is_none()
        {
            world.happen(Fault::StepNamed);
            hot.agent.await_worker();
            hot.job = Some((work, step, attempt, world.now));
        }
        self.drive(world, asks, agent);
    }

    /// Asks the tool what became of an attempt; where it does not know, the definition decides, or a person does.
    pub(crate) fn settle_doubt(
        &mut self,
        world: &mut World,
        asks: &mut Asks,
        agent: usize,
        step: StepKey,
        attempt: u32,
    ) {
        let now = now_ms(world);
        let Some(hot) = self.hot.get_mut(&agent) else { return };
        let Some(turn) = hot.agent.current() else { return };
        let work = turn.id();
        if let Some(asked_at) = hot.asked_at {
            if world.now < asked_at + PERSON_MS {
                return;
            }
            let verdicts = [Verdict::PersonDone, Verdict::PersonRetry, Verdict::PersonFail];
            let verdict = verdicts[world.chance.index(verdicts.len())];
            let signalled = turn.signal(&Which::default(), verdict, &phases::returned(), now);
            let Signalled::Journal(entries) = signalled else { return };
            world.happen(Fault::DoubtEndedByPerson);
            hot.asked_at = None;
            self.journal(world, asks, agent, work, entries);
            return;
        }
        let reconciled = match world.chance.permille(500) {
            true => Reconciled::Unknown,
            false if world.model.was_made(agent, work, step, attempt) => Reconciled::Done,
            false => Reconciled::NotDone,
        };
        let Some(verdict) = turn.judge(reconciled) else {
            hot.asked_at = Some(world.now);
            return;
        };
        world.happen(match reconciled {
            Reconciled::Unknown => Fault::DoubtEndedByPolicy,
            Reconciled::Done | Reconciled::NotDone => Fault::DoubtEndedByTool,
        });
        let entries = turn.resolve(verdict, &phases::returned(), "node", now);
        self.journal(world, asks, agent, work, entries);
    }
}
