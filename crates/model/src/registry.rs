//! Models by name. The built-in ones are always there.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Extractive, Model, Noop, Script, complete};

#[derive(Clone)]
pub struct Registry {
    models: BTreeMap<String, Arc<dyn Model>>,
}

impl Default for Registry {
    fn default() -> Self {
        Self::built_in()
    }
}

impl Registry {
    /// `extractive`, `noop` and `script`.
    pub fn built_in() -> Self {
        let none = Self { models: BTreeMap::new() };
        none.with(Arc::new(Extractive)).with(Arc::new(Noop)).with(Arc::new(Script))
    }

    /// Adds a model; one of the same name is replaced.
    pub fn with(mut self, model: Arc<dyn Model>) -> Self {
        self.models.insert(model.name().to_owned(), model);
        self
    }

    pub fn get(&self, name: &str) -> Option<Arc<dyn Model>> {
        self.models.get(name).cloned()
    }

    /// Exports what is counted of each model from 0: a series that is not there stands for no call that was not made.
    pub fn count_from_zero(&self) {
        self.models.values().for_each(|model| complete::count_from_zero(&**model));
    }

    /// Sorted.
    pub fn names(&self) -> Vec<&str> {
        self.models.keys().map(String::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_models_are_found_by_name() {
        let registry = Registry::default();
        assert_eq!(registry.names(), ["extractive", "noop", "script"]);
        assert_eq!(registry.get("noop").unwrap().name(), "noop");
        assert!(registry.get("other").is_none());
    }
}
