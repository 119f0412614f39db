use super::*;
use crate::chain::Phase;
use crate::{Class, DefinitionHash, Epoch, Seq, Slot};

fn limits() -> Limits {
    Limits::chain(1, 3)
}

fn stamp(n: u64) -> Stamp {
    Stamp { seq: Seq(n), lsn: Lsn(n), epoch: Epoch(1), ts_ms: 0 }
}

fn accepted() -> Turn {
    let accepted = Accepted {
        definition: DefinitionHash([0; 32]),
        input: Bytes::from_static(b"text"),
        key: "k".parse().unwrap(),
        deadline_ms: 1_000,
        traceparent: None,
        class: Class(0),
        slot: Slot::new(0).unwrap(),
    };
    let mut turn = Turn::accept(accepted, stamp(1), limits());
    turn.begin();
    turn
}

fn done(cycle: u32, phase: Phase, output: &str) -> StepDone {
    StepDone {
        step: StepKey::phase(cycle, phase),
        name: String::new(),
        output: Bytes::copy_from_slice(output.as_bytes()),
        node: "node-1".into(),
        attempts: 1,
        start_ms: 0,
        end_ms: 1,
        usage: Usage { calls: 1, ..Usage::default() },
    }
}

fn output(phase: Phase) -> &'static str {
    match phase {
        Phase::Action => r#"{"draft":"d"}"#,
        Phase::Experience | Phase::Intention | Phase::Observation => "{}",
        Phase::Understanding => r#"{"decision":"yield"}"#,
        Phase::Yield => r#"{"answer":"a"}"#,
    }
}

fn until(phase: Phase) -> Turn {
    let mut turn = accepted();
    for (n, earlier) in Phase::ALL.into_iter().take_while(|earlier| *earlier < phase).enumerate() {
        turn.apply(Entry::StepDone(done(0, earlier, output(earlier))), stamp(n as u64 + 2))
            .unwrap();
    }
    turn
}

fn lost() -> Failure {
    Failure {
        kind: ErrorKind::Unavailable,
        reason: Reason::WorkerLost,
        detail: String::new(),
        is_harmless: false,
    }
}

#[test]
fn six_phases_and_the_end() {
    let mut turn = until(Phase::Yield);
    let last = done(0, Phase::Yield, output(Phase::Yield));
    let end = turn.end_after(&last).unwrap();
    assert_eq!((end.state, &end.result[..]), (WorkState::Succeeded, &b"a"[..]));
    turn.apply(Entry::StepDone(last), stamp(7)).unwrap();
    assert_eq!(turn.next(), Next::End(end.clone()));
    turn.apply(Entry::Ended(end), stamp(8)).unwrap();
    assert_eq!((turn.next(), turn.usage().calls), (Next::Nothing, 6));
}

#[test]
fn every_entry_after_the_final_one_is_refused() {
    let mut turn = accepted();
    turn.apply(Entry::Ended(ended(WorkState::Failed, Reason::ModelRefused)), stamp(2)).unwrap();
    let before = turn.clone();
    for entry in [
        Entry::StepDone(done(0, Phase::Action, output(Phase::Action))),
        Entry::Waiting(Reason::NoOffer),
        Entry::Resumed(Reason::OfferAppeared),
        Entry::CancelRequested(Reason::CancelRequested),
        Entry::Ended(ended(WorkState::Succeeded, Reason::Completed)),
    ] {
        assert!(turn.apply(entry, stamp(3)).is_err());
    }
    assert_eq!(turn, before);
}

#[test]
fn a_step_is_folded_once() {
    let mut turn = until(Phase::Experience);
    assert!(
        turn.apply(Entry::StepDone(done(0, Phase::Action, output(Phase::Action))), stamp(3))
            .is_err()
    );
    assert!(
        turn.apply(Entry::StepDone(done(0, Phase::Yield, output(Phase::Yield))), stamp(3)).is_err()
    );
}

#[test]
fn an_interrupted_step_is_begun_again_in_the_journal() {
    let mut turn = until(Phase::Intention);
    turn.interrupt();
    let Next::Begin(began) = turn.next() else { panic!("{:?}", turn.next()) };
    assert_eq!((began.step, began.attempt), (StepKey::phase(0, Phase::Intention), 2));
    turn.apply(Entry::StepBegan(began), stamp(4)).unwrap();
    let step = StepKey::phase(0, Phase::Intention);
    assert_eq!(turn.next(), Next::Run { step, attempt: 2, not_before_ms: 0 });
}

