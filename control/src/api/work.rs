//! Submit, Get, List, Watch, Cancel, Signal, Open.

use domain::{AgentId, Position, WorkId};
use proto::link::{
    CancelAnswer, CancelCall, GetAnswer, GetCall, ListAnswer, ListCall, SignalAnswer, WorkInfo,
};
use proto::status::Failure;
use proto::v1::work_service_server::WorkService;
use proto::v1::{
    CancelRequest, CancelResponse, GetRequest, GetResponse, ListRequest, ListResponse, OpenRequest,
    SignalRequest, SignalResponse, SubmitRequest, SubmitResponse, WatchRequest, Work,
};
use proto::{convert, kind};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use super::{parent, positioned, submit_span};
use crate::desk::{Desk, work_of};
use crate::network::Views;
use crate::open::{OpenStream, open};
use crate::paging::{self, List, Page, Progress};
use crate::router::{At, Call};
use crate::watch::{WatchStream, watch};
use crate::{deadline, edge, refusal};

pub(crate) struct Works {
    pub(crate) desk: Desk,
}

#[tonic::async_trait]
impl WorkService for Works {
    async fn submit(
        &self,
        request: Request<SubmitRequest>,
    ) -> Result<Response<SubmitResponse>, Status> {
        let (deadline, parent) = (deadline::of(request.metadata()), parent(&request));
        let submit = edge::submit(request.into_inner())?;
        let span = submit_span(&submit.agent, parent.as_deref());
        let traceparent = span.in_scope(telemetry::current_traceparent);
        let submitted = self.desk.submit(submit, None, traceparent, deadline);
        let submitted = submitted.instrument(span).await?;
        Ok(positioned(SubmitResponse { work: Some(submitted.work) }, submitted.position))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let id = edge::work_id(&request.get_ref().id)?;
        let (info, position) = get(&self.desk, id, deadline).await?;
        Ok(positioned(GetResponse { work: Some(info.into()) }, position))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let page = list(&self.desk, request.get_ref(), deadline).await?;
        Ok(Response::new(ListResponse {
            works: page.items.into_iter().map(Work::from).collect(),
            next_page_token: page.next,
            unreachable: page.unreachable,
        }))
    }

    type WatchStream = WatchStream;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<WatchStream>, Status> {
        let deadline = deadline::of(request.metadata());
        let events = watch(&self.desk, request.get_ref(), deadline).await;
        let events = events.map_err(|failure| match request.get_ref().id.parse() {
            Ok(id) => named(failure, id),
            Err(_) => failure,
        })?;
        Ok(Response::new(events))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let (work, position) = cancel(&self.desk, request.get_ref(), deadline).await?;
        Ok(positioned(CancelResponse { work: Some(work) }, position))
    }

    async fn signal(
        &self,
        request: Request<SignalRequest>,
    ) -> Result<Response<SignalResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let (work, position) = signal(&self.desk, request.into_inner(), deadline).await?;
        Ok(positioned(SignalResponse { work: Some(work) }, position))
    }

    type OpenStream = OpenStream;

    async fn open(
        &self,
        request: Request<Streaming<OpenRequest>>,
    ) -> Result<Response<OpenStream>, Status> {
        let parent = parent(&request);
        Ok(Response::new(open(self.desk.clone(), request.into_inner(), parent)))
    }
}

/// One work with its steps.
pub(crate) async fn get(
    desk: &Desk,
    id: WorkId,
    deadline: Instant,
) -> Result<(WorkInfo, Position), Failure> {
    let WorkId { class, slot, lsn } = id;
    let call = Call { work: lsn.0, ..Call::new(kind::GET, At::work(id), deadline) };
    let request = GetCall { work: lsn.0, slot: slot.get().into(), class: class.0.into() };
    let answer = desk.ask::<GetAnswer>(id, &call, &request).await;
    let (info, position) = answer.map_err(|failure| named(failure, id))?;
    let info = info.ok_or_else(|| refusal::unreadable("an answer", &"it has no work"))?;
    // A number may be another slot's: then this work does not exist.
    match convert::work_id(info.class, info.slot, info.lsn) {
        Ok(found) if found == id => Ok((info, position)),
        Ok(_) | Err(_) => Err(no_work(id)),
    }
}

