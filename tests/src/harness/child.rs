//! One child process: what it prints is kept, and it does not outlive its handle.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::wait::eventually;

/// A process that was told to end has so long.
const STOP_MAX: Duration = Duration::from_secs(20);

/// Of what it said, when a test has failed.
pub(super) const TAIL_LINES: usize = 40;

/// A running process of a test.
#[derive(Debug)]
pub struct Child {
    name: String,
    process: std::process::Child,
    /// Closing it tells one of ours to end.
    stdin: Option<ChildStdin>,
    stdout: Lines,
    stderr: Lines,
    status: Option<ExitStatus>,
}

impl Child {
    /// # Panics
    /// It cannot be started.
    pub fn spawn(name: &str, command: &mut Command) -> Self {
        Self::start(name, command.stderr(Stdio::piped()))
    }

    /// The same, with its standard error at the end of a file.
    ///
    /// # Panics
    /// It cannot be started, or the file not be written.
    pub fn spawn_logging(name: &str, command: &mut Command, log: &Path) -> Self {
        let file = fs::OpenOptions::new().create(true).append(true).open(log);
        Self::start(name, command.stderr(file.expect("a folder to write to")))
    }

    fn start(name: &str, command: &mut Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        let stdin = process.stdin.take();
        let stdout = Lines::read(process.stdout.take().expect("it is piped"));
        let stderr = process.stderr.take().map(Lines::read);
        let stderr = stderr.unwrap_or_else(|| Lines::read(std::io::empty()));
        Self { name: name.to_owned(), process, stdin, stdout, stderr, status: None }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// # Panics
    /// It has ended.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// What it printed so far, on standard output.
    pub fn stdout(&self) -> Vec<String> {
        self.stdout.get()
    }

    /// And on standard error.
    pub fn stderr(&self) -> Vec<String> {
        self.stderr.get()
    }

    /// Prints the end of what it said, for whoever reads why a test failed.
    fn tell(&self) {
        let said = self.stderr();
        if said.is_empty() {
            return;
        }
        let tail = &said[said.len().saturating_sub(TAIL_LINES)..];
        eprintln!("--- {} (pid {}) said:\n{}", self.name, self.pid(), tail.join("\n"));
    }

    /// How it ended, if it did.
    pub fn status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.process.try_wait().expect("it is our child");
        }
        self.status
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// It has not within the time.
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let name = self.name.clone();
        let status = eventually(within, &format!("{name} ends"), || {
            self.status().ok_or("that it still runs")
        });
        self.stdout.join();
        self.stderr.join();
        status
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell();
        }
        self.stdin = None;
        if self.status().is_some() {
            return;
        }
        // One that was stopped cannot hear.
        _ = send(self.pid(), Signal::CONT);
        let began = std::time::Instant::now();
        while self.status().is_none() && began.elapsed() < STOP_MAX {
            std::thread::sleep(Duration::from_millis(10));
        }
        if self.status().is_none() {
            eprintln!("{} (pid {}) did not end by itself and is killed", self.name, self.pid());
            _ = self.process.kill();
            _ = self.process.wait();
        }
    }
}

/// The pids of the processes whose environment has this entry, `NAME=value`.
pub fn pids_with_mark(mark: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| has_mark(*pid, mark)).collect()
}

fn has_mark(pid: u32, mark: &str) -> bool {
    // One that is over, or not ours, has none.
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes())
}

pub(super) fn send(pid: u32, signal: Signal) -> Result<(), rustix::io::Errno> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    kill_process(pid, signal)
}

/// Lines of a pipe, read by a thread so that it never fills up.
#[derive(Debug)]
struct Lines {
    lines: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Lines {
    fn read(pipe: impl Read + Send + 'static) -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                sink.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Self { lines, reader: Some(reader) }
    }

    fn get(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Until everything is read. Whoever inherited the pipe has to be over, too.
    fn join(&mut self) {
        if let Some(reader) = self.reader.take() {
            _ = reader.join();
        }
    }
}
