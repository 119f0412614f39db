//! What a process offers, and whether that covers what somebody needs.

use std::collections::BTreeMap;

use crate::CapabilityName;

/// A named, versioned offer with attributes, e.g. `phase/action` version 1, `modality=text`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capability {
    pub name: CapabilityName,
    pub version: u32,
    pub attributes: BTreeMap<String, String>,
}

/// What somebody needs: a name, at least a version, and these attributes with these values.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CapabilityQuery {
    pub name: CapabilityName,
    pub version_min: u32,
    pub attributes: BTreeMap<String, String>,
}

impl Capability {
    /// Whether this offer meets `query`. Attributes that the query does not name do not matter.
    pub fn meets(&self, query: &CapabilityQuery) -> bool {
        self.name == query.name && self.has(query.version_min, &query.attributes)
    }

    /// The same for whoever chooses by name otherwise.
    pub fn has(&self, version_min: u32, attributes: &BTreeMap<String, String>) -> bool {
        version_min <= self.version
            && attributes.iter().all(|(key, value)| self.attributes.get(key) == Some(value))
    }
}

/// Everything that one process offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySet(pub Vec<Capability>);

impl CapabilitySet {
    /// Whether every need is met by some offer. No needs are always covered.
    pub fn covers(&self, needs: &[CapabilityQuery]) -> bool {
        needs.iter().all(|need| self.0.iter().any(|offer| offer.meets(need)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(name: &str, version: u32, modality: &str) -> Capability {
        let attributes = BTreeMap::from([("modality".to_owned(), modality.to_owned())]);
        Capability { name: name.parse().unwrap(), version, attributes }
    }

    fn need(name: &str, version_min: u32, modality: Option<&str>) -> CapabilityQuery {
        let attributes =
            modality.map(|m| ("modality".to_owned(), m.to_owned())).into_iter().collect();
        CapabilityQuery { name: name.parse().unwrap(), version_min, attributes }
    }

    #[test]
    fn a_need_is_covered_by_name_version_and_attributes() {
        let offers =
            CapabilitySet(vec![offer("phase/action", 2, "text"), offer("phase/yield", 1, "image")]);
        let check = |needs: &[CapabilityQuery], covered| {
            assert_eq!(offers.covers(needs), covered, "{needs:?}")
        };
        check(&[], true);
        check(&[need("phase/action", 1, None)], true);
        check(&[need("phase/action", 2, Some("text"))], true);
        check(&[need("phase/action", 3, None)], false);
        check(&[need("phase/action", 1, Some("image"))], false);
        check(&[need("phase/other", 1, None)], false);
        check(&[need("phase/action", 1, None), need("phase/yield", 1, Some("image"))], true);
        check(&[need("phase/action", 1, None), need("phase/yield", 1, Some("text"))], false);
    }
}
