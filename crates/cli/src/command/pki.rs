//! `pki`: makes and reads certificates, without a cluster.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use domain::{ProcessName, Role};
use net::SpiffeId;
use net::pki::{self, Ca, Validity};

use crate::args::PkiCommand;
use crate::exit::{Exit, Failure};
use crate::output;

/// `pki`.
pub(crate) fn run(command: PkiCommand) -> Result<Exit, Failure> {
    match command {
        PkiCommand::Init { dir, trust_domain } => {
            pki::init(&dir, &trust_domain).map_err(|error| failure(&error))?;
            output::line(&format!(
                "made the CA of {trust_domain} in {}; next: stagedoor pki issue --dir {0} --role client --name NAME",
                dir.display()
            ))?;
        }
        PkiCommand::Issue { dir, role, name, out, days } => {
            issue(&dir, role, name, out, Validity::days(days))?;
        }
        PkiCommand::Show { file } => {
            let info = pki::show(&file).map_err(|error| failure(&error))?;
            output::line(&info.to_string())?;
        }
    }
    Ok(Exit::Ok)
}

fn issue(
    dir: &Path,
    role: Role,
    name: ProcessName,
    out: Option<PathBuf>,
    validity: Validity,
) -> Result<(), Failure> {
    let stem = stem_of(role, &name)?;
    let ca = Ca::load(dir).map_err(|error| failure(&error))?;
    let id = SpiffeId { trust_domain: ca.trust_domain().clone(), role, name };
    let out = out.unwrap_or_else(|| dir.to_owned());
    let trusted = out.join("ca.crt");
    let is_trusted = trusts(&trusted, ca.certificate_pem())?;
    keep_others(&out.join(format!("{stem}.crt")), &id)?;
    let issued = ca.issue(&id, validity).map_err(|error| failure(&error))?;
    let written = issued.write(&out, &stem).map_err(|error| failure(&error))?;
    if !is_trusted {
        std::fs::write(&trusted, ca.certificate_pem()).map_err(|error| {
            Failure::other(format!("cannot write {}", trusted.display())).why(error)
        })?;
    }
    output::line(&format!(
        "issued {id}: {} and {}",
        written.certificate.display(),
        written.key.display()
    ))
}

/// What the files of a process are called. Neither the authority's nor a client's are taken for those of another.
fn stem_of(role: Role, name: &ProcessName) -> Result<String, Failure> {
    match (role, name.as_str()) {
        // A folder with client.crt, client.key and ca.crt is what --credentials takes.
        (Role::Client, _) => Ok("client".to_owned()),
        (Role::Store | Role::Control | Role::Node, "ca" | "client") => {
            let why = format!("{name}.crt and {name}.key are the files of another");
            Err(Failure::usage(why).remedy("choose another --name"))
        }
        (Role::Store | Role::Control | Role::Node, _) => Ok(name.to_string()),
    }
}

/// Whether who has this file trusts the authority already, maybe with another beside it. One that trusts only others would
/// lose them.
fn trusts(file: &Path, authority: &str) -> Result<bool, Failure> {
    match std::fs::read_to_string(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Failure::other(format!("cannot read {}", file.display())).why(error)),
        Ok(text) if text.contains(authority.trim()) => Ok(true),
        Ok(_) => Err(Failure::usage(format!("{} is of another authority", file.display()))
            .remedy("add this one's certificate to it, or choose another --out")),
    }
}

/// A certificate is replaced by a later one of the same process only.
fn keep_others(file: &Path, id: &SpiffeId) -> Result<(), Failure> {
    if !file.exists() {
        return Ok(());
    }
    let known = pki::show(file).map_err(|error| failure(&error))?.spiffe;
    if known.as_ref() == Some(id) {
        return Ok(());
    }
    let whose = known.map_or("somebody else".to_owned(), |known| known.to_string());
    let why = format!("{} is the certificate of {whose}", file.display());
    Err(Failure::usage(why).remedy("choose another --out"))
}

