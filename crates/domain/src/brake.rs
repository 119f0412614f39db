//! What a leader does when most nodes fall silent at once: the fault is rather its own than theirs.
//!
//! It fences nothing until it has asked the other replicas. If one hears more nodes, leadership goes there; if none does,
//! or none answers, it goes on, and fences only onto nodes that answer.

use crate::ProcessName;
use crate::membership::Brake;
use crate::time::Millis;

/// How long the other replicas have to answer.
pub const ASK_MS: u64 = 500;

/// What the leader is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Fence nothing for now.
    Hold,
    /// Ask every other replica how many nodes it hears, and hand the answers to [`Brakes::answered`].
    Ask,
    /// Go on.
    Release,
    /// Step back in favour of this replica.
    HandOver(ProcessName),
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Off,
    Asking {
        since: Millis,
    },
    /// The others were asked; the brake stays on until the silence is over.
    Asked,
}

/// The brake of one leadership.
#[derive(Debug, Default)]
pub struct Brakes {
    state: State,
}

impl Brakes {
    pub fn new() -> Self {
        Self::default()
    }

    /// Called at least every 100 ms, and whenever a node falls silent.
    pub fn tick(&mut self, brake: Brake, now: Millis) -> Vec<Action> {
        match (&self.state, brake) {
            (State::Off, Brake::On { .. }) => {
                self.state = State::Asking { since: now };
                vec![Action::Hold, Action::Ask]
            }
            (State::Asking { since }, Brake::On { .. }) if now.since(*since) < ASK_MS => Vec::new(),
            (State::Asking { .. }, Brake::On { .. }) => {
                self.state = State::Asked;
                vec![Action::Release]
            }
            (State::Asking { .. }, Brake::Off) => {
                self.state = State::Off;
                vec![Action::Release]
            }
            (State::Asked, Brake::Off) => {
                self.state = State::Off;
                Vec::new()
            }
            (State::Off, Brake::Off) | (State::Asked, Brake::On { .. }) => Vec::new(),
        }
    }

    /// How many nodes each replica that answered hears; `ours` are those that answer here.
    pub fn answered(&mut self, ours: usize, heard: &[(ProcessName, usize)]) -> Vec<Action> {
        if !matches!(self.state, State::Asking { .. }) {
            return Vec::new();
        }
        self.state = State::Asked;
        let best = heard.iter().max_by(|a, b| a.1.cmp(&b.1).then(b.0.cmp(&a.0)));
        match best.filter(|(_, count)| ours < *count) {
            Some((name, _)) => vec![Action::HandOver(name.clone())],
            None => vec![Action::Release],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: Brake = Brake::On { silent: 2, of: 3 };

    fn name(name: &str) -> ProcessName {
        name.parse().unwrap()
    }

    fn asking() -> Brakes {
        let mut brakes = Brakes::new();
        assert_eq!(brakes.tick(ON, Millis(0)), [Action::Hold, Action::Ask]);
        brakes
    }

    #[test]
    fn leadership_goes_to_whoever_hears_more_nodes() {
        let heard = [(name("control-2"), 2), (name("control-3"), 3), (name("control-4"), 3)];
        let hand_over = [Action::HandOver(name("control-3"))];
        assert_eq!(asking().answered(1, &heard), hand_over);
    }

    #[test]
    fn a_leader_that_hears_as_many_goes_on() {
        assert_eq!(asking().answered(1, &[(name("control-2"), 1)]), [Action::Release]);
        assert_eq!(asking().answered(1, &[]), [Action::Release]);
    }

    #[test]
    fn nobody_is_waited_for_longer_than_half_a_second() {
        let mut brakes = asking();
        assert_eq!(brakes.tick(ON, Millis(499)), []);
        assert_eq!(brakes.tick(ON, Millis(500)), [Action::Release]);
        assert_eq!(brakes.answered(1, &[(name("control-2"), 3)]), [], "too late");
        assert_eq!(brakes.tick(ON, Millis(600)), []);
    }

    #[test]
    fn a_silence_that_was_none_releases_the_brake() {
        let mut brakes = asking();
        assert_eq!(brakes.tick(Brake::Off, Millis(100)), [Action::Release]);
        assert_eq!(brakes.tick(Brake::Off, Millis(200)), []);
        assert_eq!(brakes.tick(ON, Millis(9_000)), [Action::Hold, Action::Ask], "it is asked anew");
    }
}
