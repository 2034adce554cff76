//! A person's force of a group without an `Active` member (I8): when it acts, what it keeps, what it ends.

use super::super::*;
use super::fake::{Fake, GIB};
use crate::ids::*;
use crate::map::*;

/// Two copies on 1 and 2 of three servers; 2 was left out, then 1 died: only what is behind is there.
fn orphaned() -> Fake {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.attach(1, "n1");
    fake.run(2_000);
    fake.server(2).up = false;
    fake.run(5_000);
    assert_eq!(fake.group(0), "1A 2F");
    fake.server(1).up = false;
    fake.run(5_000);
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2F", "nothing that is behind serves by itself");
    fake
}

fn copy_on(fake: &Fake, server: u128) -> CopyId {
    fake.map().members().find(|m| m.server == ServerId(server)).unwrap().copy
}

fn force(fake: &mut Fake, copies: &[CopyId], generation: Generation) {
    let force = Force { generation, copies: copies.iter().copied().collect() };
    fake.wish(|wishes| wishes.force = Some(force));
}

fn forced(server: u128) -> (Fake, CopyId, CopyId) {
    let mut fake = orphaned();
    let (chosen, other) = (copy_on(&fake, server), copy_on(&fake, 3 - server));
    let generation = fake.status().generation;
    force(&mut fake, &[chosen], generation);
    fake.run(5_000);
    (fake, chosen, other)
}

#[test]
fn i8_the_condition_says_what_is_missing_and_how_to_force_it() {
    let fake = orphaned();
    let available = fake.condition(ConditionKind::Available);
    assert!(!available.holds);
    for part in [
        format!("waiting for one of copy {} of group 0 on server n1", copy_on(&fake, 1)),
        format!("copy {} of group 0 on server n2 (lacks all that was written", copy_on(&fake, 2)),
        format!("spec.force to {{generation: {}", fake.status().generation),
    ] {
        assert!(available.text.contains(&part), "{part:?} is not in {}", available.text);
    }
}

#[test]
fn i8_a_forced_copy_goes_on_alone_and_the_others_are_kept_until_a_person_deletes_them() {
    let (mut fake, chosen, other) = forced(2);
    let first = fake.history.iter().find(|map| map.loss() > Generation(0)).unwrap();
    assert_eq!(first.members().map(|m| (m.copy, m.state)).collect::<Vec<_>>(), [(chosen, MemberState::Active)]);
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Ended, "what it had flushed may be gone");
    let record = fake.status().forced[0];
    assert_eq!((record.copy, record.was, record.generation), (chosen, MemberState::Failed, first.generation));
    assert!(fake.events.contains(&EventReason::Forced));
    fake.run(10_000);
    assert_eq!(fake.group(0), "2A 3A", "a second copy is made at once");

    fake.server(1).restart();
    fake.run(30_000);
    let kept = fake.status().retired.iter().find(|r| r.copy == other).unwrap();
    assert!(kept.kept, "the one that may hold what was lost is never deleted by itself");
    assert!(fake.server(1).copies.contains_key(&other));
    assert_eq!(fake.orphans[&ServerId(1)].iter().map(|o| o.copy).collect::<Vec<_>>(), [other]);
    let stored = fake.server(1).map.as_ref().unwrap().generation;
    assert_eq!(stored, fake.status().generation, "its holder knows that it serves no more");

    fake.wish(|wishes| wishes.delete_kept = vec![other]);
    fake.run(3_000);
    assert!(fake.server(1).copies.is_empty() && fake.status().retired.is_empty());
}

#[test]
fn i8_a_word_given_for_another_generation_or_for_no_copy_of_the_group_forces_nothing() {
    let mut fake = orphaned();
    let (generation, behind) = (fake.status().generation, copy_on(&fake, 2));
    let changes = fake.history.len();
    force(&mut fake, &[behind], Generation(generation.0 - 1));
    fake.run(20_000);
    force(&mut fake, &[CopyId(12345)], generation);
    fake.run(20_000);
    assert_eq!(fake.history.len(), changes);
    assert!(!fake.condition(ConditionKind::Available).holds);
}

#[test]
fn i8_while_an_active_member_answers_a_force_does_nothing() {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    let (behind, generation) = (copy_on(&fake, 2), fake.status().generation);
    fake.server(2).fills = false;
    force(&mut fake, &[behind], generation);
    fake.server(2).restart();
    fake.run(20_000);
    assert_eq!(fake.group(0), "1A 2S");
    assert!(fake.status().forced.is_empty());
}

