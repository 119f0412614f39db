//! Recorded histories: lines of JSON, the first of which says what is wrong with the rest.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context;
use proto::v1::HistoryEntry;
use serde::{Deserialize, Serialize};

use super::{Counters, History, Owner, Told};

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Title {
    /// How the rest came about, for people.
    pub about: String,
    /// What has to be found in it, as it is printed.
    pub planted: BTreeSet<String>,
    pub shards: u16,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Told(Told),
    Entry { agent: String, entry: HistoryEntry },
    Owner(Owner),
    Counters(Counters),
    Call { key: String, calls: u64 },
}

impl History {
    /// Reads a recorded history, and what is said to be wrong with it.
    ///
    /// # Errors
    /// It cannot be read, or a line is no line of a history.
    pub fn read(path: &Path) -> anyhow::Result<(Title, Self)> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let mut lines = text.lines();
        let title: Title = serde_json::from_str(lines.next().context("it is empty")?)?;
        let mut history = Self { shards: title.shards, ..Self::default() };
        for (line, number) in lines.zip(2..) {
            let line = serde_json::from_str(line).with_context(|| format!("line {number}"))?;
            match line {
                Line::Told(told) => history.told.push(told),
                Line::Entry { agent, entry } => {
                    history.journals.entry(agent).or_default().push(entry);
                }
                Line::Owner(owner) => _ = history.owners.insert(owner),
                Line::Counters(counters) => history.counters = counters,
                Line::Call { key, calls } => _ = history.calls.insert(key, calls),
            }
        }
        Ok((title, history))
    }

    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path, about: &str) -> anyhow::Result<()> {
        let planted = self.check().iter().map(ToString::to_string).collect();
        let title = Title { about: about.to_owned(), planted, shards: self.shards };
        let mut lines = vec![serde_json::to_string(&title)?];
        let told = self.told.iter().cloned().map(Line::Told);
        let entries = self.journals.iter().flat_map(|(agent, entries)| {
            let line =
                |entry: &HistoryEntry| Line::Entry { agent: agent.clone(), entry: entry.clone() };
            entries.iter().map(line).collect::<Vec<_>>()
        });
        let owners = self.owners.iter().cloned().map(Line::Owner);
        let counters = std::iter::once(Line::Counters(self.counters.clone()));
        let call = |(key, calls): (&String, &u64)| Line::Call { key: key.clone(), calls: *calls };
        let calls = self.calls.iter().map(call);
        for line in told.chain(entries).chain(owners).chain(counters).chain(calls) {
            lines.push(serde_json::to_string(&line)?);
        }
        std::fs::write(path, lines.join("\n") + "\n").with_context(|| path.display().to_string())
    }
}
