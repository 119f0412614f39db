use std::collections::BTreeSet;

use super::*;
use crate::Incarnation;
use crate::membership::Standing;
use crate::place::Admission;

const SHARD: ShardId = ShardId(0);
const SETTINGS: Settings =
    Settings { settle_ms: 3_000, nodes_expected: 2, moves_max: 2, move_every_ms: 100 };

fn member(name: &str, incarnation: u64) -> Member {
    Member { name: name.parse().unwrap(), incarnation: Incarnation(incarnation) }
}

fn candidate(member: &Member, standing: Standing) -> Candidate {
    let (zone, admission) = ("a".to_owned(), Admission::Open);
    Candidate { member: member.clone(), zone, capacity: 1, standing, admission }
}

fn view(members: &[&Member]) -> Vec<Candidate> {
    members.iter().map(|member| candidate(member, Standing::Answering)).collect()
}

fn row(epoch: u64, member: Option<&Member>, term: u64) -> OwnerRow {
    OwnerRow { epoch: Epoch(epoch), member: member.cloned(), term: Term(term) }
}

fn held(epoch: u64, is_open: bool) -> [Held; 1] {
    [Held { shard: SHARD, epoch: Epoch(epoch), is_open }]
}

/// A leader of term 5 that has read the row of its only shard.
fn leader(row: OwnerRow) -> Ownership {
    let mut ownership = Ownership::new(Term(5), [SHARD], SETTINGS, Millis(0));
    assert_eq!(ownership.tick(Millis(0)), [Action::ReadOwner { shard: SHARD }]);
    ownership.owner_read(SHARD, row, Millis(10));
    ownership
}

fn fences(actions: &[Action]) -> Vec<(u64, Member, Reason)> {
    let fence = |action: &Action| match action {
        Action::Fence { expected_epoch, to, reason, .. } => {
            Some((expected_epoch.0, to.clone(), *reason))
        }
        Action::ReadOwner { .. }
        | Action::Grant { .. }
        | Action::Remember { .. }
        | Action::MapChanged { .. }
        | Action::Outranked { .. } => None,
    };
    actions.iter().filter_map(fence).collect()
}

fn grants(actions: &[Action]) -> Vec<(u64, Member)> {
    let grant = |action: &Action| match action {
        Action::Grant { epoch, to, .. } => Some((epoch.0, to.clone())),
        Action::ReadOwner { .. }
        | Action::Fence { .. }
        | Action::Remember { .. }
        | Action::MapChanged { .. }
        | Action::Outranked { .. } => None,
    };
    actions.iter().filter_map(grant).collect()
}

#[test]
fn nothing_is_done_for_a_shard_whose_row_is_unread() {
    let ann = member("ann", 1);
    let mut ownership = Ownership::new(Term(5), [SHARD], SETTINGS, Millis(0));
    assert_eq!(ownership.tick(Millis(0)), [Action::ReadOwner { shard: SHARD }]);
    assert_eq!(ownership.view(view(&[&ann]), Millis(10)), []);
    assert_eq!(ownership.tick(Millis(4_999)), []);
    assert_eq!(ownership.tick(Millis(5_000)), [Action::ReadOwner { shard: SHARD }]);
    ownership.owner_unread(SHARD, Millis(5_100));
    assert_eq!(ownership.tick(Millis(5_299)), []);
    assert_eq!(ownership.tick(Millis(5_300)), [Action::ReadOwner { shard: SHARD }]);
}

#[test]
fn a_new_shard_waits_for_the_expected_nodes_or_for_a_while() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(0, None, 0));
    assert_eq!(ownership.view(view(&[&ann]), Millis(100)), []);
    assert_eq!(ownership.tick(Millis(3_099)), []);
    let waited = fences(&ownership.tick(Millis(3_100)));
    assert_eq!(waited, [(0, ann.clone(), Reason::FirstPlacement)]);

    let mut ownership = leader(row(0, None, 0));
    let complete = fences(&ownership.view(view(&[&ann, &bob]), Millis(100)));
    assert!(matches!(complete[..], [(0, _, Reason::FirstPlacement)]));
}

