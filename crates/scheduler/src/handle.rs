//! The door: what the control role, its API server and its gateway say to the scheduler.

use std::sync::Arc;
use std::time::Duration;

use cluster::beat::{BeatEvent, What};
use cluster::{Incoming, LinkEvent, Peer};
use domain::view::View;
use domain::{ClusterId, Member, ProcessName, Role, ShardId, Term};
use proto::kind;
use proto::link::{
    PutTransition, ReadLeader, ReadNodes, ReadShards, ReadTransitions, read_control::Read,
};
use proto::v1;
use ractor::rpc::CallResult;
use ractor::{Actor, RpcReplyPort};
use store::Store;
use tokio::sync::{OnceCell, watch};
use tokio::task::JoinHandle;
use tracing::error;

use crate::actor::{Inbox, Message, Pulse, Scheduler};
use crate::leader::api_node;
use crate::links::{Links, Request, Respond, malformed, overloaded};
use crate::shared::{Shared, within};
use crate::{Config, Error, definitions, metrics};

/// How long an answer of the actor, which never waits itself, is waited for.
const ANSWER: Duration = Duration::from_secs(2);
/// A shutdown writes to the store twice.
const SHUTDOWN: Duration = Duration::from_secs(4);
const CHECK_MS: u64 = 1_000;
/// So many transitions of one thing are told, the newest.
const TRANSITIONS_MAX: u32 = 1_000;

/// What is stored of one thing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Explained {
    /// Oldest first.
    pub transitions: Vec<PutTransition>,
    /// Of a shard, how its place is chosen now.
    pub placement: Vec<String>,
    /// As many as are told: there may be older ones.
    pub truncated: bool,
}

/// Everything that a scheduler needs.
pub struct Args {
    pub config: Config,
    /// This run of this control process.
    pub me: Member,
    pub store: Arc<dyn Store>,
    /// What the store is called in the config of all processes: grants name it.
    pub store_name: String,
    /// The certificate authorities that this process trusts: see `net::Identity::authorities`.
    pub authorities: Vec<String>,
    pub cluster: cluster::Handle,
    /// `host:port` of our heartbeat listener, as nodes are told.
    pub beat: String,
}

/// Starts a scheduler. It stands by until it may lead, which is at once where nobody leads.
///
/// # Errors
/// The config has a number out of its range.
pub async fn spawn(args: Args) -> Result<Handle, Error> {
    let Args { config, me, store, store_name, authorities, cluster, beat } = args;
    let links = Arc::new(cluster);
    start(Parts { config, me, store, store_name, authorities, links, beat }).await
}

pub(crate) struct Parts {
    pub(crate) config: Config,
    pub(crate) me: Member,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) store_name: String,
    pub(crate) authorities: Vec<String>,
    pub(crate) links: Arc<dyn Links>,
    pub(crate) beat: String,
}

pub(crate) async fn start(parts: Parts) -> Result<Handle, Error> {
    parts.config.check()?;
    let shared = Arc::new(Shared::new(parts));
    let (inbox, ended) = Actor::spawn(None, Scheduler, shared.clone())
        .await
        .map_err(|error| Error::Start(Box::new(error)))?;
    Ok(Handle { ended: watch_end(inbox.clone(), ended), shared, inbox, checked: Arc::default() })
}

/// Tells when the actor is gone, however that came.
fn watch_end(inbox: Inbox, ended: JoinHandle<()>) -> watch::Receiver<bool> {
    let (tell, told) = watch::channel(false);
    tokio::spawn(async move {
        if ended.await.is_err() {
            error!(actor = %inbox.get_id(), "the scheduler failed");
        }
        tell.send_replace(true);
    });
    told
}

/// What a look at the store showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreCheck {
    pub name: String,
    pub reachable: bool,
    /// Empty while it was never reached.
    pub engine: String,
    /// `full`: a commit that was answered survives a power cut.
    pub durability: String,
}

/// The scheduler of this process. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) inbox: Inbox,
    ended: watch::Receiver<bool>,
    checked: Arc<OnceCell<(String, String)>>,
}

impl Handle {
    /// A message of another process that is for the scheduler; any other is refused. Never blocks.
    pub fn incoming(&self, incoming: Incoming) {
        let Incoming { from, envelope, deadline, reply } = incoming;
        let respond = reply.map(|reply| -> Respond {
            Box::new(move |answer| match answer {
                Ok(payload) => reply.send(payload),
                Err(refusal) => reply.refuse(refusal),
            })
        });
        self.request(Request { from, envelope, deadline, respond });
    }

