//! What people are told of fills: by what there was to do, not by the size of the volume.

use super::fake::Fake;
use crate::control::CopyProgress;
use crate::map::MemberState;

/// Pages left and in all of the one copy with work, as told last.
fn told(fake: &Fake) -> Option<(u64, u64)> {
    assert!(fake.progress.len() <= 1, "{:?}", fake.progress);
    fake.progress.first().map(|p: &CopyProgress| (p.unsynced, p.pages))
}

/// A volume of 100 pages whose second member was away and has missed four.
fn rejoining() -> Fake {
    let mut fake = Fake::with_volume(3, 2, 1);
    fake.server(2).up = false;
    fake.run(5_000);
    assert_eq!(told(&fake), None, "nothing is filled while it is away");
    fake.server(2).fills = false;
    fake.server(2).restart();
    fake.run(4_000);
    assert_eq!(fake.map().placements[0].groups[0].members[1].state, MemberState::Syncing);
    fake
}

#[test]
fn a_rejoin_by_difference_counts_the_pages_of_the_difference_and_is_told_until_it_is_done() {
    let mut fake = rejoining();
    assert_eq!(told(&fake), Some((4, 4)));
    fake.server(2).fill_but(1);
    fake.run(2_000);
    assert_eq!(told(&fake), Some((1, 4)), "three of four, told with the next heartbeat");
    fake.server(2).fills = true;
    fake.run(4_000);
    assert_eq!(fake.group(0), "1A 2A");
    assert_eq!(told(&fake), None, "what is done goes away");
}

#[test]
fn what_was_filled_before_the_first_heartbeat_counts_too_and_a_later_change_keeps_the_count() {
    let mut fake = rejoining();
    fake.server(2).fill_but(3);
    fake.attach(7, "n");
    fake.run(2_000);
    assert_eq!(told(&fake), Some((3, 4)), "a change in between does not begin it anew");
    fake.new_leader();
    fake.run(3_000);
    assert_eq!(told(&fake), Some((3, 3)), "another leader counts from what it finds");
}

#[test]
fn a_copy_that_rejoins_a_second_time_counts_by_the_second_difference() {
    let mut fake = rejoining();
    fake.server(2).fill_but(1);
    fake.run(2_000);
    fake.server(2).up = false;
    fake.run(5_000);
    assert_eq!(told(&fake), None, "a member that has failed is not being filled");
    fake.server(2).restart();
    fake.run(4_000);
    assert_eq!(told(&fake), Some((4, 4)));
}