#[test]
fn a_grant_is_repeated_until_the_node_holds_it() {
    let ann = member("ann", 1);
    let mut ownership = leader(row(4, Some(&ann), 3));
    let first = ownership.view(view(&[&ann]), Millis(100));
    assert_eq!(grants(&first), [(4, ann.clone())]);
    assert_eq!(ownership.held(&ann, &[], Millis(250)), []);
    assert_eq!(grants(&ownership.tick(Millis(300))), [(4, ann.clone())]);
    let holds = ownership.held(&ann, &held(4, false), Millis(400));
    assert_eq!(holds, []);
    assert_eq!(ownership.tick(Millis(600)), []);
    assert!(!ownership.map()[&SHARD].is_open);
    let opened = ownership.held(&ann, &held(4, true), Millis(700));
    assert_eq!(opened, [Action::MapChanged { version: 2 }]);
    assert!(ownership.map()[&SHARD].is_open);
}

#[test]
fn a_shard_of_a_live_node_stays_whatever_the_placement_says() {
    let ann = member("ann", 1);
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann]), Millis(100));
    ownership.held(&ann, &held(4, true), Millis(200));
    for name in ["bob", "cid", "dan"] {
        let more = ownership.view(view(&[&ann, &member(name, 1)]), Millis(300));
        assert_eq!(fences(&more), []);
    }
    assert_eq!(fences(&ownership.tick(Millis(60_000))), []);
}

#[test]
fn a_shard_of_a_dead_node_is_fenced_to_a_live_one() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob]), Millis(100));
    let died = ownership.view(view(&[&bob]), Millis(200));
    assert_eq!(fences(&died), [(4, bob.clone(), Reason::OwnerDied)]);
    assert_eq!(ownership.tick(Millis(300)), [], "one fence in flight");
    let fenced = FenceResult::Fenced(row(5, Some(&bob), 5));
    let granted = ownership.fence_result(SHARD, fenced, Millis(400));
    assert_eq!(grants(&granted), [(5, bob.clone())]);
    assert_eq!(ownership.map()[&SHARD].member, bob);
}

#[test]
fn owners_of_an_earlier_leader_have_time_to_join() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    assert_eq!(fences(&ownership.view(view(&[&bob]), Millis(100))), []);
    assert_eq!(fences(&ownership.tick(Millis(2_999))), []);
    let fenced = fences(&ownership.tick(Millis(3_000)));
    assert_eq!(fenced, [(4, bob, Reason::OwnerDied)]);
}

#[test]
fn a_node_that_came_back_gets_its_shards_in_a_new_epoch_at_once() {
    let (ann, again) = (member("ann", 1), member("ann", 2));
    let mut ownership = leader(row(4, Some(&ann), 3));
    let joined = ownership.view(view(&[&again]), Millis(100));
    assert_eq!(fences(&joined), [(4, again, Reason::OwnerDied)]);
}

#[test]
fn a_lost_fence_adopts_the_row_that_it_met() {
    let (ann, bob, cid) = (member("ann", 1), member("bob", 1), member("cid", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob, &cid]), Millis(100));
    ownership.view(view(&[&bob, &cid]), Millis(200));
    let lost = FenceResult::Lost(row(6, Some(&cid), 5));
    let actions = ownership.fence_result(SHARD, lost, Millis(300));
    assert_eq!(grants(&actions), [(6, cid)]);
    ownership.view(view(&[&bob]), Millis(400));
    let lost = FenceResult::Lost(row(7, Some(&ann), 5));
    let actions = ownership.fence_result(SHARD, lost, Millis(500));
    assert_eq!(fences(&actions), [(7, bob, Reason::OwnerDied)], "the row names a dead node");
}

#[test]
fn a_failed_fence_is_looked_up() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob]), Millis(100));
    ownership.view(view(&[&bob]), Millis(200));
    assert_eq!(ownership.fence_result(SHARD, FenceResult::Failed, Millis(300)), []);
    assert_eq!(ownership.tick(Millis(500)), [Action::ReadOwner { shard: SHARD }]);
    let read = ownership.owner_read(SHARD, row(5, Some(&bob), 5), Millis(600));
    assert_eq!(grants(&read), [(5, bob)]);
}

