//! Read leases, changes given up, leaders that die or lag, restored API servers; R5, M7, R6, R13, R14, H18, H24.

use super::super::volume::Volume;
use super::super::*;
use super::fake::{Fake, V};
use crate::control::Trouble;
use crate::ids::*;
use crate::limits::READ_LEASE_WAIT_MS;
use crate::map::*;

#[test]
fn r5_m7_after_a_member_was_left_out_unpromised_no_new_session_is_admitted_for_a_read_lease_and_a_quarter() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(3_500);
    assert_eq!(fake.group(0), "1A 2F");
    fake.attach(1, "n1");
    fake.run(READ_LEASE_WAIT_MS - 1_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Out);
    fake.run(2_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    assert!(fake.map().members().all(|m| !m.unpromised));
}

#[test]
fn m7_a_new_leader_counts_the_wait_from_its_own_start() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(6_000);
    fake.new_leader();
    fake.attach(1, "n1");
    fake.run(READ_LEASE_WAIT_MS - 500);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Out);
    fake.run(3_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
}

#[test]
fn m7_a_member_that_promised_after_all_ends_the_wait() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(3_500);
    fake.server(2).up = true;
    fake.attach(1, "n1");
    fake.run(2_500);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
}

#[test]
fn m7_with_several_sessions_the_commit_that_leaves_somebody_out_waits_itself() {
    let mut fake = Fake::new(3);
    let mut object = super::fake::volume(2, 1);
    object.wishes.multi_session = true;
    fake.apply(object);
    fake.attach(1, "n1");
    fake.attach(2, "n3");
    fake.run(5_000);
    assert_eq!(fake.map().sessions.len(), 2);
    fake.server(2).up = false;
    fake.run(3_000 + READ_LEASE_WAIT_MS - 1_000);
    assert_eq!(fake.group(0), "1A 2A");
    fake.run(3_000);
    assert_eq!(fake.group(0), "1A 2F");
}

#[test]
fn r13_a_planned_change_without_an_answer_is_given_up_with_the_members_and_boot_ids_of_the_old_map() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let before = fake.map().clone();
    fake.server(2).stuck = true;
    fake.attach(1, "n1");
    // A reply of a restarted member must not get into the map that gives the change up.
    fake.server(1).restart();
    fake.run(1_200);
    assert!(fake.events.contains(&EventReason::ChangeGivenUp));
    let after = fake.history[1].clone();
    assert!(after.generation.0 >= before.generation.0 + 2, "a number of its own");
    assert_eq!(VolumeMap { generation: before.generation, ..after }, before);
}

#[test]
fn a_member_that_answers_heartbeats_but_no_fence_for_ten_seconds_is_failed() {
    let mut fake = Fake::with_volume(4, 2, 1);
    fake.server(2).stuck = true;
    fake.attach(1, "n1");
    fake.run(9_000);
    assert_eq!(fake.group(0), "1A 2A");
    fake.run(20_000);
    assert!(fake.group(0).starts_with("1A 2F"), "{}", fake.group(0));
    fake.run(10_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    let changes = fake.history.len();
    fake.run(20_000);
    assert!(fake.history.len() - changes <= 2, "a mute member costs no pause after pause");
}

#[test]
fn a_member_without_progress_is_excluded_on_a_drivers_word_if_another_can_go_on() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    fake.report(2, Trouble::Stalled);
    fake.run(100);
    assert_eq!(fake.group(0), "1A 2F");
    fake.report(1, Trouble::Stalled);
    fake.run(100);
    assert_eq!(fake.group(0), "1A 2F", "never the last one");
    fake.run(60_000);
    assert_eq!(fake.group(0), "1A 2A");
}

#[test]
fn a_stalled_member_that_does_not_answer_the_fence_either_is_left_out_after_a_second() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    fake.server(2).stuck = true;
    fake.report(2, Trouble::Stalled);
    fake.run(1_500);
    assert_eq!(fake.group(0), "1A 2F");
    assert!(fake.map().members().any(|m| m.unpromised));
}

#[test]
fn h24_nothing_planned_is_begun_while_a_member_that_serves_may_be_away() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.new_leader();
    // Nobody has been heard of.
    fake.server(2).up = false;
    fake.attach(1, "n1");
    fake.run(1_000);
    assert_eq!(fake.history.len(), 1);
    assert!(fake.status().proposed.is_none(), "nothing is fenced to find out");
}

/// A leader that dies at this step of this change; the next one finishes it.
fn finished_by_the_next(step: Step, change: impl FnOnce(&mut Fake), done: impl FnOnce(&Fake)) {
    let mut fake = Fake::with_volume(4, 2, 2);
    fake.run(2_000);
    fake.die_at = Some(step);
    change(&mut fake);
    fake.run(60_000);
    assert_eq!(fake.deaths, 1, "{step:?} was not passed");
    done(&fake);
    assert!(fake.status().proposed.is_none() && fake.status().retired.is_empty(), "{step:?} {:?}", fake.status());
    let named: Vec<_> = fake.map().members().map(|m| m.copy).collect();
    let lie = fake.servers.values().flat_map(|s| s.copies.keys());
    assert!(lie.into_iter().all(|copy| named.contains(copy)), "R14: no copy is leaked ({step:?})");
}

