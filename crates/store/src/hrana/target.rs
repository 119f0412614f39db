//! Where a server is, and how its databases are named there.

use std::net::IpAddr;

use hyper::Uri;

use crate::database::Database;
use crate::{Config, Durability, Error};

/// Stands in a host for the name of a database, where each has a host of its own.
const PLACEHOLDER: &str = "{namespace}";
const PREFIX_MAX: usize = 32;

/// An `http` or `https` URL without a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) is_tls: bool,
    /// May hold the placeholder.
    host: String,
    pub(super) port: u16,
}

/// Where one database is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) host: String,
    pub(super) port: u16,
    /// The header `Host`.
    pub(super) authority: String,
    /// The header `x-namespace`; none where the host says it.
    pub(super) namespace: Option<String>,
}

impl Target {
    pub(super) fn parse(name: &str, url: &str, allow_plaintext: bool) -> Result<Self, Error> {
        let refuse = |why: &str| {
            Err(Error::invalid(format!("{name} {url:?} of the store is not valid: {why}")))
        };
        if url.contains('@') {
            // It would be shown wherever the URL is.
            return Err(Error::invalid(format!(
                "{name} of the store holds a secret: use a token file"
            )));
        }
        let plain = url.replace(PLACEHOLDER, "namespace");
        let allowed = "http://host:port or https://host is allowed";
        let Ok(uri) = plain.parse::<Uri>() else { return refuse(allowed) };
        let is_tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            Some("libsql" | "wss" | "ws") => {
                return refuse("write https:// in place of its scheme");
            }
            _ => return refuse(allowed),
        };
        if uri.query().is_some() || !matches!(uri.path(), "" | "/") {
            return refuse("it has no path");
        }
        let Some((_, rest)) = url.split_once("://") else { return refuse(allowed) };
        let authority = rest.trim_end_matches('/');
        let port = uri.port_u16();
        let host = port.map_or(authority, |port| {
            authority.strip_suffix(&format!(":{port}")).unwrap_or(authority)
        });
        if host.is_empty() {
            return refuse(allowed);
        }
        if !is_tls && !allow_plaintext && !is_loopback(host) {
            return refuse(
                "http:// is for this machine only; use https://, or set allow_plaintext",
            );
        }
        let port = port.unwrap_or(if is_tls { 443 } else { 80 });
        Ok(Self { is_tls, host: host.to_owned(), port })
    }

    /// sqld reads the name of the database from the first label of `Host`, later versions from `x-namespace`.
    pub(super) fn place(&self, namespace: &str) -> Place {
        let port = self.port;
        if self.host.contains(PLACEHOLDER) {
            let host = self.host.replace(PLACEHOLDER, namespace);
            return Place { authority: host.clone(), host, port, namespace: None };
        }
        let host = self.host.clone();
        let label = host.trim_start_matches('[').trim_end_matches(']').replace(':', "-");
        let authority = format!("{namespace}.{label}:{port}");
        Place { authority, host, port, namespace: Some(namespace.to_owned()) }
    }

    /// Where things are asked for that belong to no database.
    pub(super) fn itself(&self) -> Place {
        let authority = format!("{}:{}", self.host, self.port);
        Place { host: self.host.clone(), port: self.port, authority, namespace: None }
    }

    pub(super) fn has_placeholder(&self) -> bool {
        self.host.contains(PLACEHOLDER)
    }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost" || bare.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// The parts of a config that the engine `hrana` reads, checked.
#[derive(Clone, Debug)]
pub(crate) struct Parsed {
    pub(super) target: Target,
    pub(super) admin: Option<Target>,
    prefix: String,
    pub(super) is_checked: bool,
}

