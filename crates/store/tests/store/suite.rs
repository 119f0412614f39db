//! What every store promises of shards.

use domain::ErrorKind;
use proto::link::{
    AgentHead, DedupRow, DefinitionRow, Group, Mark, Provision, Prune, ReadAgent, ReadAgents,
    ReadHistories, ReadHistory, ReadWorks, TailRow, WorkEnd,
};
use store::{CommitOutcome, Error, FenceOutcome};

use crate::doors::Doors;
use crate::rows::{CLUSTER, SHARD, agent, fence, group, provision, work};

promises! {
    a_shard_is_provisioned_once_and_for_one_cluster
    a_fence_with_an_older_epoch_or_term_loses
    a_stale_epoch_or_a_wrong_head_commits_nothing
    a_group_that_cannot_be_written_leaves_nothing
    a_recovery_finds_what_was_written
    history_follows_prev_across_groups_and_other_agents
    history_comes_in_pages_of_a_mebibyte
    several_histories_come_in_one_read
    several_histories_share_a_page
    an_agent_and_a_key_come_in_one_read
    works_and_agents_are_listed
    an_entry_is_pruned_only_when_nothing_needs_it
    pruning_by_bytes_takes_the_oldest
    pruning_by_bytes_is_not_misled_by_what_stays
    a_database_name_is_not_a_path
    a_store_can_be_checked
}

async fn a_shard_is_provisioned_once_and_for_one_cluster(doors: &Doors) {
    let missing = doors.node.owner(SHARD).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
    let first = doors.control.provision(SHARD, &provision()).await.unwrap();
    assert_eq!((first.epoch, first.head, first.term), (0, 0, 0));
    assert!(!first.database_id.is_empty());
    let again = doors.control.provision(SHARD, &provision()).await.unwrap();
    assert_eq!(again, first);
    let foreign = Provision { cluster_id: "cluster-2".to_owned(), shard: 3 };
    let refused = doors.control.provision(SHARD, &foreign).await.unwrap_err();
    assert!(
        matches!(&refused, Error::ForeignCluster { what } if what.contains(CLUSTER)),
        "{refused}"
    );
    let misnamed = Provision { shard: 4, ..provision() };
    let refused = doors.control.provision(SHARD, &misnamed).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
}

async fn a_fence_with_an_older_epoch_or_term_loses(doors: &Doors) {
    doors.control.provision(SHARD, &provision()).await.unwrap();
    let row = doors.fence(0, 7, 5).await;
    assert_eq!((row.epoch, row.node.as_str(), row.incarnation, row.term), (1, "node-1", 7, 5));
    let lost = async |expected, incarnation, term| match doors
        .control
        .fence(SHARD, &fence(expected, incarnation, term))
        .await
        .unwrap()
    {
        FenceOutcome::Lost(found) => assert_eq!(found, row),
        FenceOutcome::Fenced(row) => panic!("fenced: {row:?}"),
    };
    lost(0, 8, 5).await;
    lost(1, 8, 4).await;
    lost(2, 8, 6).await;
    // The answer to a fence may be lost: asked again, it is granted again, and nothing changes.
    assert_eq!(doors.fence(0, 7, 5).await, row);
    assert_eq!(doors.fence(1, 8, 5).await.epoch, 2);
    // Of a shard that was released no epoch is given out that somebody may have had.
    let above = proto::link::Fence { above: 40, ..fence(2, 9, 5) };
    let fenced = |outcome| matches!(outcome, FenceOutcome::Fenced(row) if row.epoch == 41);
    for _ in 0..2 {
        assert!(fenced(doors.control.fence(SHARD, &above).await.unwrap()), "also asked again");
    }
}

/// A group that writes to every table.
fn everywhere(head: u64) -> Group {
    let lsn = head + 1;
    Group {
        agents: vec![agent(1, lsn, lsn)],
        works: vec![work(lsn, 1, 0, 1)],
        dedups: vec![DedupRow { agent: 1, key: "k".into(), work: lsn, ..DedupRow::default() }],
        definitions: vec![DefinitionRow { hash: vec![7; 32].into(), body: "{}".into() }],
        mark: Some(Mark { lsn: head, heads: vec![AgentHead { agent: 1, head }] }),
        ..group(head, &[(1, 0)])
    }
}

async fn is_empty(doors: &Doors) {
    let found = doors.node.recover(SHARD).await.unwrap();
    assert_eq!((found.owner.head, found.agent_max), (0, 0));
    assert!(found.tail.is_empty() && found.open.is_empty() && found.agents.is_empty());
    assert_eq!(found.mark, Mark::default());
    assert_eq!(doors.node.definition(SHARD, &[7; 32]).await.unwrap(), None);
}

