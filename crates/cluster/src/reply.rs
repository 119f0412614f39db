use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use domain::Reason;
use proto::link::{Envelope, Refusal};

use crate::channel::Channel;
use crate::error::refusal;

/// The way back to whoever called. Every call is answered: where this is dropped, by a refusal.
pub struct Reply(Option<Way>);

enum Way {
    Link { channel: Arc<Channel>, session: u64, call: u64 },
    Local(Box<dyn FnOnce(Result<Bytes, Refusal>) + Send + Sync>),
}

impl Reply {
    pub(crate) fn new(channel: Arc<Channel>, session: u64, call: u64) -> Self {
        Self(Some(Way::Link { channel, session, call }))
    }

    /// For a call that comes from this process itself: `answer` is called once.
    pub fn from_fn(answer: impl FnOnce(Result<Bytes, Refusal>) + Send + Sync + 'static) -> Self {
        Self(Some(Way::Local(Box::new(answer))))
    }

    pub fn send(mut self, payload: Bytes) {
        self.answer(Ok(payload));
    }

    pub fn refuse(mut self, refusal: Refusal) {
        self.answer(Err(refusal));
    }

    /// Once; later calls do nothing.
    fn answer(&mut self, answer: Result<Bytes, Refusal>) {
        match self.0.take() {
            Some(Way::Link { channel, session, call }) => {
                let envelope = match answer {
                    Ok(payload) => Envelope { payload, ..Envelope::default() },
                    Err(refusal) => Envelope { refusal: Some(refusal), ..Envelope::default() },
                };
                channel.answer(session, call, envelope);
            }
            Some(Way::Local(way)) => way(answer),
            None => {}
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.answer(Err(refusal(Reason::AnswerLost, "it was given up without an answer")));
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(Way::Link { channel, call, .. }) => write!(f, "Reply({call} to {})", channel.peer),
            Some(Way::Local(_)) => f.write_str("Reply(local)"),
            None => f.write_str("Reply(given)"),
        }
    }
}
