//! The node side: shards and their agents as supervised actors, the turns of works, the phase pools.
//!
//! Rules come from `domain`: an agent asks its fold what is next, journals it, and only then does it. Never decides who
//! owns a shard, never writes without the guards of the store, and never answers before a commit.

mod actor;
mod awake;
mod clock;
mod config;
mod contact;
mod definitions;
mod dispatch;
mod error;
mod failures;
mod held;
mod host;
mod info;
mod metrics;
mod named;
mod node;
mod open;
mod pool;
mod read;
mod recent;
mod recovering;
mod shard;
mod speech;
mod steps;
mod wire;
mod worker;

#[cfg(test)]
mod tests;

pub use config::{Config, PhasesConfig};
pub use error::Error;
pub use node::{Args, Handle, spawn};
pub use wire::Wire;
