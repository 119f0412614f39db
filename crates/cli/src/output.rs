//! What is printed on standard output: lines for people, or one JSON document a line.

use std::io::{self, Write};

use pbjson_types::Timestamp;
use proto::v1::{Step, Work, WorkEvent, WorkState, work_event};
use serde::Serialize;

use crate::args::Format;
use crate::exit::{Exit, Failure};

/// Prints `message` as the format asks; `text` is for people.
pub(crate) fn print<T: Serialize>(
    format: Format,
    message: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    match format {
        Format::Text => line(&text(message)),
        Format::Json => line(&json(message)?),
    }
}

/// One document, on one line.
fn json<T: Serialize>(message: &T) -> Result<String, Failure> {
    let text = serde_json::to_string(message);
    text.map(in_utc).map_err(|error| Failure::other("cannot write JSON").why(error))
}

/// Canonical times end with `Z`; the library that writes ours ends them with an offset of zero.
///
/// What a key looks like here cannot be part of a text: its quotes would be escaped.
fn in_utc(mut json: String) -> String {
    const KEYS: [&str; 4] =
        ["\"createTime\":\"", "\"startTime\":\"", "\"endTime\":\"", "\"time\":\""];
    const OFFSET: &str = "+00:00";
    for key in KEYS {
        let mut from = 0;
        while let Some(found) = json[from..].find(key) {
            from += found + key.len();
            let end = json[from..].find('"').map_or(json.len(), |len| from + len);
            if json[from..end].ends_with(OFFSET) {
                json.replace_range(end - OFFSET.len()..end, "Z");
            }
        }
    }
    json
}

/// Writes one line and flushes it, so that whoever follows sees it now.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    write(&format!("{text}\n"))
}

fn write(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        // Whoever read this has seen enough, as in `stagedoor nodes | head -1`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => {
            written.map_err(|error| Failure::other("cannot write to standard output").why(error))
        }
    }
}

/// Rows below their headings, in columns.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: Vec<[String; N]>) -> String {
    if rows.is_empty() {
        return "none".to_owned();
    }
    let headings = headings.map(str::to_owned);
    let rows: Vec<_> = std::iter::once(headings).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// A moment as RFC 3339 writes it, as in JSON.
pub(crate) fn time(at: Option<&Timestamp>) -> String {
    let text = at.and_then(|at| serde_json::to_string(at).ok()).unwrap_or_default();
    text.trim_matches('"').replace("+00:00", "Z")
}

/// How a work stands, in a word.
pub(crate) fn state(state: WorkState) -> String {
    state.as_str_name().trim_start_matches("WORK_STATE_").to_ascii_lowercase()
}

/// How the program ends, given how a work stands: one that goes on is well so far.
pub(crate) fn exit_of(work: &Work) -> Exit {
    match work.state() {
        WorkState::Failed | WorkState::Cancelled | WorkState::DeadLettered => Exit::Failed,
        WorkState::Unspecified
        | WorkState::Accepted
        | WorkState::Running
        | WorkState::Waiting
        | WorkState::InDoubt
        | WorkState::Cancelling
        | WorkState::Succeeded => Exit::Ok,
    }
}

/// A work with its steps and result.
pub(crate) fn work(work: &Work) -> String {
    let mut lines = vec![
        format!("work        {}", work.id),
        format!("agent       {}", work.agent),
        format!("state       {} ({})", state(work.state()), work.reason),
        format!("definition  {}", work.definition_hash),
        format!("created     {}", time(work.create_time.as_ref())),
    ];
    if work.end_time.is_some() {
        lines.push(format!("ended       {}", time(work.end_time.as_ref())));
    }
    if !work.detail.is_empty() {
        lines.push(format!("detail      {}", work.detail));
    }
    if !work.steps.is_empty() {
        lines.push(String::new());
        lines.push(steps(&work.steps));
    }
    if let Some(result) = &work.result {
        lines.push(String::new());
        lines.push(result.text.clone());
    }
    lines.join("\n")
}

fn steps(steps: &[Step]) -> String {
    let rows = steps.iter().map(|step| {
        [
            step.sequence.to_string(),
            step.name.clone(),
            step.node.clone(),
            milliseconds(step),
            step.attempts.to_string(),
            match step.reason.as_str() {
                "" | "completed" => step.summary.clone(),
                reason => format!("{reason}: {}", step.summary),
            },
        ]
    });
    table(["#", "STEP", "NODE", "TIME", "ATTEMPTS", "FOUND"], rows.collect())
}

/// How long a step took.
pub(crate) fn milliseconds(step: &Step) -> String {
    let nanos = |at: &Timestamp| i128::from(at.seconds) * 1_000_000_000 + i128::from(at.nanos);
    match (&step.start_time, &step.end_time) {
        (Some(start), Some(end)) => {
            format!("{} ms", (nanos(end) - nanos(start)).max(0) / 1_000_000)
        }
        (Some(_), None) => "running".to_owned(),
        (None, _) => String::new(),
    }
}

/// The events of a work as they come.
pub(crate) struct Events {
    format: Format,
    /// What a model says stands on the last line, and goes on there.
    is_mid_line: bool,
}

impl Events {
    pub(crate) fn new(format: Format) -> Self {
        Self { format, is_mid_line: false }
    }

    pub(crate) fn show(&mut self, event: &WorkEvent) -> Result<(), Failure> {
        match self.format {
            Format::Text => write(&self.text(event)),
            Format::Json => line(&json(event)?),
        }
    }