#[test]
fn a_fence_that_nobody_answers_is_looked_up() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob]), Millis(100));
    ownership.view(view(&[&bob]), Millis(200));
    assert_eq!(ownership.tick(Millis(5_200)), [Action::ReadOwner { shard: SHARD }]);
}

#[test]
fn whoever_meets_a_higher_epoch_reads_the_row_again() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob]), Millis(100));
    let told = ownership.held(&bob, &held(5, true), Millis(200));
    assert_eq!(told, [Action::ReadOwner { shard: SHARD }]);
    ownership.owner_read(SHARD, row(5, Some(&bob), 4), Millis(300));
    assert_eq!(ownership.map()[&SHARD].member, bob);
    assert_eq!(ownership.held(&ann, &held(4, true), Millis(400)), [], "an old one says nothing");
}

#[test]
fn a_shard_that_its_owner_gave_up_gets_a_new_epoch() {
    let check = |drop: fn(&mut Ownership, &Member) -> Vec<Action>| {
        let ann = member("ann", 1);
        let mut ownership = leader(row(4, Some(&ann), 3));
        ownership.view(view(&[&ann]), Millis(100));
        ownership.held(&ann, &held(4, true), Millis(200));
        let dropped = fences(&drop(&mut ownership, &ann));
        assert_eq!(dropped, [(4, ann, Reason::OwnerDropped)]);
    };
    check(|ownership, _| ownership.dropped(SHARD, Epoch(4), Reason::Fenced, Millis(300)));
    check(|ownership, ann| ownership.held(ann, &[], Millis(300)));
    check(|ownership, ann| ownership.held(ann, &held(3, true), Millis(300)));
}

#[test]
fn a_shard_whose_store_rolled_back_is_left_alone() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob]), Millis(100));
    ownership.dropped(SHARD, Epoch(4), Reason::StoreRolledBack, Millis(200));
    assert_eq!(fences(&ownership.view(view(&[&bob]), Millis(300))), []);
    // Its row is read, in case it is restored, and what was written down of it is written again.
    let wanted = ownership.tick(Millis(60_000));
    assert_eq!(wanted[0], Action::ReadOwner { shard: SHARD });
    assert_eq!((wanted.len(), remembered(&wanted)), (2, vec![(4, ShardStanding::Stopped)]));
}

#[test]
fn who_goes_on_saying_that_a_store_rolled_back_does_not_put_off_its_return() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob]), Millis(100));
    let mut read = Vec::new();
    for beat in 1..=20 {
        let now = Millis(beat * 500);
        let actions = ownership.dropped(SHARD, Epoch(4), Reason::StoreRolledBack, now);
        read.extend(actions.contains(&Action::ReadOwner { shard: SHARD }).then_some(now.0));
    }
    assert_eq!(read, [5_500], "as often as if it were said once");
}

#[test]
fn a_suspect_keeps_its_shards_and_gets_none() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob]), Millis(100));
    let suspect = candidate(&ann, Standing::Suspect);
    assert_eq!(fences(&ownership.view(vec![suspect], Millis(200))), []);
    let suspect = candidate(&bob, Standing::Suspect);
    assert_eq!(fences(&ownership.view(vec![suspect], Millis(300))), [], "no live target");
}

#[test]
fn a_row_of_a_later_term_ends_this_one() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 3));
    ownership.view(view(&[&ann, &bob]), Millis(100));
    ownership.view(view(&[&bob]), Millis(200));
    let lost = FenceResult::Lost(row(5, Some(&ann), 6));
    let actions = ownership.fence_result(SHARD, lost, Millis(300));
    assert_eq!(actions, [Action::Outranked { term: Term(6) }]);
    let later = ownership.tick(Millis(9_000));
    assert_eq!(later, [Action::Outranked { term: Term(6) }]);
}

