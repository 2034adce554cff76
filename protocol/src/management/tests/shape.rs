//! Replacement, drain, leave, growth, deletion, orphans, refusals.

use super::super::*;
use super::fake::{Fake, GIB, V, drained, volume};
use crate::control::FillLimit;
use crate::ids::*;
use crate::map::*;

#[test]
fn a_member_away_for_longer_than_rebuild_after_is_replaced_and_its_copy_deleted_when_it_is_back() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(58_000);
    assert_eq!(fake.group(0), "1A 2F");
    fake.run(15_000);
    assert_eq!(fake.group(0), "1A 3A");
    assert_eq!(fake.status().retired.len(), 1, "R14: named until its holder confirmed");
    let new = fake.map().members().nth(1).unwrap();
    assert_ne!(new.ordinal, 1, "an ordinal is not given again while masks may name it");
    fake.server(2).up = true;
    fake.run(5_000);
    assert!(fake.status().retired.is_empty() && fake.server(2).copies.is_empty());
    assert!(fake.orphans.get(&ServerId(2)).is_none_or(Vec::is_empty), "what was deleted is no orphan");
}

#[test]
fn a_replacement_is_filled_before_the_old_member_goes() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(3).fills = false;
    fake.server(2).up = false;
    fake.run(80_000);
    assert_eq!(fake.group(0), "1A 2F 3S");
    fake.server(3).fills = true;
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 3A");
}

#[test]
fn a_blank_device_in_place_of_a_used_one_is_replaced_on_the_spot() {
    let mut fake = Fake::with_volume(2, 2, 1);
    fake.server(2).blank();
    fake.run(15_000);
    assert_eq!(fake.group(0), "1A 2A");
    assert_eq!(fake.server(2).copies.len(), 1);
    assert_eq!(fake.map().loss(), Generation(0));
}

#[test]
fn r3_a_closed_device_fails_its_copies_and_they_rejoin_when_it_is_opened_anew() {
    let mut fake = Fake::with_volume(2, 2, 1);
    fake.server(2).closed = true;
    fake.run(3_000);
    assert_eq!(fake.group(0), "1A 2F");
    assert!(fake.map().members().all(|m| !m.unpromised), "nothing there serves an older generation");
    fake.server(2).closed = false;
    fake.server(2).restart();
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2A");
}

#[test]
fn a_server_that_is_asked_to_stop_is_left_out_first_but_never_as_the_last_copy() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).leaving = true;
    fake.run(2_000);
    assert_eq!(fake.group(0), "1A 2F");
    assert!(fake.map().members().all(|m| !m.unpromised), "it promised");
    fake.server(1).leaving = true;
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2F");
    let view = fake.leader.servers().find(|view| view.id == ServerId(1)).unwrap();
    assert_eq!(view.vetoes[0].reason, VetoReason::LastActiveCopy);
    fake.server(2).leaving = false;
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1F 2A", "once another is up to date it may go");
}

#[test]
fn a_drained_server_loses_its_copies_only_after_others_are_filled() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.input(Input::Server(drained(1)));
    fake.run(10_000);
    assert_eq!(fake.group(0), "2A 3A");
    assert!(fake.history.iter().all(|map| map.members().filter(|m| m.state == MemberState::Active).count() >= 2));
    assert!(fake.server(1).copies.is_empty());
}

#[test]
fn r16_a_drain_taken_back_leaves_no_copy_too_many_and_the_newest_goes() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(3).fills = false;
    fake.input(Input::Server(drained(1)));
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A 3S");
    let back = ServerObject { drain: false, ..drained(1) };
    fake.server(3).fills = true;
    fake.input(Input::Server(back));
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A");
    assert!(fake.server(3).copies.is_empty());
}

/// Found by the simulator: the copy was filled, was there, and nobody took it away.
#[test]
fn r16_members_beyond_the_wanted_number_go_first_where_two_share_a_zone() {
    let mut fake = Fake::with_volume(3, 3, 1);
    for (server, zone) in [(1, "a"), (2, "a"), (3, "b")] {
        fake.input(Input::Server(ServerObject { zone: zone.to_string(), drain: false, ..drained(server) }));
    }
    fake.wish(|wishes| wishes.policy.as_mut().unwrap().copies = 2);
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 3A");
    assert!(fake.server(2).copies.is_empty() && fake.status().retired.is_empty());
}

#[test]
fn r16_without_a_known_policy_nothing_is_taken_away() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.wish(|wishes| wishes.policy = None);
    fake.input(Input::Server(drained(1)));
    fake.run(120_000);
    assert_eq!(fake.group(0), "1A 2F");
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A");
}

