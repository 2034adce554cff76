//! Rejoin by difference: lists under the fence (PROTOCOL.md §5.9; H7, M4, H2).

use super::*;

fn member(map: &mut VolumeMap, n: usize) -> &mut Member {
    &mut map.placements[0].groups[0].members[n]
}

fn record(net: &Net, n: usize, page: u64) -> PageRecord {
    let key = PageKey { copy: CopyId(100 + n as u128), layer: LAYER, page };
    net.servers[n].medium.pages[&key].0.clone()
}

fn list(net: &mut Net, n: usize, generation: u64, from: u64) -> ControlReply {
    let (copy, boot) = (CopyId(100 + n as u128), net.servers[n].boot);
    let generation = Generation(generation);
    net.control(n, ControlRequest::ListSuspects { volume: VOLUME, generation, copy, boot, towards: 1, from })
}

fn give(net: &mut Net, generation: u64, list: PageList) -> ControlReply {
    let rejoin = Rejoin { volume: VOLUME, generation: Generation(generation), copy: CopyId(101), source: 0, list };
    net.control(1, ControlRequest::Rejoin(rejoin))
}

fn nothing(from: u64, next: u64) -> PageList {
    PageList { layer: LAYER, from, first: from, bits: Bytes::new(), next }
}

/// Serves a map in which server 1 is in this state.
fn serve(net: &mut Net, generation: u64, state: MemberState) {
    net.serve(net.map_with_boots(generation, |map| member(map, 1).state = state));
}

/// A new handle.
fn open(net: &mut Net, n: usize, generation: u64) -> HandleId {
    let number = net.fresh();
    net.open(n, generation, number)
}

/// Writes, and has it confirmed at both where it is sent to both.
fn write(net: &mut Net, servers: &[usize], generation: u64, page: u64, byte: u8) {
    for &n in servers {
        let handle = open(net, n, generation);
        let token = net.ask(n, handle, generation, write_at(page, 0), block(byte)).header.token;
        net.confirm(n, handle, generation, token);
    }
    net.advance(1_000);
}

/// Pages 0 to 3 are the same on both; page 1 is written while server 1 is away, page 2 lies there only.
fn away() -> Net {
    let mut net = Net::started(2);
    for page in 0..4 {
        write(&mut net, &[0, 1], 1, page, 7);
    }
    let handle = open(&mut net, 1, 1);
    net.ask(1, handle, 1, write_at(2, 4096), block(9));
    net.restart(1);
    net.fence(0, 2, vec![]);
    serve(&mut net, 2, MemberState::Failed);
    write(&mut net, &[0], 2, 1, 8);
    net
}

/// The list under generation 3, as the source gives it.
fn listed(net: &mut Net) -> PageList {
    net.fence(0, 3, vec![]);
    net.fence(1, 3, vec![]);
    match list(net, 0, 3, 0) {
        ControlReply::Suspects(list) => list,
        other => panic!("{other:?}"),
    }
}

