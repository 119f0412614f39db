//! One agent: the fold of its journal. Its queue is what is accepted and not ended; what it remembers are its findings.

use std::collections::{BTreeMap, VecDeque};

use crate::chain::{Output, PhaseKey, one_line};
use crate::entry::{Entry, Stamp};
use crate::turn::{Limits, Turn};
use crate::{DefinitionHash, Epoch, Error, IdempotencyKey, Lsn, Reason, Seq, StepKey, WorkState};

/// How many works an agent may have accepted and not ended.
pub const QUEUE_MAX: usize = 64;
/// How many findings an agent keeps, the newest.
pub const FINDINGS_MAX: usize = 16;
const FINDING_CHARS_MAX: usize = 240;
/// How many of its passages an agent keeps, the newest.
pub const PASSAGES_MAX: usize = 8;

/// How an agent came into memory, or left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passage {
    /// By the clock of its owner then.
    pub at_ms: i64,
    pub epoch: Epoch,
    pub reason: Reason,
}

/// The fold of one agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agent {
    /// The number of its last entry.
    pub seq: Seq,
    /// The lsn of its last entry.
    pub head: Lsn,
    /// The lsn of its newest work.
    pub last_work: Lsn,
    /// Works that have not ended, oldest first.
    open: BTreeMap<Lsn, Turn>,
    /// What its ended works found, oldest first.
    findings: VecDeque<String>,
    /// Oldest first.
    passages: VecDeque<Passage>,
}

impl Agent {
    /// An agent as a snapshot has it.
    pub fn restore(
        seq: Seq,
        head: Lsn,
        last_work: Lsn,
        findings: Vec<String>,
        passages: Vec<Passage>,
        open: Vec<Turn>,
    ) -> Self {
        let mut open: BTreeMap<Lsn, Turn> =
            open.into_iter().map(|turn| (turn.id(), turn)).collect();
        if let Some(turn) = open.values_mut().next() {
            turn.begin();
        }
        Self { seq, head, last_work, open, findings: findings.into(), passages: passages.into() }
    }

    pub fn passages(&self) -> impl Iterator<Item = Passage> {
        self.passages.iter().copied()
    }

    /// It came into memory, or is about to leave it.
    pub fn pass(&mut self, passage: Passage) {
        if self.passages.len() == PASSAGES_MAX {
            self.passages.pop_front();
        }
        self.passages.push_back(passage);
    }

    /// Keeps no more room than what it remembers takes.
    pub fn shrink(&mut self) {
        self.findings.shrink_to_fit();
        self.passages.shrink_to_fit();
    }

    /// It was about to leave, and something came.
    pub fn stay(&mut self) {
        self.passages.pop_back_if(|last| last.reason == Reason::Idle);
    }

    /// Works that have not ended, oldest first.
    pub fn open(&self) -> impl Iterator<Item = &Turn> {
        self.open.values()
    }

    pub fn open_len(&self) -> usize {
        self.open.len()
    }

    pub fn turn(&self, work: Lsn) -> Option<&Turn> {
        self.open.get(&work)
    }

    pub fn findings(&self) -> impl Iterator<Item = &str> {
        self.findings.iter().map(String::as_str)
    }

    /// The work whose turn it is: the oldest open one.
    pub fn current(&self) -> Option<&Turn> {
        self.open.values().next()
    }

    /// The open work that was submitted under `key`.
    pub fn submitted_as(&self, key: &IdempotencyKey) -> Option<&Turn> {
        self.open.values().find(|turn| turn.accepted().key == *key)
    }

    /// Whether one more work may be accepted while `accepting` others are on their way into the journal.
    ///
    /// # Errors
    /// The queue is full.
    pub fn admit(&self, accepting: usize) -> Result<(), Reason> {
        if self.open.len() + accepting < QUEUE_MAX { Ok(()) } else { Err(Reason::QueueFull) }
    }

    /// Folds one entry of `work`; `limits` tells what a definition allows. Returns the turn when this entry ended it.
    ///
    /// # Errors
    /// An entry that cannot follow. Nothing is changed then.
    pub fn apply(
        &mut self,
        work: Lsn,
        entry: Entry,
        stamp: Stamp,
        limits: impl Fn(&DefinitionHash) -> Limits,
    ) -> Result<Option<Turn>, Error> {
        let refuse = |entry: &Entry, why| Err(Error::Sequence { entry: entry.name(), why });
        if stamp.seq != self.seq.next() {
            return refuse(&entry, "its number is not the next one of the agent");
        }
        if stamp.lsn <= self.head {
            return refuse(&entry, "its place in the log is before the last one");
        }
        let ended = if let Entry::Accepted(accepted) = entry {
            let limits = limits(&accepted.definition);
            self.open.insert(stamp.lsn, Turn::accept(accepted, stamp, limits));
            self.last_work = stamp.lsn;
            None
        } else {
            let Some(turn) = self.open.get_mut(&work) else {
                return refuse(&entry, "its work is not open");
            };
            turn.apply(entry, stamp)?;
            if turn.state().is_final() { self.open.remove(&work) } else { None }
        };
        if self.open.is_empty() {
            // An emptied map keeps room for eleven turns, which an idle agent does not need.
            self.open = BTreeMap::new();
        }
        self.seq = stamp.seq;
        self.head = stamp.lsn;
        if let Some(turn) = &ended {
            self.remember(turn);
        }
        if let Some(turn) = self.open.values_mut().next() {
            turn.begin();
        }
        Ok(ended)
    }

