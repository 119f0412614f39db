//! From what waits to the rows of one commit.

use std::collections::HashMap;

use domain::heads::Heads;
use domain::writer::{Group, Placed};
use domain::{Epoch, Lsn};
use proto::link::{AgentHead, AgentRow, DedupRow, LogRow, Mark, WorkRow};

use super::Append;

/// What a row costs besides its payload.
const ROW_BYTES: usize = 64;

/// What an append adds to a commit, in bytes.
pub(super) fn bytes(append: &Append) -> usize {
    let rows = append.rows.iter().map(|row| row.payload.len() + ROW_BYTES);
    let agents = append.agents.iter().map(|row| row.state.len() + row.key.len() + 2 * ROW_BYTES);
    let works = append.works.iter().map(|row| row.record.len() + 2 * ROW_BYTES);
    let ends = append.ends.iter().map(|row| row.record.len() + ROW_BYTES);
    let dedups = append.dedups.iter().map(|row| row.key.len() + 2 * ROW_BYTES);
    let definitions = append.definitions.iter().map(|row| row.body.len() + ROW_BYTES);
    rows.chain(agents).chain(works).chain(ends).chain(dedups).chain(definitions).sum()
}

/// The rows of `group`, numbered; each agent's entries linked to the ones before them.
pub(super) fn build(
    epoch: Epoch,
    group: &Group<Append>,
    heads: &Heads,
    mark: Option<Mark>,
) -> proto::link::Group {
    let mut built = proto::link::Group {
        epoch: epoch.0,
        head: group.before.0,
        mark,
        ..proto::link::Group::default()
    };
    let mut links = Links { heads, in_group: HashMap::new() };
    for placed in &group.items {
        add(&mut built, placed, &mut links);
    }
    built
}

/// The mark as of `lsn`: what `heads` knows is what is committed up to there.
pub(super) fn mark(lsn: Lsn, heads: &Heads) -> Mark {
    let heads = heads.snapshot().into_iter();
    let heads = heads.map(|(agent, head)| AgentHead { agent, head: head.0 }).collect();
    Mark { lsn: lsn.0, heads }
}

/// The last entry of each agent: within the group, else as committed.
struct Links<'a> {
    heads: &'a Heads,
    in_group: HashMap<u64, Lsn>,
}

impl Links<'_> {
    fn last(&self, agent: u64) -> Option<Lsn> {
        self.in_group.get(&agent).copied().or_else(|| self.heads.get(agent))
    }
}

fn add(built: &mut proto::link::Group, placed: &Placed<Append>, links: &mut Links<'_>) {
    let append = &placed.item;
    let mut prev = links.last(append.agent).unwrap_or(append.prev);
    for (lsn, row) in (placed.first.0..).zip(&append.rows) {
        built.rows.push(LogRow {
            lsn,
            agent: append.agent,
            // The shard's own entries are no history of an agent.
            prev: if append.agent == 0 { 0 } else { prev.0 },
            seq: row.seq,
            work: or(row.work, lsn),
            kind: row.kind,
            ts_ms: row.ts_ms,
            payload: row.payload.clone(),
            epoch: built.epoch,
        });
        prev = Lsn(lsn);
    }
    if append.agent != 0 && !append.rows.is_empty() {
        links.in_group.insert(append.agent, prev);
    }
    let first = placed.first.0;
    let agents = append.agents.iter().map(|row| {
        let own = if row.id == append.agent { Some(prev) } else { links.last(row.id) };
        AgentRow { head: or(row.head, own.unwrap_or_default().0), ..row.clone() }
    });
    built.agents.extend(agents);
    built
        .works
        .extend(append.works.iter().map(|row| WorkRow { id: or(row.id, first), ..row.clone() }));
    built.ends.extend(append.ends.iter().cloned());
    built.dedups.extend(
        append.dedups.iter().map(|row| DedupRow { work: or(row.work, first), ..row.clone() }),
    );
    built.definitions.extend(append.definitions.iter().cloned());
}

fn or(given: u64, other: u64) -> u64 {
    if given == 0 { other } else { given }
}