impl Parsed {
    pub(crate) fn of(config: &Config) -> Result<Self, Error> {
        let parse = |name, url| Target::parse(name, url, config.allow_plaintext);
        let target = parse("url", &config.url)?;
        let admin = config.admin_url.as_deref().map(|url| parse("admin_url", url)).transpose()?;
        if admin.as_ref().is_some_and(Target::has_placeholder) {
            return Err(Error::invalid(
                "admin_url of the store names one server for all databases",
            ));
        }
        let prefix = config.namespace_prefix.clone();
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if PREFIX_MAX < prefix.len() || !prefix.bytes().all(allowed) || prefix.starts_with('-') {
            return Err(Error::invalid(format!(
                "namespace_prefix {prefix:?} of the store is not valid: up to {PREFIX_MAX} lower case letters, \
                 digits and '-' are allowed, no '-' first"
            )));
        }
        let positive = [
            ("write_timeout_ms", config.write_timeout_ms),
            ("read_timeout_ms", config.read_timeout_ms),
            ("connect_timeout_ms", config.connect_timeout_ms),
            ("connections_max", config.connections_max as u64),
            ("in_flight_max", config.in_flight_max as u64),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Error::invalid(format!("{name} of the store is 0: at least 1 is allowed")));
        }
        let is_checked = config.durability == Durability::Checked;
        Ok(Self { target, admin, prefix, is_checked })
    }

    pub(super) fn namespace(&self, database: Database) -> String {
        format!("{}{database}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_named_in_the_host() {
        let check = |url: &str, host: &str, port: u16, authority: &str, namespace: Option<&str>| {
            let place = Target::parse("url", url, false).unwrap().place("a-control");
            let namespace = namespace.map(str::to_owned);
            let (host, authority) = (host.to_owned(), authority.to_owned());
            assert_eq!(place, Place { host, port, authority, namespace }, "{url}");
        };
        let named = Some("a-control");
        check("http://127.0.0.1:8080", "127.0.0.1", 8080, "a-control.127.0.0.1:8080", named);
        check("http://localhost:8080/", "localhost", 8080, "a-control.localhost:8080", named);
        check("http://[::1]:8080", "[::1]", 8080, "a-control.--1:8080", named);
        check(
            "https://db.example.com",
            "db.example.com",
            443,
            "a-control.db.example.com:443",
            named,
        );
        let cloud = "a-control-ann.turso.io";
        check("https://{namespace}-ann.turso.io", cloud, 443, cloud, None);
    }

    #[test]
    fn what_is_no_url_or_not_safe_is_refused() {
        for url in [
            "",
            "127.0.0.1:8080",
            "ftp://localhost",
            "libsql://x.turso.io",
            "http://localhost/db",
            "http://localhost?x",
            "http://",
            "https://ann:secret@example.com",
        ] {
            let refused = Target::parse("url", url, true).unwrap_err().to_string();
            assert!(refused.contains("url") && !refused.contains("secret@"), "{refused}");
        }
        for url in ["http://10.0.0.1:8080", "http://example.com", "http://127.0.0.1.example.com"] {
            let refused = Target::parse("url", url, false).unwrap_err().to_string();
            assert!(refused.contains("allow_plaintext"), "{refused}");
            assert!(Target::parse("url", url, true).is_ok());
        }
    }

    #[test]
    fn a_config_is_refused_where_it_is_wrong() {
        let good = Config { url: "http://localhost:1".to_owned(), ..Config::default() };
        assert!(Parsed::of(&good).is_ok());
        let check = |config: Config, named: &str| {
            let refused = Parsed::of(&config).unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        };
        check(Config { namespace_prefix: "a/b".to_owned(), ..good.clone() }, "namespace_prefix");
        check(Config { namespace_prefix: "-a".to_owned(), ..good.clone() }, "namespace_prefix");
        check(Config { admin_url: Some("x".to_owned()), ..good.clone() }, "admin_url");
        check(Config { connections_max: 0, ..good.clone() }, "connections_max");
        check(Config { write_timeout_ms: 0, ..good }, "write_timeout_ms");
    }
}
