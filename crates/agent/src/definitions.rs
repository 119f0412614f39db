//! The definitions that this node has met, by their hash. Content-addressed, so a copy is never stale.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use domain::turn::Limits;
use domain::{Definition, DefinitionHash};
use std::sync::Arc;

/// A definition with the bytes that its hash is of.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub definition: Arc<Definition>,
    pub body: Bytes,
}

/// A bounded cache.
pub(crate) struct Definitions {
    known: Mutex<HashMap<DefinitionHash, Known>>,
}

const KNOWN_MAX: usize = 4_096;

impl Default for Definitions {
    fn default() -> Self {
        let (hash, body) = proto::convert::canonical(&Definition::postchain());
        let known = Known { definition: Arc::new(Definition::postchain()), body };
        Self { known: Mutex::new(HashMap::from([(hash, known)])) }
    }
}

impl Definitions {
    pub(crate) fn get(&self, hash: &DefinitionHash) -> Option<Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(hash).cloned()
    }

    /// Takes in a body that came from the control plane or a shard. None if it is not what `hash` says.
    pub(crate) fn learn(&self, hash: DefinitionHash, body: Bytes) -> Option<Known> {
        if DefinitionHash::of(&body) != hash {
            return None;
        }
        let definition = Arc::new(proto::convert::definition_from_body(&body).ok()?);
        let fresh = Known { definition, body };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if KNOWN_MAX <= known.len() {
            // Whatever goes is fetched again when it is needed.
            let victim = known.keys().find(|other| **other != hash).copied();
            victim.and_then(|victim| known.remove(&victim));
        }
        known.insert(hash, fresh.clone());
        Some(fresh)
    }

    /// What a definition allows a turn. One that is not known allows what the PostChain does; it is fetched before a
    /// turn is folded, so that happens only where nothing is decided.
    pub(crate) fn limits(&self, hash: &DefinitionHash) -> Limits {
        match self.get(hash) {
            Some(known) => Limits::from(&*known.definition),
            None => Limits::from(&Definition::postchain()),
        }
    }
}
