//! Fills share what the operator allows all of them.

use super::super::*;
use super::fake::{Fake, V};
use crate::map::MemberState;

const MIB: u64 = 1 << 20;

/// Another volume with one copy that is filled, at servers that this leader has not met.
fn another(fake: &Fake) -> VolumeObject {
    let mut object = fake.object.clone().unwrap();
    object.id = VolumeId(V.0 + 1);
    let map = object.status.map.as_mut().unwrap();
    map.volume = object.id;
    for (n, member) in map.placements[0].groups[0].members.iter_mut().enumerate() {
        member.server = ServerId(90 + n as u128);
        member.state = if n == 0 { MemberState::Active } else { MemberState::Syncing };
    }
    object
}

#[test]
fn a_fill_gives_way_to_another_volumes_and_takes_what_that_leaves() {
    let mut fake = Fake::with_volume(2, 2, 1);
    let cluster_bytes_per_second = 8 * MIB;
    fake.leader.config.fill_budget = FillBudget { cluster_bytes_per_second, ..FillBudget::default() };
    fake.server(2).fills = false;
    fake.server(2).restart();
    fake.run(10_000);
    assert_eq!(fake.group(0), "1A 2S");
    let told =
        |fake: &mut Fake| fake.server(2).limits.iter().map(|(_, limit)| limit.bytes_per_second).collect::<Vec<_>>();
    assert_eq!(told(&mut fake), [8 * MIB], "before it stored the map that makes it fill");
    let other = another(&fake);
    fake.input(Input::Volume { object: other.clone(), source: Source::Watched });
    fake.run(500);
    assert_eq!(told(&mut fake), [8 * MIB, 4 * MIB]);
    fake.input(Input::VolumeGone { volume: other.id });
    fake.run(500);
    assert_eq!(told(&mut fake), [8 * MIB, 4 * MIB, 8 * MIB]);
}
