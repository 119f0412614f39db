//! Names and numbers. Each is parsed once, at the edge; a value that exists is valid.

use std::fmt;
use std::str::FromStr;

use crate::slot::{Class, ShardId, Slot};
use crate::{Error, slot};

const LABEL_ALLOWED: &str = "1 to 63 of the characters a-z, 0-9 and '-'";
const LABEL_BYTES_MAX: usize = 63;
const KEY_ALLOWED: &str = "1 to 256 bytes of printable UTF-8";
const KEY_BYTES_MAX: usize = 256;

fn is_label(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.len() <= LABEL_BYTES_MAX && text.bytes().all(allowed)
}

fn is_key(text: &str) -> bool {
    !text.is_empty() && text.len() <= KEY_BYTES_MAX && text.chars().all(is_printable)
}

/// What is shown by itself: not what breaks a line of a log, nor what turns the direction of what stands after it.
fn is_printable(c: char) -> bool {
    let is_separator = matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}');
    let is_turn = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    // Two keys that look the same would be two agents. Scripts need their joiners and marks, though.
    let is_unseen = matches!(
        c,
        '\u{ad}' | '\u{180e}' | '\u{200b}' | '\u{2060}'..='\u{2064}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
    );
    !c.is_control() && !is_separator && !is_turn && !is_unseen
}

fn is_trust_domain(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    !text.is_empty() && text.len() <= 255 && text.bytes().all(allowed)
}

/// Declares a checked text id: `name`, `what it is called in errors`, `check`, `what is allowed`.
macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident, $allowed:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                if !$check(text) {
                    return Err(Error::malformed($what, text, $allowed));
                }
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(text: String) -> Result<Self, Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

/// Declares a number that only grows.
macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number after this one.
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

text_id!(/** Whose agents and works these are. */ Tenant, "tenant", is_label, LABEL_ALLOWED);
text_id!(
    /** The name of a definition, and so of the agents made from it. */
    DefinitionName, "definition name", is_label, LABEL_ALLOWED
);
text_id!(/** Tells agents of one definition apart. */ AgentKey, "agent key", is_key, KEY_ALLOWED);
text_id!(/** A client's own name for a submit, unique per agent. */ IdempotencyKey, "idempotency key", is_key, KEY_ALLOWED);
text_id!(/** A process of the cluster, as in its certificate. */ ProcessName, "process name", is_label, LABEL_ALLOWED);
text_id!(
    /** The trust domain of SPIFFE ids. */
    TrustDomain, "trust domain", is_trust_domain, "1 to 255 of the characters a-z, 0-9, '-' and '.'"
);
text_id!(/** The one id of a cluster, made once in its store. */ ClusterId, "cluster id", is_label, LABEL_ALLOWED);
text_id!(/** The name of a capability, e.g. `phase/action`. */ CapabilityName, "capability name", is_capability, CAPABILITY_ALLOWED);

const CAPABILITY_ALLOWED: &str = "1 to 127 of the characters a-z, 0-9, '-', '.', '_' and '/'";

fn is_capability(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._/".contains(&b);
    !text.is_empty() && text.len() <= 127 && text.bytes().all(allowed)
}

number_id!(/** The number of an ownership of a shard. 0: never owned. */ Epoch);
number_id!(/** The number of a leadership. 0: there was none yet. */ Term);
number_id!(/** One run of a process: larger for a later run under the same name. */ Incarnation);
number_id!(/** The number of a row in a shard's `log`. 0: before the first. */ Lsn);
number_id!(/** The number of an entry within its agent. 0: before the first. */ Seq);

/// What a process is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Store,
    Control,
    Node,
    Client,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Control => "control",
            Self::Node => "node",
            Self::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "store" => Ok(Self::Store),
            "control" => Ok(Self::Control),
            "node" => Ok(Self::Node),
            "client" => Ok(Self::Client),
            _ => Err(Error::malformed("role", text, "store, control, node or client")),
        }
    }
}

/// One agent: `tenant/name/key`. The key may itself contain `/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgentId {
    pub tenant: Tenant,
    pub name: DefinitionName,
    pub key: AgentKey,
}

impl AgentId {
    /// The slot that this agent belongs to, for ever.
    pub fn slot(&self) -> Slot {
        slot::slot_of(self)
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.tenant, self.name, self.key)
    }
}

impl FromStr for AgentId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let mut parts = text.splitn(3, '/');
        let (Some(tenant), Some(name), Some(key)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(Error::malformed("agent id", text, "tenant/name/key"));
        };
        Ok(Self { tenant: tenant.parse()?, name: name.parse()?, key: key.parse()? })
    }
}

/// One work: where it was accepted. Text `w-<class>-<slot>-<lsn>`, all hexadecimal, so that it routes without an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkId {
    pub class: Class,
    pub slot: Slot,
    pub lsn: Lsn,
}

