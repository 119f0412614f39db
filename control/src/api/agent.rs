//! Definitions, agents and their histories.

use domain::{AgentId, DefinitionHash, DefinitionName, Position};
use proto::link::{AgentInfo, AgentsAnswer, AgentsCall, HistoryAnswer, HistoryCall, PutDefinition};
use proto::status::Failure;
use proto::v1::agent_service_server::AgentService;
use proto::v1::{
    Agent, ApplyDefinitionRequest, ApplyDefinitionResponse, DefinitionVersion, GetAgentRequest,
    GetAgentResponse, GetDefinitionRequest, GetDefinitionResponse, HistoryEntry, HistoryRequest,
    HistoryResponse, ListAgentsRequest, ListAgentsResponse, ListDefinitionsRequest,
    ListDefinitionsResponse,
};
use proto::{convert, kind};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{caller, positioned};
use crate::desk::Desk;
use crate::network::Views;
use crate::paging::{self, List, Page, Progress};
use crate::router::{At, Call};
use crate::{deadline, edge, refusal, router};

const HISTORY_PAGE: u32 = 200;
const RESPONSES_MAX: usize = 64;

pub(crate) struct Agents {
    pub(crate) desk: Desk,
    pub(crate) scheduler: scheduler::Handle,
}

#[tonic::async_trait]
impl AgentService for Agents {
    async fn apply_definition(
        &self,
        request: Request<ApplyDefinitionRequest>,
    ) -> Result<Response<ApplyDefinitionResponse>, Status> {
        let actor = caller(&request);
        let request = request.into_inner();
        let tenant = edge::tenant(&request.tenant)?;
        let missing = || Failure::invalid("definition", "the definition is missing");
        let definition = convert::definition(&request.definition.ok_or_else(missing)?)?;
        let definition = edge::known_model(definition)?;
        let applied = self
            .scheduler
            .apply_definition(actor, tenant, definition)
            .await
            .map_err(Failure::from)?;
        Ok(Response::new(ApplyDefinitionResponse { version: Some(version(applied)?) }))
    }

    async fn get_definition(
        &self,
        request: Request<GetDefinitionRequest>,
    ) -> Result<Response<GetDefinitionResponse>, Status> {
        let request = request.into_inner();
        let tenant = edge::tenant(&request.tenant)?;
        let name: DefinitionName = edge::required("name", &request.name)?;
        let hash: Option<DefinitionHash> = edge::optional("hash", &request.hash)?;
        let found = self.scheduler.definition(tenant.clone(), name.clone(), hash).await;
        let found = found.map_err(Failure::from)?.ok_or_else(|| {
            let hash = hash.map(|hash| format!(" with hash {hash}")).unwrap_or_default();
            let text = "see `stagedoor definitions`, or store one with `stagedoor apply -f FILE`";
            Failure::not_found(format!(
                "tenant {tenant} has no definition {:?}{hash}; {text}",
                name.as_str()
            ))
        })?;
        Ok(Response::new(GetDefinitionResponse { version: Some(version(found)?) }))
    }

    async fn list_definitions(
        &self,
        request: Request<ListDefinitionsRequest>,
    ) -> Result<Response<ListDefinitionsResponse>, Status> {
        let request = request.into_inner();
        let tenant = edge::tenant(&request.tenant)?;
        let size = edge::page_size(request.page_size)?;
        // The token is the last name of the page before.
        let after: Option<DefinitionName> = edge::optional("page_token", &request.page_token)?;
        let after = after.as_ref().map_or("", DefinitionName::as_str);
        let found = self.scheduler.definitions(tenant, after, size).await.map_err(Failure::from)?;
        // Fewer may be a page that was cut by its bytes, so only an empty one is surely the last; a short one of small
        // definitions is, too.
        let is_last = found.len() < usize::try_from(size).unwrap_or(usize::MAX)
            && found.iter().map(|definition| definition.body.len()).sum::<usize>() < 1 << 20;
        let next = found.last().filter(|_| !is_last).map(|last| last.name.clone());
        let versions: Result<Vec<_>, Failure> = found.into_iter().map(version).collect();
        let next_page_token = next.unwrap_or_default();
        Ok(Response::new(ListDefinitionsResponse { versions: versions?, next_page_token }))
    }

