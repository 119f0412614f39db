//! What the control database does: guarded batches of the leader. What everybody may read is in [`read`].
//!
//! The SQL of the control database stands here and nowhere else. Never decides who leads: it compares and sets.

pub(crate) mod read;

use std::collections::BTreeMap;

use libsql::Value;
use proto::link::control_write::Write;
use proto::link::{
    ControlAnswer, ControlBatch, PutAudit, PutDefinition, PutNode, PutShard, PutTransition,
    TakeLeadership,
};

use crate::Error;
use crate::statement::{Batch, Found, Guard, Sink, Stop, blob, number, text};

/// Transitions that are kept of each kind of subject, and rows of the audit.
const TRANSITIONS_MAX: u64 = 10_000;
const AUDIT_MAX: u64 = 100_000;
/// Rows deleted at once, and how often: by the number of the newest row.
const TRANSITIONS_SLICE: u64 = 1_000;
const TRANSITIONS_EVERY: u64 = 64;

/// Stopped by [`Guard::Leader`], whoever leads may be read.
impl Batch for ControlBatch {
    type Answer = ControlAnswer;

    fn write(&self, sink: &mut dyn Sink) -> Result<(), Stop> {
        let writes = writes(self)?;
        if !self.leader.is_empty() {
            let params = vec![text(&self.leader), number(self.term)?];
            sink.guard(Guard::Leader, GUARD_LEADER, params)?;
        }
        for write in writes {
            apply(sink, write)?;
        }
        sink.keep(read::LEADER, Vec::new())?;
        sink.keep(read::CLUSTER, Vec::new())
    }

    fn answer(&self, kept: &mut Found) -> Result<ControlAnswer, Error> {
        let answer = ControlAnswer { leader: Some(read::leader(kept)?), ..read::cluster(kept)? };
        let has_cluster =
            self.writes.iter().any(|put| matches!(put.write, Some(Write::Cluster(_))));
        match has_cluster {
            true => Ok(answer),
            false => Ok(ControlAnswer { leader: answer.leader, ..ControlAnswer::default() }),
        }
    }
}

const GUARD_LEADER: &str = "INSERT INTO fenced SELECT 'stale' WHERE NOT EXISTS(SELECT 1 FROM leader WHERE name = ?1 AND term = ?2)";

/// Without a leader's name only what is a compare-and-set of its own may be written.
fn writes(batch: &ControlBatch) -> Result<Vec<&Write>, Error> {
    let mut writes = Vec::with_capacity(batch.writes.len());
    for write in &batch.writes {
        let write = write.write.as_ref();
        writes.push(
            write
                .ok_or_else(|| Error::invalid("a control batch has a write of an unknown kind"))?,
        );
    }
    let is_step = matches!(writes.as_slice(), [Write::Take(_)]);
    let takes = writes.iter().any(|write| matches!(write, Write::Take(_)));
    if batch.leader.is_empty() && !is_step {
        return Err(Error::invalid("a control batch without a leader takes leadership"));
    }
    if !batch.leader.is_empty() && takes {
        return Err(Error::invalid("leadership is taken in a batch of its own, without a leader"));
    }
    Ok(writes)
}

fn apply(sink: &mut dyn Sink, write: &Write) -> Result<(), Stop> {
    match write {
        Write::Take(take) => take_leadership(sink, take),
        Write::Beat(_) => sink.run("UPDATE leader SET beat = beat + 1", Vec::new()),
        Write::Release(_) => sink.run("UPDATE leader SET name = '', beat = beat + 1", Vec::new()),
        Write::Cluster(put) => {
            if put.cluster_id.is_empty() {
                return Err(Error::invalid("a cluster id is not empty").into());
            }
            let params = vec![text(&put.cluster_id), text(&put.authorities.join("\n"))];
            let put = "INSERT INTO cluster(id, cluster_id, authorities) VALUES(1, ?1, ?2) \
                       ON CONFLICT(id) DO UPDATE SET authorities = excluded.authorities";
            sink.run(put, params)
        }
        Write::Node(node) => put_node(sink, node),
        Write::Definition(definition) => put_definition(sink, definition),
        Write::Transition(transition) => put_transition(sink, transition),
        Write::Shard(shard) => put_shard(sink, shard),
        Write::Audit(audit) => put_audit(sink, audit),
    }
}

fn take_leadership(sink: &mut dyn Sink, take: &TakeLeadership) -> Result<(), Stop> {
    if take.name.is_empty() {
        return Err(Error::invalid("a leader has a name").into());
    }
    let params = vec![text(&take.name), number(take.expected_term)?, number(take.expected_beat)?];
    sink.run_one(
        Guard::Leader,
        "UPDATE leader SET name = ?1, term = term + 1, beat = beat + 1 WHERE term = ?2 AND beat = ?3",
        params,
    )
}

