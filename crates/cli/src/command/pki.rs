//! `pki`: makes and reads certificates, without a cluster.

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
    let issued = ca.issue(&id, validity).map_err(|error| failure(&error))?;
    let written = issued.write(&out, &stem).map_err(|error| failure(&error))?;
    let trusted = out.join("ca.crt");
    if !same_file(&trusted, &dir.join("ca.crt")) {
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

fn same_file(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
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
    fn a_ca_that_is_not_there_is_named() {
        let file = PathBuf::from("/nowhere/client.crt");
        let failure = run(PkiCommand::Show { file }).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains("/nowhere/client.crt"), "{failure}");
    }
}
