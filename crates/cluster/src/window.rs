//! What may be on its way to one peer, and when a frame goes. Pure.
//!
//! The first envelopes go at once. While [`FRAMES_AHEAD`] frames are not acknowledged, more envelopes wait and then go
//! together: so a quiet link has no delay and a busy one large frames, without a timer.

use std::collections::VecDeque;

/// A frame carries at most this many bytes of envelopes, or one envelope.
pub(crate) const FRAME_BYTES_MAX: usize = 64 << 10;
/// One envelope, in bytes. Less than the 16 MiB at which the peer would end the session.
pub(crate) const ENVELOPE_BYTES_MAX: usize = 8 << 20;
/// Frames that may be unacknowledged before envelopes wait for each other.
const FRAMES_AHEAD: usize = 4;
/// Received frames after which an acknowledgement does not wait for a frame that goes anyway.
const FRAMES_OWED_MAX: usize = FRAMES_AHEAD / 2;

/// So many envelopes, and their encoded size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) envelopes: usize,
    pub(crate) bytes: usize,
}

impl Load {
    fn add(&mut self, other: Self) {
        self.envelopes += other.envelopes;
        self.bytes += other.bytes;
    }

    fn subtract(&mut self, other: Self) {
        self.envelopes -= other.envelopes;
        self.bytes -= other.bytes;
    }
}

/// The peer acknowledged what it was not sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overrun;

#[derive(Debug)]
pub(crate) struct Window {
    max: Load,
    /// Waits for a frame.
    queued: Load,
    /// Frames that were sent and are not acknowledged: each with the number of its last envelope.
    flying: VecDeque<(u64, Load)>,
    flown: Load,
    sent: u64,
    /// Envelopes of the peer that we took in, and how many of them we told it.
    taken: u64,
    told: u64,
    owed: Load,
    owed_frames: usize,
}

impl Window {
    pub(crate) fn new(max: Load) -> Self {
        Self {
            max,
            queued: Load::default(),
            flying: VecDeque::new(),
            flown: Load::default(),
            sent: 0,
            taken: 0,
            told: 0,
            owed: Load::default(),
            owed_frames: 0,
        }
    }

    /// Whether one more envelope may be queued.
    pub(crate) fn admits(&self, bytes: usize) -> bool {
        let envelopes = self.queued.envelopes + self.flown.envelopes;
        envelopes < self.max.envelopes && self.admits_bytes(bytes)
    }

    /// The same for an answer: it was paid for by its call, so only its bytes count.
    pub(crate) fn admits_bytes(&self, bytes: usize) -> bool {
        let held = self.queued.bytes + self.flown.bytes;
        // A window that is smaller than one envelope still lets one through.
        held == 0 || held + bytes <= self.max.bytes
    }

    pub(crate) fn queue(&mut self, bytes: usize) {
        self.queued.add(Load { envelopes: 1, bytes });
    }

    /// Whether a frame of what is queued goes now. One that is full has nothing to wait for, as long as not too much
    /// is on its way already.
    pub(crate) fn may_send(&self) -> bool {
        let full = FRAME_BYTES_MAX <= self.queued.bytes && self.flown.bytes < self.max.bytes / 4;
        0 < self.queued.envelopes && (self.flying.len() < FRAMES_AHEAD || full)
    }

    /// A frame with so many of the queued envelopes goes.
    pub(crate) fn sent(&mut self, load: Load) {
        self.queued.subtract(load);
        self.flown.add(load);
        self.sent += load.envelopes as u64;
        self.flying.push_back((self.sent, load));
    }

    /// The peer has taken in `total` envelopes since the link came up.
    pub(crate) fn acknowledged(&mut self, total: u64) -> Result<(), Overrun> {
        if self.sent < total {
            return Err(Overrun);
        }
        while let Some((last, load)) = self.flying.front().copied()
            && last <= total
        {
            self.flying.pop_front();
            self.flown.subtract(load);
        }
        Ok(())
    }

    /// A frame with so much was received.
    pub(crate) fn taken(&mut self, load: Load) {
        if load.envelopes == 0 {
            return;
        }
        self.taken += load.envelopes as u64;
        self.owed.add(load);
        self.owed_frames += 1;
    }

    /// Whether the peer is owed an acknowledgement, which some frame will carry sooner or later.
    pub(crate) fn owes(&self) -> bool {
        0 < self.owed_frames
    }

    /// Whether it must not be later, because the peer may be waiting for it.
    pub(crate) fn owes_now(&self) -> bool {
        FRAMES_OWED_MAX <= self.owed_frames
            || self.max.envelopes <= self.owed.envelopes * 2
            || self.max.bytes <= self.owed.bytes * 2
    }

    /// What a frame that goes now says; nothing is owed after it.
    pub(crate) fn acknowledge(&mut self) -> u64 {
        self.told = self.taken;
        self.owed = Load::default();
        self.owed_frames = 0;
        self.told
    }

