//! Why a work is as it is: its journal entries, folded to the transitions that they record.
//!
//! Pure; the entries come from the owner. Says nothing that is not stored.

use std::collections::BTreeMap;

use domain::entry::{Entry, Resolution, StepDoubted, StepIntended};
use domain::{AgentId, Reason, WorkState};
use proto::convert;
use proto::journal;
use proto::link::{AgentPassage, LogEntry};
use proto::status::Failure;
use proto::v1::Transition;

/// The node that owned the shard under each epoch, as far as that is stored.
pub(crate) type Owners = BTreeMap<u64, String>;

/// The transitions of all works in `entries`, which are newest first, as an owner sends them. Oldest first.
///
/// # Errors
/// An entry that cannot be read.
pub(crate) fn transitions(
    entries: &[LogEntry],
    subject: impl Fn(u64) -> String,
    owners: &Owners,
) -> Result<Vec<Transition>, journal::Error> {
    let mut states: BTreeMap<u64, WorkState> = BTreeMap::new();
    let mut told = Vec::new();
    for log in entries.iter().rev() {
        // The entry of an acceptance is the work: its own lsn is the id.
        let work = if log.work == 0 { log.lsn } else { log.work };
        let from = states.get(&work).copied();
        for change in changes(&journal::decode(log.entry.clone())?, from, log.ts_ms) {
            told.push(Transition {
                time: convert::timestamp(change.at_ms),
                subject: subject(work),
                from: states.get(&work).map(ToString::to_string).unwrap_or_default(),
                to: change.to.to_string(),
                reason: change.reason.to_string(),
                cause: change.cause,
                term: 0,
                epoch: log.epoch.cast_signed(),
                node: owners.get(&log.epoch).cloned().unwrap_or_default(),
            });
            states.insert(work, change.to);
        }
    }
    Ok(told)
}

/// Why an agent is as it is: what its journal says, and its failures, which the leader wrote down. Each is worth having
/// without the other; what could not be read is a line of its own.
///
/// # Errors
/// There is nothing to tell.
pub(crate) fn agent(
    id: &AgentId,
    journaled: Result<Vec<Transition>, Failure>,
    failures: Result<Vec<Transition>, Failure>,
) -> Result<Vec<Transition>, Failure> {
    let unread = |what, failure| unread(id, what, failure);
    match (journaled, failures) {
        (Ok(journaled), Ok(failures)) => Ok(merged(journaled, failures)),
        (Ok(mut told), Err(failure)) => {
            told.push(unread("what it failed of", failure));
            Ok(told)
        }
        (Err(failure), Ok(mut told)) if !told.is_empty() => {
            told.push(unread("its journal", failure));
            Ok(told)
        }
        (Err(failure), _) => Err(failure),
    }
}

/// A line in the place of what could not be read.
fn unread(id: &AgentId, what: &str, failure: Failure) -> Transition {
    Transition {
        subject: format!("agent/{id}"),
        to: "unknown".to_owned(),
        reason: failure.reason.to_string(),
        cause: format!("{what} cannot be read: {}", failure.message),
        ..Transition::default()
    }
}

/// Puts `others` where they belong by their times; what is in the journal keeps its order.
fn merged(journaled: Vec<Transition>, others: Vec<Transition>) -> Vec<Transition> {
    let millis = |one: &Transition| one.time.as_ref().map_or(0, convert::millis);
    let mut others = others.into_iter().peekable();
    let mut merged = Vec::with_capacity(journaled.len() + others.len());
    for one in journaled {
        while let Some(other) = others.next_if(|other| millis(other) < millis(&one)) {
            merged.push(other);
        }
        merged.push(one);
    }
    merged.extend(others);
    merged
}

/// Adds how an agent came into memory and left it, or that this could not be read.
pub(crate) fn with_passages(
    id: &AgentId,
    mut journaled: Vec<Transition>,
    passages: Result<Vec<AgentPassage>, Failure>,
    owners: &Owners,
) -> Vec<Transition> {
    match passages {
        Ok(passages) => merged(journaled, told(id, &passages, owners)),
        Err(failure) => {
            journaled.push(unread(id, "how it came into memory and left it", failure));
            journaled
        }
    }
}

fn told(id: &AgentId, passages: &[AgentPassage], owners: &Owners) -> Vec<Transition> {
    let told = passages.iter().filter_map(|passage| {
        let reason = u16::try_from(passage.reason).ok().and_then(Reason::from_code)?;
        let (from, to, cause) = match reason == Reason::Idle {
            true => ("hot", "cold", "it had nothing to do"),
            false => (
                "cold",
                "hot",
                "something came for it, its shard has a new owner, or it had failed",
            ),
        };
        Some(Transition {
            time: convert::timestamp(passage.at_ms),
            subject: format!("agent/{id}"),
            from: from.to_owned(),
            to: to.to_owned(),
            reason: reason.to_string(),
            cause: cause.to_owned(),
            term: 0,
            epoch: passage.epoch.cast_signed(),
            node: owners.get(&passage.epoch).cloned().unwrap_or_default(),
        })
    });
    told.collect()
}

