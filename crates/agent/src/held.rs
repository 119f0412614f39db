//! The steps that the pools of this node run, and answers that nobody has in a journal yet.
//!
//! An answer belongs to the agent, not to the actor that asked: it is kept until an owner says that it has it, or its
//! deadline passed, and told to whoever owns the agent by then. Bounded in bytes: the oldest go first, and are counted.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::Instant;

use domain::view::View;
use domain::{Attempt, Epoch, ProcessName, ShardId};
use proto::link::{StepAnswer, StepHeld, StepsHeld};

use crate::shard::lock;
use crate::{metrics, wire};

/// What is kept at most, in bytes.
const BYTES_MAX: usize = 16 << 20;
/// What an answer takes beside its output.
const ANSWER_BYTES: usize = 256;
/// So many names of answers that nobody needs are borne with before they are swept out.
const ORDER_SLACK: usize = 1_024;

#[derive(Default)]
pub(crate) struct Held {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    steps: HashMap<Attempt, Step>,
    /// Answers, oldest first; those that somebody has meanwhile are passed over.
    order: VecDeque<Attempt>,
    bytes: usize,
}

struct Step {
    shard: ShardId,
    deadline: Instant,
    outcome: Outcome,
    /// A later owner that asked for it.
    wanted_by: Option<WantedBy>,
    is_routed: bool,
}

/// A node, and the epoch in which it owns the shard.
pub(crate) type WantedBy = (ProcessName, Epoch);

enum Outcome {
    Running,
    Done(StepAnswer),
    /// It came to nothing; whoever waits for it has to be told.
    Failed,
}

/// A step whose answer has to be told to another owner than the one that asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub attempt: Attempt,
    pub shard: ShardId,
    pub deadline: Instant,
}

impl Step {
    fn bytes(&self) -> usize {
        match &self.outcome {
            Outcome::Done(answer) => ANSWER_BYTES + answer.output.len(),
            Outcome::Running | Outcome::Failed => 0,
        }
    }

    /// Once for each time that it moves.
    fn route(&mut self, attempt: Attempt, view: Option<&View>) -> Option<Route> {
        let owned = view.and_then(|view| view.owner(self.shard)).map(|(_, epoch)| epoch);
        let is_moved = owned.is_some_and(|epoch| attempt.epoch < epoch);
        if self.is_routed || !(is_moved || self.wanted_by.is_some()) {
            return None;
        }
        self.is_routed = true;
        Some(Route { attempt, shard: self.shard, deadline: self.deadline })
    }
}

impl Held {
    pub(crate) fn begin(&self, attempt: Attempt, shard: ShardId, deadline: Instant) {
        let (outcome, wanted_by) = (Outcome::Running, None);
        let step = Step { shard, deadline, outcome, wanted_by, is_routed: false };
        let mut inner = lock(&self.inner);
        // An answer under the same name was of the same attempt, asked for once more.
        inner.remove(&attempt);
        inner.steps.insert(attempt, step);
    }

    /// What a step came to; none if to nothing. The route, if another owner is to be told than the one that asked.
    pub(crate) fn finish(
        &self,
        attempt: &Attempt,
        answer: Option<&StepAnswer>,
        view: Option<&View>,
    ) -> Option<Route> {
        let mut inner = lock(&self.inner);
        let step = inner.steps.get_mut(attempt)?;
        step.outcome = match answer {
            Some(answer) => Outcome::Done(answer.clone()),
            None => Outcome::Failed,
        };
        let (route, bytes) = (step.route(*attempt, view), step.bytes());
        if answer.is_none() && route.is_none() {
            inner.steps.remove(attempt);
            return None;
        }
        inner.bytes += bytes;
        inner.order.push_back(*attempt);
        inner.shrink(Instant::now());
        route
    }

    /// These are in a journal, or nobody wants them any more.
    pub(crate) fn kept(&self, attempts: &[Attempt]) {
        let mut inner = lock(&self.inner);
        for attempt in attempts {
            inner.remove(attempt);
        }
        // Whatever was given up at the front makes room.
        inner.shrink(Instant::now());
    }

