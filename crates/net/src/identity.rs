//! The certificate and key of this process, and the CA that it trusts.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use crate::pki::files;
use crate::{Error, SpiffeId, pki, spiffe, tls};

/// Which files say who this process is. There is no default: an identity is named, never guessed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The certificate of this process, PEM, with the chain to the CA if there is one between.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The certificate of the CA, PEM. Several are allowed while one replaces another.
    pub ca: PathBuf,
}

/// Who this process is, ready for use. Cheap to clone.
#[derive(Clone)]
pub struct Identity(Arc<Parts>);

struct Parts {
    id: SpiffeId,
    not_after: SystemTime,
    certified: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
}

/// One of the three files, and how to call it in an error.
struct Part<'a> {
    what: &'static str,
    origin: String,
    pem: &'a str,
}

impl Identity {
    /// Reads the files. Blocks: it is called once, at the start.
    ///
    /// A certificate that has expired is loaded, with a warning: the peers refuse it, and say so.
    pub fn load(config: &Config) -> Result<Self, Error> {
        let certificate = files::read("read the certificate", &config.certificate)?;
        let key = files::read("read the key", &config.key)?;
        let ca = files::read("read the CA certificate", &config.ca)?;
        Self::from_parts(
            &Part::of_file("certificate", &config.certificate, &certificate),
            &Part::of_file("key", &config.key, &key),
            &Part::of_file("CA certificate", &config.ca, &ca),
        )
    }

    /// The same from texts in PEM.
    pub fn from_pem(certificate: &str, key: &str, ca: &str) -> Result<Self, Error> {
        Self::from_parts(
            &Part::of_text("certificate", certificate),
            &Part::of_text("key", key),
            &Part::of_text("CA certificate", ca),
        )
    }

    pub fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// When the certificate ends.
    pub fn not_after(&self) -> SystemTime {
        self.0.not_after
    }

    fn from_parts(certificate: &Part<'_>, key: &Part<'_>, ca: &Part<'_>) -> Result<Self, Error> {
        let chain = certificate.certificates()?;
        let id = spiffe::id_of(&chain[0]).map_err(|_| {
            certificate.unusable("exactly one SPIFFE id is needed; `stagedoor pki issue` adds it")
        })?;
        let not_after = pki::not_after(&chain[0]).map_err(|why| certificate.unusable(why))?;
        // What the parser says of a key could quote it.
        let private = PrivateKeyDer::from_pem_slice(key.pem.as_bytes())
            .map_err(|_| key.unusable("no private key in PEM is in it"))?;
        let certified = CertifiedKey::from_der(chain, private, &tls::provider())
            .map_err(|_| key.unusable(format!("it does not belong to {}", certificate.origin)))?;
        let identity = Self(Arc::new(Parts {
            id,
            not_after,
            certified: Arc::new(certified),
            roots: Arc::new(ca.roots()?),
        }));
        identity.warn_if_expired(&certificate.origin);
        Ok(identity)
    }

    fn warn_if_expired(&self, origin: &str) {
        if self.0.not_after < SystemTime::now() {
            let id = &self.0.id;
            tracing::warn!(%id, certificate = origin, "certificate has expired, every peer will refuse it: issue another with `stagedoor pki issue`");
        }
    }

    /// The authorities that are trusted: the BLAKE3 hash of each one's public key (its DER), in hex, sorted. A certificate
    /// that was renewed with the same key is the same authority.
    pub fn authorities(&self) -> Vec<String> {
        let keys = self.0.roots.roots.iter().map(|root| &root.subject_public_key_info);
        let mut hashes: Vec<String> =
            keys.map(|key| blake3::hash(key.as_ref()).to_hex().to_string()).collect();
        hashes.sort();
        hashes.dedup();
        hashes
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.0.certified.clone()
    }

    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        self.0.roots.clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.0.id)
    }
}

