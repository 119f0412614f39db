//! Where the cluster is, and who we are to it.

use std::path::PathBuf;
use std::time::Duration;

use crate::Error;

/// How to reach a cluster.
#[derive(Clone, Debug)]
pub struct Config {
    /// Addresses of API servers, `host:port`, tried in turn. Empty: those in the file `api` of the credentials.
    pub api: Vec<String>,
    /// A folder with `client.crt`, `client.key` and `ca.crt`, and with `api` if no address is given.
    pub credentials: PathBuf,
    pub timeouts: Timeouts,
}

/// How long to wait for what.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// For one call, all its repetitions included; for a stream, until it runs again after it broke.
    pub call: Duration,
    /// For one attempt to connect to one address.
    pub connect: Duration,
    /// How long a cluster is looked for that was never reached: most likely it is not there.
    pub unreached: Duration,
    /// The pause after the first failure. It doubles with each, up to `pause_max`.
    pub pause_min: Duration,
    pub pause_max: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(30),
            connect: Duration::from_secs(3),
            unreached: Duration::from_secs(5),
            pause_min: Duration::from_millis(20),
            pause_max: Duration::from_secs(1),
        }
    }
}

impl Config {
    /// Where the credentials are; everything else as usual.
    pub fn new(credentials: impl Into<PathBuf>) -> Self {
        Self { api: Vec::new(), credentials: credentials.into(), timeouts: Timeouts::default() }
    }

    /// The addresses to try, checked.
    pub(crate) fn addresses(&self) -> Result<Vec<String>, Error> {
        if !self.api.is_empty() {
            return check("the given addresses", self.api.clone());
        }
        let path = self.credentials.join("api");
        let text = std::fs::read_to_string(&path)
            .map_err(|source| Error::File { path: path.clone(), source })?;
        check(&path.display().to_string(), addresses_of(&text))
    }

    pub(crate) fn identity(&self) -> Result<net::Identity, Error> {
        if !self.credentials.is_dir() {
            return Err(Error::NoCredentials { path: self.credentials.clone() });
        }
        let file = |name| self.credentials.join(name);
        let config = net::Config {
            certificate: file("client.crt"),
            key: file("client.key"),
            ca: file("ca.crt"),
        };
        net::Identity::load(&config).map_err(|source| Error::Credentials { source })
    }
}

/// The addresses in a text, separated by commas or line ends.
pub fn addresses_of(text: &str) -> Vec<String> {
    let parts = text.split([',', '\n']).map(str::trim);
    parts.filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

fn check(origin: &str, addresses: Vec<String>) -> Result<Vec<String>, Error> {
    if addresses.is_empty() {
        return Err(Error::NoAddress { origin: origin.to_owned() });
    }
    match addresses.iter().find(|address| !net::is_address(address)) {
        Some(address) => Err(Error::Address { address: address.clone() }),
        None => Ok(addresses),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn addresses_come_one_a_line_or_with_commas() {
        assert_eq!(addresses_of("a:1,b:2\n c:3 \n\n"), ["a:1", "b:2", "c:3"]);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let config = Config::new("/nowhere/credentials");
        let error = config.identity().unwrap_err();
        assert!(error.to_string().contains("/nowhere/credentials"), "{error}");
        assert_eq!(error.kind(), domain::ErrorKind::Invalid);
    }
}
