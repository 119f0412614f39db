//! Which nodes do not reach a store that answers others: their shards go to those.

use std::collections::{BTreeMap, BTreeSet};

use super::{Effect, Membership};
use crate::Reason;
use crate::time::Millis;

/// A store that has not answered a node for so long is away for it. Nodes ask every two seconds, and for three.
pub const AWAY_MS: u64 = 8_000;
/// After so long a node gives its shards away, if the store answers others.
pub const STORELESS_MS: u64 = 15_000;
/// So long a store has answered most nodes before one that it does not answer is judged: after it was away for all, not
/// all hear it at once. And so long it has answered such a node before that gets shards again.
pub const STEADY_MS: u64 = 10_000;

/// What a node's beats say of its stores.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Contact {
    /// For how long each store that it had a shard in has not answered it.
    pub(super) silent_ms: BTreeMap<String, u64>,
    pub(super) is_storeless: bool,
    /// Of one that is storeless: since when all of them answer it.
    answered_since: Option<Millis>,
}

impl Contact {
    /// Whether `store` is away for it; none if it never asked.
    fn is_away(&self, store: &str) -> Option<bool> {
        self.silent_ms.get(store).map(|silent_ms| AWAY_MS <= *silent_ms)
    }

    /// Whether it is storeless from now on, or not any more, if that is news.
    fn look(&mut self, is_steady: impl Fn(&str) -> bool, now: Millis) -> Option<bool> {
        if !self.is_storeless {
            self.answered_since = None;
            let mut stores = self.silent_ms.iter();
            let is_cut_off = |(store, ms): (&String, &u64)| STORELESS_MS <= *ms && is_steady(store);
            self.is_storeless = stores.any(is_cut_off);
            return self.is_storeless.then_some(true);
        }
        if self.silent_ms.values().any(|silent_ms| AWAY_MS <= *silent_ms) {
            self.answered_since = None;
            return None;
        }
        let since = *self.answered_since.get_or_insert(now);
        self.is_storeless = now.since(since) < STEADY_MS;
        (!self.is_storeless).then_some(false)
    }
}

impl Membership {
    /// Where a store is away for more than half of those that have asked it, the fault is rather its own, and nobody else
    /// would do better.
    pub(super) fn judge_stores(&mut self, now: Millis) -> Vec<Effect> {
        self.settle_stores(now);
        let steady = &self.steady;
        let is_steady =
            |store: &str| steady.get(store).is_some_and(|since| STEADY_MS <= now.since(*since));
        let mut effects = Vec::new();
        for node in self.nodes.values_mut().filter(|node| node.has_joined && !node.is_suspect) {
            let member = node.joining.member.clone();
            let news = node.contact.look(is_steady, now);
            effects.extend(news.map(|is_storeless| match is_storeless {
                true => Effect::Storeless { member },
                false => Effect::Alive { member, reason: Reason::StoreAnswers },
            }));
        }
        effects
    }

