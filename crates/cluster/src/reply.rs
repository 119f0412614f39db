use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use domain::Reason;
use proto::link::{Envelope, Refusal};

use crate::channel::Channel;
use crate::error::refusal;

/// The way back to whoever called. Every call is answered: where this is dropped, by a refusal.
pub struct Reply {
    channel: Arc<Channel>,
    session: u64,
    call: u64,
    open: bool,
}

impl Reply {
    pub(crate) fn new(channel: Arc<Channel>, session: u64, call: u64) -> Self {
        Self { channel, session, call, open: true }
    }

    pub fn send(self, payload: Bytes) {
        self.answer(Envelope { payload, ..Envelope::default() });
    }

    pub fn refuse(self, refusal: Refusal) {
        self.answer(Envelope { refusal: Some(refusal), ..Envelope::default() });
    }

    fn answer(mut self, envelope: Envelope) {
        self.open = false;
        self.channel.answer(self.session, self.call, envelope);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.open {
            let refusal = refusal(Reason::ShuttingDown, "it was given up without an answer");
            let envelope = Envelope { refusal: Some(refusal), ..Envelope::default() };
            self.channel.answer(self.session, self.call, envelope);
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reply({} to {})", self.call, self.channel.peer)
    }
}
