//! Who we are on the network: certificates, SPIFFE ids, and the one way in and out of a process.
//!
//! Every connection between two processes begins here: TLS 1.3, both sides verified, the identity of the peer checked,
//! before either side sees a byte. [`Listener`] lets peers in, [`Dialer`] reaches them, [`pki`] makes the certificates.
//! [`WebDialer`] reaches servers that are no processes of the cluster, such as a database on the web.
//!
//! Never decides what a peer may do beyond its role, never speaks a protocol of its own above TLS but for one byte of
//! greeting, and has no mode without verification between processes. No other crate builds a TLS configuration.

mod dialer;
mod error;
mod identity;
mod listener;
mod refusal;
mod sealed;
mod spiffe;
mod tls;
mod web;

pub mod grpc;
pub mod pki;

#[cfg(test)]
mod testing;

use std::fmt;

pub use dialer::{Dialed, Dialer, Expected, is_address};
pub use error::Error;
pub use identity::{Config, Identity};
pub use listener::{Accepted, Listener, ListenerConfig};
pub use refusal::Refusal;
pub use sealed::sealed;
pub use spiffe::SpiffeId;
pub use tls::install_crypto_provider;
pub use web::{Stream, WebDialer, WebStream};

/// What is spoken over a connection. Each has its own port and its own ALPN name, so that a peer at the wrong port
/// is told so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Grpc,
    Link,
    Beat,
}

impl Protocol {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "h2",
            Self::Link => "stagedoor-link",
            Self::Beat => "stagedoor-beat",
        }
    }

    pub(crate) fn alpn(self) -> &'static [u8] {
        self.as_str().as_bytes()
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
