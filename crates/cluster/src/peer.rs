use std::fmt;
use std::str::FromStr;

use domain::{ProcessName, Role};

/// A process of the cluster, by the name in its certificate: `node/node-1`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    pub role: Role,
    pub name: ProcessName,
}

impl Peer {
    pub fn new(role: Role, name: ProcessName) -> Self {
        Self { role, name }
    }
}

impl From<&net::SpiffeId> for Peer {
    fn from(id: &net::SpiffeId) -> Self {
        Self::new(id.role, id.name.clone())
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.name)
    }
}

impl FromStr for Peer {
    type Err = domain::Error;
    fn from_str(text: &str) -> Result<Self, domain::Error> {
        let (role, name) = text.split_once('/').unwrap_or((text, ""));
        Ok(Self::new(role.parse()?, name.parse()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_read_as_it_is_written() {
        let peer: Peer = "node/node-1".parse().unwrap();
        assert_eq!((peer.role, peer.to_string()), (Role::Node, "node/node-1".to_owned()));
        for bad in ["node", "node/", "/node-1", "king/node-1", "node/a/b"] {
            assert!(bad.parse::<Peer>().is_err(), "{bad}");
        }
    }
}
