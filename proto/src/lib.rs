//! The messages: `stagedoor.v1` (the API), `stagedoor.link.v1` (between processes), `stagedoor.journal.v1` (on disk),
//! with their conversions to and from `domain`, and the mapping of errors to gRPC statuses.
//!
//! Never decides anything and never opens a connection. The code under `gen` is made from the `.proto` files by a test.

pub mod convert;
pub mod journal;
pub mod kind;
pub mod status;
pub mod trace;
pub mod view;

/// The API.
#[allow(clippy::all, clippy::unwrap_used, clippy::wildcard_enum_match_arm, unreachable_pub)]
pub mod v1 {
    include!("gen/stagedoor.v1.rs");
    include!("gen/stagedoor.v1.serde.rs");
}

/// Between processes.
#[allow(clippy::all, clippy::unwrap_used, clippy::wildcard_enum_match_arm, unreachable_pub)]
pub mod link {
    include!("gen/stagedoor.link.v1.rs");
}

/// On disk.
#[allow(clippy::all, clippy::unwrap_used, clippy::wildcard_enum_match_arm, unreachable_pub)]
pub mod disk {
    include!("gen/stagedoor.journal.v1.rs");
}

/// The descriptors of all packages, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!("gen/descriptors.bin");
