use super::*;

pub(super) fn member(name: &str, incarnation: u64) -> Member {
    Member { name: name.parse().unwrap(), incarnation: Incarnation(incarnation) }
}

pub(super) fn joining(member: &Member) -> Joining {
    Joining {
        member: member.clone(),
        zone: "a".to_owned(),
        capacity: 1,
        capabilities: CapabilitySet::default(),
        address: "127.0.0.1:1".to_owned(),
    }
}

pub(super) fn beat(member: &Member, number: u64, runtime_silent_ms: u64) -> Beat {
    let member = member.clone();
    let (held, rolled_back, loads, hot_agents, stores) = Default::default();
    Beat { member, number, held, rolled_back, loads, hot_agents, runtime_silent_ms, stores }
}

fn dead(member: &Member, reason: Reason) -> Effect {
    Effect::Dead { member: member.clone(), reason }
}

fn suspect(member: &Member, reason: Reason) -> Vec<Effect> {
    let suspect = Effect::Suspect { member: member.clone(), reason };
    vec![suspect, Effect::Probe { member: member.clone() }]
}

fn alive(member: &Member, reason: Reason) -> Effect {
    Effect::Alive { member: member.clone(), reason }
}

pub(super) fn with(members: &[&Member]) -> Membership {
    let mut membership = Membership::new();
    for member in members {
        membership.joined(joining(member), Millis(0)).unwrap();
    }
    membership
}

#[test]
fn three_missed_beats_make_a_suspect_and_two_seconds_a_dead_node() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut membership = with(&[&ann, &bob]);
    assert_eq!(membership.beat(beat(&ann, 1, 0), Millis(500)), Some(vec![]));
    assert_eq!(membership.beat(beat(&bob, 1, 0), Millis(1_500)), Some(vec![]));
    assert_eq!(membership.tick(Millis(1_999)), []);
    assert_eq!(membership.tick(Millis(2_000)), suspect(&ann, Reason::BeatsMissed));
    assert_eq!(membership.probe_result(&ann, Probe::Connected), []);
    let again = [Effect::Probe { member: ann.clone() }];
    assert_eq!(membership.tick(Millis(2_499)), again);
    assert_eq!(membership.tick(Millis(2_500)), [dead(&ann, Reason::Silent)]);
    assert_eq!(membership.nodes().count(), 1);
}

#[test]
fn a_lost_session_and_a_refused_port_mean_dead_now() {
    let ann = member("ann", 1);
    let mut membership = with(&[&ann]);
    let lost = membership.session_lost(&ann.name, Millis(10));
    assert_eq!(lost, suspect(&ann, Reason::SessionLost));
    let refused = membership.probe_result(&ann, Probe::Refused);
    assert_eq!(refused, [dead(&ann, Reason::PortRefused)]);
}

#[test]
fn a_suspect_is_probed_again_until_its_port_is_closed_too() {
    let ann = member("ann", 1);
    let mut membership = with(&[&ann]);
    membership.session_lost(&ann.name, Millis(10));
    assert_eq!(membership.tick(Millis(60)), [], "one probe at a time");
    assert_eq!(membership.probe_result(&ann, Probe::Connected), []);
    assert_eq!(membership.tick(Millis(110)), [Effect::Probe { member: ann.clone() }]);
    let refused = membership.probe_result(&ann, Probe::Refused);
    assert_eq!(refused, [dead(&ann, Reason::PortRefused)]);
}

#[test]
fn a_refused_port_of_a_node_that_beats_means_nothing() {
    let ann = member("ann", 1);
    let mut membership = with(&[&ann]);
    membership.session_lost(&ann.name, Millis(10));
    let again = membership.beat(beat(&ann, 1, 0), Millis(20));
    assert_eq!(again, Some(vec![alive(&ann, Reason::BeatsAgain)]));
    assert_eq!(membership.probe_result(&ann, Probe::Refused), []);
}

