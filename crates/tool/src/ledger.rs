//! The file of the counting tool: who called it, and up to which attempt calls are refused.
//!
//! Lines are only added, so their order says what happened: a call counts unless a line before it is about a later attempt
//! of the same key. A lock would not do: a process that is stopped while it holds one would stop the others too.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use crate::Call;

/// A call that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Called {
    pub key: String,
    pub epoch: u64,
    pub attempt: u32,
    /// When, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Whether it counts: nobody had called a later attempt before, or been told that this one was not made.
    pub is_made: bool,
}

impl Called {
    fn is_of(&self, call: &Call) -> bool {
        self.key == call.idempotency_key
            && (self.epoch, self.attempt) == (call.epoch.0, call.attempt)
    }
}

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Call,
    /// This attempt and those before it do not count from here on.
    Fence,
}

impl Mark {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Fence => "fence",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Call, Self::Fence].into_iter().find(|mark| mark.as_str() == text)
    }
}

/// The calls in the text of such a file, in their order. Lines that are none are left out.
pub fn calls(text: &str) -> Vec<Called> {
    let mut latest: HashMap<String, (u64, u32, Mark)> = HashMap::new();
    let mut calls = Vec::new();
    for (called, mark) in text.lines().filter_map(parse) {
        let at = (called.epoch, called.attempt);
        let known = latest.get(&called.key).copied();
        // The same attempt twice is what must not happen, and counts.
        let is_late = known.is_some_and(|(epoch, attempt, mark)| match mark {
            Mark::Call => at < (epoch, attempt),
            Mark::Fence => at <= (epoch, attempt),
        });
        if !is_late {
            latest.insert(called.key.clone(), (called.epoch, called.attempt, mark));
        }
        if mark == Mark::Call {
            calls.push(Called { is_made: !is_late, ..called });
        }
    }
    calls
}

fn parse(line: &str) -> Option<(Called, Mark)> {
    let mut words = line.split(' ');
    let called = Called {
        key: words.next()?.to_owned(),
        epoch: words.next()?.parse().ok()?,
        attempt: words.next()?.parse().ok()?,
        time_ms: words.next()?.parse().ok()?,
        is_made: false,
    };
    let mark = Mark::parse(words.next()?)?;
    words.next().is_none().then_some((called, mark))
}

/// Adds a line, durably. One write with O_APPEND is never mixed with another process's. It begins with an end of line: what a
/// full disk left of the line before must not swallow this one.
pub(crate) fn add(path: &Path, call: &Call, mark: Mark, now_ms: u128) -> io::Result<()> {
    let Call { idempotency_key: key, epoch, attempt, .. } = call;
    let line = format!("\n{key} {} {attempt} {now_ms} {}\n", epoch.0, mark.as_str());
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(line.as_bytes())?;
    file.sync_all()
}

/// How many calls counted up to this one, or `None` if it does not count.
pub(crate) fn number(path: &Path, call: &Call) -> io::Result<Option<usize>> {
    Ok(position(&read(path)?, |called| called.is_of(call)))
}

/// How many calls counted up to the first of a key, or `None` if there is none.
pub(crate) fn number_of_key(path: &Path, key: &str) -> io::Result<Option<usize>> {
    Ok(position(&read(path)?, |called| called.key == key))
}

fn position(text: &str, is_it: impl Fn(&Called) -> bool) -> Option<usize> {
    let made = calls(text).into_iter().filter(|called| called.is_made);
    let index = made.map(|called| is_it(&called)).position(|it| it)?;
    Some(index + 1)
}

fn read(path: &Path) -> io::Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(text: &str) -> Vec<bool> {
        calls(text).into_iter().map(|called| called.is_made).collect()
    }

    #[test]
    fn a_call_counts_unless_a_later_attempt_was_before_it() {
        assert_eq!(made("a 1 1 0 call\nb 1 1 0 call\n"), [true, true]);
        assert_eq!(made("a 1 1 0 call\na 2 2 0 call\n"), [true, true], "one after the other");
        assert_eq!(made("a 2 2 0 call\na 1 1 0 call\n"), [true, false], "an owner of before");
        assert_eq!(made("a 1 2 0 call\na 1 1 0 call\n"), [true, false], "an attempt of before");
        assert_eq!(made("a 1 1 0 call\na 1 1 0 call\n"), [true, true], "the same one twice");
    }

    #[test]
    fn what_was_said_not_to_be_made_does_not_count_later() {
        assert_eq!(made("a 2 1 0 fence\na 1 1 0 call\n"), [false], "an owner of before");
        assert_eq!(made("a 1 1 0 fence\na 1 1 0 call\n"), [false], "the attempt itself");
        assert_eq!(made("a 2 1 0 fence\na 2 2 0 call\n"), [true], "the next attempt");
        assert_eq!(made("a 2 1 0 fence\nb 1 1 0 call\n"), [true], "another key");
        assert_eq!(made("a 1 1 0 call\na 2 1 0 fence\n"), [true], "it was made before");
        assert_eq!(made("a 2 1 0 fence\na 1 1 0 fence\na 2 1 0 call\n"), [false], "the latest");
    }

    #[test]
    fn what_is_no_line_is_left_out() {
        assert_eq!(calls("a 1 1 0\na one 1 0 call\na 1 1 0 call more\na 1 1 0 cull\n\n"), []);
    }
}
