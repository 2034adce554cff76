//! The storage server's guarantees, on whole servers over a medium that answers at once.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::control::*;
use crate::ids::*;
use crate::layer::{BlockState, BlockStates};
use crate::map::*;
use crate::wire::*;
use bytes::Bytes;
use medium::*;

mod fills;
mod generations;
mod mends;
mod missed;
mod net;
mod openings;
mod opens;
mod rejoin;
mod repairs;
mod room;
mod survey;

use net::{Net, block};

const VOLUME: VolumeId = VolumeId(1);
const LAYER: LayerId = LayerId(2);
const SESSION: SessionId = SessionId(3);

fn read_at(offset: u32) -> RequestBody {
    RequestBody::Read { place: Place { layer: LAYER, group: 0, page: 0, offset, length: 4096 } }
}

fn write_at(page: u64, offset: u32) -> RequestBody {
    RequestBody::Write { place: Place { layer: LAYER, group: 0, page, offset, length: 4096 } }
}

#[test]
fn i3_a_written_block_reads_back_and_its_page_is_marked_first() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    assert_eq!(net.ask(0, handle, 1, write_at(0, 4096), block(7)).body, ReplyBody::Done);
    let ops = net.servers[0].medium.log.clone();
    let mark = ops
        .iter()
        .position(|op| matches!(op, MediumOp::Commit(r) if matches!(r[..], [Record::Pending { set: true, .. }])));
    let data = ops.iter().position(|op| matches!(op, MediumOp::Write { .. }));
    assert!(mark.unwrap() < data.unwrap(), "I3: the mark is durable before the data is handed in");
    assert_eq!(net.ask(0, handle, 1, read_at(4096), Bytes::new()).payload, block(7));
    assert_eq!(net.ask(0, handle, 1, read_at(0), Bytes::new()).payload, block(0), "what no layer holds is zeroes");
}

#[test]
fn i3_a_page_whose_mark_finds_no_room_is_not_written_and_can_be_later() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    (net.servers[0].medium.table_full, net.servers[0].medium.hold) = (true, true);
    // The second waits for the first on its page.
    net.send(0, handle, 1, write_at(0, 0), block(7));
    net.send(0, handle, 1, write_at(0, 0), block(8));
    net.run();
    net.servers[0].medium.hold = false;
    net.run();
    let refused = net.replies.iter().filter(|reply| reply.body == ReplyBody::NoSpace).count();
    assert_eq!(refused, 2, "{:?}", net.replies);
    assert!(!net.servers[0].medium.log.iter().any(|op| matches!(op, MediumOp::Write { .. })), "nothing was changed");
    net.servers[0].medium.table_full = false;
    assert_eq!(net.ask(0, handle, 1, write_at(0, 0), block(9)).body, ReplyBody::Done);
    assert_eq!(net.ask(0, handle, 1, read_at(0), Bytes::new()).payload, block(9));
    assert!(net.servers[0].medium.pages.values().all(|(record, _)| record.pending));
    net.fence(0, 2, vec![]);
}

#[test]
fn a_place_beyond_all_numbers_is_a_violation_like_any_other() {
    for page in [u64::MAX, u64::MAX / 65536, 1 << 40] {
        let mut net = Net::started(1);
        let handle = net.open(0, 1, 1);
        net.send(0, handle, 1, write_at(page, 0), block(7));
        net.run();
        assert_eq!(net.closed, [Violation::Place]);
    }
}

#[test]
fn a_discard_reads_as_zeroes() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(0, 0), block(7));
    let place = Place { layer: LAYER, group: 0, page: 0, offset: 0, length: 4096 };
    net.ask(0, handle, 1, RequestBody::Discard { place }, Bytes::new());
    assert_eq!(net.ask(0, handle, 1, read_at(0), Bytes::new()).payload, block(0));
}

#[test]
fn confirmed_clears_the_mark_and_nothing_before_it_does() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(0, 0), block(7));
    net.advance(10_000);
    assert_eq!(net.pending(0), 1);
    net.confirm(0, handle, 1, Seq(100));
    net.advance(10_000);
    assert_eq!(net.pending(0), 0);
}

#[test]
fn a_page_pending_at_the_start_is_never_cleared_by_confirmed() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(0, 0), block(7));
    net.restart(0);
    net.serve(net.map_with_boots(2, |_| {}));
    let handle = net.open(0, 2, 2);
    net.confirm(0, handle, 2, Seq(1000));
    net.advance(10_000);
    assert_eq!(net.pending(0), 1, "suspect until settled");
}

