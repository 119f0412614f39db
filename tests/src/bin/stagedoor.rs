//! The shipped program under another name, so that tests run what cargo has just built.

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
