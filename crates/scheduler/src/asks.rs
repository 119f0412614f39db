//! What only the leader knows or may do, asked from any replica: here, if it leads, or over the link to whoever does.
//!
//! Every replica serves the API; a client need not know which one leads.

use std::time::{Duration, Instant};

use bytes::Bytes;
use domain::{ProcessName, ShardId};
use proto::kind;
use proto::link::{LeaderCall, PutDefinition, Refusal};
use proto::status::Failure;
use proto::v1;

use crate::actor::Message;
use crate::leader::{Admit, Query};
use crate::links::{Request, malformed, refusal};
use crate::read::read_message;
use crate::shared::{encoded, envelope};
use crate::standby::control_peer;
use crate::{Error, Handle};

/// How long the leader's answer is waited for.
const ASK: Duration = Duration::from_secs(3);

impl Handle {
    /// Every node that is known, the dead ones too. Where the leader cannot be asked, as the store has them; if that does
    /// not answer either, as this replica last led them.
    pub async fn nodes(&self) -> Vec<v1::Node> {
        if !self.is_leading() {
            let asked = v1::ListNodesRequest {};
            match self.ask_leader::<v1::ListNodesResponse>(kind::ASK_NODES, "", &asked).await {
                Ok(answer) => return answer.nodes,
                Err(_) => return self.stored_nodes().await,
            }
        }
        self.ask(Message::Nodes).await.unwrap_or_default()
    }

    /// Every shard. Where no leader can be asked, as this replica last led them.
    ///
    /// # Errors
    /// No leader can be asked, and this replica has not led.
    pub async fn shards(&self) -> Result<Vec<v1::Shard>, Error> {
        if self.is_leading() {
            return self.ask(Message::Shards).await;
        }
        let asked = v1::ListShardsRequest {};
        match self.ask_leader::<v1::ListShardsResponse>(kind::ASK_SHARDS, "", &asked).await {
            Ok(answer) => Ok(answer.shards),
            Err(error) => match self.ask(Message::Shards).await? {
                known if known.is_empty() => Err(error),
                known => Ok(known),
            },
        }
    }

    /// The live offers that meet `query`.
    ///
    /// # Errors
    /// Nobody leads, or the leader does not answer.
    pub async fn find(&self, query: Query) -> Result<Vec<v1::Capability>, Error> {
        if !self.is_leading() {
            let asked = v1::FindRequest {
                name: query.name,
                version_min: i32::try_from(query.version_min).unwrap_or(i32::MAX),
                attributes: query.attributes.into_iter().collect(),
            };
            let answer = self.ask_leader::<v1::FindResponse>(kind::ASK_FIND, "", &asked).await;
            return Ok(answer?.capabilities);
        }
        self.ask(|reply| Message::Find(query, reply)).await?
    }

    /// How the place of a shard is chosen now, for people; nothing while nobody leads.
    pub(crate) async fn placement(&self, shard: ShardId) -> Vec<String> {
        if !self.is_leading() {
            let asked = v1::ExplainRequest { kind: "shard".to_owned(), id: shard.to_string() };
            let answer = self.ask_leader::<v1::ExplainResponse>(kind::ASK_PLACEMENT, "", &asked);
            return answer.await.map(|answer| answer.placement).unwrap_or_default();
        }
        self.ask(|reply| Message::Placement(shard, reply)).await.unwrap_or_default()
    }

    /// Keeps new shards from a node, lets it have them again, or lets it give everything away and end.
    ///
    /// # Errors
    /// No such node, or none that runs; nobody leads, or the leader does not answer.
    pub async fn admit(
        &self,
        actor: String,
        node: ProcessName,
        admit: Admit,
    ) -> Result<v1::Node, Error> {
        if self.is_leading() {
            return self.ask(|reply| Message::Admit(actor, node, admit, reply)).await?;
        }
        let name = node.to_string();
        let node = match admit {
            Admit::Cordon => {
                let asked = v1::CordonRequest { name };
                self.ask_leader::<v1::CordonResponse>(kind::ASK_CORDON, &actor, &asked).await?.node
            }
            Admit::Uncordon => {
                let asked = v1::UncordonRequest { name };
                let answer =
                    self.ask_leader::<v1::UncordonResponse>(kind::ASK_UNCORDON, &actor, &asked);
                answer.await?.node
            }
            Admit::Drain => {
                let asked = v1::DrainRequest { name };
                self.ask_leader::<v1::DrainResponse>(kind::ASK_DRAIN, &actor, &asked).await?.node
            }
        };
        node.ok_or(Error::Silent)
    }

    /// Gives a shard an owner again that was stopped because its store lost what was acknowledged.
    ///
    /// # Errors
    /// No such shard, or it is not stopped; nobody leads, or the leader does not answer.
    pub async fn release_shard(&self, actor: String, shard: ShardId) -> Result<v1::Shard, Error> {
        if self.is_leading() {
            return self.ask(|reply| Message::Release(actor, shard, reply)).await?;
        }
        let asked = v1::ReleaseShardRequest { id: shard.0.cast_signed() };
        let answer = self.ask_leader::<v1::ReleaseShardResponse>(kind::ASK_RELEASE, &actor, &asked);
        answer.await?.shard.ok_or(Error::Silent)
    }

