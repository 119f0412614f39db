//! Reads for clients: ended works, lists, histories. A cold agent stays cold.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use cluster::{Peer, Reply};
use domain::agent::Passage;
use domain::{AgentId, Lsn, Position, Reason, WorkState};
use proto::journal;
use proto::link::{
    AgentAnswer, AgentInfo, AgentPassage, AgentRow, AgentsAnswer, AgentsCall, Events,
    HistoryAnswer, HistoryCall, ListAnswer, ListCall, LogEntry, LogRow, ReadAgent, ReadAgents,
    ReadHistory, ReadWorks, Refusal, SubscribeAnswer, SubscribeCall, WatchMode, WorkInfo,
};

use crate::actor::accept::{answer_cancel, answer_get};
use crate::actor::doubt::{Signal, answer_signal};
use crate::actor::watch::{Watcher, send};
use crate::shard::{Shard, refusal};
use crate::{Error, info, metrics};

/// Pages of one history that are read for one watcher: bounds what one request may cost.
const PAGES_MAX: usize = 1_000;
const PAGE_ROWS: u32 = 200;

pub(crate) fn refuse(error: &store::Error) -> Refusal {
    refusal(Reason::StoreUnavailable, error.to_string())
}

fn refuse_damaged(error: &Error) -> Refusal {
    refusal(Reason::Quarantined, error.to_string())
}

fn no_work(work: Lsn) -> Refusal {
    refusal(
        Reason::NotFound,
        format!("there is no work with number {work} (any more, if it is past its retention)"),
    )
}

/// Its row says that it is open although no agent here has it: its owner has not taken it up yet.
fn not_yet(work: Lsn) -> Refusal {
    refusal(Reason::Unowned, format!("work {work} is being recovered"))
}

fn is_final(state: u32) -> bool {
    journal::state_from_code(state).is_some_and(WorkState::is_final)
}

/// A work as its row has it.
pub(crate) async fn work(shard: &Shard, work: Lsn) -> Result<WorkInfo, Refusal> {
    match shard.store.work(&shard.database, work.0).await {
        Ok(Some((row, agent))) => info::of_rows(shard.class.0.into(), &row, &agent)
            .map_err(|error| refuse_damaged(&error)),
        Ok(None) => Err(no_work(work)),
        Err(error) => Err(refuse(&error)),
    }
}

/// A work that has ended, and where that stands. What is open is answered by its agent alone: a row says nothing of what
/// has happened since the acceptance, and the shard as a whole is further than the agent.
pub(crate) async fn ended(shard: &Shard, lsn: Lsn) -> Result<(WorkInfo, Position), Refusal> {
    let position = shard.before_read();
    match work(shard, lsn).await? {
        info if is_final(info.state) => Ok((info, position)),
        _ => Err(not_yet(lsn)),
    }
}

pub(crate) async fn get(shard: &Shard, lsn: Lsn, reply: Reply) {
    match ended(shard, lsn).await {
        Ok((info, position)) => answer_get(reply, info, position),
        Err(refusal) => reply.refuse(refusal),
    }
}

/// A cancel that came after the end: the work as it is.
pub(crate) async fn cancelled(shard: &Shard, lsn: Lsn, reply: Reply) {
    match ended(shard, lsn).await {
        Ok((info, position)) => answer_cancel(reply, info, position),
        Err(refusal) => reply.refuse(refusal),
    }
}

/// A signal that came after the end: the work as it is, if it is one that the signal made.
pub(crate) async fn signalled(shard: &Shard, lsn: Lsn, signal: &Signal, reply: Reply) {
    match ended(shard, lsn).await {
        Ok((info, position)) if was_resolved(&info, signal) => answer_signal(reply, info, position),
        Ok(_) => reply.refuse(refusal(Reason::NotInDoubt, "the work has ended")),
        Err(refusal) => reply.refuse(refusal),
    }
}

fn was_resolved(info: &WorkInfo, signal: &Signal) -> bool {
    let mut steps = (1..).zip(&info.steps);
    steps.any(|(sequence, step)| {
        // The step was tried again after the attempt that was meant, or not.
        let attempt = signal.which.attempt.min(step.attempts);
        step.reason == u32::from(signal.verdict.reason().code())
            && signal.which.is(sequence, &step.name, attempt)
    })
}

/// A subscription to a work that has ended.
pub(crate) async fn subscribe(shard: &Shard, call: SubscribeCall, from: Peer, reply: Reply) {
    if !shard.recent.has(Lsn(call.work))
        && let Err(refusal) = ended(shard, Lsn(call.work)).await
    {
        return reply.refuse(refusal);
    }
    reply.send(SubscribeAnswer {}.encode_to_vec().into());
    watch_ended(shard, call, from).await;
}

