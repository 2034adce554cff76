//! Restarts of all members, losses, settles, sessions that end badly; counter-examples H2, H5, H11b, H12, H13, M1, M3,
//! M5, R1, R2, R15.

use super::super::*;
use super::fake::Fake;
use crate::ids::*;
use crate::map::*;

fn settles(fake: &Fake) -> Vec<Settle> {
    fake.history.iter().map(|map| map.placements[0].groups[0].settle).collect()
}

fn attached(copies: u8) -> Fake {
    let mut fake = Fake::with_volume(3, copies, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    fake
}

#[test]
fn h5_r1_when_all_members_restart_the_loss_rises_and_a_settle_holds_the_session_until_it_is_over() {
    let mut fake = attached(2);
    let handled = fake.map().sessions[0].handled;
    fake.server(1).settles = false;
    fake.server(2).settles = false;
    fake.server(1).restart();
    fake.server(2).restart();
    fake.run(2_000);
    assert_eq!(fake.group(0), "1A 2A", "H12: members keep their states");
    let (loss, boots) = (fake.map().loss(), [fake.server(1).boot, fake.server(2).boot]);
    assert_eq!(fake.map().generation, loss);
    assert_eq!(fake.map().members().map(|m| m.boot).collect::<Vec<_>>(), boots);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Held, "M5");
    fake.run(30_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Held, "nothing ends it but the settle");
    fake.server(2).settles = true;
    fake.run(1_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    assert_eq!(fake.map().sessions[0].handled, handled, "R2: being admitted again handles nothing");
    assert_eq!(fake.map().loss(), loss, "the loss stands");
    assert!(fake.server(1).fences.last().unwrap().flush, "H11b: what ends a settle flushes");
    assert!(matches!(settles(&fake)[2..], [Settle::Running { .. }, Settle::Over]));
}

#[test]
fn a_single_copy_comes_back_after_a_restart() {
    let mut fake = attached(1);
    fake.server(1).restart();
    fake.run(2_000);
    assert_eq!(fake.group(0), "1A");
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    assert!(fake.map().loss() > Generation(0));
}

#[test]
fn h13_restarted_members_wait_for_a_silent_one_which_then_goes_on_alone_without_a_loss() {
    let mut fake = attached(2);
    fake.server(2).up = false;
    fake.server(1).restart();
    fake.run(30_000);
    assert_eq!(fake.condition(ConditionKind::Available).reason, Reason::WaitingForSilentMember);
    let silent = fake.map().members().nth(1).unwrap().copy;
    assert!(fake.condition(ConditionKind::Available).text.contains(&silent.to_string()));
    fake.server(2).up = true;
    fake.run(3_000);
    assert_eq!(fake.map().loss(), Generation(0));
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2A");
}

#[test]
fn r15_after_a_minute_the_silent_one_is_left_out_with_a_raised_loss() {
    let mut fake = attached(2);
    fake.server(2).up = false;
    fake.server(1).restart();
    fake.run(59_000);
    assert_eq!(fake.map().loss(), Generation(0));
    fake.run(8_000);
    assert_eq!(fake.group(0), "1A 2F");
    assert!(fake.map().loss() > Generation(0));
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted, "one member has settled with itself");
}

#[test]
fn i8_without_an_up_to_date_copy_the_volume_waits_and_names_it() {
    let mut fake = attached(2);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.server(1).up = false;
    fake.server(2).restart();
    fake.run(120_000);
    assert_eq!(fake.group(0), "1A 2F", "an out-of-date copy never serves");
    assert_eq!(fake.condition(ConditionKind::Available).reason, Reason::WaitingForCopies);
    fake.server(1).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A");
    assert!(fake.condition(ConditionKind::Available).holds);
}

fn left_pending(fake: &mut Fake) {
    for server in [1, 2] {
        fake.server(server).copies.values_mut().for_each(|c| c.pending = vec![(SessionId(1), (Incarnation(1), 3))]);
    }
}

#[test]
fn m5_pages_that_a_dead_session_left_pending_are_settled_before_the_next_one_is_admitted() {
    let mut fake = attached(2);
    left_pending(&mut fake);
    fake.server(2).settles = false;
    fake.detach(1);
    fake.attach(2, "n2");
    fake.run(20_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Out);
    assert_eq!(fake.status().session(SessionId(2)), SessionState::Out, "not admitted while the settle runs");
    assert!(fake.map().settling());
    assert_eq!(fake.group(0), "1A 2A");
    fake.server(2).settles = true;
    fake.run(1_000);
    assert_eq!(fake.status().session(SessionId(2)), SessionState::Admitted);
    assert!(fake.server(1).copies.values().all(|c| c.pending.is_empty()));
    assert_eq!(fake.map().loss(), Generation(0));
}

