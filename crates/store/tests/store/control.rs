//! What every store promises of the control database.

use std::collections::HashMap;

use domain::ErrorKind;
use proto::link::control_write::Write;
use proto::link::read_control::Read;
use proto::link::{
    CapabilityOffer, ControlBatch, ControlWrite, PutAudit, PutCluster, PutDefinition, PutNode,
    PutShard, PutTransition, RaiseBeat, ReadAudit, ReadCluster, ReadControl, ReadDefinitions,
    ReadLeader, ReadNodes, ReadShards, ReadTransitions, ReleaseLeadership, TakeLeadership,
};

use crate::doors::Doors;
use crate::rows::{SHARD, done, not_leader};

promises! {
    leadership_is_compared_and_set
    only_the_leader_writes_the_control_database
    the_control_database_answers_what_was_put
    transitions_are_kept_within_bounds
}

fn write(write: Write) -> ControlWrite {
    ControlWrite { write: Some(write) }
}

fn batch(leader: &str, term: u64, writes: Vec<Write>) -> ControlBatch {
    let writes = writes.into_iter().map(write).collect();
    ControlBatch { leader: leader.into(), term, writes }
}

fn take(name: &str, expected_term: u64, expected_beat: u64) -> ControlBatch {
    let take = TakeLeadership { name: name.into(), expected_term, expected_beat };
    batch("", 0, vec![Write::Take(take)])
}

fn row(name: &str, term: u64, beat: u64) -> proto::link::LeaderRow {
    proto::link::LeaderRow { name: name.into(), term, beat }
}

async fn leadership_is_compared_and_set(doors: &Doors) {
    let control = &doors.control;
    let taken = done(control.control(&take("control-1", 0, 0)).await.unwrap());
    assert_eq!(taken.leader, Some(row("control-1", 1, 1)));
    let lost = not_leader(control.control(&take("control-2", 0, 0)).await.unwrap());
    assert_eq!(lost, row("control-1", 1, 1));
    let beat = batch("control-1", 1, vec![Write::Beat(RaiseBeat {})]);
    assert_eq!(done(control.control(&beat).await.unwrap()).leader, Some(row("control-1", 1, 2)));
    not_leader(control.control(&take("control-2", 1, 1)).await.unwrap());
    let taken = done(control.control(&take("control-2", 1, 2)).await.unwrap());
    assert_eq!(taken.leader, Some(row("control-2", 2, 3)));
    assert_eq!(not_leader(control.control(&beat).await.unwrap()), row("control-2", 2, 3));
    let release = batch("control-2", 2, vec![Write::Release(ReleaseLeadership {})]);
    assert_eq!(done(control.control(&release).await.unwrap()).leader, Some(row("", 2, 4)));
    not_leader(control.control(&release).await.unwrap());
    let read = ReadControl { read: Some(Read::Leader(ReadLeader {})) };
    assert_eq!(control.read_control(&read).await.unwrap().leader, Some(row("", 2, 4)));
}

async fn only_the_leader_writes_the_control_database(doors: &Doors) {
    let control = &doors.control;
    done(control.control(&take("control-1", 0, 0)).await.unwrap());
    let node = PutNode { name: "node-1".into(), ..PutNode::default() };
    let both = vec![Write::Beat(RaiseBeat {}), Write::Node(node.clone())];
    not_leader(control.control(&batch("control-1", 2, both.clone())).await.unwrap());
    not_leader(control.control(&batch("control-2", 1, both.clone())).await.unwrap());
    let nobody = control.control(&batch("", 0, vec![Write::Node(node)])).await.unwrap_err();
    assert_eq!(nobody.kind(), ErrorKind::Invalid, "{nobody}");
    let nodes = ReadControl { read: Some(Read::Nodes(ReadNodes {})) };
    let found = control.read_control(&nodes).await.unwrap();
    assert_eq!((found.leader, found.nodes), (Some(row("control-1", 1, 1)), vec![]));
    done(control.control(&batch("control-1", 1, both)).await.unwrap());
    assert_eq!(control.read_control(&nodes).await.unwrap().nodes.len(), 1);
}