    /// Has the leader make a definition the current one of its name.
    pub(crate) async fn apply_at_leader(
        &self,
        actor: &str,
        put: &PutDefinition,
    ) -> Result<PutDefinition, Error> {
        self.ask_leader(kind::ASK_APPLY, actor, put).await
    }

    async fn ask_leader<A: prost::Message + Default>(
        &self,
        kind: u32,
        actor: &str,
        request: &impl prost::Message,
    ) -> Result<A, Error> {
        let (leader, _) = self.leader();
        let Ok(name) = leader.parse::<ProcessName>() else {
            return Err(Error::NotLeader { leader });
        };
        if name == self.shared.me.name {
            // It is about to: its first view is not out yet.
            return Err(Error::NotLeader { leader: String::new() });
        }
        let call = LeaderCall { actor: actor.to_owned(), payload: encoded(request) };
        let (peer, deadline) = (control_peer(&name), Instant::now() + ASK);
        let answer = self.shared.links.call(&peer, envelope(kind, &call), deadline).await;
        match answer {
            Ok(payload) => A::decode(payload).map_err(|_| Error::Silent),
            Err(cluster::Error::Refused(refusal)) => Err(Error::Refused(Box::new(refusal))),
            Err(_) => Err(Error::NotLeader { leader: name.to_string() }),
        }
    }

    /// Answers what another replica asks for its clients. Never asks further: two replicas that each believe that the
    /// other leads would ask for ever.
    pub(crate) async fn answer_replica(self, request: Request) {
        let answer = match self.is_leading() {
            true => self.answer_here(request.envelope.kind, request.envelope.payload.clone()).await,
            false => Err(refusal(domain::Reason::Moved, "this replica does not lead now")),
        };
        request.answer(answer);
    }

    async fn answer_here(&self, kind: u32, payload: Bytes) -> Result<Bytes, Refusal> {
        let LeaderCall { actor, payload } = read_message(payload)?;
        Ok(match kind {
            kind::ASK_NODES => encoded(&v1::ListNodesResponse { nodes: self.nodes().await }),
            kind::ASK_SHARDS => {
                let shards = self.shards().await.map_err(refused)?;
                encoded(&v1::ListShardsResponse { shards })
            }
            kind::ASK_FIND => {
                let asked: v1::FindRequest = read_message(payload)?;
                let query = Query {
                    name: asked.name,
                    version_min: u32::try_from(asked.version_min).unwrap_or(0),
                    attributes: asked.attributes.into_iter().collect(),
                };
                let capabilities = self.find(query).await.map_err(refused)?;
                encoded(&v1::FindResponse { capabilities })
            }
            kind::ASK_PLACEMENT => {
                let asked: v1::ExplainRequest = read_message(payload)?;
                let shard = asked.id.parse().map_err(|_| malformed("a shard is a number"))?;
                let placement = self.placement(shard).await;
                encoded(&v1::ExplainResponse { placement, ..v1::ExplainResponse::default() })
            }
            kind::ASK_APPLY => {
                let put: PutDefinition = read_message(payload)?;
                encoded(&self.put_definition(&actor, put).await.map_err(refused)?)
            }
            kind::ASK_CORDON => {
                let asked: v1::CordonRequest = read_message(payload)?;
                let node = self.admit_here(actor, &asked.name, Admit::Cordon).await?;
                encoded(&v1::CordonResponse { node: Some(node) })
            }
            kind::ASK_UNCORDON => {
                let asked: v1::UncordonRequest = read_message(payload)?;
                let node = self.admit_here(actor, &asked.name, Admit::Uncordon).await?;
                encoded(&v1::UncordonResponse { node: Some(node) })
            }
            kind::ASK_DRAIN => {
                let asked: v1::DrainRequest = read_message(payload)?;
                let node = self.admit_here(actor, &asked.name, Admit::Drain).await?;
                encoded(&v1::DrainResponse { node: Some(node) })
            }
            kind::ASK_RELEASE => {
                let asked: v1::ReleaseShardRequest = read_message(payload)?;
                let shard = self.release_shard(actor, ShardId(asked.id.cast_unsigned())).await;
                encoded(&v1::ReleaseShardResponse { shard: Some(shard.map_err(refused)?) })
            }
            other => return Err(malformed(format!("kind {other} is not for the leader"))),
        })
    }

    async fn admit_here(
        &self,
        actor: String,
        name: &str,
        admit: Admit,
    ) -> Result<v1::Node, Refusal> {
        let name = name.parse().map_err(|error: domain::Error| malformed(error.to_string()))?;
        self.admit(actor, name, admit).await.map_err(refused)
    }
}

fn refused(error: Error) -> Refusal {
    let failure = Failure::from(error);
    refusal(failure.reason, failure.message)
}
