//! Definitions: applied through the leader, read by anybody, their bodies kept by hash.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use bytes::Bytes;
use domain::definition::POSTCHAIN;
use domain::{Definition, DefinitionHash, DefinitionName, Tenant};
use prost::Message as _;
use proto::link::read_control::Read;
use proto::link::{
    DefinitionRequest, DefinitionResponse, Envelope, PutAudit, PutDefinition, ReadDefinitions,
    Refusal, control_write::Write,
};
use store::ControlOutcome;

use crate::actor::Message;
use crate::clock::wall_ms;
use crate::links::{malformed, refusal};
use crate::shared::{Shared, encoded, row};
use crate::{Error, Handle};

const BODIES_BYTES_MAX: usize = 16 << 20;
const PAGE_MAX: u32 = 1_000;
const PAGE_BYTES_MAX: usize = 4 << 20;
const WRITE_MS: u64 = 5_000;

/// The definition that every tenant has, encoded once.
static BUILT_IN: LazyLock<(DefinitionHash, Bytes)> =
    LazyLock::new(|| proto::convert::canonical(&Definition::postchain()));

fn built_in(tenant: &Tenant) -> PutDefinition {
    let (hash, body) = &*BUILT_IN;
    PutDefinition {
        hash: Bytes::copy_from_slice(hash.as_bytes()),
        tenant: tenant.to_string(),
        name: POSTCHAIN.to_owned(),
        body: body.clone(),
        create_ms: 0,
    }
}

/// Bodies by hash, oldest out first. A body never changes, so none is ever stale.
#[derive(Default)]
pub(crate) struct Bodies(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    bodies: BTreeMap<DefinitionHash, Bytes>,
    order: VecDeque<DefinitionHash>,
    bytes: usize,
}

impl Bodies {
    fn get(&self, hash: &DefinitionHash) -> Option<Bytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).bodies.get(hash).cloned()
    }

    fn keep(&self, hash: DefinitionHash, body: Bytes) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = body.len();
        if BODIES_BYTES_MAX < bytes || kept.bodies.insert(hash, body).is_some() {
            return;
        }
        kept.bytes += bytes;
        kept.order.push_back(hash);
        while BODIES_BYTES_MAX < kept.bytes {
            let Some(oldest) = kept.order.pop_front() else { break };
            let freed = kept.bodies.remove(&oldest).map_or(0, |body| body.len());
            kept.bytes -= freed;
        }
    }
}

impl Handle {
    /// Makes `definition` the current one of its name, and notes that `actor` did. The same content again changes
    /// nothing.
    ///
    /// # Errors
    /// Its name is a built-in one's; this replica does not lead; the store does not answer.
    pub async fn apply_definition(
        &self,
        actor: String,
        tenant: Tenant,
        definition: Definition,
    ) -> Result<PutDefinition, Error> {
        if definition.name.as_str() == POSTCHAIN {
            return Err(Error::BuiltIn { name: definition.name.to_string() });
        }
        let (hash, body) = proto::convert::canonical(&definition);
        let current = self.definition(tenant.clone(), definition.name.clone(), None).await?;
        if let Some(current) = current.filter(|current| current.hash == hash.as_bytes()[..]) {
            return Ok(current);
        }
        let put = PutDefinition {
            hash: Bytes::copy_from_slice(hash.as_bytes()),
            tenant: tenant.to_string(),
            name: definition.name.to_string(),
            body,
            create_ms: wall_ms(),
        };
        let put = match self.shared.status().leads {
            true => self.put_definition(&actor, put).await?,
            false => self.apply_at_leader(&actor, &put).await?,
        };
        self.shared.bodies.keep(hash, put.body.clone());
        Ok(put)
    }

    /// Writes a definition that was checked, as the leader.
    pub(crate) async fn put_definition(
        &self,
        actor: &str,
        put: PutDefinition,
    ) -> Result<PutDefinition, Error> {
        self.write_definition(actor.to_owned(), put.clone()).await?;
        Ok(put)
    }

    async fn write_definition(&self, actor: String, put: PutDefinition) -> Result<(), Error> {
        let status = self.shared.status();
        if !status.leads {
            return Err(Error::NotLeader { leader: status.leader });
        }
        let audit = PutAudit {
            at_ms: put.create_ms,
            actor,
            action: "ApplyDefinition".to_owned(),
            subject: format!("definition/{}/{}", put.tenant, put.name),
            term: status.term.0,
        };
        let writes = vec![row(Write::Definition(put)), row(Write::Audit(audit))];
        let written = self.shared.write(status.term, writes, WRITE_MS).await;
        match written.map_err(Error::store("write the definition"))? {
            ControlOutcome::Done(_) => Ok(()),
            ControlOutcome::NotLeader(leader) => {
                // It may have stopped meanwhile, and then leads nothing any more.
                _ = self.inbox.cast(Message::Deposed(status.term));
                Err(Error::NotLeader { leader: leader.name })
            }
        }
    }

