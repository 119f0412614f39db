//! What clients were told, against the journals: keys, ends, order.

use std::collections::{BTreeMap, BTreeSet};

use proto::v1::HistoryEntry;
use serde_json::Value;

use super::{End, Fault, History, is_model_call};

pub(super) fn check(history: &History) -> BTreeSet<Fault> {
    let journals = Journals::read(history);
    let mut faults = BTreeSet::new();
    faults.extend(two_for_one_key(history, &journals));
    faults.extend(told_otherwise(history, &journals));
    faults.extend(journals.ends.iter().filter_map(|(work, end)| failed(work, end)));
    faults.extend(reordered(history, &journals));
    faults.extend(out_of_turn(history));
    faults
}

/// How a work ended, by the journal.
struct Journaled {
    state: String,
    reason: String,
    bytes: u64,
    calls: u64,
}

#[derive(Default)]
struct Journals<'a> {
    /// By agent and key.
    keys: BTreeMap<(&'a str, String), BTreeSet<String>>,
    /// Where each work was accepted in the journal of its agent.
    accepted: BTreeMap<&'a str, i64>,
    ends: BTreeMap<&'a str, Journaled>,
}

impl<'a> Journals<'a> {
    fn read(history: &'a History) -> Self {
        let mut read = Self::default();
        for (agent, entries) in &history.journals {
            let mut calls: BTreeMap<&str, u64> = BTreeMap::new();
            for entry in entries {
                let content: Value = serde_json::from_str(&entry.content).unwrap_or_default();
                match entry.kind.as_str() {
                    "accepted" => read.accept(agent, entry, &content),
                    _ if is_model_call(entry) => *calls.entry(&entry.work).or_default() += 1,
                    "ended" => {
                        let text = |name: &str| content[name].as_str().unwrap_or("").to_owned();
                        let end = Journaled {
                            state: text("state"),
                            reason: text("reason"),
                            bytes: content["resultBytes"].as_u64().unwrap_or_default(),
                            calls: calls.get(entry.work.as_str()).copied().unwrap_or_default(),
                        };
                        read.ends.entry(&entry.work).or_insert(end);
                    }
                    _ => {}
                }
            }
        }
        read
    }

    fn accept(&mut self, agent: &'a str, entry: &'a HistoryEntry, content: &Value) {
        let key = content["idempotencyKey"].as_str().unwrap_or_default().to_owned();
        self.keys.entry((agent, key)).or_default().insert(entry.work.clone());
        self.accepted.entry(&entry.work).or_insert(entry.seq);
    }
}

fn two_for_one_key(history: &History, journals: &Journals<'_>) -> Vec<Fault> {
    let mut keys = journals.keys.clone();
    for told in &history.told {
        keys.entry((&told.agent, told.key.clone())).or_default().insert(told.work.clone());
    }
    let twice = keys.into_iter().filter(|(_, works)| 1 < works.len());
    let fault = |((agent, key), works): ((&str, String), _)| Fault::TwoForOneKey {
        agent: agent.to_owned(),
        key,
        works,
    };
    twice.map(fault).collect()
}

fn told_otherwise(history: &History, journals: &Journals<'_>) -> Vec<Fault> {
    let ends = history.told.iter().filter_map(|told| Some((told, told.end.as_ref()?)));
    let wrong = ends.filter_map(|(told, end)| {
        let journaled = journals.ends.get(told.work.as_str())?;
        let (told_end, journaled) = (show(end), show_journaled(journaled));
        let work = told.work.clone();
        let fault =
            Fault::ToldOtherwise { work, told: told_end.clone(), journaled: journaled.clone() };
        (told_end != journaled).then_some(fault)
    });
    wrong.collect()
}

fn show(end: &End) -> String {
    let End { state, reason, result, calls } = end;
    format!("{state}, {reason}, {} bytes, {calls} calls", result.len())
}

fn show_journaled(end: &Journaled) -> String {
    let Journaled { state, reason, bytes, calls } = end;
    format!("{state}, {reason}, {bytes} bytes, {calls} calls")
}

fn failed(work: &str, end: &Journaled) -> Option<Fault> {
    let Journaled { state, reason, .. } = end;
    let fault =
        || Fault::Failed { work: work.to_owned(), state: state.clone(), reason: reason.clone() };
    (state != "succeeded").then(fault)
}

/// Compares the order in which a stream submitted works to an agent with that of their acceptance.
fn reordered(history: &History, journals: &Journals<'_>) -> Vec<Fault> {
    let mut placed: BTreeMap<(&str, u64), BTreeMap<u64, &str>> = BTreeMap::new();
    for told in &history.told {
        let Some((stream, number)) = told.place else { continue };
        placed.entry((&told.agent, stream)).or_default().insert(number, &told.work);
    }
    let mut faults = Vec::new();
    for ((agent, _), works) in placed {
        let works: Vec<_> = works.into_values().collect();
        for pair in works.windows(2) {
            let places = [pair[0], pair[1]].map(|work| journals.accepted.get(work));
            if let [Some(first), Some(second)] = places
                && second < first
            {
                let [first, second] = [pair[0], pair[1]].map(str::to_owned);
                faults.push(Fault::Reordered { agent: agent.to_owned(), first, second });
            }
        }
    }
    faults
}

/// Works of an agent begin in the order in which they were accepted.
fn out_of_turn(history: &History) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (agent, entries) in &history.journals {
        let mut waiting: BTreeSet<(i64, &str)> = BTreeSet::new();
        let mut accepted: BTreeMap<&str, i64> = BTreeMap::new();
        for entry in entries.iter().filter(|entry| !entry.work.is_empty()) {
            match entry.kind.as_str() {
                "accepted" => {
                    accepted.entry(&entry.work).or_insert(entry.seq);
                    waiting.insert((entry.seq, &entry.work));
                }
                "cancel_requested" => {}
                _ => {
                    let Some(seq) = accepted.get(entry.work.as_str()) else { continue };
                    let is_new = waiting.remove(&(*seq, entry.work.as_str()));
                    if is_new && waiting.first().is_some_and(|(first, _)| first < seq) {
                        let (agent, work) = (agent.clone(), entry.work.clone());
                        faults.push(Fault::OutOfTurn { agent, work });
                    }
                }
            }
        }
    }
    faults
}
