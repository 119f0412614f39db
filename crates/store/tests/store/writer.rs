//! What the writer of a shard promises those who append.

use std::sync::{Arc, Mutex};

use domain::heads::Heads;
use domain::{Epoch, Lsn, Reason};
use proto::link::{DedupRow, ReadAgent, ReadHistory};
use store::Store;
use store::writer::{
    Append, Committed, Event, Limits, NewRow, Opening, Stopped, WriterHandle, spawn,
};

use crate::doors::{Doors, eventually};
use crate::faulty::{Fault, Faulty};
use crate::rows::{SHARD, agent, work};

type Answers = Arc<Mutex<Vec<(u64, Result<Committed, Stopped>)>>>;
type Events = Arc<Mutex<Vec<Event>>>;

struct Bench {
    writer: WriterHandle,
    answers: Answers,
    events: Events,
}

impl Bench {
    fn new(store: Arc<dyn Store>) -> Self {
        Self::with(store, Limits::default())
    }

    fn with(store: Arc<dyn Store>, limits: Limits) -> Self {
        let events = Events::default();
        let opening = Opening { epoch: Epoch(1), head: Lsn(0), heads: Heads::new() };
        let told = events.clone();
        let writer = spawn(store, SHARD.to_owned(), opening, limits, move |event| {
            told.lock().unwrap().push(event);
        });
        Self { writer, answers: Answers::default(), events }
    }

    /// An append of `rows` entries of an agent; `number` tells its answer.
    fn make(&self, number: u64, agent: u64, rows: usize) -> Append {
        let answers = self.answers.clone();
        let row = |seq: usize| NewRow {
            seq: seq as u64 + 1,
            work: 0,
            kind: 1,
            ts_ms: 5,
            payload: format!("{number}.{seq}").into(),
        };
        Append {
            agent,
            prev: Lsn(0),
            rows: (0..rows).map(row).collect(),
            agents: Vec::new(),
            works: Vec::new(),
            ends: Vec::new(),
            dedups: Vec::new(),
            definitions: Vec::new(),
            done: Box::new(move |result| answers.lock().unwrap().push((number, result))),
        }
    }

    fn append(&self, number: u64, agent: u64, rows: usize) {
        assert!(self.writer.append(self.make(number, agent, rows)).is_ok());
    }

    fn lsns(&self) -> Vec<(u64, u64, u64)> {
        let answers = self.answers.lock().unwrap();
        let committed = |(number, result): &(u64, Result<Committed, Stopped>)| {
            let Committed { first, last } = result.unwrap();
            (*number, first.0, last.0)
        };
        answers.iter().map(committed).collect()
    }

    fn reasons(&self) -> Vec<(u64, Reason)> {
        let answers = self.answers.lock().unwrap();
        let reason = |(number, result): &(u64, Result<Committed, Stopped>)| {
            (*number, result.unwrap_err().reason)
        };
        answers.iter().map(reason).collect()
    }
}

/// None: what serves the store is not there, and that was said.
async fn owned() -> Option<Doors> {
    let doors = Doors::any().await?;
    doors.owned().await;
    Some(doors)
}

