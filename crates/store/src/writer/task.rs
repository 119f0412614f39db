//! The task behind a [`super::WriterHandle`]: sends one group after the other and settles what became of each.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain::heads::{self, STALE_AGENTS_MAX};
use domain::pace::Pace;
use domain::writer::{Next, Outcome, Placed};
use domain::{Epoch, Lsn, Reason};
use proto::link::Group;
use telemetry::fault::{COMMIT, Injected, injected, point};

use super::{Append, Committed, Event, Shared, Stopped, group};
use crate::{CommitOutcome, Error, Store, metrics};

const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

pub(super) struct Task {
    shared: Arc<Shared>,
    store: Arc<dyn Store>,
    database: String,
    on_event: Box<dyn Fn(Event) + Send + Sync>,
    marked: Instant,
    pace: Pace,
    /// When the last commit was answered.
    answered: Option<Instant>,
    /// Agents that the owner was told to write and has not written.
    told: BTreeSet<u64>,
}

/// The task is over: the writer stopped, or nobody is left to append.
struct Over;

impl Task {
    pub(super) fn new(
        shared: Arc<Shared>,
        store: Arc<dyn Store>,
        database: String,
        on_event: Box<dyn Fn(Event) + Send + Sync>,
    ) -> Self {
        let (marked, pace, answered, told) =
            (Instant::now(), Pace::default(), None, BTreeSet::new());
        Self { shared, store, database, on_event, marked, pace, answered, told }
    }

    pub(super) async fn run(mut self) {
        loop {
            if let Some(reason) = self.asked_to_stop() {
                return self.stop(reason);
            }
            if let Err(Over) = self.gather().await {
                return;
            }
            match self.cut() {
                Some(group) => {
                    point("writer-cut");
                    if let Err(Over) = self.settle(group).await {
                        return;
                    }
                }
                None if self.is_abandoned() => return self.stop(Reason::ShuttingDown),
                None => {
                    point("writer-idle");
                    self.shared.wake.notified().await;
                }
            }
        }
    }

    fn asked_to_stop(&self) -> Option<Reason> {
        self.shared.lock().stop
    }

    fn is_abandoned(&self) -> bool {
        let state = self.shared.lock();
        state.is_abandoned && state.writer.is_settled()
    }

    /// Lets more come while the store is busy.
    async fn gather(&mut self) -> Result<(), Over> {
        let Some(answered) = self.answered else { return Ok(()) };
        let waiting_rows = self.shared.lock().writer.waiting_rows();
        if waiting_rows == 0 {
            return Ok(());
        }
        let pause = self.pace.pause(waiting_rows).saturating_sub(answered.elapsed());
        if pause.is_zero() {
            return Ok(());
        }
        metrics::GATHERED.inc();
        self.unless_stopped(tokio::time::sleep(pause)).await
    }

    /// Builds the next group. It is built once: sent again, it is the same, unchanged.
    fn cut(&mut self) -> Option<Arc<Group>> {
        let mut state = self.shared.lock();
        let state = &mut *state;
        let before = state.writer.waiting_rows();
        let epoch = state.writer.epoch();
        let next = state.writer.cut()?;
        let ms_since = self.marked.elapsed().as_millis() as u64;
        let is_due = heads::due(state.rows_since_mark, ms_since);
        let mark = is_due.then(|| group::mark(next.before, &state.heads));
        let built = group::build(epoch, next, &state.heads, mark);
        metrics::WAITING_ROWS.sub((before - state.writer.waiting_rows()) as i64);
        Some(Arc::new(built))
    }

    /// Until the group is acknowledged or the writer stops.
    async fn settle(&mut self, group: Arc<Group>) -> Result<(), Over> {
        let started = Instant::now();
        self.shared.lock().in_flight_since = Some(started);
        let mut outcome = self.send(&group).await?;
        loop {
            let next = {
                let mut state = self.shared.lock();
                let next = state.writer.settle(outcome);
                if matches!(next, Next::Acknowledge(_)) {
                    state.in_flight_since = None;
                }
                next
            };
            match next {
                Next::Acknowledge(items) => {
                    point("writer-committed");
                    metrics::COMMIT_SECONDS.observe(started.elapsed().as_secs_f64());
                    self.answered = Some(Instant::now());
                    self.acknowledge(&group, items.items);
                    point("writer-acknowledged");
                    return Ok(());
                }
                Next::ReadPosition => outcome = self.read_position().await?,
                Next::SendAgain => outcome = self.send(&group).await?,
                Next::Stop(reason) => {
                    self.stop(reason);
                    return Err(Over);
                }
            }
        }
    }

    /// Sends the group until the store takes it, refuses it, or its answer is lost.
    async fn send(&mut self, group: &Arc<Group>) -> Result<Outcome, Over> {
        let mut backoff = Backoff::new();
        loop {
            let (store, database) = (self.store.clone(), self.database.clone());
            let group = group.clone();
            point("writer-before-commit");
            let sent = Instant::now();
            let commit = async move { commit(&*store, &database, group).await };
            let error = match self.unless_stopped(commit).await? {
                Ok(CommitOutcome::Committed) => {
                    self.pace.answered(sent.elapsed());
                    return Ok(Outcome::Committed);
                }
                Ok(CommitOutcome::Fenced { epoch }) => {
                    return Ok(Outcome::Fenced { epoch: Epoch(epoch) });
                }
                Ok(CommitOutcome::HeadMismatch { .. }) => return Ok(Outcome::HeadMismatch),
                Err(Error::Unknown { what }) => {
                    point("writer-answer-lost");
                    metrics::UNKNOWN.inc();
                    tracing::warn!(database = self.database, what, "a commit has no answer");
                    return Ok(Outcome::Unknown);
                }
                Err(error) => error,
            };
            if !error.is_certainly_not_done() && !matches!(error, Error::Denied { .. }) {
                tracing::error!(database = self.database, %error, "the store cannot take a commit");
                self.stop(Reason::StoreUnavailable);
                return Err(Over);
            }
            backoff.tell(&self.database, "cannot commit yet", &error);
            self.back_off(&mut backoff).await?;
        }
    }

