//! Which tools a process has.

use std::path::PathBuf;

use serde::Deserialize;

/// The tools of one node. Tools that are not named here are there always.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The counting tool, for tests of what happens once. Unset: not offered.
    pub count: Option<CountConfig>,
}

/// See [`crate::Count`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CountConfig {
    /// One line a call is added to it, and one for each call of which it says that it was not made.
    pub file: PathBuf,
    /// Whether it says what became of a call when it is asked. Without it nobody knows.
    #[serde(default)]
    pub reconcile: bool,
    /// How long it waits with its answer after the line is written, in milliseconds.
    #[serde(default)]
    pub delay_ms: u64,
    /// How long it waits before the line is written, in milliseconds.
    #[serde(default)]
    pub delay_before_ms: u64,
}
