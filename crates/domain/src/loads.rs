//! Which node gets a step that this one does not offer: the one whose pool has the most room, as far as this node knows.
//!
//! Knows its own jobs at the others, what each answer told of the jobs of third nodes there, and who was gone or full lately.

use std::collections::BTreeMap;

use crate::ProcessName;
use crate::time::Millis;

/// After a node was found gone it is passed over for this long, or until it answers again; doubled each time, up to 8 times:
/// each step that is sent there all the same waits until the attempt to reach it is given up.
pub const GONE_MS: u64 = 1_000;
const DOUBLINGS_MAX: u32 = 3;
/// After a pool had no room for a step it is passed over for this long, or until it answers again: others may have some.
pub const FULL_MS: u64 = 100;
/// For so long counts what an answer told of the jobs of others.
pub const TOLD_MS: u64 = 1_000;

/// What is known of each node; `P` names its pools.
#[derive(Debug)]
pub struct Loads<P>(BTreeMap<ProcessName, Node<P>>);

#[derive(Debug)]
struct Node<P> {
    gone_at: Option<Millis>,
    /// How often, since it answered last.
    gone: u32,
    pools: BTreeMap<P, Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    /// Jobs of ours that it has not answered.
    jobs: u32,
    /// Jobs of others, when it was told.
    others: Option<(u32, Millis)>,
    full_at: Option<Millis>,
}

impl<P> Node<P> {
    fn is_gone(&self, doublings_max: u32, now: Millis) -> bool {
        let pause = GONE_MS << self.gone.saturating_sub(1).min(doublings_max);
        self.gone_at.is_some_and(|at| now.since(at) < pause)
    }
}

impl<P> Default for Loads<P> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<P: Ord + Clone> Loads<P> {
    /// A job is on its way there.
    pub fn sent(&mut self, node: &ProcessName, pool: &P) {
        self.pool(node, pool).jobs += 1;
    }

    /// It is not any more, whatever became of it.
    pub fn back(&mut self, node: &ProcessName, pool: &P) {
        let pool = self.pool(node, pool);
        pool.jobs = pool.jobs.saturating_sub(1);
    }

    /// It answered a job that is back, and has `left` jobs still, ours among them.
    pub fn answered(&mut self, node: &ProcessName, pool: &P, left: u32, now: Millis) {
        let known = self.node(node);
        (known.gone_at, known.gone) = (None, 0);
        let pool = self.pool(node, pool);
        pool.full_at = None;
        pool.others = Some((left.saturating_sub(pool.jobs), now));
    }

    pub fn gone(&mut self, node: &ProcessName, now: Millis) {
        let known = self.node(node);
        // Jobs that were on their way there together say it once.
        if !known.is_gone(0, now) {
            known.gone_at = Some(now);
            known.gone = known.gone.saturating_add(1);
        }
    }

    pub fn full(&mut self, node: &ProcessName, pool: &P, now: Millis) {
        self.pool(node, pool).full_at = Some(now);
    }

    /// Forgets nodes that are not known, unless they have something of ours.
    pub fn retain(&mut self, is_known: impl Fn(&ProcessName) -> bool) {
        self.0.retain(|name, node| is_known(name) || node.pools.values().any(|it| 0 < it.jobs));
    }

