//! What the journal of each agent must be by itself, and that it has what was acknowledged.

use std::collections::{BTreeMap, BTreeSet};

use proto::v1::HistoryEntry;
use serde_json::Value;

use super::Fault;

/// The phases of one cycle, in order.
const PHASES: [&str; 6] =
    ["action", "experience", "intention", "observation", "understanding", "yield"];

/// Everything that is wrong. `acknowledged`: the ids of works that clients were told are accepted; `journals`: of each
/// agent its entries, oldest first.
pub fn check(
    acknowledged: &BTreeSet<String>,
    journals: &BTreeMap<String, Vec<HistoryEntry>>,
) -> BTreeSet<Fault> {
    let mut faults = BTreeSet::new();
    let mut accepted = BTreeSet::new();
    for (agent, entries) in journals {
        check_order(agent, entries, &mut faults);
        let mut works: BTreeMap<&str, Told> = BTreeMap::new();
        let mut open: Option<&str> = None;
        for entry in entries.iter().filter(|entry| !entry.work.is_empty()) {
            let is_step = !matches!(entry.kind.as_str(), "accepted" | "cancel_requested");
            if is_step && open.is_some_and(|open| open != entry.work) {
                faults.insert(Fault::Interleaved { agent: agent.clone(), seq: entry.seq });
            }
            let told = works.entry(entry.work.as_str()).or_default();
            told.hear(entry, &mut faults);
            open = match (is_step, told.ended) {
                (true, false) => Some(entry.work.as_str()),
                (true, true) => None,
                (false, _) => open,
            };
        }
        for (work, told) in works {
            told.finish(work, &mut faults);
            accepted.insert(work.to_owned());
        }
    }
    let lost = acknowledged.difference(&accepted).cloned();
    faults.extend(lost.map(|work| Fault::Lost { work }));
    faults
}

fn check_order(agent: &str, entries: &[HistoryEntry], faults: &mut BTreeSet<Fault>) {
    for pair in entries.windows(2) {
        if pair[1].seq != pair[0].seq + 1 {
            faults.insert(Fault::Gap { agent: agent.to_owned(), after: pair[0].seq });
        }
        if pair[1].epoch < pair[0].epoch {
            faults.insert(Fault::OldEpoch { agent: agent.to_owned(), seq: pair[1].seq });
        }
    }
}

/// What a journal has told of one work so far.
#[derive(Default)]
struct Told {
    accepted: bool,
    ended: bool,
    succeeded: bool,
    /// Cycle and name, in their order.
    phases: Vec<(u64, String)>,
    /// Of a loop: round and index of a tool, in their order; none is the model.
    calls: Vec<(u64, Option<u64>)>,
}

impl Told {
    fn hear(&mut self, entry: &HistoryEntry, faults: &mut BTreeSet<Fault>) {
        let work = || entry.work.clone();
        let content: Value = serde_json::from_str(&entry.content).unwrap_or_default();
        if self.ended {
            faults.insert(Fault::AfterTheEnd { work: work(), kind: entry.kind.clone() });
        }
        if entry.kind != "accepted" && !self.accepted {
            faults.insert(Fault::Unknown { work: work() });
        }
        match entry.kind.as_str() {
            "accepted" if self.accepted => {
                faults.insert(Fault::AcceptedTwice { work: work() });
            }
            "accepted" => self.accepted = true,
            "phase_done" => {
                let cycle = content["cycle"].as_u64().unwrap_or_default();
                let phase = content["phase"].as_str().unwrap_or_default().to_owned();
                let step = (cycle, phase.clone());
                if self.phases.contains(&step) {
                    faults.insert(Fault::Repeated { work: work(), phase });
                } else {
                    self.phases.push(step);
                }
            }
            kind @ ("model_done" | "tool_done") => {
                let call =
                    (content["round"].as_u64().unwrap_or_default(), content["index"].as_u64());
                if self.calls.contains(&call) {
                    faults.insert(Fault::Repeated { work: work(), phase: kind.to_owned() });
                } else {
                    self.calls.push(call);
                }
            }
            "ended" => {
                self.ended = true;
                self.succeeded = content["state"] == "succeeded";
            }
            _ => {}
        }
    }

    fn finish(self, work: &str, faults: &mut BTreeSet<Fault>) {
        let work = || work.to_owned();
        if !self.ended {
            faults.insert(Fault::Unfinished { work: work() });
        }
        let last = self.phases.last().map_or(0, |(cycle, _)| *cycle);
        let names = self.phases.iter().filter(|(cycle, _)| *cycle == last);
        let names: Vec<_> = names.map(|(_, name)| name.clone()).collect();
        if self.succeeded && self.phases.is_empty() && !self.calls.is_empty() {
            return self.finish_loop(work(), faults);
        }
        if self.succeeded && names != PHASES {
            faults.insert(Fault::Incomplete { work: work(), phases: names });
        }
    }
}

