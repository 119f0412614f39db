//! What each node holds, put together from its beats and its answers to grants.
//!
//! A beat lists everything, but it may have been written before the answer that overtook it: what a node just answered
//! is believed until a beat says the same, or for a while. Never compares clocks of two processes.

use std::collections::BTreeMap;

use domain::membership::Held;
use domain::time::Millis;
use domain::{Member, ShardId};

/// How long an answer is believed against beats: a few beats.
const BELIEVED_MS: u64 = 2_000;

#[derive(Debug, Default)]
struct Report {
    beat: Vec<Held>,
    answered: BTreeMap<ShardId, (Held, Millis)>,
}

#[derive(Debug, Default)]
pub(crate) struct Reports(BTreeMap<Member, Report>);

impl Reports {
    /// A beat came. Gives everything that the node holds.
    pub(crate) fn beat(&mut self, member: &Member, held: &[Held], now: Millis) -> Vec<Held> {
        let report = self.0.entry(member.clone()).or_default();
        report.beat = held.to_vec();
        report.answered.retain(|shard, (answer, at)| {
            let beat = held.iter().find(|held| held.shard == *shard);
            let is_confirmed = beat.is_some_and(|beat| covers(beat, answer));
            !is_confirmed && now.since(*at) < BELIEVED_MS
        });
        report.all()
    }

    /// The node answered a grant. Gives everything that it holds.
    pub(crate) fn answered(&mut self, member: &Member, held: Held, now: Millis) -> Vec<Held> {
        let report = self.0.entry(member.clone()).or_default();
        report.answered.insert(held.shard, (held, now));
        report.all()
    }

    /// The node gave it up.
    pub(crate) fn dropped(&mut self, member: &Member, shard: ShardId) {
        if let Some(report) = self.0.get_mut(member) {
            report.answered.remove(&shard);
            report.beat.retain(|held| held.shard != shard);
        }
    }

    pub(crate) fn forget(&mut self, member: &Member) {
        self.0.remove(member);
    }
}

impl Report {
    fn all(&self) -> Vec<Held> {
        let mut all: BTreeMap<ShardId, Held> =
            self.beat.iter().map(|held| (held.shard, *held)).collect();
        for (shard, (answer, _)) in &self.answered {
            let beat = all.entry(*shard).or_insert(*answer);
            if !covers(beat, answer) {
                *beat = *answer;
            }
        }
        all.into_values().collect()
    }
}

/// Whether `beat` says at least what `answer` said.
fn covers(beat: &Held, answer: &Held) -> bool {
    (answer.epoch, answer.is_open) <= (beat.epoch, beat.is_open)
}

#[cfg(test)]
mod tests {
    use domain::{Epoch, Incarnation};

    use super::*;

    fn node() -> Member {
        Member { name: "node-1".parse().unwrap(), incarnation: Incarnation(1) }
    }

    fn held(shard: u32, epoch: u64, is_open: bool) -> Held {
        Held { shard: ShardId(shard), epoch: Epoch(epoch), is_open }
    }

    #[test]
    fn a_beat_that_an_answer_overtook_takes_nothing_away() {
        let mut reports = Reports::default();
        let opened = held(1, 4, true);
        assert_eq!(reports.answered(&node(), opened, Millis(0)), [opened]);
        assert_eq!(reports.beat(&node(), &[], Millis(100)), [opened]);
        assert_eq!(reports.beat(&node(), &[held(1, 4, false)], Millis(200)), [opened]);
        assert_eq!(reports.beat(&node(), &[opened], Millis(300)), [opened]);
        assert_eq!(reports.beat(&node(), &[], Millis(400)), []);
    }

    #[test]
    fn an_answer_that_no_beat_confirms_is_not_believed_for_ever() {
        let mut reports = Reports::default();
        reports.answered(&node(), held(1, 4, false), Millis(0));
        assert_eq!(reports.beat(&node(), &[], Millis(1_999)).len(), 1);
        assert_eq!(reports.beat(&node(), &[], Millis(2_000)), []);
    }

    #[test]
    fn what_was_given_up_is_not_held() {
        let mut reports = Reports::default();
        reports.beat(&node(), &[held(1, 4, true), held(2, 1, true)], Millis(0));
        reports.answered(&node(), held(3, 1, true), Millis(0));
        reports.dropped(&node(), ShardId(1));
        reports.dropped(&node(), ShardId(3));
        assert_eq!(reports.answered(&node(), held(4, 1, true), Millis(0)).len(), 2);
    }
}