#[tokio::test]
async fn what_waits_while_a_group_is_in_flight_goes_together() {
    let Some(doors) = owned().await else { return };
    let store = Faulty::gated(doors.node.clone());
    let bench = Bench::new(store.clone());
    bench.append(1, 1, 1);
    eventually("the first goes at once", async || store.seen.lock().unwrap().len() == 1).await;
    for number in 2..=5 {
        bench.append(number, number % 2, 2);
    }
    // It was sent, but the store has not said that it is committed.
    assert!(bench.writer.is_acknowledged(Lsn(0)) && !bench.writer.is_acknowledged(Lsn(1)));
    store.gate.add_permits(2);
    bench.writer.settled().await;
    assert_eq!(bench.lsns(), [(1, 1, 1), (2, 2, 3), (3, 4, 5), (4, 6, 7), (5, 8, 9)]);
    let rows: Vec<_> = store.seen.lock().unwrap().iter().map(|group| group.rows.len()).collect();
    assert_eq!(rows, [1, 8]);
    assert_eq!((doors.head().await, bench.writer.head()), (9, Lsn(9)));
    assert!(bench.writer.is_acknowledged(Lsn(9)) && !bench.writer.is_acknowledged(Lsn(10)));
    // Agent 1: one entry in the first group, two and two in the second, among those of the shard itself.
    let asked = ReadHistory { from: 9, above: 0, limit: 0 };
    let page = doors.node.history(SHARD, &asked).await.unwrap();
    assert_eq!(page.rows.iter().map(|row| row.lsn).collect::<Vec<_>>(), [9, 8, 5, 4, 1]);
    assert_eq!(bench.writer.head_of(1), Some(Lsn(9)));
    assert_eq!(bench.writer.head_of(0), None);
    assert_eq!(*bench.events.lock().unwrap(), []);
}

#[tokio::test]
async fn numbers_are_filled_in_where_rows_come_to_stand() {
    let Some(doors) = owned().await else { return };
    let bench = Bench::new(doors.node.clone());
    bench.append(1, 0, 3);
    let accepted = Append {
        agents: vec![agent(1, 0, 0)],
        works: vec![work(0, 1, 0, 1)],
        dedups: vec![DedupRow { agent: 1, key: "k".into(), ..DedupRow::default() }],
        ..bench.make(2, 1, 2)
    };
    assert!(bench.writer.append(accepted).is_ok());
    bench.writer.settled().await;
    assert_eq!(bench.lsns(), [(1, 1, 3), (2, 4, 5)]);
    let asked = ReadAgent { id: 1, idempotency_key: "k".into(), ..ReadAgent::default() };
    let found = doors.node.agent(SHARD, &asked).await.unwrap();
    assert_eq!(found.agent, Some(agent(1, 5, 0)));
    assert_eq!(found.dedup.map(|row| row.work), Some(4));
    let (accepted, _) = doors.node.work(SHARD, 4).await.unwrap().unwrap();
    assert_eq!(accepted, proto::link::WorkRow { id: 4, ..work(0, 1, 0, 1) });
    // A row that brings no entries is the one that the heads rely on: then the next entry is linked by what the agent
    // itself knows.
    assert_eq!(bench.writer.head_of(1), Some(Lsn(5)));
    let saved = Append { agents: vec![agent(1, 0, 5)], ..bench.make(3, 1, 0) };
    assert!(bench.writer.append(saved).is_ok());
    bench.writer.settled().await;
    assert_eq!(bench.writer.head_of(1), None);
    let next = Append { prev: Lsn(5), ..bench.make(4, 1, 1) };
    assert!(bench.writer.append(next).is_ok());
    bench.writer.settled().await;
    let page =
        doors.node.history(SHARD, &ReadHistory { from: 6, above: 0, limit: 0 }).await.unwrap();
    let links: Vec<_> =
        page.rows.iter().map(|row| (row.lsn, row.prev, row.work, row.epoch)).collect();
    assert_eq!(links, [(6, 5, 6, 1), (5, 4, 5, 1), (4, 0, 4, 1)]);
}

#[tokio::test]
async fn an_entry_is_linked_to_one_that_was_in_flight_when_it_was_appended() {
    let Some(doors) = owned().await else { return };
    let store = Faulty::gated(doors.node.clone());
    let bench = Bench::new(store.clone());
    let first = Append { agents: vec![agent(1, 0, 0)], ..bench.make(1, 1, 2) };
    assert!(bench.writer.append(first).is_ok());
    eventually("it is in flight", async || store.seen.lock().unwrap().len() == 1).await;
    bench.append(2, 1, 1);
    store.gate.add_permits(2);
    bench.writer.settled().await;
    let asked = ReadHistory { from: 3, above: 0, limit: 0 };
    let page = doors.node.history(SHARD, &asked).await.unwrap();
    assert_eq!(page.rows.iter().map(|row| row.lsn).collect::<Vec<_>>(), [3, 2, 1]);
}

