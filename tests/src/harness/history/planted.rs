//! Faults that are planted into a recorded history: the files in `tests/histories`, and what has to be found in each.

use std::path::{Path, PathBuf};

use proto::v1::HistoryEntry;
use serde_json::Value;

use super::{Fault, History, Owner};

/// Set, it writes the files anew.
const REWRITE: &str = "REWRITE_HISTORIES";

/// Behind everything else in the log of a shard.
const LATER: i64 = 1_000_000;

/// A name, what is done to the sound history, the edit, and whether a fault is the one that it plants.
type Plant = (&'static str, &'static str, fn(&mut History), fn(&Fault) -> bool);

const PLANTS: [Plant; 10] = [
    (
        "lost",
        "the last work of an agent was taken out of its journal",
        |history| {
            let (agent, work) = last_work(history);
            edit(history, &agent, |entries| entries.retain(|entry| entry.work != work));
        },
        |fault| matches!(fault, Fault::Lost { .. }),
    ),
    (
        "unfinished",
        "the end of the last work of an agent was taken out of its journal",
        |history| {
            let (agent, work) = last_work(history);
            edit(history, &agent, |entries| {
                entries.retain(|entry| entry.work != work || entry.kind != "ended");
            });
            // Its client heard of no end either.
            told(history, &work).end = None;
        },
        |fault| matches!(fault, Fault::Unfinished { .. }),
    ),
    (
        "two-for-one-key",
        "the second work of an agent has the idempotency key of the first",
        |history| {
            let agent = first_agent(history);
            let keys: Vec<_> = keys_of(history, &agent);
            edit(history, &agent, |entries| {
                let second = accepted(entries).nth(1).expect("it has two works");
                second.content = second.content.replace(&keys[1], &keys[0]);
            });
            history.told.iter_mut().filter(|it| it.key == keys[1]).for_each(|it| {
                it.key.clone_from(&keys[0]);
            });
        },
        |fault| matches!(fault, Fault::TwoForOneKey { .. }),
    ),
    (
        "told-otherwise",
        "a client was told another result than the journal has",
        |history| {
            let (_, work) = last_work(history);
            let end = told(history, &work).end.as_mut().expect("it has ended");
            end.result.push_str(" And more.");
        },
        |fault| matches!(fault, Fault::ToldOtherwise { .. }),
    ),
    (
        "reordered",
        "two works that one stream submitted to an agent have changed places in the stream",
        |history| {
            let (first, second) = two_of_one_stream(history);
            let (one, other) = (history.told[first].place, history.told[second].place);
            history.told[first].place = other;
            history.told[second].place = one;
        },
        |fault| matches!(fault, Fault::Reordered { .. }),
    ),
    (
        "two-owners",
        "another node was granted a shard under an epoch that had an owner",
        |history| {
            let owner = history.owners.first().expect("somebody owned something").clone();
            history.owners.insert(Owner { node: "node-9".to_owned(), ..owner });
        },
        |fault| matches!(fault, Fault::TwoOwners { .. }),
    ),
    (
        "stale-write",
        "an entry that is the first of its agent in an epoch, and behind an entry of another agent, has the epoch before",
        |history| {
            let (agent, seq) = after_another(history);
            edit(history, &agent, |entries| {
                entries.iter_mut().filter(|it| it.seq == seq).for_each(|it| it.epoch -= 1);
            });
        },
        |fault| matches!(fault, Fault::StaleWrite { .. }),
    ),
    (
        "repeated",
        "a committed phase was run and committed a second time",
        |history| {
            let (agent, work) = last_work(history);
            edit(history, &agent, |entries| {
                let of_work = |it: &HistoryEntry| it.work == work && it.kind == "phase_done";
                let second = entries.iter().enumerate().filter(|(_, it)| of_work(it)).nth(1);
                let place = second.expect("it has six phases").0 + 1;
                entries.insert(place, entries[place - 1].clone());
                for entry in &mut entries[place..] {
                    entry.seq += 1;
                    entry.lsn += LATER;
                }
            });
            // Its client was told of that call, too.
            told(history, &work).end.as_mut().expect("it has ended").calls += 1;
        },
        |fault| matches!(fault, Fault::Repeated { .. }),
    ),
    (
        "after-the-end",
        "an agent was asked to cancel a work that had ended",
        |history| {
            let (agent, work) = last_work(history);
            edit(history, &agent, |entries| {
                let last = entries.last().expect("it has entries").clone();
                let (seq, lsn) = (last.seq + 1, last.lsn + LATER);
                let kind = "cancel_requested".to_owned();
                entries.push(HistoryEntry { seq, lsn, kind, work, ..last });
            });
        },
        |fault| matches!(fault, Fault::AfterTheEnd { .. }),
    ),
    (
        "miscounted",
        "the nodes counted one model call less than there are committed steps",
        |history| {
            let entries = history.journals.values().flatten();
            let steps = entries.filter(|entry| entry.kind == "phase_done").count() as u64;
            history.counters.model_calls = Some(steps - 1);
        },
        |fault| matches!(fault, Fault::Miscounted { .. }),
    ),
];

fn edit(history: &mut History, agent: &str, change: impl FnOnce(&mut Vec<HistoryEntry>)) {
    change(history.journals.get_mut(agent).expect("it has a journal"));
}

