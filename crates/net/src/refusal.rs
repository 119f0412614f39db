//! Why a peer was turned away: a closed list, one log line and one count for each.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::LazyLock;

use prometheus::{IntCounter, IntCounterVec, Opts};
use rustls::CertificateError;

use crate::Protocol;

/// Why a peer was turned away. The texts are the values of the label `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// It did not finish its handshake in time.
    Timeout,
    /// It was the oldest unfinished handshake when a newcomer needed its place.
    Crowded,
    /// It was in order, but this process did not take it in time.
    Backlog,
    /// It broke TLS, or did not accept our certificate.
    Tls,
    /// Its certificate has expired.
    Expired,
    /// Its certificate is not valid yet: one of the two clocks is wrong.
    NotYetValid,
    /// Its certificate is from another CA.
    UnknownIssuer,
    /// It showed no certificate.
    NoCertificate,
    /// Its certificate is damaged, or not made for this use.
    BadCertificate,
    /// Its certificate has no SPIFFE id, or more than one.
    NoSpiffeId,
    /// It belongs to another trust domain.
    TrustDomain,
    /// Its role has no business here.
    Role,
    /// It speaks another protocol, or did not say which.
    Alpn,
    /// It went away by itself.
    Left,
}

impl Refusal {
    pub const ALL: [Self; 14] = [
        Self::Timeout,
        Self::Crowded,
        Self::Backlog,
        Self::Tls,
        Self::Expired,
        Self::NotYetValid,
        Self::UnknownIssuer,
        Self::NoCertificate,
        Self::BadCertificate,
        Self::NoSpiffeId,
        Self::TrustDomain,
        Self::Role,
        Self::Alpn,
        Self::Left,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Crowded => "crowded",
            Self::Backlog => "backlog",
            Self::Tls => "tls",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::UnknownIssuer => "unknown_issuer",
            Self::NoCertificate => "no_certificate",
            Self::BadCertificate => "bad_certificate",
            Self::NoSpiffeId => "no_spiffe_id",
            Self::TrustDomain => "trust_domain",
            Self::Role => "role",
            Self::Alpn => "alpn",
            Self::Left => "left",
        }
    }

    /// What a failed handshake was about.
    pub(crate) fn of_handshake(error: &io::Error) -> Self {
        match tls_error(error) {
            Some(error) => Self::of_tls(error),
            None => Self::Left,
        }
    }

    fn of_tls(error: &rustls::Error) -> Self {
        if let rustls::Error::InvalidCertificate(error) = error {
            return Self::of_certificate(error);
        }
        if matches!(error, rustls::Error::NoCertificatesPresented) {
            return Self::NoCertificate;
        }
        if matches!(error, rustls::Error::NoApplicationProtocol) {
            return Self::Alpn;
        }
        Self::Tls
    }

    fn of_certificate(error: &CertificateError) -> Self {
        use CertificateError::{
            Expired, ExpiredContext, NotValidYet, NotValidYetContext, UnknownIssuer,
        };
        if let CertificateError::Other(other) = error
            && let Some(refusal) = other.0.downcast_ref::<Self>()
        {
            return *refusal;
        }
        if matches!(error, Expired | ExpiredContext { .. }) {
            return Self::Expired;
        }
        if matches!(error, NotValidYet | NotValidYetContext { .. }) {
            return Self::NotYetValid;
        }
        // A signature that does not fit is another CA under the name of ours.
        if matches!(error, UnknownIssuer | CertificateError::BadSignature) {
            return Self::UnknownIssuer;
        }
        Self::BadCertificate
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::error::Error for Refusal {}

/// The TLS error inside an IO error, if that is what it is.
pub(crate) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// A peer that was turned away, with what is known of it.
#[derive(Debug)]
pub(crate) struct Rejection {
    pub(crate) refusal: Refusal,
    pub(crate) subject: Option<String>,
    pub(crate) source: Option<io::Error>,
}

impl Rejection {
    pub(crate) fn of(refusal: Refusal) -> Self {
        Self { refusal, subject: None, source: None }
    }

    pub(crate) fn with_subject(self, subject: Option<String>) -> Self {
        Self { subject, ..self }
    }

    pub(crate) fn with_source(self, source: io::Error) -> Self {
        Self { source: Some(source), ..self }
    }

    /// Counts it and logs it.
    pub(crate) fn record(&self, addr: SocketAddr, protocol: Protocol) {
        REFUSED.with_label_values(&[self.refusal.as_str()]).inc();
        let reason = self.refusal.as_str();
        let subject = self.subject.as_deref().unwrap_or("unknown");
        let error = self.source.as_ref().map(tracing::field::display);
        if self.refusal == Refusal::Left {
            // Every TCP probe ends like this, the failure detector's among them: nothing for anybody to act on.
            tracing::debug!(%addr, subject, reason, %protocol, error, "peer left");
            return;
        }
        tracing::warn!(%addr, subject, reason, %protocol, error, "refused peer");
    }
}

pub(crate) static REFUSED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let counter = counters("stagedoor_net_refused_total", "Peers turned away.", "reason");
    // Series that exist from the start can be compared with zero.
    for refusal in Refusal::ALL {
        counter.with_label_values(&[refusal.as_str()]);
    }
    counter
});

pub(crate) static ACCEPTED: LazyLock<IntCounterVec> =
    LazyLock::new(|| counters("stagedoor_net_accepted_total", "Peers let in.", "protocol"));

pub(crate) static ACCEPT_ERRORS: LazyLock<IntCounter> = LazyLock::new(|| {
    let counter = IntCounter::new(
        "stagedoor_net_accept_errors_total",
        "Times that the system could not give us a waiting connection.",
    )
    .expect("the name is a constant and valid");
    prometheus::register(Box::new(counter.clone())).expect("registered once, here");
    counter
});

fn counters(name: &str, help: &str, label: &str) -> IntCounterVec {
    let counter = IntCounterVec::new(Opts::new(name, help), &[label])
        .expect("name and label are constants and valid");
    prometheus::register(Box::new(counter.clone())).expect("registered once, here");
    counter
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn every_refusal_is_counted_from_zero_under_its_own_name() {
        LazyLock::force(&REFUSED);
        let families = prometheus::gather();
        let refused = families.iter().find(|f| f.name() == "stagedoor_net_refused_total").unwrap();
        assert_eq!(refused.get_metric().len(), Refusal::ALL.len());
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_refusal_is_logged_with_address_subject_and_reason() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let subject = Some("spiffe://stagedoor.local/client/ann".to_owned());
            let rejection = Rejection::of(Refusal::Role).with_subject(subject);
            rejection.record("127.0.0.1:4711".parse().unwrap(), Protocol::Link);
            // A probe is not worth a line.
            Rejection::of(Refusal::Left).record("127.0.0.1:4712".parse().unwrap(), Protocol::Link);
        });
        let logged = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert!(!logged.contains("4712"), "{logged}");
        let id = r#"subject="spiffe://stagedoor.local/client/ann""#;
        for part in ["WARN", "addr=127.0.0.1:4711", id, r#"reason="role""#] {
            assert!(logged.contains(part), "{part} is missing in {logged}");
        }
    }
}