#[tokio::test]
async fn a_lost_answer_is_resolved_by_reading() {
    use Fault::{AnswerLost, Refused, RequestLost};
    let plans: [&[Fault]; 5] = [
        &[AnswerLost],
        &[RequestLost],
        &[RequestLost, AnswerLost],
        &[Refused, Refused, RequestLost, RequestLost, AnswerLost],
        &[AnswerLost, RequestLost, Refused, AnswerLost],
    ];
    for plan in plans {
        let Some(doors) = owned().await else { return };
        let store = Faulty::new(doors.node.clone(), plan);
        *store.unreadable.lock().unwrap() = 2;
        let bench = Bench::new(store.clone());
        for number in 1..=6 {
            bench.append(number, 1, 1);
        }
        bench.writer.settled().await;
        bench.append(7, 1, 1);
        bench.writer.settled().await;
        let expected: Vec<_> = (1..=7).map(|number| (number, number, number)).collect();
        assert_eq!(bench.lsns(), expected, "{plan:?}");
        assert_eq!(doors.head().await, 7, "{plan:?}");
        let seen = store.seen.lock().unwrap();
        for (first, again) in seen.iter().zip(seen.iter().skip(1)) {
            // Sent again, a group is the same one, not one that looks like it.
            assert!(Arc::ptr_eq(first, again) || first.head < again.head, "{plan:?}");
        }
    }
}

#[tokio::test]
async fn while_the_store_takes_nothing_the_writer_says_so() {
    let Some(doors) = owned().await else { return };
    // About as often as it is tried in some seconds.
    let store = Faulty::new(doors.node.clone(), &[Fault::Refused; 1_000]);
    let bench = Bench::new(store.clone());
    assert!(!bench.writer.is_away());
    bench.append(1, 1, 1);
    eventually("it is away", async || bench.writer.is_away()).await;
    assert!(1 < store.seen.lock().unwrap().len(), "once is not for a while");
    store.plan.lock().unwrap().clear();
    bench.writer.settled().await;
    assert_eq!((bench.lsns(), bench.writer.is_away()), (vec![(1, 1, 1)], false));
}

#[tokio::test]
async fn a_group_without_rows_is_committed_even_if_its_answer_is_lost() {
    for fault in [Fault::AnswerLost, Fault::RequestLost] {
        let Some(doors) = owned().await else { return };
        let store = Faulty::new(doors.node.clone(), &[]);
        let bench = Bench::new(store.clone());
        bench.append(1, 1, 1);
        bench.writer.settled().await;
        store.plan.lock().unwrap().push_back(fault);
        let saved = Append { agents: vec![agent(1, 0, 1)], ..bench.make(2, 1, 0) };
        assert!(bench.writer.append(saved).is_ok());
        bench.writer.settled().await;
        assert_eq!(bench.lsns(), [(1, 1, 1), (2, 2, 1)]);
        let asked = ReadAgent { id: 1, ..ReadAgent::default() };
        let found = doors.node.agent(SHARD, &asked).await.unwrap().agent;
        assert_eq!(found, Some(agent(1, 1, 1)), "{fault:?}");
        assert_eq!(bench.writer.head_of(1), None);
    }
}

