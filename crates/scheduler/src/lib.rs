//! The leader side: leadership, membership, ownership of shards, the view, the registry of capabilities, definitions.
//!
//! One actor a control replica owns the machines of `domain` and carries out what they want; [`Handle`] is its door.
//!
//! Never decides by itself, never compares clocks of two processes, never acts without its term: what a leader that was
//! replaced still tries, the store refuses. Never reads or writes an agent's journal, and never hosts an agent.

mod actor;
mod asks;
mod clock;
mod config;
mod definitions;
mod error;
mod handle;
mod journal;
mod leader;
mod links;
mod lookups;
mod metrics;
mod read;
mod shared;
mod standby;
mod steps;
#[cfg(test)]
mod tests;

pub use config::Config;
pub use error::Error;
pub use handle::{Args, Explained, Handle, StoreCheck, spawn};
pub use leader::{Admit, Query};
