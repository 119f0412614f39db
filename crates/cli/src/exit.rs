//! How the program ends, and what it says when it does not end well: one line with what failed, why, and what to do.

use std::error::Error as StdError;
use std::fmt;
use std::process::ExitCode;

use client::Error;
use domain::{ErrorKind, Reason};

/// The exit codes, which scripts rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Ok = 0,
    /// The work did not succeed; of a role: anything that is none of the others.
    Failed = 1,
    /// Usage or config.
    Usage = 2,
    /// The cluster was not reached.
    NotReached = 3,
    /// The cluster said no.
    Refused = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What is printed when it does not end well.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    what: String,
    why: Option<String>,
    remedy: Option<String>,
    is_logged: bool,
}

impl Failure {
    fn new(exit: Exit, what: impl fmt::Display) -> Self {
        Self { exit, what: what.to_string(), why: None, remedy: None, is_logged: false }
    }

    /// The caller has to change arguments or files.
    pub(crate) fn usage(what: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, what)
    }

    /// None of the others.
    pub(crate) fn other(what: impl fmt::Display) -> Self {
        Self::new(Exit::Failed, what)
    }

    pub(crate) fn why(self, why: impl fmt::Display) -> Self {
        Self { why: Some(why.to_string()), ..self }
    }

    pub(crate) fn remedy(self, remedy: impl fmt::Display) -> Self {
        Self { remedy: Some(remedy.to_string()), ..self }
    }

    /// It is in the log already, which goes where this would be printed.
    pub(crate) fn logged(self) -> Self {
        Self { is_logged: true, ..self }
    }

    pub(crate) fn print(&self) {
        if !self.is_logged {
            eprintln!("{self}");
        }
    }

    /// What failed, why, and what to do.
    pub(crate) fn text(&self) -> String {
        let mut line = self.what.clone();
        if let Some(why) = &self.why {
            line += ": ";
            line += why;
        }
        if let Some(remedy) = &self.remedy {
            line += "; ";
            line += remedy;
        }
        let words: Vec<_> = line.split_whitespace().collect();
        words.join(" ")
    }

    /// Of a call about one of what `command` lists.
    pub(crate) fn of_one(error: Error, command: &str) -> Self {
        let is_missing = error.is_refusal() && error.kind() == ErrorKind::NotFound;
        let remedy = format!("check the name; `{command}` shows what there is");
        let failure = Self::from(error);
        if is_missing && failure.remedy.is_some() { failure.remedy(remedy) } else { failure }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.text())
    }
}

/// An error and its sources in one line, without what merely repeats.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let part = source.to_string();
        if !text.contains(&part) {
            text += ": ";
            text += &part;
        }
        next = source.source();
    }
    text
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match &error {
            Error::NoCredentials { .. } => Self::usage(&error).remedy(
                "start a cluster with `stagedoor dev`, or name an existing folder with --credentials",
            ),
            Error::Credentials { .. } => Self::usage(chain(&error))
                .remedy("issue credentials with `stagedoor pki issue --role client`"),
            Error::File { .. } => {
                Self::usage(chain(&error)).remedy("name the addresses with --api HOST:PORT")
            }
            Error::NoAddress { .. } => Self::usage(&error).remedy("name one with --api"),
            Error::Address { .. } => Self::usage(&error).remedy("correct --api"),
            Error::NotReached { source, .. } => {
                let source: &(dyn StdError + 'static) = source.as_ref();
                let found = net::Error::find(source);
                let why = found.map_or_else(|| chain(source), |e| chain(e));
                let is_foreign = found.is_some_and(|error| error.kind() == ErrorKind::Denied);
                let remedy = match is_foreign {
                    true => "name the credentials of this cluster with --credentials, or correct --api",
                    false => "check that it runs, and --api and --credentials",
                };
                Self::new(Exit::NotReached, format!("cluster not reached: {error}"))
                    .why(why)
                    .remedy(remedy)
            }
            Error::Deadline { .. } => Self::new(Exit::NotReached, &error)
                .remedy("check that the cluster is well, or wait longer with --timeout"),
            Error::Refused { reason, .. } => refusal(&error, *reason),
            Error::Answer { .. } => Self::new(Exit::Refused, &error),
            Error::TagInUse { .. } | Error::Ended => Self::other(&error),
        }
    }
}

fn refusal(error: &Error, reason: Option<Reason>) -> Failure {
    let message = error.to_string();
    let field = error.field().filter(|field| !names(&message, field));
    let text = field.map_or_else(|| message.clone(), |field| format!("{field}: {message}"));
    let text = match reason {
        Some(reason) => format!("refused by the cluster ({reason}): {text}"),
        None => format!("refused by the cluster: {text}"),
    };
    let failure = Failure::new(Exit::Refused, text);
    // Many texts of the cluster name the remedy themselves.
    if message.contains("; ") || message.contains(": use ") {
        return failure;
    }
    failure.remedy(match error.kind() {
        ErrorKind::Invalid => "correct it and try again",
        ErrorKind::NotFound => {
            "check the name; `stagedoor definitions` and `stagedoor work list` show what there is"
        }
        ErrorKind::Conflict => "use another name or key, or what was sent under it before",
        ErrorKind::Denied => {
            "use a client certificate of this cluster, see `stagedoor pki issue --help`"
        }
        ErrorKind::Exhausted => "try again when there is less to do",
        ErrorKind::Deadline => "allow more time with --timeout",
        ErrorKind::Fenced | ErrorKind::Unavailable => {
            "try again; `stagedoor status` shows what is missing"
        }
        ErrorKind::Internal => "look into the logs of the control process",
    })
}