fn promised(reply: ControlReply) -> CopyReport {
    match reply {
        ControlReply::Promised(promised) => promised.copies[0].clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_member_that_returns_fills_what_either_of_the_two_calls_suspect_and_no_more() {
    let mut net = away();
    let list = listed(&mut net);
    assert_eq!((list.pages().collect::<Vec<_>>(), list.next), (vec![1], u64::MAX), "what it missed");
    let report = promised(give(&mut net, 3, list));
    assert_eq!((report.unsynced, report.listed), (2, true), "and page 2, which is pending on itself");
    assert_eq!(record(&net, 1, 0).blocks.of(0), BlockState::Present, "the rest is as it was");
    assert_eq!([1, 2].map(|page| record(&net, 1, page).blocks.of(0)), [BlockState::Stale; 2], "H7");
    let before = net.servers[0].medium.log.len();
    serve(&mut net, 3, MemberState::Syncing);
    net.advance(2_000);
    assert_eq!(net.fence(1, 4, vec![]).copies[0].unsynced, 0, "I7");
    let read = net.servers[0].medium.log[before..].iter().filter(|op| matches!(op, MediumOp::Read { .. })).count();
    assert_eq!(read, 2, "two pages were moved");
    for page in 0..4 {
        let blocks = |n| record(&net, n, page).blocks;
        assert_eq!(blocks(0), blocks(1), "page {page}");
    }
}

#[test]
fn a_source_lists_only_under_the_very_fence_that_it_has_answered() {
    let mut net = away();
    assert!(matches!(list(&mut net, 0, 3, 0), ControlReply::Refused { .. }), "not fenced yet");
    net.fence(0, 3, vec![]);
    assert!(matches!(list(&mut net, 0, 3, 0), ControlReply::Suspects(_)));
    assert!(matches!(list(&mut net, 0, 2, 0), ControlReply::Refused { .. }), "an older change");
    net.fence(0, 4, vec![]);
    assert!(matches!(list(&mut net, 0, 3, 0), ControlReply::Refused { .. }), "a later one has begun");
    let (generation, copy) = (Generation(4), CopyId(100));
    let other = ControlRequest::ListSuspects { volume: VOLUME, generation, copy, boot: BootId(5), towards: 1, from: 0 };
    assert_eq!(net.control(0, other), ControlReply::DeviceClosed, "another opening");
    serve(&mut net, 4, MemberState::Failed);
    assert!(matches!(list(&mut net, 0, 4, 0), ControlReply::Refused { .. }), "the change is over");
}

#[test]
fn a_member_is_not_listed_before_the_last_piece_and_never_by_pieces_with_a_gap() {
    let mut net = away();
    let whole = listed(&mut net);
    assert!(
        matches!(give(&mut net, 3, nothing(5, u64::MAX)), ControlReply::Refused { .. }),
        "the beginning is missing"
    );
    assert_eq!(give(&mut net, 3, PageList { next: 8, ..whole }), ControlReply::Done);
    assert!(!net.fence(1, 3, vec![]).copies[0].listed);
    assert!(matches!(give(&mut net, 3, nothing(9, u64::MAX)), ControlReply::Refused { .. }));
    assert!(promised(give(&mut net, 3, nothing(8, u64::MAX))).listed);
    assert!(!net.fence(1, 4, vec![]).copies[0].listed, "a list counts for its own generation only");
}

#[test]
fn what_is_pending_at_the_source_is_on_its_list() {
    let mut net = away();
    let handle = open(&mut net, 0, 2);
    net.ask(0, handle, 2, write_at(3, 0), block(6));
    assert_eq!(listed(&mut net).pages().collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn h7_a_page_that_is_unsynced_already_is_marked_again() {
    let mut net = away();
    let list = listed(&mut net);
    give(&mut net, 3, list);
    net.cut = true;
    serve(&mut net, 3, MemberState::Syncing);
    let handle = open(&mut net, 1, 3);
    net.ask(1, handle, 3, write_at(1, 8192), block(5));
    assert_eq!(record(&net, 1, 1).blocks.of(2), BlockState::Present);
    net.restart(1);
    net.fence(0, 4, vec![]);
    serve(&mut net, 4, MemberState::Failed);
    net.fence(0, 5, vec![]);
    net.fence(1, 5, vec![]);
    let ControlReply::Suspects(list) = super::rejoin::list(&mut net, 0, 5, 0) else { panic!("fenced") };
    assert_eq!(promised(give(&mut net, 5, list)).unsynced, 2);
    assert_eq!(record(&net, 1, 1).blocks.of(2), BlockState::Stale);
    assert!(!record(&net, 1, 1).pending, "no block of it counts any more");
}

#[test]
fn a_fill_of_a_whole_copy_goes_on_at_its_cursor_and_what_became_suspect_is_marked_beside_it() {
    let mut net = Net::started(2);
    for page in 0..10 {
        write(&mut net, &[0], 1, page, 7);
    }
    net.fence(0, 2, vec![]);
    net.fence(1, 2, vec![CopyId(101)]);
    serve(&mut net, 2, MemberState::Syncing);
    let cursor = |net: &Net| net.servers[1].medium.copies[&CopyId(101)].layers[0].cursor;
    // As if it had died after four pages.
    net.servers[1].medium.copies.get_mut(&CopyId(101)).unwrap().layers[0].cursor = 4;
    net.restart(1);
    net.fence(0, 3, vec![]);
    serve(&mut net, 3, MemberState::Failed);
    write(&mut net, &[0], 3, 2, 8);
    net.fence(0, 4, vec![]);
    net.fence(1, 4, vec![]);
    let ControlReply::Suspects(list) = super::rejoin::list(&mut net, 0, 4, 0) else { panic!("fenced") };
    let report = promised(give(&mut net, 4, list));
    assert_eq!((report.unsynced, cursor(&net)), (12 + 1, 4), "12 of 16 pages from the cursor on, and page 2");
    serve(&mut net, 4, MemberState::Syncing);
    net.advance(2_000);
    assert_eq!(net.fence(1, 5, vec![]).copies[0].unsynced, 0);
    assert_eq!(record(&net, 1, 2).blocks, record(&net, 0, 2).blocks);
}