pub(crate) async fn cancel(
    desk: &Desk,
    request: &CancelRequest,
    deadline: Instant,
) -> Result<(Work, Position), Failure> {
    let id = edge::work_id(&request.id)?;
    let WorkId { class, slot, lsn } = id;
    let call = Call { work: lsn.0, ..Call::new(kind::CANCEL, At::work(id), deadline) };
    let request = CancelCall { work: lsn.0, slot: slot.get().into(), class: class.0.into() };
    let answer = desk.ask::<CancelAnswer>(id, &call, &request).await;
    let (info, position) = answer.map_err(|failure| named(failure, id))?;
    let (_, work) = work_of(info)?;
    Ok((work, position))
}

/// A person says what became of a step.
async fn signal(
    desk: &Desk,
    request: SignalRequest,
    deadline: Instant,
) -> Result<(Work, Position), Failure> {
    let id = edge::work_id(&request.id)?;
    let mut request = edge::signal(id, request)?;
    if request.attempt == 0 {
        // A call whose answer is lost is made again, and must not be taken for one about a later attempt then.
        let (info, _) = get(desk, id, deadline).await?;
        let in_doubt = u32::from(domain::Reason::InDoubt.code());
        let doubted = info.steps.iter().rfind(|step| step.reason == in_doubt);
        request.attempt = doubted.map_or(0, |step| step.attempts);
    }
    let call = Call { work: id.lsn.0, ..Call::new(kind::SIGNAL, At::work(id), deadline) };
    let answer = desk.ask::<SignalAnswer>(id, &call, &request).await;
    let (info, position) = answer.map_err(|failure| named(failure, id))?;
    let (_, work) = work_of(info)?;
    Ok((work, position))
}

fn no_work(id: WorkId) -> Failure {
    Failure::not_found(format!("there is no work {id} (any more, if it is past its retention)"))
}

/// An owner knows a work by its number only.
fn named(failure: Failure, id: WorkId) -> Failure {
    if failure.kind == domain::ErrorKind::NotFound { no_work(id) } else { failure }
}

type WorkList = List<ListCall, ListAnswer, WorkInfo>;

async fn list(
    desk: &Desk,
    request: &ListRequest,
    deadline: Instant,
) -> Result<Page<WorkInfo>, Failure> {
    let agent: Option<AgentId> = edge::optional("agent", &request.agent)?;
    let tenant = match &agent {
        Some(agent) if request.tenant.is_empty() => agent.tenant.clone(),
        Some(agent) if request.tenant != agent.tenant.as_str() => {
            let text = format!("agent {agent} is not of tenant {:.80?}", request.tenant);
            return Err(Failure::invalid("agent", text));
        }
        Some(_) | None => edge::tenant(&request.tenant)?,
    };
    let size = edge::page_size(request.page_size)?;
    let state = edge::open_state(request.state)?;
    let query = format!("works {tenant} {} {state}", request.agent);
    let progress = Progress::parse(&request.page_token, &query)?;
    let mut views: Views = desk.router.network().views();
    let shards = paging::all_shards(&mut views, deadline).await?;
    let call = Call { tenant: tenant.to_string(), ..Call::new(kind::LIST, At::any(), deadline) };
    let list = WorkList {
        call,
        size,
        request: |list, below| ListCall {
            tenant: list.tenant.clone(),
            agent: list.agent.clone(),
            below,
            limit: list.size,
            state: list.state,
        },
        items: |answer| answer.works,
        number: |work| work.lsn,
        tenant: tenant.to_string(),
        agent: request.agent.clone(),
        state,
    };
    let shard = agent.and_then(|agent| views.borrow().as_ref()?.shard_of(&agent));
    let answers = match shard {
        Some(shard) => list.ask_one(&desk.router, shard, &progress).await?,
        None => list.ask(&desk.router, &shards, &progress).await?,
    };
    let mut page = paging::newest(answers, progress, &query, size);
    page.items.iter_mut().for_each(|work| work.steps.clear());
    Ok(page)
}
