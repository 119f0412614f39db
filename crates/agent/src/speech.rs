//! What a model says while its step runs: told to whoever owns the agent, one piece on its way at a time.
//!
//! Nothing rests on it: what does not arrive is shown with the step, once that is in the journal.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::Notify;

use domain::{Attempt, ShardId};
use proto::link::StepText;

use crate::shard::lock;
use crate::wire;

/// Between two pieces: what a model says meanwhile goes in one.
const PACE: Duration = Duration::from_millis(20);
/// Before an owner that was not reached is looked for again.
const AGAIN: Duration = Duration::from_millis(100);
const PIECE_BYTES_MAX: usize = 256 << 10;

/// What an attempt has said so far. As long as its answer may be.
#[derive(Default)]
pub(crate) struct Speech {
    text: Mutex<String>,
    grew: Notify,
}

/// What became of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// So many bytes of the speech are with the owner.
    Has(u64),
    /// Nobody took it now.
    Again,
    /// Nobody waits for more.
    Enough,
}

/// Tells a piece to the owner of a shard.
pub(crate) type Tell = Arc<dyn Fn(ShardId, StepText) -> BoxFuture<'static, Taken> + Send + Sync>;

impl Speech {
    pub(crate) fn push(&self, text: &str) {
        lock(&self.text).push_str(text);
        self.grew.notify_one();
    }

    /// What comes after so many bytes, or its beginning. None: nothing yet.
    fn after(&self, told: u64) -> Option<String> {
        let text = lock(&self.text);
        let rest = text.get(usize::try_from(told).ok()?..).filter(|rest| !rest.is_empty())?;
        Some(rest[..rest.floor_char_boundary(PIECE_BYTES_MAX)].to_owned())
    }
}

/// Tells what `speech` grows by. Ends when it is dropped: with the step.
pub(crate) async fn tell(
    speech: &Speech,
    tell: &Tell,
    shard: ShardId,
    attempt: Attempt,
) -> Infallible {
    let mut offset = 0;
    loop {
        let Some(text) = speech.after(offset) else {
            speech.grew.notified().await;
            continue;
        };
        let attempt = Some(wire::attempt(&attempt));
        let taken = tell(shard, StepText { attempt, offset, text, at_ms: 0 }).await;
        let pause = match taken {
            // A later owner has nothing of it yet.
            Taken::Has(bytes) => {
                offset = bytes;
                PACE
            }
            Taken::Again => AGAIN,
            Taken::Enough => return std::future::pending().await,
        };
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::{Class, Epoch, Lsn, Slot, StepKey, WorkId};
    use tokio::sync::mpsc;

    fn attempt() -> Attempt {
        let work = WorkId { class: Class(0), slot: Slot::new(0).unwrap(), lsn: Lsn(1) };
        Attempt { work, step: StepKey::model(0), epoch: Epoch(1), number: 1 }
    }

    /// What is told if the owner answers so, one answer a piece.
    async fn told(said: &[&str], answers: Vec<Taken>) -> Vec<(u64, String)> {
        let speech = Speech::default();
        said.iter().for_each(|piece| speech.push(piece));
        let (pieces, mut heard) = mpsc::unbounded_channel();
        let answers = Mutex::new(answers.into_iter());
        let teller: Tell = Arc::new(move |_, piece: StepText| {
            pieces.send((piece.offset, piece.text)).unwrap();
            let answer = lock(&answers).next();
            Box::pin(async move {
                match answer {
                    Some(answer) => answer,
                    None => std::future::pending().await,
                }
            })
        });
        let telling = tell(&speech, &teller, ShardId(0), attempt());
        _ = tokio::time::timeout(Duration::from_secs(5), telling).await;
        std::iter::from_fn(|| heard.try_recv().ok()).collect()
    }

    fn piece(offset: u64, text: &str) -> (u64, String) {
        (offset, text.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_said_is_told_until_the_owner_has_it() {
        let pieces = told(&["one ", "two"], vec![Taken::Again, Taken::Has(7)]).await;
        assert_eq!(pieces, [piece(0, "one two"), piece(0, "one two")]);
        assert_eq!(told(&["one"], vec![Taken::Enough]).await, [piece(0, "one")]);
        assert_eq!(told(&[], vec![]).await, []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_owner_is_told_from_where_it_stands() {
        let pieces = told(&["abc"], vec![Taken::Has(2), Taken::Has(0), Taken::Has(3)]).await;
        assert_eq!(pieces, [piece(0, "abc"), piece(2, "c"), piece(0, "abc")]);
        // It cannot have more than was said, nor half a character.
        assert_eq!(told(&["\u{e9}"], vec![Taken::Has(9)]).await, [piece(0, "\u{e9}")]);
        assert_eq!(told(&["\u{e9}"], vec![Taken::Has(1)]).await, [piece(0, "\u{e9}")]);
    }

    #[tokio::test(start_paused = true)]
    async fn much_goes_in_pieces_that_end_with_a_character() {
        let long = "\u{e9}".repeat(PIECE_BYTES_MAX / 2) + "x";
        let text = format!("a{long}");
        let first = PIECE_BYTES_MAX as u64 - 1;
        let pieces = told(&[&text], vec![Taken::Has(first), Taken::Has(text.len() as u64)]).await;
        assert_eq!(pieces.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, first]);
        assert_eq!(pieces.into_iter().map(|(_, text)| text).collect::<String>(), text);
    }
}
