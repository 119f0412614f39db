//! What can be asked for at the command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::Resettable;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use domain::{AgentId, AgentKey, DefinitionHash, DefinitionName, IdempotencyKey, ProcessName};
use domain::{Role, Tenant, TrustDomain, WorkId, WorkState};

/// Runs AI agents as durable actors on a cluster of mutually authenticated machines.
#[derive(Debug, Parser)]
#[command(name = "stagedoor", version, after_help = example("stagedoor demo README.md"))]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the store of a cluster, the only process that opens database files; or back it up, or restore it
    #[command(after_help = example("stagedoor store --config store-1.toml"))]
    Store(StoreArgs),
    /// Run a control process: the gRPC API, membership, placement
    #[command(after_help = example("stagedoor control --config control-1.toml"))]
    Control(RoleArgs),
    /// Run a node: the agents
    #[command(after_help = example("stagedoor node --config node-1.toml --check-config"))]
    Node(RoleArgs),
    /// Run a whole cluster on this machine: store, control and nodes, over mutual TLS
    #[command(after_help = example("stagedoor dev --nodes 3"))]
    Dev(DevArgs),
    /// Start a cluster, send a text through the PostChain, show each phase, stop
    #[command(after_help = example("stagedoor demo README.md"))]
    Demo(DemoArgs),
    /// Submit one work to an agent
    #[command(after_help = example("stagedoor submit --agent postchain --key report-7 --file report.txt --watch"))]
    Submit(SubmitArgs),
    /// Look at works, follow, cancel or resolve them
    #[command(after_help = example("stagedoor work get w-0-2a1-3c"))]
    Work(WorkArgs),
    /// List the definitions of agents, or show one
    #[command(after_help = example("stagedoor definitions"))]
    Definitions(DefinitionsArgs),
    /// Store a definition of an agent from a TOML file
    #[command(after_help = example("stagedoor apply -f summary.toml"))]
    Apply(ApplyArgs),
    /// List agents, show one, or read its journal
    #[command(after_help = example("stagedoor agents history default/postchain/report-7"))]
    Agents(AgentsArgs),
    /// List the nodes
    #[command(after_help = example("stagedoor nodes"))]
    Nodes(OnlyConnection),
    /// List the shards and who owns them
    #[command(after_help = example("stagedoor shards --output json"))]
    Shards(OnlyConnection),
    /// List what the processes of the cluster offer
    #[command(after_help = example("stagedoor capabilities 'phase/*' --attribute modality=text"))]
    Capabilities(CapabilitiesArgs),
    /// Show the whole cluster at a glance
    #[command(after_help = example("stagedoor status"))]
    Status(OnlyConnection),
    /// Keep new shards from a node; what it has it keeps
    #[command(after_help = example("stagedoor cordon node-2"))]
    Cordon(NodeArgs),
    /// Let a node have shards again
    #[command(after_help = example("stagedoor uncordon node-2"))]
    Uncordon(NodeArgs),
    /// Let a node hand everything over and end
    #[command(after_help = example("stagedoor drain node-2"))]
    Drain(NodeArgs),
    /// Give a shard an owner again that was stopped because its store lost what was acknowledged
    #[command(after_help = example("stagedoor release 3"))]
    Release(ReleaseArgs),
    /// Explain why a work, agent, shard, node or leader is as it is
    #[command(after_help = example("stagedoor why shard 7"))]
    Why(WhyArgs),
    /// Make and read certificates
    #[command(subcommand, after_help = example("stagedoor pki init --dir pki"))]
    Pki(PkiCommand),
}

impl Command {
    /// How to reach the cluster, of a client command.
    pub(crate) fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Submit(args) => Some(&args.connection),
            Self::Work(args) => Some(&args.connection),
            Self::Definitions(args) => Some(&args.connection),
            Self::Apply(args) => Some(&args.connection),
            Self::Agents(args) => Some(&args.connection),
            Self::Capabilities(args) => Some(&args.connection),
            Self::Why(args) => Some(&args.connection),
            Self::Cordon(args) | Self::Uncordon(args) | Self::Drain(args) => Some(&args.connection),
            Self::Release(args) => Some(&args.connection),
            Self::Nodes(args) | Self::Shards(args) | Self::Status(args) => Some(&args.connection),
            Self::Store(StoreArgs { command: Some(StoreCommand::Backup(args)), .. }) => {
                Some(&args.connection)
            }
            Self::Store(_)
            | Self::Control(_)
            | Self::Node(_)
            | Self::Dev(_)
            | Self::Demo(_)
            | Self::Pki(_) => None,
        }
    }
}

