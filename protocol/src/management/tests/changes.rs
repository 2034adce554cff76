//! Creation, sessions, failure, rejoin.

use super::super::*;
use super::fake::{Fake, V, volume};
use crate::control::Trouble;
use crate::ids::*;
use crate::map::*;

#[test]
fn a_volume_is_created_with_every_copy_active_and_served() {
    let fake = Fake::with_volume(3, 2, 2);
    assert_eq!((fake.group(0), fake.group(1)), ("1A 2A".to_string(), "3A 1A".to_string()));
    assert_eq!(fake.map().generation, Generation(1));
    assert!(fake.servers.values().all(|s| s.map.as_ref() == Some(fake.map())));
    assert!(fake.condition(ConditionKind::Healthy).holds && fake.condition(ConditionKind::Placed).holds);
    assert_eq!(fake.steps[&Step::Served], 1);
}

#[test]
fn a_session_is_admitted_and_a_clean_detach_needs_no_settle() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(1_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    let session = &fake.map().sessions[0];
    assert_eq!(session.handled, fake.map().generation);
    fake.detach(1);
    fake.run(3_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Out);
    assert!(fake.history.iter().all(|map| !map.settling()));
    assert!(fake.server(1).fences.last().unwrap().flush, "H11b: a fence that ends a session flushes");
}

#[test]
fn steady_state_writes_nothing() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(5_000);
    let generations = fake.history.len();
    fake.run(600_000);
    assert_eq!(fake.history.len(), generations);
}

#[test]
fn a_silent_member_is_left_out_and_the_others_go_on() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    fake.server(2).up = false;
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2F");
    let member = fake.map().placements[0].groups[0].members[1];
    assert!(member.unpromised, "M7");
    assert_eq!(fake.map().loss(), Generation(0));
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    assert_eq!(fake.condition(ConditionKind::Healthy).reason, Reason::MembersFailed);
}

#[test]
fn a_returning_member_is_filled_by_difference_before_it_is_active() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A");
    let states: Vec<_> = fake.history.iter().map(|m| m.placements[0].groups[0].members[1].state).collect();
    use MemberState::{Active, Failed, Syncing};
    assert_eq!(states, [Active, Failed, Syncing, Active]);
    let copy = fake.map().placements[0].groups[0].members[1].copy;
    let server = fake.server(2);
    assert!(server.fences.iter().all(|f| f.unsync.is_empty()), "no page is marked but what is listed");
    let pieces: Vec<_> = server.rejoins.iter().map(|r| (r.copy, r.list.from, r.list.next)).collect();
    assert_eq!(pieces, [(copy, 0, 50), (copy, 50, u64::MAX)], "the list is whole");
    assert!(fake.server(2).fences.last().unwrap().flush, "H11b: what makes a member Active flushes");
}

#[test]
fn a_member_whose_list_does_not_come_stays_out_and_is_marked_as_a_whole_the_second_time() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.server(1).mute_lists = true;
    fake.run(5_000);
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2F", "nobody rejoins without a list");
    fake.run(25_000);
    assert_eq!(fake.group(0), "1A 2A");
    let whole = fake.server(2).fences.iter().filter(|f| !f.unsync.is_empty()).count();
    assert_eq!(whole, 1);
}

#[test]
fn a_source_is_asked_only_after_it_has_answered_the_fence() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.server(1).refused_lists, 0);
    assert_eq!(fake.group(0), "1A 2A");
}

#[test]
fn a_restart_at_once_fails_the_member_and_raises_no_loss() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(1).restart();
    fake.run(1_500);
    assert_eq!(fake.history[1].placements[0].groups[0].members[0].state, MemberState::Failed);
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2A");
    assert_eq!(fake.map().loss(), Generation(0));
}

#[test]
fn a_drivers_report_that_the_leader_confirms_fails_a_member_at_once() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    fake.server(2).up = false;
    fake.report(2, Trouble::Unreachable);
    fake.run(100);
    assert_eq!(fake.group(0), "1A 2F");
}

#[test]
fn the_object_of_the_leader_is_the_stores() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    assert_eq!(fake.leader.volume(V), fake.object.as_ref());
}