#[tokio::test]
async fn a_fenced_writer_stops_and_answers_everybody() {
    let Some(doors) = owned().await else { return };
    let store = Faulty::gated(doors.node.clone());
    let bench = Bench::new(store.clone());
    bench.append(1, 1, 1);
    eventually("it is in flight", async || store.seen.lock().unwrap().len() == 1).await;
    bench.append(2, 1, 1);
    bench.append(3, 2, 1);
    doors.fence(1, 2, 1).await;
    store.gate.add_permits(1);
    bench.writer.settled().await;
    let fenced = Reason::Fenced;
    assert_eq!(bench.reasons(), [(1, fenced), (2, fenced), (3, fenced)]);
    eventually("the owner is told", async || !bench.events.lock().unwrap().is_empty()).await;
    assert_eq!(*bench.events.lock().unwrap(), [Event::Stopped(fenced)]);
    let late = bench.make(4, 1, 1);
    assert!(bench.writer.append(late).is_err() && bench.writer.is_stopped());
    assert_eq!(doors.head().await, 0);
}

#[tokio::test]
async fn a_writer_that_was_fenced_while_its_answer_was_lost_acknowledges_nothing() {
    let Some(doors) = owned().await else { return };
    let store = Faulty::gated(doors.node.clone());
    store.plan.lock().unwrap().push_back(Fault::AnswerLost);
    *store.unreadable.lock().unwrap() = 1;
    let bench = Bench::new(store.clone());
    bench.append(1, 1, 1);
    eventually("it is in flight", async || store.seen.lock().unwrap().len() == 1).await;
    doors.fence(1, 2, 1).await;
    store.gate.add_permits(1);
    bench.writer.settled().await;
    assert_eq!(bench.reasons(), [(1, Reason::Fenced)]);
}

#[tokio::test]
async fn a_store_that_lost_commits_stops_the_shard() {
    let Some(doors) = owned().await else { return };
    let store = Faulty::new(doors.node.clone(), &[]);
    let opening = Opening { epoch: Epoch(1), head: Lsn(5), heads: Heads::new() };
    let events = Events::default();
    let told = events.clone();
    let writer = spawn(store, SHARD.to_owned(), opening, Limits::default(), move |event| {
        told.lock().unwrap().push(event);
    });
    let bench = Bench { writer, answers: Answers::default(), events };
    bench.append(1, 1, 1);
    bench.writer.settled().await;
    assert_eq!(bench.reasons(), [(1, Reason::StoreRolledBack)]);
}

#[tokio::test]
async fn a_broken_store_stops_the_shard() {
    let Some(doors) = owned().await else { return };
    let bench = Bench::new(Faulty::new(doors.node.clone(), &[Fault::Broken]));
    bench.append(1, 1, 1);
    bench.writer.settled().await;
    assert_eq!(bench.reasons(), [(1, Reason::StoreUnavailable)]);
}

#[tokio::test]
async fn a_full_writer_gives_the_append_back() {
    let Some(doors) = owned().await else { return };
    let store = Faulty::gated(doors.node.clone());
    let limits = Limits { waiting_rows_max: 4, ..Limits::default() };
    let bench = Bench::with(store.clone(), limits);
    bench.append(1, 1, 1);
    eventually("it is in flight", async || store.seen.lock().unwrap().len() == 1).await;
    bench.append(2, 1, 4);
    let Err(back) = bench.writer.append(bench.make(3, 1, 1)) else { panic!("it took too much") };
    assert_eq!(back.rows.len(), 1);
    store.gate.add_permits(10);
    bench.writer.settled().await;
    assert!(bench.writer.append(back).is_ok());
    bench.writer.settled().await;
    assert_eq!(bench.lsns(), [(1, 1, 1), (2, 2, 5), (3, 6, 6)]);
}

#[tokio::test]
async fn stopping_answers_everybody_also_while_the_store_is_silent() {
    let Some(doors) = owned().await else { return };
    let store = Faulty::gated(doors.node.clone());
    let bench = Bench::new(store.clone());
    bench.append(1, 1, 1);
    eventually("it is in flight", async || store.seen.lock().unwrap().len() == 1).await;
    bench.append(2, 1, 1);
    bench.writer.stop();
    bench.writer.settled().await;
    let reason = Reason::ShuttingDown;
    assert_eq!(bench.reasons(), [(1, reason), (2, reason)]);
}

