//! What the attempt that runs says: kept for those who begin to watch, shown to those who do. Not durable: who misses a part
//! is told it with the step.

use std::time::{Duration, Instant};

use prost::Message;
use tokio::sync::OwnedSemaphorePermit;

use cluster::Reply;
use domain::entry::Entry;
use domain::{Attempt, Lsn, Reason, transcript};
use proto::link::{Events, StepText, StepTextAnswer, WatchMode};

use super::State;
use super::watch::{Watcher, try_send};
use crate::shard::Shard;
use crate::{clock, metrics, wire};

/// Of one attempt; what it says beyond is told with the step.
pub(crate) const TEXT_BYTES_MAX: usize = 512 << 10;

/// After a link had no room for it.
pub(crate) const AGAIN: Duration = Duration::from_millis(100);

/// A piece of it, as its worker tells it.
pub(crate) struct Piece {
    pub attempt: Attempt,
    pub offset: u64,
    pub text: String,
}

/// All of it so far.
pub(super) struct Spoken {
    attempt: Attempt,
    text: String,
    /// Its share of the node's room for such text.
    room: Option<OwnedSemaphorePermit>,
}

impl Spoken {
    /// Takes what is new of a piece; what comes after a gap is told again from where the gap begins. Whether there was room.
    fn take(&mut self, shard: &Shard, offset: u64, text: &str) -> bool {
        let news = transcript::news(self.text.len() as u64, offset, text).unwrap_or_default();
        if news.is_empty() {
            return true;
        }
        let size = u32::try_from(news.len()).unwrap_or(u32::MAX);
        let room = shard.node.texts.clone().try_acquire_many_owned(size).ok();
        let Some(room) = room.filter(|_| self.text.len() + news.len() <= TEXT_BYTES_MAX) else {
            metrics::TEXTS_CUT.inc();
            return false;
        };
        match &mut self.room {
            Some(mine) => mine.merge(room),
            None => self.room = Some(room),
        }
        self.text.push_str(news);
        true
    }

    /// Whether what it said is in the journal with these entries of `work`, or came to nothing.
    pub(super) fn is_over<'a>(
        &self,
        work: Lsn,
        mut entries: impl Iterator<Item = &'a Entry>,
    ) -> bool {
        let ends = |entry: &Entry| {
            matches!(entry, Entry::StepDone(_) | Entry::StepBegan(_) | Entry::Ended(_))
        };
        self.attempt.work.lsn == work && entries.any(ends)
    }

    /// Sends what `watcher` was not sent. A link without room loses nothing: the next piece has it, too. Whether it watches
    /// still: an API server whose link is gone subscribes anew by itself.
    fn show(&self, shard: &Shard, watcher: &mut Watcher) -> bool {
        let is_full = watcher.refused.is_some_and(|at| at.elapsed() < AGAIN);
        if watcher.mode != WatchMode::All || self.text.len() <= watcher.heard || is_full {
            return true;
        }
        let text = StepText {
            attempt: Some(wire::attempt(&self.attempt)),
            offset: watcher.heard as u64,
            text: self.text[watcher.heard..].to_owned(),
            at_ms: clock::now_ms(),
        };
        let (subscription, work) = (watcher.subscription, self.attempt.work.lsn.0);
        let events = Events { subscription, work, text: Some(text), ..Events::default() };
        match try_send(shard, watcher, &events) {
            Ok(()) => (watcher.heard, watcher.refused) = (self.text.len(), None),
            Err(cluster::Error::Overloaded { .. } | cluster::Error::TooLarge { .. }) => {
                watcher.refused = Some(Instant::now());
            }
            Err(_) => return false,
        }
        true
    }
}

impl State {
    /// A worker tells what its model said.
    pub(super) fn text(&mut self, piece: Piece, reply: Reply) {
        let Piece { attempt, offset, text } = piece;
        if self.fold.is_none() {
            return self.refuse(reply, Reason::Overloaded, "the agent is not in memory yet");
        }
        if self.running.as_deref() != Some(&attempt) {
            return self.refuse(reply, Reason::Superseded, "nobody waits for it any more");
        }
        let (shard, work) = (self.shard().clone(), attempt.work.lsn);
        let mut nobody = Vec::new();
        let watchers = self.watchers.get_mut(&work).unwrap_or(&mut nobody);
        let spoken = match &mut self.spoken {
            Some(spoken) if spoken.attempt == attempt => spoken,
            other => {
                watchers.iter_mut().for_each(|watcher| watcher.heard = 0);
                let spoken = Spoken { attempt, text: String::new(), room: None };
                other.insert(Box::new(spoken))
            }
        };
        let full = !spoken.take(&shard, offset, &text);
        watchers.retain_mut(|watcher| spoken.show(&shard, watcher));
        let answer = StepTextAnswer { bytes: spoken.text.len() as u64, full };
        reply.send(answer.encode_to_vec().into());
    }

    /// Sends what was said of `work` so far to one who begins to watch it. Whether it does still.
    pub(super) fn say(&self, watcher: &mut Watcher, work: Lsn) -> bool {
        let spoken = self.spoken.as_ref().filter(|spoken| spoken.attempt.work.lsn == work);
        spoken.is_none_or(|spoken| spoken.show(self.shard(), watcher))
    }
}