/// A leader whose four shards are all open at `ann`, who is alone.
fn leader_of_four(ann: &Member) -> Ownership {
    let shards = (0..4).map(ShardId);
    let settings = Settings { nodes_expected: 1, ..SETTINGS };
    let mut ownership = Ownership::new(Term(5), shards.clone(), settings, Millis(0));
    ownership.tick(Millis(0));
    ownership.view(view(&[ann]), Millis(0));
    for shard in shards {
        ownership.owner_read(shard, row(1, Some(ann), 5), Millis(10));
    }
    hold(&mut ownership, ann, &[(0, 1), (1, 1), (2, 1), (3, 1)], 20);
    ownership
}

/// A beat of `member`, who has opened these shards under these epochs.
fn hold(ownership: &mut Ownership, member: &Member, held: &[(u32, u64)], now: u64) -> Vec<Action> {
    let held: Vec<Held> = held
        .iter()
        .map(|(shard, epoch)| Held { shard: ShardId(*shard), epoch: Epoch(*epoch), is_open: true })
        .collect();
    ownership.held(member, &held, Millis(now))
}

fn fenced_shard(actions: &[Action]) -> Option<(ShardId, Member, Reason)> {
    actions.iter().find_map(|action| match action {
        Action::Fence { shard, to, reason, .. } => Some((*shard, to.clone(), *reason)),
        Action::ReadOwner { .. }
        | Action::Grant { .. }
        | Action::Remember { .. }
        | Action::MapChanged { .. }
        | Action::Outranked { .. } => None,
    })
}

#[test]
fn a_node_that_joins_gets_its_share_one_shard_after_another() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader_of_four(&ann);
    let first = ownership.view(view(&[&ann, &bob]), Millis(1_000));
    let (shard, to, reason) = fenced_shard(&first).expect("bob has less than his share");
    assert_eq!((to, reason), (bob.clone(), Reason::Rebalanced));
    assert_eq!(fences(&ownership.tick(Millis(1_500))), [], "one is under way");
    let done = FenceResult::Fenced(row(2, Some(&bob), 5));
    let granted = ownership.fence_result(shard, done, Millis(1_510));
    assert_eq!(grants(&granted), [(2, bob.clone())]);
    let rest: Vec<(u32, u64)> = (0..4).filter(|n| ShardId(*n) != shard).map(|n| (n, 1)).collect();
    hold(&mut ownership, &ann, &rest, 1_515);
    let second = hold(&mut ownership, &bob, &[(shard.0, 2)], 1_520);
    let (next, to, _) = fenced_shard(&second).expect("two are his share");
    assert_eq!(to, bob);
    ownership.fence_result(next, FenceResult::Fenced(row(2, Some(&bob), 5)), Millis(1_530));
    hold(&mut ownership, &bob, &[(shard.0, 2), (next.0, 2)], 1_540);
    assert_eq!(fences(&ownership.tick(Millis(9_000))), [], "everybody has a fair share");
}

#[test]
fn moves_are_spread_over_time() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader_of_four(&ann);
    let first = ownership.view(view(&[&ann, &bob]), Millis(1_000));
    let (shard, _, _) = fenced_shard(&first).unwrap();
    ownership.fence_result(shard, FenceResult::Fenced(row(2, Some(&bob), 5)), Millis(1_010));
    let early = hold(&mut ownership, &bob, &[(shard.0, 2)], 1_020);
    assert_eq!(fences(&early), []);
    assert_eq!(fences(&ownership.tick(Millis(1_099))), []);
    assert_eq!(fences(&ownership.tick(Millis(1_100))).len(), 1);
}

/// What moves to `to` one after another, each for this reason, and is opened there at once.
fn moved_to(
    ownership: &mut Ownership,
    to: &Member,
    mut actions: Vec<Action>,
    why: Reason,
) -> Vec<u32> {
    let mut moved = Vec::new();
    for step in 1..=40u64 {
        let now = Millis(1_000 + step * 50);
        if let Some((shard, target, reason)) = fenced_shard(&actions) {
            assert_eq!((&target, reason), (to, why));
            moved.push(shard.0);
            ownership.fence_result(shard, FenceResult::Fenced(row(2, Some(to), 5)), now);
        }
        let held: Vec<(u32, u64)> = moved.iter().map(|shard| (*shard, 2)).collect();
        actions = hold(ownership, to, &held, now.0);
    }
    moved.sort_unstable();
    moved
}