struct Change {
    to: WorkState,
    reason: Reason,
    cause: String,
    at_ms: i64,
}

/// What an entry changes. A turn that begins has no entry of its own: its first step tells it.
fn changes(entry: &Entry, from: Option<WorkState>, ts_ms: i64) -> Vec<Change> {
    let to = |to, reason, cause: String| Change { to, reason, cause, at_ms: ts_ms };
    let begun = |at_ms| {
        let is_new = matches!(from, None | Some(WorkState::Accepted));
        let begun = Change {
            to: WorkState::Running,
            reason: Reason::TurnBegan,
            cause: "it was the oldest open work of its agent".to_owned(),
            at_ms,
        };
        is_new.then_some(begun)
    };
    match entry {
        Entry::ShardOpened(_) => Vec::new(),
        Entry::Accepted(_) => {
            vec![to(WorkState::Accepted, Reason::Submitted, "a client submitted it".to_owned())]
        }
        Entry::StepDone(done) if from == Some(WorkState::InDoubt) => {
            let cause = format!("the answer of {} ({}) came after all", done.step, done.name);
            vec![to(WorkState::Running, Reason::Completed, cause)]
        }
        Entry::StepDone(done) => begun(done.start_ms).into_iter().collect(),
        Entry::StepBegan(began) => {
            let cause = format!("{} is begun again, attempt {}", began.step, began.attempt);
            begun(ts_ms).into_iter().chain([to(WorkState::Running, began.reason, cause)]).collect()
        }
        Entry::StepIntended(intended) => {
            let StepIntended { step, attempt, tool, key, .. } = intended;
            let cause =
                format!("{step} ({tool}) is about to be made, attempt {attempt}, key {key}");
            vec![to(WorkState::Running, Reason::TurnBegan, cause)]
        }
        Entry::StepDoubted(doubted) => {
            let StepDoubted { step, attempt, reason } = doubted;
            let cause = format!("whether attempt {attempt} of {step} was carried out is not known");
            vec![to(WorkState::InDoubt, *reason, cause)]
        }
        Entry::StepResolved(resolved) => {
            let (reason, step) = (resolved.verdict.reason(), resolved.step);
            let (state, what) = match resolved.verdict.resolution() {
                Resolution::Done => (WorkState::Running, "counts as done"),
                Resolution::Retry => (WorkState::Running, "is run again under the same key"),
                Resolution::Fail => (WorkState::InDoubt, "lets the work fail"),
            };
            vec![to(state, reason, format!("{step} {what}"))]
        }
        Entry::Waiting(reason) => {
            let waiting = to(WorkState::Waiting, *reason, String::new());
            begun(ts_ms).into_iter().chain([waiting]).collect()
        }
        Entry::Resumed(reason) => vec![to(WorkState::Running, *reason, String::new())],
        Entry::CancelRequested(reason) => vec![to(WorkState::Cancelling, *reason, String::new())],
        Entry::Ended(ended) => vec![to(ended.state, ended.reason, ended.detail.clone())],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::follow::tests::{last, phase};
    use domain::entry::{StepResolved, Verdict};
    use domain::{ErrorKind, Phase, StepKey};

    fn log(seq: u64, epoch: u64, entry: &Entry) -> LogEntry {
        LogEntry { seq, lsn: seq, epoch, work: 1, ts_ms: 5, entry: journal::encode(entry) }
    }

    fn accepted() -> LogEntry {
        let accepted = domain::entry::Accepted {
            definition: domain::DefinitionHash([1; 32]),
            input: bytes::Bytes::new(),
            key: "k".parse().unwrap(),
            deadline_ms: 1,
            traceparent: None,
            class: domain::Class(0),
            slot: domain::Slot::new(1).unwrap(),
        };
        log(1, 1, &Entry::Accepted(accepted))
    }

    #[test]
    fn a_work_is_explained_from_its_entries() {
        let again = domain::entry::StepBegan {
            step: StepKey::phase(0, Phase::Experience),
            attempt: 2,
            reason: Reason::OwnerDied,
        };
        let mut entries = vec![
            accepted(),
            phase(2, Phase::Action),
            log(3, 2, &Entry::StepBegan(again)),
            log(4, 2, &Entry::Waiting(Reason::NoOffer)),
            log(5, 2, &Entry::Resumed(Reason::OfferAppeared)),
            phase(6, Phase::Experience),
            last(7),
        ];
        entries.reverse();
        let owners = Owners::from([(1, "node-1".to_owned()), (2, "node-2".to_owned())]);
        let told = transitions(&entries, |lsn| format!("work/{lsn}"), &owners).unwrap();
        let short: Vec<_> = told
            .iter()
            .map(|t| (t.from.as_str(), t.to.as_str(), t.reason.as_str(), t.epoch, t.node.as_str()))
            .collect();
        assert_eq!(
            short,
            [
                ("", "accepted", "submitted", 1, "node-1"),
                ("accepted", "running", "turn_began", 1, "node-1"),
                ("running", "running", "owner_died", 2, "node-2"),
                ("running", "waiting", "no_offer", 2, "node-2"),
                ("waiting", "running", "offer_appeared", 2, "node-2"),
                ("running", "succeeded", "completed", 1, "node-1"),
            ]
        );
        assert!(told.iter().all(|t| t.subject == "work/1"));
        assert!(told[2].cause.contains("attempt 2"));
    }

    #[test]
    fn a_doubt_is_explained_with_its_intent_and_its_end() {
        let step = StepKey::tool(0, 0);
        let intended = StepIntended {
            step,
            attempt: 1,
            tool: "count".into(),
            key: "w-0-001-1/0/tool-0".into(),
            deadline_ms: 9,
        };
        let doubted = StepDoubted { step, attempt: 1, reason: Reason::OwnerDied };
        let resolved = StepResolved { step, attempt: 1, verdict: Verdict::PersonRetry };
        let mut entries = vec![
            accepted(),
            log(2, 1, &Entry::StepIntended(intended)),
            log(3, 2, &Entry::StepDoubted(doubted)),
            log(4, 2, &Entry::StepResolved(resolved)),
        ];
        entries.reverse();
        let told = transitions(&entries, |_| String::new(), &Owners::new()).unwrap();
        let short: Vec<_> =
            told.iter().map(|t| (t.to.as_str(), t.reason.as_str(), t.epoch)).collect();
        assert_eq!(
            short,
            [
                ("accepted", "submitted", 1),
                ("running", "turn_began", 1),
                ("in_doubt", "owner_died", 2),
                ("running", "signalled_retry", 2),
            ]
        );
        assert!(told[1].cause.contains("count") && told[1].cause.contains("tool-0"));
    }

    #[test]
    fn failures_stand_between_what_is_journaled_in_its_own_order() {
        let at = |to: &str, ms: i64| Transition {
            to: to.to_owned(),
            time: convert::timestamp(ms),
            ..Transition::default()
        };
        let journaled = vec![at("accepted", 20), at("running", 10), at("succeeded", 40)];
        let failures = vec![at("restarting", 30), at("quarantined", 50)];
        let merged = merged(journaled, failures);
        let order: Vec<_> = merged.iter().map(|one| one.to.as_str()).collect();
        assert_eq!(order, ["accepted", "running", "restarting", "succeeded", "quarantined"]);
    }

    #[test]
    fn passages_stand_between_the_works_or_what_kept_them_away_is_told() {
        let id: AgentId = "acme/support/7".parse().unwrap();
        let at = |ms| Transition { time: convert::timestamp(ms), ..Transition::default() };
        let passage =
            |at_ms, reason: Reason| AgentPassage { at_ms, epoch: 2, reason: reason.code().into() };
        let owners = Owners::from([(2, "node-1".to_owned())]);
        let passages = vec![passage(10, Reason::Activated), passage(30, Reason::Idle)];
        let told = with_passages(&id, vec![at(20)], Ok(passages), &owners);
        let short: Vec<_> =
            told.iter().map(|t| (t.from.as_str(), t.to.as_str(), t.node.as_str())).collect();
        assert_eq!(short, [("cold", "hot", "node-1"), ("", "", ""), ("hot", "cold", "node-1")]);
        let lost = Failure::new(ErrorKind::Exhausted, Reason::Overloaded, "too many reads");
        let told = with_passages(&id, vec![at(20)], Err(lost), &owners);
        assert_eq!((told.len(), told[1].reason.as_str()), (2, "overloaded"));
        assert!(told[1].cause.contains("too many reads"), "{told:?}");
    }

    #[test]
    fn what_cannot_be_read_of_an_agent_is_told_with_what_can() {
        let id: AgentId = "acme/support/7".parse().unwrap();
        let lost =
            || Failure::new(ErrorKind::Unavailable, Reason::Unowned, "the shard has no owner");
        let one = || vec![Transition { to: "quarantined".to_owned(), ..Transition::default() }];
        for (journaled, failures) in [(Err(lost()), Ok(one())), (Ok(one()), Err(lost()))] {
            let told = agent(&id, journaled, failures).unwrap();
            assert_eq!((told[0].to.as_str(), told.len()), ("quarantined", 2));
            assert_eq!(told[1].reason, "unowned");
            assert!(told[1].cause.contains("cannot be read: the shard has no owner"), "{told:?}");
        }
        assert_eq!(agent(&id, Err(lost()), Ok(Vec::new())).unwrap_err().reason, Reason::Unowned);
        assert!(agent(&id, Err(lost()), Err(lost())).is_err());
    }
}
