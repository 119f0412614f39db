//! A small CA: makes the certificates of a cluster and reads them.
//!
//! All of it blocks, and runs at a command line or before a runtime starts. Never revokes: certificates are short-lived
//! and issued again. Keys are ECDSA P-256 and never appear in an error or a log.

pub(crate) mod files;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use domain::TrustDomain;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::time::ASN1Time;

use crate::{Error, SpiffeId, spiffe, tls};

const LEAF_DAYS: u64 = 90;
const CA_DAYS: u64 = 3_650;
const DAY: Duration = Duration::from_hours(24);
/// How far the clock of a peer may be behind that of the CA.
const BACKDATED: Duration = Duration::from_hours(1);
/// The end of the year 9999, the last moment that a certificate can name.
const TIMESTAMP_MAX: u64 = 253_402_300_799;

const CERTIFICATE_MODE: u32 = 0o644;
const KEY_MODE: u32 = 0o600;

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Validity {
    /// From now, or rather an hour ago because clocks differ, for so many days.
    pub fn days(days: u64) -> Self {
        let now = SystemTime::now();
        let days = u32::try_from(days).unwrap_or(u32::MAX);
        Self { not_before: now - BACKDATED, not_after: now + DAY * days }
    }
}

impl Default for Validity {
    fn default() -> Self {
        Self::days(LEAF_DAYS)
    }
}

/// Makes a CA and writes it to `dir` as `ca.crt` and `ca.key`. Refuses a folder that has one already.
pub fn init(dir: &Path, trust_domain: &TrustDomain) -> Result<Ca, Error> {
    let ca = Ca::generate(trust_domain)?;
    let (certificate, key) = (certificate_path(dir, "ca"), key_path(dir, "ca"));
    if certificate.exists() {
        return Err(Error::Exists { path: certificate });
    }
    files::create_dir(dir)?;
    files::write_new(&key, ca.issuer.key().serialize_pem().as_bytes(), KEY_MODE)?;
    files::write_new(&certificate, ca.certificate_pem.as_bytes(), CERTIFICATE_MODE)?;
    Ok(ca)
}

/// Signs for one trust domain.
pub struct Ca {
    trust_domain: TrustDomain,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ca({})", self.trust_domain)
    }
}

impl Ca {
    /// Makes a CA that exists in memory only.
    pub fn generate(trust_domain: &TrustDomain) -> Result<Self, Error> {
        let failed = |source| Error::Issue { subject: format!("CA of {trust_domain}"), source };
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::default();
        set_validity(&mut params, Validity::days(CA_DAYS));
        // Two CAs of one trust domain must not have one name: it is by name that verifiers find the CA of a
        // certificate, and people the one that they mean.
        let mark: String = params.key_identifier(&key).iter().take(4).map(hex).collect();
        let subject = format!("stagedoor CA {trust_domain} {mark}");
        params.distinguished_name.push(DnType::CommonName, subject);
        // A SPIFFE id without a path is that of the trust domain itself, so a CA can be loaded from its two files.
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}")).map_err(failed)?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate_pem = params.self_signed(&key).map_err(failed)?.pem();
        let issuer = Issuer::new(params, key);
        Ok(Self { trust_domain: trust_domain.clone(), certificate_pem, issuer })
    }

    /// Reads what [`init`] has written.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let (certificate, key) = (certificate_path(dir, "ca"), key_path(dir, "ca"));
        let certificate_pem = files::read("read the CA certificate", &certificate)?;
        let key_pem = files::read("read the CA key", &key)?;
        let origin = certificate.display().to_string();
        let unusable = |why: &str| Error::unusable("CA certificate", &origin, why);
        let der = first_certificate(&certificate_pem).ok_or_else(|| unusable(NO_CERTIFICATE))?;
        let parsed = parse(&der).map_err(&unusable)?;
        let trust_domain = trust_domain_of(&parsed).ok_or_else(|| {
            unusable("it names no trust domain; make one with `stagedoor pki init`")
        })?;
        // What the parser says of a key could quote it.
        let bad_key = |why: &str| Error::unusable("CA key", &key.display().to_string(), why);
        let pair = KeyPair::from_pem(&key_pem).map_err(|_| bad_key("no private key is in it"))?;
        if pair.subject_public_key_info() != parsed.public_key().raw {
            return Err(bad_key(&format!("it does not belong to {origin}")));
        }
        let issuer =
            Issuer::from_ca_cert_der(&der, pair).map_err(|error| unusable(&error.to_string()))?;
        Ok(Self { trust_domain, certificate_pem, issuer })
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// What everybody has to trust.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Makes a key and a certificate for one process, which may serve and dial with it.
    pub fn issue(&self, id: &SpiffeId, validity: Validity) -> Result<Issued, Error> {
        if id.trust_domain != self.trust_domain {
            let trust_domain = self.trust_domain.clone();
            return Err(Error::ForeignId { id: id.clone(), trust_domain });
        }
        self.sign(id, &[id.to_string()], validity)
    }

    fn sign(&self, id: &SpiffeId, uris: &[String], validity: Validity) -> Result<Issued, Error> {
        let failed = |source| Error::Issue { subject: id.to_string(), source };
        let key = KeyPair::generate().map_err(failed)?;
        let mut params =
            CertificateParams::new(vec![tls::SERVER_NAME.to_owned()]).map_err(failed)?;
        for text in uris {
            params.subject_alt_names.push(uri(text).map_err(failed)?);
        }
        set_validity(&mut params, validity);
        params.distinguished_name.push(DnType::CommonName, id.name.as_str());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// A certificate that this CA would never issue, to see it refused.
    #[cfg(test)]
    pub(crate) fn issue_with_uris(&self, uris: &[String]) -> Issued {
        let id = "spiffe://stagedoor.local/node/odd".parse().unwrap();
        self.sign(&id, uris, Validity::default()).unwrap()
    }
}