    /// Reads where the log ends until the store tells.
    async fn read_position(&mut self) -> Result<Outcome, Over> {
        let mut backoff = Backoff::new();
        loop {
            let (store, database) = (self.store.clone(), self.database.clone());
            let read = async move { store.owner(&database).await };
            point("writer-before-position");
            let read = self.unless_stopped(read).await?;
            point("writer-position-read");
            match read {
                Ok(row) => {
                    return Ok(Outcome::Position { epoch: Epoch(row.epoch), head: Lsn(row.head) });
                }
                Err(error) => backoff.tell(&self.database, "cannot read the position yet", &error),
            }
            self.back_off(&mut backoff).await?;
        }
    }

    async fn back_off(&mut self, backoff: &mut Backoff) -> Result<(), Over> {
        let pause = backoff.next();
        point("writer-backing-off");
        self.unless_stopped(tokio::time::sleep(pause)).await
    }

    /// Awaits `work`, and gives it up when the writer is to stop.
    async fn unless_stopped<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Over> {
        let work = Box::pin(work);
        tokio::select! {
            biased;
            done = work => return Ok(done),
            () = self.shared.halt.notified() => {}
        }
        self.stop(self.asked_to_stop().unwrap_or(Reason::ShuttingDown));
        Err(Over)
    }

    fn acknowledge(&mut self, group: &Group, items: Vec<Placed<Append>>) {
        metrics::GROUPS.inc();
        metrics::GROUP_ROWS.inc_by(group.rows.len() as u64);
        metrics::GROUP_BYTES.inc_by(group.rows.iter().map(|row| row.payload.len() as u64).sum());
        let stale = self.note(group);
        let answered = items.len() as u64;
        for placed in items {
            let committed = Committed { first: placed.first, last: placed.last() };
            (placed.item.done)(Ok(committed));
        }
        self.shared.progress.send_modify(|progress| progress.acknowledged += answered);
        if !stale.is_empty() {
            (self.on_event)(Event::Stale(stale));
        }
    }

    /// Keeps the heads; returns the agents whose rows should be written now.
    fn note(&mut self, group: &Group) -> Vec<u64> {
        let mut state = self.shared.lock();
        for row in &group.rows {
            state.heads.note(row.agent, Lsn(row.lsn));
        }
        let with_entries: BTreeSet<u64> = group.rows.iter().map(|row| row.agent).collect();
        for row in &group.agents {
            self.told.remove(&row.id);
            // An append of the same agent that waits was made before these entries were committed, and would link to
            // what it knew then: the head is forgotten only by a row that brings no entries with it.
            if !with_entries.contains(&row.id) {
                state.heads.saved(row.id, Lsn(row.head));
            }
        }
        state.rows_since_mark += group.rows.len() as u64;
        if group.mark.is_some() {
            state.rows_since_mark = group.rows.len() as u64;
            self.marked = Instant::now();
            // Who did not write its row since it was told is told again.
            self.told.clear();
        }
        let stale = state.heads.overflow(STALE_AGENTS_MAX);
        stale.into_iter().filter(|agent| self.told.insert(*agent)).collect()
    }

    /// Answers everybody, in order.
    fn stop(&mut self, reason: Reason) {
        if reason == Reason::Fenced {
            metrics::FENCED.inc();
        }
        let drained = {
            let mut state = self.shared.lock();
            state.stop = Some(reason);
            metrics::WAITING_ROWS.sub(state.writer.waiting_rows() as i64);
            state.writer.drain()
        };
        tracing::info!(database = self.database, %reason, unanswered = drained.len(), "shard writer stopped");
        for append in drained {
            (append.done)(Err(Stopped { reason }));
        }
        self.shared.progress.send_modify(|progress| progress.is_stopped = true);
        (self.on_event)(Event::Stopped(reason));
    }
}

/// Sends it, unless a test has other plans.
async fn commit(
    store: &dyn Store,
    database: &str,
    group: Arc<Group>,
) -> Result<CommitOutcome, Error> {
    match injected(COMMIT) {
        None => store.commit(database, group).await,
        Some(Injected::Refuse) => Err(Error::unavailable("a planned fault")),
        Some(Injected::Lose) => {
            store.commit(database, group).await?;
            Err(Error::unknown("a planned fault"))
        }
    }
}

/// Jittered pauses that double.
struct Backoff {
    pause: Duration,
    tries: u32,
}

impl Backoff {
    fn new() -> Self {
        Self { pause: BACKOFF_MIN, tries: 0 }
    }

    fn next(&mut self) -> Duration {
        let pause = self.pause.mul_f64(rand::random_range(0.5..1.5));
        self.pause = (self.pause * 2).min(BACKOFF_MAX);
        pause
    }

    /// Once when it begins, then about every half minute.
    fn tell(&mut self, database: &str, what: &str, error: &Error) {
        if self.tries.is_multiple_of(30) {
            tracing::warn!(database, %error, "{what}");
        }
        self.tries += 1;
    }
}