    /// Its shard has a new owner: see [`Turn::interrupt`]. Only the work whose turn it was can have begun a step.
    pub fn interrupt(&mut self) {
        if let Some(turn) = self.open.values_mut().next() {
            turn.interrupt();
        }
    }

    /// The worker of the current step still has it, although its owner is gone: see [`Turn::await_worker`].
    pub fn await_worker(&mut self) {
        if let Some(turn) = self.open.values_mut().next() {
            turn.await_worker();
        }
    }

    fn remember(&mut self, turn: &Turn) {
        if turn.state() != WorkState::Succeeded {
            return;
        }
        let Some(finding) = finding(turn) else { return };
        if self.findings.len() == FINDINGS_MAX {
            self.findings.pop_front();
        }
        self.findings.push_back(finding);
    }
}

/// What is remembered of a work: the terms that it observed, and the beginning of its answer.
fn finding(turn: &Turn) -> Option<String> {
    let mut terms = String::new();
    let mut answer = None;
    for (_, done) in turn.steps() {
        let StepKey::Phase(PhaseKey { phase, .. }) = done.step else { continue };
        match Output::parse(phase, &done.output).ok()? {
            Output::Observation(observation) => terms = observation.terms.join(", "),
            Output::Yield(yielded) => answer = Some(yielded.answer),
            Output::Action(_)
            | Output::Experience(_)
            | Output::Intention(_)
            | Output::Understanding(_) => {}
        }
    }
    if let (None, Some((_, ended))) = (&answer, turn.ended()) {
        answer = Some(String::from_utf8_lossy(&ended.result).into_owned());
    }
    let text = if terms.is_empty() { answer? } else { format!("{terms}: {}", answer?) };
    Some(one_line(&text, FINDING_CHARS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Accepted;
    use crate::turn::ended;
    use crate::{Class, Slot};
    use bytes::Bytes;

    fn limits(_: &DefinitionHash) -> Limits {
        Limits::chain(0, 3)
    }

    fn stamp(n: u64) -> Stamp {
        Stamp { seq: Seq(n), lsn: Lsn(n), epoch: Epoch(1), ts_ms: 0 }
    }

    fn accept(agent: &mut Agent, n: u64) {
        let accepted = Accepted {
            definition: DefinitionHash([0; 32]),
            input: Bytes::from_static(b"text"),
            key: format!("k{n}").parse().unwrap(),
            deadline_ms: 0,
            traceparent: None,
            class: Class(0),
            slot: Slot::new(0).unwrap(),
        };
        agent.apply(Lsn(0), Entry::Accepted(accepted), stamp(n), limits).unwrap();
    }

    #[test]
    fn works_run_in_the_order_of_their_acceptance() {
        let mut agent = Agent::default();
        accept(&mut agent, 1);
        accept(&mut agent, 2);
        let states: Vec<_> = agent.open().map(Turn::state).collect();
        assert_eq!(states, [WorkState::Running, WorkState::Accepted]);
        let end = Entry::Ended(ended(WorkState::Failed, Reason::ModelRefused));
        let over = agent.apply(Lsn(1), end, stamp(3), limits).unwrap();
        assert_eq!(over.map(|turn| turn.id()), Some(Lsn(1)));
        assert_eq!(
            agent.current().map(|turn| (turn.id(), turn.state())),
            Some((Lsn(2), WorkState::Running))
        );
    }

    #[test]
    fn an_entry_out_of_turn_changes_nothing() {
        let mut agent = Agent::default();
        accept(&mut agent, 1);
        let before = agent.clone();
        let wait = || Entry::Waiting(Reason::NoOffer);
        assert!(agent.apply(Lsn(1), wait(), stamp(3), limits).is_err(), "a gap");
        assert!(agent.apply(Lsn(1), wait(), stamp(1), limits).is_err(), "a repetition");
        assert!(agent.apply(Lsn(9), wait(), stamp(2), limits).is_err(), "an unknown work");
        assert_eq!(agent, before);
    }

    #[test]
    fn the_queue_has_a_limit() {
        let mut agent = Agent::default();
        for n in 1..=QUEUE_MAX as u64 {
            assert_eq!(agent.admit(0), Ok(()));
            accept(&mut agent, n);
        }
        assert_eq!(agent.admit(0), Err(Reason::QueueFull));
    }

    #[test]
    fn only_the_work_whose_turn_it_was_is_interrupted() {
        let mut agent = Agent::default();
        accept(&mut agent, 1);
        accept(&mut agent, 2);
        agent.interrupt();
        let nexts: Vec<_> = agent.open().map(Turn::next).collect();
        assert!(matches!(nexts[0], crate::turn::Next::Begin(_)));
        assert!(matches!(nexts[1], crate::turn::Next::Run { attempt: 1, .. }));
    }
}
