use super::*;
use crate::definition::Behaviour;
use crate::entry::{Accepted, StepBegan};
use crate::round::{Said, ToolCall};
use crate::turn::{Failure, Limits, Next};
use crate::{Class, DefinitionHash, Epoch, ErrorKind, Lsn, Seq, Slot};

const TOOL: StepKey =
    StepKey::Call(crate::step::CallKey { round: 0, of: crate::step::Callee::Tool(0) });

fn stamp(n: u64, ts_ms: i64) -> Stamp {
    Stamp { seq: Seq(n), lsn: Lsn(n), epoch: Epoch(1), ts_ms }
}

fn limits(in_doubt: Policy) -> Limits {
    Limits { behaviour: Behaviour::Loop, rounds_max: 4, in_doubt, ..Limits::chain(0, 3) }
}

fn model(text: &str, tools: &[&str]) -> Entry {
    let call = |tool: &&str| ToolCall { tool: (*tool).to_owned(), arguments: 1.into() };
    let said = Said { text: text.to_owned(), calls: tools.iter().map(call).collect() };
    Entry::StepDone(done(StepKey::model(0), "", said.to_json(), 1))
}

fn done(step: StepKey, name: &str, output: Vec<u8>, attempts: u32) -> StepDone {
    StepDone {
        step,
        name: name.to_owned(),
        output: output.into(),
        node: "node-1".into(),
        attempts,
        start_ms: 0,
        end_ms: 1,
        usage: Usage::default(),
    }
}

fn returned() -> Returned {
    Returned { output: "7".into(), is_error: false }
}

/// A turn whose model has asked for `count`.
fn asked(in_doubt: Policy) -> Turn {
    let accepted = Accepted {
        definition: DefinitionHash([0; 32]),
        input: Bytes::from_static(b"{}"),
        key: "k".parse().unwrap(),
        deadline_ms: 30_000,
        traceparent: None,
        class: Class(0),
        slot: Slot::new(0).unwrap(),
    };
    let mut turn = Turn::accept(accepted, stamp(1, 0), limits(in_doubt));
    turn.begin();
    turn.apply(model("", &["count"]), stamp(2, 10)).unwrap();
    turn
}

/// The same, with an intent to call it in the journal.
fn intended(in_doubt: Policy) -> Turn {
    let mut turn = asked(in_doubt);
    let intent = turn.intend("w-0-000-1", 1, 1_000).unwrap();
    turn.apply(Entry::StepIntended(intent), stamp(3, 20)).unwrap();
    turn
}

/// The same, after its owner has died.
fn doubted(in_doubt: Policy) -> Turn {
    let mut turn = intended(in_doubt);
    turn.interrupt();
    let Next::Doubt(doubt) = turn.next() else { panic!("{:?}", turn.next()) };
    turn.apply(Entry::StepDoubted(doubt), stamp(4, 2_000)).unwrap();
    turn
}

fn apply_all(turn: &mut Turn, entries: Vec<Entry>, ts_ms: i64) {
    for (n, entry) in (10..).zip(entries) {
        turn.apply(entry, stamp(n, ts_ms)).unwrap();
    }
}

#[test]
fn a_tool_that_is_not_idempotent_needs_an_intent_once() {
    let turn = asked(Policy::Ask);
    assert!(turn.needs_intent(Effect::Once) && !turn.needs_intent(Effect::Idempotent));
    let intent = turn.intend("w-0-000-1", 1, 1_000).unwrap();
    assert_eq!((intent.key.as_str(), intent.tool.as_str()), ("w-0-000-1/0/tool-0", "count"));
    assert!(!intended(Policy::Ask).needs_intent(Effect::Once));
}

#[test]
fn an_intent_that_became_old_is_journaled_again() {
    let mut turn = intended(Policy::Ask);
    let again = turn.intend("w-0-000-1", 1, 3_000).unwrap();
    turn.apply(Entry::StepIntended(again), stamp(4, 30)).unwrap();
    assert_eq!(turn.intended_until_ms(), Some(3_000));
}

#[test]
fn without_an_intent_an_interrupted_call_is_run_again() {
    let mut turn = asked(Policy::Ask);
    turn.interrupt();
    assert!(matches!(turn.next(), Next::Begin(began) if (began.step, began.attempt) == (TOOL, 2)));
}

