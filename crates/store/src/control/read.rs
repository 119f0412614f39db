//! What is read from the control database.

use std::collections::BTreeMap;

use proto::link::read_control::Read;
use proto::link::{
    CapabilityOffer, ControlAnswer, LeaderRow, PutAudit, PutDefinition, PutNode, PutShard,
    PutTransition, ReadControl, ReadDefinitions, ReadTransitions,
};

use crate::Error;
use crate::shard::read::{limit, page};
use crate::statement::{Found, Malformed, Page, Query, Row, Statement, blob, text};

/// Every answer carries the leader row; what else, the question says.
impl Query for ReadControl {
    type Answer = ControlAnswer;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        let mut statements = vec![Statement::new(LEADER, Vec::new())];
        let asked = self.read.as_ref();
        let asked = asked
            .ok_or_else(|| Error::invalid("a read of the control database of an unknown kind"))?;
        match asked {
            Read::Leader(_) => {}
            Read::Cluster(_) => statements.push(Statement::new(CLUSTER, Vec::new())),
            Read::Definitions(asked) => statements.push(definitions(asked)),
            Read::Transitions(asked) => statements.push(transitions(asked)),
            Read::Nodes(_) => {
                statements.push(Statement::new(NODES, Vec::new()));
                statements.push(Statement::new(CAPABILITIES, Vec::new()));
            }
            Read::Audit(asked) => {
                statements.push(Statement::page(AUDIT, Vec::new(), page(asked.limit)))
            }
            Read::Shards(_) => statements.push(Statement::new(SHARDS, Vec::new())),
        }
        Ok(statements)
    }

    fn answer(&self, found: &mut Found) -> Result<ControlAnswer, Error> {
        let mut answer = ControlAnswer { leader: Some(leader(found)?), ..ControlAnswer::default() };
        match &self.read {
            None | Some(Read::Leader(_)) => {}
            Some(Read::Cluster(_)) => {
                answer = ControlAnswer { leader: answer.leader, ..cluster(found)? };
            }
            Some(Read::Definitions(_)) => answer.definitions = found.rows(definition)?,
            Some(Read::Transitions(_)) => answer.transitions = found.rows(transition)?,
            Some(Read::Nodes(_)) => answer.nodes = nodes(found)?,
            Some(Read::Shards(_)) => answer.shards = found.rows(shard)?,
            Some(Read::Audit(_)) => answer.audit = found.rows(audit)?,
        }
        Ok(answer)
    }
}

/// The leader row alone.
pub(crate) struct LeaderOnly;

impl Query for LeaderOnly {
    type Answer = LeaderRow;

    fn statements(&self) -> Result<Vec<Statement>, Error> {
        Ok(vec![Statement::new(LEADER, Vec::new())])
    }

    fn answer(&self, found: &mut Found) -> Result<LeaderRow, Error> {
        leader(found)
    }
}

pub(crate) const LEADER: &str = "SELECT name, term, beat FROM leader";

pub(crate) fn leader(found: &mut Found) -> Result<LeaderRow, Error> {
    let row =
        found.row(|row| Ok(LeaderRow { name: row.text()?, term: row.u64()?, beat: row.u64()? }))?;
    row.ok_or_else(|| found.corrupt("its leader row"))
}

pub(crate) const CLUSTER: &str = "SELECT cluster_id, authorities FROM cluster";

/// Its id and authorities; empty until they are set.
pub(crate) fn cluster(found: &mut Found) -> Result<ControlAnswer, Error> {
    let row = found.row(|row| Ok((row.text()?, row.text()?)))?;
    let (cluster_id, authorities) = row.unwrap_or_default();
    let authorities = authorities.lines().map(str::to_owned).collect();
    Ok(ControlAnswer { cluster_id, authorities, ..ControlAnswer::default() })
}

/// By hash; or all versions of a name, newest first; or the current version of every name of a tenant, by name.
fn definitions(asked: &ReadDefinitions) -> Statement {
    let page = page(asked.limit);
    if !asked.hash.is_empty() {
        let by_hash = "SELECT hash, tenant, name, body, create_ms FROM definitions \
                       WHERE hash = ?1 AND (?2 = '' OR tenant = ?2) ORDER BY id DESC LIMIT ?3";
        return Statement::page(by_hash, vec![blob(&asked.hash), text(&asked.tenant)], page);
    }
    if !asked.name.is_empty() {
        let versions = "SELECT hash, tenant, name, body, create_ms FROM definitions \
                        WHERE tenant = ?1 AND name = ?2 ORDER BY id DESC LIMIT ?3";
        return Statement::page(versions, vec![text(&asked.tenant), text(&asked.name)], page);
    }
    let current = "SELECT hash, tenant, name, body, create_ms FROM definitions \
                   WHERE id IN (SELECT max(id) FROM definitions WHERE tenant = ?1 AND name > ?2 GROUP BY name) \
                   ORDER BY name LIMIT ?3";
    Statement::page(current, vec![text(&asked.tenant), text(&asked.after_name)], page)
}

