//! One agent: folds its journal, takes one work at a time, journals before it acts.
//!
//! Stopping an agent loses nothing: its successor folds the same journal.

pub(crate) mod accept;
pub(crate) mod doubt;
mod drive;
mod inbox;
mod keys;
mod load;
pub(crate) mod step;
pub(crate) mod text;
pub(crate) mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{Either, ready};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tokio::sync::OwnedSemaphorePermit;

use cluster::{Peer, Reply};
use domain::agent::Agent as Fold;
use domain::entry::{Accepted, Entry};
use domain::turn::Stop;
use domain::turn::doubt::Probes;
use domain::{AgentId, Attempt, IdempotencyKey, Lsn, Position, Reason, Seq};
use proto::link::SubmitCall;
use store::writer::{Append, Committed, Stopped};

use crate::actor::keys::Keys;
use crate::actor::step::Outcome;
use crate::dispatch::Place;
use crate::host::HostMessage;
use crate::metrics;
use crate::shard::Shard;

pub(crate) use inbox::AgentMessage;

/// A submit on its way to acceptance.
pub(crate) struct Submit {
    pub call: SubmitCall,
    pub key: IdempotencyKey,
    pub definition: domain::DefinitionHash,
    pub slot: domain::Slot,
    pub from: Peer,
    pub traceparent: String,
    pub reply: Reply,
    /// Its share of the node's room for inputs.
    pub room: OwnedSemaphorePermit,
}

/// What became of one attempt of a step.
pub(crate) struct Answer {
    pub attempt: Attempt,
    /// Whose pool was asked.
    pub place: Place,
    pub outcome: Outcome,
}

/// What the host may look at without asking.
#[derive(Default)]
pub(crate) struct Glance {
    pub row: AtomicU64,
    /// Milliseconds since the shard was opened.
    pub active_ms: AtomicU64,
    /// When it came into memory, by the wall clock.
    pub since_ms: AtomicI64,
    pub busy: AtomicBool,
    pub head: AtomicU64,
    /// Of the entry that is its head.
    pub lsn: AtomicU64,
    pub last_work: AtomicU64,
    pub open_works: AtomicU32,
}

pub(crate) struct AgentArgs {
    pub id: Arc<AgentId>,
    pub shard: Arc<Shard>,
    pub host: ActorRef<HostMessage>,
    pub glance: Arc<Glance>,
}

/// The behaviour; all state is in [`State`].
pub(crate) struct AgentActor;

// What few agents have at a time is boxed: an idle one pays for a place only.
pub(crate) struct State {
    args: AgentArgs,
    me: ActorRef<AgentMessage>,
    /// None until its row is read.
    fold: Option<Fold>,
    row: u64,
    /// Whether its row is in the database.
    row_stored: bool,
    /// The lsn up to which its row holds its fold.
    saved: Lsn,
    saved_seq: Seq,
    /// Its row tells how it came into memory.
    passage_saved: bool,
    /// The number of the last entry that was appended, durable or not.
    seq: Seq,
    /// Appends whose commits are awaited, oldest first.
    pending: VecDeque<Pending>,
    /// Appends that the writer had no room for, oldest first; each stands in `pending`, too.
    unsent: VecDeque<Append>,
    /// Submits that wait for the acceptance before them.
    queue: VecDeque<(Box<Submit>, OwnedSemaphorePermit)>,
    /// Idempotency keys of this activation.
    keys: Keys,
    /// No key older than this activation exists.
    keys_complete: bool,
    /// The room that inputs of open works take.
    rooms: BTreeMap<Lsn, OwnedSemaphorePermit>,
    watchers: BTreeMap<Lsn, Vec<watch::Watcher>>,
    /// The attempt that was sent out, and whose answer is waited for.
    running: Option<Box<Attempt>>,
    /// What that attempt, or the last one, has said that is in no journal yet.
    spoken: Option<Box<text::Spoken>>,
    /// Works whose end is on its way into the journal.
    ending: BTreeSet<Lsn>,
    hold_until: Option<Instant>,
    /// Of the step in doubt.
    probes: Probes,
    /// The intent that was journaled last: its attempt, and when its commit was sent, by the boot clock.
    intended: Option<Box<(Attempt, u64)>>,
    /// The attempt in doubt of which its tool knows nothing: a person is waited for.
    asked: Option<Box<Attempt>>,
    /// The end of a work that waits until what is being journaled of it is folded.
    wanted: Option<Box<WantedEnd>>,
    began: Option<Box<Began>>,
    quarantined: bool,
}

/// The work whose turn it is.
struct Began {
    work: Lsn,
    /// By this clock.
    at_ms: i64,
    /// Made when it is needed first.
    span: Option<tracing::Span>,
}

/// A work that is to end.
struct WantedEnd {
    work: Lsn,
    stop: Stop,
    reply: Option<Reply>,
}