#[test]
fn a_node_that_drains_gives_everything_away_even_when_others_are_suspected() {
    let (ann, bob, eve) = (member("ann", 1), member("bob", 1), member("eve", 1));
    let mut ownership = leader_of_four(&ann);
    let mut seen = view(&[&ann, &bob]);
    seen[0].admission = Admission::Draining;
    seen.push(candidate(&eve, Standing::Suspect));
    let actions = ownership.view(seen, Millis(1_000));
    assert_eq!(moved_to(&mut ownership, &bob, actions, Reason::OwnerDraining), [0, 1, 2, 3]);
}

#[test]
fn a_node_that_does_not_reach_its_store_loses_also_what_it_could_not_open() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader_of_four(&ann);
    let more = [2, 3].map(|shard| Held { shard: ShardId(shard), epoch: Epoch(1), is_open: false });
    let all = [0, 1].map(|shard| Held { shard: ShardId(shard), epoch: Epoch(1), is_open: true });
    let unopened = ownership.held(&ann, &[all, more].concat(), Millis(995));
    assert_eq!(fences(&unopened), []);
    let mut seen = view(&[&ann, &bob]);
    seen[0].standing = Standing::Storeless;
    let actions = ownership.view(seen.clone(), Millis(1_000));
    assert_eq!(moved_to(&mut ownership, &bob, actions, Reason::OwnerStoreless), [0, 1, 2, 3]);
    seen[0].standing = Standing::Answering;
    let back = ownership.view(seen, Millis(4_000));
    let (_, to, reason) = fenced_shard(&back).expect("its share comes back");
    assert_eq!((&to, reason), (&ann, Reason::Rebalanced));
}

#[test]
fn a_cordoned_node_keeps_what_it_has_and_gets_nothing() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader_of_four(&ann);
    let mut seen = view(&[&ann, &bob]);
    seen[1].admission = Admission::Cordoned;
    assert_eq!(fences(&ownership.view(seen.clone(), Millis(1_000))), []);
    seen[0].admission = Admission::Cordoned;
    seen[1].admission = Admission::Open;
    assert_eq!(fences(&ownership.view(seen, Millis(2_000))), []);
}

#[test]
fn nothing_moves_that_could_stay_while_somebody_is_suspected() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader_of_four(&ann);
    let mut seen = view(&[&ann, &bob]);
    seen.push(candidate(&member("eve", 1), Standing::Suspect));
    assert_eq!(fences(&ownership.view(seen, Millis(1_000))), []);
}

#[test]
fn nothing_is_fenced_while_the_brake_is_on() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader_of_four(&ann);
    ownership.hold(true);
    assert_eq!(fences(&ownership.view(view(&[&bob]), Millis(9_000))), []);
    ownership.hold(false);
    assert_eq!(fences(&ownership.tick(Millis(9_100))).len(), 4, "ann is dead");
}

/// What the leader wants the next one to know.
fn remembered(actions: &[Action]) -> Vec<(u64, ShardStanding)> {
    let remember = |action: &Action| match action {
        Action::Remember { remembered, .. } => Some((remembered.epoch.0, remembered.standing)),
        Action::ReadOwner { .. }
        | Action::Grant { .. }
        | Action::Fence { .. }
        | Action::MapChanged { .. }
        | Action::Outranked { .. } => None,
    };
    actions.iter().filter_map(remember).collect()
}

/// A leader that knows of epoch 7, and two nodes.
fn leader_of_seven() -> (Ownership, Member) {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(7, Some(&ann), 5));
    ownership.view(view(&[&ann, &bob]), Millis(20));
    ownership.held(&ann, &held(7, true), Millis(30));
    (ownership, ann)
}

