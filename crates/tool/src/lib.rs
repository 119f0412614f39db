//! Tools behind one trait: a call goes in, what it came to comes out.
//!
//! A tool never learns of agents or journals, and never repeats a call by itself: it gets the key under which a call is
//! known, whatever the attempt, and who owns the agent says when it is called again.

mod config;
mod count;
mod echo;
mod ledger;
mod registry;

use std::time::Instant;

use domain::turn::doubt::Effect;
use domain::{Epoch, ErrorKind, Reason};
use futures::future::BoxFuture;
use serde_json::Value;

pub use config::{Config, CountConfig};
pub use count::Count;
pub use echo::Echo;
pub use ledger::{Called, calls};
pub use registry::Registry;

/// One tool.
pub trait Tool: Send + Sync + 'static {
    /// What definitions call it.
    fn name(&self) -> &str;

    /// Whether a call that is made twice under one key has the effect of one.
    fn is_idempotent(&self) -> bool;

    /// Makes the call. Whoever drops the future stops waiting; the call may be made all the same.
    fn call<'a>(&'a self, call: &'a Call) -> BoxFuture<'a, Result<Output, Error>>;

    /// Finds out what became of a call whose answer is missing. Does not make the call.
    ///
    /// [`Reconciled::NotDone`] is a promise: the attempt that is asked about, and those before it, may still be on their way
    /// from a process that was stopped, and are refused from here on. A tool that cannot do that answers
    /// [`Reconciled::Unknown`].
    fn reconcile<'a>(&'a self, _: &'a Call) -> BoxFuture<'a, Result<Reconciled, Error>> {
        Box::pin(std::future::ready(Ok(Reconciled::Unknown)))
    }
}

/// What a tool is called with.
#[derive(Clone, Debug)]
pub struct Call {
    /// The same for every attempt.
    pub idempotency_key: String,
    /// Of the ownership under which the call is made: a tool that keeps the largest can refuse older ones.
    pub epoch: Epoch,
    /// 1 for the first.
    pub attempt: u32,
    pub arguments: Value,
    /// Until when the answer is waited for.
    pub deadline: Instant,
}

/// What a call came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output(pub String);

/// What a tool knows about a call whose answer is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reconciled {
    Done(Output),
    /// It was not, and will not be.
    NotDone,
    Unknown,
}

/// Why a call came to nothing, or may have.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It did nothing, and will not do this: the model is told.
    #[error("tool {tool} refuses: {reason}")]
    Refused { tool: String, reason: String },
    /// It did nothing; later it may.
    #[error("tool {tool} is not available: {reason}; try again later")]
    Unavailable { tool: String, reason: String },
    /// It may have done it.
    #[error("tool {tool} broke off: {reason}")]
    Broke { tool: String, reason: String },
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { .. } => ErrorKind::Invalid,
            Self::Unavailable { .. } | Self::Broke { .. } => ErrorKind::Unavailable,
        }
    }

    pub fn reason(&self) -> Reason {
        match self {
            Self::Refused { .. } => Reason::Malformed,
            Self::Unavailable { .. } => Reason::ToolUnavailable,
            Self::Broke { .. } => Reason::ToolBroke,
        }
    }

    /// Whether the call surely had no effect.
    pub fn is_harmless(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Unavailable { .. } => true,
            Self::Broke { .. } => false,
        }
    }
}

/// What running a call of `tool` twice does.
pub fn effect_of(tool: &dyn Tool) -> Effect {
    if tool.is_idempotent() { Effect::Idempotent } else { Effect::Once }
}