#[test]
fn adopted_writes_are_cleared_by_the_successor() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(0, 0), block(7));
    let handle = net.open_incarnation(0, 1, 2, 1);
    net.confirm(0, handle, 1, Seq(1000));
    net.advance(1_000);
    assert_eq!(net.pending(0), 1, "H4: never across incarnations");
    assert_eq!(
        net.ask(0, handle, 1, RequestBody::Adopt { incarnation: Incarnation(1) }, Bytes::new()).body,
        ReplyBody::Done
    );
    net.confirm(0, handle, 1, Seq(1001));
    net.advance(1_000);
    assert_eq!(net.pending(0), 0);
}

#[test]
fn a_successor_that_writes_nothing_leaves_nothing_pending() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(0, 0), block(7));
    let handle = net.open_incarnation(0, 1, 2, 1);
    net.ask(0, handle, 1, RequestBody::Adopt { incarnation: Incarnation(1) }, Bytes::new());
    net.advance(1_000);
    assert_eq!(net.pending(0), 0, "adopted after a flush, and no confirmed of its own ever follows");
}

#[test]
fn a_failing_device_with_a_write_under_way_is_no_panic() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.servers[0].medium.hold = true;
    net.send(0, handle, 1, write_at(0, 0), block(7));
    net.fail_device(0);
    assert_eq!(net.replies.pop().unwrap().body, ReplyBody::NotServing, "R3");
}

#[test]
fn an_open_that_was_ahead_gets_the_map_as_soon_as_it_is_stored() {
    let mut net = Net::started(1);
    assert_eq!(net.try_open(0, 2, Incarnation(1), OpenNumber(1)), ReplyBody::Behind { own: Generation(1) });
    net.serve(net.map_with_boots(2, |_| {}));
    assert_eq!(net.pushed, [Generation(2)]);
}

#[test]
fn a_fence_that_meets_a_failing_device_is_answered_and_the_next_one_too() {
    let mut net = Net::started(1);
    net.servers[0].medium.hold = true;
    let call = net.control_later(
        0,
        ControlRequest::Fence(Fence { volume: VOLUME, generation: Generation(2), flush: true, unsync: vec![] }),
    );
    net.run();
    net.fail_device(0);
    net.run();
    assert_eq!(net.answers[&call], ControlReply::DeviceClosed, "R3: nothing about it can be promised");
    net.servers[0].medium.hold = false;
    net.restart_device(0);
    let promised = net.fence(0, 3, vec![]);
    assert_eq!(promised.generation, Generation(3));
}

#[test]
fn a_lower_handle_is_dead_once_a_higher_one_is_open() {
    let mut net = Net::started(1);
    let old = net.open(0, 1, 1);
    let new = net.open(0, 1, 2);
    let reply = net.ask(0, old, 1, write_at(0, 0), block(7));
    assert_eq!(reply.body, ReplyBody::Superseded { highest: Incarnation(1) });
    assert_eq!(net.ask(0, new, 1, read_at(0), Bytes::new()).payload, block(0), "H1: the old write never lands");
    let refused = net.try_open(0, 1, Incarnation(1), OpenNumber(2));
    assert_eq!(refused, ReplyBody::OpenRefused { highest: OpenNumber(2) }, "R7");
}

#[test]
fn an_older_incarnation_is_refused_also_after_a_restart() {
    let mut net = Net::started(1);
    net.open_incarnation(0, 1, 5, 1);
    let refused = net.try_open(0, 1, Incarnation(4), OpenNumber(9));
    assert_eq!(refused, ReplyBody::Superseded { highest: Incarnation(5) });
    net.restart(0);
    let refused = net.try_open(0, 1, Incarnation(4), OpenNumber(9));
    assert_eq!(refused, ReplyBody::Superseded { highest: Incarnation(5) }, "H20: durable");
}

#[test]
fn an_open_waits_for_what_the_lower_handle_has_under_way() {
    let mut net = Net::started(1);
    let old = net.open(0, 1, 1);
    net.servers[0].medium.hold = true;
    net.send(0, old, 1, write_at(0, 0), block(7));
    net.send_open(0, 1, Incarnation(1), OpenNumber(2));
    net.run();
    assert!(!net.replies.iter().any(|r| matches!(r.body, ReplyBody::Opened { .. })), "the write still executes");
    net.servers[0].medium.hold = false;
    net.run();
    let opened = net.replies.iter().position(|r| matches!(r.body, ReplyBody::Opened { .. }));
    let done = net.replies.iter().position(|r| r.body == ReplyBody::Done);
    assert!(done.unwrap() < opened.unwrap());
}