#[test]
fn a_stalled_runtime_is_slow_and_then_dead() {
    let ann = member("ann", 1);
    let mut membership = with(&[&ann]);
    assert_eq!(membership.beat(beat(&ann, 1, 30_000), Millis(500)), Some(vec![]));
    let stalled = membership.beat(beat(&ann, 2, 30_001), Millis(1_000));
    assert_eq!(stalled, Some(vec![dead(&ann, Reason::RuntimeStalled)]));
}

#[test]
fn a_node_that_beats_and_cannot_be_reached_is_dead_in_the_end() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut membership = with(&[&ann, &bob]);
    let mut dead_at = |is_linked, ms| {
        let effects = membership.links(|name| is_linked || *name == bob.name, Millis(ms));
        (effects.contains(&dead(&ann, Reason::Unlinked)), membership.unlinked())
    };
    assert_eq!(dead_at(false, 0), (false, 1));
    assert_eq!(dead_at(false, UNLINKED_MS - 1), (false, 1));
    assert_eq!(dead_at(true, UNLINKED_MS), (false, 0), "it worked again in time");
    assert_eq!(dead_at(false, UNLINKED_MS + 500), (false, 1));
    assert_eq!(dead_at(false, 2 * UNLINKED_MS + 499), (false, 1));
    assert_eq!(dead_at(false, 2 * UNLINKED_MS + 500), (true, 0));
    assert_eq!(dead_at(false, 4 * UNLINKED_MS), (false, 0));
}

#[test]
fn a_node_without_a_link_is_tried_at_once_and_then_now_and_again() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut membership = with(&[&ann, &bob]);
    let mut tried = Vec::new();
    for ms in (0..5_000).step_by(100) {
        for effect in membership.links(|name| *name == bob.name, Millis(ms)) {
            assert_eq!(effect, Effect::Reach { member: ann.clone() });
            tried.push(ms);
        }
    }
    assert_eq!(tried, [0, 2_000, 4_000]);
}

#[test]
fn who_reaches_less_than_half_of_the_nodes_says_nothing_about_them() {
    let members = ["ann", "bob", "cid"].map(|name| member(name, 1));
    let mut membership = with(&members.each_ref());
    let is_dead = |effect: &Effect| matches!(effect, Effect::Dead { .. });
    let is_cid = |name: &ProcessName| name.as_str() == "cid";
    let late = Millis(2 * UNLINKED_MS);
    assert!(!membership.links(is_cid, Millis(0)).iter().any(is_dead));
    assert!(!membership.is_cut_off(Millis(0)));
    assert!(!membership.links(is_cid, late).iter().any(is_dead));
    assert!(membership.is_cut_off(late));
    let is_not_ann = |name: &ProcessName| name.as_str() != "ann";
    let verdicts = membership.links(is_not_ann, late);
    assert!(verdicts.contains(&dead(&members[0], Reason::Unlinked)), "{verdicts:?}");
    assert!(!membership.is_cut_off(late));
}

#[test]
fn a_dead_incarnation_never_comes_back() {
    let (ann, later) = (member("ann", 2), member("ann", 3));
    let mut membership = with(&[&ann]);
    membership.left(&ann);
    assert_eq!(membership.beat(beat(&ann, 1, 0), Millis(10)), None);
    assert!(membership.joined(joining(&ann), Millis(10)).is_err());
    assert!(membership.joined(joining(&member("ann", 1)), Millis(10)).is_err());
    let joined = membership.joined(joining(&later), Millis(10)).unwrap();
    assert_eq!(joined, [alive(&later, Reason::Joined)]);
}

#[test]
fn what_an_earlier_leader_buried_stays_dead() {
    let ann = member("ann", 2);
    let mut membership = Membership::new();
    membership.buried(&ann);
    assert!(membership.joined(joining(&ann), Millis(0)).is_err());
}

#[test]
fn a_newer_incarnation_replaces_the_older() {
    let (ann, later) = (member("ann", 1), member("ann", 2));
    let mut membership = with(&[&ann]);
    let joined = membership.joined(joining(&later), Millis(10)).unwrap();
    assert_eq!(joined, [dead(&ann, Reason::Replaced), alive(&later, Reason::Joined)]);
    assert!(membership.joined(joining(&ann), Millis(20)).is_err());
    assert_eq!(membership.beat(beat(&ann, 9, 0), Millis(30)), None);
}

