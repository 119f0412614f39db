//! What the control database does: guarded batches of the leader, and what everybody may read.
//!
//! The SQL of the control database stands here and nowhere else. Never decides who leads: it compares and sets.

use std::collections::BTreeMap;

use libsql::{Row, Value};
use prost::Message;
use proto::link::control_write::Write;
use proto::link::read_control::Read;
use proto::link::{
    CapabilityOffer, ControlAnswer, ControlBatch, LeaderRow, PutAudit, PutDefinition, PutNode,
    PutShard, PutTransition, ReadAudit, ReadControl, ReadDefinitions, ReadTransitions,
    TakeLeadership,
};

use crate::engine::{Sql, blob, blob_at, i64_at, number, text, text_at, u32_at, u64_at};
use crate::shard::passes;
use crate::shard::read::{Page, limit};
use crate::{ControlOutcome, Error};

/// Transitions that are kept of each kind of subject, and rows of the audit.
const TRANSITIONS_MAX: u64 = 10_000;
const AUDIT_MAX: u64 = 100_000;
/// Rows deleted at once, and how often: by the number of the newest row.
const TRANSITIONS_SLICE: u64 = 1_000;
const TRANSITIONS_EVERY: u64 = 64;

pub(crate) fn batch(sql: &mut Sql, batch: &ControlBatch) -> Result<ControlOutcome, Error> {
    let writes = writes(batch)?;
    let mut is_lost = false;
    let result = sql.transaction(|sql| {
        if !batch.leader.is_empty() && !guard(sql, batch)? {
            is_lost = true;
            return Err(Error::invalid("the guard fired"));
        }
        for write in &writes {
            if !apply(sql, write)? {
                is_lost = true;
                return Err(Error::invalid("leadership was taken by another"));
            }
        }
        let has_cluster = writes.iter().any(|write| matches!(write, Write::Cluster(_)));
        let cluster_id = if has_cluster { cluster_id(sql)? } else { String::new() };
        Ok(ControlAnswer { leader: Some(leader(sql)?), cluster_id, ..ControlAnswer::default() })
    });
    if is_lost {
        return leader(sql).map(ControlOutcome::NotLeader);
    }
    result.map(ControlOutcome::Done)
}

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
    let is_step = matches!(writes.as_slice(), [Write::Take(_) | Write::Cluster(_)]);
    let takes = writes.iter().any(|write| matches!(write, Write::Take(_)));
    if batch.leader.is_empty() && !is_step {
        return Err(Error::invalid(
            "a control batch without a leader takes leadership or sets the cluster id",
        ));
    }
    if !batch.leader.is_empty() && takes {
        return Err(Error::invalid("leadership is taken in a batch of its own, without a leader"));
    }
    Ok(writes)
}

fn guard(sql: &mut Sql, batch: &ControlBatch) -> Result<bool, Error> {
    passes(
        sql,
        "INSERT INTO fenced SELECT 'stale' WHERE NOT EXISTS(SELECT 1 FROM leader WHERE name = ?1 AND term = ?2)",
        "fenced",
        vec![text(&batch.leader), number(batch.term)?],
    )
}

/// Answers false if leadership was not as the batch expected it.
fn apply(sql: &mut Sql, write: &Write) -> Result<bool, Error> {
    match write {
        Write::Take(take) => return take_leadership(sql, take),
        Write::Beat(_) => drop(sql.execute("UPDATE leader SET beat = beat + 1", Vec::new())?),
        Write::Release(_) => {
            sql.execute("UPDATE leader SET name = '', beat = beat + 1", Vec::new())?;
        }
        Write::Cluster(put) => {
            if put.cluster_id.is_empty() {
                return Err(Error::invalid("a cluster id is not empty"));
            }
            sql.execute(
                "INSERT OR IGNORE INTO cluster VALUES(1, ?1)",
                vec![text(&put.cluster_id)],
            )?;
        }
        Write::Node(node) => put_node(sql, node)?,
        Write::Definition(definition) => put_definition(sql, definition)?,
        Write::Transition(transition) => put_transition(sql, transition)?,
        Write::Shard(shard) => put_shard(sql, shard)?,
        Write::Audit(audit) => put_audit(sql, audit)?,
    }
    Ok(true)
}

