//! Which node gets a step that this one does not offer: the one with the most room, as far as this node knows.
//!
//! Knows its own jobs at the others, and who was gone or full lately; what third nodes have sent there shows when a node is
//! full.

use std::collections::BTreeMap;

use crate::ProcessName;
use crate::time::Millis;

/// After a node was found gone it is passed over for this long, or until it answers again.
pub const GONE_MS: u64 = 1_000;
/// After a node had no room for a step it is passed over for this long, or until it answers again: others may have some.
pub const FULL_MS: u64 = 100;

/// What is known of each node.
#[derive(Debug, Default)]
pub struct Loads(BTreeMap<ProcessName, Load>);

#[derive(Debug, Default)]
struct Load {
    /// Jobs of ours that it has not answered.
    jobs: u32,
    gone_at: Option<Millis>,
    full_at: Option<Millis>,
}

impl Loads {
    /// A job is on its way there.
    pub fn sent(&mut self, node: &ProcessName) {
        self.of(node).jobs += 1;
    }

    /// It is not any more, whatever became of it.
    pub fn back(&mut self, node: &ProcessName) {
        let load = self.of(node);
        load.jobs = load.jobs.saturating_sub(1);
    }

    pub fn answered(&mut self, node: &ProcessName) {
        let load = self.of(node);
        (load.gone_at, load.full_at) = (None, None);
    }

    pub fn gone(&mut self, node: &ProcessName, now: Millis) {
        self.of(node).gone_at = Some(now);
    }

    pub fn full(&mut self, node: &ProcessName, now: Millis) {
        self.of(node).full_at = Some(now);
    }

    /// Forgets nodes that are not known, unless they have something of ours.
    pub fn retain(&mut self, is_known: impl Fn(&ProcessName) -> bool) {
        self.0.retain(|node, load| is_known(node) || 0 < load.jobs);
    }

    /// Who of these has the least of our jobs for the jobs that it runs at once; `random` chooses among so many equals, from
    /// 0. None: all are gone or full.
    pub fn least<'a>(
        &self,
        offers: impl Iterator<Item = (&'a ProcessName, u32)>,
        now: Millis,
        mut random: impl FnMut(u32) -> u32,
    ) -> Option<&'a ProcessName> {
        let (mut best, mut least, mut equals) = (None, u64::MAX, 0);
        for (node, capacity) in offers {
            let load = self.0.get(node);
            if load.is_some_and(|load| load.is_passed_over(now)) {
                continue;
            }
            let jobs = u64::from(load.map_or(0, |load| load.jobs));
            let share = jobs * 1_000 / u64::from(capacity.max(1));
            equals = if share < least { 1 } else { equals + u32::from(share == least) };
            if share < least || share == least && random(equals) == 0 {
                (best, least) = (Some(node), share);
            }
        }
        best
    }

    fn of(&mut self, node: &ProcessName) -> &mut Load {
        self.0.entry(node.clone()).or_default()
    }
}

impl Load {
    fn is_passed_over(&self, now: Millis) -> bool {
        let within = |at: Option<Millis>, span| at.is_some_and(|at| now.since(at) < span);
        within(self.gone_at, GONE_MS) || within(self.full_at, FULL_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> Vec<(ProcessName, u32)> {
        [("node-1", 8), ("node-2", 4), ("node-3", 4)]
            .map(|(name, capacity)| (name.parse().unwrap(), capacity))
            .to_vec()
    }

    /// Who is chosen with this choice among equals.
    fn chosen(loads: &Loads, now: u64, random: impl FnMut(u32) -> u32) -> Option<String> {
        let nodes = nodes();
        let offers = nodes.iter().map(|(name, capacity)| (name, *capacity));
        loads.least(offers, Millis(now), random).map(ToString::to_string)
    }

    fn name(text: &str) -> ProcessName {
        text.parse().unwrap()
    }

    #[test]
    fn a_step_goes_where_there_is_most_room_for_it() {
        let mut loads = Loads::default();
        for (node, jobs) in [("node-1", 7), ("node-2", 3), ("node-3", 4)] {
            (0..jobs).for_each(|_| loads.sent(&name(node)));
        }
        assert_eq!(chosen(&loads, 0, |_| 0).as_deref(), Some("node-2"));
        (0..7).for_each(|_| loads.back(&name("node-1")));
        assert_eq!(chosen(&loads, 0, |_| 0).as_deref(), Some("node-1"));
    }

    #[test]
    fn equals_have_the_same_chance() {
        let loads = Loads::default();
        // The second of two is taken with 0, and the third of three.
        assert_eq!(chosen(&loads, 0, |_| 1).as_deref(), Some("node-1"));
        assert_eq!(chosen(&loads, 0, |equals| u32::from(equals == 3)).as_deref(), Some("node-2"));
        assert_eq!(chosen(&loads, 0, |_| 0).as_deref(), Some("node-3"));
        let mut asked = Vec::new();
        chosen(&loads, 0, |equals| {
            asked.push(equals);
            1
        });
        assert_eq!(asked, [2, 3], "the first one needs no luck");
    }

    #[test]
    fn who_is_gone_or_full_is_passed_over_for_a_while_or_until_it_answers() {
        let mut loads = Loads::default();
        for node in ["node-1", "node-2"] {
            loads.gone(&name(node), Millis(1_000));
        }
        loads.full(&name("node-3"), Millis(1_000));
        assert_eq!(chosen(&loads, 1_000 + FULL_MS - 1, |_| 0), None);
        assert_eq!(chosen(&loads, 1_000 + FULL_MS, |_| 0).as_deref(), Some("node-3"));
        loads.full(&name("node-3"), Millis(2_000 + GONE_MS));
        loads.answered(&name("node-3"));
        loads.gone(&name("node-1"), Millis(2_000 + GONE_MS));
        loads.gone(&name("node-2"), Millis(2_000 + GONE_MS));
        assert_eq!(chosen(&loads, 2_000 + GONE_MS, |_| 0).as_deref(), Some("node-3"));
    }

    #[test]
    fn who_has_something_of_ours_is_not_forgotten() {
        let mut loads = Loads::default();
        loads.sent(&name("node-1"));
        loads.full(&name("node-2"), Millis(0));
        loads.retain(|_| false);
        assert_eq!(loads.0.keys().map(ToString::to_string).collect::<Vec<_>>(), ["node-1"]);
    }
}