#[test]
fn a_fence_is_answered_after_what_was_admitted_and_nothing_more_is() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.servers[0].medium.hold = true;
    net.send(0, handle, 1, write_at(0, 0), block(7));
    let call = net.control_later(
        0,
        ControlRequest::Fence(Fence { volume: VOLUME, generation: Generation(2), flush: true, unsync: vec![] }),
    );
    net.run();
    assert!(!net.answers.contains_key(&call), "H19: the write is under way");
    net.send(0, handle, 1, write_at(0, 4096), block(8));
    net.servers[0].medium.hold = false;
    net.run();
    assert!(matches!(net.answers[&call], ControlReply::Promised(_)));
    assert!(net.replies.iter().any(|r| matches!(r.body, ReplyBody::Stale { wait_for: Generation(2) })), "I1");
    assert!(net.replies.iter().any(|r| r.body == ReplyBody::Done));
}

#[test]
fn a_restarted_member_does_not_serve_under_its_old_boot_id() {
    let mut net = Net::started(1);
    net.restart(0);
    let handle = net.open(0, 1, 1);
    assert_eq!(net.ask(0, handle, 1, read_at(0), Bytes::new()).body, ReplyBody::NotServing, "H2");
    assert_eq!(net.ask(0, handle, 1, RequestBody::Flush, Bytes::new()).body, ReplyBody::NotServing);
    assert_eq!(net.ask(0, handle, 1, RequestBody::Ping, Bytes::new()).body, ReplyBody::NotServing);
}

#[test]
fn a_failed_device_answers_not_serving_and_never_success() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.servers[0].medium.hold = true;
    net.send(0, handle, 1, write_at(0, 0), block(7));
    net.send(0, handle, 1, RequestBody::Flush, Bytes::new());
    net.fail_device(0);
    assert!(net.replies.iter().rev().take(2).all(|r| r.body == ReplyBody::NotServing), "R3: {:?}", net.replies);
    let reply = net.control(
        0,
        ControlRequest::Fence(Fence { volume: VOLUME, generation: Generation(2), flush: false, unsync: vec![] }),
    );
    assert_eq!(reply, ControlReply::DeviceClosed);
}

#[test]
fn a_blank_device_in_place_of_a_used_one_answers_no_copy_never_zeroes() {
    let mut net = Net::started(1);
    net.replace_by_blank(0);
    assert_eq!(net.try_open(0, 1, Incarnation(1), OpenNumber(1)), ReplyBody::NoCopy);
    let reply = net.control(
        0,
        ControlRequest::Fence(Fence { volume: VOLUME, generation: Generation(2), flush: false, unsync: vec![] }),
    );
    assert!(matches!(reply, ControlReply::NoCopy { .. }));
}

#[test]
fn i2_promise_and_stored_generation_never_go_down() {
    let mut net = Net::started(1);
    let fence =
        |g| ControlRequest::Fence(Fence { volume: VOLUME, generation: Generation(g), flush: false, unsync: vec![] });
    assert!(matches!(net.control(0, fence(7)), ControlReply::Promised(_)));
    let refused = ControlReply::Refused { promised: Generation(7), stored: Generation(1) };
    assert_eq!(net.control(0, fence(6)), refused, "I2");
    net.restart(0);
    assert_eq!(net.control(0, fence(6)), refused, "I2, restarts included");
    assert!(matches!(net.control(0, fence(7)), ControlReply::Promised(_)), "the same plan again: its reply was lost");
    let old = net.map_with_boots(3, |_| {});
    assert_eq!(net.control(0, ControlRequest::Serve { map: old }), refused, "a deposed leader's map");
}

#[test]
fn a_copy_that_the_map_lists_is_not_deleted_by_an_old_order() {
    let mut net = Net::started(1);
    let delete = |g| ControlRequest::DeleteCopy { volume: VOLUME, copy: CopyId(100), generation: Generation(g) };
    assert!(matches!(net.control(0, delete(1)), ControlReply::Refused { .. }));
    assert_eq!(net.control(0, delete(2)), ControlReply::Done);
    assert_eq!(net.control(0, delete(2)), ControlReply::NoCopy { copy: CopyId(100) });
    assert_eq!(net.control(0, ControlRequest::Inventory), ControlReply::Inventory { copies: vec![] });
}

#[test]
fn a_window_overrun_and_a_nonsense_place_close_the_connection() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    let nonsense = RequestBody::Read { place: Place { layer: LAYER, group: 0, page: 0, offset: 1, length: 4096 } };
    net.send(0, handle, 1, nonsense, Bytes::new());
    net.run();
    assert_eq!(net.closed, [Violation::Place]);
    let handle = net.open(0, 1, 2);
    net.servers[0].medium.hold = true;
    for _ in 0..=crate::limits::WINDOW_REQUESTS {
        net.send(0, handle, 1, read_at(0), Bytes::new());
    }
    net.run();
    assert_eq!(net.closed, [Violation::Place, Violation::Window]);
}