/// The wish of a node gets another session, as the leader's service writes it (R10).
fn replace(fake: &mut Fake, old: u128, new: u128) {
    fake.wish(|wishes| {
        let wish = wishes.sessions.iter_mut().find(|wish| wish.id == SessionId(old));
        wish.expect("it is wished for").id = SessionId(new);
    });
}

fn listed(map: &VolumeMap) -> Vec<u128> {
    map.sessions.iter().map(|s| s.id.0).collect()
}

#[test]
fn r10_a_replaced_session_is_out_of_one_generation_before_the_next_is_in() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    let before = fake.history.len();
    replace(&mut fake, 1, 2);
    fake.run(3_000);
    let lists: Vec<_> = fake.history[before..].iter().map(listed).collect();
    assert_eq!(lists, [vec![], vec![2]], "one generation ends the old one, a later one admits the new");
    let session = &fake.map().sessions[0];
    assert_eq!((session.incarnation, session.handled), (Incarnation(0), fake.map().generation));
    assert_eq!((session.standing, session.node.as_str()), (Standing::Admitted, "n1"));
    assert!(fake.history.iter().all(|map| !map.settling()), "nothing was pending");
    let ends = fake.server(1).fences.iter().rev().nth(1).unwrap();
    assert!(ends.flush, "H11b: a fence that ends a session flushes");
    assert!(fake.servers.values().filter_map(|s| s.map.as_ref()).all(|map| listed(map) == [2]), "all servers are told");
    let generations = fake.history.len();
    fake.run(600_000);
    assert_eq!(fake.history.len(), generations, "once");
}

#[test]
fn r10_what_a_replaced_session_left_is_settled_before_the_next_is_in() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    for id in [1, 2] {
        let copy = fake.server(id).copies.values_mut().next().unwrap();
        copy.pending.push((SessionId(1), (Incarnation(1), 4)));
    }
    let before = fake.history.len();
    replace(&mut fake, 1, 2);
    fake.run(10_000);
    let story: Vec<_> = fake.history[before..].iter().map(|map| (listed(map), map.settling())).collect();
    assert_eq!(story[0], (vec![], true), "the end of the old session begins a settle");
    assert!(story.iter().all(|(sessions, settles)| sessions.is_empty() || !settles), "{story:?}");
    assert_eq!(story.last().unwrap(), &(vec![2], false));
}

#[test]
fn r10_no_map_ever_lists_two_sessions_of_a_node_also_on_a_shared_volume() {
    let mut fake = Fake::new(3);
    let mut object = volume(2, 1);
    object.wishes.multi_session = true;
    fake.apply(object);
    fake.run(3_000);
    fake.attach(1, "n1");
    fake.attach(2, "n2");
    fake.run(3_000);
    assert_eq!(listed(fake.map()), [1, 2]);
    let before = fake.history.len();
    replace(&mut fake, 1, 3);
    fake.server(2).up = false;
    fake.run(30_000);
    let lists: Vec<_> = fake.history[before..].iter().map(listed).collect();
    assert!(lists.iter().all(|list| !(list.contains(&1) && list.contains(&3))), "{lists:?}");
    assert!(lists.iter().all(|list| list.contains(&2)), "the other node's goes on: {lists:?}");
    assert_eq!(listed(fake.map()), [2, 3]);
}

#[test]
fn r10_a_leader_that_dies_at_any_step_of_a_replacement_is_followed_by_one_that_finishes_it() {
    for step in [Step::Intended, Step::Fenced, Step::Committed, Step::Served] {
        let mut fake = Fake::with_volume(3, 2, 1);
        fake.attach(1, "n1");
        fake.run(2_000);
        let before = fake.history.len();
        fake.die_at = Some(step);
        replace(&mut fake, 1, 2);
        fake.run(20_000);
        assert_eq!(fake.deaths, 1, "{step:?}");
        let lists: Vec<_> = fake.history[before..].iter().map(listed).collect();
        assert_eq!(lists.last().unwrap(), &vec![2], "{step:?}");
        let first_new = lists.iter().position(|list| list == &vec![2]).unwrap();
        assert!(lists[..first_new].contains(&vec![]), "{step:?}: {lists:?}");
        assert!(lists[first_new..].iter().all(|list| list == &vec![2]), "{step:?}: {lists:?}");
    }
}