#[test]
fn m3_a_settle_from_a_member_that_is_lost_counts_for_nothing_and_begins_anew_from_the_next() {
    let mut fake = attached(2);
    left_pending(&mut fake);
    fake.server(2).settles = false;
    fake.detach(1);
    fake.run(2_000);
    let Settle::Running { authoritative, begun, .. } = *settles(&fake).last().unwrap() else { panic!() };
    fake.server(1).up = false;
    fake.server(2).settles = true;
    // What it says of the old settle after this is worth nothing.
    fake.run(5_000);
    let anew = |s: &Settle| matches!(s, Settle::Running { authoritative: a, begun: b, .. } if *a != authoritative && *b > begun);
    assert!(settles(&fake).iter().any(anew), "{:?}", settles(&fake));
    assert_eq!(fake.group(0), "1F 2A");
    assert!(!fake.map().settling());
}

#[test]
fn m1_a_member_that_missed_the_end_of_a_settle_is_not_forgotten() {
    let mut fake = attached(2);
    left_pending(&mut fake);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.detach(1);
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2F");
    assert!(!fake.map().settling());
    fake.server(2).fills = false;
    fake.server(2).up = true;
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2S");
    // A fill from a page that is pending brings its sync state along (H8).
    fake.server(2).copies.values_mut().for_each(|c| c.pending = vec![(SessionId(1), (Incarnation(1), 1))]);
    fake.server(2).fills = true;
    fake.run(10_000);
    let settled = fake.history.iter().filter(|map| map.settling()).count();
    assert_eq!((settled, fake.group(0)), (2, "1A 2A".to_string()));
    assert!(fake.server(2).copies.values().all(|c| c.pending.is_empty()));
}

#[test]
fn h2_a_member_that_restarted_after_the_last_heartbeat_is_found_out_by_the_fence() {
    let mut fake = attached(2);
    fake.server(2).restart();
    fake.detach(1);
    fake.run(5_000);
    let ended = fake.history.iter().find(|map| map.generation > Generation(2) && map.sessions.is_empty()).unwrap();
    let states: Vec<_> = ended.members().map(|m| m.state).collect();
    assert_eq!(states, [MemberState::Active, MemberState::Failed], "its new boot id came with the fence's answer only");
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Out);
}

#[test]
fn h20_r2_the_map_takes_the_highest_incarnation_and_handled_of_all_members() {
    let mut fake = attached(2);
    fake.server(1).sessions = vec![(SessionId(1), (Incarnation(2), Generation(1)))];
    fake.server(2).sessions = vec![(SessionId(1), (Incarnation(3), Generation(9)))];
    fake.server(2).up = false;
    fake.run(5_000);
    assert_eq!(fake.map().sessions[0].incarnation, Incarnation(2));
    fake.server(2).up = true;
    fake.run(10_000);
    let session = &fake.map().sessions[0];
    assert_eq!((session.incarnation, session.handled), (Incarnation(3), Generation(9)));
}

#[test]
fn h5_on_a_shared_volume_a_loss_ends_all_sessions_for_good() {
    let mut fake = Fake::new(3);
    let mut object = super::fake::volume(2, 1);
    object.wishes.multi_session = true;
    fake.apply(object);
    fake.attach(1, "n1");
    fake.attach(2, "n2");
    fake.run(5_000);
    assert_eq!(fake.map().sessions.len(), 2);
    fake.server(1).restart();
    fake.server(2).restart();
    fake.run(10_000);
    for session in [1, 2] {
        assert_eq!(fake.status().session(SessionId(session)), SessionState::Ended);
    }
    fake.new_leader();
    fake.attach(3, "n3");
    fake.run(10_000);
    assert_eq!(fake.map().sessions.iter().map(|s| s.id).collect::<Vec<_>>(), [SessionId(3)]);
    fake.detach(1);
    fake.detach(3);
    fake.run(10_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Out, "forgotten with the wish");
}

#[test]
fn i7_a_member_with_unsynced_pages_never_becomes_active() {
    let mut fake = attached(2);
    fake.server(2).fills = false;
    fake.server(2).restart();
    fake.run(60_000);
    assert_eq!(fake.group(0), "1A 2S");
    let changes = fake.history.len();
    fake.run(600_000);
    assert_eq!(fake.history.len(), changes, "nothing is fenced to find out how far a fill is");
    fake.server(2).fills = true;
    fake.run(3_000);
    assert_eq!(fake.group(0), "1A 2A");
}

#[test]
fn no_syncing_member_becomes_active_in_a_map_that_raises_the_loss() {
    let mut fake = attached(2);
    fake.server(2).fills = false;
    fake.server(2).restart();
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2S");
    fake.server(1).restart();
    fake.server(2).fills = true;
    fake.run(10_000);
    let raised = fake.history.iter().find(|map| map.loss() > Generation(0)).unwrap();
    let states: Vec<_> = raised.members().map(|m| m.state).collect();
    assert_eq!(states, [MemberState::Active, MemberState::Syncing]);
    assert_eq!(fake.group(0), "1A 2A");
}
