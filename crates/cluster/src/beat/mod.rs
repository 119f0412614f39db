//! The heartbeat: tells a process that is alive from one that is not, whatever the rest of it is doing.
//!
//! Both ends run on a thread and a runtime of their own, over a connection of their own, so a main runtime that is busy
//! or stuck neither delays a beat nor hides behind one: a beat says for how long the main runtime has not answered.
//!
//! Never decides that somebody is dead: it reports beats, and connections that are lost.

mod config;
mod listener;
mod probe;
mod sender;
mod thread;
mod wire;

#[cfg(test)]
mod tests;

pub use config::{ListenerConfig, SenderConfig};
pub use listener::{BeatAnswerSource, BeatEvent, BeatListener, BeatSink, What};
pub use sender::{BeatSender, BeatSource};
