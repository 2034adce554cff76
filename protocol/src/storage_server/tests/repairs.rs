//! Bad blocks of `Active` members, and fills that meet trouble on their way (R12, R8, H11c).

use super::fills::{bytes_of, rejoining};
use super::*;

fn key(n: usize) -> PageKey {
    PageKey { copy: CopyId(100 + n as u128), layer: LAYER, page: 0 }
}

/// So many members with the same first block, bad on the first ones.
fn rotten(members: usize, bad: usize) -> (Net, Vec<HandleId>) {
    let mut net = Net::started(members);
    let handles: Vec<_> = (0..members).map(|n| net.open(n, 1, 1)).collect();
    for (n, handle) in handles.iter().enumerate() {
        net.ask(n, *handle, 1, write_at(0, 0), block(5));
    }
    (0..bad).for_each(|n| net.servers[n].medium.rotten.push((key(n), 0)));
    (net, handles)
}

/// What fills the first block as a member serves it; `None` = it is bad.
fn first_block(net: &mut Net, n: usize, handle: HandleId, generation: u64) -> Option<u8> {
    let reply = net.ask(n, handle, generation, read_at(0), Bytes::new());
    (reply.body == ReplyBody::Data).then(|| reply.payload[0])
}

/// Copies that said that a bad page of theirs is good again.
fn repaired(net: &Net) -> Vec<CopyId> {
    net.rot.iter().filter(|rot| rot.bad == 0).map(|rot| rot.page.copy).collect()
}

#[test]
fn r12_what_the_next_member_has_bad_too_is_taken_from_the_one_after_it() {
    let (mut net, handles) = rotten(3, 2);
    assert_eq!(first_block(&mut net, 0, handles[0], 1), None);
    for (n, handle) in handles.into_iter().enumerate() {
        assert_eq!(first_block(&mut net, n, handle, 1), Some(5), "member {n}");
    }
    let mut told = repaired(&net);
    told.sort_unstable();
    assert_eq!(told, [CopyId(100), CopyId(101)]);
}

#[test]
fn r12_a_bad_block_that_was_known_before_the_start_is_repaired_when_it_is_read() {
    let (mut net, handles) = rotten(2, 1);
    net.cut = true;
    assert_eq!(first_block(&mut net, 0, handles[0], 1), None);
    for n in [0, 1] {
        net.restart(n);
    }
    net.cut = false;
    net.serve(net.map_with_boots(2, |_| {}));
    let handle = net.open(0, 2, 2);
    assert_eq!(first_block(&mut net, 0, handle, 2), None);
    assert_eq!(first_block(&mut net, 0, handle, 2), Some(5));
}

#[test]
fn r12_a_block_that_all_have_bad_is_not_called_repaired_and_not_asked_for_over_and_over() {
    let (mut net, handles) = rotten(2, 2);
    for _ in 0..3 {
        assert_eq!(first_block(&mut net, 0, handles[0], 1), None);
        net.advance(2_000);
    }
    assert_eq!(repaired(&net), []);
    assert!(net.servers.iter().all(|node| node.machine.pulls.is_empty()), "nobody is asked any more");
    assert_eq!(net.connected, 2, "each has asked the other once");
    for (n, handle) in handles.iter().enumerate() {
        assert_eq!(net.ask(n, *handle, 1, write_at(0, 0), block(6)).body, ReplyBody::Done);
    }
    assert_eq!(first_block(&mut net, 0, handles[0], 1), Some(6), "a write makes it good");
}

#[test]
fn r8_a_page_of_a_fill_that_found_no_room_is_asked_for_again() {
    let (mut net, _) = rejoining();
    net.servers[1].medium.full = true;
    net.cut = false;
    net.restart_pulls();
    net.advance(5_000);
    net.servers[1].medium.full = false;
    net.advance(2_000);
    assert!(bytes_of(&net, 1, 9) == bytes_of(&net, 0, 9));
    assert_eq!(net.fence(1, 5, vec![]).copies[0].unsynced, 0);
}

#[test]
fn r8_a_write_that_finds_no_room_even_in_the_reserve_changes_nothing_and_says_so() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.servers[0].medium.full = true;
    assert_eq!(net.ask(0, handle, 1, write_at(0, 0), block(1)).body, ReplyBody::NoSpace);
    assert_eq!(first_block(&mut net, 0, handle, 1), Some(0));
    net.servers[0].medium.full = false;
    assert_eq!(net.ask(0, handle, 1, write_at(0, 0), block(1)).body, ReplyBody::Done);
}

#[test]
fn h11c_the_flush_of_a_fill_that_broke_off_makes_nothing_durable_for_the_next_one() {
    let marks = |net: &Net| {
        let marks =
            |op: &&MediumOp| matches!(op, MediumOp::Commit(r) if r.iter().any(|r| matches!(r, Record::Cursor { .. })));
        net.servers[1].medium.log.iter().filter(marks).count()
    };
    let (mut net, _) = rejoining();
    net.servers[1].medium.hold_flushes = true;
    net.cut = false;
    net.restart_pulls();
    // Its source goes away while it waits for its flush; it begins again and waits for another one.
    net.restart_pulls();
    assert_eq!(marks(&net), 0);
    net.answer_flush(1);
    assert_eq!(marks(&net), 0, "what came after that flush was asked for is not durable by it");
    net.answer_flush(1);
    assert_eq!(marks(&net), 1);
}