fn take_leadership(sql: &mut Sql, take: &TakeLeadership) -> Result<bool, Error> {
    if take.name.is_empty() {
        return Err(Error::invalid("a leader has a name"));
    }
    let params = vec![text(&take.name), number(take.expected_term)?, number(take.expected_beat)?];
    let changed = sql.execute(
        "UPDATE leader SET name = ?1, term = term + 1, beat = beat + 1 WHERE term = ?2 AND beat = ?3",
        params,
    )?;
    Ok(changed == 1)
}

fn put_node(sql: &mut Sql, node: &PutNode) -> Result<(), Error> {
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
    sql.execute(
        "INSERT OR REPLACE INTO nodes VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, X'', ?8)",
        params,
    )?;
    sql.execute("DELETE FROM capabilities WHERE node = ?1", vec![text(&node.name)])?;
    let name = sql.name().to_owned();
    let offers = node.capabilities.iter().zip(0_u64..).map(|(offer, place)| {
        // In one order, so that equal attributes are equal texts.
        let attributes: BTreeMap<&String, &String> = offer.attributes.iter().collect();
        let attributes = serde_json::to_string(&attributes);
        let attributes = attributes.map_err(|error| Error::internal(&name, error))?;
        Ok(vec![
            text(&node.name),
            number(place)?,
            number(node.incarnation)?,
            text(&offer.name),
            Value::Integer(offer.version.into()),
            Value::Integer(offer.capacity.into()),
            text(&attributes),
        ])
    });
    sql.execute_each("INSERT INTO capabilities VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7)", offers)
}

/// The newest row of a name is its current version, so putting an old version again makes it the current one.
fn put_definition(sql: &mut Sql, definition: &PutDefinition) -> Result<(), Error> {
    let params = vec![
        blob(&definition.hash),
        text(&definition.tenant),
        text(&definition.name),
        blob(&definition.body),
        Value::Integer(definition.create_ms),
    ];
    sql.execute(
        "INSERT OR REPLACE INTO definitions(hash, tenant, name, body, create_ms) VALUES(?1, ?2, ?3, ?4, ?5)",
        params,
    )
    .map(drop)
}

fn put_shard(sql: &mut Sql, shard: &PutShard) -> Result<(), Error> {
    let params = vec![
        Value::Integer(shard.shard.into()),
        Value::Integer(shard.class.into()),
        Value::Integer(shard.slot_first.into()),
        Value::Integer(shard.slot_count.into()),
        text(&shard.store),
        text(&shard.database),
    ];
    sql.execute("INSERT OR REPLACE INTO shards VALUES(?1, ?2, ?3, ?4, ?5, ?6)", params).map(drop)
}

fn put_audit(sql: &mut Sql, put: &PutAudit) -> Result<(), Error> {
    let params = vec![
        Value::Integer(put.at_ms),
        text(&put.actor),
        text(&put.action),
        text(&put.subject),
        number(put.term)?,
    ];
    sql.execute(
        "INSERT INTO audit(at_ms, actor, action, subject, term) VALUES(?1, ?2, ?3, ?4, ?5)",
        params,
    )?;
    sql.execute(
        "DELETE FROM audit WHERE id <= (SELECT max(id) FROM audit) - ?1",
        vec![number(AUDIT_MAX)?],
    )
    .map(drop)
}

/// Newest first.
fn audit(sql: &mut Sql, asked: &ReadAudit) -> Result<Vec<PutAudit>, Error> {
    let mut page = Page::new(asked.limit);
    let mut rows = Vec::new();
    let newest = "SELECT at_ms, actor, action, subject, term FROM audit ORDER BY id DESC";
    sql.each(newest, Vec::new(), |row| {
        let put = PutAudit {
            at_ms: i64_at(row, 0)?,
            actor: text_at(row, 1)?,
            action: text_at(row, 2)?,
            subject: text_at(row, 3)?,
            term: u64_at(row, 4)?,
        };
        Ok(page.take(put.encoded_len(), || rows.push(put)))
    })?;
    Ok(rows)
}