impl fmt::Display for WorkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w-{:x}-{:03x}-{:x}", self.class.0, self.slot.get(), self.lsn.0)
    }
}

impl FromStr for WorkId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        parse_work_id(text).ok_or_else(|| {
            Error::malformed("work id", text, "w-<class>-<slot>-<lsn> in lower-case hexadecimal")
        })
    }
}

fn parse_work_id(text: &str) -> Option<WorkId> {
    let mut parts = text.strip_prefix("w-")?.split('-');
    let class = u16::from_str_radix(parts.next()?, 16).ok()?;
    let slot = Slot::new(u16::from_str_radix(parts.next()?, 16).ok()?)?;
    let lsn = u64::from_str_radix(parts.next()?, 16)
        .ok()
        .filter(|lsn| 0 < *lsn && *lsn <= i64::MAX as u64)?;
    let id = WorkId { class: Class(class), slot, lsn: Lsn(lsn) };
    // One work has one text: `+1` or leading zeros would be other names of the same work.
    (parts.next().is_none() && id.to_string() == text).then_some(id)
}

/// The content hash of a definition, 32 bytes of blake3, text in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DefinitionHash(pub [u8; 32]);

impl DefinitionHash {
    /// Hashes the canonical encoding of a definition.
    pub fn of(canonical: &[u8]) -> Self {
        Self(*blake3::hash(canonical).as_bytes())
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl TryFrom<&[u8]> for DefinitionHash {
    type Error = Error;
    fn try_from(bytes: &[u8]) -> Result<Self, Error> {
        let hash =
            bytes.try_into().map_err(|_| Error::malformed("definition hash", "", "32 bytes"))?;
        Ok(Self(hash))
    }
}

impl fmt::Display for DefinitionHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from(self.0).to_hex().as_str())
    }
}

impl FromStr for DefinitionHash {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self, Error> {
        let hash = blake3::Hash::from_hex(text)
            .map_err(|_| Error::malformed("definition hash", text, "64 hexadecimal digits"))?;
        Ok(Self(*hash.as_bytes()))
    }
}

/// One run of one process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    pub name: ProcessName,
    pub incarnation: Incarnation,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.name, self.incarnation)
    }
}

/// Which process owns a shard, and since which ownership.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    pub shard: ShardId,
    pub epoch: Epoch,
    pub member: Member,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: FromStr<Err = Error> + fmt::Display>(text: &str, valid: bool) {
        match text.parse::<T>() {
            Ok(id) => assert!(valid && id.to_string() == text, "{text:?} was read as {id}"),
            Err(error) => {
                assert!(!valid && error.to_string().contains("not valid"), "{text:?}: {error}")
            }
        }
    }

    #[test]
    fn a_label_is_lower_case_and_short() {
        check::<Tenant>("acme-1", true);
        check::<Tenant>(&"a".repeat(63), true);
        check::<Tenant>(&"a".repeat(64), false);
        check::<Tenant>("", false);
        check::<Tenant>("Acme", false);
        check::<Tenant>("a/b", false);
    }

    #[test]
    fn a_key_is_printable() {
        check::<AgentKey>("user 42/ä", true);
        check::<AgentKey>(&"k".repeat(256), true);
        check::<AgentKey>(&"k".repeat(257), false);
        check::<AgentKey>("", false);
        let turns_and_breaks = ['\n', '\u{2028}', '\u{202e}', '\u{2066}', '\u{feff}'];
        let unseen = ['\u{ad}', '\u{200b}', '\u{2060}', '\u{fff9}', '\u{e0041}'];
        for hidden in turns_and_breaks.into_iter().chain(unseen) {
            check::<AgentKey>(&format!("a{hidden}b"), false);
        }
    }

    #[test]
    fn an_agent_id_keeps_slashes_in_its_key() {
        check::<AgentId>("acme/support/user/42", true);
        check::<AgentId>("acme/support", false);
        check::<AgentId>("acme//k", false);
    }

    #[test]
    fn a_work_id_has_one_text() {
        check::<WorkId>("w-0-0ff-1c2", true);
        check::<WorkId>("w-0-fff-1", true);
        check::<WorkId>("w-0-ff-1c2", false);
        check::<WorkId>("w-0-0ff-01", false);
        check::<WorkId>("w-0-0ff-+1", false);
        check::<WorkId>("w-0-0ff-0", false);
        check::<WorkId>("w-0-1000-1", false);
        check::<WorkId>("w-0-0ff-ffffffffffffffff", false);
        check::<WorkId>("w-0-0ff", false);
        check::<WorkId>("0-0ff-1", false);
    }

    #[test]
    fn an_error_does_not_repeat_a_megabyte() {
        let error = "X".repeat(1 << 20).parse::<Tenant>().unwrap_err();
        assert!(error.to_string().len() < 250);
    }
}
