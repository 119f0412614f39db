//! The shipped program under another name, so that tests run what cargo has just built.
//!
//! With `faults` as its first word it runs a cluster of itself under random faults.

use std::process::ExitCode;

use clap::Parser;
use tests::faults::{self, Options};
use tests::harness::Program;

fn main() -> ExitCode {
    if std::env::args().nth(1).is_none_or(|word| word != "faults") {
        return cli::main();
    }
    let options = Options::parse_from(std::env::args().skip(1));
    let program = std::env::current_exe().expect("this program is a file");
    let program = program.into_os_string().into_string().expect("a path in UTF-8");
    let report = match faults::run(Program(program.leak()), &options) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    eprint!("{report}");
    if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