    /// Nothing waits and everything sent was acknowledged.
    pub(crate) fn is_idle(&self) -> bool {
        self.queued.envelopes == 0 && self.flying.is_empty()
    }

    /// A new session begins: what is queued stays, the counting starts anew.
    pub(crate) fn restart(&mut self) {
        let queued = self.queued;
        *self = Self { queued, ..Self::new(self.max) };
    }

    /// Everything queued was dropped.
    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Load = Load { envelopes: 8, bytes: 1_000 };

    fn load(envelopes: usize, bytes: usize) -> Load {
        Load { envelopes, bytes }
    }

    fn queued(window: &mut Window, envelopes: usize, bytes_each: usize) {
        for _ in 0..envelopes {
            assert!(window.admits(bytes_each));
            window.queue(bytes_each);
        }
    }

    #[test]
    fn the_first_frames_go_at_once_and_the_next_wait_for_an_acknowledgement() {
        let mut window = Window::new(MAX);
        for _ in 0..FRAMES_AHEAD {
            queued(&mut window, 1, 10);
            assert!(window.may_send());
            window.sent(load(1, 10));
        }
        queued(&mut window, 3, 10);
        assert!(!window.may_send());
        window.acknowledged(1).unwrap();
        assert!(window.may_send(), "the three go together");
        window.sent(load(3, 30));
        assert!(!window.may_send());
    }

    #[test]
    fn a_full_frame_has_nothing_to_wait_for_until_a_quarter_is_on_its_way() {
        let mut window = Window::new(load(1_000, 16 << 20));
        for _ in 0..FRAMES_AHEAD {
            queued(&mut window, 1, 10);
            window.sent(load(1, 10));
        }
        queued(&mut window, 1, FRAME_BYTES_MAX);
        assert!(window.may_send());
        window.sent(load(1, FRAME_BYTES_MAX));
        queued(&mut window, 1, 5 << 20);
        window.sent(load(1, 5 << 20));
        queued(&mut window, 1, FRAME_BYTES_MAX);
        assert!(!window.may_send());
    }

    #[test]
    fn queued_and_unacknowledged_envelopes_fill_the_window() {
        let mut window = Window::new(MAX);
        queued(&mut window, 5, 10);
        window.sent(load(5, 50));
        queued(&mut window, 3, 10);
        assert!(!window.admits(10));
        window.acknowledged(5).unwrap();
        assert!(window.admits(10));
    }

    #[test]
    fn bytes_fill_the_window_too_but_never_keep_out_a_single_envelope() {
        let mut window = Window::new(MAX);
        assert!(window.admits(5_000));
        queued(&mut window, 1, 900);
        assert!(!window.admits(101));
        assert!(window.admits(100));
    }

    #[test]
    fn an_answer_passes_a_window_that_is_full_of_envelopes() {
        let mut window = Window::new(MAX);
        queued(&mut window, 8, 10);
        assert!(!window.admits(10));
        assert!(window.admits_bytes(10));
        assert!(!window.admits_bytes(1_000));
    }

    #[test]
    fn an_acknowledgement_of_what_was_not_sent_is_a_violation() {
        let mut window = Window::new(MAX);
        queued(&mut window, 2, 10);
        window.sent(load(2, 20));
        assert_eq!(window.acknowledged(3), Err(Overrun));
        assert_eq!(window.acknowledged(2), Ok(()));
        assert_eq!(window.acknowledged(1), Ok(()), "an old one says nothing new");
        assert!(window.is_idle());
    }

    #[test]
    fn one_frame_may_be_acknowledged_later_and_the_second_may_not() {
        let mut window = Window::new(MAX);
        window.taken(load(0, 0));
        assert!(!window.owes());
        window.taken(load(1, 10));
        assert!(window.owes() && !window.owes_now());
        window.taken(load(1, 10));
        assert!(window.owes_now());
        assert_eq!(window.acknowledge(), 2);
        assert!(!window.owes());
    }

    #[test]
    fn half_of_the_window_is_acknowledged_at_once() {
        let mut window = Window::new(MAX);
        window.taken(load(4, 10));
        assert!(window.owes_now());
        let mut window = Window::new(MAX);
        window.taken(load(1, 500));
        assert!(window.owes_now());
    }

    #[test]
    fn a_new_session_keeps_the_queue_and_counts_anew() {
        let mut window = Window::new(MAX);
        queued(&mut window, 3, 10);
        window.sent(load(1, 10));
        window.taken(load(1, 10));
        window.restart();
        assert!(window.may_send() && !window.owes());
        window.sent(load(2, 20));
        assert_eq!(window.acknowledged(3), Err(Overrun));
        window.clear();
        assert!(window.is_idle());
    }
}
