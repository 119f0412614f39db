//! The cluster itself: who leads, who is there, and why things are as they are.

use domain::{AgentId, ProcessName, ShardId, WorkId};
use proto::convert;
use proto::link::{LogEntry, PutTransition};
use proto::status::Failure;
use proto::v1::cluster_service_server::ClusterService;
use proto::v1::{
    BackupRequest, BackupResponse, CordonRequest, CordonResponse, DrainRequest, DrainResponse,
    ExplainRequest, ExplainResponse, Leader, ListNodesRequest, ListNodesResponse,
    ListShardsRequest, ListShardsResponse, Node, ReleaseShardRequest, ReleaseShardResponse,
    StatusRequest, StatusResponse, Store, Transition, UncordonRequest, UncordonResponse,
};
use scheduler::{Admit, Explained};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{agent, caller, work};
use crate::desk::Desk;
use crate::explain::{self, Owners};
use crate::{deadline, edge, refusal};

/// Entries of an agent that are read for one explanation, the newest.
const ENTRIES_MAX: usize = 2_000;

pub(crate) struct Cluster {
    pub(crate) desk: Desk,
    pub(crate) scheduler: scheduler::Handle,
    pub(crate) store_url: String,
}

#[tonic::async_trait]
impl ClusterService for Cluster {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let (name, term) = self.scheduler.leader();
        let cluster_id = self.scheduler.cluster_id();
        let (nodes, shards, store) = tokio::join!(
            self.scheduler.nodes(),
            self.scheduler.shards(),
            self.scheduler.store_check()
        );
        Ok(Response::new(StatusResponse {
            cluster_id: cluster_id.map(|id| id.to_string()).unwrap_or_default(),
            leader: Some(Leader { name, term: term.0.cast_signed() }),
            nodes,
            // No leader could be asked for them; what else is known is told.
            shards: shards.unwrap_or_default(),
            store: Some(Store {
                name: store.name,
                url: self.store_url.clone(),
                engine: store.engine,
                durability: store.durability,
                reachable: store.reachable,
            }),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn list_nodes(
        &self,
        _: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let nodes = self.scheduler.nodes().await;
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    async fn list_shards(
        &self,
        _: Request<ListShardsRequest>,
    ) -> Result<Response<ListShardsResponse>, Status> {
        let shards = self.scheduler.shards().await.map_err(Failure::from)?;
        Ok(Response::new(ListShardsResponse { shards }))
    }

    async fn cordon(
        &self,
        request: Request<CordonRequest>,
    ) -> Result<Response<CordonResponse>, Status> {
        let node = self.admit(caller(&request), &request.get_ref().name, Admit::Cordon).await?;
        Ok(Response::new(CordonResponse { node: Some(node) }))
    }

    async fn uncordon(
        &self,
        request: Request<UncordonRequest>,
    ) -> Result<Response<UncordonResponse>, Status> {
        let node = self.admit(caller(&request), &request.get_ref().name, Admit::Uncordon).await?;
        Ok(Response::new(UncordonResponse { node: Some(node) }))
    }

    async fn drain(
        &self,
        request: Request<DrainRequest>,
    ) -> Result<Response<DrainResponse>, Status> {
        let node = self.admit(caller(&request), &request.get_ref().name, Admit::Drain).await?;
        Ok(Response::new(DrainResponse { node: Some(node) }))
    }

    async fn release_shard(
        &self,
        request: Request<ReleaseShardRequest>,
    ) -> Result<Response<ReleaseShardResponse>, Status> {
        let id = u32::try_from(request.get_ref().id)
            .map_err(|_| Failure::invalid("id", "a shard is a number from 0".to_owned()))?;
        let released = self.scheduler.release_shard(caller(&request), ShardId(id)).await;
        let shard = Some(released.map_err(Failure::from)?);
        Ok(Response::new(ReleaseShardResponse { shard }))
    }

    async fn backup(
        &self,
        request: Request<BackupRequest>,
    ) -> Result<Response<BackupResponse>, Status> {
        let name = edge::backup_name(&request.get_ref().name)?;
        let databases = self.scheduler.backup(&name).await.map_err(Failure::from)?;
        tracing::info!(name, databases = databases.len(), by = caller(&request), "made a backup");
        Ok(Response::new(BackupResponse { name, databases }))
    }

    async fn explain(
        &self,
        request: Request<ExplainRequest>,
    ) -> Result<Response<ExplainResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let ExplainRequest { kind, id } = request.into_inner();
        let explained = match kind.as_str() {
            "work" => self.work(edge::required("id", &id)?, deadline).await?,
            "agent" => self.agent(&convert::agent_id("id", &id)?, deadline).await?,
            "node" | "shard" | "leader" => self.stored(&kind, &id).await?,
            _ => {
                let text = format!(
                    "kind {kind:.40?} is not known: work, agent, shard, node or leader is allowed"
                );
                return Err(Failure::invalid("kind", text).into());
            }
        };
        Ok(Response::new(explained))
    }
}

/// Entries of an agent, newest first.
struct Entries {
    entries: Vec<LogEntry>,
    /// There were older ones.
    truncated: bool,
}

impl Cluster {
    async fn admit(&self, actor: String, name: &str, admit: Admit) -> Result<Node, Failure> {
        let name: ProcessName = edge::required("name", name)?;
        Ok(self.scheduler.admit(actor, name, admit).await?)
    }

    async fn stored(&self, kind: &str, id: &str) -> Result<ExplainResponse, Failure> {
        let Explained { transitions, placement, truncated } =
            self.scheduler.explain(kind, id).await?;
        Ok(ExplainResponse {
            transitions: transitions.into_iter().map(transition).collect(),
            placement,
            truncated,
        })
    }

    async fn work(&self, id: WorkId, deadline: Instant) -> Result<ExplainResponse, Failure> {
        let (info, _) = work::get(&self.desk, id, deadline).await?;
        let agent = info
            .agent
            .parse()
            .map_err(|error| refusal::unreadable("an answer", &error as &domain::Error))?;
        let is_its = |entry: &LogEntry| entry.work == id.lsn.0;
        let entries = self.entries(&agent, id.lsn.0, is_its, deadline).await?;
        fold(&agent, entries, &self.owners(&agent).await)
    }

    async fn agent(&self, id: &AgentId, deadline: Instant) -> Result<ExplainResponse, Failure> {
        let failures = self.scheduler.explain("agent", &id.to_string()).await;
        let is_cut = failures.as_ref().is_ok_and(|failures| failures.truncated);
        let failures = failures.map(|it| it.transitions.into_iter().map(transition).collect());
        let journaled = async {
            let entries = self.entries(id, 0, |_| true, deadline).await?;
            let info = agent::get(&self.desk, id, deadline).await;
            let passages = info.map(|(info, _)| info.passages);
            let owners = self.owners(id).await;
            let mut told = fold(id, entries, &owners)?;
            told.transitions = explain::with_passages(id, told.transitions, passages, &owners);
            Ok(told)
        };
        let journaled: Result<_, Failure> = journaled.await;
        let truncated = is_cut || journaled.as_ref().is_ok_and(|journaled| journaled.truncated);
        let journaled = journaled.map(|journaled| journaled.transitions);
        let transitions = explain::agent(id, journaled, failures.map_err(Failure::from))?;
        Ok(ExplainResponse { transitions, placement: Vec::new(), truncated })
    }

    /// The newest entries of an agent that are `wanted`, down to `oldest`.
    async fn entries(
        &self,
        id: &AgentId,
        oldest: u64,
        wanted: impl Fn(&LogEntry) -> bool,
        deadline: Instant,
    ) -> Result<Entries, Failure> {
        let (mut entries, mut below) = (Vec::new(), 0);
        loop {
            let page = agent::history(&self.desk, id, below, deadline).await?;
            // What is deleted is older than the last of these.
            let is_short =
                page.truncated && page.entries.last().is_none_or(|last| oldest < last.lsn);
            entries.extend(page.entries.into_iter().filter(&wanted));
            below = page.next;
            let is_full = ENTRIES_MAX <= entries.len() && below != 0 && oldest <= below;
            if below == 0 || below < oldest || is_full {
                return Ok(Entries { entries, truncated: is_short || is_full });
            }
        }
    }

    /// Who owned the agent's shard when, as far as it is stored and can be read now: an explanation without it is
    /// worth having, too.
    async fn owners(&self, id: &AgentId) -> Owners {
        let shard: Option<ShardId> = self.scheduler.view().and_then(|view| view.shard_of(id));
        let Some(shard) = shard else { return Owners::new() };
        let Ok(told) = self.scheduler.explain("shard", &shard.to_string()).await else {
            return Owners::new();
        };
        let owned =
            told.transitions.into_iter().filter(|one| one.epoch != 0 && !one.node.is_empty());
        owned.map(|one| (one.epoch, one.node)).collect()
    }
}

fn fold(id: &AgentId, entries: Entries, owners: &Owners) -> Result<ExplainResponse, Failure> {
    let Entries { entries, truncated } = entries;
    let slot = u32::from(id.slot().get());
    let subject =
        |lsn| convert::work_id(0, slot, lsn).map(|id| format!("work/{id}")).unwrap_or_default();
    let transitions = explain::transitions(&entries, subject, owners);
    let transitions = transitions.map_err(|error| refusal::unreadable("an entry", &error))?;
    Ok(ExplainResponse { transitions, placement: Vec::new(), truncated })
}

fn transition(row: PutTransition) -> Transition {
    let reason = u16::try_from(row.reason).ok().and_then(domain::Reason::from_code);
    Transition {
        time: convert::timestamp(row.at_ms),
        subject: row.subject,
        from: row.from,
        to: row.to,
        reason: reason.map(|reason| reason.to_string()).unwrap_or_default(),
        cause: row.cause,
        term: row.term.cast_signed(),
        epoch: row.epoch.cast_signed(),
        node: row.node,
    }
}