#[test]
fn with_an_intent_an_interrupted_call_is_in_doubt() {
    let turn = doubted(Policy::Ask);
    assert_eq!((turn.state(), turn.reason()), (WorkState::InDoubt, Reason::OwnerDied));
    let expected = Doubted { step: TOOL, attempt: 1, tool: "count", sequence: 2 };
    assert_eq!(turn.doubted(), Some(expected));
}

#[test]
fn a_call_that_broke_off_is_in_doubt_and_one_that_did_nothing_is_not() {
    let turn = intended(Policy::Ask);
    let failure = |is_harmless| Failure {
        kind: ErrorKind::Unavailable,
        reason: Reason::ToolBroke,
        detail: String::new(),
        is_harmless,
    };
    assert!(matches!(turn.failed(1, failure(false)), Some(Entry::StepDoubted(_))));
    assert!(
        matches!(turn.failed(1, failure(true)), Some(Entry::StepBegan(began)) if began.attempt == 2)
    );
}

#[test]
fn nothing_but_a_verdict_or_the_answer_ends_a_doubt() {
    let mut turn = doubted(Policy::Retry);
    let before = turn.clone();
    let (kind, reason) = (ErrorKind::Unavailable, Reason::WorkerLost);
    let lost = Failure { kind, reason, detail: String::new(), is_harmless: false };
    assert_eq!(turn.failed(1, lost), None, "its worker died, too");
    let began = StepBegan { step: TOOL, attempt: 2, reason };
    assert!(turn.apply(Entry::StepBegan(began), stamp(5, 2_100)).is_err());
    let intent = turn.intend("w-0-000-1", 2, 9_000).unwrap();
    assert!(turn.apply(Entry::StepIntended(intent), stamp(5, 2_100)).is_err());
    assert_eq!(turn, before);
}

#[test]
fn a_step_in_doubt_is_left_alone_until_its_deadline_and_five_seconds() {
    let turn = doubted(Policy::Retry);
    assert_eq!(turn.next(), Next::Settle { step: TOOL, attempt: 1, not_before_ms: 6_000 });
}

#[test]
fn the_next_owner_goes_by_its_own_clock_as_long_as_the_call_may_take() {
    let mut turn = doubted(Policy::Retry);
    assert_eq!(turn.hold_after_opening_ms(Epoch(1)), 0, "who made it knows its deadline");
    assert_eq!(turn.hold_after_opening_ms(Epoch(2)), 980 + 5_000);
    let entries = turn.resolve(Verdict::PolicyRetry, &returned(), "", 6_100);
    apply_all(&mut turn, entries, 6_100);
    assert_eq!(turn.hold_after_opening_ms(Epoch(2)), 980 + 5_000, "its next attempt waits, too");
    let again = turn.intend("w-0-000-1", 2, 9_000).unwrap();
    let stamp = Stamp { epoch: Epoch(2), ..stamp(20, 6_200) };
    turn.apply(Entry::StepIntended(again), stamp).unwrap();
    assert_eq!(turn.hold_after_opening_ms(Epoch(2)), 0);
}

#[test]
fn a_step_that_a_person_lets_run_again_waits_as_long() {
    let mut turn = doubted(Policy::Ask);
    let entries = turn.resolve(Verdict::PersonRetry, &returned(), "", 3_000);
    apply_all(&mut turn, entries, 3_000);
    assert_eq!(turn.state(), WorkState::Running);
    assert_eq!(turn.next(), Next::Run { step: TOOL, attempt: 2, not_before_ms: 6_000 });
    assert!(turn.needs_intent(Effect::Once));
}

#[test]
fn the_tool_knows_best_and_the_policy_comes_after_it() {
    for policy in [Policy::Fail, Policy::Retry, Policy::Ask] {
        let turn = doubted(policy);
        assert_eq!(turn.judge(Reconciled::Done), Some(Verdict::ToolDone));
        assert_eq!(turn.judge(Reconciled::NotDone), Some(Verdict::ToolNotDone));
        let expected = match policy {
            Policy::Fail => Some(Verdict::PolicyFail),
            Policy::Retry => Some(Verdict::PolicyRetry),
            Policy::Ask => None,
        };
        assert_eq!(turn.judge(Reconciled::Unknown), expected);
    }
}

