//! The reference model: what must hold, told from outside and by other means than `domain`'s.
//!
//! It sees every commit and fence in the order in which the store does them, every answer that a client gets and every
//! step that is started. The first broken promise is kept.

use std::collections::BTreeMap;
use std::fmt;

use domain::StepKey;
use domain::chain::{Phase, PhaseKey};
use domain::entry::{Entry, Resolution, StepDone};
use domain::turn::doubt::Effect;
use domain::{Epoch, IdempotencyKey, Lsn, Member, Seq, ShardId, Term, WorkState};

use crate::config::Config;
use crate::message::{Group, Job, Row};
use crate::phases;

/// What is promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    NothingAcknowledgedIsLost,
    OneOwnerWrites,
    RowsAreWrittenOnce,
    CommittedStepsRunOnce,
    /// A call that must not be made twice is made again only after somebody said so, in the journal.
    NothingIsRepeatedSilently,
    /// No answer of an attempt counts after another was begun.
    OldAnswersAreDropped,
    JournalBeforeEffect,
    OneTurnAtATimeInOrder,
    OneWorkPerKey,
    NothingIsForgotten,
    NothingFollowsTheEnd,
    OnlyTheLeaderMoves,
    NoFalseAlarm,
    EverythingEnds,
    /// An assertion of the code itself failed.
    NoPanic,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    pub(crate) promise: Promise,
    pub(crate) detail: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.promise, self.detail)
    }
}

#[derive(Default)]
struct Shard {
    epoch: Epoch,
    owner: Option<Member>,
    term: Term,
    head: Lsn,
    writers: BTreeMap<Epoch, (Member, u64)>,
    /// Which agent a row number means.
    rows: BTreeMap<u64, usize>,
}

#[derive(Default)]
struct Agent {
    seq: Seq,
    head: Lsn,
    /// In the order of acceptance.
    works: Vec<Work>,
    /// What its succeeded works found, and in which epoch.
    findings: Vec<(String, Epoch)>,
}

struct Work {
    id: Lsn,
    key: IdempotencyKey,
    input: String,
    epoch: Epoch,
    steps: BTreeMap<StepKey, Epoch>,
    /// The last attempt of each step that the journal says was begun.
    begun: BTreeMap<StepKey, u32>,
    once: BTreeMap<StepKey, Once>,
    ended: Option<(WorkState, Epoch)>,
}

/// A call that must not be made twice.
#[derive(Clone, Debug, Default)]
struct Once {
    /// Attempts that are intended in the journal, each with the first epoch that can know it.
    intended: BTreeMap<u32, Epoch>,
    /// Attempts that an owner sent out.
    started: Vec<u32>,
    /// Attempts that a worker carried out.
    made: Vec<u32>,
    is_in_doubt: bool,
    /// How often the journal lets it be made again.
    again: usize,
}

/// An answer without a work differs from none.
fn differ(a: Lsn, b: Lsn) -> bool {
    a != b && a != Lsn(0) && b != Lsn(0)
}

pub(crate) struct Model {
    shards: Vec<Shard>,
    agents: Vec<Agent>,
    /// What each request of a client was told: its work, 0 if it was not told which.
    told: Vec<Option<Lsn>>,
    requests: Vec<(usize, IdempotencyKey)>,
    pub(crate) broken: Option<Broken>,
}

impl Model {
    pub(crate) fn new(config: &Config) -> Self {
        let requests = config.submits.iter();
        Self {
            shards: (0..config.shards).map(|_| Shard::default()).collect(),
            agents: (0..config.agents).map(|_| Agent::default()).collect(),
            told: vec![None; config.submits.len()],
            requests: requests.map(|s| (s.agent, s.key.parse().unwrap())).collect(),
            broken: None,
        }
    }