#[test]
fn joining_again_is_no_news() {
    let ann = member("ann", 1);
    let mut membership = with(&[&ann]);
    assert_eq!(membership.joined(joining(&ann), Millis(10)).unwrap(), []);
}

#[test]
fn an_overtaken_beat_says_nothing() {
    let ann = member("ann", 1);
    let mut membership = with(&[&ann]);
    membership.beat(beat(&ann, 2, 0), Millis(500));
    assert_eq!(membership.beat(beat(&ann, 1, 0), Millis(510)), None);
}

#[test]
fn the_brake_holds_when_half_of_four_or_most_of_fewer_fall_silent_together() {
    let all = ["ann", "bob", "cid", "dan"].map(|name| member(name, 1));
    let check = |silent: &[(usize, u64)], now: u64, expected: Brake| {
        let mut membership = with(&all.each_ref());
        for (index, at) in silent {
            membership.session_lost(&all[*index].name, Millis(*at));
            membership.probe_result(&all[*index], Probe::Refused);
        }
        assert_eq!(membership.brake(Millis(now)), expected, "{silent:?}");
    };
    check(&[(0, 10)], 30, Brake::Off);
    check(&[(0, 10), (1, 20)], 30, Brake::On { silent: 2, of: 4 });
    check(&[(0, 10), (1, 20), (2, 30)], 40, Brake::On { silent: 3, of: 4 });
    check(&[(0, 10), (1, 20), (2, 3_000)], 3_010, Brake::Off);
    // One of two may just have died.
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut two = with(&[&ann, &bob]);
    two.session_lost(&ann.name, Millis(10));
    assert_eq!(two.brake(Millis(20)), Brake::Off);
    two.session_lost(&bob.name, Millis(20));
    assert_eq!(two.brake(Millis(30)), Brake::On { silent: 2, of: 2 });
}

#[test]
fn where_most_fall_silent_the_others_are_asked_before_one_is_dead() {
    let (ann, bob, eve) = (member("ann", 1), member("bob", 1), member("eve", 1));
    let mut membership = with(&[&ann, &bob, &eve]);
    membership.beat(beat(&bob, 1, 0), Millis(300)).unwrap();
    membership.beat(beat(&eve, 1, 0), Millis(1_400)).unwrap();
    membership.tick(Millis(1_500));
    membership.tick(Millis(1_800));
    assert_eq!(membership.brake(Millis(1_800)), Brake::On { silent: 2, of: 3 });
    membership.tick(Millis(2_100));
    assert_eq!(membership.nodes().count(), 3, "only who leads next knows whether ann is dead");
    assert_eq!(membership.tick(Millis(2_500)), [dead(&ann, Reason::Silent)]);
}

#[test]
fn who_is_inherited_keeps_what_it_has_while_it_beats_and_gets_nothing_new_until_it_joins() {
    let (ann, bob, eve) = (member("ann", 1), member("bob", 1), member("eve", 2));
    let mut membership = Membership::new();
    membership.buried(&eve);
    membership.cordon(&bob.name, true);
    for member in [&ann, &bob, &eve] {
        membership.inherited(joining(member), DEAD_MS, Millis(0));
    }
    let standing = |membership: &Membership, member| {
        membership.node(member).map(|node| node.candidate().standing)
    };
    assert_eq!(standing(&membership, &eve), None, "it is dead");
    assert_eq!(membership.node(&bob).unwrap().admission, Admission::Cordoned);
    for number in 1..=40 {
        let at = Millis(number * 500);
        assert_eq!(membership.beat(beat(&ann, number, 0), at), Some(vec![]));
        membership.tick(at);
    }
    assert_eq!(standing(&membership, &bob), None, "it was silent");
    assert_eq!(standing(&membership, &ann), Some(Standing::Suspect));
    assert!(membership.node(&ann).unwrap().is_heard());
    let joined = membership.joined(joining(&ann), Millis(20_000));
    assert_eq!(joined, Ok(vec![alive(&ann, Reason::Joined)]));
    assert_eq!(standing(&membership, &ann), Some(Standing::Answering));
    assert_eq!(membership.joined(joining(&ann), Millis(20_000)), Ok(vec![]));
}