/// The command as if no variable were set that is empty.
pub(crate) fn without_empty_variables(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|arg| {
        let value = arg.get_env().and_then(std::env::var_os);
        if value.is_some_and(|value| value.is_empty()) { arg.env(Resettable::Reset) } else { arg }
    });
    command.mut_subcommands(without_empty_variables)
}

fn example(line: &str) -> String {
    format!("Example:\n  {line}")
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct StoreArgs {
    #[command(subcommand)]
    pub(crate) command: Option<StoreCommand>,
    #[command(flatten)]
    pub(crate) role: Option<RoleArgs>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Copy every database into the folder `backups` of the store's data directory, while the cluster works
    #[command(after_help = example("stagedoor store backup nightly"))]
    Backup(BackupArgs),
    /// Put a backup in the place of what the store has; the store must not run
    #[command(after_help = example("stagedoor store restore nightly --config store-1.toml"))]
    Restore {
        /// As `store backup` named it
        #[arg(value_name = "NAME")]
        name: String,
        /// The config of the store
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
        /// How to print the result
        #[arg(long, value_enum, default_value_t)]
        output: Format,
    },
}

#[derive(Debug, Args)]
pub(crate) struct BackupArgs {
    /// What to call it [default: made from the time]
    #[arg(value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct RoleArgs {
    /// The TOML file with the config; variables such as STAGEDOOR_NODE__NAME come after it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Read the config, say what is wrong with it, and end
    #[arg(long)]
    pub(crate) check_config: bool,
    /// End when standard input closes
    #[arg(long, hide = true)]
    pub(crate) stdin_guard: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DevArgs {
    /// Where everything is kept, made if missing [default: $XDG_DATA_HOME/stagedoor/dev]
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) nodes: u16,
    /// How many control replicas: one leads, the others serve the API and stand by
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=5))]
    pub(crate) controls: u16,
    /// Where the gRPC API of the first replica listens: on 127.0.0.1 only; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7700")]
    pub(crate) api: SocketAddr,
    /// Start a process again when it has died
    #[arg(long)]
    pub(crate) restart: bool,
    #[command(flatten)]
    pub(crate) store: DevStoreArgs,
    /// How to say that it is ready
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Format,
    /// End when standard input closes
    #[arg(long, hide = true)]
    pub(crate) stdin_guard: bool,
}

/// A database server in place of the store process.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Store")]
pub(crate) struct DevStoreArgs {
    /// Keep everything in this sqld or Turso Cloud, e.g. http://127.0.0.1:8080, and start no store process
    #[arg(long = "store", value_name = "URL", id = "store_url")]
    pub(crate) url: Option<String>,
    /// Its admin API, by which missing databases are made, e.g. http://127.0.0.1:8081
    #[arg(long = "store-admin", value_name = "URL", id = "store_admin", requires = "store_url")]
    pub(crate) admin_url: Option<String>,
    /// The file with the token (a JWT) that it asks for
    #[arg(long = "store-token-file", value_name = "FILE", id = "store_token_file")]
    #[arg(requires = "store_url")]
    pub(crate) token_file: Option<PathBuf>,
    /// The file with the key of its admin API
    #[arg(long = "store-admin-token-file", value_name = "FILE", id = "store_admin_token_file")]
    #[arg(requires = "store_admin")]
    pub(crate) admin_token_file: Option<PathBuf>,
    /// What the names of the databases begin with
    #[arg(long = "store-prefix", value_name = "TEXT", id = "store_prefix")]
    #[arg(requires = "store_url")]
    pub(crate) prefix: Option<String>,
    /// Do not ask the server whether it flushes its commits: you vouch for it
    #[arg(long = "store-trusted", id = "store_trusted", requires = "store_url")]
    pub(crate) trusted: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// The text to work on
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// How to show what happens
    #[arg(long, value_enum, default_value_t)]
    pub(crate) output: Format,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Text,
    /// One JSON document a line
    Json,
}