impl Told {
    /// A loop ends with an answer of its model, and each round before it has one.
    fn finish_loop(&self, work: String, faults: &mut BTreeSet<Fault>) {
        let rounds: Vec<u64> =
            self.calls.iter().filter(|(_, tool)| tool.is_none()).map(|(round, _)| *round).collect();
        let is_whole = rounds.iter().zip(rounds.iter().skip(1)).all(|(one, next)| one + 1 == *next);
        let is_answered = self.calls.last().is_some_and(|(_, tool)| tool.is_none());
        if !is_whole || !is_answered {
            let phases = self.calls.iter().map(|call| format!("{call:?}")).collect();
            faults.insert(Fault::Incomplete { work, phases });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: i64, kind: &str, work: &str, content: &str) -> HistoryEntry {
        HistoryEntry {
            seq,
            epoch: 1,
            kind: kind.to_owned(),
            work: work.to_owned(),
            content: content.to_owned(),
            ..HistoryEntry::default()
        }
    }

    /// Two works of one agent, as they must be.
    fn sound() -> Vec<HistoryEntry> {
        let mut entries =
            vec![entry(1, "accepted", "w-1", "{}"), entry(2, "accepted", "w-2", "{}")];
        for work in ["w-1", "w-2"] {
            for phase in PHASES {
                let content = format!("{{\"cycle\":0,\"phase\":\"{phase}\"}}");
                entries.push(entry(0, "phase_done", work, &content));
            }
            entries.push(entry(0, "ended", work, "{\"state\":\"succeeded\"}"));
        }
        renumber(&mut entries);
        entries
    }

    fn renumber(entries: &mut [HistoryEntry]) {
        for (entry, seq) in entries.iter_mut().zip(1..) {
            entry.seq = seq;
        }
    }

    /// The faults that are found after `plant` has changed a sound history.
    fn found(plant: impl Fn(&mut Vec<HistoryEntry>)) -> Vec<Fault> {
        let mut entries = sound();
        plant(&mut entries);
        let acknowledged = ["w-1", "w-2"].map(str::to_owned).into_iter().collect();
        let journals = BTreeMap::from([("a".to_owned(), entries)]);
        check(&acknowledged, &journals).into_iter().collect()
    }

    #[test]
    fn a_sound_history_has_no_fault() {
        assert_eq!(found(|_| ()), []);
    }

    #[test]
    fn each_planted_fault_is_found_and_nothing_else() {
        let (agent, first, second) = (|| "a".to_owned(), || "w-1".to_owned(), || "w-2".to_owned());
        let lost = found(|entries| {
            entries.retain(|entry| entry.work != "w-2");
            renumber(entries);
        });
        assert_eq!(lost, [Fault::Lost { work: second() }]);
        let unfinished = found(|entries| entries.truncate(15));
        assert_eq!(unfinished, [Fault::Unfinished { work: second() }]);
        let unknown = found(|entries| {
            entries.remove(1);
            renumber(entries);
        });
        assert_eq!(unknown, [Fault::Unknown { work: second() }]);
        let twice = found(|entries| {
            entries.insert(2, entry(0, "accepted", "w-1", "{}"));
            renumber(entries);
        });
        assert_eq!(twice, [Fault::AcceptedTwice { work: first() }]);
        let after = found(|entries| {
            entries.insert(9, entry(0, "cancel_requested", "w-1", "{}"));
            renumber(entries);
        });
        let kind = "cancel_requested".to_owned();
        assert_eq!(after, [Fault::AfterTheEnd { work: first(), kind }]);
        let gap = found(|entries| entries[15].seq = 17);
        assert_eq!(gap, [Fault::Gap { agent: agent(), after: 15 }]);
        let old = found(|entries| {
            entries[..15].iter_mut().for_each(|entry| entry.epoch = 2);
        });
        assert_eq!(old, [Fault::OldEpoch { agent: agent(), seq: 16 }]);
    }

    #[test]
    fn a_phase_that_is_run_again_missing_or_out_of_place_is_found() {
        let work = || "w-1".to_owned();
        let repeated = found(|entries| {
            let again = entries[3].clone();
            entries.insert(4, again);
            renumber(entries);
        });
        assert!(
            repeated.contains(&Fault::Repeated { work: work(), phase: "experience".to_owned() })
        );
        let missing = found(|entries| {
            entries.remove(4);
            renumber(entries);
        });
        let phases = ["action", "experience", "observation", "understanding", "yield"];
        let phases = phases.map(str::to_owned).to_vec();
        assert_eq!(missing, [Fault::Incomplete { work: work(), phases }]);
        let swapped = found(|entries| {
            entries.swap(3, 4);
            renumber(entries);
        });
        assert!(matches!(&swapped[..], [Fault::Incomplete { .. }]), "{swapped:?}");
        let interleaved = found(|entries| {
            entries.swap(8, 9);
            renumber(entries);
        });
        assert!(interleaved.contains(&Fault::Interleaved { agent: "a".to_owned(), seq: 9 }));
    }
}