/// A certificate and its key, in memory.
#[derive(Clone)]
pub struct Issued {
    pub certificate_pem: String,
    pub key_pem: String,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").finish_non_exhaustive()
    }
}

/// Where a certificate and its key were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Issued {
    /// Writes `<stem>.crt` and `<stem>.key`, each whole or not at all, over those that were there. A reader between the
    /// two finds a pair that does not match, which [`crate::Identity::load`] says.
    pub fn write(&self, dir: &Path, stem: &str) -> Result<Written, Error> {
        let written =
            Written { certificate: certificate_path(dir, stem), key: key_path(dir, stem) };
        files::create_dir(dir)?;
        files::replace(&written.key, self.key_pem.as_bytes(), KEY_MODE)?;
        files::replace(&written.certificate, self.certificate_pem.as_bytes(), CERTIFICATE_MODE)?;
        Ok(written)
    }
}

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateInfo {
    /// None for a CA, and for a certificate that is not from here.
    pub spiffe: Option<SpiffeId>,
    pub subject: String,
    pub issuer: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub serial: String,
    pub is_ca: bool,
}

/// Reads the first certificate of a file.
pub fn show(path: &Path) -> Result<CertificateInfo, Error> {
    let pem = files::read("read the certificate", path)?;
    let unusable = |why: &str| Error::unusable("certificate", &path.display().to_string(), why);
    let der = first_certificate(&pem).ok_or_else(|| unusable(NO_CERTIFICATE))?;
    let certificate = parse(&der).map_err(unusable)?;
    Ok(CertificateInfo {
        spiffe: spiffe::id_in(&certificate),
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        not_before: system_time(certificate.validity().not_before),
        not_after: system_time(certificate.validity().not_after),
        serial: certificate.raw_serial_as_string(),
        is_ca: certificate.is_ca(),
    })
}

impl fmt::Display for CertificateInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.spiffe {
            Some(id) => writeln!(f, "spiffe      {id}")?,
            None => writeln!(f, "spiffe      none")?,
        }
        writeln!(f, "subject     {}", self.subject)?;
        writeln!(f, "issuer      {}", self.issuer)?;
        writeln!(f, "not before  {}", Date(self.not_before))?;
        writeln!(f, "not after   {}", Date(self.not_after))?;
        writeln!(f, "serial      {}", self.serial)?;
        write!(f, "CA          {}", if self.is_ca { "yes" } else { "no" })
    }
}

/// A moment as RFC 3339 writes it.
struct Date(SystemTime);

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = i64::try_from(timestamp(self.0)).map_err(|_| fmt::Error)?;
        let date = ASN1Time::from_timestamp(seconds).map_err(|_| fmt::Error)?.to_datetime();
        let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
        let (hour, minute, second) = date.to_hms();
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

const NO_CERTIFICATE: &str = "no certificate in PEM is in it";

/// When a certificate ends.
pub(crate) fn not_after(der: &[u8]) -> Result<SystemTime, &'static str> {
    parse(der).map(|certificate| system_time(certificate.validity().not_after))
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, &'static str> {
    match x509_parser::parse_x509_certificate(der) {
        Ok((_, certificate)) => Ok(certificate),
        Err(_) => Err("it is not an X.509 certificate"),
    }
}