#[test]
fn a_leader_killed_at_any_step_of_an_attach_leaves_it_to_the_next() {
    use Step::{Committed, Fenced, FirstPromise, FirstServed, Intended, LeaseWaited, Served};
    for step in [Intended, Step::CopiesPut, FirstPromise, Fenced, LeaseWaited, Committed, FirstServed, Served] {
        let admitted = |fake: &Fake| assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
        finished_by_the_next(step, |fake| fake.attach(1, "n1"), admitted);
    }
}

#[test]
fn a_leader_killed_at_any_step_of_a_detach_leaves_it_to_the_next() {
    for step in [Step::Intended, Step::Prepared, Step::Fenced, Step::Committed] {
        let detach = |fake: &mut Fake| {
            fake.die_at = None;
            fake.attach(1, "n1");
            fake.run(2_000);
            fake.die_at = Some(step);
            fake.detach(1);
        };
        finished_by_the_next(step, detach, |fake| assert!(fake.map().sessions.is_empty()));
    }
}

#[test]
fn a_leader_killed_at_any_step_of_a_failure_and_a_rejoin_leaves_them_to_the_next() {
    for step in Step::ALL {
        if matches!(step, Step::GivenUp | Step::CopiesDeleted) {
            continue;
        }
        let healthy = |fake: &Fake| assert!(fake.condition(ConditionKind::Healthy).holds);
        finished_by_the_next(step, |fake| fake.server(1).restart(), healthy);
    }
}

#[test]
fn r14_a_leader_killed_at_any_step_of_a_creation_or_replacement_leaks_no_copy() {
    for step in
        [Step::Intended, Step::CopiesPut, Step::FirstPromise, Step::Fenced, Step::Committed, Step::CopiesDeleted]
    {
        let lose = |fake: &mut Fake| fake.server(1).blank();
        let healthy = |fake: &Fake| assert!(fake.condition(ConditionKind::Healthy).holds);
        finished_by_the_next(step, lose, healthy);
    }
    let mut fake = Fake::new(3);
    fake.die_at = Some(Step::CopiesPut);
    fake.apply(super::fake::volume(2, 1));
    fake.run(10_000);
    assert_eq!(fake.deaths, 1);
    let copies: usize = fake.servers.values().map(|s| s.copies.len()).sum();
    assert_eq!((copies, fake.status().retired.len()), (2, 0));
}

#[test]
fn h18_a_write_of_a_deposed_leader_changes_nothing() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let guard = fake.status().guard();
    fake.attach(1, "n1");
    fake.run(2_000);
    assert!(!guard.holds(fake.status()));
    let mut other = fake.status().clone();
    let proposal = |name| Proposal { generation: Generation(9), name, purpose: Purpose::Shape, copies: Vec::new() };
    other.proposed = Some(proposal(1));
    let guard = other.guard();
    other.proposed = Some(proposal(2));
    assert!(!guard.holds(&other), "another proposal of the same number is another proposal");
}

#[test]
fn a_write_whose_outcome_nobody_knows_is_repeated_and_harms_nothing() {
    for kind in [WriteKind::Intent, WriteKind::Commit] {
        let mut fake = Fake::with_volume(3, 2, 1);
        fake.lose_write = Some(kind);
        fake.attach(1, "n1");
        fake.run(5_000);
        assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    }
}

#[test]
fn a_leader_that_loses_a_race_reads_the_object_and_goes_on_from_there() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let object = fake.object.as_mut().unwrap();
    let generation = object.status.highest().next();
    object.status.proposed = Some(Proposal { generation, name: 4711, purpose: Purpose::Sessions, copies: Vec::new() });
    fake.server(1).promised = generation;
    fake.wish(|_| ());
    fake.run(5_000);
    assert!(fake.status().proposed.is_none());
    assert!(fake.map().generation > generation, "a number belongs to one plan for ever");
}

#[test]
fn r6_an_object_restored_from_an_old_copy_stops_every_change_until_a_person_adopts_the_newer_map() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let old = fake.object.clone().unwrap();
    fake.attach(1, "n1");
    fake.run(2_000);
    let newest = fake.map().clone();
    fake.object = Some(old);
    fake.lease = 2;
    fake.new_leader();
    fake.run(10_000);
    assert_eq!(fake.condition(ConditionKind::Diverged).reason, Reason::NewerMapFound);
    assert_eq!(fake.status().generation, Generation(1), "nothing was changed");
    let adopted = newest.generation;
    fake.wish(|wishes| {
        wishes.adopt = Some(adopted);
        let wish = SessionWish { id: SessionId(1), node: "n1".to_string(), mode: AccessMode::ReadWrite };
        wishes.sessions = vec![wish];
    });
    fake.run(10_000);
    assert!(!fake.condition(ConditionKind::Diverged).holds);
    assert!(fake.map().generation > newest.generation);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    assert!(fake.lease > 5, "the Lease's number is above all that were heard");
}