async fn the_control_database_answers_what_was_put(doors: &Doors) {
    let control = &doors.control;
    let read = async |read| control.read_control(&ReadControl { read: Some(read) }).await.unwrap();
    assert_eq!(read(Read::Cluster(ReadCluster {})).await.cluster_id, "");
    let cluster = |id: &str, authorities: &[&str]| {
        let authorities = authorities.iter().map(ToString::to_string).collect();
        Write::Cluster(PutCluster { cluster_id: id.into(), authorities })
    };
    let nobody = batch("", 0, vec![cluster("one", &["a"])]);
    assert_eq!(control.control(&nobody).await.unwrap_err().kind(), ErrorKind::Invalid);
    done(control.control(&take("control-1", 0, 0)).await.unwrap());
    let put = async |id: &str, authorities: &[&str]| {
        let batch = batch("control-1", 1, vec![cluster(id, authorities)]);
        let answer = done(control.control(&batch).await.unwrap());
        (answer.cluster_id, answer.authorities)
    };
    assert_eq!(put("one", &["a"]).await, ("one".to_owned(), vec!["a".to_owned()]));
    let both = vec!["a".to_owned(), "b".to_owned()];
    assert_eq!(put("two", &["a", "b"]).await, ("one".to_owned(), both.clone()));
    let found = read(Read::Cluster(ReadCluster {})).await;
    assert_eq!((found.cluster_id, found.authorities), ("one".to_owned(), both));
    let attributes = HashMap::from([("modality".to_owned(), "text".to_owned())]);
    let capability =
        CapabilityOffer { name: "phase/action".into(), version: 1, attributes, capacity: 4 };
    let node = PutNode {
        name: "node-1".into(),
        incarnation: 9,
        state: "live".into(),
        reason: 60,
        zone: "a".into(),
        address: "127.0.0.1:1".into(),
        capacity: 3,
        capabilities: vec![capability],
        admission: "cordoned".into(),
    };
    let shard = PutShard {
        shard: 3,
        class: 0,
        slot_first: 100,
        slot_count: 50,
        store: "main".into(),
        database: SHARD.into(),
        epoch: 7,
        standing: "stopped".into(),
    };
    let definition = |name: &str, hash: u8| PutDefinition {
        hash: vec![hash; 32].into(),
        tenant: "acme".into(),
        name: name.into(),
        body: format!("{name} {hash}").into(),
        create_ms: hash.into(),
    };
    let definitions = [definition("b", 1), definition("a", 2), definition("a", 3)];
    let mut writes: Vec<Write> = definitions.clone().map(Write::Definition).into();
    let audit = PutAudit {
        at_ms: 5,
        actor: "spiffe://stagedoor.local/client/ann".into(),
        action: "ApplyDefinition".into(),
        subject: "definition/acme/a".into(),
        term: 1,
    };
    writes.extend([Write::Node(node.clone()), Write::Shard(shard.clone())]);
    writes.push(Write::Audit(audit.clone()));
    done(control.control(&batch("control-1", 1, writes)).await.unwrap());

    assert_eq!(read(Read::Audit(ReadAudit { limit: 10 })).await.audit, [audit]);
    assert_eq!(read(Read::Nodes(ReadNodes {})).await.nodes, [node]);
    assert_eq!(read(Read::Shards(ReadShards {})).await.shards, [shard]);
    let by = async |asked| read(Read::Definitions(asked)).await.definitions;
    let acme = ReadDefinitions { tenant: "acme".into(), ..ReadDefinitions::default() };
    let [b, old, new] = definitions;
    assert_eq!(by(acme.clone()).await, [new.clone(), b.clone()]);
    let first = by(ReadDefinitions { limit: 1, ..acme.clone() }).await;
    assert_eq!(first, std::slice::from_ref(&new));
    assert_eq!(by(ReadDefinitions { after_name: "a".into(), ..acme.clone() }).await, [b]);
    let versions = ReadDefinitions { name: "a".into(), ..acme.clone() };
    assert_eq!(by(versions.clone()).await, [new.clone(), old.clone()]);
    let by_hash = by(ReadDefinitions { hash: old.hash.clone(), ..acme.clone() }).await;
    assert_eq!(by_hash, std::slice::from_ref(&old));
    assert_eq!(by(ReadDefinitions { tenant: "umbrella".into(), ..versions.clone() }).await, []);
    // An old version that is put again is the current one.
    done(
        control
            .control(&batch("control-1", 1, vec![Write::Definition(old.clone())]))
            .await
            .unwrap(),
    );
    assert_eq!(by(versions).await, [old, new]);
}

async fn transitions_are_kept_within_bounds(doors: &Doors) {
    let control = &doors.control;
    done(control.control(&take("control-1", 0, 0)).await.unwrap());
    let transition = |subject: &str, number: i64| {
        Write::Transition(PutTransition {
            subject: subject.into(),
            from: "live".into(),
            to: "dead".into(),
            reason: 65,
            cause: "c".into(),
            epoch: 2,
            node: "node-1".into(),
            at_ms: number,
            term: 1,
        })
    };
    let put = async |writes| done(control.control(&batch("control-1", 1, writes)).await.unwrap());
    put(vec![transition("node/node-1", -1)]).await;
    for slice in 0..12 {
        put((0..1_000).map(|number| transition("shard/1", slice * 1_000 + number)).collect()).await;
    }
    let read = async |subject: &str, limit| {
        let asked = ReadTransitions { subject: subject.into(), limit };
        let asked = ReadControl { read: Some(Read::Transitions(asked)) };
        control.read_control(&asked).await.unwrap().transitions
    };
    let newest = read("shard/1", 2).await;
    assert_eq!(newest.iter().map(|found| found.at_ms).collect::<Vec<_>>(), [11_999, 11_998]);
    assert_eq!((newest[0].reason, newest[0].epoch, newest[0].term), (65, 2, 1));
    let all = read("shard/1", u32::MAX).await;
    assert_eq!((all.len(), all[9_999].at_ms), (10_000, 2_000));
    assert_eq!(read("node/node-1", 0).await.len(), 1);
    assert_eq!(read("", 3).await.len(), 3);
}
