//! What the attempt that runs says: kept for those who begin to watch, shown to those who do. Not durable.

use prost::Message;
use tokio::sync::OwnedSemaphorePermit;

use cluster::Reply;
use domain::entry::Entry;
use domain::{Attempt, Lsn, Reason, transcript};
use proto::link::{Events, StepText, StepTextAnswer, WatchMode};

use super::State;
use super::watch::{Watcher, send};
use crate::{clock, metrics, wire};

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
    fn len(&self) -> u64 {
        self.text.len() as u64
    }

    fn take(&mut self, room: OwnedSemaphorePermit, news: &str) {
        match &mut self.room {
            Some(mine) => mine.merge(room),
            None => self.room = Some(room),
        }
        self.text.push_str(news);
    }

    fn event(&self, offset: usize) -> StepText {
        StepText {
            attempt: Some(wire::attempt(&self.attempt)),
            offset: offset as u64,
            text: self.text[offset..].to_owned(),
            at_ms: clock::now_ms(),
        }
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
        let mut spoken = match self.spoken.take() {
            Some(spoken) if spoken.attempt == attempt => spoken,
            Some(_) | None => Box::new(Spoken { attempt, text: String::new(), room: None }),
        };
        let (had, mut full) = (spoken.text.len(), false);
        // What comes after a gap is told again from where the gap begins.
        let news = transcript::news(spoken.len(), offset, &text).filter(|news| !news.is_empty());
        if let Some(news) = news {
            let size = u32::try_from(news.len()).unwrap_or(u32::MAX);
            match self.shard().node.texts.clone().try_acquire_many_owned(size) {
                Ok(room) => spoken.take(room, news),
                Err(_) => {
                    metrics::TEXTS_CUT.inc();
                    full = true;
                }
            }
        }
        let answer = StepTextAnswer { bytes: spoken.len(), full };
        if had < spoken.text.len() {
            self.show_text(attempt.work.lsn, spoken.event(had));
        }
        self.spoken = Some(spoken);
        reply.send(answer.encode_to_vec().into());
    }

    fn show_text(&mut self, work: Lsn, text: StepText) {
        let Some(mut watchers) = self.watchers.remove(&work) else { return };
        watchers.retain(|watcher| {
            watcher.mode != WatchMode::All || self.send_text(watcher, work, text.clone())
        });
        if !watchers.is_empty() {
            self.watchers.insert(work, watchers);
        }
    }

    /// What was said of `work` so far, for one who begins to watch it.
    pub(super) fn send_spoken(&self, watcher: &Watcher, work: Lsn) -> bool {
        match self.spoken.as_ref().filter(|spoken| spoken.attempt.work.lsn == work) {
            Some(spoken) => self.send_text(watcher, work, spoken.event(0)),
            None => true,
        }
    }

    fn send_text(&self, watcher: &Watcher, work: Lsn, text: StepText) -> bool {
        let (subscription, text) = (watcher.subscription, Some(text));
        let events = Events { subscription, work: work.0, text, ..Events::default() };
        send(self.shard(), watcher, events)
    }
}

/// Whether what the attempt said is in the journal with this entry, or came to nothing.
pub(super) fn is_over(entry: &Entry) -> bool {
    matches!(entry, Entry::StepDone(_) | Entry::StepBegan(_) | Entry::Ended(_))
}
