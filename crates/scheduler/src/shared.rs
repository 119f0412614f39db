//! What the handle, the actor and its tasks share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use domain::view::View;
use domain::{ClusterId, Incarnation, Member, ProcessName, Role, Term};
use prost::Message as _;
use proto::link::{
    ControlAnswer, ControlBatch, Envelope, PutDefinition, ReadControl, ReadDefinitions,
    control_write, read_control,
};
use proto::link::{ControlWrite, LeaderRow};
use store::{ControlOutcome, Store};
use tokio::sync::{Semaphore, watch};

use crate::Config;
use crate::clock::Clock;
use crate::definitions::Bodies;
use crate::handle::Parts;
use crate::links::Links;
use crate::lookups::Lookups;

/// A read of the control database has failed after this.
const READ_MS: u64 = 3_000;

/// What this replica knows of the leadership.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Status {
    /// Empty: nobody, as far as is known.
    pub(crate) leader: String,
    pub(crate) term: Term,
    /// It is this replica.
    pub(crate) leads: bool,
    pub(crate) cluster_id: Option<ClusterId>,
}

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) me: Member,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) store_name: String,
    pub(crate) authorities: Vec<String>,
    pub(crate) links: Arc<dyn Links>,
    /// `host:port` of our heartbeat listener, as nodes are told.
    pub(crate) beat: String,
    pub(crate) clock: Clock,
    pub(crate) status: watch::Sender<Status>,
    pub(crate) views: watch::Sender<Option<Arc<View>>>,
    pub(crate) bodies: Bodies,
    /// Of the definitions that submits ask for.
    pub(crate) lookups: Lookups<ReadDefinitions, Result<Option<PutDefinition>, Arc<store::Error>>>,
    /// Room for messages of other processes, and for heartbeats: they must not starve each other.
    pub(crate) requests: Arc<Semaphore>,
    pub(crate) pulses: Arc<Semaphore>,
    /// Why a database can never be used by this program, once that is known.
    pub(crate) unusable: OnceLock<String>,
    /// Which run of each node is at the other end of its link.
    linked: Mutex<BTreeMap<ProcessName, Incarnation>>,
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> Self {
        let room = || Arc::new(Semaphore::new(parts.config.messages_max));
        Self {
            requests: room(),
            pulses: room(),
            me: parts.me,
            store: parts.store,
            store_name: parts.store_name,
            authorities: parts.authorities,
            links: parts.links,
            beat: parts.beat,
            clock: Clock::start(),
            status: watch::Sender::default(),
            views: watch::Sender::default(),
            bodies: Bodies::default(),
            lookups: Lookups::default(),
            unusable: OnceLock::new(),
            linked: Mutex::default(),
            config: parts.config,
        }
    }

    pub(crate) fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    pub(crate) fn view(&self) -> Option<Arc<View>> {
        self.views.borrow().clone()
    }

    pub(crate) fn set_linked(&self, name: ProcessName, incarnation: Option<Incarnation>) {
        let mut linked = self.linked.lock().unwrap_or_else(PoisonError::into_inner);
        match incarnation {
            Some(incarnation) => drop(linked.insert(name, incarnation)),
            None => drop(linked.remove(&name)),
        }
    }

    /// Whether the link of this name is known to lead to another run of it.
    pub(crate) fn is_linked_to_another(&self, member: &Member) -> bool {
        let linked = self.linked.lock().unwrap_or_else(PoisonError::into_inner);
        linked.get(&member.name).is_some_and(|incarnation| *incarnation != member.incarnation)
    }

    pub(crate) async fn read(
        &self,
        read: read_control::Read,
    ) -> Result<ControlAnswer, store::Error> {
        let read = ReadControl { read: Some(read) };
        within(READ_MS, "a read of the control database", self.store.read_control(&read)).await
    }

    /// A batch that counts only while we lead in `term`.
    pub(crate) async fn write(
        &self,
        term: Term,
        writes: Vec<ControlWrite>,
        timeout_ms: u64,
    ) -> Result<ControlOutcome, store::Error> {
        let batch = ControlBatch { leader: self.me.name.to_string(), term: term.0, writes };
        within(timeout_ms, "a write to the control database", self.store.control(&batch)).await
    }
}

/// Waits for the store, but not for ever. A write that it gave no answer to is unknown.
pub(crate) async fn within<T>(
    timeout_ms: u64,
    what: &str,
    call: impl Future<Output = Result<T, store::Error>>,
) -> Result<T, store::Error> {
    match tokio::time::timeout(Duration::from_millis(timeout_ms), call).await {
        Ok(answer) => answer,
        Err(_) => Err(store::Error::Unknown { what: format!("{what} took over {timeout_ms} ms") }),
    }
}

pub(crate) fn row(write: control_write::Write) -> ControlWrite {
    ControlWrite { write: Some(write) }
}

/// The leader row as the rules know it.
pub(crate) fn leader_row(row: &LeaderRow) -> domain::leadership::LeaderRow {
    domain::leadership::LeaderRow {
        name: row.name.parse().ok(),
        term: Term(row.term),
        beat: row.beat,
    }
}

pub(crate) fn node_peer(name: &ProcessName) -> cluster::Peer {
    cluster::Peer::new(Role::Node, name.clone())
}

/// An envelope with only a kind and a payload.
pub(crate) fn envelope(kind: u32, payload: &impl prost::Message) -> Envelope {
    Envelope { kind, payload: encoded(payload), ..Envelope::default() }
}

pub(crate) fn encoded(message: &impl prost::Message) -> Bytes {
    Bytes::from(message.encode_to_vec())
}

/// The whole of a view as it travels.
pub(crate) fn whole(view: &View) -> Bytes {
    Bytes::from(proto::view::to_message(&view.whole()).encode_to_vec())
}
