//! Blocks that are stale on the authoritative copy of a settle: all members end with the next one's (R1, I6).

use super::*;
use crate::map::Member;

const A: u64 = 2;

fn key(n: usize, page: u64) -> PageKey {
    PageKey { copy: CopyId(100 + n as u128), layer: LAYER, page }
}

/// What a member would serve of the first block of a page: `None` = it is stale.
fn first_byte(net: &Net, n: usize, page: u64) -> Option<u8> {
    let (record, bytes) = &net.servers[n].medium.pages[&key(n, page)];
    (record.blocks.of(0) != BlockState::Stale).then_some(bytes[0])
}

/// Three members of which each has its own content in the first block of page [`A`], suspect on all.
fn differing() -> Net {
    let mut net = Net::started(3);
    for n in 0..3 {
        let handle = net.open(n, 1, 1);
        net.ask(n, handle, 1, write_at(A, 0), block(n as u8 + 1));
    }
    for n in 0..3 {
        net.restart(n);
    }
    net
}

fn rot(net: &mut Net, n: usize, page: u64) {
    net.servers[n].medium.rotten.push((key(n, page), 0));
}

fn settling(net: &Net, generation: u64, begun: u64) -> VolumeMap {
    net.map_with_boots(generation, |map| {
        let group = &mut map.placements[0].groups[0];
        let source: Member = group.members[0];
        group.settle = Settle::Running { authoritative: source.copy, boot: source.boot, begun: Generation(begun) };
        map.sessions[0].standing = Standing::Held;
    })
}

/// As the operator does it: fences until all have settled, begins anew when the authoritative copy calls for it, and says
/// at last that it is over. Returns how often it began.
fn settle_from(net: &mut Net, mut generation: u64, mut begun: u64, members: &[usize]) -> u64 {
    let mut times = 1;
    for _ in 0..8 {
        net.advance(2_000);
        let reports: Vec<_> = members.iter().map(|n| net.fence(*n, generation + 1, vec![]).copies[0].clone()).collect();
        generation += 1;
        let mut map = settling(net, generation, begun);
        if reports.iter().all(|r| r.to_settle == 0) {
            map.placements[0].groups[0].settle = Settle::Over;
            map.sessions[0].standing = Standing::Admitted;
        } else if reports[0].to_settle == SETTLE_ANEW {
            begun = generation;
            times += 1;
            map = settling(net, generation, begun);
        }
        let gone = (0..3_usize).filter(|n| !members.contains(n));
        gone.for_each(|n| map.placements[0].groups[0].members[n].state = MemberState::Failed);
        let over = map.placements[0].groups[0].settle == Settle::Over;
        for n in members {
            assert_eq!(net.control(*n, ControlRequest::Serve { map: map.clone() }), ControlReply::Done);
        }
        if over {
            assert!(members.iter().all(|n| net.pending(*n) == 0), "what a settle clears");
            return times;
        }
    }
    panic!("the settle never ends");
}

fn settle(net: &mut Net) -> u64 {
    net.serve(settling(net, 3, 3));
    settle_from(net, 3, 3, &[0, 1, 2])
}

#[test]
fn without_a_bad_block_a_settle_begins_once() {
    let mut net = differing();
    assert_eq!(settle(&mut net), 1);
    assert_eq!([0, 1, 2].map(|n| first_byte(&net, n, A)), [Some(1); 3]);
}

#[test]
fn a_block_that_is_stale_on_the_authoritative_copy_becomes_the_next_members_on_all() {
    let mut net = differing();
    rot(&mut net, 0, A);
    assert_eq!(settle(&mut net), 2);
    assert_eq!([0, 1, 2].map(|n| first_byte(&net, n, A)), [Some(2); 3]);
}

#[test]
fn a_block_that_is_stale_on_two_becomes_the_third_ones_on_all() {
    let mut net = differing();
    rot(&mut net, 0, A);
    rot(&mut net, 1, A);
    assert_eq!(settle(&mut net), 2);
    assert_eq!([0, 1, 2].map(|n| first_byte(&net, n, A)), [Some(3); 3]);
}

#[test]
fn a_block_that_is_stale_on_all_stays_so_and_holds_up_no_settle() {
    let mut net = differing();
    (0..3).for_each(|n| rot(&mut net, n, A));
    assert_eq!(settle(&mut net), 1, "R12");
    assert_eq!([0, 1, 2].map(|n| first_byte(&net, n, A)), [None; 3]);
    let map = net.servers[0].machine.volumes[&VOLUME].map.clone().unwrap();
    let handle = net.open_incarnation(0, map.generation.0, 2, 1);
    let read = RequestBody::Read { place: Place { layer: LAYER, group: 0, page: A, offset: 0, length: 4096 } };
    let reply = net.ask(0, handle, map.generation.0, read, Bytes::new());
    assert_eq!(reply.body, ReplyBody::BadBlock { blocks: vec![0] });
}

#[test]
fn rot_that_is_found_when_some_have_settled_already_leaves_all_equal() {
    let mut net = differing();
    let map = settling(&net, 3, 3);
    for n in [0, 2] {
        net.control(n, ControlRequest::Serve { map: map.clone() });
    }
    assert_eq!(first_byte(&net, 2, A), Some(1), "it has settled");
    rot(&mut net, 0, A);
    net.control(1, ControlRequest::Serve { map });
    settle_from(&mut net, 3, 3, &[0, 1, 2]);
    let first = first_byte(&net, 0, A);
    assert!(first.is_some());
    assert_eq!([0, 1, 2].map(|n| first_byte(&net, n, A)), [first; 3]);
}

