//! Tools by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Config, Count, Echo, Tool};

#[derive(Clone, Default)]
pub struct Registry {
    tools: BTreeMap<String, Arc<dyn Tool>>,
}

impl Registry {
    /// `echo`, and what `config` asks for.
    pub fn from_config(config: &Config) -> Self {
        let registry = Self::default().with(Arc::new(Echo));
        match &config.count {
            Some(count) => registry.with(Arc::new(Count::new(count.clone()))),
            None => registry,
        }
    }

    /// Adds a tool; one of the same name is replaced.
    pub fn with(mut self, tool: Arc<dyn Tool>) -> Self {
        self.tools.insert(tool.name().to_owned(), tool);
        self
    }

    pub fn get(&self, name: &str) -> Option<Arc<dyn Tool>> {
        self.tools.get(name).cloned()
    }

    /// Sorted by name.
    pub fn tools(&self) -> impl Iterator<Item = &Arc<dyn Tool>> {
        self.tools.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CountConfig;

    #[test]
    fn the_counting_tool_is_there_only_when_it_is_asked_for() {
        assert!(Registry::from_config(&Config::default()).get("count").is_none());
        let count =
            CountConfig { file: "calls".into(), reconcile: false, delay_ms: 0, delay_before_ms: 0 };
        let registry = Registry::from_config(&Config { count: Some(count) });
        let names: Vec<&str> = registry.tools().map(|tool| tool.name()).collect();
        assert_eq!(names, ["count", "echo"]);
    }
}
