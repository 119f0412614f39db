//! What can go wrong between two processes before they exchange a byte of their own.

use std::error::Error as StdError;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use domain::ErrorKind;
use rustls::AlertDescription;

use crate::refusal::{Refusal, tls_error};
use crate::{Expected, SpiffeId};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "SPIFFE id {text:?} is not valid: \
         spiffe://<trust domain>/<store|control|node|client>/<name> is allowed"
    )]
    Spiffe { text: String },
    #[error("cannot {action} {path}")]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A certificate or key that is there and cannot be used. `origin` is its path, where it has one.
    #[error("{what} {origin} cannot be used: {why}")]
    Unusable { what: &'static str, origin: String, why: String },
    #[error("{path} exists already: choose another folder, or remove it if nothing trusts it")]
    Exists { path: PathBuf },
    #[error("cannot issue a certificate for {subject}")]
    Issue {
        subject: String,
        #[source]
        source: rcgen::Error,
    },
    #[error("cannot issue a certificate for {id}: this CA belongs to trust domain {trust_domain}")]
    ForeignId { id: SpiffeId, trust_domain: domain::TrustDomain },
    #[error(
        "cannot listen on {addr}: the address is in use; \
         stop the process that holds it, or choose another address"
    )]
    AddressInUse { addr: SocketAddr },
    #[error("cannot listen on {addr}")]
    Listen {
        addr: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the listener on {addr} has ended")]
    Ended { addr: SocketAddr },
    #[error("address {addr:?} is not valid: host:port is allowed")]
    Address { addr: String },
    /// Nobody who counts has answered: retry, or try another address.
    #[error("cannot reach {addr}")]
    NotReached {
        addr: String,
        #[source]
        source: io::Error,
    },
    /// The peer has answered, and does not want us: a retry changes nothing before someone acts.
    #[error("{addr} refused this process: {why}")]
    Refused {
        addr: String,
        why: &'static str,
        #[source]
        source: rustls::Error,
    },
    /// The peer has answered, and we do not want it.
    #[error(
        "{addr} cannot be trusted ({refusal}); check that both have certificates of the same CA"
    )]
    Untrusted {
        addr: String,
        refusal: Refusal,
        #[source]
        source: rustls::Error,
    },
    /// The peer is in order, only not the one that was meant.
    #[error("{addr} is {found}, not {expected}: check the address")]
    WrongPeer { addr: String, found: SpiffeId, expected: Expected },
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Spiffe { .. }
            | Self::File { .. }
            | Self::Unusable { .. }
            | Self::ForeignId { .. }
            | Self::Address { .. } => ErrorKind::Invalid,
            Self::Exists { .. } | Self::AddressInUse { .. } => ErrorKind::Conflict,
            Self::Issue { .. } => ErrorKind::Internal,
            Self::Listen { .. } | Self::Ended { .. } | Self::NotReached { .. } => {
                ErrorKind::Unavailable
            }
            Self::Refused { .. } | Self::Untrusted { .. } | Self::WrongPeer { .. } => {
                ErrorKind::Denied
            }
        }
    }

    /// The error of this crate at the root of another one, however many layers of transport lie between. It tells
    /// "refused by the cluster" from "not reached".
    pub fn find<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            // An IO error is transparent: what it wraps is not its source.
            if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref)
                && let Some(found) = inner.downcast_ref()
            {
                return Some(found);
            }
            next = error.source();
        }
        None
    }

    pub(crate) fn unusable(what: &'static str, origin: &str, why: impl ToString) -> Self {
        Self::Unusable { what, origin: origin.to_owned(), why: why.to_string() }
    }

    /// What a failed attempt to reach `addr` means.
    pub(crate) fn of_dial(addr: &str, source: io::Error) -> Self {
        let addr = addr.to_owned();
        let Some(error) = tls_error(&source) else {
            return Self::NotReached { addr, source };
        };
        let answer = error.clone();
        if let rustls::Error::AlertReceived(alert) = answer {
            return Self::Refused { addr, why: meaning(alert), source: answer };
        }
        Self::Untrusted { addr, refusal: Refusal::of_handshake(&source), source: answer }
    }
}

/// What a peer that closes with this alert wants to tell us, and what to do about it.
fn meaning(alert: AlertDescription) -> &'static str {
    use AlertDescription as Alert;
    const MEANINGS: [(Alert, &str); 7] = [
        (
            Alert::CertificateExpired,
            "its clock says that our certificate is not valid now; \
             issue a new one with `stagedoor pki issue`",
        ),
        (
            Alert::UnknownCA,
            "our certificate is from another CA; issue one with the CA of this cluster",
        ),
        // The signature under our certificate is not by its CA.
        (Alert::DecryptError, "our certificate is from another CA of the same name"),
        (
            Alert::AccessDenied,
            "it does not allow our role or trust domain; issue a certificate for an allowed role",
        ),
        (Alert::CertificateRequired, "it demands a certificate and got none"),
        (Alert::NoApplicationProtocol, "it speaks another protocol; check the port"),
        (Alert::ProtocolVersion, "it does not speak TLS 1.3"),
    ];
    let found = MEANINGS.iter().find(|(known, _)| *known == alert);
    found.map_or("it ended the TLS handshake", |(_, meaning)| meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_found_through_layers_of_transport() {
        let refused = Error::Refused {
            addr: "a:1".into(),
            why: "it does not want us",
            source: rustls::Error::AlertReceived(AlertDescription::AccessDenied),
        };
        let layered = tonic::ConnectError(Box::new(io::Error::other(refused)));
        assert_eq!(Error::find(&layered).map(Error::kind), Some(ErrorKind::Denied));
        assert!(Error::find(&io::Error::other("something else")).is_none());
    }
}