/// Reads the row again and again, as it is asked for, and finds this epoch. Answers all that was wanted until `until`.
fn reads(ownership: &mut Ownership, epoch: u64, owner: &Member, until: u64) -> Vec<Action> {
    let mut all = Vec::new();
    for now in (100..until).step_by(100).map(Millis) {
        let actions = ownership.tick(now);
        if actions.iter().any(|action| matches!(action, Action::ReadOwner { .. })) {
            all.extend(ownership.owner_read(SHARD, row(epoch, Some(owner), 4), now));
        }
        all.extend(actions);
    }
    all
}

#[test]
fn a_row_that_stays_older_than_what_is_known_stops_the_shard() {
    let (mut ownership, ann) = leader_of_seven();
    let lost = FenceResult::Lost(row(5, Some(&ann), 4));
    assert_eq!(fences(&ownership.fence_result(SHARD, lost, Millis(50))), []);
    let wanted = reads(&mut ownership, 5, &ann, 60 + OLDER_MS);
    assert!(fences(&wanted).is_empty() && grants(&wanted).is_empty(), "{wanted:?}");
    assert!(!ownership.is_stopped(SHARD), "an answer may have been overtaken");
    let wanted = reads(&mut ownership, 5, &ann, 1_000 + OLDER_MS);
    assert_eq!(remembered(&wanted), [(7, ShardStanding::Stopped)]);
    assert!(ownership.is_stopped(SHARD));
}

#[test]
fn a_newer_row_after_an_older_one_is_the_true_one() {
    let (mut ownership, ann) = leader_of_seven();
    ownership.owner_read(SHARD, row(5, Some(&ann), 4), Millis(50));
    reads(&mut ownership, 7, &ann, 2 * OLDER_MS);
    ownership.owner_read(SHARD, row(5, Some(&ann), 4), Millis(2 * OLDER_MS));
    assert!(!ownership.is_stopped(SHARD));
}

#[test]
fn the_next_leader_knows_what_was_stopped_and_what_its_rows_cannot_say() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let next = |standing| {
        let mut ownership = Ownership::new(Term(5), [SHARD], SETTINGS, Millis(0));
        ownership.recall(SHARD, Remembered { epoch: Epoch(7), standing }, Millis(0));
        ownership.view(view(&[&ann, &bob]), Millis(0));
        ownership
    };
    let mut stopped = next(ShardStanding::Stopped);
    let wanted = reads(&mut stopped, 7, &ann, 60_000);
    assert!(fences(&wanted).is_empty() && grants(&wanted).is_empty(), "{wanted:?}");
    assert!(remembered(&wanted).iter().all(|told| *told == (7, ShardStanding::Stopped)));
    // Restored, it has a much later epoch and no owner.
    let wanted = stopped.owner_read(SHARD, row(1_000_007, None, 5), Millis(60_000));
    assert_eq!(remembered(&wanted), [(1_000_007, ShardStanding::Served)]);
    assert!(matches!(fences(&wanted)[..], [(1_000_007, _, Reason::FirstPlacement)]), "{wanted:?}");
    let mut older = next(ShardStanding::Served);
    let wanted = reads(&mut older, 6, &ann, 60_000);
    assert!(fences(&wanted).is_empty() && grants(&wanted).is_empty(), "{wanted:?}");
    assert_eq!(remembered(&wanted)[0], (7, ShardStanding::Stopped));
}

#[test]
fn a_released_shard_is_opened_in_an_epoch_that_nobody_had() {
    let (mut ownership, ann) = leader_of_seven();
    assert_eq!(ownership.release(SHARD, Millis(40)), None, "it is not stopped");
    ownership.dropped(SHARD, Epoch(7), Reason::StoreRolledBack, Millis(50));
    let released = ownership.release(SHARD, Millis(60)).unwrap();
    assert_eq!(remembered(&released), [(8, ShardStanding::Released)]);
    assert_eq!(released[0], Action::ReadOwner { shard: SHARD });
    let wanted = ownership.owner_read(SHARD, row(5, Some(&ann), 4), Millis(70));
    let [Action::Fence { expected_epoch: Epoch(5), above: Epoch(8), to, reason, .. }, ..] =
        &wanted[..]
    else {
        panic!("{wanted:?}")
    };
    assert_eq!(*reason, Reason::Released);
    let fenced = FenceResult::Fenced(row(9, Some(to), 5));
    let wanted = ownership.fence_result(SHARD, fenced, Millis(80));
    assert!(matches!(grants(&wanted)[..], [(9, _)]), "{wanted:?}");
    assert_eq!(remembered(&wanted), [(9, ShardStanding::Served)]);
}