#[test]
fn a_result_that_was_found_is_the_steps_own() {
    let mut turn = doubted(Policy::Ask);
    let entries = turn.resolve(Verdict::ToolDone, &returned(), "node-2", 7_000);
    apply_all(&mut turn, entries, 7_000);
    let (_, last) = turn.steps().last().unwrap();
    assert_eq!((last.step, last.name.as_str(), last.attempts), (TOOL, "count", 1));
    assert_eq!(Returned::parse(&last.output), Ok(returned()));
    assert_eq!(turn.next(), Next::Run { step: StepKey::model(1), attempt: 1, not_before_ms: 0 });
}

#[test]
fn a_doubt_can_fail_the_work() {
    for verdict in [Verdict::PolicyFail, Verdict::PersonFail] {
        let mut turn = doubted(Policy::Ask);
        let entries = turn.resolve(verdict, &returned(), "", 7_000);
        apply_all(&mut turn, entries, 7_000);
        assert_eq!((turn.state(), turn.reason()), (WorkState::Failed, Reason::StepInDoubt));
    }
}

#[test]
fn attempts_by_policy_have_a_cap_and_a_persons_have_none() {
    let mut turn = intended(Policy::Retry);
    let third = turn.intend("w-0-000-1", 3, 1_000).unwrap();
    turn.apply(Entry::StepIntended(third), stamp(4, 30)).unwrap();
    turn.interrupt();
    let Next::Doubt(doubt) = turn.next() else { panic!("{:?}", turn.next()) };
    turn.apply(Entry::StepDoubted(doubt), stamp(5, 40)).unwrap();
    let entries = turn.resolve(Verdict::PolicyRetry, &returned(), "", 50);
    assert!(matches!(&entries[1], Entry::Ended(end) if end.state == WorkState::DeadLettered));
    assert_eq!(turn.resolve(Verdict::PersonRetry, &returned(), "", 50).len(), 1);
}

#[test]
fn a_signal_is_for_the_step_in_doubt_and_may_be_repeated() {
    let turn = doubted(Policy::Ask);
    let signal = |turn: &Turn, sequence, name: &str| {
        let which = Which { sequence, name: name.to_owned(), attempt: 0 };
        turn.signal(&which, Verdict::PersonRetry, &returned(), 3_000)
    };
    assert_eq!(signal(&turn, 1, ""), Signalled::Refused);
    assert_eq!(signal(&turn, 0, "echo"), Signalled::Refused);
    for (sequence, name) in [(0, ""), (2, ""), (0, "count"), (2, "count")] {
        let Signalled::Journal(entries) = signal(&turn, sequence, name) else { panic!("refused") };
        let mut after = turn.clone();
        apply_all(&mut after, entries, 3_000);
        assert_eq!(signal(&after, sequence, name), Signalled::Known);
        assert_eq!(signal(&after, 3, name), Signalled::Refused);
        let other = after.signal(&Which::default(), Verdict::PersonFail, &returned(), 3_000);
        assert_eq!(other, Signalled::Refused);
    }
}

#[test]
fn a_signal_about_an_earlier_attempt_is_none_about_the_next() {
    let mut turn = doubted(Policy::Ask);
    let about = |turn: &Turn, attempt| {
        let which = Which { attempt, ..Which::default() };
        turn.signal(&which, Verdict::PersonRetry, &returned(), 3_000)
    };
    assert_eq!(about(&turn, 2), Signalled::Refused);
    let Signalled::Journal(entries) = about(&turn, 1) else { panic!("refused") };
    apply_all(&mut turn, entries, 3_000);
    let again = turn.intend("w-0-000-1", 2, 4_000).unwrap();
    turn.apply(Entry::StepIntended(again), stamp(6, 3_100)).unwrap();
    turn.interrupt();
    let Next::Doubt(doubt) = turn.next() else { panic!("{:?}", turn.next()) };
    turn.apply(Entry::StepDoubted(doubt), stamp(7, 3_200)).unwrap();
    assert_eq!(about(&turn, 1), Signalled::Known);
    assert!(matches!(about(&turn, 2), Signalled::Journal(_)));
}

