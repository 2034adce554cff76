//! What is written is read back, for anything the protocol can hold.
#![allow(clippy::unwrap_used)]

use lamina_protocol::ids::*;
use lamina_protocol::management::{Forced, NewCopy, Proposal, Purpose, RetiredCopy, Status};
use lamina_protocol::map::{
    AccessMode, Group, Layer, Member, MemberState, Placement, Revocation, Scheme, ServerEntry, Session, Settle,
    Standing, VolumeMap,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::{Unreadable, committed_map, protocol_status, write_status};
use crate::volume::VolumeStatus;
use crate::volume::map::SettleState;

const MOST: u64 = super::MOST as u64;

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..10u64, 0..=MOST]
}

fn member() -> impl Strategy<Value = Member> {
    let state = prop_oneof![Just(MemberState::Active), Just(MemberState::Syncing), Just(MemberState::Failed)];
    (0..16u8, any::<[u128; 3]>(), state, any::<[bool; 2]>()).prop_map(|(ordinal, ids, state, marks)| Member {
        ordinal,
        copy: CopyId(ids[0]),
        server: ServerId(ids[1]),
        boot: BootId(ids[2]),
        state,
        avoid: marks[0],
        unpromised: marks[1],
    })
}

fn settle() -> impl Strategy<Value = Settle> {
    let running = (any::<u128>(), any::<u128>(), number()).prop_map(|(copy, boot, begun)| Settle::Running {
        authoritative: CopyId(copy),
        boot: BootId(boot),
        begun: Generation(begun),
    });
    prop_oneof![Just(Settle::None), Just(Settle::Over), running]
}

fn placement() -> impl Strategy<Value = Placement> {
    let group = (vec(member(), 1..4), number(), settle());
    let group = group.prop_map(|(members, loss, settle)| Group { members, loss: Generation(loss), settle });
    vec(group, 1..4).prop_map(|groups| Placement { groups })
}

fn layer() -> impl Strategy<Value = Layer> {
    (any::<u128>(), number(), 0..=1u32 << 22, 0..=1u32 << 22, 0..64u32, proptest::option::of(number())).prop_map(
        |(id, size, page_bytes, chunk_bytes, placement, sealed)| Layer {
            id: LayerId(id),
            size,
            page_bytes,
            scheme: Scheme::Replicate,
            chunk_bytes,
            placement,
            sealed: sealed.map(Generation),
        },
    )
}

fn session() -> impl Strategy<Value = Session> {
    (any::<u128>(), "[a-z]{0,8}", any::<[bool; 2]>(), number(), number()).prop_map(
        |(id, node, [read_only, held], incarnation, handled)| Session {
            id: SessionId(id),
            node,
            mode: if read_only { AccessMode::ReadOnly } else { AccessMode::ReadWrite },
            incarnation: Incarnation(incarnation),
            handled: Generation(handled),
            standing: if held { Standing::Held } else { Standing::Admitted },
        },
    )
}

fn map() -> impl Strategy<Value = VolumeMap> {
    let server = (any::<u128>(), vec("[a-z.]{1,9}:[0-9]{1,4}", 0..3));
    let server = server.prop_map(|(id, addresses)| ServerEntry { id: ServerId(id), addresses });
    let revoked = (any::<u128>(), number(), vec((number(), number()), 0..3));
    let revoked = revoked.prop_map(|(session, below, ranges)| Revocation {
        session: SessionId(session),
        below: Generation(below),
        ranges,
    });
    let head = (any::<u128>(), number(), 1..9u32, number(), number(), any::<bool>());
    let lists =
        (vec(server, 0..4), vec(placement(), 0..3), vec(layer(), 0..3), vec(session(), 0..3), vec(revoked, 0..3));
    (head, lists).prop_map(|(head, lists)| VolumeMap {
        volume: VolumeId(head.0),
        generation: Generation(head.1),
        format: head.2,
        required_features: head.3,
        size: head.4,
        multi_session: head.5,
        servers: lists.0,
        placements: lists.1,
        layers: lists.2,
        sessions: lists.3,
        revoked: lists.4,
    })
}

fn purpose() -> impl Strategy<Value = Purpose> {
    use Purpose::{Adopted, Create, Failure, Finish, Force, Recover, Rejoin, Sessions, Shape, Void};
    proptest::sample::select(vec![Create, Sessions, Failure, Rejoin, Finish, Shape, Recover, Force, Void, Adopted])
}

