//! What a client was told.

use proto::convert::Cursor;
use proto::v1::work_event::Event;
use proto::v1::{Work, WorkEvent};
use serde::{Deserialize, Serialize};

/// How a work ended, as its client was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    pub state: String,
    pub reason: String,
    pub result: String,
    /// Model calls that returned.
    pub calls: i64,
}

impl End {
    pub fn of(work: &Work) -> Self {
        let result = work.result.clone().unwrap_or_default();
        let state = work.state().as_str_name();
        Self {
            state: state.trim_start_matches("WORK_STATE_").to_lowercase(),
            reason: work.reason.clone(),
            result: result.text,
            calls: result.usage.map(|usage| usage.calls).unwrap_or_default(),
        }
    }
}

/// What a client was told of a work that it submitted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    pub work: String,
    pub agent: String,
    pub key: String,
    /// The stream that submitted it, and its place there; none if it was submitted again on another one.
    pub place: Option<(u64, u64)>,
    pub end: Option<End>,
    /// Each event that it was shown, in this order, if it wanted all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<Vec<Shown>>,
}

/// An event of a work as its cursor names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    pub seq: i64,
    pub offset: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub told: i64,
    pub is_step: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<Said>,
}

/// Text, or that it is void from there on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    pub offset: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(told: &i64) -> bool {
    *told == 0
}

impl Shown {
    /// # Panics
    /// An event without a cursor.
    pub fn of(event: &WorkEvent) -> Self {
        let cursor = Cursor::parse(&event.cursor).expect("every event has a cursor");
        let [seq, offset, told] = [cursor.seq, cursor.offset, cursor.told].map(u64::cast_signed);
        let is_step = matches!(event.event, Some(Event::Phase(_) | Event::Step(_)));
        let said = match &event.event {
            Some(Event::Text(said)) => {
                Some(Said { offset: said.offset, text: Some(said.text.clone()) })
            }
            Some(Event::Superseded(void)) => Some(Said { offset: void.offset, text: None }),
            Some(
                Event::StateChange(_)
                | Event::Phase(_)
                | Event::Step(_)
                | Event::Reset(_)
                | Event::Result(_),
            )
            | None => None,
        };
        Self { seq, offset, told, is_step, said }
    }

    pub(super) fn place(&self) -> (i64, i64, i64) {
        (self.seq, self.offset, self.told)
    }
}
