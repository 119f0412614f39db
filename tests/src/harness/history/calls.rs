//! What was carried out, against the journals: a tool that must not be called twice leaves a line for each call.

use std::collections::{BTreeMap, BTreeSet};

use super::{Fault, History};

pub(super) fn check(history: &History) -> BTreeSet<Fault> {
    let twice = history.calls.iter().filter(|(_, calls)| 1 < **calls);
    let twice = twice.map(|(key, calls)| Fault::CalledTwice { key: key.clone(), calls: *calls });
    let mut made: BTreeMap<&str, u64> = BTreeMap::new();
    for key in history.calls.keys() {
        *made.entry(key.split('/').next().unwrap_or_default()).or_default() += 1;
    }
    let mut done: BTreeMap<&str, u64> = BTreeMap::new();
    for entry in history.journals.values().flatten().filter(|entry| entry.kind == "tool_done") {
        *done.entry(&entry.work).or_default() += 1;
    }
    let ended: BTreeSet<&str> = {
        let ends = history.journals.values().flatten().filter(|entry| entry.kind == "ended");
        ends.map(|entry| entry.work.as_str()).collect()
    };
    let unmade = ended.into_iter().filter_map(|work| {
        let of = |calls: &BTreeMap<&str, u64>| calls.get(work).copied().unwrap_or_default();
        let (made, journaled) = (of(&made), of(&done));
        let work = work.to_owned();
        (made != journaled).then_some(Fault::Uncalled { work, made, journaled })
    });
    twice.chain(unmade).collect()
}

#[cfg(test)]
mod tests {
    use proto::v1::HistoryEntry;

    use super::*;

    fn found(calls: &[(&str, u64)]) -> Vec<Fault> {
        let entry = |(kind, work): (&str, &str)| HistoryEntry {
            kind: kind.to_owned(),
            work: work.to_owned(),
            ..HistoryEntry::default()
        };
        let entries = [
            ("tool_done", "w-1"),
            ("ended", "w-1"),
            ("tool_done", "w-2"),
            ("tool_done", "w-2"),
            ("ended", "w-2"),
            ("ended", "w-3"),
        ];
        let journals = [("a".to_owned(), entries.map(entry).to_vec())].into();
        let calls = calls.iter().map(|(key, calls)| ((*key).to_owned(), *calls)).collect();
        check(&History { journals, calls, ..History::default() }).into_iter().collect()
    }

    #[test]
    fn a_call_that_was_made_twice_or_never_is_found() {
        let sound = [("w-1/0/tool-0", 1), ("w-2/0/tool-0", 1), ("w-2/1/tool-0", 1)];
        assert_eq!(found(&sound), []);
        let mut twice = sound;
        twice[1].1 = 2;
        let key = "w-2/0/tool-0".to_owned();
        assert_eq!(found(&twice), [Fault::CalledTwice { key, calls: 2 }]);
        let work = "w-2".to_owned();
        assert_eq!(found(&sound[..2]), [Fault::Uncalled { work, made: 1, journaled: 2 }]);
        let lost = [&sound[..], &[("w-3/0/tool-0", 1)]].concat();
        let work = "w-3".to_owned();
        assert_eq!(found(&lost), [Fault::Uncalled { work, made: 1, journaled: 0 }]);
    }
}
