//! The command line: the roles `store`, `control` and `node`, `dev` and `demo` that start them all, and the client
//! commands.
//!
//! Reads arguments and files, calls one thing, prints what came of it. Never decides anything about the cluster, and
//! never speaks to it but through `client`.

mod args;
mod command;
mod credentials;
mod demo;
mod dev;
mod exit;
mod output;
mod role;
mod signal;

use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};

use args::{Cli, Command, Connection, RoleArgs, StoreArgs, StoreCommand};
use exit::{Exit, Failure};

/// Of all roles. With the allocator of glibc 15 % of the processor time of a takeover was spent in it (`perf`, bench
/// `failover`); the price is memory: 14.0 KB an idle agent instead of 12.6 (bench `memory`).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long what still runs on other threads may hold up the end of the process.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// Runs the program that the arguments of this process ask for.
pub fn main() -> ExitCode {
    let mut command = args::without_empty_variables(Cli::command());
    let matches = command.try_get_matches_from_mut(std::env::args_os());
    let cli = matches.and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match cli.map_err(|error| error.format(&mut command)) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let outcome = run(cli);
    let exit = outcome.unwrap_or_else(|failure| {
        failure.print();
        failure.exit
    });
    exit.into()
}

fn usage(error: &clap::Error) -> ExitCode {
    // Nobody reads what cannot be written.
    _ = error.print();
    let was_asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    let exit = if was_asked_for { Exit::Ok } else { Exit::Usage };
    exit.into()
}

fn run(cli: Cli) -> Result<Exit, Failure> {
    net::install_crypto_provider();
    let _telemetry = cli.command.connection().map(trace).transpose()?;
    match cli.command {
        Command::Store(StoreArgs { command: Some(StoreCommand::Backup(args)), .. }) => {
            block_on(command::store::backup(args))
        }
        Command::Store(StoreArgs {
            command: Some(StoreCommand::Restore { name, config, output }),
            ..
        }) => command::store::restore(&name, &config, output),
        Command::Store(StoreArgs { role, .. }) => {
            run_role::<role::StoreRole>(&role.expect("it is required without a subcommand"))
        }
        Command::Control(args) => run_role::<role::ControlRole>(&args),
        Command::Node(args) => run_role::<role::NodeRole>(&args),
        Command::Pki(command) => command::pki::run(command),
        Command::Dev(args) => block_on(dev::run(args)),
        Command::Demo(args) => block_on(demo::run(args)),
        Command::Submit(args) => block_on(command::work::submit(args)),
        Command::Work(args) => block_on(command::work::run(args)),
        Command::Definitions(args) => block_on(command::agent::definitions(args)),
        Command::Apply(args) => block_on(command::agent::apply(args)),
        Command::Agents(args) => block_on(command::agent::run(args)),
        Command::Nodes(args) => block_on(command::cluster::nodes(args)),
        Command::Shards(args) => block_on(command::cluster::shards(args)),
        Command::Capabilities(args) => block_on(command::cluster::capabilities(args)),
        Command::Status(args) => block_on(command::cluster::status(args)),
        Command::Why(args) => block_on(command::cluster::why(args)),
        Command::Cordon(args) => block_on(command::cluster::cordon(args)),
        Command::Uncordon(args) => block_on(command::cluster::uncordon(args)),
        Command::Release(args) => block_on(command::cluster::release(args)),
        Command::Drain(args) => block_on(command::cluster::drain(args)),
    }
}

/// Exports the traces of a client command, if that was asked for. The commands themselves say what there is to say:
/// nothing is logged below a warning.
fn trace(connection: &Connection) -> Result<Option<telemetry::Guard>, Failure> {
    let Some(endpoint) = &connection.otlp_endpoint else { return Ok(None) };
    let config = telemetry::Config {
        otlp_endpoint: Some(endpoint.clone()),
        log_filter: "warn".to_owned(),
        ..telemetry::Config::default()
    };
    let service = telemetry::Service { role: "client".to_owned(), name: "cli".to_owned() };
    let guard = telemetry::init(&config, &service);
    guard.map(Some).map_err(|error| Failure::usage(exit::chain(&error)))
}

fn run_role<R: role::Role>(args: &RoleArgs) -> Result<Exit, Failure> {
    let config = role::load::<R>(&args.config)?;
    if args.check_config {
        return Ok(Exit::Ok);
    }
    role::run::<R>(config, args.stdin_guard)
}

fn block_on(work: impl Future<Output = Result<Exit, Failure>>) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::other("cannot start a runtime").why(error))?;
    // On the heap: the futures of the commands differ much in size.
    let outcome = runtime.block_on(Box::pin(work));
    runtime.shutdown_timeout(LAST_WAIT);
    outcome
}
