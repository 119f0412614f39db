//! Where the cluster is and who we are to it: by flag, by variable, else in the default data directory.

use std::path::PathBuf;

use client::{Client, Config, Timeouts, addresses_of};

use crate::args::Connection;
use crate::exit::Failure;

/// The folder with the client's credentials, in the data directory of a cluster.
pub(crate) const FOLDER: &str = "credentials";

/// Connects as the arguments say.
pub(crate) fn connect(connection: &Connection) -> Result<Client, Failure> {
    let credentials = match &connection.credentials {
        Some(given) => given.clone(),
        None => default_data_dir()?.join(FOLDER),
    };
    let api = connection.api.as_deref().map(addresses_of).unwrap_or_default();
    let timeouts = Timeouts { call: connection.deadline(), ..Timeouts::default() };
    Ok(Client::connect(&Config { api, credentials, timeouts })?)
}

/// `$XDG_DATA_HOME/stagedoor/dev`.
pub(crate) fn default_data_dir() -> Result<PathBuf, Failure> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
    let base = base.ok_or_else(|| {
        Failure::usage("there is no default data directory")
            .why("neither XDG_DATA_HOME nor HOME is set")
            .remedy("set one of them, or name a folder with --data-dir or --credentials")
    });
    Ok(base?.join("stagedoor").join("dev"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    #[test]
    fn a_given_folder_that_is_missing_is_an_error_and_no_fall_back() {
        let connection = Connection {
            api: Some("127.0.0.1:1".to_owned()),
            credentials: Some("/nowhere/at/all".into()),
            ..Connection::default()
        };
        let failure = connect(&connection).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        let text = failure.to_string();
        assert!(text.contains("/nowhere/at/all") && text.contains("stagedoor dev"), "{text}");
    }

    #[test]
    fn credentials_without_addresses_name_the_missing_file() {
        net::install_crypto_provider();
        let dir = tempfile::tempdir().unwrap();
        let ca = net::pki::init(dir.path(), &"stagedoor.local".parse().unwrap()).unwrap();
        let id = "spiffe://stagedoor.local/client/dev".parse().unwrap();
        ca.issue(&id, net::pki::Validity::default()).unwrap().write(dir.path(), "client").unwrap();
        let connection =
            Connection { credentials: Some(dir.path().to_owned()), ..Connection::default() };
        let failure = connect(&connection).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains("/api"), "{failure}");
    }
}