    /// What `node`, which owns `shard` in `epoch`, has to know of its steps. It is told of those that still run.
    pub(crate) fn of_shard(&self, shard: ShardId, node: &ProcessName, epoch: Epoch) -> StepsHeld {
        let mut inner = lock(&self.inner);
        let mut steps = Vec::new();
        for (attempt, step) in &mut inner.steps {
            if step.shard != shard || epoch < attempt.epoch {
                continue;
            }
            let answer = match &step.outcome {
                Outcome::Running => None,
                Outcome::Done(answer) => Some(answer.clone()),
                Outcome::Failed => continue,
            };
            if step.wanted_by.as_ref().is_none_or(|(_, known)| *known < epoch) {
                step.wanted_by = Some((node.clone(), epoch));
            }
            let left = step.deadline.saturating_duration_since(Instant::now());
            let left_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
            steps.push(StepHeld { attempt: Some(wire::attempt(attempt)), answer, left_ms });
        }
        StepsHeld { steps }
    }

    /// The shards have these owners now: which answers are to be told to somebody else than who asked.
    pub(crate) fn moved(&self, view: &View) -> Vec<Route> {
        let mut inner = lock(&self.inner);
        let done =
            inner.steps.iter_mut().filter(|(_, step)| !matches!(step.outcome, Outcome::Running));
        done.filter_map(|(attempt, step)| step.route(*attempt, Some(view))).collect()
    }

    /// Who asked last for a step of an owner before.
    pub(crate) fn wanted_by(&self, attempt: &Attempt) -> Option<WantedBy> {
        lock(&self.inner).steps.get(attempt)?.wanted_by.clone()
    }

    /// Whether no answer is on its way to a later owner.
    pub(crate) fn is_settled(&self) -> bool {
        lock(&self.inner).steps.values().all(|step| !step.is_routed)
    }

    /// Whether somebody asked for a step.
    #[cfg(test)]
    pub(crate) fn is_wanted(&self) -> bool {
        lock(&self.inner).steps.values().any(|step| step.wanted_by.is_some())
    }

    /// The answer of a step that is routed (none if it came to nothing), and who asked for it last. None if nobody needs it
    /// any more.
    pub(crate) fn answer(
        &self,
        attempt: &Attempt,
    ) -> Option<(Option<StepAnswer>, Option<WantedBy>)> {
        let inner = lock(&self.inner);
        let step = inner.steps.get(attempt)?;
        let answer = match &step.outcome {
            Outcome::Running => return None,
            Outcome::Done(answer) => Some(answer.clone()),
            Outcome::Failed => None,
        };
        Some((answer, step.wanted_by.clone()))
    }
}

impl Inner {
    fn remove(&mut self, attempt: &Attempt) {
        if let Some(step) = self.steps.remove(attempt) {
            self.bytes -= step.bytes();
        }
    }

