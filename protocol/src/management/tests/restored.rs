//! An API server that goes back to an older state while its leader lives: words of the watch that are older than what the
//! leader knows, and what it does with them; R6.

use super::super::diverged::Doubt;
use super::super::volume::Volume;
use super::super::*;
use super::fake::Fake;
use crate::ids::{Generation, SessionId};
use crate::map::AccessMode;

fn watched(fake: &mut Fake, object: &VolumeObject) {
    fake.input(Input::Volume { object: object.clone(), source: Source::Watched });
}

/// A volume to which session 1 is attached, and its object as it was before.
fn gone_on() -> (Fake, VolumeObject) {
    let mut fake = Fake::with_volume(3, 2, 1);
    let old = fake.object.clone().unwrap();
    fake.attach(1, "n1");
    fake.run(2_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    (fake, old)
}

/// The same, the API server back at the old object, and the leader told so by the watch alone.
fn gone_back() -> (Fake, Generation) {
    let (mut fake, old) = gone_on();
    let newest = fake.map().generation;
    fake.object = Some(old.clone());
    watched(&mut fake, &old);
    fake.run(5_000);
    (fake, newest)
}

/// Found by the simulator: nothing else tells a leader at rest.
#[test]
fn r6_an_older_status_under_a_newer_version_is_noticed_by_a_leader_at_rest() {
    let (mut fake, old) = gone_on();
    let newest = fake.map().generation;
    let now = fake.object.clone().unwrap();
    let back = VolumeObject { version: now.version + 1, status: old.status, ..now };
    fake.object = Some(back.clone());
    watched(&mut fake, &back);
    fake.run(5_000);
    assert_eq!(fake.condition(ConditionKind::Diverged).reason, Reason::NewerMapFound);
    fake.wish(|wishes| wishes.adopt = Some(newest));
    fake.run(10_000);
    assert!(fake.map().generation > newest);
}

#[test]
fn a_newer_wish_with_a_status_from_before_the_leaders_own_write_costs_no_read_if_that_follows() {
    let (mut fake, old) = gone_on();
    let reads = fake.reads;
    let now = fake.object.clone().unwrap();
    watched(&mut fake, &VolumeObject { version: now.version + 1, status: old.status, ..now.clone() });
    fake.run(1_000);
    watched(&mut fake, &VolumeObject { version: now.version + 2, ..now });
    fake.run(60_000);
    assert_eq!(fake.reads, reads);
}

fn wish_for_session_1(wishes: &mut Wishes) {
    wishes.sessions = vec![SessionWish { id: SessionId(1), node: "n1".to_string(), mode: AccessMode::ReadWrite }];
}

#[test]
fn r6_a_leader_that_lives_while_the_api_server_goes_back_stops_and_hears_which_map_a_person_adopts() {
    let (mut fake, newest) = gone_back();
    assert_eq!(fake.condition(ConditionKind::Diverged).reason, Reason::NewerMapFound);
    assert_eq!(fake.status().generation, Generation(1), "nothing was changed");
    fake.wish(|wishes| {
        wishes.adopt = Some(newest);
        wish_for_session_1(wishes);
    });
    fake.run(10_000);
    assert!(!fake.condition(ConditionKind::Diverged).holds);
    assert!(fake.map().generation > newest);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
}

#[test]
fn r6_what_the_object_went_back_to_can_be_adopted_too() {
    let (mut fake, newest) = gone_back();
    fake.wish(|wishes| wishes.adopt = Some(Generation(1)));
    fake.run(10_000);
    assert!(!fake.condition(ConditionKind::Diverged).holds);
    assert!(fake.map().generation > newest, "every server obeys again");
    assert!(fake.map().sessions.is_empty(), "{:?}", fake.map().sessions);
}

#[test]
fn r6_an_object_that_went_back_is_changed_only_after_every_known_server_has_answered() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let old = fake.object.clone().unwrap();
    // Wishes only: the committed map is the same, and nobody can say anything against it.
    fake.wish(|wishes| wishes.near_node = "n9".to_string());
    fake.run(2_000);
    fake.server(3).up = false;
    fake.run(10_000);
    fake.object = Some(old.clone());
    watched(&mut fake, &old);
    fake.run(1_000);
    fake.attach(1, "n1");
    fake.run(10_000);
    assert_eq!(fake.condition(ConditionKind::Diverged).reason, Reason::WaitingForServers);
    assert_eq!(fake.history.len(), 1);
    fake.server(3).up = true;
    fake.run(5_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
}

#[test]
fn a_late_word_of_the_watch_costs_one_read_and_changes_nothing() {
    let (mut fake, old) = gone_on();
    let (reads, generation) = (fake.reads, fake.map().generation);
    for _ in 0..3 {
        watched(&mut fake, &old);
        fake.run(1_000);
    }
    assert_eq!(fake.reads - reads, 3, "one for each word");
    fake.run(60_000);
    assert_eq!(fake.reads - reads, 3, "and no more");
    assert_eq!(fake.map().generation, generation);
    assert!(!fake.condition(ConditionKind::Diverged).holds);
}

#[test]
fn a_late_word_of_the_watch_does_not_break_off_a_change() {
    let (mut fake, old) = gone_on();
    let (reads, generation) = (fake.reads, fake.map().generation);
    fake.detach(1);
    // The intent is on its way.
    watched(&mut fake, &old);
    fake.run(5_000);
    assert_eq!(fake.map().generation, generation.next(), "it was done, and once");
    assert!(fake.map().sessions.is_empty());
    assert_eq!(fake.reads - reads, 1, "when it was done");
}

#[test]
fn r6_a_read_of_an_older_state_is_doubted_though_its_map_is_the_same() {
    let known = VolumeObject { version: 5, ..super::fake::volume(2, 1) };
    let mut volume = Volume::new(known.clone(), Millis(0));
    volume.take(Millis(1), VolumeObject { version: 4, ..known }, Source::Read);
    assert!(matches!(volume.doubt, Doubt::Asking(_)), "the deletion of its copies may have been forgotten");
}

#[test]
fn r6_an_adoption_that_does_not_stand_in_what_is_read_tolerates_nothing() {
    let mut volume = Volume::new(super::fake::volume(2, 1), Millis(0));
    (volume.adopted, volume.doubt) = (Generation(9), Doubt::Clear);
    volume.take(Millis(1), super::fake::volume(2, 1), Source::Read);
    assert_eq!(volume.adopted, Generation(0));
    assert!(matches!(volume.doubt, Doubt::Asking(_)), "everybody is asked again");
}

/// A person says which map to adopt; another leader writes before that is written.
fn adoption_that_loses_a_race() -> (Fake, Generation) {
    let (mut fake, newest) = gone_back();
    fake.wish(|wishes| {
        wishes.adopt = Some(newest);
        wish_for_session_1(wishes);
    });
    let object = fake.object.as_mut().unwrap();
    let generation = object.status.highest().next();
    object.status.proposed = Some(Proposal { generation, name: 4711, purpose: Purpose::Void, copies: Vec::new() });
    (fake, newest)
}

#[test]
fn r6_an_adoption_that_lost_a_race_is_written_again() {
    let (mut fake, newest) = adoption_that_loses_a_race();
    fake.run(10_000);
    assert!(fake.events.contains(&EventReason::Adopted), "{:?}", fake.conditions);
    assert!(fake.map().generation > newest);
}

#[test]
fn r6_an_adoption_that_lost_a_race_and_is_not_wanted_any_more_is_not_held_to() {
    let (mut fake, _) = adoption_that_loses_a_race();
    let intents = fake.steps[&Step::Intended];
    fake.object.as_mut().unwrap().wishes.adopt = None;
    fake.run(10_000);
    assert_eq!(fake.condition(ConditionKind::Diverged).reason, Reason::NewerMapFound);
    assert_eq!(fake.steps[&Step::Intended], intents, "nothing is changed");
}
