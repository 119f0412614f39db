//! The store of a cluster on this machine: a process of ours, or a database server that is there already.

use std::path::{Path, PathBuf};

use store::{Config, Durability, Engine};
use toml::{Table, Value};

use crate::args::DevStoreArgs;
use crate::exit::{Failure, chain};

/// A server that is there already, as its clients are told.
#[derive(Clone, Debug)]
pub(crate) struct ServerStore(Config);

impl ServerStore {
    /// None: a store process is started. Looks at the arguments and at the files that they name, sends nothing.
    pub(crate) fn of(args: &DevStoreArgs) -> Result<Option<Self>, Failure> {
        let Some(url) = &args.url else { return Ok(None) };
        let durability = match args.trusted {
            true => Durability::Trusted,
            false => Durability::Checked,
        };
        let config = Config {
            engine: Engine::Hrana,
            url: url.clone(),
            admin_url: args.admin_url.clone(),
            token_file: args.token_file.as_deref().map(absolute).transpose()?,
            admin_token_file: args.admin_token_file.as_deref().map(absolute).transpose()?,
            namespace_prefix: args.prefix.clone().unwrap_or_default(),
            durability,
            ..Config::default()
        };
        let refuse = |error: store::Error| {
            Failure::usage("the server of --store cannot be used").why(chain(&error))
        };
        config.check().map_err(refuse)?;
        // Reads the files.
        store::HranaStore::new(&config).map_err(refuse)?;
        Ok(Some(Self(config)))
    }

    /// For a control process, which makes databases.
    pub(crate) fn for_control(&self) -> Table {
        let mut table = self.for_node();
        let config = &self.0;
        insert(&mut table, "admin_url", config.admin_url.clone());
        insert(&mut table, "admin_token_file", config.admin_token_file.as_deref().map(text));
        table
    }

    /// For a node, which only uses them.
    pub(crate) fn for_node(&self) -> Table {
        let config = &self.0;
        let mut table = Table::new();
        insert(&mut table, "engine", Some("hrana".to_owned()));
        insert(&mut table, "url", Some(config.url.clone()));
        insert(&mut table, "token_file", config.token_file.as_deref().map(text));
        insert(&mut table, "namespace_prefix", Some(config.namespace_prefix.clone()));
        let durability = match config.durability {
            Durability::Checked => "checked",
            Durability::Trusted => "trusted",
        };
        insert(&mut table, "durability", Some(durability.to_owned()));
        table
    }
}

fn insert(table: &mut Table, key: &str, value: Option<String>) {
    if let Some(value) = value {
        table.insert(key.to_owned(), Value::String(value));
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    let absolute = std::path::absolute(path);
    absolute.map_err(|error| Failure::usage(format!("cannot find {}", path.display())).why(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(dir: &Path) -> DevStoreArgs {
        std::fs::write(dir.join("token"), "secret").unwrap();
        DevStoreArgs {
            url: Some("http://127.0.0.1:8080".to_owned()),
            admin_url: Some("http://127.0.0.1:8081".to_owned()),
            token_file: Some(dir.join("token")),
            admin_token_file: Some(dir.join("token")),
            prefix: Some("a-".to_owned()),
            trusted: false,
        }
    }

    #[test]
    fn control_gets_the_keys_of_the_server_and_nodes_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let server = ServerStore::of(&args(dir.path())).unwrap().unwrap();
        let parse = |table: Table| -> Config { table.try_into().unwrap() };
        let (control, node) = (parse(server.for_control()), parse(server.for_node()));
        assert_eq!(control, server.0);
        assert_eq!(node, Config { admin_url: None, admin_token_file: None, ..control });
        assert!(!server.for_control().to_string().contains("secret"));
    }

    #[test]
    fn a_server_that_cannot_be_used_is_refused_before_anything_starts() {
        let dir = tempfile::tempdir().unwrap();
        let good = args(dir.path());
        assert!(ServerStore::of(&DevStoreArgs::default()).unwrap().is_none());
        let check = |args: DevStoreArgs, named: &str| {
            let refused = ServerStore::of(&args).unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        };
        check(DevStoreArgs { url: Some("http://10.0.0.1".to_owned()), ..good.clone() }, "https");
        check(DevStoreArgs { prefix: Some("A".to_owned()), ..good.clone() }, "namespace_prefix");
        check(DevStoreArgs { token_file: Some(dir.path().join("none")), ..good }, "none");
    }
}