/// The letters before the first other character: of `node/node-1` and `node node-1`, `node`.
fn kind(subject: &str) -> &str {
    let end = subject.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(subject.len());
    &subject[..end]
}

fn put_transition(sql: &mut Sql, put: &PutTransition) -> Result<(), Error> {
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
    sql.execute(
        "INSERT INTO transition(kind, subject, before, after, reason, cause, term, epoch, node, at_ms) \
         VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        params,
    )?;
    let newest = sql.number("SELECT last_insert_rowid()", Vec::new())?;
    if newest % TRANSITIONS_EVERY == 0 {
        sql.execute(
            "DELETE FROM transition WHERE id IN (SELECT id FROM transition WHERE kind = ?1 AND id <= \
             (SELECT id FROM transition WHERE kind = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2) ORDER BY id LIMIT ?3)",
            vec![text(kind), number(TRANSITIONS_MAX)?, number(TRANSITIONS_SLICE)?],
        )?;
    }
    Ok(())
}

/// Every answer carries the leader row; what else, the question says.
pub(crate) fn read(sql: &mut Sql, asked: &ReadControl) -> Result<ControlAnswer, Error> {
    let Some(asked) = &asked.read else {
        return Err(Error::invalid("a read of the control database of an unknown kind"));
    };
    sql.snapshot(|sql| {
        let mut answer = ControlAnswer { leader: Some(leader(sql)?), ..ControlAnswer::default() };
        match asked {
            Read::Leader(_) => {}
            Read::Cluster(_) => answer.cluster_id = cluster_id(sql)?,
            Read::Definitions(asked) => answer.definitions = definitions(sql, asked)?,
            Read::Transitions(asked) => answer.transitions = transitions(sql, asked)?,
            Read::Nodes(_) => answer.nodes = nodes(sql)?,
            Read::Shards(_) => answer.shards = shards(sql)?,
            Read::Audit(asked) => answer.audit = audit(sql, asked)?,
        }
        Ok(answer)
    })
}

fn leader(sql: &mut Sql) -> Result<LeaderRow, Error> {
    let row = sql.row("SELECT name, term, beat FROM leader", Vec::new(), |row| {
        Ok(LeaderRow { name: text_at(row, 0)?, term: u64_at(row, 1)?, beat: u64_at(row, 2)? })
    })?;
    row.ok_or_else(|| Error::Corrupt { what: format!("{}: its leader row", sql.name()) })
}

/// Empty until it is set.
fn cluster_id(sql: &mut Sql) -> Result<String, Error> {
    let id = sql.row("SELECT cluster_id FROM cluster", Vec::new(), |row| text_at(row, 0))?;
    Ok(id.unwrap_or_default())
}

/// By hash; or all versions of a name, newest first; or the current version of every name of a tenant, by name.
fn definitions(sql: &mut Sql, asked: &ReadDefinitions) -> Result<Vec<PutDefinition>, Error> {
    let mut page = Page::new(asked.limit);
    let mut definitions = Vec::new();
    let take = |row: &Row| {
        let definition = PutDefinition {
            hash: blob_at(row, 0)?,
            tenant: text_at(row, 1)?,
            name: text_at(row, 2)?,
            body: blob_at(row, 3)?,
            create_ms: i64_at(row, 4)?,
        };
        Ok(page.take(definition.encoded_len(), || definitions.push(definition)))
    };
    if !asked.hash.is_empty() {
        let by_hash = "SELECT hash, tenant, name, body, create_ms FROM definitions \
                       WHERE hash = ?1 AND (?2 = '' OR tenant = ?2) ORDER BY id DESC";
        sql.each(by_hash, vec![blob(&asked.hash), text(&asked.tenant)], take)?;
    } else if !asked.name.is_empty() {
        let versions = "SELECT hash, tenant, name, body, create_ms FROM definitions \
                        WHERE tenant = ?1 AND name = ?2 ORDER BY id DESC";
        sql.each(versions, vec![text(&asked.tenant), text(&asked.name)], take)?;
    } else {
        let current = "SELECT hash, tenant, name, body, create_ms FROM definitions \
                       WHERE id IN (SELECT max(id) FROM definitions WHERE tenant = ?1 AND name > ?2 GROUP BY name) \
                       ORDER BY name";
        sql.each(current, vec![text(&asked.tenant), text(&asked.after_name)], take)?;
    }
    Ok(definitions)
}

