//! The name that a peer claims in its first message must be the one in its certificate.
//!
//! ractor_cluster believes the claim, so whoever has any valid certificate could take the name, and the place, of
//! another. The client speaks first: its first message is read here, compared, and handed back with the stream.

use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

use crate::Peer;

/// A name, flags and an address: a hundred bytes.
const FIRST_BYTES_MAX: u64 = 4_096;
const TIMEOUT: Duration = Duration::from_secs(5);

/// What of ractor_cluster's messages matters here. A test holds it against the real thing.
#[derive(Clone, PartialEq, prost::Message)]
struct NetworkMessage {
    #[prost(message, optional, tag = "1")]
    auth: Option<AuthenticationMessage>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AuthenticationMessage {
    #[prost(message, optional, tag = "1")]
    name: Option<NameMessage>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NameMessage {
    #[prost(string, tag = "1")]
    name: String,
}

/// Why a peer that has a valid certificate was turned away before ractor_cluster saw it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Refused {
    #[error("it said nothing in time")]
    Silent,
    #[error("it went away")]
    Left,
    #[error("its first message is no name")]
    Malformed,
    #[error("it claims to be {claimed:?}")]
    Name { claimed: String },
}

impl Refused {
    /// The value of the label `reason`.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Silent => "name_timeout",
            Self::Left => "left",
            Self::Malformed => "malformed_name",
            Self::Name { .. } => "name_mismatch",
        }
    }
}

/// A first message that was in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct First {
    /// Its bytes as they came, for ractor_cluster to read again.
    pub(crate) bytes: Vec<u8>,
    /// What follows the `@`: differs between two runs of a process.
    pub(crate) instance: String,
}

/// The instance in a full name, if it is the peer's.
pub(crate) fn instance_of<'a>(peer: &Peer, full: &'a str) -> Option<&'a str> {
    let (name, instance) = full.split_once('@')?;
    (name == peer.to_string()).then_some(instance)
}

/// Reads the first message of `peer` and nothing after it.
pub(crate) async fn check(
    stream: &mut (impl AsyncRead + Unpin),
    peer: &Peer,
) -> Result<First, Refused> {
    let bytes = timeout(TIMEOUT, read(stream)).await.map_err(|_| Refused::Silent)??;
    let message = NetworkMessage::decode(&bytes[8..]).map_err(|_| Refused::Malformed)?;
    let name = message.auth.and_then(|auth| auth.name).ok_or(Refused::Malformed)?.name;
    match instance_of(peer, &name) {
        Some(instance) => Ok(First { instance: instance.to_owned(), bytes }),
        None => Err(Refused::Name { claimed: shown(&name) }),
    }
}

async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, Refused> {
    let length = stream.read_u64().await.map_err(|_| Refused::Left)?;
    if FIRST_BYTES_MAX < length {
        return Err(Refused::Malformed);
    }
    let mut bytes = length.to_be_bytes().to_vec();
    let read = stream.take(length).read_to_end(&mut bytes).await.map_err(|_| Refused::Left)?;
    if (read as u64) < length {
        return Err(Refused::Left);
    }
    Ok(bytes)
}

/// What a stranger wrote, cut to what a log line bears.
fn shown(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(name: &str) -> Vec<u8> {
        let name = NameMessage { name: name.to_owned() };
        let auth = AuthenticationMessage { name: Some(name) };
        let body = NetworkMessage { auth: Some(auth) }.encode_to_vec();
        [&(body.len() as u64).to_be_bytes()[..], &body].concat()
    }

    async fn checked(mut input: &[u8]) -> Result<First, Refused> {
        check(&mut input, &"node/node-1".parse().unwrap()).await
    }

    #[tokio::test]
    async fn the_certified_name_passes_with_its_bytes() {
        let bytes = framed("node/node-1@7-ab");
        let mut stream = [&bytes[..], b"next"].concat();
        let first = checked(&stream).await.unwrap();
        assert_eq!(first, First { bytes: bytes.clone(), instance: "7-ab".to_owned() });
        let mut rest = &stream.split_off(0)[..];
        check(&mut rest, &"node/node-1".parse().unwrap()).await.unwrap();
        assert_eq!(rest, b"next");
    }

    #[tokio::test]
    async fn the_name_of_another_is_refused() {
        for claimed in
            ["node/node-2@7", "node/node-1", "control/node-1@7", "node/node-10@7", "@", ""]
        {
            let refused = checked(&framed(claimed)).await.unwrap_err();
            assert_eq!(refused, Refused::Name { claimed: claimed.to_owned() });
        }
    }

    #[tokio::test]
    async fn rubbish_is_refused() {
        assert_eq!(checked(&[]).await, Err(Refused::Left));
        assert_eq!(checked(&framed("node/node-1@7")[..12]).await, Err(Refused::Left));
        assert_eq!(checked(&u64::MAX.to_be_bytes()).await, Err(Refused::Malformed));
        assert_eq!(checked(&0_u64.to_be_bytes()).await, Err(Refused::Malformed));
        let body = [&4_u64.to_be_bytes()[..], &[0xff; 4]].concat();
        assert_eq!(checked(&body).await, Err(Refused::Malformed));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_refused_at_the_deadline() {
        let (mut ours, _theirs) = tokio::io::duplex(64);
        let refused = check(&mut ours, &"node/node-1".parse().unwrap()).await;
        assert_eq!(refused, Err(Refused::Silent));
    }
}