/// Who is told once entries are durable.
enum Told {
    Cancel(Reply),
    Signal(Reply),
    /// Whose answer it is, and who asks for it to be taken.
    Worker(Reply),
    /// A pool that keeps its answer until then.
    Pool(Place, Attempt),
}

impl Told {
    fn reply(self) -> Option<Reply> {
        match self {
            Self::Cancel(reply) | Self::Signal(reply) | Self::Worker(reply) => Some(reply),
            Self::Pool(..) => None,
        }
    }
}

/// An append whose commit is awaited.
enum Pending {
    Accept {
        submit: Box<Submit>,
        accepted: Accepted,
        payload: Bytes,
        ts_ms: i64,
        permit: OwnedSemaphorePermit,
    },
    Entries {
        work: Lsn,
        entries: Vec<(Entry, Bytes)>,
        ts_ms: i64,
        told: Option<Told>,
    },
    Row {
        head: Lsn,
        seq: Seq,
    },
}

impl Actor for AgentActor {
    type Msg = AgentMessage;
    // Boxed, as the future of an actor has room for it more than once.
    type State = Box<State>;
    type Arguments = AgentArgs;

    async fn pre_start(
        &self,
        me: ActorRef<AgentMessage>,
        args: AgentArgs,
    ) -> Result<Box<State>, ActorProcessingErr> {
        metrics::ACTIVATED.inc();
        metrics::HOT.inc();
        Ok(Box::new(State::new(args, me)))
    }

    /// What waits is boxed: its size is paid for while it waits, not by every agent that is idle.
    fn handle(
        &self,
        _: ActorRef<AgentMessage>,
        message: AgentMessage,
        state: &mut Box<State>,
    ) -> impl Future<Output = Result<(), ActorProcessingErr>> + Send {
        // What others want to be tidied up does not keep an agent in memory.
        let is_use = !matches!(message, AgentMessage::Unsubscribe(..) | AgentMessage::Persist);
        match state.handle_now(message) {
            Ok(done) => Either::Left(ready(done.map(|()| state.show(is_use)))),
            Err(message) => Either::Right(Box::pin(async move {
                state.handle_waiting(message).await?;
                state.show(is_use);
                Ok(())
            })),
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        metrics::HOT.dec();
        // However it ends, whoever watches is told to ask again, or would wait for ever.
        for (work, watchers) in std::mem::take(&mut self.watchers) {
            for watcher in watchers {
                watch::close(&self.args.shard, &watcher, work);
            }
        }
    }
}

impl State {
    fn new(args: AgentArgs, me: ActorRef<AgentMessage>) -> Self {
        Self {
            args,
            me,
            fold: None,
            row: 0,
            row_stored: false,
            saved: Lsn(0),
            saved_seq: Seq(0),
            passage_saved: false,
            seq: Seq(0),
            pending: VecDeque::new(),
            unsent: VecDeque::new(),
            queue: VecDeque::new(),
            keys: Keys::default(),
            keys_complete: false,
            rooms: BTreeMap::new(),
            watchers: BTreeMap::new(),
            running: None,
            spoken: None,
            ending: BTreeSet::new(),
            hold_until: None,
            probes: Probes::default(),
            intended: None,
            asked: None,
            wanted: None,
            began: None,
            quarantined: false,
        }
    }

    fn shard(&self) -> &Arc<Shard> {
        &self.args.shard
    }

    /// Where answers from its fold stand: at the last entry that is in it. Never further: what is durable and still in
    /// the mailbox is not in the answer.
    fn position(&self) -> Position {
        let lsn = self.fold.as_ref().map_or(Lsn(0), |fold| fold.head);
        Position { epoch: self.shard().epoch, lsn }
    }

    /// Whether there is anything that must not be forgotten.
    fn is_busy(&self) -> bool {
        let open = self.fold.as_ref().is_some_and(|fold| fold.open_len() != 0);
        open || !self.pending.is_empty() || !self.queue.is_empty()
    }

    /// Shows the host what it may look at.
    fn show(&self, is_use: bool) {
        let glance = &self.args.glance;
        let active = u64::try_from(self.shard().started.elapsed().as_millis()).unwrap_or(u64::MAX);
        if is_use {
            glance.active_ms.store(active, Ordering::Relaxed);
        }
        glance.busy.store(self.is_busy(), Ordering::Relaxed);
        glance.row.store(self.row, Ordering::Relaxed);
        if let Some(fold) = &self.fold {
            glance.head.store(fold.seq.0, Ordering::Relaxed);
            glance.last_work.store(fold.last_work.0, Ordering::Relaxed);
            let open = u32::try_from(fold.open_len()).unwrap_or(u32::MAX);
            glance.open_works.store(open, Ordering::Relaxed);
            // After the rest, so that whoever reads it first has nothing older.
            glance.lsn.store(fold.head.0, Ordering::Release);
            if let Some(turn) = fold.current() {
                self.shard().shows(turn);
            }
        }
    }

