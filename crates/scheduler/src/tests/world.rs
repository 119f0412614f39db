//! A store in a folder, nodes that are played, and the links between: what the tests of the scheduler stand on.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use cluster::Peer;
use domain::view::View;
use domain::{Incarnation, Member, ProcessName, Role};
use prost::Message as _;
use proto::kind;
use proto::link::{
    Beat, CapabilityOffer, Envelope, Grant, Held, JoinRequest, JoinResponse, OwnerRow, Refusal,
};
use store::{FileStore, Store};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::actor::Pulse;
use crate::handle::{Parts, start};
use crate::links::{Links, Request};
use crate::shared::{encoded, envelope};
use crate::{Config, Handle};

pub(super) const SHARDS: u16 = 12;
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn name(name: &str) -> ProcessName {
    name.parse().unwrap()
}

/// Waits until `condition` gives something.
pub(super) async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Removed with the world, also while the store makes files in it.
struct Folder(TempDir);

impl Drop for Folder {
    fn drop(&mut self) {
        for _ in 0..200 {
            if std::fs::remove_dir_all(self.0.path()).is_ok() || !self.0.path().exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub(super) struct World {
    pub(super) store: Arc<FileStore>,
    pub(super) links: Arc<PlayedLinks>,
    folder: Folder,
}

impl World {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = FileStore::open(directory.path(), store::EngineConfig::default()).unwrap();
        Self { store: Arc::new(store), links: Arc::default(), folder: Folder(directory) }
    }

    /// The same store, closed and opened again, after a newer program had one of its databases.
    pub(super) async fn with_newer(self, database: &str) -> Self {
        self.store.close().await;
        let path = self.folder.0.path().join(format!("{database}.db"));
        let file = libsql::Builder::new_local(&path).build().await.unwrap();
        let newer = "UPDATE meta SET v = '9' WHERE k = 'schema_version'";
        assert_eq!(file.connect().unwrap().execute(newer, ()).await.unwrap(), 1);
        drop(file);
        let store = FileStore::open(self.folder.0.path(), store::EngineConfig::default()).unwrap();
        Self { store: Arc::new(store), ..self }
    }

    pub(super) async fn scheduler(&self, me: &str) -> Handle {
        let config = Config {
            shards: SHARDS,
            nodes_expected: 3,
            settle_ms: 20_000,
            tick_ms: 10,
            ..Config::default()
        };
        self.scheduler_with(me, config).await
    }

    pub(super) async fn scheduler_with(&self, me: &str, config: Config) -> Handle {
        self.scheduler_of(&["ours"], me, config).await
    }

    /// One that trusts these authorities.
    pub(super) async fn scheduler_of(
        &self,
        authorities: &[&str],
        me: &str,
        config: Config,
    ) -> Handle {
        let parts = Parts {
            config,
            me: Member { name: name(me), incarnation: Incarnation(1) },
            store: self.store.clone(),
            store_name: "main".to_owned(),
            authorities: authorities.iter().map(ToString::to_string).collect(),
            links: Arc::new(LinksOf { me: name(me), links: self.links.clone() }),
            beat: format!("{me}:9"),
        };
        let handle = start(parts).await.unwrap();
        self.links.controls().insert(name(me), handle.clone());
        handle
    }

    pub(super) async fn leader(&self, me: &str) -> Handle {
        let handle = self.scheduler(me).await;
        eventually("it leads", async || handle.is_leading().then_some(())).await;
        handle
    }

    /// Three nodes that have joined and hold every shard.
    pub(super) async fn three_nodes(&self, leader: &Handle) -> [Node; 3] {
        let nodes =
            [self.node("node-1").await, self.node("node-2").await, self.node("node-3").await];
        for node in &nodes {
            node.join(leader).await.unwrap();
        }
        self.all_open(leader, &nodes).await;
        nodes
    }

    async fn all_open(&self, leader: &Handle, nodes: &[Node]) {
        eventually("every shard is open", async || {
            nodes.iter().for_each(|node| node.beat(leader));
            let view = leader.view()?;
            let is_open = |place: &domain::view::Place| {
                place.open && place.owner.as_ref().is_some_and(|owner| view.is_live(owner))
            };
            view.shards.values().all(is_open).then_some(())
        })
        .await;
    }

    pub(super) async fn node(&self, node: &str) -> Node {
        self.node_run(node, 1).await
    }

    pub(super) async fn node_run(&self, node: &str, incarnation: u64) -> Node {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let played = Arc::new(Played::default());
        self.links.nodes().insert(name(node), played.clone());
        Node {
            name: name(node),
            incarnation,
            address: listener.local_addr().unwrap().to_string(),
            played,
            listener,
        }
    }

    pub(super) async fn owners(&self) -> Vec<OwnerRow> {
        let mut owners = Vec::new();
        for shard in 0..SHARDS {
            owners.push(self.store.owner(&format!("shard-{shard}")).await.unwrap());
        }
        owners
    }
}

/// What a played node did and got.
#[derive(Default)]
pub(super) struct Played(Mutex<Notes>);

#[derive(Default)]
pub(super) struct Notes {
    pub(super) held: BTreeMap<u32, Held>,
    /// What its beats say of shards whose store went back.
    pub(super) rolled_back: Vec<Held>,
    pub(super) grants: Vec<Grant>,
    /// Of each grant, who was in the view when it came.
    pub(super) members: Vec<Vec<ProcessName>>,
    /// So many grants get no answer.
    pub(super) ignores: usize,
    pub(super) view: Option<View>,
    /// Views that a leader sent before it had published one.
    pub(super) empty_views: usize,
    pub(super) is_forgotten: bool,
    pub(super) is_wanted_to_drain: bool,
    beats: u64,
}

impl Played {
    pub(super) fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap()
    }

    fn granted(&self, grant: Grant) -> Option<Held> {
        let mut notes = self.notes();
        let held = Held { shard: grant.shard, epoch: grant.epoch, open: true };
        notes.grants.push(grant);
        let members = notes.view.iter().flat_map(|view| view.members.keys().cloned()).collect();
        notes.members.push(members);
        if 0 < notes.ignores {
            notes.ignores -= 1;
            return None;
        }
        notes.held.insert(held.shard, held);
        Some(held)
    }
}

pub(super) struct Node {
    pub(super) name: ProcessName,
    pub(super) incarnation: u64,
    pub(super) played: Arc<Played>,
    address: String,
    listener: TcpListener,
}

impl Node {
    pub(super) fn peer(&self) -> Peer {
        Peer::new(Role::Node, self.name.clone())
    }