    /// Notes since when each store answers most.
    fn settle_stores(&mut self, now: Millis) {
        let heard: Vec<&Contact> =
            self.nodes.values().filter(|node| node.is_heard()).map(|node| &node.contact).collect();
        let stores: BTreeSet<&String> =
            heard.iter().flat_map(|contact| contact.silent_ms.keys()).collect();
        let answers_most = |store: &str| {
            let asked = heard.iter().filter_map(|contact| contact.is_away(store));
            let (away, near): (Vec<bool>, Vec<bool>) = asked.partition(|is_away| *is_away);
            !near.is_empty() && away.len() <= near.len()
        };
        let since = |store: &String| self.steady.get(store).copied().unwrap_or(now);
        let steady = stores.into_iter().filter(|store| answers_most(store));
        self.steady = steady.map(|store| (store.clone(), since(store))).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{beat, joining, member, with};
    use super::*;
    use crate::Member;
    use crate::membership::{Beat, Standing};

    /// What each node says of which stores.
    type Said<'a> = [(&'a Member, &'a [(&'a str, u64)])];

    /// Beats of all every second up to and with second `until`, and what followed from them.
    fn run(
        membership: &mut Membership,
        seconds: std::ops::RangeInclusive<u64>,
        said: &Said<'_>,
    ) -> Vec<Effect> {
        let mut effects = Vec::new();
        for second in seconds {
            for (member, stores) in said {
                let stores = stores.iter().map(|(store, ms)| ((*store).to_owned(), *ms)).collect();
                let beat = Beat { stores, ..beat(member, second, 0) };
                effects.extend(membership.beat(beat, Millis(second * 1_000)).unwrap());
            }
            effects.extend(membership.tick(Millis(second * 1_000)));
        }
        effects
    }

    fn storeless(member: &Member) -> Effect {
        Effect::Storeless { member: member.clone() }
    }

    fn alive(member: &Member, reason: Reason) -> Effect {
        Effect::Alive { member: member.clone(), reason }
    }

    fn standing(membership: &Membership, member: &Member) -> Standing {
        membership.node(member).unwrap().standing()
    }

    #[test]
    fn who_alone_does_not_reach_the_store_is_storeless_until_it_has_answered_for_a_while() {
        let (ann, bob, eve) = (member("ann", 1), member("bob", 1), member("eve", 1));
        let mut membership = with(&[&ann, &bob, &eve]);
        let mut run = |seconds, ms| {
            let ann_says = [("main", ms)];
            let said: [(&Member, &[(&str, u64)]); 3] =
                [(&ann, &ann_says), (&bob, &[("main", 0)]), (&eve, &[("main", AWAY_MS - 1)])];
            let effects = run(&mut membership, seconds, &said);
            (effects, standing(&membership, &ann))
        };
        assert_eq!(run(1..=20, STORELESS_MS - 1), (vec![], Standing::Answering));
        assert_eq!(run(21..=21, STORELESS_MS), (vec![storeless(&ann)], Standing::Storeless));
        assert_eq!(run(22..=40, 60_000), (vec![], Standing::Storeless));
        assert_eq!(run(41..=50, 0), (vec![], Standing::Storeless));
        assert_eq!(run(51..=51, AWAY_MS), (vec![], Standing::Storeless), "it is away again");
        assert_eq!(run(52..=61, 0), (vec![], Standing::Storeless));
        let answers = vec![alive(&ann, Reason::StoreAnswers)];
        assert_eq!(run(62..=62, 0), (answers, Standing::Answering));
    }

    #[test]
    fn a_store_that_is_away_for_most_makes_nobody_storeless_nor_does_it_when_it_comes_back() {
        let (ann, bob, eve) = (member("ann", 1), member("bob", 1), member("eve", 1));
        let mut membership = with(&[&ann, &bob, &eve]);
        let of = |bob_ms| [[("main", 60_000)], [("main", bob_ms)], [("main", 0)]];
        let mut run = |seconds, bob_ms| {
            let [ann_says, bob_says, eve_says] = of(bob_ms);
            let said: [(&Member, &[(&str, u64)]); 3] =
                [(&ann, &ann_says), (&bob, &bob_says), (&eve, &eve_says)];
            run(&mut membership, seconds, &said)
        };
        assert_eq!(run(1..=60, AWAY_MS), []);
        assert_eq!(run(61..=70, 0), [], "bob hears it first");
        assert_eq!(run(71..=71, 0), [storeless(&ann)]);
    }

    #[test]
    fn who_never_asked_a_store_says_nothing_of_it() {
        let (ann, bob) = (member("ann", 1), member("bob", 1));
        let mut membership = with(&[&ann, &bob]);
        let said: [(&Member, &[(&str, u64)]); 2] = [(&ann, &[("main", 60_000)]), (&bob, &[])];
        assert_eq!(run(&mut membership, 1..=60, &said), [], "it may be away for all");
        let said: [(&Member, &[(&str, u64)]); 2] =
            [(&ann, &[("main", 0), ("other", 60_000)]), (&bob, &[("main", 0)])];
        assert_eq!(run(&mut membership, 61..=120, &said), [], "each store for itself");
    }

    #[test]
    fn who_was_suspected_is_storeless_still() {
        let (ann, bob) = (member("ann", 1), member("bob", 1));
        let mut membership = with(&[&ann, &bob]);
        let both: [(&Member, &[(&str, u64)]); 2] =
            [(&ann, &[("main", 60_000)]), (&bob, &[("main", 0)])];
        assert_eq!(run(&mut membership, 1..=20, &both), [storeless(&ann)]);
        let lost = membership.session_lost(&ann.name, Millis(20_000));
        assert_eq!(lost.len(), 2, "suspected and probed: {lost:?}");
        assert_eq!(standing(&membership, &ann), Standing::Suspect);
        let again = [alive(&ann, Reason::BeatsAgain), storeless(&ann)];
        assert_eq!(run(&mut membership, 21..=21, &both), again);
        assert_eq!(standing(&membership, &ann), Standing::Storeless);
        // A join that is repeated is written down as that of one that lives.
        let again = membership.joined(joining(&ann), Millis(21_100)).unwrap();
        assert_eq!(again, [storeless(&ann)]);
    }

    #[test]
    fn the_next_leader_knows_who_is_storeless() {
        let (ann, bob) = (member("ann", 1), member("bob", 1));
        let mut membership = Membership::new();
        for node in [&ann, &bob] {
            membership.inherited(joining(node), 0, Millis(0));
        }
        membership.inherited_storeless(&ann);
        let joined = membership.joined(joining(&ann), Millis(10)).unwrap();
        assert_eq!(joined, [alive(&ann, Reason::Joined), storeless(&ann)]);
        assert_eq!(standing(&membership, &ann), Standing::Storeless);
        membership.joined(joining(&bob), Millis(10)).unwrap();
        let both: [(&Member, &[(&str, u64)]); 2] = [(&ann, &[("main", 0)]), (&bob, &[("main", 0)])];
        assert_eq!(run(&mut membership, 1..=11, &both), [alive(&ann, Reason::StoreAnswers)]);
    }
}