/// What all client commands share.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct Connection {
    /// Addresses of API servers, host:port, separated by commas, tried in turn
    #[arg(long, value_name = "ADDRS", env = "STAGEDOOR_API", global = true)]
    pub(crate) api: Option<String>,
    /// The folder with client.crt, client.key and ca.crt [default: that of `stagedoor dev`]
    #[arg(long, value_name = "DIR", env = "STAGEDOOR_CREDENTIALS", global = true)]
    pub(crate) credentials: Option<PathBuf>,
    /// How long to wait, e.g. 500ms, 30s or 5m [default: 30s; `work watch` waits for the end]. Of a submit also the deadline
    /// of its work, which fails then
    #[arg(long, value_name = "TIME", value_parser = duration, global = true)]
    pub(crate) timeout: Option<Duration>,
    /// How to print the result
    #[arg(long, value_enum, default_value_t, global = true)]
    pub(crate) output: Format,
    /// Send a trace of this call there, as OTLP over plain gRPC, e.g. http://127.0.0.1:4317
    #[arg(long, value_name = "URL", env = "STAGEDOOR_OTLP_ENDPOINT", global = true)]
    #[arg(hide_short_help = true)]
    pub(crate) otlp_endpoint: Option<String>,
}

const DEADLINE: Duration = Duration::from_secs(30);

impl Connection {
    /// For one call.
    pub(crate) fn deadline(&self) -> Duration {
        self.timeout.unwrap_or(DEADLINE)
    }
}

/// The tenant, where a command needs one.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct Owner {
    /// Whose agents, works and definitions
    #[arg(long, default_value = "default", global = true)]
    pub(crate) tenant: Tenant,
}

#[derive(Debug, Args)]
pub(crate) struct OnlyConnection {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct ReleaseArgs {
    /// The number of the shard, as `stagedoor shards` shows it
    #[arg(value_name = "SHARD")]
    pub(crate) shard: u16,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// The name of the node, as `stagedoor nodes` shows it
    #[arg(value_name = "NODE")]
    pub(crate) name: ProcessName,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true))]