    pub(super) fn join_request(&self) -> JoinRequest {
        JoinRequest {
            name: self.name.to_string(),
            incarnation: self.incarnation,
            zone: "a".to_owned(),
            capacity: 1,
            address: self.address.clone(),
            capabilities: vec![CapabilityOffer {
                name: "phase/action".to_owned(),
                version: 1,
                attributes: [("modality".to_owned(), "text".to_owned())].into(),
                capacity: 4,
            }],
            version: "0.1.0".to_owned(),
        }
    }

    pub(super) async fn join(&self, leader: &Handle) -> Result<JoinResponse, Refusal> {
        let payload = ask(leader, self.peer(), envelope(kind::JOIN, &self.join_request())).await?;
        let response = JoinResponse::decode(payload).unwrap();
        let delta = proto::view::from_message(response.view.clone().unwrap()).unwrap();
        View::apply(&mut self.played.notes().view, delta);
        self.beat(leader);
        Ok(response)
    }

    /// One heartbeat.
    pub(super) fn beat(&self, leader: &Handle) {
        let beat = {
            let mut notes = self.played.notes();
            notes.beats += 1;
            let held = notes.held.values().copied().collect();
            let load =
                proto::link::Load { capability: "phase/action".into(), running: 2, queued: 1 };
            let (incarnation, number) = (self.incarnation, notes.beats);
            let rolled_back = notes.rolled_back.clone();
            let beat = Beat { incarnation, number, held, loads: vec![load], ..Beat::default() };
            Beat { hot_agents: 7, rolled_back, ..beat }
        };
        self.pulse(leader, Some(beat));
    }

    fn pulse(&self, leader: &Handle, beat: Option<Beat>) {
        leader.pulse(Pulse { from: self.name.clone(), beat, at: Instant::now() });
    }

