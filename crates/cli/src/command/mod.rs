//! The client commands: arguments in, one or a few calls, what came of them printed.

pub(crate) mod agent;
pub(crate) mod cluster;
pub(crate) mod pki;
pub(crate) mod store;
pub(crate) mod work;