    pub(crate) fn request(&self, request: Request) {
        let Ok(room) = self.shared.requests.clone().try_acquire_owned() else {
            metrics::MESSAGES_REFUSED.inc();
            return request.refuse(overloaded());
        };
        match request.envelope.kind {
            kind::JOIN
            | kind::LEAVE
            | kind::DRAIN
            | kind::VIEW
            | kind::VIEW_WANTED
            | kind::DROPPED
            | kind::HELD
            | kind::AGENT_FAILED
            | kind::STANDBY
            | kind::SIGHT
            | kind::TAKE_OVER => {
                // Dropped with a stopped actor, it is answered by its link.
                _ = self.inbox.cast(Message::Request(request, room));
            }
            kind::DEFINITION => {
                let shared = self.shared.clone();
                tokio::spawn(async move {
                    let answer = definitions::body_for_node(&shared, &request.envelope).await;
                    request.answer(answer);
                    drop(room);
                });
            }
            kind::ASK_NODES..=kind::ASK_DRAIN if request.from.role == Role::Control => {
                let this = self.clone();
                tokio::spawn(async move {
                    this.answer_replica(request).await;
                    drop(room);
                });
            }
            other => {
                request.refuse(malformed(format!("kind {other} is not for the control plane")))
            }
        }
    }

    /// A link came up or went down.
    pub fn link(&self, event: LinkEvent) {
        match event {
            LinkEvent::Up { peer, incarnation } => {
                if peer.role == Role::Node {
                    self.shared.set_linked(peer.name.clone(), Some(incarnation));
                }
                _ = self.inbox.cast(Message::Linked(peer));
            }
            LinkEvent::Down { peer: Peer { role: Role::Node, name } } => {
                self.shared.set_linked(name, None);
            }
            LinkEvent::Down { peer } => _ = self.inbox.cast(Message::Unlinked(peer)),
        }
    }

    /// A heartbeat came, or its connection is gone. May be called from any thread.
    pub fn beat(&self, event: BeatEvent) {
        let beat = match event.what {
            What::Beat(beat) => Some(beat),
            What::Lost => None,
        };
        self.pulse(Pulse { from: event.from, beat, at: event.at });
    }

    pub(crate) fn pulse(&self, pulse: Pulse) {
        let Ok(room) = self.shared.pulses.clone().try_acquire_owned() else {
            return metrics::MESSAGES_REFUSED.inc();
        };
        _ = self.inbox.cast(Message::Pulse(pulse, room));
    }

    /// The cluster as last published by this replica; none until it led.
    pub fn view(&self) -> Option<Arc<View>> {
        self.shared.view()
    }

    /// The same, with every change.
    pub fn views(&self) -> watch::Receiver<Option<Arc<View>>> {
        self.shared.views.subscribe()
    }

    /// Who leads, as far as this replica knows, and in which term. Empty: nobody.
    pub fn leader(&self) -> (String, Term) {
        let status = self.shared.status.borrow();
        (status.leader.clone(), status.term)
    }

    /// The same, as heartbeats are answered. May be called from any thread.
    pub fn beat_answer(&self) -> (Option<ProcessName>, Term) {
        let status = self.shared.status.borrow();
        (status.leader.parse().ok(), status.term)
    }

    /// Whether this replica leads and has read all it needs.
    pub fn is_leading(&self) -> bool {
        let status = self.shared.status.borrow();
        status.leads && self.shared.view().is_some_and(|view| view.version.term == status.term)
    }

    /// None until the control database was read once.
    pub fn cluster_id(&self) -> Option<ClusterId> {
        self.shared.status.borrow().cluster_id.clone()
    }

    /// The nodes as the store has them; if that does not answer, as this replica last led them.
    pub(crate) async fn stored_nodes(&self) -> Vec<v1::Node> {
        let answer = self.shared.read(Read::Nodes(ReadNodes {})).await;
        match answer {
            Ok(answer) => answer.nodes.iter().map(|row| api_node(row, None, Vec::new())).collect(),
            Err(_) => self.ask(Message::Nodes).await.unwrap_or_default(),
        }
    }