    /// Dies as a process does: its sockets close.
    pub(super) fn die(self, leader: &Handle) {
        let Self { name, listener, .. } = self;
        drop(listener);
        leader.pulse(Pulse { from: name, beat: None, at: Instant::now() });
    }
}

/// Asks a scheduler as a peer would.
pub(super) async fn ask(handle: &Handle, from: Peer, envelope: Envelope) -> Result<Bytes, Refusal> {
    let (respond, answer) = oneshot::channel();
    handle.request(Request {
        from,
        envelope,
        deadline: Some(Instant::now() + PATIENCE),
        respond: Some(Box::new(move |answer| _ = respond.send(answer))),
    });
    answer.await.expect("every request is answered")
}

/// The links of everybody.
#[derive(Default)]
pub(super) struct PlayedLinks {
    nodes: Mutex<BTreeMap<ProcessName, Arc<Played>>>,
    controls: Mutex<BTreeMap<ProcessName, Handle>>,
}

impl PlayedLinks {
    fn nodes(&self) -> MutexGuard<'_, BTreeMap<ProcessName, Arc<Played>>> {
        self.nodes.lock().unwrap()
    }

    pub(super) fn controls(&self) -> MutexGuard<'_, BTreeMap<ProcessName, Handle>> {
        self.controls.lock().unwrap()
    }

    fn node(&self, peer: &Peer) -> Option<Arc<Played>> {
        self.nodes().get(&peer.name).cloned()
    }
}

/// The links of one control replica.
struct LinksOf {
    me: ProcessName,
    links: Arc<PlayedLinks>,
}

impl LinksOf {
    fn replica(&self, to: &Peer) -> Option<(Handle, Peer)> {
        let handle = self.links.controls().get(&to.name).cloned()?;
        Some((handle, Peer::new(Role::Control, self.me.clone())))
    }
}

#[async_trait]
impl Links for LinksOf {
    async fn call(
        &self,
        to: &Peer,
        envelope: Envelope,
        _: Instant,
    ) -> Result<Bytes, cluster::Error> {
        if to.role == Role::Control {
            let gone = || cluster::Error::PeerGone { peer: to.clone() };
            let (replica, me) = self.replica(to).ok_or_else(gone)?;
            return ask(&replica, me, envelope).await.map_err(cluster::Error::Refused);
        }
        assert_eq!(envelope.kind, kind::GRANT);
        let grant = Grant::decode(envelope.payload).unwrap();
        let held = self.links.node(to).and_then(|node| node.granted(grant));
        held.map(|held| encoded(&held)).ok_or_else(|| cluster::Error::Deadline { peer: to.clone() })
    }

    fn cast(&self, to: &Peer, envelope: Envelope) -> Result<(), cluster::Error> {
        if to.role == Role::Control {
            let gone = || cluster::Error::PeerGone { peer: to.clone() };
            let (replica, from) = self.replica(to).ok_or_else(gone)?;
            replica.request(Request { from, envelope, deadline: None, respond: None });
            return Ok(());
        }
        if envelope.kind == kind::DRAIN_WANTED {
            self.links.node(to).expect("it runs").notes().is_wanted_to_drain = true;
            return Ok(());
        }
        assert_eq!(envelope.kind, kind::VIEW);
        let message = proto::link::View::decode(envelope.payload).unwrap();
        let delta = proto::view::from_message(message).unwrap();
        if let Some(node) = self.links.node(to) {
            let mut notes = node.notes();
            notes.empty_views += usize::from(delta.version.number == 0);
            View::apply(&mut notes.view, delta);
        }
        Ok(())
    }

    fn is_linked(&self, peer: &Peer) -> bool {
        self.links.node(peer).is_some()
    }

    fn learn(&self, peer: Peer, _: Vec<String>) {
        if let Some(node) = self.links.node(&peer) {
            node.notes().is_forgotten = false;
        }
    }

    fn forget(&self, peer: Peer) {
        if let Some(node) = self.links.node(&peer) {
            node.notes().is_forgotten = true;
        }
    }

    fn address(&self) -> String {
        "127.0.0.1:1".to_owned()
    }
}