/// Sends the events of a work that has ended.
pub(crate) async fn watch_ended(shard: &Shard, call: SubscribeCall, from: Peer) {
    let watcher = Watcher::new(from, call.subscription, call.mode());
    if let Some(events) = shard.recent.events(&call) {
        metrics::WATCHES_RECENT.inc();
        send(shard, &watcher, events);
        return;
    }
    let (subscription, work) = (call.subscription, call.work);
    let events = match ended_events(shard, &call).await {
        Ok((entries, info, is_cut)) => {
            let whole = (is_cut && call.mode() == WatchMode::All).then(|| info.clone());
            Events { subscription, work, entries, ended: Some(info), whole, ..Events::default() }
        }
        Err(closed) => Events { subscription, work, closed: Some(closed), ..Events::default() },
    };
    send(shard, &watcher, events);
}

/// Its entries that are wanted, how it ended, and whether entries before them were deleted.
async fn ended_events(
    shard: &Shard,
    call: &SubscribeCall,
) -> Result<(Vec<LogEntry>, WorkInfo, bool), Refusal> {
    let row = shard.store.work(&shard.database, call.work).await.map_err(|error| refuse(&error))?;
    let (row, agent) = row.ok_or_else(|| no_work(Lsn(call.work)))?;
    if !is_final(row.state) {
        return Err(not_yet(Lsn(call.work)));
    }
    let info = info::of_rows(shard.class.0.into(), &row, &agent)
        .map_err(|error| refuse_damaged(&error))?;
    let mut entries = Vec::new();
    let mut from = head(shard, &agent).await?;
    // Its entries lie between its acceptance and the head of its agent.
    for _ in 0..PAGES_MAX {
        if from < call.work {
            break;
        }
        let read = ReadHistory { from, above: call.work - 1, limit: PAGE_ROWS };
        let page =
            shard.store.history(&shard.database, &read).await.map_err(|error| refuse(&error))?;
        let Some(last) = page.rows.last() else { break };
        from = last.prev;
        let of_work = |row: &LogRow| row.work == call.work || row.lsn == call.work;
        entries.extend(page.rows.into_iter().filter(of_work).map(log_entry));
    }
    entries.reverse();
    let is_cut =
        entries.first().is_none_or(|first| first.lsn != call.work && call.after_seq < first.seq);
    if call.mode() == WatchMode::End {
        entries.drain(..entries.len().saturating_sub(1));
    }
    entries.retain(|entry| call.after_seq < entry.seq);
    Ok((entries, info, is_cut))
}

/// The last entry of an agent. The writer forgets a head once the row has it, so a row that was read before that is old.
async fn head(shard: &Shard, row: &AgentRow) -> Result<u64, Refusal> {
    if let Some(head) = shard.writer.head_of(row.id) {
        return Ok(head.0);
    }
    let read = ReadAgent { id: row.id, ..ReadAgent::default() };
    let answer = shard.store.agent(&shard.database, &read).await.map_err(|error| refuse(&error))?;
    Ok(answer.agent.map_or(row.head, |row| row.head))
}

fn log_entry(row: LogRow) -> LogEntry {
    let work = if row.work == 0 { row.lsn } else { row.work };
    LogEntry {
        seq: row.seq,
        lsn: row.lsn,
        epoch: row.epoch,
        work,
        ts_ms: row.ts_ms,
        entry: row.payload,
    }
}

/// The works of a tenant or of one agent, newest first.
pub(crate) async fn list(shard: &Shard, call: ListCall, reply: Reply) {
    match list_works(shard, call).await {
        Ok(works) => reply.send(ListAnswer { works }.encode_to_vec().into()),
        Err(refusal) => reply.refuse(refusal),
    }
}

/// Works in a state that is not final, from the owner's memory.
async fn open_works(shard: &Shard, call: &ListCall) -> Result<Vec<WorkInfo>, Refusal> {
    let state = journal::state_from_code(call.state).filter(|state| !state.is_final());
    let state =
        state.ok_or_else(|| refusal(Reason::Malformed, "only open works are listed by state"))?;
    let is_wanted = |agent: &AgentId| {
        agent.tenant.as_str() == call.tenant
            && (call.agent.is_empty() || agent.to_string() == call.agent)
    };
    let found = shard.in_state(state, call.below, is_wanted);
    let mut works = Vec::new();
    for lsn in found.into_iter().take(usize::try_from(call.limit).unwrap_or(0)) {
        let mut info = work(shard, lsn).await?;
        // It may have gone on since.
        let Some((state, reason)) = shard.state_of(lsn) else { continue };
        (info.state, info.reason) = (journal::state_code(state), reason.code().into());
        info.steps.clear();
        works.push(info);
    }
    Ok(works)
}

async fn list_works(shard: &Shard, call: ListCall) -> Result<Vec<WorkInfo>, Refusal> {
    if call.state != 0 {
        return open_works(shard, &call).await;
    }
    let mut agent = 0;
    if !call.agent.is_empty() {
        let Some(row) = agent_row(shard, &call.agent).await?.agent else { return Ok(Vec::new()) };
        agent = row.id;
    }
    let read = ReadWorks { tenant: call.tenant, agent, below: call.below, limit: call.limit };
    let page = shard.store.works(&shard.database, &read).await.map_err(|error| refuse(&error))?;
    let mut works = Vec::with_capacity(page.works.len());
    for work in page.works {
        let Some(agent) = page.agents.iter().find(|agent| agent.id == work.agent) else { continue };
        let mut info = info::of_rows(shard.class.0.into(), &work, agent)
            .map_err(|error| refuse_damaged(&error))?;
        info.steps.clear();
        // Rows have the state of acceptance until the end; what it is now is known here.
        if let Some((state, reason)) = shard.state_of(Lsn(work.id)) {
            info.state = journal::state_code(state);
            info.reason = reason.code().into();
        }
        works.push(info);
    }
    Ok(works)
}

