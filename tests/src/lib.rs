//! What the tests of the whole share: the harness that runs clusters of real processes, random faults,
//! and the code generator.
//!
//! Never linked into the shipped program.

pub mod codegen;
pub mod faults;
pub mod harness;