#[test]
fn who_is_inherited_has_time_to_find_the_new_leader() {
    let (ann, bob, eve) = (member("ann", 1), member("bob", 1), member("eve", 1));
    let mut membership = Membership::new();
    for member in [&ann, &bob, &eve] {
        membership.inherited(joining(member), 10_000, Millis(0));
        assert!(!membership.node(member).unwrap().is_heard());
    }
    membership.beat(beat(&bob, 7, 0), Millis(500)).unwrap();
    membership.tick(Millis(2_499));
    assert_eq!(membership.nodes().count(), 3);
    assert_eq!(membership.tick(Millis(2_500)), [dead(&bob, Reason::Silent)], "it was heard once");
    for number in 1..=20 {
        membership.beat(beat(&eve, number, 0), Millis(number * 500)).unwrap();
    }
    membership.tick(Millis(9_999));
    assert_eq!(membership.nodes().count(), 2);
    assert_eq!(membership.tick(Millis(10_000)), [dead(&ann, Reason::Silent)]);
    let replaced = membership.joined(joining(&member("eve", 2)), Millis(10_000)).unwrap();
    assert_eq!(replaced, [dead(&eve, Reason::Replaced), alive(&member("eve", 2), Reason::Joined)]);
}

#[test]
fn who_beats_and_never_joins_is_unlinked_in_the_end() {
    let (ann, bob) = (member("ann", 1), member("bob", 1));
    let mut membership = with(&[&ann]);
    membership.inherited(joining(&bob), DEAD_MS, Millis(0));
    let reach = Effect::Reach { member: bob.clone() };
    assert_eq!(membership.links(|_| true, Millis(0)), std::slice::from_ref(&reach));
    assert_eq!(membership.links(|_| true, Millis(29_999)), std::slice::from_ref(&reach));
    let last = [reach, dead(&bob, Reason::Unlinked)];
    assert_eq!(membership.links(|_| true, Millis(32_000)), last);
}

#[test]
fn a_cordon_is_by_name_and_outlasts_the_run() {
    let mut membership = Membership::new();
    let admission =
        |membership: &Membership| membership.nodes().next().map(|node| node.admission).unwrap();
    assert!(membership.cordon(&member("ann", 1).name, true));
    assert!(!membership.cordon(&member("ann", 1).name, true), "it is so already");
    membership.joined(joining(&member("ann", 1)), Millis(0)).unwrap();
    assert_eq!(admission(&membership), Admission::Cordoned);
    membership.joined(joining(&member("ann", 2)), Millis(10)).unwrap();
    assert_eq!(admission(&membership), Admission::Cordoned);
    assert!(membership.cordon(&member("ann", 1).name, false));
    assert_eq!(admission(&membership), Admission::Open);
}

#[test]
fn a_drain_is_of_one_run() {
    let mut membership = Membership::new();
    membership.joined(joining(&member("ann", 1)), Millis(0)).unwrap();
    assert!(membership.drain(&member("ann", 1)));
    assert!(!membership.drain(&member("ann", 1)), "it is so already");
    assert!(!membership.drain(&member("ann", 2)), "it is not in");
    membership.cordon(&member("ann", 1).name, true);
    assert_eq!(membership.nodes().next().unwrap().admission, Admission::Draining);
    membership.cordon(&member("ann", 1).name, false);
    membership.joined(joining(&member("ann", 2)), Millis(10)).unwrap();
    assert_eq!(membership.nodes().next().unwrap().admission, Admission::Open);
}

#[test]
fn who_was_not_heard_for_three_beats_is_not_counted() {
    let mut sightings = Sightings::new();
    sightings.heard(&"ann".parse().unwrap(), Millis(0));
    sightings.heard(&"bob".parse().unwrap(), Millis(1_000));
    assert_eq!(sightings.count(Millis(1_499)), 2);
    assert_eq!(sightings.count(Millis(1_500)), 1);
    sightings.lost(&"bob".parse().unwrap());
    assert_eq!(sightings.count(Millis(1_500)), 0);
}