#[test]
fn attempts_end_in_a_dead_letter() {
    let mut turn = accepted();
    for attempt in 1..3 {
        let entry = turn.failed(attempt, lost()).unwrap();
        assert!(matches!(&entry, Entry::StepBegan(began) if began.attempt == attempt + 1));
        turn.apply(entry, stamp(u64::from(attempt) + 1)).unwrap();
    }
    let Entry::Ended(end) = turn.failed(3, lost()).unwrap() else { panic!("a fourth attempt") };
    assert_eq!((end.state, end.reason), (WorkState::DeadLettered, Reason::WorkerLost));
    turn.interrupt();
    assert!(matches!(turn.next(), Next::End(end) if end.state == WorkState::DeadLettered));
}

#[test]
fn a_refusal_of_the_model_is_the_end() {
    let refused = Failure {
        kind: ErrorKind::Invalid,
        reason: Reason::ModelRefused,
        detail: "why".into(),
        is_harmless: false,
    };
    let Entry::Ended(end) = accepted().failed(1, refused).unwrap() else { panic!("tried again") };
    assert_eq!((end.state, end.detail.as_str()), (WorkState::Failed, "why"));
}

#[test]
fn a_cancel_outlives_the_phase_that_ended_after_it() {
    let mut turn = accepted();
    turn.apply(Entry::CancelRequested(Reason::CancelRequested), stamp(2)).unwrap();
    turn.apply(Entry::StepDone(done(0, Phase::Action, output(Phase::Action))), stamp(3)).unwrap();
    assert!(matches!(turn.next(), Next::End(end) if end.state == WorkState::Cancelled));
}

#[test]
fn a_result_over_the_limit_fails() {
    let turn = until(Phase::Yield);
    let answer = format!(r#"{{"answer":"{}"}}"#, "x".repeat(RESULT_BYTES_MAX + 1));
    let end = turn.end_after(&done(0, Phase::Yield, &answer)).unwrap();
    assert_eq!((end.state, end.reason), (WorkState::Failed, Reason::ResultTooLarge));
}

#[test]
fn a_chain_that_never_yields_fails_at_its_cap() {
    let mut turn = until(Phase::Understanding);
    let again = |cycle| done(cycle, Phase::Understanding, r#"{"decision":"action"}"#);
    turn.apply(Entry::StepDone(again(0)), stamp(6)).unwrap();
    for phase in Phase::ALL.into_iter().take(4) {
        turn.apply(Entry::StepDone(done(1, phase, output(phase))), stamp(7)).unwrap();
    }
    let end = turn.end_after(&again(1)).unwrap();
    assert_eq!((end.state, end.reason), (WorkState::Failed, Reason::CycleLimit));
}

#[test]
fn a_loop_ends_with_what_the_model_says_last() {
    let limits = Limits { behaviour: Behaviour::Loop, rounds_max: 2, ..limits() };
    let mut turn = Turn::accept(accepted().accepted().clone(), stamp(1), limits);
    turn.begin();
    assert!(matches!(turn.next(), Next::Run { step, .. } if step == StepKey::model(0)));
    let said = |text: &str, calls| Said { text: text.to_owned(), calls };
    let call = ToolCall { tool: "echo".into(), arguments: serde_json::Value::Null };
    let model = |round, said: Said| StepDone {
        step: StepKey::model(round),
        output: said.to_json().into(),
        ..done(0, Phase::Action, "")
    };
    let first = model(0, said("", vec![call.clone()]));
    assert_eq!(turn.end_after(&first), None);
    turn.apply(Entry::StepDone(first), stamp(2)).unwrap();
    assert_eq!(turn.tool_call(), Some(&call));
    let returned = Returned { output: "1".into(), is_error: false };
    let tool = StepDone {
        step: StepKey::tool(0, 0),
        output: returned.to_json().into(),
        ..done(0, Phase::Action, "")
    };
    turn.apply(Entry::StepDone(tool), stamp(3)).unwrap();
    let asks_again = turn.end_after(&model(1, said("", vec![call]))).unwrap();
    assert_eq!(asks_again.reason, Reason::RoundLimit);
    let end = turn.end_after(&model(1, said("all", vec![]))).unwrap();
    assert_eq!((end.state, &end.result[..]), (WorkState::Succeeded, &b"all"[..]));
}

#[test]
fn only_the_attempt_that_was_begun_last_is_taken() {
    let mut turn = accepted();
    let step = StepKey::phase(0, Phase::Action);
    assert!(turn.takes(step, 1));
    turn.apply(turn.failed(1, lost()).unwrap(), stamp(2)).unwrap();
    assert!(!turn.takes(step, 1) && turn.takes(step, 2));
    assert!(
        turn.apply(Entry::StepDone(done(0, Phase::Action, output(Phase::Action))), stamp(3))
            .is_err()
    );
}