    async fn get_agent(
        &self,
        request: Request<GetAgentRequest>,
    ) -> Result<Response<GetAgentResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let id = convert::agent_id("id", &request.get_ref().id)?;
        let (agent, position) = get(&self.desk, &id, deadline).await?;
        let views = self.desk.router.network().views();
        Ok(positioned(GetAgentResponse { agent: Some(api_agent(agent, &views)) }, position))
    }

    async fn list_agents(
        &self,
        request: Request<ListAgentsRequest>,
    ) -> Result<Response<ListAgentsResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let page = list(&self.desk, request.get_ref(), deadline).await?;
        let views = self.desk.router.network().views();
        Ok(Response::new(ListAgentsResponse {
            agents: page.items.into_iter().map(|agent| api_agent(agent, &views)).collect(),
            next_page_token: page.next,
            unreachable: page.unreachable,
        }))
    }

    type HistoryStream = ReceiverStream<Result<HistoryResponse, Status>>;

    async fn history(
        &self,
        request: Request<HistoryRequest>,
    ) -> Result<Response<Self::HistoryStream>, Status> {
        let deadline = deadline::of(request.metadata());
        let id = convert::agent_id("id", &request.get_ref().id)?;
        let limit = match edge::count("limit", request.get_ref().limit)? {
            0 => u64::MAX,
            limit => limit.into(),
        };
        // The first page is read before the stream begins, so that an agent that does not exist is refused as such.
        let (first, position) = newest(&self.desk, &id, deadline).await?;
        let (out, responses) = mpsc::channel(RESPONSES_MAX);
        tokio::spawn(tell_history(self.desk.clone(), id, limit, first, out));
        Ok(positioned(ReceiverStream::new(responses), position))
    }
}

fn version(row: PutDefinition) -> Result<DefinitionVersion, Failure> {
    let definition = convert::definition_from_body(&row.body)?;
    let hash = DefinitionHash::try_from(&row.hash[..]);
    let hash = hash.map_err(|error| refusal::unreadable("a definition", &error))?;
    let built_in = definition.name.as_str() == domain::definition::POSTCHAIN;
    Ok(DefinitionVersion {
        hash: hash.to_string(),
        tenant: row.tenant,
        definition: Some((&definition).into()),
        create_time: convert::timestamp(row.create_ms),
        built_in,
    })
}

pub(crate) async fn get(
    desk: &Desk,
    id: &AgentId,
    deadline: Instant,
) -> Result<(AgentInfo, Position), Failure> {
    let agent = id.to_string();
    let call = Call { agent: agent.clone(), ..Call::new(kind::AGENTS, At::agent(id), deadline) };
    let request = AgentsCall { tenant: id.tenant.to_string(), agent, above: 0, limit: 1 };
    let (found, position) = desk.ask::<AgentsAnswer>(id.clone(), &call, &request).await?;
    let none =
        || Failure::not_found(format!("there is no agent {id}: the first submit to it makes it"));
    Ok((found.ok_or_else(none)?, position))
}

async fn list(
    desk: &Desk,
    request: &ListAgentsRequest,
    deadline: Instant,
) -> Result<Page<AgentInfo>, Failure> {
    let tenant = edge::tenant(&request.tenant)?.to_string();
    let size = edge::page_size(request.page_size)?;
    let query = format!("agents {tenant}");
    let progress = Progress::parse(&request.page_token, &query)?;
    let shards = paging::all_shards(&mut desk.router.network().views(), deadline).await?;
    let number = |agent: &AgentInfo| agent.row;
    let list: List<AgentsCall, AgentsAnswer, AgentInfo> = List {
        call: Call { tenant: tenant.clone(), ..Call::new(kind::AGENTS, At::any(), deadline) },
        size,
        request: |list, above| AgentsCall {
            tenant: list.tenant.clone(),
            agent: String::new(),
            above,
            limit: list.size,
        },
        items: |answer| answer.agents,
        number,
        tenant,
        agent: String::new(),
        state: 0,
    };
    let answers = list.ask(&desk.router, &shards, &progress).await?;
    Ok(paging::in_order(answers, progress, &query, size, number))
}

