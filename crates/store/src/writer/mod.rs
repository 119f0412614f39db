//! The owner's side of a shard: what waits becomes groups, one of which is in flight.
//!
//! The rules are `domain::writer` and `domain::heads`; this sends groups and reads positions for them. Never blocks those
//! who append, never acknowledges what is not committed, and answers everybody exactly once, also when it stops.

mod group;
mod task;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use domain::heads::Heads;
use domain::writer::Writer;
use domain::{Epoch, Lsn, Reason};
use proto::link::{AgentRow, DedupRow, DefinitionRow, WorkEnd, WorkRow};
use tokio::sync::{Notify, watch};

pub use domain::writer::Limits;

use crate::{Store, metrics};

/// Where a shard stands when it is opened.
#[derive(Clone, Debug)]
pub struct Opening {
    pub epoch: Epoch,
    /// The last row of the log, read after the epoch was fenced in.
    pub head: Lsn,
    /// Recovered from the mark and the log after it.
    pub heads: Heads,
}

/// What is to be committed together. Numbers that depend on where the rows come to stand are left at 0.
pub struct Append {
    /// The agent's row number; 0: the shard itself.
    pub agent: u64,
    /// The agent's last entry, used when its row is up to date and so the heads do not know it.
    pub prev: Lsn,
    pub rows: Vec<NewRow>,
    /// Head 0: the last row of this append. The rest is taken as it is.
    pub agents: Vec<AgentRow>,
    /// Id 0: the lsn of the first row.
    pub works: Vec<WorkRow>,
    pub ends: Vec<WorkEnd>,
    /// Work 0: the lsn of the first row.
    pub dedups: Vec<DedupRow>,
    pub definitions: Vec<DefinitionRow>,
    pub done: Done,
}

/// An entry that has no number yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRow {
    pub seq: u64,
    /// 0: this row's own lsn.
    pub work: u64,
    pub kind: u32,
    pub ts_ms: i64,
    pub payload: Bytes,
}

/// Called once, in the order of the appends; must not block.
pub type Done = Box<dyn FnOnce(Result<Committed, Stopped>) + Send>;

/// Where the rows of an append stand. Without rows: `last` is the row before `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    pub first: Lsn,
    pub last: Lsn,
}

/// The writer stopped before the append was known to be committed; a new owner may find it in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    pub reason: Reason,
}

/// What the owner of the shard has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Nothing more is written in this epoch: drop the shard.
    Stopped(Reason),
    /// Too many agents' rows are older than their last entries: write the rows of these. Each is named once until its
    /// row was written.
    Stale(Vec<u64>),
}

/// Starts the writer of a shard, the only one in this epoch. It ends when it stops, or when all handles are gone and
/// nothing waits any more. `on_event` must not block.
pub fn spawn(
    store: Arc<dyn Store>,
    database: String,
    opening: Opening,
    limits: Limits,
    on_event: impl Fn(Event) + Send + Sync + 'static,
) -> WriterHandle {
    let Opening { epoch, head, heads } = opening;
    let state = State {
        writer: Writer::new(epoch, head, limits),
        heads,
        rows_since_mark: 0,
        appended: 0,
        in_flight_since: None,
        stop: None,
        is_abandoned: false,
    };
    let (progress, _) = watch::channel(Progress::default());
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        wake: Notify::new(),
        halt: Notify::new(),
        progress,
    });
    let task = task::Task::new(shared.clone(), store, database, Box::new(on_event));
    tokio::spawn(task.run());
    WriterHandle(Arc::new(Door(shared)))
}

/// A store that takes longer for a group is away.
const AWAY_MIN: Duration = Duration::from_secs(2);

/// Appends to a shard. Cheap to clone.
#[derive(Clone)]
pub struct WriterHandle(Arc<Door>);

/// Tells the writer when the last handle is gone.
struct Door(Arc<Shared>);

impl Drop for Door {
    fn drop(&mut self) {
        self.0.lock().is_abandoned = true;
        self.0.wake.notify_one();
    }
}