async fn a_stale_epoch_or_a_wrong_head_commits_nothing(doors: &Doors) {
    doors.owned().await;
    let stale = Group { epoch: 2, ..everywhere(0) };
    assert_eq!(doors.commit(stale).await, CommitOutcome::Fenced { epoch: 1 });
    is_empty(doors).await;
    assert_eq!(doors.commit(everywhere(5)).await, CommitOutcome::HeadMismatch { head: 0 });
    is_empty(doors).await;

    doors.committed(everywhere(0)).await;
    assert_eq!(doors.commit(everywhere(0)).await, CommitOutcome::HeadMismatch { head: 1 });
    doors.fence(1, 2, 1).await;
    let late = group(1, &[(1, 1)]);
    assert_eq!(doors.commit(late).await, CommitOutcome::Fenced { epoch: 2 });
    assert_eq!(doors.head().await, 1);
}

async fn a_group_that_cannot_be_written_leaves_nothing(doors: &Doors) {
    doors.owned().await;
    let end = WorkEnd { id: 77, state: 6, reason: 5, end_ms: 9, record: "r".into() };
    let missing = Group { ends: vec![end], ..everywhere(0) };
    let refused = doors.node.commit(SHARD, missing.into()).await.unwrap_err();
    assert!(refused.to_string().contains("work 77"), "{refused}");
    is_empty(doors).await;
    let mut gap = everywhere(0);
    gap.rows[0].lsn = 2;
    assert_eq!(doors.node.commit(SHARD, gap.into()).await.unwrap_err().kind(), ErrorKind::Invalid);
    is_empty(doors).await;
    doors.committed(everywhere(0)).await;
}

pub(crate) async fn a_recovery_finds_what_was_written(doors: &Doors) {
    doors.owned().await;
    let opened = group(0, &[(0, 0)]);
    doors.committed(opened).await;
    let begin = Group {
        agents: vec![agent(1, 2, 0), agent(2, 3, 0), agent(3, 4, 0)],
        works: vec![work(2, 1, 0, 1), work(3, 2, 0, 1), work(4, 3, 0, 1)],
        definitions: vec![DefinitionRow { hash: vec![7; 32].into(), body: "{}".into() }],
        ..group(1, &[(1, 0), (2, 0), (3, 0)])
    };
    doors.committed(begin).await;
    let heads = vec![AgentHead { agent: 1, head: 2 }, AgentHead { agent: 2, head: 3 }];
    let end = WorkEnd { id: 3, state: 6, reason: 5, end_ms: 2_003, record: "record of 3".into() };
    let marked = Group {
        ends: vec![end],
        mark: Some(Mark { lsn: 4, heads: heads.clone() }),
        ..group(4, &[(2, 3), (0, 0)])
    };
    doors.committed(marked).await;
    let snapshot = Group { agents: vec![agent(1, 7, 7)], ..group(6, &[(1, 2)]) };
    doors.committed(snapshot).await;

    let found = doors.node.recover(SHARD).await.unwrap();
    assert_eq!((found.owner.epoch, found.owner.head, found.agent_max), (1, 7, 3));
    assert_eq!(found.mark, Mark { lsn: 4, heads });
    let tail = [(7, 1), (5, 2)].map(|(lsn, agent)| TailRow { lsn, agent });
    assert_eq!(found.tail, tail);
    assert_eq!(found.open, [work(2, 1, 0, 1), work(4, 3, 0, 1)]);
    assert_eq!(found.agents, [agent(1, 7, 7), agent(3, 4, 0)]);
    let definition = doors.node.definition(SHARD, &[7; 32]).await.unwrap().unwrap();
    assert_eq!(definition.body, "{}");
    let (ended, of) = doors.node.work(SHARD, 3).await.unwrap().unwrap();
    assert_eq!((ended.state, ended.reason, ended.end_ms, of.id), (6, 5, 2_003, 2));
    assert_eq!(ended, proto::link::WorkRow { reason: 5, ..work(3, 2, 0, 6) });
    assert_eq!(doors.node.work(SHARD, 99).await.unwrap(), None);
}

async fn lsns(doors: &Doors, from: u64, above: u64, limit: u32) -> (Vec<u64>, bool) {
    let page = doors.node.history(SHARD, &ReadHistory { from, above, limit }).await.unwrap();
    (page.rows.iter().map(|row| row.lsn).collect(), page.truncated)
}

