//! What sqld does to us: it expires, refuses, forgets, stops and dies.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use domain::heads::Heads;
use domain::{Epoch, ErrorKind, Lsn};
use proto::link::{Group, ReadAgent, ReadHistory};
use rustix::process::Signal;
use store::writer::{Append, Limits, NewRow, Opening, WriterHandle, spawn};
use store::{CommitOutcome, Config, Durability, Error};
use tokio::sync::{Semaphore, watch};

use crate::doors::{Doors, eventually};
use crate::fixture::{control_config, node_config, store};
use crate::rows::{SHARD, fence, group, provision};

const NAMESPACE: &str = "test-shard-3";

async fn owned() -> Option<Doors> {
    let doors = Doors::any().await?;
    doors.owned().await;
    Some(doors)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_expired_is_refused_and_a_new_one_in_its_file_is_taken() {
    let Some(mut doors) = owned().await else { return };
    let sqld = doors.sqld();
    let expired = sqld.expired_token();
    let path = sqld.write_secret("node-token", &expired);
    let config = Config { token_file: Some(path), ..node_config(sqld) };
    let node = store(config);
    let refused = node.commit(SHARD, group(0, &[(1, 0)]).into()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
    assert!(refused.to_string().contains("node-token"), "{refused}");
    let shown = format!("{refused} {refused:?}");
    assert!(!shown.contains(&expired), "the token is shown");
    let token = doors.sqld().token();
    doors.sqld().write_secret("node-token", &token);
    let outcome = node.commit(SHARD, group(0, &[(1, 0)]).into()).await.unwrap();
    assert_eq!(outcome, CommitOutcome::Committed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_opens_its_own_namespace_only() {
    let Some(mut doors) = owned().await else { return };
    doors
        .control
        .provision("shard-4", &proto::link::Provision { shard: 4, ..provision() })
        .await
        .unwrap();
    let sqld = doors.sqld();
    let path = sqld.write_secret("one", &sqld.token_for(NAMESPACE));
    let node = store(Config { token_file: Some(path), ..node_config(sqld) });
    assert_eq!(node.owner(SHARD).await.unwrap().epoch, 1);
    let refused = node.owner("shard-4").await.unwrap_err();
    assert!(matches!(refused.kind(), ErrorKind::NotFound | ErrorKind::Denied), "{refused}");
    assert!(refused.to_string().contains("test-shard-4"), "{refused}");
    let nobody = store(Config { token_file: None, ..node_config(doors.sqld()) });
    let refused = nobody.owner(SHARD).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
    assert!(refused.to_string().contains("token_file"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_admin_api_a_database_has_to_be_there() {
    let Some(mut doors) = Doors::any().await else { return };
    let alone = store(node_config(doors.sqld()));
    let refused = alone.provision(SHARD, &provision()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound, "{refused}");
    assert!(refused.to_string().contains("admin_url"), "{refused}");
    doors.sqld().create(NAMESPACE, "strong");
    assert_eq!(alone.provision(SHARD, &provision()).await.unwrap().epoch, 0);
    // A wrong admin key is said to be one.
    let path = doors.sqld().write_secret("wrong", "another");
    let config = Config { admin_token_file: Some(path), ..control_config(doors.sqld()) };
    let other = proto::link::Provision { shard: 5, ..provision() };
    let refused = store(config).provision("shard-5", &other).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
    assert!(refused.to_string().contains("admin"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relaxed_server_is_refused_unless_it_is_trusted() {
    let Some(mut doors) = Doors::any().await else { return };
    doors.sqld().create(NAMESPACE, "relaxed");
    let refused = doors.control.provision(SHARD, &provision()).await.unwrap_err();
    assert!(matches!(refused, Error::NotDurable { .. }), "{refused}");
    let remedy = refused.to_string();
    assert!(remedy.contains("/v1/namespaces/test-shard-3/config"), "{remedy}");
    assert!(remedy.contains("strong"), "{remedy}");
    let trusting = Config { durability: Durability::Trusted, ..control_config(doors.sqld()) };
    let trusting = store(trusting);
    trusting.provision(SHARD, &provision()).await.unwrap();
    assert!(trusting.check(SHARD).await.unwrap().trusted);
    // What the remedy says helps.
    doors.sqld().set_durability(NAMESPACE, "strong");
    doors.restart().await;
    doors.owned().await;
    let checked = doors.control.check(SHARD).await.unwrap();
    assert_eq!((checked.synchronous, checked.trusted), (2, false));
    assert!(checked.engine.contains("sqld 0.24"), "{}", checked.engine);
}

/// A server that was durable when we came may be set otherwise later: every new stream asks again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_becomes_relaxed_is_refused_at_the_next_stream() {
    let Some(mut doors) = owned().await else { return };
    doors.committed(group(0, &[(1, 0)])).await;
    doors.sqld().set_durability(NAMESPACE, "relaxed");
    doors.restart().await;
    eventually("it is refused", async || {
        match doors.node.commit(SHARD, group(1, &[(1, 1)]).into()).await {
            Err(Error::NotDurable { .. }) => true,
            Err(error) if error.kind() == ErrorKind::Unavailable => false,
            other => panic!("{other:?}"),
        }
    })
    .await;
    assert_eq!(doors.head().await, 1);
}

/// The server forgets a stream after 10 s; ours is given up before, and one that was forgotten costs nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_was_quiet_commits_at_once() {
    let Some(doors) = owned().await else { return };
    doors.committed(group(0, &[(1, 0)])).await;
    // This waits for the server's clock, which no condition tells.
    let quiet = Instant::now();
    eventually("11 s are over", async || Duration::from_secs(11) < quiet.elapsed()).await;
    doors.committed(group(1, &[(1, 1)])).await;
    assert_eq!(doors.head().await, 2);
    doors.end().await;
}

/// A restart makes the baton of the stream void, and the next commit does not suffer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_a_restart_made_void_is_replaced() {
    let Some(mut doors) = owned().await else { return };
    doors.committed(group(0, &[(1, 0)])).await;
    doors.restart().await;
    // The connection broke before the request: that is known, so the commit itself goes again.
    let outcome = doors.node.commit(SHARD, group(1, &[(1, 1)]).into()).await;
    match outcome {
        Ok(outcome) => assert_eq!(outcome, CommitOutcome::Committed),
        Err(error) => assert!(matches!(error, Error::Unknown { .. }), "{error}"),
    }
    assert!(doors.head().await <= 2);
    doors.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_there_is_unavailable_and_a_write_was_not_sent() {
    let Some(mut doors) = owned().await else { return };
    doors.sqld().kill();
    let fresh = store(node_config(doors.sqld()));
    for store in [&fresh, &doors.node] {
        let failed = store.commit(SHARD, group(0, &[(1, 0)]).into()).await.unwrap_err();
        assert!(matches!(failed, Error::Unavailable { .. }), "{failed}");
        assert!(failed.is_certainly_not_done());
        let failed = store.owner(SHARD).await.unwrap_err();
        assert!(matches!(failed, Error::Unavailable { .. }), "{failed}");
    }
    doors.sqld().start_again();
    doors.committed(group(0, &[(1, 0)])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_stopped_leaves_a_commit_unknown_and_goes_on_afterwards() {
    let Some(mut doors) = owned().await else { return };
    let config =
        Config { write_timeout_ms: 3_000, read_timeout_ms: 3_000, ..node_config(doors.sqld()) };
    let node = store(config);
    assert_eq!(
        node.commit(SHARD, group(0, &[(1, 0)]).into()).await.unwrap(),
        CommitOutcome::Committed
    );
    doors.sqld().signal(Signal::STOP);
    let unknown = node.commit(SHARD, group(1, &[(1, 1)]).into()).await.unwrap_err();
    assert!(matches!(unknown, Error::Unknown { .. }), "{unknown}");
    let failed = node.owner(SHARD).await.unwrap_err();
    assert!(matches!(failed, Error::Unavailable { .. }), "{failed}");
    doors.sqld().signal(Signal::CONT);
    // The cut request may be done or not; what is read decides, and then the next goes.
    eventually("the shard takes commits again", async || {
        let Ok(owner) = node.owner(SHARD).await else { return false };
        let next = group(owner.head, &[(1, owner.head)]);
        matches!(node.commit(SHARD, next.into()).await, Ok(CommitOutcome::Committed))
    })
    .await;
    let head = doors.head().await;
    assert!((2..=3).contains(&head), "{head}");
    let asked = ReadHistory { from: head, above: 0, limit: 0 };
    let page = doors.node.history(SHARD, &asked).await.unwrap();
    assert_eq!(page.rows.len() as u64, head);
}

/// Two replicas that begin at once make one control database and one shard.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_replicas_that_provision_at_once_agree() {
    let Some(mut doors) = Doors::any().await else { return };
    let config = control_config(doors.sqld());
    let replicas: Vec<_> = (0..4).map(|_| store(config.clone())).collect();
    let wanted = provision();
    let both = replicas.iter().map(|replica| replica.provision(SHARD, &wanted));
    let rows = futures::future::join_all(both).await;
    let first = rows[0].as_ref().unwrap();
    assert!(rows.iter().all(|row| row.as_ref().unwrap() == first), "{rows:?}");
    let reads = replicas.iter().map(|replica| replica.check("control"));
    let ids = futures::future::join_all(reads).await;
    let first = &ids[0].as_ref().unwrap().database_id;
    assert!(!first.is_empty());
    assert!(ids.iter().all(|checked| checked.as_ref().unwrap().database_id == *first));
}

/// Rows that together are more than the server answers at once come in smaller pages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_is_larger_than_one_answer_of_the_server() {
    let Some(doors) = owned().await else { return };
    const EACH: usize = 1 << 20;
    for lsn in 1..=20_u64 {
        let agent = proto::link::AgentRow {
            state: vec![1; EACH].into(),
            ..crate::rows::agent(lsn, lsn, 0)
        };
        let work = proto::link::WorkRow {
            record: vec![2; EACH].into(),
            ..crate::rows::work(lsn, lsn, 0, 1)
        };
        let accepted =
            Group { agents: vec![agent], works: vec![work], ..group(lsn - 1, &[(lsn, 0)]) };
        doors.committed(accepted).await;
    }
    let found = doors.node.recover(SHARD).await.unwrap();
    assert_eq!((found.tail.len(), found.open.len(), found.agents.len()), (20, 20, 20));
    assert!(found.agents.iter().all(|agent| agent.state.len() == EACH));
    assert!(found.open.iter().zip(1..).all(|(work, id)| work.id == id));
    let asked = proto::link::ReadWorks { tenant: "acme".into(), ..Default::default() };
    let page = doors.node.works(SHARD, &asked).await.unwrap();
    assert_eq!(page.works.iter().map(|work| work.id).collect::<Vec<_>>(), [20]);
    doors.end().await;
}

/// Many reads of a shard at once: every one is answered with what it asked for.
async fn each_is_answered(doors: &Doors, agents: u64) {
    let reads = (1..=agents).map(async |id| {
        let read = ReadAgent { id, ..ReadAgent::default() };
        let history = ReadHistory { from: id, above: 0, limit: 0 };
        let (agent, work, page) = tokio::join!(
            doors.node.agent(SHARD, &read),
            doors.node.work(SHARD, id),
            doors.node.history(SHARD, &history),
        );
        assert_eq!(agent.unwrap().agent.map(|agent| agent.id), Some(id));
        assert_eq!(work.unwrap().map(|(work, agent)| (work.id, agent.id)), Some((id, id)));
        assert_eq!(page.unwrap().rows.iter().map(|row| row.lsn).collect::<Vec<_>>(), [id]);
    });
    futures::future::join_all(reads).await;
}

/// Reads that come at once go together, also after the stream of the last ones is void, and when the answers to all of
/// them are more than the server sends at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_go_together_are_each_answered() {
    let Some(mut doors) = owned().await else { return };
    let begin = |first: u64, count: u64, bytes: usize| {
        let ids = || first..first + count;
        let rows: Vec<_> = ids().map(|id| (id, 0)).collect();
        let mut accepted = group(first - 1, &rows);
        for row in &mut accepted.rows {
            row.payload = vec![7; bytes].into();
        }
        accepted.agents = ids().map(|id| crate::rows::agent(id, id, 0)).collect();
        accepted.works = ids().map(|id| crate::rows::work(id, id, 0, 1)).collect();
        accepted
    };
    doors.committed(begin(1, 150, 10)).await;
    each_is_answered(&doors, 150).await;
    doors.restart().await;
    each_is_answered(&doors, 150).await;
    for first in (151..=171).step_by(3) {
        doors.committed(begin(first, 3, 1 << 20)).await;
    }
    each_is_answered(&doors, 171).await;
    doors.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_server_backs_up_its_databases_itself() {
    let Some(doors) = owned().await else { return };
    let refused = doors.control.backup(SHARD, "copy").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.to_string().contains("/dump"), "{refused}");
    doors.end().await;
}

/// A fence goes at once while commits wait, and ends them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_overtakes_what_waits() {
    let Some(doors) = owned().await else { return };
    let commits = (0..200).map(|head| doors.node.commit(SHARD, group(head, &[(1, head)]).into()));
    let wanted = fence(1, 2, 1);
    let fencing = doors.node.fence(SHARD, &wanted);
    let (outcomes, fenced) = futures::join!(futures::future::join_all(commits), fencing);
    assert!(matches!(fenced.unwrap(), store::FenceOutcome::Fenced(row) if row.epoch == 2));
    let committed =
        outcomes.iter().filter(|one| matches!(one, Ok(CommitOutcome::Committed))).count();
    let ended = outcomes.iter().filter(|one| matches!(one, Ok(CommitOutcome::Fenced { epoch: 2 })));
    assert_eq!((committed + ended.count(), doors.head().await), (200, committed as u64));
    assert!(committed < 200, "the fence came last");
    doors.end().await;
}

/// The server dies again and again while a writer commits without a pause.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_in_the_middle_of_commits_loses_nothing() {
    const KILLS: u64 = 6;
    let Some(mut doors) = owned().await else { return };
    let opening = Opening { epoch: Epoch(1), head: Lsn(0), heads: Heads::new() };
    let node = doors.node.clone();
    let writer = spawn(node, SHARD.to_owned(), opening, Limits::default(), |_| ());
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    let (stop, stopped) = watch::channel(false);
    let appending = tokio::spawn(append(writer.clone(), acknowledged.clone(), stopped));
    for _ in 0..KILLS {
        let before = acknowledged.lock().unwrap().len();
        eventually("commits go on", async || before + 20 < acknowledged.lock().unwrap().len())
            .await;
        doors.restart().await;
    }
    stop.send(true).unwrap();
    let appended = appending.await.unwrap();
    writer.settled().await;
    let acknowledged = acknowledged.lock().unwrap().clone();
    let expected: Vec<_> = (1..=appended).map(|number| (number, number)).collect();
    assert!(acknowledged == expected, "an append is lost, repeated or out of order");
    assert_eq!(doors.head().await, appended);
    // Each entry is there once and where it was acknowledged.
    let mut from = appended;
    while from != 0 {
        let page =
            doors.node.history(SHARD, &ReadHistory { from, above: 0, limit: 1_000 }).await.unwrap();
        assert!(!page.truncated);
        for row in &page.rows {
            assert_eq!(row.payload, format!("entry {}", row.lsn));
        }
        from = page.rows.last().map_or(0, |row| row.prev);
    }
    doors.end().await;
}

/// One entry after another, a few at a time; how many. Notes what is acknowledged: the number, and where it stands.
async fn append(
    writer: WriterHandle,
    acknowledged: Arc<Mutex<Vec<(u64, u64)>>>,
    stopped: watch::Receiver<bool>,
) -> u64 {
    let room = Arc::new(Semaphore::new(8));
    let mut number = 0;
    while !*stopped.borrow() {
        room.acquire().await.unwrap().forget();
        number += 1;
        let (note, room, told) = (acknowledged.clone(), room.clone(), number);
        let payload = format!("entry {number}").into();
        let append = Append {
            agent: 1,
            prev: Lsn(0),
            rows: vec![NewRow { seq: number, work: 0, kind: 1, ts_ms: 5, payload }],
            agents: Vec::new(),
            works: Vec::new(),
            ends: Vec::new(),
            dedups: Vec::new(),
            definitions: Vec::new(),
            done: Box::new(move |result| {
                note.lock().unwrap().push((told, result.unwrap().last.0));
                room.add_permits(1);
            }),
        };
        assert!(writer.append(append).is_ok());
    }
    number
}
