//! The plan alone: from an old map, a goal and answers to the next map. Counter-examples M1, M3, H11b, I7, R13, H20.

use super::super::object::NewCopy;
use super::super::plan::{Answer, Goal, Hold, differs, given_up, next_map};
use super::super::*;
use super::fake::Fake;
use crate::control::{CopyReport, Promised, SETTLE_ANEW, SettleName};
use crate::ids::*;
use crate::map::*;
use std::collections::BTreeMap;

/// A map of one group on servers 1, 2, 3 with a session.
fn old() -> VolumeMap {
    let mut fake = Fake::with_volume(3, 3, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    fake.map().clone()
}

fn group(map: &mut VolumeMap) -> &mut Group {
    &mut map.placements[0].groups[0]
}

fn goal(map: &VolumeMap) -> Goal {
    let wish = |s: &Session| SessionWish { id: s.id, node: s.node.clone(), mode: s.mode };
    Goal { size: map.size, sessions: map.sessions.iter().map(wish).collect(), flushed: true, ..Goal::default() }
}

fn report(m: &Member) -> CopyReport {
    CopyReport {
        copy: m.copy,
        boot: m.boot,
        unsynced: 0,
        pending: Vec::new(),
        pending_before_start: 0,
        settled_for: None,
        to_settle: 0,
        listed: true,
    }
}

/// Everybody answers, with what `change` makes of the reports.
fn answers(map: &VolumeMap, change: impl Fn(&mut CopyReport)) -> BTreeMap<ServerId, Answer> {
    let answer = |m: &Member| {
        let mut copy = report(m);
        change(&mut copy);
        let (generation, stored) = (map.generation.next(), map.generation);
        Answer::Promised(Promised { server: m.server, generation, stored, sessions: Vec::new(), copies: vec![copy] })
    };
    map.members().map(|m| (m.server, answer(m))).collect()
}

fn next(map: &VolumeMap, goal: &Goal, answers: &BTreeMap<ServerId, Answer>) -> VolumeMap {
    next_map(map, goal, answers, map.generation.next()).unwrap().map
}

fn states(map: &VolumeMap) -> Vec<MemberState> {
    map.members().map(|m| m.state).collect()
}

fn running(map: &mut VolumeMap) -> SettleName {
    let first = group(map).members[0];
    let name = SettleName { authoritative: first.copy, boot: first.boot, begun: map.generation };
    group(map).settle = Settle::Running { authoritative: name.authoritative, boot: name.boot, begun: name.begun };
    map.sessions[0].standing = Standing::Held;
    name
}

use MemberState::{Active, Failed, Syncing};

#[test]
fn nothing_changes_when_nothing_is_wanted_and_nobody_failed() {
    let map = old();
    assert!(!differs(&map, &next(&map, &goal(&map), &answers(&map, |_| ()))));
}

#[test]
fn i7_h11b_a_member_becomes_active_only_filled_flushed_and_in_calm() {
    let mut map = old();
    group(&mut map).members[2].state = Syncing;
    let filled = answers(&map, |_| ());
    assert_eq!(states(&next(&map, &goal(&map), &filled)), [Active, Active, Active]);
    assert_eq!(states(&next(&map, &Goal { flushed: false, ..goal(&map) }, &filled)), [Active, Active, Syncing]);
    let one_left = answers(&map, |r| r.unsynced = 1);
    assert_eq!(states(&next(&map, &goal(&map), &one_left)), [Active, Active, Syncing]);
    let third = group(&mut map).members[2].copy;
    let loss = answers(&map, |r| r.boot.0 += u128::from(r.copy != third));
    assert_eq!(states(&next(&map, &goal(&map), &loss)), [Active, Active, Syncing]);
    running(&mut map);
    assert_eq!(states(&next(&map, &goal(&map), &filled)), [Active, Active, Syncing]);
}

#[test]
fn h2_a_syncing_member_that_restarted_becomes_failed() {
    let mut map = old();
    group(&mut map).members[2].state = Syncing;
    let third = group(&mut map).members[2].copy;
    let restarted = answers(&map, |r| r.boot.0 += u128::from(r.copy == third));
    assert_eq!(states(&next(&map, &goal(&map), &restarted)), [Active, Active, Failed]);
}

/// Found by the simulator: a drained copy went under the very fence that found another one restarted.
#[test]
fn r16_a_member_is_taken_out_only_if_as_many_as_are_wanted_stay_active() {
    let map = old();
    let copies: Vec<_> = map.members().map(|m| m.copy).collect();
    let drained = Goal { remove: [copies[0]].into(), copies: 2, ..goal(&map) };
    let stays = |goal: &Goal, restarted: &[CopyId]| {
        let answers = answers(&map, |r| r.boot.0 += u128::from(restarted.contains(&r.copy)));
        next(&map, goal, &answers).members().map(|m| (m.copy, m.state)).collect::<Vec<_>>()
    };
    assert_eq!(stays(&drained, &[]), [(copies[1], Active), (copies[2], Active)]);
    let kept = [(copies[0], Active), (copies[1], Failed), (copies[2], Active)];
    assert_eq!(stays(&drained, &copies[1..2]), kept);
    let two = Goal { remove: copies[..2].iter().copied().collect(), ..drained.clone() };
    assert_eq!(stays(&two, &[]).len(), 3, "one is not enough");
    assert_eq!(stays(&Goal { copies: 1, ..two }, &[]), [(copies[2], Active)]);
}

#[test]
fn m1_m3_a_settle_is_over_only_when_every_serving_member_settled_for_its_very_name() {
    let mut map = old();
    let name = running(&mut map);
    let settled = answers(&map, |r| r.settled_for = Some(name));
    let done = next(&map, &goal(&map), &settled);
    assert_eq!((done.placements[0].groups[0].settle, done.sessions[0].standing), (Settle::Over, Standing::Admitted));
    let other = BootId(name.boot.0 + 1);
    let wrong = [
        SettleName { authoritative: group(&mut map).members[1].copy, ..name },
        SettleName { boot: other, ..name },
        SettleName { begun: name.begun.next(), ..name },
    ];
    for wrong in wrong {
        let kept = next(&map, &goal(&map), &answers(&map, |r| r.settled_for = Some(wrong)));
        assert_eq!(kept.placements[0].groups[0].settle, map.placements[0].groups[0].settle);
        assert_eq!(kept.sessions[0].standing, Standing::Held, "M5");
    }
    let last = group(&mut map).members[2].copy;
    let one_left = answers(&map, |r| (r.settled_for, r.to_settle) = (Some(name), u64::from(r.copy == last)));
    assert!(next(&map, &goal(&map), &one_left).settling());
    let unflushed = next(&map, &Goal { flushed: false, ..goal(&map) }, &settled);
    assert!(unflushed.settling(), "H11b");
}

#[test]
fn a_settle_whose_authoritative_copy_was_mended_begins_anew_and_ends_not_before_it_is() {
    let mut map = old();
    let name = running(&mut map);
    let with = |left: u64| {
        answers(&map, |r| {
            let own = if r.copy == name.authoritative { left } else { 0 };
            (r.settled_for, r.to_settle) = (Some(name), own);
        })
    };
    let settle = |left: u64| next(&map, &goal(&map), &with(left)).placements[0].groups[0].settle;
    assert_eq!(settle(3), map.placements[0].groups[0].settle, "pages are still to be mended");
    let Settle::Running { authoritative, boot, begun } = settle(SETTLE_ANEW) else { panic!("it goes on") };
    assert_eq!((authoritative, boot), (name.authoritative, name.boot));
    assert!(begun > name.begun);
    assert_eq!(settle(0), Settle::Over);
}

#[test]
fn a_map_with_a_member_that_rejoins_in_it_ends_no_settle() {
    let mut map = old();
    let name = running(&mut map);
    group(&mut map).members[2].state = Failed;
    let rejoin = [group(&mut map).members[2].copy].into();
    let made = next(&map, &Goal { rejoin, ..goal(&map) }, &answers(&map, |r| r.settled_for = Some(name)));
    assert_eq!(states(&made), [Active, Active, Failed], "it waits for the end of the settle");
    assert_eq!(made.placements[0].groups[0].settle, Settle::Over);
}

#[test]
fn h20_a_settle_begins_anew_when_other_sessions_or_incarnations_are_listed() {
    let mut map = old();
    let name = running(&mut map);
    let mut all = answers(&map, |r| r.settled_for = Some(name));
    for answer in all.values_mut() {
        let Answer::Promised(promised) = answer else { panic!() };
        promised.sessions = vec![(SessionId(1), (Incarnation(2), Generation(0)))];
    }
    let made = next(&map, &goal(&map), &all);
    assert!(matches!(made.placements[0].groups[0].settle, Settle::Running { begun, .. } if begun == made.generation));
    assert_eq!(made.sessions[0].incarnation, Incarnation(2));
}

#[test]
fn r13_a_given_up_change_repeats_no_settled_and_takes_nothing_of_a_reply() {
    let mut map = old();
    group(&mut map).settle = Settle::Over;
    let made = given_up(&map, Generation(99));
    assert_eq!(made.placements[0].groups[0].settle, Settle::None);
    group(&mut map).settle = Settle::None;
    assert_eq!(VolumeMap { generation: map.generation, ..made }, map);
}

#[test]
fn i8_no_answer_makes_an_out_of_date_member_active() {
    let mut map = old();
    group(&mut map).members[1].state = Failed;
    group(&mut map).members[2].state = Syncing;
    let mut all = answers(&map, |r| r.unsynced = u64::from(r.copy.0 == 0));
    all.insert(ServerId(1), Answer::LeftOut);
    let first = group(&mut map).members[0].copy;
    let goal = Goal { silent_over: true, lease_over: true, ..goal(&map) };
    let held = next_map(&map, &goal, &all, map.generation.next());
    assert_eq!(held, Err(Hold::NoActive { copies: vec![first] }));
}

#[test]
fn a_new_copy_is_syncing_under_the_boot_id_of_the_fence_and_has_an_ordinal_of_its_own() {
    let mut map = old();
    group(&mut map).members[2].state = Failed;
    group(&mut map).members.remove(1);
    let new = NewCopy { copy: CopyId(9), server: ServerId(9), placement: 0, group: 0, unsynced: true };
    let goal = Goal { add: vec![new], ..goal(&map) };
    let mut all = answers(&map, |_| ());
    assert_eq!(next(&map, &goal, &all).members().count(), 2, "without a report it is not there");
    let copies = vec![CopyReport { copy: CopyId(9), boot: BootId(5), ..report(&group(&mut map).members[0]) }];
    let (generation, stored) = (map.generation.next(), Generation(0));
    let promised = Promised { server: ServerId(9), generation, stored, sessions: Vec::new(), copies };
    all.insert(ServerId(9), Answer::Promised(promised));
    let made = next(&map, &goal, &all);
    let member = made.placements[0].groups[0].member(CopyId(9)).unwrap();
    assert_eq!((member.state, member.boot, member.ordinal), (Syncing, BootId(5), 3));
}

#[test]
fn the_last_active_member_is_never_let_go_whatever_is_wanted() {
    let map = old();
    let all: std::collections::BTreeSet<_> = map.members().map(|m| m.copy).collect();
    let leave = Goal { leave: all.clone(), ..goal(&map) };
    assert_eq!(states(&next(&map, &leave, &answers(&map, |_| ()))), [Active, Active, Active]);
    let remove = Goal { remove: all, ..goal(&map) };
    assert_eq!(next(&map, &remove, &answers(&map, |_| ())).members().count(), 3);
}