    /// A definition of a tenant: the version of this hash, or the current one.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn definition(
        &self,
        tenant: Tenant,
        name: DefinitionName,
        hash: Option<DefinitionHash>,
    ) -> Result<Option<PutDefinition>, Error> {
        if name.as_str() == POSTCHAIN {
            let is_it = hash.is_none_or(|hash| hash == BUILT_IN.0);
            return Ok(is_it.then(|| built_in(&tenant)));
        }
        let read = ReadDefinitions {
            tenant: tenant.to_string(),
            name: name.to_string(),
            hash: hash.map(|hash| Bytes::copy_from_slice(hash.as_bytes())).unwrap_or_default(),
            // The same content under another name has the same hash only if its name is the same; one row is enough.
            limit: 1,
            after_name: String::new(),
        };
        // Every submit asks: many at once ask together.
        let found = self.shared.lookups.get(read.clone(), async || {
            let answer = self.shared.read(Read::Definitions(read)).await.map_err(Arc::new)?;
            Ok(answer.definitions.into_iter().find(|found| found.name == name.as_str()))
        });
        found.await.map_err(|source| Error::Store { action: "read the definition", source })
    }

    /// The current definitions of a tenant after `after`, by name; the built-in ones among them. Fewer than `limit` are
    /// the last ones, unless they are large.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn definitions(
        &self,
        tenant: Tenant,
        after: &str,
        limit: u32,
    ) -> Result<Vec<PutDefinition>, Error> {
        let limit = limit.clamp(1, PAGE_MAX);
        let (mut found, mut bytes, mut is_end) = (Vec::new(), 0, false);
        // The store cuts a page by its bytes, too.
        while !is_end && found.len() < limit as usize && bytes < PAGE_BYTES_MAX {
            let after_name =
                found.last().map_or(after, |last: &PutDefinition| &last.name).to_owned();
            let tenant = tenant.to_string();
            let read = ReadDefinitions { tenant, limit, after_name, ..ReadDefinitions::default() };
            let answer = self.shared.read(Read::Definitions(read)).await;
            let page = answer.map_err(Error::store("list the definitions"))?.definitions;
            is_end = page.is_empty();
            bytes += page.iter().map(|definition| definition.body.len()).sum::<usize>();
            found.extend(page);
        }
        // Where more may follow, only a name beyond it says that the built-in one belongs here.
        let is_here = is_end || found.last().is_some_and(|last| POSTCHAIN < last.name.as_str());
        if after < POSTCHAIN && is_here {
            found.push(built_in(&tenant));
            found.sort_by(|a, b| a.name.cmp(&b.name));
        }
        found.truncate(limit as usize);
        Ok(found)
    }
}

/// The body that a node asks for.
pub(crate) async fn body_for_node(shared: &Shared, asked: &Envelope) -> Result<Bytes, Refusal> {
    let asked = DefinitionRequest::decode(asked.payload.clone())
        .map_err(|error| malformed(format!("a definition request is damaged: {error}")))?;
    let hash =
        DefinitionHash::try_from(&asked.hash[..]).map_err(|error| malformed(error.to_string()))?;
    let body = body(shared, hash).await.map_err(|error| {
        refusal(domain::Reason::StoreUnavailable, format!("cannot read definition {hash}: {error}"))
    })?;
    let body = body.ok_or_else(|| {
        refusal(domain::Reason::NotFound, format!("definition {hash} does not exist"))
    })?;
    Ok(encoded(&DefinitionResponse { hash: asked.hash, body }))
}

async fn body(shared: &Shared, hash: DefinitionHash) -> Result<Option<Bytes>, store::Error> {
    if hash == BUILT_IN.0 {
        return Ok(Some(BUILT_IN.1.clone()));
    }
    if let Some(body) = shared.bodies.get(&hash) {
        return Ok(Some(body));
    }
    let hash_bytes = Bytes::copy_from_slice(hash.as_bytes());
    let read = ReadDefinitions { hash: hash_bytes, limit: 1, ..ReadDefinitions::default() };
    let found = shared.read(Read::Definitions(read)).await?.definitions.into_iter().next();
    Ok(found.map(|found| {
        shared.bodies.keep(hash, found.body.clone());
        found.body
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_kept_up_to_a_limit_the_oldest_go_first() {
        let bodies = Bodies::default();
        let hash = |n: u8| DefinitionHash([n; 32]);
        let body = || Bytes::from(vec![0; BODIES_BYTES_MAX / 4]);
        for n in 0..6 {
            bodies.keep(hash(n), body());
        }
        let kept: Vec<u8> = (0..6).filter(|n| bodies.get(&hash(*n)).is_some()).collect();
        assert_eq!(kept, [2, 3, 4, 5]);
    }
}