#[test]
fn i8_when_the_active_one_answers_the_fence_after_all_it_goes_on_and_nothing_is_lost() {
    let mut fake = orphaned();
    let (behind, generation) = (copy_on(&fake, 2), fake.status().generation);
    // It is back before the fence of the force goes out.
    fake.server(1).up = true;
    force(&mut fake, &[behind], generation);
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2A");
    assert!(fake.status().forced.is_empty());
    assert_eq!(fake.status().session(SessionId(1)), SessionState::Admitted);
}

#[test]
fn i8_a_force_is_a_persons_word_that_silent_servers_are_stopped_even_when_the_leader_suspects_itself() {
    let mut fake = Fake::with_volume(4, 3, 1);
    fake.server(3).up = false;
    fake.run(15_000);
    assert_eq!(fake.group(0), "1A 2A 3F");
    // Others still reach them, so the leader goes on suspecting itself.
    for server in [1, 2] {
        fake.server(server).up = false;
        fake.server(server).hidden = true;
    }
    fake.server(3).restart();
    fake.run(30_000);
    assert_eq!(fake.leader.servers().find(|s| s.id == ServerId(1)).unwrap().health, ServerHealth::Suspected);
    let (behind, generation) = (copy_on(&fake, 3), fake.status().generation);
    force(&mut fake, &[behind], generation);
    fake.run(20_000);
    assert_eq!(fake.group(0), "3A 4A", "only two servers are left for three copies");
}

#[test]
fn i8_every_group_that_waits_needs_its_copy_and_a_group_that_does_not_keeps_its_own() {
    let mut fake = Fake::new(4);
    let mut object = super::fake::volume(2, 2);
    object.wishes.size = GIB;
    fake.apply(object);
    fake.run(3_000);
    let members = |fake: &Fake, g: usize| fake.map().placements[0].groups[g].members.clone();
    let (first, second) = (members(&fake, 0), members(&fake, 1));
    let lost = first[0].server;
    let late = first[1];
    let id = |server: ServerId| server.0;
    fake.server(id(late.server)).up = false;
    fake.run(15_000);
    fake.server(id(lost)).up = false;
    fake.server(id(late.server)).restart();
    fake.run(15_000);
    let generation = fake.status().generation;
    force(&mut fake, &[late.copy], generation);
    fake.run(5_000);
    let untouched: Vec<_> = second.iter().filter(|m| m.server != lost && m.server != late.server).collect();
    for m in untouched {
        let now = fake.map().place_of(m.copy).unwrap().2;
        assert_eq!(now.state, MemberState::Active);
    }
    assert!(members(&fake, 0).iter().any(|m| m.copy == late.copy && m.state == MemberState::Active));
    let kept: Vec<_> = fake.status().retired.iter().filter(|r| r.kept).map(|r| r.copy).collect();
    assert_eq!(kept, [first[0].copy], "only what lay beside the forced copy is kept aside");
}

#[test]
fn i8_a_leader_that_dies_anywhere_in_a_force_leaves_it_to_the_next_one() {
    for step in
        [Step::Intended, Step::FirstPromise, Step::Fenced, Step::LeaseWaited, Step::Committed, Step::FirstServed]
    {
        let mut fake = orphaned();
        let (behind, other, generation) = (copy_on(&fake, 2), copy_on(&fake, 1), fake.status().generation);
        fake.die_at = Some(step);
        force(&mut fake, &[behind], generation);
        fake.run(40_000);
        assert_eq!((fake.deaths, fake.group(0)), (1, "2A 3A".to_string()), "{step:?}");
        assert_eq!(fake.status().forced.len(), 1, "{step:?}");
        assert!(fake.status().retired.iter().any(|r| r.copy == other && r.kept), "{step:?}");
    }
}

#[test]
fn a_deleted_volume_takes_its_kept_copies_along() {
    let (mut fake, _, _) = forced(2);
    fake.server(1).restart();
    fake.run(20_000);
    fake.wish(|wishes| {
        wishes.sessions.clear();
        wishes.deleted = true;
    });
    fake.run(10_000);
    assert!(fake.object.is_none());
    assert!(fake.servers.values().all(|s| s.copies.is_empty()));
}
