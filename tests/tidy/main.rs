//! The shape of the repository, held by tests: who may depend on whom, what is generated, what every file must be.
//!
//! Never builds or runs the product.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod files;
mod generated;
mod graph;
mod places;
mod sources;
