//! The program under test, and one run of it.

use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::{Child, PATIENCE};

/// The longest a command may take, its own deadline of 30 s included.
const RUN_MAX: Duration = Duration::from_secs(90);

/// Where the program is: `env!("CARGO_BIN_EXE_stagedoor-under-test")` of the test that uses it.
#[derive(Clone, Copy, Debug)]
pub struct Program(pub &'static str);

impl Program {
    /// Without what the environment of the developer says about clusters.
    pub fn command(self) -> Command {
        Self::cleaned(Command::new(self.0))
    }

    /// The same, run by another program that is told so by its last argument.
    pub fn command_of(self, mut runner: Command) -> Command {
        runner.arg(self.0);
        Self::cleaned(runner)
    }

    fn cleaned(mut command: Command) -> Command {
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("STAGEDOOR_") {
                command.env_remove(name);
            }
        }
        command
    }

    /// Runs it to its end, without input.
    ///
    /// # Panics
    /// It takes too long.
    pub fn run<S: AsRef<OsStr>>(self, args: &[S]) -> Output {
        Output::of(self.command().args(args))
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Output {
    /// None if a signal ended it.
    pub code: Option<i32>,
    pub stdout: Vec<String>,
    pub stderr: String,
}

impl Output {
    /// Runs a command to its end, without input.
    ///
    /// # Panics
    /// It takes too long.
    pub fn of(command: &mut Command) -> Self {
        let mut child = Child::spawn("command", command);
        child.close_stdin();
        let code = child.wait(RUN_MAX.max(PATIENCE)).code();
        Self { code, stdout: child.stdout(), stderr: child.stderr().join("\n") }
    }

    /// Each line of the output, as JSON.
    ///
    /// # Panics
    /// It did not end well, or a line is no JSON.
    pub fn documents(&self) -> Vec<Value> {
        assert_eq!(self.code, Some(0), "{self}");
        self.lines()
    }

    /// The same, however it ended.
    ///
    /// # Panics
    /// A line is no JSON.
    pub fn lines(&self) -> Vec<Value> {
        let parse = |line: &String| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
        };
        self.stdout.iter().map(parse).collect()
    }

    /// The one document of the output.
    ///
    /// # Panics
    /// It did not end well, or printed something else.
    pub fn document(&self) -> Value {
        let mut documents = self.documents();
        assert_eq!(documents.len(), 1, "{self}");
        documents.remove(0)
    }

    /// That it ended with this code, after an error in one line that has all these parts.
    ///
    /// # Panics
    /// It did not.
    pub fn assert_error(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self}");
        let error = self.stderr.trim();
        assert!(!error.is_empty(), "it gave no reason");
        let missing: Vec<_> = parts.iter().filter(|part| !error.contains(**part)).collect();
        assert!(missing.is_empty(), "{missing:?} is missing in {error}");
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let stdout = self.stdout.join("\n");
        write!(f, "exit code {:?}\nstdout: {stdout}\nstderr: {}", self.code, self.stderr)
    }
}