fn proposal() -> impl Strategy<Value = Proposal> {
    let copy = (any::<u128>(), any::<u128>(), 0..64u32, 0..16u32, any::<bool>());
    let copy = copy.prop_map(|(copy, server, placement, group, unsynced)| NewCopy {
        copy: CopyId(copy),
        server: ServerId(server),
        placement,
        group,
        unsynced,
    });
    (number(), any::<u128>(), purpose(), vec(copy, 0..4)).prop_map(|(generation, name, purpose, copies)| Proposal {
        generation: Generation(generation),
        name,
        purpose,
        copies,
    })
}

fn status() -> impl Strategy<Value = Status> {
    let retired = (any::<u128>(), any::<u128>(), number(), any::<bool>());
    let retired = retired.prop_map(|(copy, server, generation, kept)| RetiredCopy {
        copy: CopyId(copy),
        server: ServerId(server),
        generation: Generation(generation),
        kept,
    });
    let was = prop_oneof![Just(MemberState::Syncing), Just(MemberState::Failed)];
    let forced = (any::<u128>(), 0..16u32, number(), was, number());
    let forced = forced.prop_map(|(copy, group, generation, was, unsynced)| Forced {
        copy: CopyId(copy),
        group,
        generation: Generation(generation),
        was,
        unsynced,
    });
    let option = proptest::option::of::<BoxedStrategy<VolumeMap>>;
    (
        number(),
        option(map().boxed()),
        proptest::option::of(proposal()),
        vec(retired, 0..4),
        vec(any::<u128>(), 0..3),
        vec(forced, 0..3),
    )
        .prop_map(|(generation, map, proposed, retired, ended, forced)| Status {
            forced,
            generation: Generation(generation),
            map,
            proposed,
            retired,
            ended: ended.into_iter().map(SessionId).collect(),
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_status_reads_back_as_it_was_written_through_json(status in status()) {
        let mut written = VolumeStatus::default();
        write_status(&status, &mut written);
        let text = serde_json::to_string(&written).unwrap();
        let read: VolumeStatus = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(protocol_status(&read), Ok(status));
    }
}

/// One group, one member, 1 GiB.
fn small_map() -> VolumeMap {
    VolumeMap {
        volume: VolumeId(1),
        generation: Generation(3),
        format: 1,
        required_features: 0,
        size: 1 << 30,
        multi_session: false,
        servers: vec![ServerEntry { id: ServerId(7), addresses: vec!["10.0.0.1:4711".into()] }],
        placements: vec![Placement {
            groups: vec![Group {
                members: vec![Member {
                    ordinal: 0,
                    copy: CopyId(2),
                    server: ServerId(7),
                    boot: BootId(9),
                    state: MemberState::Active,
                    avoid: false,
                    unpromised: false,
                }],
                loss: Generation(0),
                settle: Settle::None,
            }],
        }],
        layers: vec![Layer {
            id: LayerId(4),
            size: 1 << 30,
            page_bytes: 1 << 20,
            scheme: Scheme::Replicate,
            chunk_bytes: 1 << 16,
            placement: 0,
            sealed: None,
        }],
        sessions: Vec::new(),
        revoked: Vec::new(),
    }
}

fn small_status() -> VolumeStatus {
    let mut status = VolumeStatus::default();
    write_status(&Status { generation: Generation(3), map: Some(small_map()), ..Status::default() }, &mut status);
    status
}

#[test]
fn a_driver_gets_a_committed_map_whole_or_not_at_all() {
    assert_eq!(committed_map(&VolumeStatus::default()), Ok(None));
    assert_eq!(committed_map(&small_status()), Ok(Some(small_map())));
    let other_generation = VolumeStatus { generation: Some(4), ..small_status() };
    assert_eq!(committed_map(&other_generation), Err(Unreadable::Generation));
    let mut unknown_server = small_status();
    unknown_server.map.as_mut().unwrap().servers.clear();
    assert!(matches!(committed_map(&unknown_server), Err(Unreadable::Map(_))));
    let mut bad_id = small_status();
    bad_id.map.as_mut().unwrap().layers[0].id.0 = "xyz".into();
    assert_eq!(committed_map(&bad_id), Err(Unreadable::Id { field: "layers.id" }));
    let mut negative = small_status();
    negative.map.as_mut().unwrap().size = -4096;
    assert_eq!(committed_map(&negative), Err(Unreadable::Number { field: "map.size", value: -4096 }));
}

#[test]
fn a_running_settle_without_its_source_is_refused() {
    let mut status = small_status();
    status.map.as_mut().unwrap().placements[0].groups[0].settle.state = SettleState::Running;
    assert_eq!(protocol_status(&status), Err(Unreadable::Settle));
}