#[test]
fn what_was_said_before_a_release_does_not_stop_the_shard_under_the_next_leader() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(9, Some(&bob), 6));
    ownership.view(view(&[&ann, &bob]), Millis(20));
    // Of epoch 7, before it was released and opened in the one after the next.
    ownership.dropped(SHARD, Epoch(7), Reason::StoreRolledBack, Millis(30));
    assert!(!ownership.is_stopped(SHARD));
}

#[test]
fn a_move_whose_fence_came_to_nothing_is_made_again() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader(row(4, Some(&ann), 5));
    ownership.held(&ann, &held(4, true), Millis(90));
    let mut seen = view(&[&ann, &bob]);
    seen[0].standing = Standing::Storeless;
    assert_eq!(fences(&ownership.view(seen, Millis(1_000))).len(), 1);
    ownership.fence_result(SHARD, FenceResult::Failed, Millis(1_100));
    let read = ownership.tick(Millis(1_100 + RETRY_MS));
    assert!(read.contains(&Action::ReadOwner { shard: SHARD }), "{read:?}");
    let again = ownership.owner_read(SHARD, row(4, Some(&ann), 5), Millis(1_400));
    assert_eq!(fences(&again), [(4, bob, Reason::OwnerStoreless)]);
}

#[test]
fn a_shard_that_cannot_be_opened_goes_round_ever_slower_and_elsewhere() {
    let (mut ownership, ann) = leader_of_seven();
    let (mut epoch, mut now) = (7, Millis(100));
    let (mut waits, mut owners) = (Vec::new(), vec![ann.name.to_string()]);
    for _ in 0..5 {
        let from = now;
        let mut wanted = ownership.dropped(SHARD, Epoch(epoch), Reason::StoreUnavailable, now);
        while fences(&wanted).is_empty() {
            now = now.plus(50);
            assert!(now.since(from) < DROPPED_MS_MAX);
            wanted = ownership.tick(now);
        }
        waits.push(now.since(from));
        let (_, owner, _) = fences(&wanted).remove(0);
        owners.push(owner.name.to_string());
        epoch += 1;
        let fenced = FenceResult::Fenced(row(epoch, Some(&owner), 5));
        ownership.fence_result(SHARD, fenced, now);
    }
    // The first owner had it open.
    assert_eq!(waits, [0, 200, 400, 800, 1_600]);
    assert_eq!(owners, ["ann", "ann", "ann", "bob", "ann", "bob"]);
}

#[test]
fn a_shard_that_two_nodes_cannot_open_gets_to_the_third() {
    let (mut ownership, ann) = leader_of_seven();
    let (bob, eve) = (member("bob", 1), member("eve", 1));
    ownership.view(view(&[&ann, &bob, &eve]), Millis(40));
    let (mut epoch, mut now, mut owners) = (7, Millis(100), BTreeSet::from([ann]));
    for _ in 0..5 {
        let mut wanted = ownership.dropped(SHARD, Epoch(epoch), Reason::StoreUnavailable, now);
        while fences(&wanted).is_empty() {
            now = now.plus(50);
            wanted = ownership.tick(now);
        }
        let (_, owner, _) = fences(&wanted).remove(0);
        owners.insert(owner.clone());
        epoch += 1;
        ownership.fence_result(SHARD, FenceResult::Fenced(row(epoch, Some(&owner), 5)), now);
    }
    assert_eq!(owners.len(), 3, "{owners:?}");
}