fn failure(error: &net::Error) -> Failure {
    let text = crate::exit::chain(error);
    match error.kind() {
        domain::ErrorKind::Internal => Failure::other(text),
        domain::ErrorKind::Invalid
        | domain::ErrorKind::NotFound
        | domain::ErrorKind::Conflict
        | domain::ErrorKind::Fenced
        | domain::ErrorKind::Denied
        | domain::ErrorKind::Exhausted
        | domain::ErrorKind::Deadline
        | domain::ErrorKind::Unavailable => Failure::usage(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn issued_client_credentials_can_be_used_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, out) = (dir.path().join("pki"), dir.path().join("ann"));
        let trust_domain = "stagedoor.local".parse().unwrap();
        run(PkiCommand::Init { dir: ca.clone(), trust_domain }).unwrap();
        let name = "ann".parse().unwrap();
        let command = PkiCommand::Issue {
            dir: ca,
            role: Role::Client,
            name,
            out: Some(out.clone()),
            days: 1,
        };
        run(command).unwrap();
        let mut config = client::Config::new(out);
        config.api = vec!["127.0.0.1:1".to_owned()];
        client::Client::connect(&config).unwrap();
    }

    #[test]
    fn nobody_is_named_like_the_files_of_another() {
        let dir = tempfile::tempdir().unwrap();
        let trust_domain = "stagedoor.local".parse().unwrap();
        run(PkiCommand::Init { dir: dir.path().to_owned(), trust_domain }).unwrap();
        let key = std::fs::read(dir.path().join("ca.key")).unwrap();
        for name in ["ca", "client"] {
            let command = PkiCommand::Issue {
                dir: dir.path().to_owned(),
                role: Role::Node,
                name: name.parse().unwrap(),
                out: None,
                days: 1,
            };
            let failure = run(command).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.to_string().contains("choose another --name"), "{failure}");
        }
        assert_eq!(std::fs::read(dir.path().join("ca.key")).unwrap(), key);
        assert!(!dir.path().join("client.key").exists());
    }

    #[test]
    fn a_certificate_is_renewed_and_no_other_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        for ca in [&one, &other] {
            let trust_domain = "stagedoor.local".parse().unwrap();
            run(PkiCommand::Init { dir: ca.clone(), trust_domain }).unwrap();
        }
        let out = dir.path().join("out");
        let issue = |ca: &Path, role: Role, name: &str| {
            let (dir, name, out) = (ca.to_owned(), name.parse().unwrap(), Some(out.clone()));
            run(PkiCommand::Issue { dir, role, name, out, days: 1 })
        };
        issue(&one, Role::Client, "ann").unwrap();
        issue(&one, Role::Node, "node-1").unwrap();
        let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
        let (key, trusted) = (read("client.key"), read("ca.crt"));
        for (ca, role, name, part) in [
            (&one, Role::Client, "bob", "client/ann"),
            (&one, Role::Control, "node-1", "node/node-1"),
            (&other, Role::Client, "ann", "another authority"),
        ] {
            let failure = issue(ca, role, name).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            let text = failure.to_string();
            assert!(text.contains(part) && text.contains("choose another --out"), "{text}");
        }
        assert_eq!((read("client.key"), read("ca.crt")), (key.clone(), trusted.clone()));
        // Who trusts two, as while one authority replaces another, goes on doing so.
        let both = trusted + &std::fs::read_to_string(other.join("ca.crt")).unwrap();
        std::fs::write(out.join("ca.crt"), &both).unwrap();
        issue(&other, Role::Client, "ann").unwrap();
        assert_ne!(read("client.key"), key);
        assert_eq!(read("ca.crt"), both);
    }

    #[test]
    fn a_ca_that_is_not_there_is_named() {
        let file = PathBuf::from("/nowhere/client.crt");
        let failure = run(PkiCommand::Show { file }).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains("/nowhere/client.crt"), "{failure}");
    }
}