async fn history_follows_prev_across_groups_and_other_agents(doors: &Doors) {
    doors.owned().await;
    let first = group(0, &[(1, 0), (2, 0), (1, 1)]);
    doors.committed(first.clone()).await;
    doors.committed(group(3, &[(2, 2), (2, 4)])).await;
    doors.committed(group(5, &[(1, 3), (0, 0), (2, 5)])).await;
    assert_eq!(lsns(doors, 6, 0, 0).await, (vec![6, 3, 1], false));
    assert_eq!(lsns(doors, 8, 0, 0).await, (vec![8, 5, 4, 2], false));
    assert_eq!(lsns(doors, 8, 4, 0).await, (vec![8, 5], false));
    assert_eq!(lsns(doors, 8, 0, 2).await, (vec![8, 5], false));
    assert_eq!(lsns(doors, 0, 0, 0).await, (vec![], false));
    assert_eq!(lsns(doors, 9, 0, 0).await, (vec![], true));
    let page =
        doors.node.history(SHARD, &ReadHistory { from: 3, above: 0, limit: 1 }).await.unwrap();
    assert_eq!(page.rows, [first.rows[2].clone()]);
}

async fn history_comes_in_pages_of_a_mebibyte(doors: &Doors) {
    doors.owned().await;
    let mut large = group(0, &[(1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]);
    for row in &mut large.rows {
        row.payload = vec![7; 600 << 10].into();
    }
    doors.committed(large).await;
    assert_eq!(lsns(doors, 5, 0, 0).await, (vec![5, 4], false));
    assert_eq!(lsns(doors, 3, 0, 0).await, (vec![3, 2], false));
}

async fn histories(doors: &Doors, each: &[(u64, u64, u32)]) -> Vec<u64> {
    let of = |(from, above, limit): &(u64, u64, u32)| ReadHistory {
        from: *from,
        above: *above,
        limit: *limit,
    };
    let asked = ReadHistories { each: each.iter().map(of).collect() };
    let page = doors.node.histories(SHARD, &asked).await.unwrap();
    assert_eq!((page.truncated, page.epoch), (false, 1));
    page.rows.iter().map(|row| row.lsn).collect()
}

async fn several_histories_come_in_one_read(doors: &Doors) {
    doors.owned().await;
    doors.committed(group(0, &[(1, 0), (2, 0), (1, 1), (2, 2), (3, 0), (1, 3)])).await;
    assert!(histories(doors, &[]).await.is_empty());
    assert_eq!(histories(doors, &[(6, 0, 0), (4, 0, 0), (5, 0, 0)]).await, [6, 4, 5, 3, 2, 1]);
    assert_eq!(histories(doors, &[(6, 1, 0), (4, 0, 1), (5, 5, 0), (99, 0, 0)]).await, [6, 4, 3]);
    let of = |from| ReadHistory { from, above: 0, limit: 0 };
    let asked = ReadHistories { each: (1..1_026).map(of).collect() };
    let refused = doors.node.histories(SHARD, &asked).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
    let asked = ReadHistories { each: vec![of(u64::MAX)] };
    let refused = doors.node.histories(SHARD, &asked).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
}

/// What one page cannot hold is missing where it is oldest, so that every history can be gone on with.
async fn several_histories_share_a_page(doors: &Doors) {
    doors.owned().await;
    let mut large = group(0, &[(1, 0), (2, 0), (1, 1), (2, 2), (1, 3), (2, 4)]);
    for row in &mut large.rows {
        row.payload = vec![7; 300 << 10].into();
    }
    doors.committed(large).await;
    assert_eq!(histories(doors, &[(5, 0, 0), (6, 0, 0)]).await, [5, 6, 3, 4]);
}

async fn an_agent_and_a_key_come_in_one_read(doors: &Doors) {
    doors.owned().await;
    let key = DedupRow {
        agent: 1,
        key: "once".into(),
        work: 1,
        input_hash: "hash".into(),
        expires_ms: 5_000,
    };
    let accepted = Group {
        agents: vec![agent(1, 1, 0)],
        works: vec![work(1, 1, 0, 1)],
        dedups: vec![key.clone()],
        ..group(0, &[(1, 0)])
    };
    doors.committed(accepted).await;
    let read = |user: &str, idempotency_key: &str| ReadAgent {
        tenant: "acme".into(),
        name: "support".into(),
        key: user.into(),
        idempotency_key: idempotency_key.into(),
        id: 0,
    };
    let found = doors.node.agent(SHARD, &read("user-1", "once")).await.unwrap();
    assert_eq!((found.agent, found.dedup), (Some(agent(1, 1, 0)), Some(key.clone())));
    let found = doors.node.agent(SHARD, &read("user-1", "other")).await.unwrap();
    assert_eq!((found.agent, found.dedup), (Some(agent(1, 1, 0)), None));
    let found = doors.node.agent(SHARD, &read("user-2", "once")).await.unwrap();
    assert_eq!((found.agent, found.dedup), (None, None));
    let by_id = ReadAgent { id: 1, idempotency_key: "once".into(), ..ReadAgent::default() };
    assert_eq!(doors.node.agent(SHARD, &by_id).await.unwrap().dedup, Some(key.clone()));

    // A key that expired may be used again.
    let again = DedupRow { work: 2, expires_ms: 9_000, ..key };
    doors.committed(Group { dedups: vec![again.clone()], ..group(1, &[(1, 1)]) }).await;
    assert_eq!(doors.node.agent(SHARD, &by_id).await.unwrap().dedup, Some(again));
}

async fn works_and_agents_are_listed(doors: &Doors) {
    doors.owned().await;
    let other = proto::link::AgentRow { tenant: "umbrella".into(), ..agent(3, 5, 0) };
    let all = Group {
        agents: vec![agent(1, 1, 0), agent(2, 2, 0), other],
        works: vec![
            work(1, 1, 0, 6),
            work(2, 2, 0, 6),
            work(3, 1, 1, 6),
            work(4, 1, 3, 1),
            work(5, 3, 0, 1),
        ],
        ..group(0, &[(1, 0), (2, 0), (1, 1), (1, 3), (3, 0)])
    };
    doors.committed(all).await;
    let ids = async |agent, below, limit| {
        let asked = ReadWorks { tenant: "acme".into(), agent, below, limit };
        let page = doors.node.works(SHARD, &asked).await.unwrap();
        assert!(page.agents.iter().all(|agent| agent.state.is_empty() && agent.tenant == "acme"));
        page.works.iter().map(|work| work.id).collect::<Vec<_>>()
    };
    assert_eq!(ids(0, 0, 0).await, [4, 3, 2, 1]);
    assert_eq!(ids(0, 4, 2).await, [3, 2]);
    assert_eq!(ids(1, 0, 0).await, [4, 3, 1]);
    assert_eq!(ids(1, 4, 1).await, [3]);
    assert_eq!(ids(2, 0, 0).await, [2]);
    let agents = async |above, limit| {
        let asked = ReadAgents { tenant: "acme".into(), above, limit };
        let page = doors.node.agents(SHARD, &asked).await.unwrap();
        page.agents.iter().map(|agent| agent.id).collect::<Vec<_>>()
    };
    assert_eq!(agents(0, 0).await, [1, 2]);
    assert_eq!(agents(1, 0).await, [2]);
    assert_eq!(agents(0, 1).await, [1]);
}

/// Everything is old enough.
fn prune() -> Prune {
    Prune {
        epoch: 1,
        entries_before_ms: 1 << 40,
        log_bytes_max: 0,
        works_before_ms: 1 << 40,
        now_ms: 1 << 40,
    }
}

async fn kept(doors: &Doors, lsns: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut kept = Vec::new();
    for lsn in lsns {
        let asked = ReadHistory { from: lsn, above: lsn - 1, limit: 1 };
        let page = doors.node.history(SHARD, &asked).await.unwrap();
        kept.extend(page.rows.first().map(|row| row.lsn));
    }
    kept
}

async fn an_entry_is_pruned_only_when_nothing_needs_it(doors: &Doors) {
    doors.owned().await;
    // Agent 1 has a snapshot at 4, agent 2 none; work 1 is open, work 2 has ended.
    let mut rows = group(0, &[(1, 0), (1, 1), (2, 0), (1, 2), (1, 4), (0, 0), (0, 0)]);
    for (lsn, row) in (1..).zip(&mut rows.rows) {
        row.work = [1, 2, 0, 2, 2, 0, 0][lsn - 1];
    }
    let key = |key: &str, expires_ms| DedupRow {
        agent: 1,
        key: key.into(),
        work: 1,
        input_hash: "h".into(),
        expires_ms,
    };
    let all = Group {
        agents: vec![agent(1, 5, 4), agent(2, 3, 0)],
        works: vec![work(1, 1, 0, 2), work(2, 1, 1, 6)],
        dedups: vec![key("old", 10), key("young", 1 << 41)],
        ..rows
    };
    doors.committed(all).await;
    let young = Prune { entries_before_ms: 1_001, works_before_ms: 1_001, now_ms: 1, ..prune() };
    assert_eq!(doors.node.prune(SHARD, &young).await.unwrap(), 0);
    let stale = Prune { epoch: 2, ..prune() };
    let refused = doors.node.prune(SHARD, &stale).await.unwrap_err();
    assert!(matches!(refused, Error::Fenced { epoch: 1 }), "{refused}");

    // Entries 2, 4 and 6, work 2, one key.
    assert_eq!(doors.node.prune(SHARD, &prune()).await.unwrap(), 5);
    assert_eq!(kept(doors, 1..=7).await, [1, 3, 5, 7]);
    assert_eq!(lsns(doors, 5, 0, 0).await, (vec![5], true));
    assert!(doors.node.work(SHARD, 1).await.unwrap().is_some());
    assert!(doors.node.work(SHARD, 2).await.unwrap().is_none());
    let read = |key: &str| ReadAgent { id: 1, idempotency_key: key.into(), ..ReadAgent::default() };
    assert_eq!(doors.node.agent(SHARD, &read("old")).await.unwrap().dedup, None);
    assert!(doors.node.agent(SHARD, &read("young")).await.unwrap().dedup.is_some());
    assert_eq!(doors.node.prune(SHARD, &prune()).await.unwrap(), 0);
    assert_eq!(doors.head().await, 7);
}

async fn pruning_by_bytes_takes_the_oldest(doors: &Doors) {
    doors.owned().await;
    // More rows than a slice looks at.
    let mut head = 0;
    for _ in 0..12 {
        doors.committed(group(head, &[(0, 0); 1_000])).await;
        head += 1_000;
    }
    let by_bytes = Prune { entries_before_ms: 0, log_bytes_max: 300_000, ..prune() };
    let deleted = doors.node.prune(SHARD, &by_bytes).await.unwrap();
    assert!((5_000..12_000).contains(&deleted), "{deleted}");
    let page = kept(doors, [1, deleted, deleted + 1, 12_000]).await;
    assert_eq!(
        page,
        [deleted + 1, 12_000].into_iter().filter(|lsn| deleted < *lsn).collect::<Vec<_>>()
            [..page.len()]
    );
    assert_eq!(doors.head().await, 12_000);
    // Results of works are kept for longer, and take nothing away from entries.
    let large = |id| proto::link::WorkRow { record: vec![7; 400_000].into(), ..work(id, 1, 0, 6) };
    let results = Group { works: vec![large(1), large(2)], ..group(head, &[(0, 0)]) };
    doors.committed(results).await;
    let young = Prune { works_before_ms: 0, now_ms: 0, ..by_bytes };
    assert_eq!(doors.node.prune(SHARD, &young).await.unwrap(), 0);
}

async fn pruning_by_bytes_is_not_misled_by_what_stays(doors: &Doors) {
    doors.owned().await;
    let mut first = group(0, &[(0, 0); 1_000]);
    first.rows[0].work = 1;
    first.works = vec![work(1, 1, 0, 2)];
    doors.committed(first).await;
    let by_bytes = Prune { entries_before_ms: 0, log_bytes_max: 300_000, ..prune() };
    // Over the limit, and over it once more: the oldest row stands far below all others by then.
    for (rounds, wanted) in [(1..18, 10_000), (18..22, 3_000)] {
        for round in rounds {
            doors.committed(group(round * 1_000, &[(0, 0); 1_000])).await;
        }
        let deleted = doors.node.prune(SHARD, &by_bytes).await.unwrap();
        assert!(wanted <= deleted, "{deleted}, not {wanted}");
    }
    assert_eq!(kept(doors, [1, 2, 22_000]).await, [1, 22_000]);
}

async fn a_database_name_is_not_a_path(doors: &Doors) {
    for name in ["../shard-1", "shard-1/../../x", "/etc/passwd", "", "shard-01", "shard-x", "lock"]
    {
        let refused = doors.control.provision(name, &provision()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{name}: {refused}");
        let refused = doors.node.owner(name).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{name}: {refused}");
    }
    let refused = doors.node.owner("control").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
}

async fn a_store_can_be_checked(doors: &Doors) {
    doors.owned().await;
    doors.committed(everywhere(0)).await;
    let checked = doors.control.check(SHARD).await.unwrap();
    assert_eq!((checked.schema, checked.synchronous, checked.integrity.as_str()), (4, 2, "ok"));
    assert!(checked.engine.contains("SQLite 3."), "{}", checked.engine);
    assert_eq!(checked.database_id, doors.node.owner(SHARD).await.unwrap().database_id);
}
