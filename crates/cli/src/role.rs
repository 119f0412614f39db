//! Runs one role: its config from a file and the environment, then telemetry, then the role until it is told to end.

use std::path::Path;

use domain::ErrorKind;
use figment::Figment;
use figment::providers::{Env, Format, Toml};
use serde::de::DeserializeOwned;

use crate::LAST_WAIT;
use crate::exit::{Exit, Failure, chain};
use crate::signal::Shutdown;

/// What the three roles have in common.
pub(crate) trait Role {
    type Config: DeserializeOwned;

    /// As in certificates and logs.
    const NAME: &'static str;
    /// How the variables begin that override the file; two underscores separate levels.
    const ENV: &'static str;

    /// The name of this process.
    fn name(config: &Self::Config) -> String;

    fn telemetry(config: &Self::Config) -> &telemetry::Config;

    /// What the types of a config cannot say.
    fn check(_: &Self::Config) -> Result<(), Failure> {
        Ok(())
    }

    /// Until `shutdown` resolves.
    fn run(
        config: Self::Config,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = Result<(), Failure>>;
}

pub(crate) struct StoreRole;

impl Role for StoreRole {
    type Config = store::role::Config;

    const NAME: &'static str = "store";
    const ENV: &'static str = "STAGEDOOR_STORE__";

    /// A store is named by its certificate alone.
    fn name(config: &Self::Config) -> String {
        let info = net::pki::show(&config.net.certificate).ok();
        info.and_then(|info| info.spiffe).map(|id| id.name.to_string()).unwrap_or_default()
    }

    fn telemetry(config: &Self::Config) -> &telemetry::Config {
        &config.telemetry
    }

    async fn run(
        config: Self::Config,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), Failure> {
        let run = Box::pin(store::role::run(config, shutdown));
        run.await.map_err(|error| failure(error.kind(), &error))
    }
}

pub(crate) struct ControlRole;

impl Role for ControlRole {
    type Config = control::Config;

    const NAME: &'static str = "control";
    const ENV: &'static str = "STAGEDOOR_CONTROL__";

    fn name(config: &Self::Config) -> String {
        config.name.to_string()
    }

    fn telemetry(config: &Self::Config) -> &telemetry::Config {
        &config.telemetry
    }

    fn check(config: &Self::Config) -> Result<(), Failure> {
        config.check().map_err(|error| failure(error.kind(), &error))
    }

    async fn run(
        config: Self::Config,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), Failure> {
        let run = Box::pin(control::run(config, shutdown));
        run.await.map_err(|error| failure(error.kind(), &error))
    }
}

pub(crate) struct NodeRole;

impl Role for NodeRole {
    type Config = node::Config;

    const NAME: &'static str = "node";
    const ENV: &'static str = "STAGEDOOR_NODE__";

    fn name(config: &Self::Config) -> String {
        config.name.to_string()
    }

    fn telemetry(config: &Self::Config) -> &telemetry::Config {
        &config.telemetry
    }

    fn check(config: &Self::Config) -> Result<(), Failure> {
        config.check().map_err(|error| failure(error.kind(), &error))
    }