/// Newest first; of everything, if no subject is named.
fn transitions(sql: &mut Sql, asked: &ReadTransitions) -> Result<Vec<PutTransition>, Error> {
    let limit = number(limit(asked.limit) as u64)?;
    let read = |row: &Row| {
        Ok(PutTransition {
            subject: text_at(row, 0)?,
            from: text_at(row, 1)?,
            to: text_at(row, 2)?,
            reason: u32_at(row, 3)?,
            cause: text_at(row, 4)?,
            epoch: u64_at(row, 5)?,
            node: text_at(row, 6)?,
            at_ms: i64_at(row, 7)?,
            term: u64_at(row, 8)?,
        })
    };
    if asked.subject.is_empty() {
        let all = "SELECT subject, before, after, reason, cause, epoch, node, at_ms, term FROM transition \
                   ORDER BY id DESC LIMIT ?1";
        return sql.rows(all, vec![limit], read);
    }
    let of_subject = "SELECT subject, before, after, reason, cause, epoch, node, at_ms, term FROM transition \
                      WHERE subject = ?1 ORDER BY id DESC LIMIT ?2";
    sql.rows(of_subject, vec![text(&asked.subject), limit], read)
}

fn nodes(sql: &mut Sql) -> Result<Vec<PutNode>, Error> {
    let mut nodes = sql.rows(
        "SELECT name, incarnation, state, reason, zone, address, capacity, admission FROM nodes ORDER BY name",
        Vec::new(),
        |row| {
            Ok(PutNode {
                name: text_at(row, 0)?,
                incarnation: u64_at(row, 1)?,
                state: text_at(row, 2)?,
                reason: u32_at(row, 3)?,
                zone: text_at(row, 4)?,
                address: text_at(row, 5)?,
                capacity: u32_at(row, 6)?,
                admission: text_at(row, 7)?,
                capabilities: Vec::new(),
            })
        },
    )?;
    let mut offers = capabilities(sql)?;
    for node in &mut nodes {
        node.capabilities = offers.remove(&node.name).unwrap_or_default();
    }
    Ok(nodes)
}

/// What each process announced, in its order.
fn capabilities(sql: &mut Sql) -> Result<BTreeMap<String, Vec<CapabilityOffer>>, Error> {
    let name = sql.name().to_owned();
    let rows = sql.rows(
        "SELECT node, name, version, capacity, attributes FROM capabilities ORDER BY node, number",
        Vec::new(),
        |row| {
            let offer = CapabilityOffer {
                name: text_at(row, 1)?,
                version: u32_at(row, 2)?,
                capacity: u32_at(row, 3)?,
                ..CapabilityOffer::default()
            };
            Ok((text_at(row, 0)?, offer, text_at(row, 4)?))
        },
    )?;
    let mut offers: BTreeMap<String, Vec<CapabilityOffer>> = BTreeMap::new();
    for (node, offer, attributes) in rows {
        let attributes = serde_json::from_str(&attributes).map_err(|_| Error::Corrupt {
            what: format!("{name}: capability {} of {node}", offer.name),
        })?;
        offers.entry(node).or_default().push(CapabilityOffer { attributes, ..offer });
    }
    Ok(offers)
}

fn shards(sql: &mut Sql) -> Result<Vec<PutShard>, Error> {
    sql.rows(
        "SELECT shard, class, slot_first, slot_count, store, location FROM shards ORDER BY shard",
        Vec::new(),
        |row| {
            Ok(PutShard {
                shard: u32_at(row, 0)?,
                class: u32_at(row, 1)?,
                slot_first: u32_at(row, 2)?,
                slot_count: u32_at(row, 3)?,
                store: text_at(row, 4)?,
                database: text_at(row, 5)?,
            })
        },
    )
}
