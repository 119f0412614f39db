//! What clients that wanted every event were told, against the journals: none twice, none missing.

use std::collections::{BTreeMap, BTreeSet};

use super::{Fault, History};

pub(super) fn check(history: &History) -> Vec<Fault> {
    let mut journaled: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
    for entry in history.journals.values().flatten().filter(|entry| entry.kind.ends_with("_done")) {
        journaled.entry(&entry.work).or_default().insert(entry.seq);
    }
    let mut faults = Vec::new();
    for told in &history.told {
        let Some(events) = &told.events else { continue };
        let work = || told.work.clone();
        let backward = events.windows(2).filter(|pair| pair[1].place() <= pair[0].place());
        faults.extend(backward.map(|pair| Fault::ToldAgain { work: work(), seq: pair[1].seq }));
        let none = BTreeSet::new();
        let steps = journaled.get(told.work.as_str()).unwrap_or(&none);
        let heard: BTreeSet<i64> =
            events.iter().filter(|event| event.is_step).map(|event| event.seq).collect();
        let made_up = heard.difference(steps);
        faults.extend(made_up.map(|seq| Fault::MadeUp { work: work(), seq: *seq }));
        if told.end.is_some() {
            let missing = steps.difference(&heard);
            faults.extend(missing.map(|seq| Fault::Untold { work: work(), seq: *seq }));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use proto::v1::HistoryEntry;

    use super::super::{End, Shown, Told};
    use super::*;

    /// What is found when these are told of a work with steps at 2, 3 and 5.
    fn found(events: &[(i64, i64, bool)], has_ended: bool) -> Vec<Fault> {
        let entry = |(seq, kind): (i64, &str)| HistoryEntry {
            seq,
            kind: kind.to_owned(),
            work: "w".to_owned(),
            ..HistoryEntry::default()
        };
        let entries = [
            (1, "accepted"),
            (2, "model_done"),
            (3, "tool_done"),
            (4, "step_began"),
            (5, "phase_done"),
        ];
        let end = End {
            state: "succeeded".to_owned(),
            reason: "completed".to_owned(),
            result: String::new(),
            calls: 2,
        };
        let shown = |(seq, offset, is_step): &(i64, i64, bool)| Shown {
            seq: *seq,
            offset: *offset,
            is_step: *is_step,
        };
        let told = Told {
            work: "w".to_owned(),
            agent: "a".to_owned(),
            key: "k".to_owned(),
            place: None,
            end: has_ended.then_some(end),
            events: Some(events.iter().map(shown).collect()),
        };
        let journals = [("a".to_owned(), entries.map(entry).to_vec())].into();
        check(&History { told: vec![told], journals, ..History::default() })
    }

    const SOUND: [(i64, i64, bool); 6] =
        [(1, 0, false), (1, 1, false), (2, 0, true), (3, 0, true), (5, 0, true), (6, 0, false)];

    fn work() -> String {
        "w".to_owned()
    }

    #[test]
    fn every_event_once_and_in_order_is_sound() {
        assert_eq!(found(&SOUND, true), []);
        assert_eq!(found(&SOUND[..3], false), [], "the rest may still come");
    }

    #[test]
    fn an_event_that_is_told_twice_or_late_or_never_or_of_nothing_is_found() {
        let mut twice = SOUND.to_vec();
        twice.insert(3, (2, 0, true));
        assert_eq!(found(&twice, true), [Fault::ToldAgain { work: work(), seq: 2 }]);
        let mut late = SOUND.to_vec();
        late.swap(2, 3);
        assert_eq!(found(&late, true), [Fault::ToldAgain { work: work(), seq: 2 }]);
        let mut never = SOUND.to_vec();
        never.remove(3);
        assert_eq!(found(&never, true), [Fault::Untold { work: work(), seq: 3 }]);
        let mut more = SOUND.to_vec();
        more.insert(4, (4, 0, true));
        assert_eq!(found(&more, true), [Fault::MadeUp { work: work(), seq: 4 }]);
    }
}