    /// Whose pool of these has the fewest jobs for the jobs that it runs at once; `random` chooses among so many equals, from
    /// 0. None: all are gone or full.
    pub fn least<'a>(
        &self,
        pool: &P,
        offers: impl Iterator<Item = (&'a ProcessName, u32)> + Clone,
        now: Millis,
        mut random: impl FnMut(u32) -> u32,
    ) -> Option<&'a ProcessName> {
        let longest = self.least_with(pool, offers.clone(), DOUBLINGS_MAX, now, &mut random);
        // Where no other is left, it is asked earlier.
        longest.or_else(|| self.least_with(pool, offers, 0, now, &mut random))
    }

    fn least_with<'a>(
        &self,
        pool: &P,
        offers: impl Iterator<Item = (&'a ProcessName, u32)>,
        doublings_max: u32,
        now: Millis,
        random: &mut impl FnMut(u32) -> u32,
    ) -> Option<&'a ProcessName> {
        let (mut best, mut least, mut equals) = (None, u64::MAX, 0);
        for (name, capacity) in offers {
            let Some(jobs) = self.jobs(name, pool, doublings_max, now) else { continue };
            let share = jobs * 1_000 / u64::from(capacity.max(1));
            equals = if share < least { 1 } else { equals + u32::from(share == least) };
            if share < least || share == least && random(equals) == 0 {
                (best, least) = (Some(name), share);
            }
        }
        best
    }

    /// None: it is passed over.
    fn jobs(&self, node: &ProcessName, pool: &P, doublings_max: u32, now: Millis) -> Option<u64> {
        let within = |at: Millis, span| now.since(at) < span;
        let Some(node) = self.0.get(node) else { return Some(0) };
        if node.is_gone(doublings_max, now) {
            return None;
        }
        let Some(pool) = node.pools.get(pool) else { return Some(0) };
        if pool.full_at.is_some_and(|at| within(at, FULL_MS)) {
            return None;
        }
        let others = pool.others.filter(|(_, told_at)| within(*told_at, TOLD_MS));
        Some(u64::from(pool.jobs) + others.map_or(0, |(others, _)| u64::from(others)))
    }

    fn node(&mut self, node: &ProcessName) -> &mut Node<P> {
        let unknown = || Node { gone_at: None, gone: 0, pools: BTreeMap::new() };
        self.0.entry(node.clone()).or_insert_with(unknown)
    }

    fn pool(&mut self, node: &ProcessName, pool: &P) -> &mut Pool {
        self.node(node).pools.entry(pool.clone()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: &str = "phase/action";
    const OTHER: &str = "phase/yield";

    fn nodes() -> Vec<(ProcessName, u32)> {
        [("node-1", 8), ("node-2", 4), ("node-3", 4)]
            .map(|(name, capacity)| (name.parse().unwrap(), capacity))
            .to_vec()
    }

    /// Who is chosen with this choice among equals.
    fn chosen(
        loads: &Loads<&'static str>,
        now: u64,
        random: impl FnMut(u32) -> u32,
    ) -> Option<String> {
        let nodes = nodes();
        let offers = nodes.iter().map(|(name, capacity)| (name, *capacity));
        loads.least(&POOL, offers, Millis(now), random).map(ToString::to_string)
    }

    fn name(text: &str) -> ProcessName {
        text.parse().unwrap()
    }

    #[test]
    fn a_step_goes_where_there_is_most_room_for_it() {
        let mut loads = Loads::default();
        for (node, jobs) in [("node-1", 7), ("node-2", 3), ("node-3", 4)] {
            (0..jobs).for_each(|_| loads.sent(&name(node), &POOL));
        }
        // Another pool of it has nothing to do with that.
        loads.sent(&name("node-2"), &OTHER);
        assert_eq!(chosen(&loads, 0, |_| 0).as_deref(), Some("node-2"));
        (0..7).for_each(|_| loads.back(&name("node-1"), &POOL));
        assert_eq!(chosen(&loads, 0, |_| 0).as_deref(), Some("node-1"));
    }

    #[test]
    fn what_others_have_there_counts_while_it_is_fresh() {
        let mut loads = Loads::default();
        loads.sent(&name("node-1"), &POOL);
        // Seven jobs, one of them ours: six of eight places are taken by others.
        loads.answered(&name("node-1"), &POOL, 7, Millis(1_000));
        loads.answered(&name("node-2"), &POOL, 2, Millis(1_000));
        loads.answered(&name("node-3"), &POOL, 3, Millis(1_000));
        loads.answered(&name("node-2"), &OTHER, 100, Millis(1_000));
        assert_eq!(chosen(&loads, 1_000 + TOLD_MS - 1, |_| 1).as_deref(), Some("node-2"));
        loads.answered(&name("node-2"), &POOL, 4, Millis(1_001));
        assert_eq!(chosen(&loads, 1_000 + TOLD_MS - 1, |_| 1).as_deref(), Some("node-3"));
        // Of the first only our own job is known then: an eighth of its room.
        loads.answered(&name("node-2"), &POOL, 1, Millis(1_001));
        loads.answered(&name("node-3"), &POOL, 1, Millis(1_001));
        assert_eq!(chosen(&loads, 1_000 + TOLD_MS, |_| 1).as_deref(), Some("node-1"));
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
        loads.full(&name("node-3"), &POOL, Millis(1_000));
        assert_eq!(chosen(&loads, 1_000 + FULL_MS - 1, |_| 0), None);
        assert_eq!(chosen(&loads, 1_000 + FULL_MS, |_| 0).as_deref(), Some("node-3"));
        assert_eq!(chosen(&loads, 1_000 + GONE_MS, |_| 1).as_deref(), Some("node-1"));
        loads.full(&name("node-3"), &POOL, Millis(2_000 + GONE_MS));
        loads.answered(&name("node-3"), &POOL, 0, Millis(2_000 + GONE_MS));
        loads.gone(&name("node-1"), Millis(2_000 + GONE_MS));
        loads.gone(&name("node-2"), Millis(2_000 + GONE_MS));
        assert_eq!(chosen(&loads, 2_000 + GONE_MS, |_| 0).as_deref(), Some("node-3"));
    }

    #[test]
    fn who_is_gone_again_and_again_is_passed_over_for_longer() {
        let (mut loads, mut now) = (Loads::default(), 0);
        let (gone, busy) = (name("node-1"), name("node-2"));
        (0..8).for_each(|_| loads.sent(&busy, &POOL));
        let both = [(&gone, 1), (&busy, 1)];
        let chosen = |loads: &Loads<&'static str>, offers: &[(&ProcessName, u32)], now| {
            let chosen = loads.least(&POOL, offers.iter().copied(), Millis(now), |_| 0);
            chosen.map(ToString::to_string)
        };
        for longer in [1, 2, 4, 8, 8, 8] {
            loads.gone(&gone, Millis(now));
            loads.gone(&gone, Millis(now + 1));
            // As far as there is another.
            assert_eq!(chosen(&loads, &both[..1], now + GONE_MS - 1), None);
            assert_eq!(chosen(&loads, &both[..1], now + GONE_MS).as_deref(), Some("node-1"));
            now += longer * GONE_MS;
            assert_eq!(chosen(&loads, &both, now - 1).as_deref(), Some("node-2"));
            assert_eq!(chosen(&loads, &both, now).as_deref(), Some("node-1"));
        }
        loads.answered(&gone, &POOL, 0, Millis(now));
        loads.gone(&gone, Millis(now));
        assert_eq!(chosen(&loads, &both, now + GONE_MS).as_deref(), Some("node-1"), "anew");
    }

    #[test]
    fn who_has_something_of_ours_is_not_forgotten() {
        let mut loads = Loads::default();
        loads.sent(&name("node-1"), &POOL);
        loads.full(&name("node-2"), &POOL, Millis(0));
        loads.retain(|_| false);
        assert_eq!(loads.0.keys().map(ToString::to_string).collect::<Vec<_>>(), ["node-1"]);
    }
}
