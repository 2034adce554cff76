//! Creation, sessions, failure, rejoin.

use super::super::*;
use super::fake::{Fake, V};
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
fn a_returning_member_is_filled_in_full_before_it_is_active() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A");
    let states: Vec<_> = fake.history.iter().map(|m| m.placements[0].groups[0].members[1].state).collect();
    use MemberState::{Active, Failed, Syncing};
    assert_eq!(states, [Active, Failed, Syncing, Active]);
    let unsynced: Vec<_> = fake.server(2).fences.iter().filter(|f| !f.unsync.is_empty()).collect();
    assert_eq!(unsynced.len(), 1, "every page is marked under the fence, once");
    assert!(fake.server(2).fences.last().unwrap().flush, "H11b: what makes a member Active flushes");
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