fn api_agent(info: AgentInfo, views: &Views) -> Agent {
    let state = match (info.quarantined, info.hot) {
        (true, _) => "quarantined",
        (false, true) => "hot",
        (false, false) => "cold",
    };
    let id: Option<AgentId> = info.id.parse().ok();
    let view = views.borrow().clone();
    let shard = id.as_ref().zip(view.as_ref()).and_then(|(id, view)| view.shard_of(id));
    let node = shard.zip(view.as_ref()).and_then(|(shard, view)| view.owner(shard));
    let slot = id.map(|id| id.slot());
    let work = slot.and_then(|slot| convert::work_id(0, slot.get().into(), info.last_work).ok());
    let reason = u16::try_from(info.reason).ok().and_then(domain::Reason::from_code);
    Agent {
        state: state.to_owned(),
        reason: reason.map(|reason| reason.to_string()).unwrap_or_default(),
        shard: shard.map_or(0, |shard| shard.0.cast_signed()),
        node: node.map(|(owner, _)| owner.name.to_string()).unwrap_or_default(),
        head: info.head.cast_signed(),
        open_works: info.open_works.cast_signed(),
        last_work: work.map(|work| work.to_string()).unwrap_or_default(),
        restarts: info.restarts.cast_signed(),
        id: info.id,
    }
}

/// The first page of an agent's journal, newest first.
pub(crate) async fn newest(
    desk: &Desk,
    id: &AgentId,
    deadline: Instant,
) -> Result<(HistoryAnswer, Position), Failure> {
    let (call, request) = history_call(id, 0, deadline);
    let (page, position) = desk.ask::<HistoryAnswer>(id.clone(), &call, &request).await?;
    Ok((page.unwrap_or_default(), position))
}

/// One page of an agent's journal, newest first; `below` is what the page before named as next.
pub(crate) async fn history(
    desk: &Desk,
    id: &AgentId,
    below: u64,
    deadline: Instant,
) -> Result<HistoryAnswer, Failure> {
    let (call, request) = history_call(id, below, deadline);
    desk.router.call(&call, &request).await
}

fn history_call(id: &AgentId, below: u64, deadline: Instant) -> (Call, HistoryCall) {
    let agent = id.to_string();
    let call = Call { agent: agent.clone(), ..Call::new(kind::HISTORY, At::agent(id), deadline) };
    (call, HistoryCall { agent, below, limit: HISTORY_PAGE })
}

type HistoryOut = mpsc::Sender<Result<HistoryResponse, Status>>;

async fn tell_history(desk: Desk, id: AgentId, limit: u64, first: HistoryAnswer, out: HistoryOut) {
    let told = tokio::select! {
        told = pages(&desk, &id, limit, first, &out) => told,
        () = desk.stop.cancelled() => Err(router::shutting_down()),
        () = out.closed() => return,
    };
    if let Err(failure) = told {
        // Whoever is gone does not want to know.
        let _ = out.send(Err(failure.into())).await;
    }
}

async fn pages(
    desk: &Desk,
    id: &AgentId,
    mut limit: u64,
    first: HistoryAnswer,
    out: &HistoryOut,
) -> Result<(), Failure> {
    let mut page = first;
    // One entry is held back: the last one says that older ones were deleted.
    let mut held: Option<HistoryEntry> = None;
    loop {
        for entry in page.entries {
            if limit == 0 {
                break;
            }
            limit -= 1;
            let next = api_entry(id, entry)?;
            if let Some(entry) = held.replace(next)
                && send(out, entry).await.is_err()
            {
                return Ok(());
            }
        }
        if limit == 0 || page.next == 0 {
            if let Some(mut last) = held {
                last.truncated = page.truncated && 0 < limit;
                let _ = send(out, last).await;
            }
            return Ok(());
        }
        page = history(desk, id, page.next, deadline::by_default()).await?;
    }
}

/// Fails when the client is gone.
async fn send(out: &HistoryOut, entry: HistoryEntry) -> Result<(), ()> {
    out.send(Ok(HistoryResponse { entry: Some(entry) })).await.map_err(drop)
}

fn api_entry(id: &AgentId, log: proto::link::LogEntry) -> Result<HistoryEntry, Failure> {
    let work = convert::work_id(0, id.slot().get().into(), log.work);
    let (kind, content) =
        convert::entry_json(log.entry).map_err(|error| refusal::unreadable("an entry", &error))?;
    Ok(HistoryEntry {
        seq: log.seq.cast_signed(),
        lsn: log.lsn.cast_signed(),
        epoch: log.epoch.cast_signed(),
        kind: kind.to_owned(),
        work: work.map(|work| work.to_string()).unwrap_or_default(),
        time: convert::timestamp(log.ts_ms),
        content,
        truncated: false,
    })
}