/// Whether a text begins with the name of a field, such as `cycles_max` of `definition.cycles_max`.
fn names(message: &str, field: &str) -> bool {
    let name = field.rsplit('.').next().unwrap_or(field);
    message.starts_with(field) || message.starts_with(name)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::status::Failure as Refusal;
    use tokio::runtime::Builder;

    use super::*;

    fn check(error: Error, exit: Exit) {
        let failure = Failure::from(error);
        assert_eq!(failure.exit, exit, "{failure}");
        assert!(!failure.to_string().contains('\n'), "{failure}");
    }

    /// What the client makes of addresses where nobody is.
    fn not_reached() -> Error {
        Error::NotReached {
            addresses: vec!["127.0.0.1:1".to_owned()],
            source: "connection refused".into(),
        }
    }

    fn refused(refusal: Refusal) -> Error {
        Error::refused(refusal.into())
    }

    #[test]
    fn not_reached_and_refused_have_codes_of_their_own() {
        check(not_reached(), Exit::NotReached);
        check(Error::Deadline { after: Duration::from_secs(1) }, Exit::NotReached);
        check(refused(Refusal::not_found("no agent definition \"x\"")), Exit::Refused);
        check(refused(Refusal::invalid("input", "input is too long")), Exit::Refused);
        check(Error::NoCredentials { path: "/nowhere".into() }, Exit::Usage);
        check(Error::Address { address: "x".to_owned() }, Exit::Usage);
    }

    #[test]
    fn a_refusal_says_what_why_and_what_to_do() {
        let failure = Failure::from(refused(Refusal::not_found("no definition \"x\"")));
        let text = failure.to_string();
        assert!(text.contains("no definition \"x\""), "{text}");
        assert!(text.contains("not_found"), "{text}");
        assert!(text.contains("stagedoor definitions"), "{text}");
    }

    #[test]
    fn a_refusal_names_the_field_that_is_wrong() {
        let text = |field, message: &str| {
            Failure::from(refused(Refusal::invalid(field, message))).to_string()
        };
        let named = text("definition.cycles_max", "0 to 100 are allowed");
        assert!(named.contains(": definition.cycles_max: 0 to 100 are allowed"), "{named}");
        let once = text("input", "input is too long");
        assert!(once.contains(": input is too long") && !once.contains("input: input"), "{once}");
    }

    #[test]
    fn what_is_not_found_is_listed_by_the_command_of_its_kind() {
        let failure = Failure::of_one(refused(Refusal::not_found("no node")), "stagedoor nodes");
        assert!(failure.to_string().contains("`stagedoor nodes`"), "{failure}");
        let failure = Failure::of_one(not_reached(), "stagedoor nodes");
        assert!(!failure.to_string().contains("stagedoor nodes"), "{failure}");
    }

    #[test]
    fn a_cluster_of_another_ca_is_not_the_one_of_these_credentials() {
        let source = net::Error::WrongPeer {
            addr: "127.0.0.1:1".to_owned(),
            found: "spiffe://stagedoor.local/node/node-1".parse().unwrap(),
            expected: net::Expected::any(domain::Role::Control),
        };
        let error =
            Error::NotReached { addresses: vec!["127.0.0.1:1".to_owned()], source: source.into() };
        let text = Failure::from(error).to_string();
        assert!(text.contains("with --credentials"), "{text}");
    }

    #[test]
    fn the_codes_are_those_that_scripts_know() {
        let codes = [Exit::Ok, Exit::Failed, Exit::Usage, Exit::NotReached, Exit::Refused];
        assert_eq!(codes.map(|exit| exit as u8), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_cluster_that_is_not_there_ends_with_three() {
        net::install_crypto_provider();
        let dir = tempfile::tempdir().unwrap();
        let ca = net::pki::init(dir.path(), &"stagedoor.local".parse().unwrap()).unwrap();
        let id = "spiffe://stagedoor.local/client/dev".parse().unwrap();
        ca.issue(&id, net::pki::Validity::default()).unwrap().write(dir.path(), "client").unwrap();
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = client::Config {
            api: vec![unused.to_string()],
            credentials: dir.path().to_owned(),
            timeouts: client::Timeouts { unreached: Duration::ZERO, ..client::Timeouts::default() },
        };
        let client = client::Client::connect(&config).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let failure = Failure::from(runtime.block_on(client.status()).unwrap_err());
        assert_eq!(failure.exit, Exit::NotReached);
        assert!(failure.to_string().contains(&unused.to_string()), "{failure}");
    }
}
