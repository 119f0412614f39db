//! Puts a whole history together, after a run, from what the API tells.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::v1::HistoryEntry;

use super::clients::Heard;
use super::history::{Counters, History, Owner};
use super::{Mesh, eventually};

/// Of one agent.
const READ_MAX: Duration = Duration::from_secs(30);

impl Mesh {
    /// The history of everything that these clients were told of, as it stands now. What processes count is taken for
    /// whole if `counts` says so: no node was started again.
    ///
    /// # Panics
    /// The cluster does not tell.
    pub fn record(&self, heard: &Heard, counts: bool) -> History {
        let agents: BTreeSet<_> = heard.told.iter().map(|told| told.agent.clone()).collect();
        let journals = agents.into_iter().map(|agent| {
            let entries = self.journal(&agent);
            (agent, entries)
        });
        History {
            shards: u16::try_from(self.options().shards).expect("a few"),
            told: heard.told.clone(),
            journals: journals.collect::<BTreeMap<_, _>>(),
            owners: self.owners(),
            counters: self.counters(counts),
            calls: BTreeMap::new(),
        }
    }

    /// The entries of an agent, oldest first.
    ///
    /// # Panics
    /// They cannot be read.
    pub fn journal(&self, agent: &str) -> Vec<HistoryEntry> {
        let client = self.client();
        let mut entries = eventually(READ_MAX, &format!("the journal of {agent} is read"), || {
            self.block_on(async {
                let mut entries = Vec::new();
                let mut read = client.history(agent, 0);
                while let Some(entry) = read.next().await {
                    entries.push(entry?);
                }
                Ok::<_, client::Error>(entries)
            })
        });
        entries.reverse();
        entries
    }

    /// Who owned which shard under which epoch.
    ///
    /// # Panics
    /// The cluster does not tell.
    pub fn owners(&self) -> BTreeSet<Owner> {
        let mut owners = BTreeSet::new();
        for shard in 0..u32::try_from(self.options().shards).expect("a few") {
            let told = self.why("shard", &shard.to_string());
            let owned = told.into_iter().filter(|one| one.epoch != 0 && !one.node.is_empty());
            let owned = owned.filter(|one| matches!(one.to.as_str(), "granted" | "open"));
            owners.extend(owned.map(|one| Owner { shard, epoch: one.epoch, node: one.node }));
        }
        owners
    }

    /// How often the models of all nodes were asked, as far as they have not been started again.
    pub fn model_calls(&self) -> u64 {
        self.sum("stagedoor_model_calls_total")
    }

    fn sum(&self, name: &str) -> u64 {
        let nodes = self.nodes().into_iter();
        nodes.map(|node| self.count(&node, name, &[])).sum::<f64>() as u64
    }

    fn counters(&self, counts: bool) -> Counters {
        let sum = |name: &str| self.sum(name);
        let whole = |name: &str| counts.then(|| sum(name));
        Counters {
            model_calls: whole("stagedoor_model_calls_total"),
            rows: whole("stagedoor_store_writer_rows_total"),
            steps_early: sum("stagedoor_agent_steps_early_total"),
        }
    }

    /// Waits until the cluster is whole again, then records what came of it and finds nothing wrong.
    ///
    /// # Panics
    /// Something is.
    pub fn assert_sound(&self, heard: &Heard, counts: bool) -> History {
        assert!(!heard.told.is_empty(), "nothing was acknowledged");
        self.wait_until_ready();
        let history = self.record(heard, counts);
        let mut faults = history.check();
        faults.extend(history.more_calls_than_attempts());
        let unheard = heard.told.iter().filter(|told| told.end.is_none()).count();
        assert!(faults.is_empty() && unheard == 0, "{unheard} ends were not heard; {faults:#?}");
        history
    }
}