fn first_certificate(pem: &str) -> Option<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(pem.as_bytes()).ok()
}

fn trust_domain_of(ca: &X509Certificate<'_>) -> Option<TrustDomain> {
    let names = ca.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| {
        let GeneralName::URI(uri) = name else { return None };
        uri.strip_prefix("spiffe://")?.parse().ok()
    })
}

fn hex(byte: &u8) -> String {
    format!("{byte:02x}")
}

fn uri(text: &str) -> Result<SanType, rcgen::Error> {
    Ok(SanType::URI(text.try_into()?))
}

fn set_validity(params: &mut CertificateParams, validity: Validity) {
    let date = |time| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(timestamp(time));
    params.not_before = date(validity.not_before);
    params.not_after = date(validity.not_after);
}

fn timestamp(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs().min(TIMESTAMP_MAX)
}

fn system_time(time: ASN1Time) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or_default())
}

fn certificate_path(dir: &Path, stem: &str) -> PathBuf {
    dir.join(format!("{stem}.crt"))
}

fn key_path(dir: &Path, stem: &str) -> PathBuf {
    dir.join(format!("{stem}.key"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn trust_domain() -> TrustDomain {
        "stagedoor.local".parse().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn keys_are_for_their_owner_only() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("pki");
        let ca = init(&dir, &trust_domain()).unwrap();
        let id = "spiffe://stagedoor.local/node/node-1".parse().unwrap();
        let written = ca.issue(&id, Validity::default()).unwrap().write(&dir, "node-1").unwrap();
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join("ca.key")), 0o600);
        assert_eq!(mode(&written.key), 0o600);
    }

    #[test]
    fn a_ca_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &trust_domain()).unwrap();
        let before = fs::read(dir.path().join("ca.key")).unwrap();
        let error = init(dir.path(), &trust_domain()).unwrap_err();
        assert!(error.to_string().contains("ca.crt exists already"), "{error}");
        assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), before);
        fs::remove_file(dir.path().join("ca.crt")).unwrap();
        let error = init(dir.path(), &trust_domain()).unwrap_err();
        assert!(error.to_string().contains("ca.key exists already"), "{error}");
        assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), before);
    }

    #[test]
    fn a_certificate_says_who_until_when_and_from_whom() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &trust_domain()).unwrap();
        let ca = Ca::load(dir.path()).unwrap();
        let id: SpiffeId = "spiffe://stagedoor.local/control/control-1".parse().unwrap();
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let validity = Validity { not_before: at(1_700_000_000), not_after: at(1_800_000_000) };
        // Issued again, it replaces the first.
        ca.issue(&id, Validity::default()).unwrap().write(dir.path(), "control-1").unwrap();
        let written = ca.issue(&id, validity).unwrap().write(dir.path(), "control-1").unwrap();
        let info = show(&written.certificate).unwrap();
        assert_eq!(info.spiffe, Some(id));
        assert_eq!((info.not_before, info.not_after), (validity.not_before, validity.not_after));
        assert!(!info.is_ca);
        assert!(info.to_string().contains("not after   2027-01-15T08:00:00Z"), "{info}");
        let ca = show(&dir.path().join("ca.crt")).unwrap();
        assert!(ca.is_ca && ca.spiffe.is_none());
        assert_eq!(info.issuer, ca.subject);
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.len(), 4, "no temporary file stays behind: {left:?}");
    }

    #[test]
    fn a_ca_signs_for_its_own_trust_domain_only() {
        let ca = Ca::generate(&trust_domain()).unwrap();
        let id = "spiffe://elsewhere.local/node/node-1".parse().unwrap();
        let error = ca.issue(&id, Validity::default()).unwrap_err();
        assert!(matches!(error, Error::ForeignId { .. }), "{error}");
    }

    #[test]
    fn a_ca_with_anothers_key_is_not_loaded() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        init(one.path(), &trust_domain()).unwrap();
        init(two.path(), &trust_domain()).unwrap();
        fs::copy(two.path().join("ca.key"), one.path().join("ca.key")).unwrap();
        let error = Ca::load(one.path()).unwrap_err();
        assert!(error.to_string().contains("ca.key cannot be used"), "{error}");
    }

    #[test]
    fn what_cannot_be_shown_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let rubbish = dir.path().join("rubbish.crt");
        fs::write(&rubbish, "rubbish").unwrap();
        for path in [rubbish, dir.path().join("missing.crt")] {
            let error = show(&path).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }
}
