//! One work over many subscriptions: each event once, in its order.

use super::*;
use bytes::Bytes;
use domain::Reason;
use domain::entry::{Accepted, Entry, StepBegan, StepDone, Usage};
use domain::round::Said;
use domain::turn;
use domain::{Class, DefinitionHash, Phase, Slot, StepKey, WorkState};
use proto::journal;
use proto::link::{LogEntry, Refusal, StepAttempt, StepInfo};

pub(crate) fn work() -> WorkId {
    "w-0-001-1".parse().unwrap()
}

pub(crate) fn phase(seq: u64, phase: Phase) -> LogEntry {
    done(seq, StepKey::phase(0, phase), Bytes::from_static(b"{}"))
}

fn done(seq: u64, step: StepKey, output: Bytes) -> LogEntry {
    let done = StepDone {
        step,
        name: String::new(),
        output,
        node: "node-1".into(),
        attempts: 1,
        start_ms: 1,
        end_ms: 2,
        usage: Usage::default(),
    };
    entry(seq, &Entry::StepDone(done))
}

pub(crate) fn accepted(seq: u64) -> LogEntry {
    let accepted = Accepted {
        definition: DefinitionHash([0; 32]),
        input: Bytes::new(),
        key: "k".parse().unwrap(),
        deadline_ms: 1,
        traceparent: None,
        class: Class(0),
        slot: Slot::new(1).unwrap(),
    };
    LogEntry { lsn: 1, ..entry(seq, &Entry::Accepted(accepted)) }
}

pub(crate) fn last(seq: u64) -> LogEntry {
    entry(seq, &Entry::Ended(turn::ended(WorkState::Succeeded, Reason::Completed)))
}

fn entry(seq: u64, entry: &Entry) -> LogEntry {
    let lsn = 100 + seq;
    LogEntry { seq, lsn, epoch: 1, work: 1, ts_ms: 5, entry: journal::encode(entry) }
}

pub(crate) fn ended() -> Option<WorkInfo> {
    let state = journal::state_code(WorkState::Succeeded);
    Some(WorkInfo { lsn: 1, slot: 1, state, end_ms: 9, ..WorkInfo::default() })
}

/// How a test writes an event: the seq of its cursor and the number of its step; 0 for the result, -1 for a reset. What
/// only tells of the acceptance is left out.
pub(crate) fn short(event: &v1::WorkEvent) -> Option<(u64, i32)> {
    let seq = Cursor::parse(&event.cursor).unwrap().seq;
    match &event.event {
        Some(work_event::Event::Phase(step)) => Some((seq, step.sequence)),
        Some(work_event::Event::Result(work)) => {
            assert!(work.steps.is_empty());
            Some((seq, 0))
        }
        Some(work_event::Event::Reset(_)) => Some((seq, -1)),
        Some(work_event::Event::StateChange(_)) => None,
        other => panic!("{other:?}"),
    }
}

fn read(follow: &mut Follow, events: Events) -> (Vec<(u64, i32)>, Next) {
    let mut out = Vec::new();
    let next = follow.read(events, &mut out).unwrap();
    (out.iter().filter_map(|told| short(&told.event)).collect(), next)
}

fn after(seq: u64, offset: u64) -> Follow {
    Follow::after(0, Cursor { seq, offset, ..Cursor::beginning(work()) })
}

fn sent(entries: Vec<LogEntry>) -> Events {
    Events { entries, ..Events::default() }
}

/// What comes after the acceptance, which comes again with it.
fn rest(mut entries: Vec<LogEntry>) -> Events {
    entries.insert(0, accepted(1));
    sent(entries)
}

#[test]
fn what_was_deleted_is_told_of_once() {
    let last_phase = || sent(vec![phase(7, Phase::Understanding), phase(8, Phase::Yield)]);
    let mut follow = Follow::new(0, work(), WatchMode::All);
    let told = read(&mut follow, last_phase());
    assert_eq!(told, (vec![(6, -1), (7, 0), (8, 0)], Next::More));
    assert_eq!(read(&mut follow, sent(vec![phase(9, Phase::Yield)])), (vec![(9, 0)], Next::More));
    // Who has seen all up to there misses nothing.
    assert_eq!(read(&mut after(6, 0), last_phase()).0, [(7, 0), (8, 0)]);
    assert_eq!(read(&mut after(5, 0), last_phase()).0, [(6, -1), (7, 0), (8, 0)]);
    let mut end = Follow::new(0, work(), WatchMode::End);
    assert_eq!(read(&mut end, last_phase()).0, []);
}