#[test]
fn a_shard_is_not_moved_back_to_a_node_that_could_not_open_it() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut ownership = leader_of_four(&ann);
    let mut wanted = ownership.view(view(&[&ann, &bob]), Millis(1_000));
    let (shard, _, _) = fenced_shard(&wanted).unwrap();
    let (mut owner, mut epoch, mut now) = (bob.clone(), 2, 1_000);
    while owner == bob {
        let fenced = FenceResult::Fenced(row(epoch, Some(&owner), 5));
        ownership.fence_result(shard, fenced, Millis(now));
        let reason = Reason::StoreUnavailable;
        wanted = ownership.dropped(shard, Epoch(epoch), reason, Millis(now));
        while fenced_shard(&wanted).is_none() {
            now += 50;
            assert!(now < 60_000);
            wanted = ownership.tick(Millis(now));
        }
        (_, owner, _) = fenced_shard(&wanted).unwrap();
        epoch += 1;
    }
    ownership.fence_result(shard, FenceResult::Fenced(row(epoch, Some(&ann), 5)), Millis(now));
    let held: Vec<(u32, u64)> =
        (0..4).map(|n| (n, if ShardId(n) == shard { epoch } else { 1 })).collect();
    let moved = hold(&mut ownership, &ann, &held, now + 1_000);
    let (next, to, reason) = fenced_shard(&moved).unwrap();
    assert!(next != shard && (to, reason) == (bob.clone(), Reason::Rebalanced));
    ownership.fence_result(next, FenceResult::Fenced(row(2, Some(&bob), 5)), Millis(now + 1_010));
    hold(&mut ownership, &bob, &[(next.0, 2)], now + 1_020);
    assert_eq!(fenced_shard(&ownership.tick(Millis(now + 2_000))), None);
    let later = fenced_shard(&ownership.tick(Millis(now + 700_000)));
    assert_eq!(later, Some((shard, bob, Reason::Rebalanced)), "that is long ago");
}

#[test]
fn a_fence_that_was_on_its_way_restores_nothing() {
    let stopped = |first: fn(&mut Ownership), then: fn(&mut Ownership)| {
        let (mut ownership, ann) = leader_of_seven();
        // Its owner is gone for the leader, and says why a little later.
        assert_eq!(fences(&ownership.held(&ann, &[], Millis(50))).len(), 1);
        first(&mut ownership);
        then(&mut ownership);
        assert!(ownership.is_stopped(SHARD));
        let wanted = reads(&mut ownership, 8, &member("bob", 1), 60_000);
        assert!(fences(&wanted).is_empty() && grants(&wanted).is_empty(), "{wanted:?}");
        ownership.owner_read(SHARD, row(1_000_008, None, 5), Millis(60_000));
        assert!(!ownership.is_stopped(SHARD), "it was restored");
    };
    let says = |ownership: &mut Ownership| {
        ownership.dropped(SHARD, Epoch(7), Reason::StoreRolledBack, Millis(60));
    };
    let fenced = |ownership: &mut Ownership| {
        let fenced = FenceResult::Fenced(row(8, Some(&member("bob", 1)), 5));
        ownership.fence_result(SHARD, fenced, Millis(70));
    };
    stopped(says, fenced);
    stopped(fenced, says);
}

#[test]
fn what_nodes_still_report_of_a_released_shard_does_not_stop_it_again() {
    let (mut ownership, ann) = leader_of_seven();
    ownership.dropped(SHARD, Epoch(7), Reason::StoreRolledBack, Millis(50));
    ownership.release(SHARD, Millis(60)).unwrap();
    let wanted = ownership.owner_read(SHARD, row(5, Some(&ann), 4), Millis(70));
    assert_eq!(fences(&wanted).len(), 1);
    ownership.held(&ann, &held(9, true), Millis(80));
    ownership.dropped(SHARD, Epoch(7), Reason::StoreRolledBack, Millis(90));
    // The fence was sent before that epoch was heard of, so it takes one more.
    let fenced = FenceResult::Fenced(row(9, Some(&ann), 5));
    let wanted = ownership.fence_result(SHARD, fenced, Millis(100));
    assert!(matches!(fences(&wanted)[..], [(9, _, Reason::Released)]), "{wanted:?}");
    let fenced = FenceResult::Fenced(row(10, Some(&ann), 5));
    let wanted = ownership.fence_result(SHARD, fenced, Millis(110));
    assert_eq!((grants(&wanted), ownership.is_stopped(SHARD)), (vec![(10, ann)], false));
}