    fn text(&mut self, event: &WorkEvent) -> String {
        if let Some(work_event::Event::Text(said)) = &event.event {
            self.is_mid_line = !said.text.ends_with('\n');
            return said.text.clone();
        }
        let end = if std::mem::take(&mut self.is_mid_line) { "\n" } else { "" };
        format!("{end}{}\n", self::event(event))
    }
}

/// One event in one line; the result may take more.
fn event(event: &WorkEvent) -> String {
    match &event.event {
        Some(work_event::Event::StateChange(change)) => {
            format!("{} ({})", state(change.state()), change.reason)
        }
        Some(work_event::Event::Phase(step) | work_event::Event::Step(step)) => phase(step),
        Some(work_event::Event::Text(text)) => text.text.clone(),
        Some(work_event::Event::Superseded(void)) => {
            format!("what was said from byte {} on is void", void.offset)
        }
        Some(work_event::Event::Reset(reset)) => {
            let work = reset.work.as_ref().map(|work| format!("\n{}", self::work(work)));
            format!("earlier events were deleted{}", work.unwrap_or_default())
        }
        Some(work_event::Event::Result(work)) => {
            let text = work.result.as_ref().map(|result| result.text.as_str()).unwrap_or_default();
            let text = if text.is_empty() { work.detail.as_str() } else { text };
            format!("{} ({})\n\n{text}", state(work.state()), work.reason).trim_end().to_owned()
        }
        None => String::new(),
    }
}

/// One step in one line.
pub(crate) fn phase(step: &Step) -> String {
    let summary = step.summary.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("  {:<13}  {:<8}  {:>8}  {summary}", step.name, step.node, milliseconds(step))
        .trim_end()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use proto::v1::{ListNodesResponse, Node, WorkResult};

    use super::*;

    #[test]
    fn a_document_is_one_line_of_canonical_protobuf_json() {
        let work = Work {
            id: "w-0-0ff-1".to_owned(),
            state: WorkState::Succeeded.into(),
            definition_hash: "ab".to_owned(),
            create_time: Some(Timestamp { seconds: 1, nanos: 0 }),
            result: Some(WorkResult { text: "one\ntwo".to_owned(), usage: None }),
            ..Work::default()
        };
        assert_eq!(
            json(&work).unwrap(),
            r#"{"id":"w-0-0ff-1","state":"WORK_STATE_SUCCEEDED","definitionHash":"ab","createTime":"1970-01-01T00:00:01Z","result":{"text":"one\ntwo"}}"#
        );
        let nodes = ListNodesResponse {
            nodes: vec![Node { incarnation: 7, ..Node::default() }, Node::default()],
        };
        assert_eq!(json(&nodes).unwrap(), r#"{"nodes":[{"incarnation":"7"},{}]}"#);
    }

    #[test]
    fn every_time_is_canonical_and_no_text_is_touched() {
        let at = |seconds| Some(Timestamp { seconds, nanos: 5_000_000 });
        let step = Step { start_time: at(1), end_time: at(2), ..Step::default() };
        let text = "\"time\":\"1970-01-01T00:00:01+00:00\"".to_owned();
        let result = Some(WorkResult { text, usage: None });
        let work = Work { steps: vec![step; 2], result, ..Work::default() };
        let json = json(&work).unwrap();
        assert_eq!(json.matches("00:00:01.005Z").count(), 2, "{json}");
        assert_eq!(json.matches("00:00:02.005Z").count(), 2, "{json}");
        let read: Work = serde_json::from_str(&json).unwrap();
        assert_eq!(read, work);
    }

    #[test]
    fn what_a_model_says_stands_in_one_line_and_events_in_lines_of_their_own() {
        use proto::v1::work_event::{Event, Superseded, Text};
        let mut events = Events::new(Format::Text);
        let mut shown = String::new();
        let mut show = |event| {
            let event = WorkEvent { event: Some(event), ..WorkEvent::default() };
            shown += &events.text(&event);
        };
        let said = |text: &str| Event::Text(Text { offset: 0, text: text.to_owned() });
        show(said("one "));
        show(said("two"));
        show(Event::Superseded(Superseded { offset: 0 }));
        show(said("three\n"));
        show(Event::Step(Step { name: "model".to_owned(), ..Step::default() }));
        let lines: Vec<_> = shown.lines().map(str::trim_end).collect();
        assert_eq!(lines, ["one two", "what was said from byte 0 on is void", "three", "  model"]);
    }

    #[test]
    fn only_a_work_that_ended_badly_ends_the_program_so() {
        let check = |state: WorkState, exit: Exit| {
            let work = Work { state: state.into(), ..Work::default() };
            assert_eq!(exit_of(&work), exit, "{state:?}");
        };
        check(WorkState::Accepted, Exit::Ok);
        check(WorkState::Succeeded, Exit::Ok);
        check(WorkState::Failed, Exit::Failed);
        check(WorkState::Cancelled, Exit::Failed);
        check(WorkState::DeadLettered, Exit::Failed);
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![["a".to_owned(), "1".to_owned()], ["long".to_owned(), String::new()]];
        assert_eq!(table(["X", "Y"], rows), "X     Y\na     1\nlong");
        assert_eq!(table(["X"], vec![]), "none");
    }

    #[test]
    fn a_phase_says_who_how_long_and_what() {
        let at = |millis: i32| Some(Timestamp { seconds: 5, nanos: millis * 1_000_000 });
        let step = Step {
            name: "action".to_owned(),
            node: "node-2".to_owned(),
            start_time: at(3),
            end_time: at(15),
            summary: "three\nterms".to_owned(),
            ..Step::default()
        };
        assert_eq!(phase(&step), "  action         node-2       12 ms  three terms");
    }
}
