//! The messages of Hrana 3 over HTTP, in JSON: what we say, and what we read of the answers.
//!
//! Requests are written by hand: their bytes are most of the work of a commit.

use std::borrow::Cow;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use crate::Error;
use crate::statement::{Row, Rows, Value};

/// Writes no padding, and takes it or leaves it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// One statement as it is sent, without the condition under which it runs.
pub(super) fn statement(sql: &str, params: &[Value], wants_rows: bool) -> String {
    let bytes: usize = params.iter().map(value_len).sum();
    let mut out = String::with_capacity(sql.len() + bytes + 64);
    out.push_str(r#"{"sql":"#);
    quote(&mut out, sql);
    out.push_str(r#","args":["#);
    for (index, param) in params.iter().enumerate() {
        if index != 0 {
            out.push(',');
        }
        value(&mut out, param);
    }
    out.push_str(if wants_rows { r#"],"want_rows":true}"# } else { r#"],"want_rows":false}"# });
    out
}

fn value_len(value: &Value) -> usize {
    const WORDS: usize = 36;
    WORDS
        + match value {
            Value::Text(text) => text.len(),
            Value::Blob(bytes) => bytes.len().div_ceil(3) * 4,
            Value::Null | Value::Integer(_) | Value::Real(_) => 20,
        }
}

fn value(out: &mut String, value: &Value) {
    use std::fmt::Write;
    // Writing to a string cannot fail.
    _ = match value {
        Value::Null => write!(out, r#"{{"type":"null"}}"#),
        Value::Integer(number) => write!(out, r#"{{"type":"integer","value":"{number}"}}"#),
        Value::Real(number) => write!(out, r#"{{"type":"float","value":{number}}}"#),
        Value::Text(text) => {
            out.push_str(r#"{"type":"text","value":"#);
            quote(out, text);
            out.push('}');
            Ok(())
        }
        Value::Blob(bytes) => {
            out.push_str(r#"{"type":"blob","base64":""#);
            BASE64.encode_string(bytes, out);
            out.push_str(r#""}"#);
            Ok(())
        }
    };
}

fn quote(out: &mut String, text: &str) {
    // A text has a form in JSON, whatever is in it.
    out.push_str(&serde_json::to_string(text).unwrap_or_default());
}

/// When a step of a batch runs.
#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    Always,
    /// The step of this number has gone well.
    Ok(usize),
    /// A transaction is open still.
    InTransaction,
}

/// A batch that is being written.
pub(super) struct Request {
    text: String,
    steps: usize,
}

impl Request {
    /// Goes on in the stream that `baton` names, or opens one.
    pub(super) fn new(baton: Option<&str>, bytes: usize) -> Self {
        let mut text = String::with_capacity(bytes);
        text.push_str(r#"{"baton":"#);
        match baton {
            Some(baton) => quote(&mut text, baton),
            None => text.push_str("null"),
        }
        text.push_str(r#","requests":[{"type":"batch","batch":{"steps":["#);
        Self { text, steps: 0 }
    }

    /// Adds a step; its number.
    pub(super) fn step(&mut self, statement: &str, when: When) -> usize {
        use std::fmt::Write;
        if self.steps != 0 {
            self.text.push(',');
        }
        self.text.push_str(r#"{"stmt":"#);
        self.text.push_str(statement);
        _ = match when {
            When::Always => Ok(()),
            When::Ok(step) => {
                write!(self.text, r#","condition":{{"type":"ok","step":{step}}}"#)
            }
            When::InTransaction => {
                write!(
                    self.text,
                    r#","condition":{{"type":"not","cond":{{"type":"is_autocommit"}}}}"#
                )
            }
        };
        self.text.push('}');
        self.steps += 1;
        self.steps - 1
    }

    /// The stream stays open for the baton in the answer.
    pub(super) fn and_keep(mut self) -> String {
        self.text.push_str("]}}]}");
        self.text
    }

    pub(super) fn and_close(mut self) -> String {
        self.text.push_str(r#"]}},{"type":"close"}]}"#);
        self.text
    }
}

#[derive(Debug, Deserialize)]
struct Response<'a> {
    baton: Option<String>,
    #[serde(borrow)]
    results: Vec<StreamResult<'a>>,
}

#[derive(Debug, Deserialize)]
struct StreamResult<'a> {
    #[serde(borrow)]
    response: Option<StreamResponse<'a>>,
    #[serde(borrow)]
    error: Option<Problem<'a>>,
}

#[derive(Debug, Deserialize)]
struct StreamResponse<'a> {
    #[serde(borrow)]
    result: Option<BatchResult<'a>>,
}

#[derive(Debug, Deserialize)]
struct BatchResult<'a> {
    #[serde(borrow)]
    step_results: Vec<Option<StepResult<'a>>>,
    #[serde(borrow)]
    step_errors: Vec<Option<Problem<'a>>>,
}

#[derive(Debug, Deserialize)]
struct StepResult<'a> {
    #[serde(borrow, default)]
    rows: Vec<Vec<Cell<'a>>>,
    #[serde(default)]
    affected_row_count: u64,
}

#[derive(Debug, Deserialize)]
struct Cell<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    value: Option<Cow<'a, str>>,
    #[serde(borrow)]
    base64: Option<Cow<'a, str>>,
}

/// What the server says is wrong.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Problem<'a> {
    #[serde(borrow)]
    pub(super) message: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) code: Option<Cow<'a, str>>,
}

impl Problem<'_> {
    pub(super) fn code(&self) -> &str {
        self.code.as_deref().unwrap_or_default()
    }

    pub(super) fn into_owned(self) -> Problem<'static> {
        let code = self.code.map(|code| Cow::Owned(code.into_owned()));
        Problem { message: Cow::Owned(self.message.into_owned()), code }
    }
}

/// What became of the steps of a batch, by their numbers.
pub(super) struct Answer {
    pub(super) baton: Option<String>,
    /// None: it did not run.
    pub(super) steps: Vec<Option<Result<Rows, Problem<'static>>>>,
}

/// Reads the answer to a request of one batch; or what the server says of the whole of it.
pub(super) fn read(body: &[u8]) -> Result<Result<Answer, Problem<'static>>, Error> {
    let malformed =
        |why: &dyn ToString| Error::internal("an answer of the server", why.to_string());
    let Response { baton, results } =
        serde_json::from_slice(body).map_err(|error| malformed(&error))?;
    let first = results.into_iter().next().ok_or_else(|| malformed(&"it is empty"))?;
    if let Some(problem) = first.error {
        return Ok(Err(problem.into_owned()));
    }
    let result = first.response.and_then(|response| response.result);
    let result = result.ok_or_else(|| malformed(&"it has no result"))?;
    let mut errors = result.step_errors.into_iter();
    let steps = result.step_results.into_iter().map(|step| {
        let error = errors.next().flatten();
        match (step, error) {
            (_, Some(problem)) => Ok(Some(Err(problem.into_owned()))),
            (Some(step), None) => rows(step).map(|rows| Some(Ok(rows))),
            (None, None) => Ok(None),
        }
    });
    let steps: Result<_, Error> = steps.collect();
    Ok(Ok(Answer { baton, steps: steps? }))
}

fn rows(step: StepResult<'_>) -> Result<Rows, Error> {
    let row = |cells: Vec<Cell<'_>>| -> Result<Row, Error> {
        let values: Result<Vec<_>, Error> = cells.into_iter().map(cell).collect();
        values.map(Row::new)
    };
    let rows: Result<Vec<_>, Error> = step.rows.into_iter().map(row).collect();
    Ok(Rows { rows: rows?, changed: step.affected_row_count, is_full: false })
}

fn cell(cell: Cell<'_>) -> Result<Value, Error> {
    let malformed = || Error::internal("an answer of the server", "a value is malformed");
    match (cell.kind, cell.value, cell.base64) {
        ("null", ..) => Ok(Value::Null),
        ("integer", Some(number), _) => number.parse().map(Value::Integer).map_err(|_| malformed()),
        ("text", Some(text), _) => Ok(Value::Text(text.into_owned())),
        ("blob", _, Some(text)) => {
            BASE64.decode(text.as_bytes()).map(Value::Blob).map_err(|_| malformed())
        }
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_json_whatever_is_in_it() {
        let params = [
            Value::Integer(i64::MIN),
            Value::Text("a\"b\\\u{1}\u{fffd}\n".to_owned()),
            Value::Blob(vec![0, 255, 7, 9]),
            Value::Null,
        ];
        let mut request = Request::new(Some("b\"a"), 64);
        let begin = request.step(&statement("BEGIN", &[], false), When::Always);
        request.step(&statement("SELECT ?1, 'x'", &params, true), When::Ok(begin));
        request.step(&statement("ROLLBACK", &[], false), When::InTransaction);
        let json: serde_json::Value = serde_json::from_str(&request.and_close()).unwrap();
        assert_eq!(json["baton"], "b\"a");
        let steps = &json["requests"][0]["batch"]["steps"];
        assert_eq!(steps[1]["condition"], serde_json::json!({"type": "ok", "step": 0}));
        let args = &steps[1]["stmt"]["args"];
        assert_eq!(args[0]["value"], i64::MIN.to_string());
        assert_eq!(args[1]["value"], "a\"b\\\u{1}\u{fffd}\n");
        assert_eq!(args[2]["base64"], "AP8HCQ");
        assert_eq!(json["requests"][1]["type"], "close");
    }

    #[test]
    fn an_answer_is_read_step_by_step() {
        let body = br#"{"baton":"x","base_url":null,"results":[{"type":"ok","response":{"type":"batch","result":{
            "step_results":[{"cols":[],"rows":[[{"type":"integer","value":"7"},{"type":"blob","base64":"AP8HCQ=="},
                {"type":"text","value":"a\"b"},{"type":"null"}]],"affected_row_count":3},null,null],
            "step_errors":[null,{"message":"no","code":"SQLITE_BUSY"},null]}}}]}"#;
        let Answer { baton, mut steps } = read(body).unwrap().unwrap();
        assert_eq!((baton.as_deref(), steps.len()), (Some("x"), 3));
        let mut first = steps.remove(0).unwrap().unwrap();
        assert_eq!(first.changed, 3);
        let row = &mut first.rows[0];
        assert_eq!((row.u64().unwrap(), row.blob().unwrap().to_vec()), (7, vec![0, 255, 7, 9]));
        assert_eq!((row.text().unwrap().as_str(), row.i64().unwrap()), ("a\"b", 0));
        assert_eq!(steps.remove(0).unwrap().unwrap_err().code(), "SQLITE_BUSY");
        assert!(steps.remove(0).is_none());
    }

    #[test]
    fn what_is_no_answer_is_an_error_and_never_a_panic() {
        for body in [
            "",
            "{}",
            "null",
            r#"{"baton":null,"results":[]}"#,
            r#"{"baton":null,"results":[{"type":"ok"}]}"#,
        ] {
            assert!(read(body.as_bytes()).is_err(), "{body}");
        }
        let body =
            r#"{"baton":null,"results":[{"type":"error","error":{"message":"m","code":null}}]}"#;
        assert_eq!(read(body.as_bytes()).unwrap().err().unwrap().message, "m");
    }
}