    /// Lets go of what is past its deadline, and of the oldest beyond the limit.
    fn shrink(&mut self, now: Instant) {
        // An old answer at the front must not hold up the names of all that were kept after it.
        if 2 * self.steps.len() + ORDER_SLACK < self.order.len() {
            self.order.retain(|attempt| self.steps.contains_key(attempt));
        }
        while let Some(oldest) = self.order.front().copied() {
            match self.steps.get(&oldest) {
                None => {}
                Some(step) if step.deadline <= now => {}
                Some(_) if BYTES_MAX < self.bytes => metrics::ANSWERS_DROPPED.inc(),
                Some(_) => return,
            }
            self.remove(&oldest);
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use domain::view::{Place, Version};
    use domain::{Class, Incarnation, Lsn, Member, Phase, Slot, StepKey, Term, WorkId};
    use std::time::Duration;

    const SHARD: ShardId = ShardId(0);

    fn attempt(lsn: u64) -> Attempt {
        let work = WorkId { class: Class(0), slot: Slot::new(0).unwrap(), lsn: Lsn(lsn) };
        Attempt { work, step: StepKey::phase(0, Phase::Action), epoch: Epoch(1), number: 1 }
    }

    fn answer(bytes: usize) -> StepAnswer {
        StepAnswer { output: Bytes::from(vec![0; bytes]), ..StepAnswer::default() }
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn view(node: &str, epoch: u64) -> View {
        let table = domain::slot::ShardTable::single(1).unwrap();
        let mut view = View::new(Version { term: Term(1), number: 1 }, table);
        let owner = Some(Member { name: node.parse().unwrap(), incarnation: Incarnation(1) });
        view.shards.insert(SHARD, Place { owner, epoch: Epoch(epoch), open: true, stopped: false });
        view
    }

    #[test]
    fn an_answer_that_nobody_takes_holds_up_no_memory_of_later_ones() {
        let held = Held::default();
        let finish = |lsn| {
            held.begin(attempt(lsn), SHARD, later());
            held.finish(&attempt(lsn), Some(&answer(3)), Some(&view("node-1", 1)));
        };
        finish(1);
        for lsn in 2..5_000 {
            finish(lsn);
            held.kept(&[attempt(lsn)]);
        }
        assert!(held.answer(&attempt(1)).is_some());
        assert!(lock(&held.inner).order.len() <= ORDER_SLACK + 2);
    }

    #[test]
    fn an_answer_is_kept_until_an_owner_has_it() {
        let held = Held::default();
        held.begin(attempt(1), SHARD, later());
        assert_eq!(held.finish(&attempt(1), Some(&answer(3)), Some(&view("node-1", 1))), None);
        assert!(held.answer(&attempt(1)).is_some());
        held.kept(&[attempt(1)]);
        assert!(held.answer(&attempt(1)).is_none());
        assert_eq!(lock(&held.inner).bytes, 0);
    }

    #[test]
    fn a_step_that_is_asked_for_again_takes_no_room_twice() {
        let held = Held::default();
        for _ in 0..3 {
            held.begin(attempt(1), SHARD, later());
            held.finish(&attempt(1), Some(&answer(3)), None);
        }
        held.kept(&[attempt(1)]);
        assert_eq!(lock(&held.inner).bytes, 0);
    }

    #[test]
    fn an_answer_goes_to_the_next_owner_once() {
        let held = Held::default();
        held.begin(attempt(1), SHARD, later());
        held.finish(&attempt(1), Some(&answer(3)), None);
        assert_eq!(held.moved(&view("node-1", 1)), []);
        assert_eq!(held.moved(&view("node-2", 2)).len(), 1);
        assert_eq!(held.moved(&view("node-2", 2)), []);
    }

    #[test]
    fn a_new_owner_is_told_what_runs_and_then_what_it_came_to() {
        let held = Held::default();
        held.begin(attempt(1), SHARD, later());
        held.begin(attempt(2), ShardId(9), later());
        let node = "node-2".parse().unwrap();
        let steps = held.of_shard(SHARD, &node, Epoch(2)).steps;
        assert_eq!((steps.len(), steps[0].answer.clone()), (1, None));
        let route = held.finish(&attempt(1), Some(&answer(3)), Some(&view("node-1", 1)));
        assert!(route.is_some(), "although the view does not know the new owner yet");
        assert_eq!(held.answer(&attempt(1)).unwrap().1, Some((node, Epoch(2))));
    }

    #[test]
    fn who_waits_is_told_of_a_failure_and_nobody_else() {
        let held = Held::default();
        held.begin(attempt(1), SHARD, later());
        held.begin(attempt(2), SHARD, later());
        assert_eq!(held.finish(&attempt(1), None, None), None);
        held.of_shard(SHARD, &"node-2".parse().unwrap(), Epoch(2));
        assert!(held.finish(&attempt(2), None, None).is_some());
        assert_eq!(held.answer(&attempt(2)).unwrap().0, None);
    }

    #[test]
    fn beyond_the_limit_the_oldest_go_and_are_counted() {
        let held = Held::default();
        let before = metrics::ANSWERS_DROPPED.get();
        for n in 0..5 {
            held.begin(attempt(n), SHARD, later());
            held.finish(&attempt(n), Some(&answer(4 << 20)), None);
        }
        assert!(held.answer(&attempt(0)).is_none() && held.answer(&attempt(1)).is_none());
        assert!(held.answer(&attempt(4)).is_some());
        assert!(before + 2 <= metrics::ANSWERS_DROPPED.get());
    }

    #[test]
    fn what_is_past_its_deadline_is_let_go() {
        let held = Held::default();
        held.begin(attempt(1), SHARD, Instant::now());
        held.finish(&attempt(1), Some(&answer(3)), None);
        held.begin(attempt(2), SHARD, later());
        held.finish(&attempt(2), Some(&answer(3)), None);
        assert!(held.answer(&attempt(1)).is_none() && held.answer(&attempt(2)).is_some());
    }
}