    /// What is stored of a node, shard or leader, oldest first; and of a shard how its place is chosen now.
    ///
    /// # Errors
    /// Another kind, a malformed id, nothing stored of it, no answer of the store.
    pub async fn explain(&self, kind: &str, id: &str) -> Result<Explained, Error> {
        let mut placement = Vec::new();
        let mut subject = format!("{kind}/{id}");
        match kind {
            "node" | "leader" => drop(id.parse::<ProcessName>()?),
            "shard" => {
                let shard: ShardId = id.parse()?;
                placement = self.placement(shard).await;
                // However the number was written.
                subject = format!("{kind}/{shard}");
            }
            "agent" => {}
            _ => return Err(Error::UnknownKind { kind: kind.chars().take(80).collect() }),
        }
        let read = ReadTransitions { subject: subject.clone(), limit: TRANSITIONS_MAX };
        let answer = self.shared.read(Read::Transitions(read)).await;
        let mut transitions = answer.map_err(Error::store("read the transitions"))?.transitions;
        let truncated = TRANSITIONS_MAX as usize <= transitions.len();
        transitions.reverse();
        // A batch whose answer was lost was written twice.
        transitions.dedup();
        // Of an agent only its failures are here; what else there is of it is in its journal.
        if transitions.is_empty() && placement.is_empty() && kind != "agent" {
            return Err(Error::UnknownSubject { subject });
        }
        Ok(Explained { transitions, placement, truncated })
    }

    /// Whether the store answers, and what it promises.
    pub async fn store_check(&self) -> StoreCheck {
        let name = self.shared.store_name.clone();
        let read = self.shared.read(Read::Leader(ReadLeader {}));
        let reachable = within(CHECK_MS, "a look at the store", read).await.is_ok();
        if !reachable {
            let known = self.checked.get().cloned().unwrap_or_default();
            return StoreCheck { name, reachable, engine: known.0, durability: known.1 };
        }
        // Reads the whole control database, so once: neither changes while the store runs.
        let checked = self.checked.get_or_try_init(|| self.check()).await;
        let (engine, durability) = checked.cloned().unwrap_or_default();
        StoreCheck { name, reachable, engine, durability }
    }

    async fn check(&self) -> Result<(String, String), store::Error> {
        let answer = self.shared.store.check("control");
        let answer = within(CHECK_MS, "a check of the control database", answer).await?;
        let durability = match answer.synchronous {
            _ if answer.trusted => "trusted".to_owned(),
            2 | 3 => "full".to_owned(),
            other => format!("synchronous={other}"),
        };
        Ok((answer.engine, durability))
    }

    /// Copies the control database and every shard, each as of one moment. Any replica may.
    ///
    /// # Errors
    /// The store does not answer, or has no room, or a backup of this name exists, or its engine makes none.
    pub async fn backup(&self, name: &str) -> Result<Vec<String>, Error> {
        let failed = || Error::store("make the backup");
        let answer = self.shared.read(Read::Shards(ReadShards {})).await;
        let shards = answer.map_err(Error::store("read which shards there are"))?.shards;
        let mut databases = Vec::with_capacity(shards.len() + 1);
        // The control database last: it names no shard that is missing.
        let names = shards.into_iter().map(|shard| shard.database);
        for database in names.chain(["control".to_owned()]) {
            self.shared.store.backup(&database, name).await.map_err(failed())?;
            databases.push(database);
        }
        Ok(databases)
    }

    /// Hands the leadership over, if it is here, and ends. Returns when that is done, or after a few seconds.
    pub async fn shutdown(&self) {
        _ = self.inbox.call(Message::Shutdown, Some(SHUTDOWN)).await;
        self.inbox.stop(None);
        _ = tokio::time::timeout(SHUTDOWN, self.stopped()).await;
    }

    /// Returns when the scheduler has ended: after a shutdown, or because it failed, and then this process has to end.
    /// If a database cannot be used by this version, what is wrong with it.
    pub async fn stopped(&self) -> Option<String> {
        _ = self.ended.clone().wait_for(|ended| *ended).await;
        self.shared.unusable.get().cloned()
    }

    pub(crate) async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(RpcReplyPort<T>) -> Message,
    ) -> Result<T, Error> {
        match self.inbox.call(question, Some(ANSWER)).await {
            Ok(CallResult::Success(answer)) => Ok(answer),
            Ok(CallResult::Timeout | CallResult::SenderError) | Err(_) => Err(Error::Silent),
        }
    }
}