#[test]
fn a_late_answer_of_the_attempt_in_doubt_ends_the_doubt() {
    let mut turn = doubted(Policy::Ask);
    assert!(turn.takes(TOOL, 1) && !turn.takes(TOOL, 2));
    let late = done(TOOL, "count", returned().to_json(), 1);
    turn.apply(Entry::StepDone(late), stamp(5, 2_500)).unwrap();
    assert_eq!(turn.state(), WorkState::Running);
}

#[test]
fn an_answer_of_an_attempt_that_was_superseded_is_not_folded() {
    let mut turn = doubted(Policy::Ask);
    let entries = turn.resolve(Verdict::PersonRetry, &returned(), "", 3_000);
    apply_all(&mut turn, entries, 3_000);
    assert!(!turn.takes(TOOL, 1) && turn.takes(TOOL, 2));
    let late = done(TOOL, "count", returned().to_json(), 1);
    assert!(turn.apply(Entry::StepDone(late), stamp(20, 3_500)).is_err());
}

#[test]
fn an_answer_that_a_worker_still_has_is_waited_for() {
    let mut turn = intended(Policy::Ask);
    turn.interrupt();
    turn.await_worker();
    assert!(turn.takes(TOOL, 1));
    assert!(matches!(turn.next(), Next::Run { attempt: 1, .. }));
}

#[test]
fn time_in_doubt_is_not_the_works() {
    let mut turn = doubted(Policy::Ask);
    assert_eq!(turn.deadline_ms(), i64::MAX);
    let entries = turn.resolve(Verdict::PersonRetry, &returned(), "", 92_000);
    apply_all(&mut turn, entries, 92_000);
    assert_eq!(turn.deadline_ms(), 30_000 + 90_000);
}

#[test]
fn a_call_that_may_be_under_way_when_its_work_is_stopped_is_in_doubt() {
    for stop in [Stop::Cancel, Stop::Deadline, Stop::Quarantine] {
        let mut turn = intended(Policy::Ask);
        let entries = turn.stopped(stop);
        let doubt = StepDoubted { step: TOOL, attempt: 1, reason: stop.reason() };
        assert_eq!(entries[0], Entry::StepDoubted(doubt));
        let Some(Entry::Ended(ended)) = entries.last() else { panic!("{entries:?}") };
        assert!(ended.detail.contains("(count) was done is not known"), "{}", ended.detail);
        apply_all(&mut turn, entries, 5_000);
        assert_eq!((turn.state(), turn.reason()), (stop.state(), stop.reason()));
    }
}

#[test]
fn a_work_that_is_stopped_in_doubt_is_not_doubted_twice() {
    let entries = doubted(Policy::Ask).stopped(Stop::Deadline);
    let [Entry::Ended(ended)] = entries.as_slice() else { panic!("{entries:?}") };
    assert!(ended.detail.contains("(count)"), "{}", ended.detail);
    let entries = asked(Policy::Ask).stopped(Stop::Deadline);
    let [Entry::Ended(ended)] = entries.as_slice() else { panic!("{entries:?}") };
    assert_eq!(ended.detail, "", "nothing was called yet");
}

#[test]
fn a_tool_that_says_nothing_is_asked_ten_times_for_each_attempt() {
    let mut probes = Probes::default();
    let attempt = |work: &str, number| Attempt {
        work: work.parse().unwrap(),
        step: TOOL,
        epoch: Epoch(1),
        number,
    };
    let asked =
        |probes: &mut Probes, attempt| (1..).find(|_| probes.failed(attempt)).unwrap_or(u32::MAX);
    assert_eq!(asked(&mut probes, attempt("w-0-000-1", 1)), PROBES_MAX);
    assert!(!probes.failed(attempt("w-0-000-1", 2)));
    let other = asked(&mut probes, attempt("w-0-000-1", 3));
    assert_eq!(other, PROBES_MAX, "another attempt is another question");
    assert!(!probes.failed(attempt("w-0-000-1", 1)));
    let other = asked(&mut probes, attempt("w-0-000-2", 1));
    assert_eq!(other, PROBES_MAX, "so is the same of another work");
}