#[test]
fn a_drain_without_room_elsewhere_is_vetoed_with_volume_and_reason() {
    let mut fake = Fake::with_volume(2, 2, 1);
    fake.input(Input::Server(drained(1)));
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A");
    let view = fake.leader.servers().find(|view| view.id == ServerId(1)).unwrap();
    assert_eq!((view.vetoes[0].volume, view.vetoes[0].reason), (V, VetoReason::NoRoomElsewhere));
}

#[test]
fn a_volume_only_grows_and_only_into_room_that_is_there() {
    let mut fake = Fake::with_volume(2, 2, 1);
    fake.wish(|w| w.size = 4 * GIB);
    fake.run(2_000);
    assert_eq!((fake.map().size, fake.map().top().size), (4 * GIB, 4 * GIB));
    fake.wish(|w| w.size = 40 * GIB);
    fake.run(2_000);
    assert_eq!(fake.map().size, 4 * GIB);
    assert_eq!(fake.condition(ConditionKind::Placed).reason, Reason::TooLarge);
    fake.wish(|w| w.size = GIB);
    fake.run(2_000);
    assert_eq!(fake.map().size, 4 * GIB);
    assert_eq!(fake.condition(ConditionKind::Placed).reason, Reason::ShrinkRefused);
}

#[test]
fn what_cannot_be_placed_says_why_and_is_placed_when_it_can() {
    let mut fake = Fake::new(1);
    fake.apply(volume(2, 1));
    fake.run(2_000);
    assert_eq!(fake.condition(ConditionKind::Placed).reason, Reason::TooFewServers);
    let object = fake.object.clone().unwrap();
    fake.wish(|w| w.policy = None);
    fake.run(1_000);
    assert_eq!(fake.condition(ConditionKind::Placed).reason, Reason::UnknownPolicy);
    fake.apply(VolumeObject { wishes: Wishes { size: 100 * GIB, ..volume(1, 1).wishes }, ..object.clone() });
    fake.run(1_000);
    assert_eq!(fake.condition(ConditionKind::Placed).reason, Reason::TooLarge);
    fake.apply(VolumeObject { wishes: volume(1, 1).wishes, ..object });
    fake.run(1_000);
    assert_eq!(fake.group(0), "1A");
}

#[test]
fn a_server_without_room_makes_way_for_another_and_nothing_is_leaked() {
    let mut fake = Fake::new(3);
    fake.server(1).no_space = true;
    fake.apply(volume(2, 1));
    fake.run(10_000);
    assert_eq!(fake.group(0), "2A 3A");
    fake.run(5_000);
    assert!(fake.status().retired.is_empty());
    assert_eq!(fake.servers.values().map(|s| s.copies.len()).sum::<usize>(), 2);
}

#[test]
fn a_deleted_volume_goes_only_when_every_holder_confirmed() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.wish(|w| w.deleted = true);
    fake.run(30_000);
    assert!(fake.status().map.is_none());
    assert_eq!(fake.status().retired.len(), 1);
    let deleting = fake.condition(ConditionKind::Deleting);
    assert!(deleting.text.contains("n2") && deleting.text.contains("does not answer"));
    fake.server(2).up = true;
    fake.run(5_000);
    assert!(fake.object.is_none());
    assert!(fake.servers.values().all(|s| s.copies.is_empty()));
}

/// Found by the simulator: devices are opened one after the other, and what is on the next one was called deleted.
#[test]
fn r14_a_server_that_has_just_started_does_not_confirm_a_deletion_by_not_having_the_copy() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.wish(|w| w.deleted = true);
    fake.run(5_000);
    let copies = std::mem::take(&mut fake.server(2).copies);
    fake.server(2).up = true;
    fake.run(2_000);
    assert_eq!(fake.status().retired.len(), 1, "its device may not be open yet");
    fake.server(2).copies = copies;
    fake.run(10_000);
    assert!(fake.object.is_none() && fake.server(2).copies.is_empty());
}

#[test]
fn r14_nor_does_one_whose_restart_nobody_noticed() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.run(10_000);
    let copies = std::mem::take(&mut fake.server(2).copies);
    fake.wish(|w| w.deleted = true);
    fake.run(2_000);
    assert_eq!(fake.status().retired.len(), 1);
    fake.server(2).copies = copies;
    fake.run(10_000);
    assert!(fake.object.is_none() && fake.server(2).copies.is_empty());
}

#[test]
fn a_person_may_let_a_copy_go_whose_holder_never_comes_back() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    fake.wish(|w| w.deleted = true);
    fake.run(5_000);
    let copy = fake.status().retired[0].copy;
    fake.wish(|w| w.let_go = vec![copy]);
    fake.run(2_000);
    assert!(fake.object.is_none());
}