#[tokio::test]
async fn without_handles_a_writer_finishes_what_waits_and_ends() {
    let Some(doors) = owned().await else { return };
    let Bench { writer, answers, events } = {
        let bench = Bench::new(doors.node.clone());
        (1..=20).for_each(|number| bench.append(number, 1, 1));
        bench
    };
    drop(writer);
    eventually("it ended", async || !events.lock().unwrap().is_empty()).await;
    assert_eq!(answers.lock().unwrap().iter().filter(|(_, result)| result.is_ok()).count(), 20);
    assert_eq!(doors.head().await, 20);
}

#[tokio::test]
async fn the_mark_and_the_tail_say_where_every_agent_is() {
    let Some(doors) = owned().await else { return };
    let bench = Bench::new(doors.node.clone());
    let mut number = 0;
    for _ in 0..30 {
        for agent in 1..=4 {
            number += 1;
            bench.append(number, agent, 250);
        }
        bench.writer.settled().await;
    }
    let saved = Append { agents: vec![agent(2, 0, 1)], ..bench.make(0, 2, 0) };
    assert!(bench.writer.append(saved).is_ok());
    bench.writer.settled().await;
    let found = doors.node.recover(SHARD).await.unwrap();
    assert_eq!(found.owner.head, 30_000);
    assert!(20_000 <= found.mark.lsn, "mark at {}", found.mark.lsn);
    assert!(found.tail.len() <= 4 && found.tail.iter().all(|row| found.mark.lsn < row.lsn));
    let mark: Vec<_> = found.mark.heads.iter().map(|head| (head.agent, Lsn(head.head))).collect();
    let tail = found.tail.iter().map(|row| (Lsn(row.lsn), row.agent));
    let heads = Heads::recover(&mark, tail);
    for agent in [1, 3, 4] {
        assert_eq!(heads.get(agent), bench.writer.head_of(agent));
        assert!(heads.get(agent).is_some());
    }
    assert_eq!(bench.writer.head_of(2), None);
}

#[tokio::test]
async fn the_rows_of_the_oldest_agents_are_asked_for_once() {
    let Some(doors) = owned().await else { return };
    let bench = Bench::new(doors.node.clone());
    let agents = domain::heads::STALE_AGENTS_MAX as u64 + 10;
    for first in (1..=agents).step_by(1_000) {
        for agent in first..(first + 1_000).min(agents + 1) {
            bench.append(agent, agent, 1);
        }
        bench.writer.settled().await;
    }
    bench.append(0, 1_000, 1);
    bench.writer.settled().await;
    let events = bench.events.lock().unwrap().clone();
    let stale: Vec<u64> = events
        .iter()
        .flat_map(|event| match event {
            Event::Stale(agents) => agents.clone(),
            Event::Stopped(reason) => panic!("{reason}"),
        })
        .collect();
    assert_eq!(stale, (1..=10).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_the_store_loses_nothing_and_repeats_nothing() {
    let Some(mut doors) = Doors::restartable().await else { return };
    doors.owned().await;
    let bench = Bench::new(doors.node.clone());
    let mut number = 0;
    for _ in 0..3 {
        for _ in 0..200 {
            number += 1;
            bench.append(number, 1, 1);
            tokio::task::yield_now().await;
        }
        doors.restart().await;
    }
    bench.writer.settled().await;
    let expected: Vec<_> = (1..=number).map(|number| (number, number, number)).collect();
    assert_eq!(bench.lsns(), expected);
    assert_eq!(doors.head().await, number);
    let asked = ReadHistory { from: number, above: 0, limit: 1_000 };
    let page = doors.node.history(SHARD, &asked).await.unwrap();
    let payloads: Vec<_> = page.rows.iter().rev().map(|row| row.payload.clone()).collect();
    let appended: Vec<_> = (1..=number).map(|number| format!("{number}.0")).collect();
    assert_eq!(payloads, appended);
    doors.end().await;
}
