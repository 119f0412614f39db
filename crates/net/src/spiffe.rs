//! Who a process is, as its certificate says: exactly one SPIFFE id.

use std::fmt;
use std::str::FromStr;

use domain::{ProcessName, Role, TrustDomain};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use crate::Error;
use crate::refusal::Refusal;

/// The most that a log line repeats of a name that a stranger chose.
const SUBJECT_CHARS_MAX: usize = 200;

/// The one identity of a process: `spiffe://stagedoor.local/node/node-1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    pub trust_domain: TrustDomain,
    pub role: Role,
    pub name: ProcessName,
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}/{}", self.trust_domain, self.role, self.name)
    }
}

impl FromStr for SpiffeId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).ok_or_else(|| Error::Spiffe { text: printable(text) })
    }
}

fn parse(text: &str) -> Option<SpiffeId> {
    let mut parts = text.strip_prefix("spiffe://")?.split('/');
    let trust_domain = parts.next()?.parse().ok()?;
    let role = parts.next()?.parse().ok()?;
    let name = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(SpiffeId { trust_domain, role, name })
}

/// The id in a certificate, which has to be its only URI: with two of them, each reader could believe another one.
pub(crate) fn id_of(der: &[u8]) -> Result<SpiffeId, Refusal> {
    let (_, certificate) =
        x509_parser::parse_x509_certificate(der).map_err(|_| Refusal::BadCertificate)?;
    id_in(&certificate).ok_or(Refusal::NoSpiffeId)
}

/// The same, of a certificate that is parsed already.
pub(crate) fn id_in(certificate: &X509Certificate<'_>) -> Option<SpiffeId> {
    match uris_in(certificate).as_slice() {
        [uri] => uri.parse().ok(),
        _ => None,
    }
}

/// The id in a certificate, if it also belongs to our trust domain.
pub(crate) fn id_within(der: &[u8], trust_domain: &TrustDomain) -> Result<SpiffeId, Refusal> {
    let id = id_of(der)?;
    if id.trust_domain != *trust_domain {
        return Err(Refusal::TrustDomain);
    }
    Ok(id)
}

/// How a certificate calls its owner, for logs. Nobody has verified it.
pub(crate) fn subject_of(der: &[u8]) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    match uris_in(&certificate).as_slice() {
        [uri] => Some(printable(uri)),
        _ => Some(printable(&certificate.subject().to_string())),
    }
}

fn uris_in(certificate: &X509Certificate<'_>) -> Vec<String> {
    // An extension that stands there twice is an error here, and so a certificate without an id.
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        // It may have been meant as a URI, and then there is one too many.
        GeneralName::Invalid(..) => Some(String::new()),
        GeneralName::OtherName(..)
        | GeneralName::RFC822Name(_)
        | GeneralName::DNSName(_)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_) => None,
    };
    names.value.general_names.iter().filter_map(uri).collect()
}

/// What a stranger wrote must not forge a log line.
fn printable(text: &str) -> String {
    text.chars().flat_map(char::escape_debug).take(SUBJECT_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, valid: bool) {
        match text.parse::<SpiffeId>() {
            Ok(id) => assert!(valid && id.to_string() == text, "{text:?} was read as {id}"),
            Err(error) => {
                let text = error.to_string();
                assert!(!valid && text.contains("spiffe://<trust domain>"), "{text}");
            }
        }
    }

    #[test]
    fn a_spiffe_id_has_one_text() {
        check("spiffe://stagedoor.local/node/node-1", true);
        check("spiffe://stagedoor.local/store/store-1", true);
        check("spiffe://a/client/c", true);
        check("spiffe://stagedoor.local/node/node-1/", false);
        check("spiffe://stagedoor.local/node", false);
        check("spiffe://stagedoor.local//node-1", false);
        check("spiffe://stagedoor.local/admin/node-1", false);
        check("spiffe:///node/node-1", false);
        check("SPIFFE://stagedoor.local/node/node-1", false);
        check("https://stagedoor.local/node/node-1", false);
        check("", false);
    }

    #[test]
    fn a_strangers_name_cannot_forge_a_log_line() {
        let forged = printable("a\nWARN all is well");
        assert!(!forged.contains('\n'));
        assert!(printable(&"x".repeat(10_000)).len() <= SUBJECT_CHARS_MAX);
    }
}