#[test]
fn a_volume_in_use_is_not_deleted_and_says_where_it_is_used() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "node-7");
    fake.run(2_000);
    fake.wish(|w| w.deleted = true);
    fake.run(5_000);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
    assert_eq!(fake.condition(ConditionKind::Deleting).reason, Reason::InUse);
    assert!(fake.condition(ConditionKind::Deleting).text.contains("node-7"));
    fake.detach(1);
    fake.run(5_000);
    assert!(fake.object.is_none());
}

#[test]
fn a_copy_that_no_object_names_is_shown_as_orphan_and_never_deleted() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(3).copies.insert(CopyId(4711), Default::default());
    fake.new_leader();
    fake.run(60_000);
    let orphans = &fake.orphans[&ServerId(3)];
    assert_eq!((orphans[0].copy, orphans[0].volume_known), (CopyId(4711), true));
    assert!(fake.server(3).copies.contains_key(&CopyId(4711)));
}

#[test]
fn a_server_that_moved_to_another_address_is_in_the_next_map() {
    let mut fake = Fake::with_volume(2, 2, 1);
    let mut object = drained(1);
    (object.drain, object.addresses) = (false, vec!["10.9.9.9:1".to_string()]);
    fake.input(Input::Server(object));
    fake.run(2_000);
    assert_eq!(fake.map().server(ServerId(1)).unwrap().addresses, ["10.9.9.9:1"]);
}

#[test]
fn used_space_follows_at_steps_of_a_percent_or_after_a_minute_and_no_more_often() {
    let mut fake = Fake::with_volume(2, 2, 1);
    let used = |fake: &Fake| fake.leader.servers().find(|s| s.id == ServerId(1)).unwrap().used_bytes;
    let told = |fake: &Fake| fake.views.iter().filter(|view| view.id == ServerId(1)).count();
    assert_eq!(used(&fake), 0);
    let before = told(&fake);
    for mib in 1..=30 {
        fake.server(1).used = mib << 20;
        fake.run(1_000);
    }
    assert_eq!((used(&fake), told(&fake)), (0, before), "30 MiB of 10 GiB are no step");
    fake.run(60_000);
    assert_eq!((used(&fake), told(&fake)), (30 << 20, before + 1), "told after a while all the same");
    fake.server(1).used = 200 << 20;
    fake.run(2_000);
    assert_eq!((used(&fake), told(&fake)), (200 << 20, before + 2), "a step is told at once");
}

#[test]
fn a_full_device_is_said_of_the_volumes_that_lie_there_and_of_no_others() {
    let mut fake = Fake::with_volume(3, 2, 1);
    let condition = |fake: &Fake| fake.condition(ConditionKind::OutOfSpace).clone();
    assert!(!condition(&fake).holds);
    fake.server(3).used = 10 * GIB;
    fake.run(3_000);
    assert!(!condition(&fake).holds, "no copy lies there");
    fake.server(2).used = 10 * GIB - (50 << 20);
    fake.run(3_000);
    assert!(condition(&fake).holds && condition(&fake).text.contains("n2"), "{:?}", condition(&fake));
    fake.server(2).used = 9 * GIB;
    fake.run(3_000);
    assert!(!condition(&fake).holds);
}

#[test]
fn a_policy_that_no_volume_could_be_placed_by_says_why() {
    let mut fake = Fake::new(2);
    fake.run(2_000);
    let policy = |copies| super::fake::volume(copies, 1).wishes.policy.unwrap();
    assert_eq!(fake.leader.unsatisfiable(&policy(2)), None);
    let why = fake.leader.unsatisfiable(&policy(3)).unwrap();
    assert_eq!(why.to_string(), "3 copies need 3 servers that take copies, there are 2");
    fake.server(1).up = false;
    fake.run(5_000);
    assert!(fake.leader.unsatisfiable(&policy(2)).is_some(), "a server that does not answer takes no copies");
}

#[test]
fn a_server_that_fills_is_told_the_policys_pace_before_the_map_and_again_when_it_changes() {
    let limit = |bytes_per_second| FillLimit { bytes_per_second, pages: 2 };
    let mut fake = Fake::with_volume(2, 2, 1);
    fake.wish(|wishes| wishes.policy.as_mut().unwrap().fill_limit = limit(1 << 20));
    fake.run(2_000);
    assert!(fake.server(1).limits.is_empty() && fake.server(2).limits.is_empty(), "nobody fills");
    fake.server(2).fills = false;
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2S");
    let told = fake.server(2).limits.clone();
    assert_eq!((told.len(), told[0].1), (1, limit(1 << 20)));
    assert!(told[0].0 < fake.map().generation, "before it stored the map that makes it fill");
    assert!(fake.server(1).limits.is_empty());
    fake.wish(|wishes| wishes.policy.as_mut().unwrap().fill_limit = limit(5 << 20));
    fake.run(2_000);
    assert_eq!(fake.server(2).limits.last().unwrap().1, limit(5 << 20));
    assert_eq!(fake.server(2).limits.len(), 2, "once");
}