fn definition(row: &mut Row) -> Result<PutDefinition, Malformed> {
    Ok(PutDefinition {
        hash: row.blob()?,
        tenant: row.text()?,
        name: row.text()?,
        body: row.blob()?,
        create_ms: row.i64()?,
    })
}

/// Newest first; of everything, if no subject is named.
fn transitions(asked: &ReadTransitions) -> Statement {
    let page = Page { rows: limit(asked.limit), bytes: usize::MAX };
    if asked.subject.is_empty() {
        let all = "SELECT subject, before, after, reason, cause, epoch, node, at_ms, term FROM transition \
                   ORDER BY id DESC LIMIT ?1";
        return Statement::page(all, Vec::new(), page);
    }
    let of_subject = "SELECT subject, before, after, reason, cause, epoch, node, at_ms, term FROM transition \
                      WHERE subject = ?1 ORDER BY id DESC LIMIT ?2";
    Statement::page(of_subject, vec![text(&asked.subject)], page)
}

fn transition(row: &mut Row) -> Result<PutTransition, Malformed> {
    Ok(PutTransition {
        subject: row.text()?,
        from: row.text()?,
        to: row.text()?,
        reason: row.u32()?,
        cause: row.text()?,
        epoch: row.u64()?,
        node: row.text()?,
        at_ms: row.i64()?,
        term: row.u64()?,
    })
}

const NODES: &str = "SELECT name, incarnation, state, reason, zone, address, capacity, admission FROM nodes ORDER BY name";

/// What each process announced, in its order.
const CAPABILITIES: &str =
    "SELECT node, name, version, capacity, attributes FROM capabilities ORDER BY node, number";

/// The rows of [`NODES`], then those of [`CAPABILITIES`].
fn nodes(found: &mut Found) -> Result<Vec<PutNode>, Error> {
    let mut nodes = found.rows(|row| {
        Ok(PutNode {
            name: row.text()?,
            incarnation: row.u64()?,
            state: row.text()?,
            reason: row.u32()?,
            zone: row.text()?,
            address: row.text()?,
            capacity: row.u32()?,
            admission: row.text()?,
            capabilities: Vec::new(),
        })
    })?;
    let rows = found.rows(|row| {
        let node = row.text()?;
        let (name, version, capacity) = (row.text()?, row.u32()?, row.u32()?);
        let offer = CapabilityOffer { name, version, capacity, ..CapabilityOffer::default() };
        Ok((node, offer, row.text()?))
    })?;
    let mut offers: BTreeMap<String, Vec<CapabilityOffer>> = BTreeMap::new();
    for (node, offer, attributes) in rows {
        let damaged = |_| found.corrupt(&format!("capability {} of {node}", offer.name));
        let attributes = serde_json::from_str(&attributes).map_err(damaged)?;
        offers.entry(node).or_default().push(CapabilityOffer { attributes, ..offer });
    }
    for node in &mut nodes {
        node.capabilities = offers.remove(&node.name).unwrap_or_default();
    }
    Ok(nodes)
}

/// Newest first.
const AUDIT: &str =
    "SELECT at_ms, actor, action, subject, term FROM audit ORDER BY id DESC LIMIT ?1";

fn audit(row: &mut Row) -> Result<PutAudit, Malformed> {
    Ok(PutAudit {
        at_ms: row.i64()?,
        actor: row.text()?,
        action: row.text()?,
        subject: row.text()?,
        term: row.u64()?,
    })
}

const SHARDS: &str = "SELECT shard, class, slot_first, slot_count, store, location, epoch, standing FROM shards ORDER BY shard";

fn shard(row: &mut Row) -> Result<PutShard, Malformed> {
    Ok(PutShard {
        shard: row.u32()?,
        class: row.u32()?,
        slot_first: row.u32()?,
        slot_count: row.u32()?,
        store: row.text()?,
        database: row.text()?,
        epoch: row.u64()?,
        standing: row.text()?,
    })
}
