//! The words and the rules of Stagedoor.
//!
//! Pure: state machines into which time and randomness are passed and out of which effects come. Never touches a clock,
//! a socket, a file, a thread or a source of randomness; every rule can be tested without any of them.

pub mod agent;
pub mod brake;
pub mod capability;
pub mod chain;
pub mod contest;
pub mod definition;
pub mod entry;
pub mod error;
pub mod heads;
pub mod hearing;
pub mod id;
pub mod joins;
pub mod leadership;
pub mod loads;
pub mod membership;
pub mod ownership;
pub mod pace;
pub mod place;
pub mod position;
pub mod reach;
pub mod restart;
pub mod retention;
pub mod round;
pub mod slot;
pub mod step;
pub mod time;
pub mod transcript;
pub mod turn;
pub mod view;
pub mod work;
pub mod writer;

pub use capability::{Capability, CapabilityQuery, CapabilitySet};
pub use chain::{Phase, PhaseKey};
pub use definition::Definition;
pub use error::{Error, ErrorKind};
pub use id::*;
pub use position::Position;
pub use slot::{Class, ShardId, Slot};
pub use step::{Attempt, StepKey, StepKind};
pub use work::{Reason, WorkState};
