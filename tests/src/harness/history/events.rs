//! What clients that wanted every event were told, against the journals: none twice, none missing, and of what models say
//! each byte once.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{Fault, History, Said, Told};

pub(super) fn check(history: &History) -> Vec<Fault> {
    let mut journaled: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
    for entry in history.journals.values().flatten().filter(|entry| entry.kind.ends_with("_done")) {
        journaled.entry(&entry.work).or_default().insert(entry.seq);
    }
    let said = said(history);
    let mut faults = Vec::new();
    for told in &history.told {
        faults.extend(said_otherwise(told, said.get(told.work.as_str())));
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

/// By work and entry: all that its models have said by then.
type Spoken<'a> = BTreeMap<&'a str, BTreeMap<i64, String>>;

fn said(history: &History) -> Spoken<'_> {
    let mut said = Spoken::new();
    let steps = history.journals.values().flatten().filter(|entry| entry.kind == "model_done");
    for entry in steps {
        let content: Value = serde_json::from_str(&entry.content).unwrap_or_default();
        let of_work = said.entry(&entry.work).or_default();
        let before = of_work.values().next_back().cloned().unwrap_or_default();
        let text = content["output"]["text"].as_str().unwrap_or_default();
        of_work.insert(entry.seq, before + text);
    }
    said
}

/// With each step, and in the end, a client has exactly the text that is in the journal.
fn said_otherwise(told: &Told, said: Option<&BTreeMap<i64, String>>) -> Option<Fault> {
    let mut text = String::new();
    let fault = |seq| Some(Fault::SaidOtherwise { work: told.work.clone(), seq });
    for event in told.events.as_ref()? {
        if let Some(Said { offset, text: piece }) = &event.said {
            let at = usize::try_from(*offset).unwrap_or(usize::MAX);
            match piece {
                Some(piece) if at == text.len() => text.push_str(piece),
                None if at < text.len() && text.is_char_boundary(at) => text.truncate(at),
                Some(_) | None => return fault(event.seq),
            }
        }
        let journaled = said.and_then(|said| said.get(&event.seq)).filter(|_| event.is_step);
        if journaled.is_some_and(|journaled| *journaled != text) {
            return fault(event.seq);
        }
    }
    let last = said.and_then(|said| said.values().next_back()).map_or("", String::as_str);
    (told.end.is_some() && text != last).then(|| fault(0)).flatten()
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
            ..Shown::default()
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

    /// What is found when a client is told this of a work whose steps at 2 and 4 said `ab` and `cd`: what was said by its
    /// offset, `-` for what is void, and steps as `!`.
    fn found_said(events: &[(i64, i64, &str)]) -> Vec<Fault> {
        let entry = |seq, text: &str| HistoryEntry {
            seq,
            kind: "model_done".to_owned(),
            work: work(),
            content: serde_json::json!({ "output": { "text": text } }).to_string(),
            ..HistoryEntry::default()
        };
        let shown = |(seq, offset, text): &(i64, i64, &str)| Shown {
            seq: *seq,
            is_step: *text == "!",
            said: (*text != "!").then(|| Said {
                offset: *offset,
                text: (*text != "-").then(|| (*text).to_owned()),
            }),
            ..Shown::default()
        };
        let told = Told {
            work: work(),
            agent: "a".to_owned(),
            key: "k".to_owned(),
            place: None,
            end: Some(End {
                state: "succeeded".to_owned(),
                reason: "completed".to_owned(),
                result: "cd".to_owned(),
                calls: 2,
            }),
            events: Some(events.iter().map(shown).collect()),
        };
        let journals = [("a".to_owned(), vec![entry(2, "ab"), entry(4, "cd")])].into();
        let history = History { told: vec![told], journals, ..History::default() };
        let faults = check(&history).into_iter();
        faults.filter(|fault| matches!(fault, Fault::SaidOtherwise { .. })).collect()
    }

    #[test]
    fn what_was_said_is_whole_with_each_step() {
        let whole = [(1, 0, "a"), (1, 1, "b"), (2, 0, "!"), (3, 2, "cd"), (4, 0, "!")];
        assert_eq!(found_said(&whole), []);
        let again =
            [(1, 0, "ab"), (2, 0, "!"), (2, 2, "x"), (3, 2, "-"), (3, 2, "cd"), (4, 0, "!")];
        assert_eq!(found_said(&again), []);
    }

    #[test]
    fn what_was_said_twice_or_not_or_not_taken_back_is_found() {
        let otherwise = |seq| [Fault::SaidOtherwise { work: work(), seq }];
        let step = |seq| (seq, 0, "!");
        assert_eq!(found_said(&[(1, 0, "a"), (1, 0, "ab"), step(2)]), otherwise(1), "twice");
        assert_eq!(found_said(&[(1, 1, "b"), step(2)]), otherwise(1), "a gap");
        assert_eq!(found_said(&[(1, 0, "a"), step(2)]), otherwise(2), "missing");
        assert_eq!(found_said(&[(1, 0, "x"), (1, 1, "ab"), step(2)]), otherwise(2), "not void");
        assert_eq!(found_said(&[(1, 0, "ab"), step(2), (3, 3, "-")]), otherwise(3), "of nothing");
        let rest = [(1, 0, "ab"), step(2), (3, 2, "cd"), step(4), (4, 4, "e")];
        assert_eq!(found_said(&rest), otherwise(0), "left over");
    }
}
