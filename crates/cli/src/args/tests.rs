//! The arguments: what parses, what is refused, and what help says.

use std::sync::{Mutex, MutexGuard, PoisonError};

use clap::{CommandFactory, FromArgMatches};

use super::*;

/// Arguments may come from the environment, which belongs to all tests of this process.
static ENVIRONMENT: Mutex<()> = Mutex::new(());

fn environment() -> MutexGuard<'static, ()> {
    ENVIRONMENT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn parse(line: &str) -> Result<Cli, clap::Error> {
    let _environment = environment();
    Cli::try_parse_from(line.split(' '))
}

#[test]
fn the_arguments_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_has_an_example() {
    fn check(command: &clap::Command) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(help.contains("stagedoor "), "{} has no example", command.get_name());
        command.get_subcommands().for_each(check);
    }
    check(&Cli::command());
}

#[test]
fn every_example_is_a_command_that_parses() {
    fn check(command: &clap::Command) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let line = help.lines().last().unwrap().trim().replace('\'', "");
        parse(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
        command.get_subcommands().for_each(check);
    }
    check(&Cli::command());
}

#[test]
fn every_argument_says_what_it_is() {
    fn check(command: &clap::Command) {
        for arg in command.get_arguments() {
            let (name, id) = (command.get_name(), arg.get_id());
            assert!(arg.get_help().is_some(), "{name}: {id} has no help");
        }
        command.get_subcommands().for_each(check);
    }
    check(&Cli::command());
}

#[test]
#[allow(clippy::result_large_err, reason = "the error type is that of the jail")]
fn an_empty_variable_counts_as_none() {
    let _environment = environment();
    figment::Jail::expect_with(|jail| {
        jail.set_env("STAGEDOOR_CREDENTIALS", "");
        jail.set_env("STAGEDOOR_API", "a:1");
        let matches = without_empty_variables(Cli::command())
            .try_get_matches_from(["stagedoor", "work", "list"])
            .unwrap();
        let cli = Cli::from_arg_matches(&matches).unwrap();
        let connection = cli.command.connection().unwrap();
        assert_eq!(connection.credentials, None);
        assert_eq!(connection.api.as_deref(), Some("a:1"));
        Ok(())
    });
}

#[test]
fn flags_of_a_group_come_before_or_after_its_command() {
    for line in [
        "stagedoor work get w-0-0ff-1 --output json --timeout 5s",
        "stagedoor work --output json --timeout 5s get w-0-0ff-1",
    ] {
        let Command::Work(args) = parse(line).unwrap().command else { panic!("{line}") };
        assert_eq!(args.connection.output, Format::Json);
        assert_eq!(args.connection.deadline(), Duration::from_secs(5));
    }
}

#[test]
fn malformed_ids_are_refused_before_anything_is_sent() {
    for line in [
        "stagedoor work get w-1",
        "stagedoor submit --agent No --key k --text t",
        "stagedoor submit --agent postchain --key k",
        "stagedoor submit --agent postchain --key k --text t --file f",
        "stagedoor submit --agent postchain --key k --text t --tenant A",
        "stagedoor agents get a/b",
        "stagedoor dev --nodes 17",
        "stagedoor dev --nodes 0",
        "stagedoor status --timeout 0",
        "stagedoor capabilities --attribute x",
        "stagedoor work list --limit 0",
        "stagedoor work list --limit 201",
    ] {
        let error = parse(line).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn input_comes_from_a_file_a_text_or_standard_input() {
    for source in ["--file f", "--text t", "-"] {
        parse(&format!("stagedoor submit --agent postchain --key k {source}")).unwrap();
    }
}

#[test]
fn times_have_units() {
    assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
    assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
    assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
    for text in ["", "s", "1h", "-1s", "99999999m", "1.5s"] {
        assert!(duration(text).is_err(), "{text:?}");
    }
}
