//! What can be wrong with a link.

use std::time::Duration;

/// What happens to one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flow {
    #[default]
    Pass,
    /// Everything comes so much later, and up to `jitter` more, in its order.
    Late { by: Duration, jitter: Duration },
    /// Read and held back, ends of connections included.
    Silent,
    /// Forwarded in slices of so many bytes, with a pause after each.
    Slices { bytes: usize, pause: Duration },
}

/// What happens to whole connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Door {
    #[default]
    Open,
    /// Those that are open end, and so does every new one at once.
    Shut,
    /// The same by RST.
    Reset,
}

/// What is wrong with a link. `up` is from who dialled to who listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    pub up: Flow,
    pub down: Flow,
    pub door: Door,
}

impl Fault {
    /// Nothing is.
    pub const NONE: Self = Self::both(Flow::Pass);
    /// Connections stand and say nothing; new ones are accepted.
    pub const HALF_OPEN: Self = Self::both(Flow::Silent);
    pub const CUT: Self = Self { door: Door::Shut, ..Self::NONE };
    pub const RESET: Self = Self { door: Door::Reset, ..Self::NONE };
    /// Only what the dialler says is lost, or only what it would hear.
    pub const DEAF_UP: Self = Self { up: Flow::Silent, ..Self::NONE };
    pub const DEAF_DOWN: Self = Self { down: Flow::Silent, ..Self::NONE };

    const fn both(flow: Flow) -> Self {
        Self { up: flow, down: flow, door: Door::Open }
    }

    pub const fn late(by: Duration, jitter: Duration) -> Self {
        Self::both(Flow::Late { by, jitter })
    }

    pub const fn slices(bytes: usize, pause: Duration) -> Self {
        Self::both(Flow::Slices { bytes, pause })
    }

    pub(super) fn is_silent(self) -> bool {
        self.up == Flow::Silent || self.down == Flow::Silent
    }
}