async fn agent_row(shard: &Shard, agent: &str) -> Result<AgentAnswer, Refusal> {
    let id: AgentId = agent
        .parse()
        .map_err(|error: domain::Error| refusal(Reason::Malformed, error.to_string()))?;
    let read = ReadAgent {
        tenant: id.tenant.to_string(),
        name: id.name.to_string(),
        key: id.key.to_string(),
        ..ReadAgent::default()
    };
    shard.store.agent(&shard.database, &read).await.map_err(|error| refuse(&error))
}

/// Agents of a tenant by their rows; the host adds what it knows of those in memory.
pub(crate) async fn agents(
    shard: &Arc<Shard>,
    call: AgentsCall,
    hot: impl Fn(&AgentRow) -> Option<AgentInfo>,
    reply: Reply,
) {
    let rows = match call.agent.is_empty() {
        false => {
            agent_row(shard, &call.agent).await.map(|answer| answer.agent.into_iter().collect())
        }
        true => {
            let read = ReadAgents { tenant: call.tenant, above: call.above, limit: call.limit };
            let page = shard.store.agents(&shard.database, &read).await;
            page.map(|page| page.agents).map_err(|error| refuse(&error))
        }
    };
    let rows: Vec<AgentRow> = match rows {
        Ok(rows) => rows,
        Err(refusal) => return reply.refuse(refusal),
    };
    let mut agents = Vec::with_capacity(rows.len());
    for row in rows {
        let state = row.state.clone();
        let found = match hot(&row) {
            Some(info) => Ok(info),
            None => cold(shard, row).await,
        };
        match found {
            Ok(info) if call.agent.is_empty() => agents.push(info),
            Ok(mut info) => {
                add_passages(&mut info, &state);
                agents.push(info);
            }
            Err(refusal) => return reply.refuse(refusal),
        }
    }
    reply.send(AgentsAnswer { agents, epoch: shard.epoch.0 }.encode_to_vec().into());
}

/// Those that its row tells come before the one that is not written yet.
fn add_passages(info: &mut AgentInfo, state: &Bytes) {
    // A row that cannot be read says nothing of them, and fails whoever wakes the agent.
    let told = journal::passages_of(state).unwrap_or_default();
    let mut passages: Vec<AgentPassage> = told.iter().map(passage).collect();
    let unwritten = std::mem::take(&mut info.passages);
    passages
        .extend(unwritten.into_iter().filter(|one| !passages.contains(one)).collect::<Vec<_>>());
    info.passages = passages;
}

fn passage(passage: &Passage) -> AgentPassage {
    let Passage { at_ms, epoch, reason } = *passage;
    AgentPassage { at_ms, epoch: epoch.0, reason: reason.code().into() }
}

/// An agent that is not in memory: its head is the number of its newest entry.
async fn cold(shard: &Shard, row: AgentRow) -> Result<AgentInfo, Refusal> {
    let head = head(shard, &row).await?;
    let read = ReadHistory { from: head, above: 0, limit: 1 };
    let page = shard.store.history(&shard.database, &read).await.map_err(|error| refuse(&error))?;
    let newest = page.rows.into_iter().next();
    Ok(AgentInfo {
        id: format!("{}/{}/{}", row.tenant, row.name, row.key),
        row: row.id,
        head: newest.map_or(0, |newest| newest.seq),
        lsn: head,
        last_work: row.last_work,
        ..AgentInfo::default()
    })
}

/// One page of an agent's journal, newest first.
pub(crate) async fn history(shard: &Shard, call: HistoryCall, reply: Reply) {
    match history_page(shard, call).await {
        Ok(answer) => reply.send(answer.encode_to_vec().into()),
        Err(refusal) => reply.refuse(refusal),
    }
}

async fn history_page(shard: &Shard, call: HistoryCall) -> Result<HistoryAnswer, Refusal> {
    let from = match call.below {
        0 => {
            let Some(row) = agent_row(shard, &call.agent).await?.agent else {
                return Err(refusal(Reason::NotFound, format!("there is no agent {}", call.agent)));
            };
            head(shard, &row).await?
        }
        below => below,
    };
    let limit = call.limit.clamp(1, PAGE_ROWS);
    let read = ReadHistory { from, above: 0, limit };
    let page = shard.store.history(&shard.database, &read).await.map_err(|error| refuse(&error))?;
    let next = page.rows.last().map_or(0, |last| last.prev);
    let entries = page.rows.into_iter().map(log_entry).collect();
    Ok(HistoryAnswer {
        entries,
        next: if page.truncated { 0 } else { next },
        truncated: page.truncated,
        epoch: shard.epoch.0,
        lsn: from,
    })
}
