//! The logs of shards, put together from the journals of their agents, and who owned them.

use std::collections::{BTreeMap, BTreeSet};

use domain::slot::ShardTable;
use domain::{AgentId, Class};

use super::{Fault, History};

pub(super) fn check(history: &History) -> BTreeSet<Fault> {
    let mut faults = two_owners(history);
    let Ok(table) = ShardTable::single(history.shards) else { return faults };
    let mut logs: BTreeMap<u32, Vec<(i64, i64)>> = BTreeMap::new();
    for (agent, entries) in &history.journals {
        let agent: AgentId = agent.parse().expect("the id of an agent");
        let shard = table.shard_of(Class(0), agent.slot()).expect("there is one class").0;
        logs.entry(shard).or_default().extend(entries.iter().map(|entry| (entry.lsn, entry.epoch)));
    }
    for (shard, mut log) in logs {
        log.sort_unstable();
        for pair in log.windows(2) {
            let ((before, older), (lsn, epoch)) = (pair[0], pair[1]);
            if before == lsn {
                faults.insert(Fault::TwoInOnePlace { shard, lsn });
            }
            if epoch < older {
                faults.insert(Fault::StaleWrite { shard, lsn });
            }
        }
    }
    faults
}

fn two_owners(history: &History) -> BTreeSet<Fault> {
    let mut owners: BTreeMap<(u32, i64), BTreeSet<String>> = BTreeMap::new();
    for owner in &history.owners {
        owners.entry((owner.shard, owner.epoch)).or_default().insert(owner.node.clone());
    }
    let several = owners.into_iter().filter(|(_, nodes)| 1 < nodes.len());
    several.map(|((shard, epoch), nodes)| Fault::TwoOwners { shard, epoch, nodes }).collect()
}