#[test]
fn a_reset_has_the_work_as_it_is() {
    let info = || WorkInfo { steps: vec![StepInfo::default(); 3], ..ended().unwrap() };
    let reset = |events: Events| {
        let mut out = Vec::new();
        Follow::new(0, work(), WatchMode::All).read(events, &mut out).unwrap();
        match out.remove(0).event.event {
            Some(work_event::Event::Reset(reset)) => reset.work.unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let some = Events { whole: Some(info()), ..sent(vec![phase(7, Phase::Yield)]) };
    let none = Events { ended: Some(info()), ..Events::default() };
    for told in [reset(some), reset(none)] {
        assert_eq!((told.state(), told.steps.len()), (v1::WorkState::Succeeded, 3));
    }
}

#[test]
fn what_is_deleted_while_nobody_reads_is_told_of_when_it_goes_on() {
    let begun = || {
        let mut follow = Follow::new(0, work(), WatchMode::All);
        follow.read(sent(vec![accepted(1), model(3, 0, "abc")]), &mut Vec::new()).unwrap();
        follow
    };
    let told = |follow: &mut Follow, events: Events| {
        let mut out = Vec::new();
        follow.read(Events { whole: ended(), ..events }, &mut out).unwrap();
        assert!(out.windows(2).all(|pair| place(&pair[0].event) < place(&pair[1].event)));
        assert!(out.iter().all(|told| (3, 0, 0) < place(&told.event)));
        let is_reset = matches!(out.remove(0).event.event, Some(work_event::Event::Reset(_)));
        (is_reset, out.iter().filter_map(|told| line(&told.event)).collect::<Vec<_>>())
    };
    let rest = Events { ended: ended(), ..sent(vec![model(9, 3, "xyz"), last(10)]) };
    let expected = ["0 xyz", "step 0", "end"].map(str::to_owned).to_vec();
    assert_eq!(told(&mut begun(), rest), (true, expected));
    let none = Events { ended: ended(), ..Events::default() };
    assert_eq!(told(&mut begun(), none), (true, vec!["end".to_owned()]));
}

#[test]
fn no_entry_is_told_twice() {
    let mut follow = Follow::new(0, work(), WatchMode::All);
    let first = rest(vec![phase(2, Phase::Action), phase(4, Phase::Experience)]);
    assert_eq!(read(&mut follow, first.clone()), (vec![(2, 1), (4, 2)], Next::More));
    assert_eq!(read(&mut follow, first), (vec![], Next::More));
    let again = rest(vec![phase(4, Phase::Experience), phase(5, Phase::Intention)]);
    assert_eq!(read(&mut follow, again), (vec![(5, 3)], Next::More));
}

#[test]
fn the_result_is_the_last_event_and_has_a_cursor() {
    let mut follow = Follow::new(0, work(), WatchMode::All);
    let events = Events { ended: ended(), ..rest(vec![phase(7, Phase::Yield), last(8)]) };
    assert_eq!(read(&mut follow, events), (vec![(7, 1), (8, 0)], Next::End));
}

#[test]
fn a_watch_that_goes_on_counts_the_steps_that_it_does_not_tell() {
    let mut follow = after(4, 0);
    let events = rest(vec![
        phase(2, Phase::Action),
        phase(4, Phase::Experience),
        phase(5, Phase::Intention),
    ]);
    assert_eq!(read(&mut follow, events), (vec![(5, 3)], Next::More));
    let events = Events { ended: ended(), ..rest(vec![last(8)]) };
    assert_eq!(read(&mut follow, events), (vec![(8, 0)], Next::End));
}

#[test]
fn after_the_result_there_is_nothing() {
    let mut follow = after(8, 0);
    let events = Events { ended: ended(), ..rest(vec![phase(7, Phase::Yield), last(8)]) };
    assert_eq!(read(&mut follow, events), (vec![], Next::End));
}

#[test]
fn a_work_whose_entries_are_gone_still_has_its_result() {
    let mut follow = after(5, 0);
    let events = Events { ended: ended(), ..Events::default() };
    let told = read(&mut follow, events.clone());
    assert_eq!(told, (vec![(SEQ_LAST - 1, -1), (SEQ_LAST, 0)], Next::End));
    assert_eq!(read(&mut after(SEQ_LAST - 1, 0), events).0, [(SEQ_LAST, 0)]);
}

#[test]
fn who_wants_the_end_is_told_the_end() {
    let mut follow = Follow::new(0, work(), WatchMode::End);
    let events = Events { ended: ended(), ..rest(vec![phase(7, Phase::Yield), last(8)]) };
    assert_eq!(read(&mut follow, events), (vec![(8, 0)], Next::End));
}

#[test]
fn the_beginning_of_a_turn_is_told_once_whoever_shows_it() {
    let begun = |follow: &mut Follow, events: Events| {
        let mut out = Vec::new();
        follow.read(events, &mut out).unwrap();
        out.into_iter().map(|told| told.event.cursor).collect::<Vec<_>>()
    };
    let at = |seq: u64, offset: u64| Cursor { seq, offset, ..Cursor::beginning(work()) }.to_text();
    let live = || Events { began_ms: 7, ..Events::default() };
    let first = || sent(vec![accepted(2)]);
    let phases = || sent(vec![accepted(2), phase(4, Phase::Action)]);
    let mut follow = Follow::new(0, work(), WatchMode::All);
    assert_eq!(begun(&mut follow, first()), [at(2, 0)]);
    assert_eq!(begun(&mut follow, live()), [at(2, 1)]);
    assert_eq!(begun(&mut follow, live()), [""; 0]);
    assert_eq!(begun(&mut follow, phases()), [at(4, 0)]);
    // Without the owner's word the first step shows it.
    let mut late = Follow::new(0, work(), WatchMode::All);
    assert_eq!(begun(&mut late, phases()), [at(2, 0), at(2, 1), at(4, 0)]);
    assert_eq!(begun(&mut after(2, 0), phases()), [at(2, 1), at(4, 0)]);
    assert_eq!(begun(&mut after(2, 1), phases()), [at(4, 0)]);
    assert_eq!(begun(&mut after(4, 0), phases()), [""; 0]);
}

#[test]
fn an_event_stands_where_its_entry_does_and_the_result_at_the_end() {
    let mut follow = Follow::new(0, work(), WatchMode::All);
    let events =
        Events { ended: ended(), ..sent(vec![accepted(2), phase(4, Phase::Yield), last(5)]) };
    let mut out = Vec::new();
    follow.read(events, &mut out).unwrap();
    let positions: Vec<_> = out
        .iter()
        .map(|told| told.position.map(|position| position.to_string()).unwrap_or_default())
        .collect();
    assert_eq!(positions, ["1.1", "", "1.104", "1.105"]);
}

#[test]
fn a_closed_subscription_is_made_anew() {
    let mut follow = Follow::new(0, work(), WatchMode::All);
    let closed = Events { closed: Some(Refusal::default()), ..rest(vec![phase(2, Phase::Action)]) };
    assert_eq!(read(&mut follow, closed), (vec![(2, 1)], Next::Again));
    assert_eq!(follow.last(), 2);
}

/// How a test writes an event of what is said: its offset and text, `-` for superseded, the number of a step, or the end.
fn line(event: &v1::WorkEvent) -> Option<String> {
    match event.event.as_ref().unwrap() {
        work_event::Event::Text(said) => Some(format!("{} {}", said.offset, said.text)),
        work_event::Event::Superseded(void) => Some(format!("{} -", void.offset)),
        work_event::Event::Step(step) => Some(format!("step {}", step.sequence)),
        work_event::Event::Result(_) => Some("end".to_owned()),
        work_event::Event::StateChange(change) if change.state() == v1::WorkState::Cancelling => {
            Some("cancelling".to_owned())
        }
        work_event::Event::StateChange(_) => None,
        other @ (work_event::Event::Phase(_) | work_event::Event::Reset(_)) => panic!("{other:?}"),
    }
}

fn model(seq: u64, round: u32, text: &str) -> LogEntry {
    let said = Said { text: text.to_owned(), calls: Vec::new() };
    done(seq, StepKey::model(round), said.to_json().into())
}

fn again(seq: u64, round: u32, attempt: u32) -> LogEntry {
    let (step, reason) = (StepKey::model(round), Reason::OwnerDied);
    entry(seq, &Entry::StepBegan(StepBegan { step, attempt, reason }))
}

fn cancelling(seq: u64) -> LogEntry {
    entry(seq, &Entry::CancelRequested(Reason::CancelRequested))
}

pub(crate) fn says(round: u32, attempt: u32, offset: u64, text: &str) -> Events {
    let attempt = StepAttempt { round: round + 1, attempt, ..StepAttempt::default() };
    let text = StepText { attempt: Some(attempt), offset, text: text.to_owned(), at_ms: 7 };
    Events { text: Some(text), ..Events::default() }
}

fn ends(seq: u64) -> Events {
    Events { ended: ended(), ..sent(vec![last(seq)]) }
}

fn place(event: &v1::WorkEvent) -> (u64, u64, u64) {
    let Cursor { seq, offset, told, .. } = Cursor::parse(&event.cursor).unwrap();
    (seq, offset, told)
}

/// What a client has in the end that hears no piece before `from` events were told, came back with its cursor then, and hears
/// all that is said from where each attempt begins.
fn buffer_from(sent: &[Events], from: usize) -> String {
    let mut out = Vec::new();
    let mut follow = Follow::new(0, work(), WatchMode::All);
    for events in sent {
        follow.read(events.clone(), &mut out).unwrap();
    }
    let cursor = out[..from].last().map(|told| Cursor::parse(&told.event.cursor).unwrap());
    let mut told = out[..from].to_vec();
    let mut follow = Follow::after(0, cursor.unwrap_or(Cursor::beginning(work())));
    let mut said = String::new();
    for events in sent {
        let mut events = events.clone();
        if let Some(text) = &mut events.text {
            said.truncate(usize::try_from(text.offset).unwrap());
            said.push_str(&text.text);
            (text.offset, text.text) = (0, said.clone());
        }
        follow.read(events, &mut told).unwrap();
    }
    assert!(told.windows(2).all(|pair| place(&pair[0].event) < place(&pair[1].event)));
    let mut buffer = String::new();
    for told in &told {
        match told.event.event.as_ref().unwrap() {
            work_event::Event::Text(said) => {
                assert_eq!(said.offset, buffer.len() as i64);
                buffer.push_str(&said.text);
            }
            work_event::Event::Superseded(void) => {
                buffer.truncate(usize::try_from(void.offset).unwrap());
            }
            work_event::Event::Reset(_) => buffer.clear(),
            work_event::Event::StateChange(_)
            | work_event::Event::Phase(_)
            | work_event::Event::Step(_)
            | work_event::Event::Result(_) => {}
        }
    }
    buffer
}

/// What a client is told that was told all before the event number `from`, and then came back with its cursor.
fn from_cursor(sent: &[Events], from: usize) -> Vec<String> {
    let mut follow = Follow::new(0, work(), WatchMode::All);
    let mut out = Vec::new();
    for events in sent {
        follow.read(events.clone(), &mut out).unwrap();
    }
    let cursor = match from {
        0 => Cursor::beginning(work()),
        _ => Cursor::parse(&out[from - 1].event.cursor).unwrap(),
    };
    let mut follow = Follow::after(0, cursor);
    let mut told = out[..from].to_vec();
    for events in sent {
        follow.read(events.clone(), &mut told).unwrap();
    }
    assert!(told.iter().map(|told| &told.event.cursor).eq(out.iter().map(|it| &it.event.cursor)));
    assert!(told.windows(2).all(|pair| place(&pair[0].event) < place(&pair[1].event)));
    told.iter().filter_map(|told| line(&told.event)).collect()
}

#[test]
fn what_is_said_is_told_once_however_often_a_client_comes_back() {
    let sent = [
        Events { began_ms: 3, ..sent(vec![accepted(1)]) },
        says(0, 1, 0, "one "),
        says(0, 1, 4, "two "),
        sent(vec![cancelling(2)]),
        says(0, 1, 8, "three"),
        sent(vec![model(4, 0, "one two three four")]),
        sent(vec![model(5, 1, "five")]),
        ends(6),
    ];
    let expected = [
        "0 one ",
        "4 two ",
        "cancelling",
        "8 three",
        "13  four",
        "step 1",
        "18 five",
        "step 2",
        "end",
    ];
    // The acceptance and the beginning of the turn are events, too.
    for from in 0..=expected.len() + 2 {
        assert_eq!(from_cursor(&sent, from), expected, "from event {from}");
        assert_eq!(buffer_from(&sent, from), "one two three fourfive");
    }
}

#[test]
fn text_of_an_owner_that_died_is_superseded_when_the_step_is_begun_again() {
    let sent = [
        sent(vec![accepted(1), model(2, 0, "ab")]),
        says(1, 1, 0, "cde"),
        sent(vec![again(3, 1, 2)]),
        says(1, 1, 3, "f, of the old one"),
        says(1, 2, 0, "x"),
        sent(vec![again(4, 1, 3), model(5, 1, "yz")]),
        ends(6),
    ];
    let expected = ["0 ab", "step 1", "2 cde", "2 -", "2 x", "2 -", "2 yz", "step 2", "end"];
    for from in 0..=expected.len() + 2 {
        assert_eq!(from_cursor(&sent, from), expected, "from event {from}");
        assert_eq!(buffer_from(&sent, from), "abyz");
    }
}

/// What a client is told that comes back with this cursor to a work whose first entries were deleted.
fn after_pruning(cursor: Cursor) -> Vec<String> {
    let mut follow = Follow::after(0, cursor);
    let mut out = Vec::new();
    follow.read(sent(vec![model(7, 1, "abcd"), model(8, 2, "ef")]), &mut out).unwrap();
    follow.read(ends(9), &mut out).unwrap();
    out.retain(|told| !matches!(told.event.event, Some(work_event::Event::Reset(_))));
    out.iter().filter_map(|told| line(&told.event)).map(|line| line.replace(" 0", "")).collect()
}

#[test]
fn text_begins_anew_after_a_reset_and_goes_on_without_one() {
    let cursor =
        |seq, offset, told, committed| Cursor { work: work(), seq, offset, told, committed };
    let anew = ["0 abcd", "step", "4 ef", "step", "end"];
    assert_eq!(after_pruning(cursor(0, 0, 0, 0)), anew);
    assert_eq!(
        after_pruning(cursor(4, 1, 3, 100)),
        anew,
        "its text is void with what was before it"
    );
    assert_eq!(after_pruning(cursor(6, 0, 0, 100)), ["100 abcd", "step", "104 ef", "step", "end"]);
    assert_eq!(after_pruning(cursor(6, 1, 3, 100)), ["103 d", "step", "104 ef", "step", "end"]);
    assert_eq!(after_pruning(cursor(7, 0, 0, 104)), ["104 ef", "step", "end"]);
}

#[test]
fn text_that_never_got_into_the_journal_is_superseded_before_the_end() {
    let sent = [sent(vec![accepted(1)]), says(0, 1, 0, "half"), ends(2)];
    for from in 0..=5 {
        assert_eq!(from_cursor(&sent, from), ["0 half", "0 -", "end"], "from event {from}");
    }
}

#[test]
fn who_comes_back_while_the_attempt_runs_is_told_what_it_lacks() {
    let mut follow =
        Follow::after(0, Cursor { seq: 2, offset: 1, told: 3, ..Cursor::beginning(work()) });
    let mut out = Vec::new();
    follow.read(sent(vec![accepted(1), model(2, 0, "ab")]), &mut out).unwrap();
    follow.read(says(1, 1, 0, "cdefg"), &mut out).unwrap();
    let told: Vec<_> = out.iter().filter_map(|told| line(&told.event)).collect();
    assert_eq!(told, ["5 fg"]);
}

#[test]
fn an_owner_that_is_none_any_more_does_not_say_what_runs() {
    let mut follow =
        Follow::after(0, Cursor { seq: 3, offset: 1, told: 2, ..Cursor::beginning(work()) });
    let mut out = Vec::new();
    follow.read(sent(vec![accepted(1)]), &mut out).unwrap();
    follow.read(says(0, 1, 0, "of the first attempt"), &mut out).unwrap();
    follow.read(sent(vec![again(3, 0, 2)]), &mut out).unwrap();
    follow.read(says(0, 2, 0, "new"), &mut out).unwrap();
    let told: Vec<_> = out.iter().filter_map(|told| line(&told.event)).collect();
    assert_eq!(told, ["2 w"]);
}

#[test]
fn who_wants_the_end_is_told_no_text() {
    let mut follow = Follow::new(0, work(), WatchMode::End);
    let mut out = Vec::new();
    follow.read(says(0, 1, 0, "text"), &mut out).unwrap();
    follow.read(rest(vec![model(2, 0, "text")]), &mut out).unwrap();
    follow.read(ends(3), &mut out).unwrap();
    let told: Vec<_> = out.iter().filter_map(|told| line(&told.event)).collect();
    assert_eq!(told, ["end"]);
}