#[test]
fn r8_there_is_always_room_for_a_page_that_is_allocated_also_if_nobody_remembers_it() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(5, 0), block(1));
    net.servers[0].medium.free = 0;
    net.restart(0);
    net.serve(net.map_with_boots(2, |_| {}));
    let handle = net.open(0, 2, 2);
    let mut reserve = |pages: &[u64]| {
        let pages = pages.iter().map(|page| (LAYER, (0, *page))).collect();
        net.ask(0, handle, 2, RequestBody::Reserve { pages }, Bytes::new()).body
    };
    assert_eq!(reserve(&[5]), ReplyBody::Done, "it takes no more room");
    assert_eq!(reserve(&[5, 6]), ReplyBody::NoSpace);
    assert_eq!(reserve(&[6]), ReplyBody::NoSpace);
}

#[test]
fn enospc_comes_only_from_reserve_and_leaves_nothing() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.servers[0].medium.free = 0;
    net.ask(0, handle, 1, read_at(0), Bytes::new());
    let reserve = RequestBody::Reserve { pages: vec![(LAYER, (0, 5))] };
    assert_eq!(net.ask(0, handle, 1, reserve.clone(), Bytes::new()).body, ReplyBody::NoSpace);
    net.servers[0].medium.free = 1 << 30;
    net.ask(0, handle, 1, write_at(1, 0), block(1));
    let reply = net.ask(0, handle, 1, reserve, Bytes::new());
    assert_eq!(reply.body, ReplyBody::Done);
    assert!(reply.header.credit > 0);
}

#[test]
fn m2_nothing_is_served_under_a_map_before_it_is_durable() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    let map = net.map_with_boots(2, |_| {});
    net.servers[0].medium.hold = true;
    let call = net.control_later(0, ControlRequest::Serve { map: map.clone() });
    net.run();
    let behind = ReplyBody::Behind { own: Generation(1) };
    net.send(0, handle, 2, write_at(0, 0), block(7));
    net.run();
    assert_eq!(net.replies.pop().unwrap().body, behind, "the map is on its way to the device");
    assert_eq!(net.try_open(0, 2, Incarnation(1), OpenNumber(9)), behind);
    net.servers[0].medium.hold = false;
    net.run();
    assert_eq!(net.answers[&call], ControlReply::Done);
    assert_eq!(net.pushed, [Generation(2), Generation(2)], "to the open handle, and to whoever was ahead");
    assert_eq!(net.ask(0, handle, 2, write_at(0, 0), block(7)).body, ReplyBody::Done);
}

/// Found by fio on full disks: writes side by side asked for room for the same pages, and each time that counted as credit.
#[test]
fn r8_credit_and_reservations_together_never_promise_more_room_than_there_is() {
    const ROOM: u64 = 8;
    const PAGES: u64 = 16;
    let mut net = Net::started(1);
    let reserve = (1 << 30) / crate::limits::SPACE_RESERVE_DIVISOR;
    net.servers[0].medium.free = reserve + ROOM * 65536;
    let handle = net.open(0, 1, 1);
    let mut credit = net.ask(0, handle, 1, read_at(0), Bytes::new()).header.credit;
    let (mut spent, mut page) = (0, 0);
    // Much at once, and the disk is slow: what is free shows what was taken only late.
    for _ in 0..6 {
        net.servers[0].medium.hold = true;
        while spent < credit && page < PAGES {
            net.send(0, handle, 1, write_at(page, 0), block(1));
            (spent, page) = (spent + 1, page + 1);
        }
        let reserved = page..PAGES.min(page + 3);
        page = reserved.end;
        for page in reserved {
            let twice = RequestBody::Reserve { pages: vec![(LAYER, (0, page))] };
            net.send(0, handle, 1, twice.clone(), Bytes::new());
            net.send(0, handle, 1, twice, Bytes::new());
        }
        net.run();
        net.servers[0].medium.hold = false;
        net.run();
        credit = net.replies.drain(..).map(|reply| reply.header.credit).max().unwrap_or(credit);
    }
    let left = net.servers[0].medium.free;
    assert!(left >= reserve, "{} pages of the reserve were promised", (reserve - left) / 65536);
    assert!(left < reserve + 65536 * ROOM / 2, "most of the room can be had");
    let ControlReply::Alive(alive) = net.control(0, ControlRequest::Heartbeat { lease_number: 1 }) else { panic!() };
    assert!(alive.devices[0].free_bytes <= reserve, "the leader hears that pages are refused");
}