pub(crate) struct SubmitArgs {
    /// The name of the agent's definition; `postchain` is built in
    #[arg(long, value_name = "NAME")]
    pub(crate) agent: DefinitionName,
    /// Which agent of that definition; it is made when it is first addressed
    #[arg(long)]
    pub(crate) key: AgentKey,
    /// Read the input from a file
    #[arg(long, value_name = "FILE", group = "source")]
    pub(crate) file: Option<PathBuf>,
    /// The input itself
    #[arg(long, group = "source")]
    pub(crate) text: Option<String>,
    /// Read the input from standard input
    #[arg(value_name = "-", value_parser = ["-"], group = "source")]
    pub(crate) stdin: Option<String>,
    /// Names this submit: sent again under the same key it is the same work
    #[arg(long, value_name = "KEY")]
    pub(crate) idempotency_key: Option<IdempotencyKey>,
    /// Another version of the definition than the newest
    #[arg(long, value_name = "HASH")]
    pub(crate) definition_hash: Option<DefinitionHash>,
    /// Follow the work until it ends, one event a line
    #[arg(long)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) owner: Owner,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct WorkArgs {
    #[command(subcommand)]
    pub(crate) command: WorkCommand,
    #[command(flatten)]
    pub(crate) owner: Owner,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum WorkCommand {
    /// Show one work with its steps
    #[command(after_help = example("stagedoor work get w-0-2a1-3c"))]
    Get {
        /// As `submit` and `work list` show it
        id: WorkId,
    },
    /// List works, newest first
    #[command(after_help = example("stagedoor work list --agent default/postchain/report-7"))]
    List {
        /// Of this agent only: tenant/name/key
        #[arg(long, value_name = "ID")]
        agent: Option<AgentId>,
        /// At most this many
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=200))]
        limit: u32,
        /// Only works in this state, e.g. in_doubt; one that is not final
        #[arg(long, value_name = "STATE")]
        state: Option<WorkState>,
    },
    /// Follow a work until it ends
    #[command(after_help = example("stagedoor work watch w-0-2a1-3c"))]
    Watch {
        /// As `submit` and `work list` show it
        id: WorkId,
        /// Go on after this event
        #[arg(long, default_value = "")]
        cursor: String,
    },
    /// Say what became of a step in doubt, so that its work goes on or ends
    #[command(after_help = example("stagedoor work signal w-0-2a1-3c --done '42'"))]
    #[command(group = ArgGroup::new("resolution").required(true))]
    Signal {
        /// As `submit` and `work list` show it
        id: WorkId,
        /// It was done, and this is what it came to
        #[arg(long, value_name = "TEXT", group = "resolution")]
        done: Option<String>,
        /// Run it again, under the same idempotency key
        #[arg(long, group = "resolution")]
        retry: bool,
        /// Let the work fail
        #[arg(long, group = "resolution")]
        fail: bool,
        /// Only if the step in doubt has this number or name
        #[arg(long, value_name = "STEP")]
        step: Option<String>,
        /// Only if this attempt of it is in doubt. Without it, the one that is when this command looks
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
        attempt: Option<i32>,
    },
    /// Ask for a work to be cancelled
    #[command(after_help = example("stagedoor work cancel w-0-2a1-3c"))]
    Cancel {
        /// As `submit` and `work list` show it
        id: WorkId,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DefinitionsArgs {
    /// Show the newest version of this one
    pub(crate) name: Option<DefinitionName>,
    /// Show this version of it
    #[arg(long, requires = "name")]
    pub(crate) hash: Option<DefinitionHash>,
    #[command(flatten)]
    pub(crate) owner: Owner,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// The TOML file: name, behaviour, model, instructions, phases, cycles_max, modality, attempts_max, tools, rounds_max, in_doubt
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) owner: Owner,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct AgentsArgs {
    #[command(subcommand)]
    pub(crate) command: Option<AgentsCommand>,
    #[command(flatten)]
    pub(crate) owner: Owner,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AgentsCommand {
    /// List the agents of the tenant
    #[command(after_help = example("stagedoor agents list"))]
    List,
    /// Show one agent
    #[command(after_help = example("stagedoor agents get default/postchain/report-7"))]
    Get {
        /// tenant/name/key
        id: AgentId,
    },
    /// Read the journal of an agent, newest entry first
    #[command(after_help = example("stagedoor agents history default/postchain/report-7 --limit 20"))]
    History {
        /// tenant/name/key
        id: AgentId,
        /// At most this many entries; 0 for all
        #[arg(long, default_value_t = 0)]
        limit: u32,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CapabilitiesArgs {
    /// Of this name; a trailing * takes every name that begins so [default: all]
    #[arg(default_value = "", hide_default_value = true)]
    pub(crate) name: String,
    /// Of this version or a later one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) version_min: u16,
    /// With this attribute; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = attribute)]
    pub(crate) attribute: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct WhyArgs {
    /// Of what
    pub(crate) kind: Kind,
    /// A work id, tenant/name/key of an agent, number of a shard, or name of a node
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// What can be explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    Work,
    Agent,
    Shard,
    Node,
    /// A control replica, by its name
    Leader,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a CA
    #[command(after_help = example("stagedoor pki init --dir pki"))]
    Init {
        /// Where ca.crt and ca.key go
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// What all its certificates belong to
        #[arg(long, default_value = "stagedoor.local")]
        trust_domain: TrustDomain,
    },
    /// Issue a key and a certificate, in place of earlier ones of the same process
    #[command(after_help = example("stagedoor pki issue --dir pki --role client --name ann --out ann"))]
    Issue {
        /// The folder of the CA
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// store, control, node or client
        #[arg(long)]
        role: Role,
        /// Which process of that role
        #[arg(long)]
        name: ProcessName,
        /// Where the certificate, its key and ca.crt go [default: the folder of the CA]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// For how long it is valid
        #[arg(long, default_value_t = 90, value_parser = clap::value_parser!(u64).range(1..=3650))]
        days: u64,
    },
    /// Show what a certificate says
    #[command(after_help = example("stagedoor pki show ann/client.crt"))]
    Show {
        /// A certificate in PEM
        file: PathBuf,
    },
}

fn duration(text: &str) -> Result<Duration, String> {
    let allowed = || format!("{text:?} is no time: a number with ms, s or m is allowed, e.g. 30s");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let count: u64 = digits.parse().map_err(|_| allowed())?;
    let duration = match &text[digits.len()..] {
        "ms" => Duration::from_millis(count),
        "s" | "" => Duration::from_secs(count),
        "m" => Duration::from_secs(count.saturating_mul(60)),
        _ => return Err(allowed()),
    };
    const MAX: Duration = Duration::from_secs(7 * 24 * 60 * 60);
    match Duration::ZERO < duration && duration <= MAX {
        true => Ok(duration),
        false => Err(format!("{text:?} is out of range: 1 ms to 7 days is allowed")),
    }
}

fn attribute(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is no attribute: NAME=VALUE is allowed")),
    }
}

#[cfg(test)]
mod tests;