    /// An agent without work keeps no room for work.
    fn shrink(&mut self) {
        if self.pending.is_empty() && self.queue.is_empty() {
            self.pending.shrink_to_fit();
            self.unsent.shrink_to_fit();
            self.queue.shrink_to_fit();
            // An emptied map keeps the room of a few.
            if self.rooms.is_empty() && self.watchers.is_empty() && self.ending.is_empty() {
                (self.rooms, self.watchers, self.ending) = Default::default();
            }
            if let Some(fold) = &mut self.fold {
                fold.shrink();
            }
        }
    }

    fn again_after(&self, delay: Duration) {
        self.me.send_after(delay, || AgentMessage::Drive);
    }

    /// Does nothing for a while, unless something comes.
    fn hold(&mut self, delay: Duration) {
        self.hold_until = Some(Instant::now() + delay);
        self.again_after(delay);
    }

    /// Appends to the journal; the commit comes back as a message.
    fn append(&mut self, append: Append, pending: Pending) {
        self.pending.push_back(pending);
        if !self.unsent.is_empty() {
            return self.unsent.push_back(append);
        }
        if let Err(append) = self.shard().writer.append(append) {
            self.unsent.push_back(append);
            self.flush_later();
        }
    }

    /// Appends an acceptance, unless the writer has no room: nobody is kept waiting whose work is not begun.
    ///
    /// # Errors
    /// Why it is not taken.
    fn append_acceptance(&mut self, append: Append) -> Result<(), Reason> {
        if !self.unsent.is_empty() {
            return Err(Reason::Overloaded);
        }
        let writer = &self.shard().writer;
        match writer.append(append) {
            Ok(()) => Ok(()),
            Err(_) if writer.is_stopping() => Err(Reason::Moved),
            Err(_) => Err(Reason::Overloaded),
        }
    }

    fn flush_later(&self) {
        self.me.send_after(Duration::from_millis(10), || AgentMessage::Flush);
    }

    fn flush(&mut self) {
        while let Some(append) = self.unsent.pop_front() {
            if let Err(append) = self.shard().writer.append(append) {
                self.unsent.push_front(append);
                return self.flush_later();
            }
        }
    }

    /// What an append of this agent begins with. `span` lasts until it is durable.
    fn new_append(&self, span: tracing::Span) -> Append {
        let me = self.me.clone();
        let head = self.fold.as_ref().map_or(Lsn(0), |fold| fold.head);
        Append {
            agent: self.row,
            prev: head,
            rows: Vec::new(),
            agents: Vec::new(),
            works: Vec::new(),
            ends: Vec::new(),
            dedups: Vec::new(),
            definitions: Vec::new(),
            // An agent that is gone folds the journal again when it comes back.
            done: Box::new(move |result| {
                drop(span);
                _ = me.cast(AgentMessage::Committed(result));
            }),
        }
    }

    /// The oldest append is durable: only now is it acted on.
    fn committed(&mut self, result: Result<Committed, Stopped>) -> Result<(), ActorProcessingErr> {
        let Some(pending) = self.pending.pop_front() else {
            return Err("a commit that nobody waited for".into());
        };
        let committed = match result {
            Ok(committed) => committed,
            Err(stopped) => {
                self.give_up(pending, stopped.reason);
                return Ok(());
            }
        };
        match pending {
            Pending::Accept { submit, accepted, payload, ts_ms, permit } => {
                drop(permit);
                self.accepted(submit, accepted, payload, ts_ms, committed)?;
            }
            Pending::Entries { work, entries, ts_ms, told } => {
                self.journaled(work, entries, ts_ms, committed, told)?;
            }
            Pending::Row { head, seq } => {
                self.saved = head;
                self.saved_seq = seq;
                self.passage_saved = true;
                self.row_stored = true;
            }
        }
        self.end_wanted();
        self.drive()
    }

    /// The shard is lost to this node: everybody who waits is told to ask the owner.
    fn give_up(&mut self, pending: Pending, reason: Reason) {
        let why = match reason == Reason::StoreRolledBack {
            true => {
                "the store has less than was acknowledged: an operator has to restore or release the shard"
            }
            false => "the shard moved",
        };
        match pending {
            Pending::Accept { submit, .. } => self.refuse(submit.reply, reason, why),
            Pending::Entries { told, .. } => {
                if let Some(reply) = told.and_then(Told::reply) {
                    self.refuse(reply, reason, why);
                }
            }
            Pending::Row { .. } => {}
        }
        if self.pending.is_empty() {
            self.me.stop(Some(reason.to_string()));
        }
    }

    fn refuse(&self, reply: Reply, reason: Reason, message: &str) {
        reply.refuse(crate::shard::refusal(reason, message));
    }
}