fn told<'a>(history: &'a mut History, work: &str) -> &'a mut super::Told {
    history.told.iter_mut().find(|told| told.work == work).expect("it was acknowledged")
}

fn accepted(entries: &mut [HistoryEntry]) -> impl Iterator<Item = &mut HistoryEntry> {
    entries.iter_mut().filter(|entry| entry.kind == "accepted")
}

fn first_agent(history: &History) -> String {
    let works = |entries: &&Vec<HistoryEntry>| {
        1 < entries.iter().filter(|entry| entry.kind == "accepted").count()
    };
    let mut agents = history.journals.iter().filter(|(_, entries)| works(entries));
    agents.next().expect("one has two works").0.clone()
}

/// An agent whose last entries are all of one work, and that work.
fn last_work(history: &History) -> (String, String) {
    let is_alone = |entries: &&Vec<HistoryEntry>| {
        let work = &entries.last().expect("it has entries").work;
        let first = entries.iter().position(|entry| entry.work == *work).expect("it is there");
        entries[first..].iter().all(|entry| entry.work == *work)
    };
    let mut agents = history.journals.iter().filter(|(_, entries)| is_alone(entries));
    let (agent, entries) = agents.next().expect("one took its last work when it was idle");
    (agent.clone(), entries.last().expect("it has entries").work.clone())
}

fn keys_of(history: &History, agent: &str) -> Vec<String> {
    let entries = history.journals[agent].iter().filter(|entry| entry.kind == "accepted");
    let key = |entry: &HistoryEntry| {
        let content: Value = serde_json::from_str(&entry.content).expect("it is JSON");
        content["idempotencyKey"].as_str().expect("it has a key").to_owned()
    };
    entries.map(key).collect()
}

/// Places in the list of what was told.
fn two_of_one_stream(history: &History) -> (usize, usize) {
    let of = |index: usize| {
        let told = &history.told[index];
        (told.agent.clone(), told.place.map(|(stream, _)| stream))
    };
    let count = history.told.len();
    let mut pairs = (0..count).flat_map(|one| (one + 1..count).map(move |other| (one, other)));
    pairs.find(|(one, other)| of(*one) == of(*other)).expect("a stream has submitted two")
}

/// The last entry of an agent if another agent's entry of a later epoch than 1 is right before it in the shard's log.
fn after_another(history: &History) -> (String, i64) {
    let mut log: Vec<(u32, i64, &str, &HistoryEntry)> = Vec::new();
    let table = domain::slot::ShardTable::single(history.shards).expect("a few shards");
    for (agent, entries) in &history.journals {
        let id: domain::AgentId = agent.parse().expect("the id of an agent");
        let shard = table.shard_of(domain::Class(0), id.slot()).expect("there is one class").0;
        log.extend(entries.iter().map(|entry| (shard, entry.lsn, agent.as_str(), entry)));
    }
    log.sort_by_key(|(shard, lsn, ..)| (*shard, *lsn));
    // Alone in the later epoch, so that the order within its own journal still holds.
    let found = log.windows(2).find(|pair| {
        let ((shard, _, before, older), (same, _, agent, entry)) = (pair[0], pair[1]);
        let own = &history.journals[agent];
        let own_before = own.iter().rev().find(|it| it.seq < entry.seq);
        let own_after = own.iter().find(|it| entry.seq < it.seq);
        let is_alone = own_before.is_none_or(|it| it.epoch < entry.epoch)
            && own_after.is_none_or(|it| entry.epoch <= it.epoch);
        shard == same
            && before != agent
            && older.epoch == entry.epoch
            && 1 < entry.epoch
            && is_alone
    });
    let (_, _, agent, entry) = found.expect("two agents of a shard went on after it moved")[1];
    (agent.to_owned(), entry.seq)
}

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("histories").join(format!("{name}.jsonl"))
}

fn sound() -> History {
    History::read(&path("sound")).expect("it is committed").1
}

#[test]
fn nothing_is_found_in_the_sound_history() {
    let (title, history) = History::read(&path("sound")).unwrap();
    assert!(title.planted.is_empty());
    assert_eq!(history.check(), [].into());
    let works = history.told.len();
    assert!(20 <= works && history.told.iter().all(|told| told.end.is_some()), "{works} works");
}

#[test]
fn in_each_history_exactly_the_planted_fault_is_found() {
    for (name, _, _, is_meant) in PLANTS {
        let (title, history) = History::read(&path(name)).unwrap();
        let found = history.check();
        let shown: std::collections::BTreeSet<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(shown, title.planted, "{name}");
        assert!(!found.is_empty() && found.iter().all(is_meant), "{name}: {found:#?}");
    }
}

#[test]
fn each_history_is_the_sound_one_with_its_edit() {
    for (name, about, plant, _) in PLANTS {
        let mut planted = sound();
        plant(&mut planted);
        if std::env::var_os(REWRITE).is_some() {
            planted.write(&path(name), about).unwrap();
        }
        let (title, committed) = History::read(&path(name)).unwrap();
        assert_eq!(title.about, about, "{name}; {REWRITE}=1 writes it anew");
        assert!(committed == planted, "{name} is another; {REWRITE}=1 writes it anew");
    }
}