impl WriterHandle {
    /// Lets `append` wait for the next commit; its outcome goes to `append.done`.
    ///
    /// # Errors
    /// Too much waits, or the writer has stopped: the append comes back, its `done` not called.
    // The append is what a full writer gives back.
    #[allow(clippy::result_large_err)]
    pub fn append(&self, append: Append) -> Result<(), Append> {
        self.push(append, Writer::push)
    }

    /// The same for the append with which an owner begins, whatever the limits are.
    ///
    /// # Errors
    /// The writer has stopped: the append comes back, its `done` not called.
    #[allow(clippy::result_large_err)]
    pub fn begin(&self, append: Append) -> Result<(), Append> {
        self.push(append, Writer::begin)
    }

    #[allow(clippy::result_large_err)]
    fn push(
        &self,
        append: Append,
        push: impl FnOnce(&mut Writer<Append>, usize, usize, Append) -> Result<(), Append>,
    ) -> Result<(), Append> {
        let (rows, bytes) = (append.rows.len(), group::bytes(&append));
        let mut state = self.0.0.lock();
        if state.stop.is_some() {
            return Err(append);
        }
        let before = state.writer.waiting_rows();
        let pushed = push(&mut state.writer, rows, bytes, append);
        match pushed {
            Ok(()) => {
                state.appended += 1;
                metrics::WAITING_ROWS.add((state.writer.waiting_rows() - before) as i64);
                drop(state);
                self.0.0.wake.notify_one();
                Ok(())
            }
            Err(append) => {
                metrics::OVERLOADED.inc();
                Err(append)
            }
        }
    }

    /// Until everything that was appended before is committed, or the writer has stopped.
    pub async fn settled(&self) {
        let appended = self.0.0.lock().appended;
        let mut progress = self.0.0.progress.subscribe();
        // An error would mean that the writer is gone, which is settled, too.
        _ = progress.wait_for(|now| now.is_stopped || appended <= now.acknowledged).await;
    }

    /// The agent's last committed entry, if its row does not know it.
    pub fn head_of(&self, agent_row: u64) -> Option<Lsn> {
        self.0.0.lock().heads.get(agent_row)
    }

    /// The last row of the shard that is known to be committed.
    pub fn head(&self) -> Lsn {
        self.0.0.lock().writer.head()
    }

    /// Whether the store has said that everything up to `lsn` is committed.
    pub fn is_acknowledged(&self, lsn: Lsn) -> bool {
        lsn <= self.head()
    }

    /// Whether the store has not said for a while what became of the group that is in flight.
    pub fn is_away(&self) -> bool {
        let state = self.0.0.lock();
        let is_late = state.in_flight_since.is_some_and(|since| AWAY_MIN <= since.elapsed());
        // One that has stopped says why itself.
        is_late && state.stop.is_none()
    }

    /// Whether nothing more is taken, ever: it has stopped or is about to.
    pub fn is_stopping(&self) -> bool {
        self.0.0.lock().stop.is_some()
    }

    pub fn is_stopped(&self) -> bool {
        self.0.0.progress.borrow().is_stopped
    }

    /// Gives the shard up at once: what is not acknowledged is answered with `shutting_down`. To lose nothing, await
    /// [`WriterHandle::settled`] first.
    pub fn stop(&self) {
        self.0.0.lock().stop = Some(Reason::ShuttingDown);
        self.0.0.halt.notify_one();
        self.0.0.wake.notify_one();
    }
}

/// What the handles and the task share. Locked for a moment only.
struct Shared {
    state: Mutex<State>,
    /// Something waits, or the writer is to stop.
    wake: Notify,
    /// The writer is to stop, also while a group is in flight.
    halt: Notify,
    progress: watch::Sender<Progress>,
}

struct State {
    writer: Writer<Append>,
    heads: Heads,
    /// Committed since the last mark.
    rows_since_mark: u64,
    appended: u64,
    /// Since when it is not known what became of the group that was cut.
    in_flight_since: Option<Instant>,
    /// Why the writer is to stop.
    stop: Option<Reason>,
    is_abandoned: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    acknowledged: u64,
    is_stopped: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole at every moment, also when a holder panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