fn put_node(sink: &mut dyn Sink, node: &PutNode) -> Result<(), Stop> {
    let params = vec![
        text(&node.name),
        number(node.incarnation)?,
        text(&node.state),
        Value::Integer(node.reason.into()),
        text(&node.zone),
        text(&node.address),
        Value::Integer(node.capacity.into()),
        text(&node.admission),
    ];
    sink.run("INSERT OR REPLACE INTO nodes VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, X'', ?8)", params)?;
    sink.run("DELETE FROM capabilities WHERE node = ?1", vec![text(&node.name)])?;
    for (offer, place) in node.capabilities.iter().zip(0_u64..) {
        // In one order, so that equal attributes are equal texts.
        let attributes: BTreeMap<&String, &String> = offer.attributes.iter().collect();
        let attributes = serde_json::to_string(&attributes);
        let attributes = attributes.map_err(|error| Error::internal("capabilities", error))?;
        let params = vec![
            text(&node.name),
            number(place)?,
            number(node.incarnation)?,
            text(&offer.name),
            Value::Integer(offer.version.into()),
            Value::Integer(offer.capacity.into()),
            text(&attributes),
        ];
        sink.run("INSERT INTO capabilities VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7)", params)?;
    }
    Ok(())
}

/// The newest row of a name is its current version, so putting an old version again makes it the current one.
fn put_definition(sink: &mut dyn Sink, definition: &PutDefinition) -> Result<(), Stop> {
    let params = vec![
        blob(&definition.hash),
        text(&definition.tenant),
        text(&definition.name),
        blob(&definition.body),
        Value::Integer(definition.create_ms),
    ];
    sink.run(
        "INSERT OR REPLACE INTO definitions(hash, tenant, name, body, create_ms) VALUES(?1, ?2, ?3, ?4, ?5)",
        params,
    )
}

fn put_shard(sink: &mut dyn Sink, shard: &PutShard) -> Result<(), Stop> {
    let params = vec![
        Value::Integer(shard.shard.into()),
        Value::Integer(shard.class.into()),
        Value::Integer(shard.slot_first.into()),
        Value::Integer(shard.slot_count.into()),
        text(&shard.store),
        text(&shard.database),
        number(shard.epoch)?,
        text(&shard.standing),
    ];
    sink.run("INSERT OR REPLACE INTO shards VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)", params)
}

fn put_audit(sink: &mut dyn Sink, put: &PutAudit) -> Result<(), Stop> {
    let params = vec![
        Value::Integer(put.at_ms),
        text(&put.actor),
        text(&put.action),
        text(&put.subject),
        number(put.term)?,
    ];
    sink.run(
        "INSERT INTO audit(at_ms, actor, action, subject, term) VALUES(?1, ?2, ?3, ?4, ?5)",
        params,
    )?;
    let forget = "DELETE FROM audit WHERE id <= (SELECT max(id) FROM audit) - ?1";
    sink.run(forget, vec![number(AUDIT_MAX)?])
}

/// The letters before the first other character: of `node/node-1` and `node node-1`, `node`.
fn kind(subject: &str) -> &str {
    let end = subject.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(subject.len());
    &subject[..end]
}

fn put_transition(sink: &mut dyn Sink, put: &PutTransition) -> Result<(), Stop> {
    let kind = kind(&put.subject);
    let params = vec![
        text(kind),
        text(&put.subject),
        text(&put.from),
        text(&put.to),
        Value::Integer(put.reason.into()),
        text(&put.cause),
        number(put.term)?,
        number(put.epoch)?,
        text(&put.node),
        Value::Integer(put.at_ms),
    ];
    sink.run(
        "INSERT INTO transition(kind, subject, before, after, reason, cause, term, epoch, node, at_ms) \
         VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        params,
    )?;
    let params = vec![
        text(kind),
        number(TRANSITIONS_MAX)?,
        number(TRANSITIONS_SLICE)?,
        number(TRANSITIONS_EVERY)?,
    ];
    sink.run(FORGET_TRANSITIONS, params)
}

/// Deletes nothing but when the row that was just inserted has a round number.
const FORGET_TRANSITIONS: &str = "DELETE FROM transition WHERE id IN (SELECT id FROM transition WHERE kind = ?1 AND id <= \
    (SELECT id FROM transition WHERE kind = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2) \
    ORDER BY id LIMIT CASE WHEN last_insert_rowid() % ?4 = 0 THEN ?3 ELSE 0 END)";