/// Found by the simulator (seed 379750932271): the wishes of an older state ended a session and admitted it once more.
#[test]
fn an_older_word_of_a_watch_takes_no_wish_back() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let before = fake.object.clone().unwrap();
    fake.attach(1, "n1");
    fake.run(2_000);
    let generation = fake.map().generation;
    fake.input(Input::Volume { object: before, source: Source::Watched });
    fake.run(5_000);
    assert_eq!(fake.map().sessions.len(), 1, "session 1 is still wished for");
    assert_eq!(fake.map().generation, generation, "and never left");
}

#[test]
fn what_was_read_before_a_later_word_of_the_watch_takes_no_wish_back() {
    let read = super::fake::volume(2, 1);
    let mut wished = VolumeObject { version: 2, ..read.clone() };
    wished.wishes.size *= 2;
    let mut known = Volume::new(read.clone(), Millis(0));
    known.reading = true;
    known.take(Millis(1), wished.clone(), Source::Watched);
    known.take(Millis(2), read, Source::Read);
    assert_eq!((known.object.wishes, known.reading), (wished.wishes, false));
}

#[test]
fn r6_a_leader_whose_object_is_old_reads_it_before_it_says_that_the_object_is() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let old = fake.object.clone();
    fake.attach(1, "n1");
    fake.run(2_000);
    let newest = fake.object.clone();
    fake.object = old;
    fake.lease = 2;
    fake.new_leader();
    fake.object = newest;
    fake.run(10_000);
    let diverged = fake.condition(ConditionKind::Diverged);
    assert!(!diverged.holds, "another leader committed what is stored: {diverged:?}");
    fake.detach(1);
    fake.run(5_000);
    assert!(fake.map().sessions.is_empty(), "it goes on from the object as it is");
}

#[test]
fn r6_after_a_restore_nothing_is_changed_before_every_known_server_has_answered() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.run(2_000);
    fake.lease = 2;
    fake.server(3).up = false;
    fake.new_leader();
    fake.attach(1, "n1");
    fake.run(20_000);
    assert_eq!(fake.condition(ConditionKind::Diverged).reason, Reason::WaitingForServers);
    assert_eq!(fake.history.len(), 1);
    fake.server(3).up = true;
    fake.run(5_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
}

#[test]
fn an_object_applied_again_without_its_status_never_becomes_a_blank_volume() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let stored = fake.map().generation;
    let blank = VolumeObject { id_is_new: false, ..super::fake::volume(2, 1) };
    fake.object = Some(blank);
    fake.new_leader();
    fake.run(10_000);
    assert!(fake.status().map.is_none());
    assert_eq!(fake.condition(ConditionKind::Diverged).reason, Reason::NewerMapFound);
    fake.wish(|wishes| wishes.adopt = Some(stored));
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A");
}

#[test]
fn a_foreign_server_is_asked_nothing_and_its_members_are_left_out() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let alive = crate::control::Alive { server: ServerId(99), ..Default::default() };
    fake.server(2).impostor = Some(alive);
    fake.run(3_000);
    assert_eq!(fake.group(0), "1A 2F");
    assert!(fake.events.contains(&EventReason::ForeignServer));
    let _ = V;
}

#[test]
fn a_report_of_no_progress_under_an_older_generation_fails_nobody_later() {
    let mut fake = Fake::with_volume(2, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.report(1, Trouble::Stalled);
    fake.server(2).up = true;
    fake.run(8_000);
    assert_eq!(fake.group(0), "1A 2A", "the last one was not let go, and is not let go when it no longer is the last");
}

/// Two of the three members die in the same moment, with nobody attached who could report them.
fn two_silent(hidden: bool) -> Fake {
    let mut fake = Fake::with_volume(4, 3, 1);
    assert_eq!(fake.group(0), "1A 2A 3A");
    for server in [1, 2] {
        fake.server(server).up = false;
        fake.server(server).hidden = hidden;
    }
    fake.run(4_000);
    fake
}

#[test]
fn servers_that_die_together_do_not_block_an_idle_volume_when_no_other_server_reaches_them() {
    let mut fake = two_silent(false);
    fake.attach(1, "n1");
    fake.run(15_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted, "{:?}", fake.conditions);
    assert_eq!(fake.group(0), "1F 2F 3A");
}

#[test]
fn servers_that_others_still_reach_are_not_failed_because_the_leader_is_cut_off() {
    let mut fake = two_silent(true);
    fake.attach(1, "n1");
    fake.run(60_000);
    assert_eq!(fake.group(0), "1A 2A 3A");
    let healthy = fake.condition(ConditionKind::Healthy);
    assert!(healthy.text.contains("suspects itself"), "{healthy:?}");
    for server in [1, 2] {
        (fake.server(server).up, fake.server(server).hidden) = (true, false);
    }
    fake.run(5_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    assert_eq!(fake.group(0), "1A 2A 3A", "nobody was left out for it");
}

#[test]
fn a_leader_that_hears_nobody_fails_nobody() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.servers.values_mut().for_each(|server| server.up = false);
    fake.run(60_000);
    assert_eq!(fake.group(0), "1A 2A");
}