    async fn run(
        config: Self::Config,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), Failure> {
        let run = Box::pin(node::run(config, shutdown));
        run.await.map_err(|error| failure(error.kind(), &error))
    }
}

/// A wrong config is the caller's to mend; everything else is not.
fn failure(kind: ErrorKind, error: &(dyn std::error::Error + 'static)) -> Failure {
    match kind {
        ErrorKind::Invalid => Failure::usage(chain(error)),
        ErrorKind::NotFound
        | ErrorKind::Conflict
        | ErrorKind::Fenced
        | ErrorKind::Denied
        | ErrorKind::Exhausted
        | ErrorKind::Deadline
        | ErrorKind::Unavailable
        | ErrorKind::Internal => Failure::other(chain(error)),
    }
}

/// Reads the config of a role: the file first, then the variables.
pub(crate) fn load<R: Role>(path: &Path) -> Result<R::Config, Failure> {
    // A file that is missing would otherwise count as an empty one.
    std::fs::metadata(path).map_err(|error| {
        Failure::usage(format!("cannot read config {}", path.display()))
            .why(error)
            .remedy("name a TOML file with --config")
    })?;
    let variables = Env::prefixed(R::ENV).split("__");
    let config = parse(&Figment::from(Toml::file_exact(path)).merge(variables));
    let config = config.map_err(|why| {
        Failure::usage(format!("config {} of the {} role", path.display(), R::NAME))
            .why(why)
            .remedy("correct it, and try again with --check-config")
    })?;
    R::check(&config)?;
    Ok(config)
}

fn parse<T: DeserializeOwned>(figment: &Figment) -> Result<T, String> {
    figment.extract().map_err(|errors| {
        let errors: Vec<_> = errors.into_iter().map(|error| error.to_string()).collect();
        // The profile is a notion of the library.
        errors.join(", ").replace("\"default.", "\"")
    })
}

/// Runs a role until SIGINT, SIGTERM or, if guarded, the end of standard input.
pub(crate) fn run<R: Role>(config: R::Config, stdin_guard: bool) -> Result<Exit, Failure> {
    let service = telemetry::Service { role: R::NAME.to_owned(), name: R::name(&config) };
    let log_format = R::telemetry(&config).log_format;
    let guard = telemetry::init(R::telemetry(&config), &service)
        .map_err(|error| failure(error.kind(), &error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::other("cannot start a runtime").why(error))?;
    let outcome = runtime.block_on(async {
        let mut shutdown = Shutdown::new(stdin_guard)?;
        tracing::info!(role = R::NAME, name = service.name, "started");
        let ended = Box::pin(R::run(config, async move { shutdown.wait().await }));
        ended.await
    });
    let outcome = outcome.map_err(|failure| match log_format {
        telemetry::LogFormat::Text => failure,
        // A collector reads nothing but its own lines.
        telemetry::LogFormat::Json => {
            tracing::error!(error = failure.text(), "failed");
            failure.logged()
        }
    });
    runtime.shutdown_timeout(LAST_WAIT);
    guard.shutdown();
    outcome.map(|()| Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Config {
        name: String,
        net: Part,
    }

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Part {
        listen: String,
    }

    impl Default for Config {
        fn default() -> Self {
            Self { name: "node-1".to_owned(), net: Part::default() }
        }
    }

    struct TestRole;

    impl Role for TestRole {
        type Config = Config;
        const NAME: &'static str = "test";
        const ENV: &'static str = "STAGEDOOR_TEST__";

        fn name(config: &Config) -> String {
            config.name.clone()
        }

        fn telemetry(_: &Config) -> &telemetry::Config {
            unreachable!("this role is never run")
        }

        async fn run(
            _: Config,
            _: impl Future<Output = ()> + Send + 'static,
        ) -> Result<(), Failure> {
            Ok(())
        }
    }

    fn load_text(text: &str) -> Result<Config, Failure> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.toml");
        std::fs::write(&path, text).unwrap();
        load::<TestRole>(&path)
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        for text in ["naem = \"x\"", "[net]\nlisen = \"x\"", "naem = \"x\"\n[net]\nlisten = \"y\""]
        {
            let failure = load_text(text).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            let text = failure.to_string();
            assert!(text.contains("naem") || text.contains("lisen"), "{text}");
            assert!(text.contains("test.toml"), "{text}");
        }
    }

    #[test]
    fn a_missing_file_is_an_error_and_no_empty_config() {
        let failure = load::<TestRole>(Path::new("/nowhere/node.toml")).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains("/nowhere/node.toml"), "{failure}");
    }

    #[test]
    #[allow(clippy::result_large_err, reason = "the error type is that of the jail")]
    fn variables_come_after_the_file() {
        figment::Jail::expect_with(|jail| {
            jail.create_file("test.toml", "name = \"a\"\n[net]\nlisten = \"file\"")?;
            jail.set_env("STAGEDOOR_TEST__NET__LISTEN", "127.0.0.1:1");
            let config = load::<TestRole>(Path::new("test.toml")).unwrap();
            assert_eq!((config.name.as_str(), config.net.listen.as_str()), ("a", "127.0.0.1:1"));
            jail.set_env("STAGEDOOR_TEST__NET__LISEN", "x");
            let failure = load::<TestRole>(Path::new("test.toml")).unwrap_err();
            assert!(failure.to_string().to_lowercase().contains("lisen"), "{failure}");
            Ok(())
        });
    }
}
