//! Envelopes that wait for a frame, already encoded as the fields of one, so that each byte is written once.

use std::collections::VecDeque;

use bytes::BufMut;
use prost::Message;
use proto::link::{Envelope, Frame};

use crate::window::{FRAME_BYTES_MAX, Load};

/// Room for the header that follows the envelopes.
const HEADER_BYTES: usize = 64;
/// Key of the field `envelopes`: number 3, length-delimited.
const ENVELOPES_KEY: u8 = (3 << 3) | 2;

/// The envelopes of one frame.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    pub(crate) load: Load,
}

impl Batch {
    fn of_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes + HEADER_BYTES), load: Load::default() }
    }

    /// The whole frame. Fields of a message may stand in any order, so the header comes last.
    pub(crate) fn into_frame(mut self, header: &Frame) -> Vec<u8> {
        header.encode(&mut self.bytes).expect("a Vec grows");
        self.bytes
    }
}

#[derive(Debug, Default)]
pub(crate) struct Outbox(VecDeque<Batch>);

impl Outbox {
    /// What an envelope counts in the window and takes in a frame.
    pub(crate) fn size_of(envelope: &Envelope) -> usize {
        let bytes = envelope.encoded_len();
        1 + prost::length_delimiter_len(bytes) + bytes
    }

    pub(crate) fn push(&mut self, envelope: &Envelope, size: usize) {
        let fits = |batch: &&mut Batch| batch.load.bytes + size <= FRAME_BYTES_MAX;
        let batch = match self.0.back_mut().filter(fits) {
            Some(batch) => batch,
            None => {
                self.0.push_back(Batch::of_capacity(size));
                self.0.back_mut().expect("it was pushed")
            }
        };
        batch.bytes.put_u8(ENVELOPES_KEY);
        envelope.encode_length_delimited(&mut batch.bytes).expect("a Vec grows");
        batch.load.envelopes += 1;
        batch.load.bytes += size;
    }

    pub(crate) fn pop(&mut self) -> Option<Batch> {
        self.0.pop_front()
    }

    /// Drops everything and says how many envelopes that were.
    pub(crate) fn clear(&mut self) -> usize {
        self.0.drain(..).map(|batch| batch.load.envelopes).sum()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn envelope(id: u64, bytes: usize) -> Envelope {
        Envelope { id, payload: vec![7; bytes].into(), ..Envelope::default() }
    }

    fn push(outbox: &mut Outbox, envelope: &Envelope) -> usize {
        let size = Outbox::size_of(envelope);
        outbox.push(envelope, size);
        size
    }

    #[test]
    fn a_frame_reads_back_as_what_was_pushed() {
        let mut outbox = Outbox::default();
        let sizes = push(&mut outbox, &envelope(1, 100)) + push(&mut outbox, &envelope(2, 0));
        let batch = outbox.pop().unwrap();
        assert_eq!(batch.load, Load { envelopes: 2, bytes: sizes });
        assert_eq!(batch.bytes.len(), sizes);
        let header =
            Frame { token: vec![1; 16].into(), acknowledged: 5, sent_ms: 6, ..Frame::default() };
        let frame = Frame::decode(Bytes::from(batch.into_frame(&header))).unwrap();
        assert_eq!(frame, Frame { envelopes: vec![envelope(1, 100), envelope(2, 0)], ..header });
    }

    #[test]
    fn a_frame_is_bounded_and_a_large_envelope_goes_alone() {
        let mut outbox = Outbox::default();
        for (id, bytes) in [(1, 40_000), (2, 20_000), (3, 20_000), (4, 1 << 20), (5, 10)] {
            push(&mut outbox, &envelope(id, bytes));
        }
        let loads: Vec<_> =
            std::iter::from_fn(|| outbox.pop()).map(|it| it.load.envelopes).collect();
        assert_eq!(loads, [2, 1, 1, 1]);
    }

    #[test]
    fn what_is_cleared_is_counted() {
        let mut outbox = Outbox::default();
        for id in 0..10 {
            push(&mut outbox, &envelope(id, 20_000));
        }
        assert_eq!(outbox.clear(), 10);
        assert!(outbox.pop().is_none());
    }
}