#[test]
fn another_block_of_a_page_that_rots_after_one_that_is_stale_on_all_is_not_overlooked() {
    let mut net = differing();
    (0..3).for_each(|n| rot(&mut net, n, A));
    for n in 0..3 {
        let (record, bytes) = net.servers[n].medium.pages.get_mut(&key(n, A)).unwrap();
        record.blocks.set(1, BlockState::Present);
        bytes[4096..8192].fill(n as u8 + 11);
        net.restart(n);
    }
    let map = settling(&net, 3, 3);
    for n in [0, 2] {
        net.control(n, ControlRequest::Serve { map: map.clone() });
    }
    // Server 1 answers others, but its own pull reaches nobody under this generation.
    net.silent_peers(|net| net.control(1, ControlRequest::Serve { map }));
    net.advance(2_000);
    assert_eq!(net.fence(0, 4, vec![]).copies[0].to_settle, 0, "nobody has the first block");
    net.servers[0].medium.rotten.push((key(0, A), 1));
    net.serve(settling(&net, 4, 3));
    assert_eq!(settle_from(&mut net, 4, 3, &[0, 1, 2]), 2);
    let second = |n: usize| net.servers[n].medium.pages[&key(n, A)].1[4096];
    assert_eq!([0, 1, 2].map(second), [second(0); 3]);
    assert_eq!([0, 1, 2].map(|n| first_byte(&net, n, A)), [None; 3]);
}

/// Page 7 is equal on all and clean, but for a write that only server `writer` has; the authoritative copy's block rots.
fn pending_on(writer: usize) -> Net {
    let mut net = Net::started(3);
    let handles: Vec<HandleId> = (0..3).map(|n| net.open(n, 1, 1)).collect();
    for (n, handle) in handles.iter().copied().enumerate() {
        net.ask(n, handle, 1, write_at(7, 0), block(5));
        net.confirm(n, handle, 1, Seq(1_000));
    }
    net.advance(1_000);
    assert_eq!([0, 1, 2].map(|n| net.pending(n)), [0; 3]);
    net.ask(writer, handles[writer], 1, write_at(7, 0), block(6));
    (0..3).for_each(|n| net.restart(n));
    rot(&mut net, 0, 7);
    net
}

#[test]
fn a_page_that_only_one_member_has_pending_becomes_equal_on_all() {
    let mut net = pending_on(1);
    assert_eq!(settle(&mut net), 2);
    assert_eq!([0, 1, 2].map(|n| first_byte(&net, n, 7)), [Some(6); 3], "the first member after the authoritative one");
}

#[test]
fn a_mended_page_is_suspect_even_if_nothing_is_pending_where_it_came_from() {
    let mut net = pending_on(2);
    net.serve(settling(&net, 3, 3));
    net.advance(2_000);
    let report = net.fence(0, 4, vec![]).copies[0].clone();
    assert_eq!((report.to_settle, report.pending_before_start, net.pending(0)), (SETTLE_ANEW, 1, 1));
    net.serve(settling(&net, 4, 4));
    settle_from(&mut net, 4, 4, &[0, 1, 2]);
    assert_eq!([0, 1, 2].map(|n| first_byte(&net, n, 7)), [Some(5); 3]);
}

#[test]
fn a_source_that_fails_meanwhile_is_passed_over() {
    let mut net = differing();
    rot(&mut net, 0, A);
    net.servers[1].medium.hold = true;
    let map = settling(&net, 3, 3);
    for n in [0, 2] {
        net.control(n, ControlRequest::Serve { map: map.clone() });
    }
    assert_eq!(first_byte(&net, 0, A), None, "server 1 does not answer");
    assert_ne!(net.fence(0, 4, vec![]).copies[0].to_settle, 0, "a page is still to be mended");
    let mut without = settling(&net, 4, 3);
    without.placements[0].groups[0].members[1].state = MemberState::Failed;
    for n in [0, 2] {
        assert_eq!(net.control(n, ControlRequest::Serve { map: without.clone() }), ControlReply::Done);
    }
    settle_from(&mut net, 4, 3, &[0, 2]);
    assert_eq!([0, 2].map(|n| first_byte(&net, n, A)), [Some(3); 2]);
}

#[test]
fn what_was_mended_is_pending_on_disk_before_its_data_is_there() {
    let mut net = pending_on(1);
    let before = net.servers[0].medium.log.len();
    net.serve(settling(&net, 3, 3));
    net.advance(2_000);
    let log = &net.servers[0].medium.log[before..];
    let mark = Record::Pending { page: key(0, 7), set: true };
    let marked = log.iter().position(|op| matches!(op, MediumOp::Commit(records) if records.contains(&mark)));
    let data = log.iter().position(|op| matches!(op, MediumOp::Write { page, .. } if *page == key(0, 7)));
    assert!(marked.is_some() && marked < data, "I3: {marked:?} {data:?}");
    assert_eq!(net.pending(0), 1, "no confirmed clears it");
    let report = net.fence(0, 4, vec![]).copies[0].clone();
    assert_eq!((report.to_settle, report.pending_before_start), (SETTLE_ANEW, 1), "it is settled on all anew");
    let told: Vec<_> = net.rot.iter().map(|rot| (rot.page, rot.bad)).collect();
    assert_eq!(told, [(key(0, 7), 1), (key(0, 7), 0)], "found, then repaired");
}
