//! The promises of a store: the same for files and for the store role over mutual TLS.

// Helpers of tests fail by panicking, as tests do.
#![allow(clippy::unwrap_used)]

mod faulty;
mod files;
mod fixture;
mod remote;
mod suite;
mod writer;