    pub(crate) fn breach(&mut self, promise: Promise, detail: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(Broken { promise, detail: detail() });
        }
    }

    /// Who owns a shard: what a client with a fresh map would ask.
    pub(crate) fn owner(&self, shard: ShardId) -> Option<&Member> {
        self.shards[shard.0 as usize].owner.as_ref()
    }

    pub(crate) fn fenced(&mut self, id: ShardId, epoch: Epoch, to: Member, term: Term) {
        let shard = &mut self.shards[id.0 as usize];
        let (old_epoch, old_term) = (shard.epoch, shard.term);
        (shard.epoch, shard.owner, shard.term) = (epoch, Some(to), term);
        if epoch <= old_epoch {
            self.breach(Promise::OneOwnerWrites, || {
                format!("shard {id}: epoch {epoch} came twice")
            });
        }
        if term < old_term {
            self.breach(Promise::OnlyTheLeaderMoves, || {
                format!("shard {id} was moved by term {term} after term {old_term} had moved it")
            });
        }
    }

    pub(crate) fn committed(&mut self, group: &Group) {
        let (id, epoch) = (group.shard, group.epoch);
        let shard = &mut self.shards[id.0 as usize];
        let writer = shard.writers.entry(epoch).or_insert_with(|| group.by.clone()).clone();
        let (current, owner, head) = (shard.epoch, shard.owner.clone(), shard.head);
        shard.rows.extend(group.agents.iter().map(|row| (row.id, row.agent)));
        if epoch != current {
            self.breach(Promise::OneOwnerWrites, || {
                format!("shard {id}: epoch {epoch} wrote while epoch {current} owned it")
            });
        }
        if writer != group.by || owner.as_ref() != Some(&group.by.0) {
            self.breach(Promise::OneOwnerWrites, || {
                format!("shard {id} epoch {epoch}: {:?} and {:?} wrote", writer, group.by)
            });
        }
        let mut expected = head;
        for row in &group.rows {
            expected = expected.next();
            if row.lsn != expected {
                let lsn = row.lsn;
                self.breach(Promise::RowsAreWrittenOnce, || {
                    format!("shard {id}: row {lsn} was written where {expected} comes next")
                });
            }
            self.entry(id, row);
        }
        self.shards[id.0 as usize].head = expected.max(head);
    }

    fn entry(&mut self, shard: ShardId, row: &Row) {
        if row.agent_row == 0 {
            return;
        }
        let Some(agent) = self.shards[shard.0 as usize].rows.get(&row.agent_row).copied() else {
            return self.breach(Promise::NothingIsForgotten, || {
                format!("shard {shard}: row {} is of an agent without a row", row.lsn)
            });
        };
        let Agent { seq, head, .. } = self.agents[agent];
        if row.prev != head || row.seq != seq.next() {
            self.breach(Promise::NothingIsForgotten, || {
                format!(
                    "agent {agent}: entry {} follows {} as number {}, but its last is {head}, number {seq}",
                    row.lsn, row.prev, row.seq
                )
            });
        }
        self.agents[agent].seq = row.seq;
        self.agents[agent].head = row.lsn;
        match &row.entry {
            Entry::Accepted(accepted) => {
                let (key, input) = (accepted.key.clone(), accepted.input.clone());
                self.accepted(agent, row, key, String::from_utf8_lossy(&input).into_owned());
            }
            Entry::StepDone(done) => self.step(agent, row, done),
            Entry::StepBegan(began) => self.begun(agent, row, began.step, began.attempt),
            Entry::StepIntended(intended) => {
                self.begun(agent, row, intended.step, intended.attempt);
                self.intended(agent, row, intended.step, intended.attempt);
            }
            Entry::StepDoubted(doubted) => self.doubted(agent, row, doubted.step),
            Entry::StepResolved(resolved) => {
                let resolution = resolved.verdict.resolution();
                self.resolved(agent, row, resolved.step, resolution);
            }
            Entry::Ended(ended) => self.ended(agent, row, ended.state),
            Entry::ShardOpened(_)
            | Entry::Waiting(_)
            | Entry::Resumed(_)
            | Entry::CancelRequested(_) => self.is_turn_of(agent, row),
        }
    }

    fn accepted(&mut self, agent: usize, row: &Row, key: IdempotencyKey, input: String) {
        if let Some(first) = self.agents[agent].works.iter().find(|work| work.key == key) {
            let first = first.id;
            self.breach(Promise::OneWorkPerKey, || {
                format!("agent {agent}: key {key} became work {first} and work {}", row.lsn)
            });
        }
        let (steps, begun, once) = Default::default();
        let (id, epoch) = (row.lsn, row.epoch);
        let work = Work { id, key, input, epoch, steps, begun, once, ended: None };
        self.agents[agent].works.push(work);
    }

    /// Every entry but a cancellation belongs to the oldest work that has not ended.
    fn is_turn_of(&mut self, agent: usize, row: &Row) {
        let current = self.agents[agent].works.iter().find(|work| work.ended.is_none());
        let current = current.map(|work| work.id);
        let is_ended =
            self.agents[agent].works.iter().any(|work| work.id == row.work && work.ended.is_some());
        let name = row.entry.name();
        if is_ended {
            return self.breach(Promise::NothingFollowsTheEnd, || {
                format!("agent {agent}: {name} of work {} came after its end", row.work)
            });
        }
        if current != Some(row.work)
            && !matches!(row.entry, Entry::CancelRequested(_) | Entry::Ended(_))
        {
            self.breach(Promise::OneTurnAtATimeInOrder, || {
                format!("agent {agent}: {name} of work {} in the turn of {current:?}", row.work)
            });
        }
    }

    fn work(&mut self, agent: usize, work: Lsn) -> Option<&mut Work> {
        self.agents[agent].works.iter_mut().find(|known| known.id == work)
    }

    fn begun(&mut self, agent: usize, row: &Row, step: StepKey, attempt: u32) {
        self.is_turn_of(agent, row);
        let Some(work) = self.work(agent, row.work) else { return };
        let begun = work.begun.entry(step).or_insert(1);
        *begun = attempt.max(*begun);
    }

    fn intended(&mut self, agent: usize, row: &Row, step: StepKey, attempt: u32) {
        let epoch = row.epoch;
        let Some(work) = self.work(agent, row.work) else { return };
        let once = work.once.entry(step).or_default();
        once.intended.entry(attempt).or_insert(epoch);
        let detail = format!("{step} of work {} is intended again, {once:?}", row.work);
        let is_silent = once.is_in_doubt || once.started.len() > once.again;
        if is_silent {
            self.breach(Promise::NothingIsRepeatedSilently, || detail);
        }
    }

    fn doubted(&mut self, agent: usize, row: &Row, step: StepKey) {
        self.is_turn_of(agent, row);
        let Some(work) = self.work(agent, row.work) else { return };
        work.once.entry(step).or_default().is_in_doubt = true;
    }

    fn resolved(&mut self, agent: usize, row: &Row, step: StepKey, resolution: Resolution) {
        self.is_turn_of(agent, row);
        let Some(work) = self.work(agent, row.work) else { return };
        let once = work.once.entry(step).or_default();
        once.is_in_doubt = false;
        // Attempts that were intended and never sent count as if they had been.
        if resolution == Resolution::Retry {
            once.again = once.again.max(once.started.len()).max(once.intended.len());
        }
    }

    fn step(&mut self, agent: usize, row: &Row, done: &StepDone) {
        self.is_turn_of(agent, row);
        let (step, attempt) = (done.step, done.attempts);
        let Some(work) = self.work(agent, row.work) else { return };
        let begun = work.begun.get(&step).copied().unwrap_or(1);
        if attempt < begun {
            return self.breach(Promise::OldAnswersAreDropped, || {
                format!("agent {agent}: {step} of work {}: attempt {attempt} of {begun}", row.work)
            });
        }
        let Some(work) = self.work(agent, row.work) else { return };
        let due = phases::after(&work.input, work.steps.keys().next_back().copied());
        let earlier = work.steps.insert(step, row.epoch);
        if earlier.is_some() || due != Some(step) {
            self.breach(Promise::CommittedStepsRunOnce, || {
                format!("agent {agent}: work {} journaled {step:?} while {due:?} was due", row.work)
            });
        }
    }

    fn ended(&mut self, agent: usize, row: &Row, state: WorkState) {
        self.is_turn_of(agent, row);
        let agent = &mut self.agents[agent];
        let Some(work) = agent.works.iter_mut().find(|work| work.id == row.work) else { return };
        work.ended = Some((state, row.epoch));
        if state == WorkState::Succeeded {
            agent.findings.push((phases::finding(&work.input), row.epoch));
        }
    }

    /// An owner starts a step. It can only know what was committed up to its own epoch.
    pub(crate) fn started(&mut self, job: &Job) {
        let (agent, epoch) = (job.agent, job.epoch);
        let known = &self.agents[agent];
        let Some(work) = known.works.iter().find(|w| w.id == job.work && w.epoch <= epoch) else {
            return self.breach(Promise::JournalBeforeEffect, || {
                format!(
                    "agent {agent}: {:?} of work {}, which is not committed",
                    job.step, job.work
                )
            });
        };
        let is_known = |at: &Epoch| *at <= epoch;
        let done = work.steps.iter().filter(|(_, at)| is_known(at)).map(|(step, _)| *step);
        let done: Vec<StepKey> = done.collect();
        let due = phases::after(&work.input, done.last().copied());
        let is_over = |work: &&Work| work.ended.is_some_and(|(_, at)| at <= epoch);
        let is_early = known.works.iter().any(|w| w.id < job.work && !is_over(&w));
        let findings: Vec<&String> =
            known.findings.iter().filter(|(_, at)| is_known(at)).map(|(text, _)| text).collect();
        let is_experience =
            matches!(job.step, StepKey::Phase(PhaseKey { phase: Phase::Experience, .. }));
        let is_same = findings.iter().copied().eq(job.findings.iter());
        let detail =
            |what: &str| format!("agent {agent}: {:?} of work {} {what}", job.step, job.work);
        let breach = if done.contains(&job.step) {
            Some((Promise::CommittedStepsRunOnce, detail("was started after its commit")))
        } else if is_over(&work) {
            Some((Promise::NothingFollowsTheEnd, detail("was started after the end of the work")))
        } else if due != Some(job.step) {
            Some((Promise::JournalBeforeEffect, detail("was started before the step before it")))
        } else if is_early {
            Some((Promise::OneTurnAtATimeInOrder, detail("was started before its turn")))
        } else if is_experience && !is_same {
            let known = format!("recalls {:?} of {findings:?}", job.findings);
            Some((Promise::NothingIsForgotten, detail(&known)))
        } else {
            None
        };
        if let Some((promise, detail)) = breach {
            return self.breach(promise, || detail);
        }
        if crate::phases::effect(job.step) == Effect::Once {
            self.started_once(job);
        }
    }

    fn started_once(&mut self, job: &Job) {
        let (agent, epoch, attempt) = (job.agent, job.epoch, job.attempt);
        let Some(work) = self.work(agent, job.work) else { return };
        let once = work.once.entry(job.step).or_default();
        let is_intended = once.intended.get(&attempt).is_some_and(|since| *since <= epoch);
        // A doubt may have come meanwhile: it is left alone until such a call can be under way no more.
        let is_again = once.started.contains(&attempt);
        once.started.push(attempt);
        let detail = format!("agent {agent}: {} of work {}, {once:?}", job.step, job.work);
        if is_again {
            self.breach(Promise::NothingIsRepeatedSilently, || detail);
        } else if !is_intended {
            self.breach(Promise::JournalBeforeEffect, || detail);
        }
    }

    /// A worker carries a step out.
    pub(crate) fn made(&mut self, job: &Job) {
        if crate::phases::effect(job.step) == Effect::Idempotent {
            return;
        }
        let Some(work) = self.work(job.agent, job.work) else { return };
        let once = work.once.entry(job.step).or_default();
        once.made.push(job.attempt);
        let detail = format!("{} of work {} was made {once:?}", job.step, job.work);
        if once.again + 1 < once.made.len() {
            self.breach(Promise::NothingIsRepeatedSilently, || detail);
        }
    }

    /// What the tool knows of an attempt.
    pub(crate) fn was_made(&self, agent: usize, work: Lsn, step: StepKey, attempt: u32) -> bool {
        let work = self.agents[agent].works.iter().find(|known| known.id == work);
        work.and_then(|work| work.once.get(&step)).is_some_and(|once| once.made.contains(&attempt))
    }

    /// A client was told that its request became `work`.
    pub(crate) fn acknowledged(&mut self, request: usize, work: Lsn) {
        let (agent, key) = self.requests[request].clone();
        let same = self.requests.iter().zip(&self.told);
        let mut same = same.filter(|(other, _)| **other == (agent, key.clone()));
        if let Some(other) = same.find_map(|(_, told)| told.filter(|told| differ(*told, work))) {
            self.breach(Promise::OneWorkPerKey, || {
                format!("agent {agent}: key {key} was answered with {other} and with {work}")
            });
        }
        self.told[request] = Some(work);
    }

    pub(crate) fn is_acknowledged(&self, request: usize) -> bool {
        self.told[request].is_some()
    }

    /// Whether every request was answered and every work has ended.
    pub(crate) fn is_at_rest(&self) -> bool {
        let mut works = self.agents.iter().flat_map(|agent| &agent.works);
        self.told.iter().all(Option::is_some) && works.all(|work| work.ended.is_some())
    }

    pub(crate) fn states(&self) -> impl Iterator<Item = WorkState> {
        let works = self.agents.iter().flat_map(|agent| &agent.works);
        works.filter_map(|work| Some(work.ended?.0))
    }

    /// The end of the schedule: everything that was acknowledged is there, and has ended.
    pub(crate) fn finish(&mut self) {
        for request in 0..self.requests.len() {
            let (agent, key) = self.requests[request].clone();
            let work = self.agents[agent].works.iter().find(|work| work.key == key);
            let found = work.map(|work| work.id);
            let Some(told) = self.told[request] else { continue };
            if found.is_none_or(|id| differ(told, id)) {
                self.breach(Promise::NothingAcknowledgedIsLost, || {
                    format!(
                        "agent {agent}: key {key} was acknowledged as {told}, there is {found:?}"
                    )
                });
            }
        }
        if !self.is_at_rest() {
            let works = self.agents.iter().flat_map(|agent| &agent.works);
            let open: Vec<Lsn> = works.filter(|w| w.ended.is_none()).map(|w| w.id).collect();
            let told = self.told.clone();
            self.breach(Promise::EverythingEnds, || {
                format!("open works {open:?}, answers to requests {told:?}")
            });
        }
    }
}