impl<'a> Part<'a> {
    fn of_file(what: &'static str, path: &Path, pem: &'a str) -> Self {
        Self { what, origin: path.display().to_string(), pem }
    }

    fn of_text(what: &'static str, pem: &'a str) -> Self {
        Self { what, origin: "given as text".to_owned(), pem }
    }

    fn unusable(&self, why: impl ToString) -> Error {
        Error::unusable(self.what, &self.origin, why)
    }

    /// At least one.
    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        let certificates: Result<Vec<_>, _> =
            CertificateDer::pem_slice_iter(self.pem.as_bytes()).collect();
        match certificates {
            Ok(certificates) if !certificates.is_empty() => Ok(certificates),
            Ok(_) => Err(self.unusable("no certificate in PEM is in it")),
            Err(error) => Err(self.unusable(error)),
        }
    }

    fn roots(&self) -> Result<RootCertStore, Error> {
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates()? {
            roots.add(certificate).map_err(|error| self.unusable(error))?;
        }
        Ok(roots)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::{Fixture, issue_files};

    fn replaced(config: &Config, part: usize, path: PathBuf) -> Config {
        let mut config = config.clone();
        *[&mut config.certificate, &mut config.key, &mut config.ca][part] = path;
        config
    }

    #[test]
    fn files_make_an_identity() {
        let dir = tempfile::tempdir().unwrap();
        let config = issue_files(dir.path(), "node/node-1");
        let identity = Identity::load(&config).unwrap();
        assert_eq!(identity.id().to_string(), "spiffe://stagedoor.local/node/node-1");
        assert!(SystemTime::now() < identity.not_after());
        assert_eq!(format!("{identity:?}"), "Identity(spiffe://stagedoor.local/node/node-1)");
    }

    #[test]
    fn authorities_are_told_apart_by_their_keys() {
        let (ours, theirs) = (Fixture::new(), Fixture::new());
        let one = ours.issue("node/node-1");
        let identity = |ca: &str| Identity::from_pem(&one.certificate_pem, &one.key_pem, ca);
        let own = identity(ours.ca.certificate_pem()).unwrap().authorities();
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].len(), 64);
        let both = format!("{}{}", ours.ca.certificate_pem(), theirs.ca.certificate_pem());
        let both = identity(&both).unwrap().authorities();
        assert!(both.len() == 2 && both.contains(&own[0]) && both.is_sorted());
    }

    #[test]
    fn a_missing_or_malformed_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = issue_files(dir.path(), "node/node-1");
        let rubbish = dir.path().join("rubbish.pem");
        fs::write(&rubbish, "-----BEGIN RUBBISH-----\n").unwrap();
        let empty = dir.path().join("empty.pem");
        fs::write(&empty, "").unwrap();
        for part in 0..3 {
            for path in [dir.path().join("missing.pem"), rubbish.clone(), empty.clone()] {
                let error = Identity::load(&replaced(&config, part, path.clone())).unwrap_err();
                assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            }
        }
    }

    #[test]
    fn a_key_of_another_certificate_is_refused_and_not_shown() {
        let fixture = Fixture::new();
        let (one, two) = (fixture.issue("node/node-1"), fixture.issue("node/node-2"));
        let error =
            Identity::from_pem(&one.certificate_pem, &two.key_pem, fixture.ca.certificate_pem())
                .unwrap_err();
        assert!(error.to_string().contains("does not belong"), "{error}");
        assert!(!format!("{error:?}{one:?}").contains("PRIVATE KEY"));
    }

    #[test]
    fn a_config_names_all_three_files_and_nothing_else() {
        let whole = "certificate = 'a'\nkey = 'b'\nca = 'c'\n";
        assert!(toml::from_str::<Config>(whole).is_ok());
        assert!(toml::from_str::<Config>("certificate = 'a'\nkey = 'b'\n").is_err());
        assert!(toml::from_str::<Config>(&format!("{whole}insecure = true\n")).is_err());
    }
}
