//! What a run came to, for people.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use proto::v1::HistoryEntry;

use super::Options;
use crate::harness::Heard;
use crate::harness::history::{Fault, Told};

/// Of one kind of fault and of the entries behind each.
const SHOWN_MAX: usize = 10;

#[derive(Clone, Debug)]
pub struct Report {
    pub options: Options,
    pub took: Duration,
    /// How often each fault happened.
    pub happened: BTreeMap<String, u64>,
    /// Whether everything did that no run may be without.
    pub had_all: bool,
    /// Processes that ended without being told to.
    pub exits: Vec<String>,
    pub timeline: Vec<String>,
    pub heard: Heard,
    /// Acknowledged works whose end was not heard.
    pub unheard: Vec<Told>,
    /// What was missing long after the last fault.
    pub broken: Option<String>,
    /// Of the tool that must not be called twice.
    pub calls: usize,
    /// What is wrong.
    pub faults: BTreeSet<Fault>,
    pub entries: BTreeMap<String, Vec<HistoryEntry>>,
}

impl Report {
    pub fn is_sound(&self) -> bool {
        self.violations() == 0
    }

    fn violations(&self) -> usize {
        let broken = usize::from(self.broken.is_some());
        // A run in which nothing was acknowledged has shown nothing.
        let idle = usize::from(self.heard.told.is_empty());
        self.faults.len() + self.unheard.len() + self.exits.len() + broken + idle
    }

    fn show_violations(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "timeline:")?;
        self.timeline.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        if let Some(missing) = &self.broken {
            writeln!(f, "violation: the cluster did not become whole: {missing}")?;
        }
        for exit in self.exits.iter().take(SHOWN_MAX) {
            writeln!(f, "violation: a process ended by itself: {exit}")?;
        }
        for fault in self.faults.iter().take(SHOWN_MAX) {
            writeln!(f, "violation: {fault}")?;
            for (agent, entry) in self.behind(&fault.to_string()) {
                writeln!(f, "  {agent} {entry:?}")?;
            }
        }
        for told in self.unheard.iter().take(SHOWN_MAX) {
            writeln!(f, "violation: the end of {told:?} was never heard")?;
            for (agent, entry) in self.behind(&format!("{:?}", told.work)) {
                writeln!(f, "  {agent} {entry:?}")?;
            }
        }
        Ok(())
    }

    /// The entries of the works that a text names.
    fn behind(&self, text: &str) -> Vec<(&String, &HistoryEntry)> {
        let all = self
            .entries
            .iter()
            .flat_map(|(agent, entries)| entries.iter().map(move |entry| (agent, entry)));
        let named = all.filter(|(_, entry)| {
            !entry.work.is_empty() && text.contains(&format!("{:?}", entry.work))
        });
        named.take(SHOWN_MAX * 2).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Options { seed, seconds, controls, nodes, clients, agents, .. } = &self.options;
        writeln!(
            f,
            "seed {seed}, {seconds} s of faults, {controls} control, {nodes} nodes, {clients} clients, {agents} agents; \
             all took {:.1} s",
            self.took.as_secs_f64()
        )?;
        let happened: u64 = self.happened.values().sum();
        writeln!(f, "faults: {happened}")?;
        self.happened.iter().try_for_each(|(name, count)| writeln!(f, "  {count:4} {name}"))?;
        let acknowledged = self.heard.told.len();
        writeln!(f, "works acknowledged: {acknowledged}, ends not heard: {}", self.unheard.len())?;
        writeln!(f, "calls that must not be made twice: {}", self.calls)?;
        latency(f, "from submit to acknowledgement", &self.heard.accepted_after)?;
        latency(f, "from submit to end", &self.heard.ended_after)?;
        writeln!(f, "errors seen by clients:")?;
        self.heard.errors.iter().try_for_each(|(what, count)| writeln!(f, "  {count:4} {what}"))?;
        writeln!(f, "processes that ended by themselves: {:?}", self.exits)?;
        if self.is_sound() {
            return writeln!(f, "verdict: sound");
        }
        self.show_violations(f)?;
        writeln!(f, "verdict: {} violations with seed {seed}", self.violations())
    }
}

fn latency(f: &mut fmt::Formatter<'_>, what: &str, all: &[Duration]) -> fmt::Result {
    let mut sorted = all.to_vec();
    sorted.sort_unstable();
    let part =
        |share: usize| sorted.get((sorted.len() * share / 1_000).min(sorted.len().max(1) - 1));
    let shown = [500, 900, 990, 1_000].map(|share| part(share).copied().unwrap_or_default());
    writeln!(
        f,
        "{what}: p50 {:.1?}, p90 {:.1?}, p99 {:.1?}, most {:.1?}",
        shown[0], shown[1], shown[2], shown[3]
    )
}
