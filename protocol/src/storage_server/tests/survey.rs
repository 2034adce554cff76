//! Which pages were ever written: what a member says of its own, and who may say it (Blank).

use super::*;
use crate::limits::WRITTEN_PAGES;

fn written(net: &mut Net, handle: HandleId, from: u64) -> ReplyBody {
    net.ask(0, handle, 1, RequestBody::Written { layer: LAYER, group: 0, from }, Bytes::new()).body
}

fn list(pages: &[u64]) -> ReplyBody {
    ReplyBody::Written { pages: pages.to_vec(), next: u64::MAX }
}

#[test]
fn a_page_counts_as_written_from_its_first_block_on_and_stays_so_when_discarded() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    assert_eq!(written(&mut net, handle, 0), list(&[]));
    net.ask(0, handle, 1, read_at(0), Bytes::new());
    assert_eq!(written(&mut net, handle, 0), list(&[]), "a read writes nothing");
    net.ask(0, handle, 1, write_at(3, 8192), block(7));
    net.ask(0, handle, 1, write_at(9, 0), block(7));
    assert_eq!(written(&mut net, handle, 0), list(&[3, 9]));
    assert_eq!(written(&mut net, handle, 4), list(&[9]));
    let place = Place { layer: LAYER, group: 0, page: 9, offset: 0, length: 4096 };
    net.ask(0, handle, 1, RequestBody::Discard { place }, Bytes::new());
    assert_eq!(written(&mut net, handle, 0), list(&[3, 9]), "a hole was written");
}

#[test]
fn a_reserved_page_and_a_mark_alone_are_not_written() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    let pages = vec![(LAYER, (0, 2))];
    assert_eq!(net.ask(0, handle, 1, RequestBody::Reserve { pages }, Bytes::new()).body, ReplyBody::Done);
    assert_eq!(written(&mut net, handle, 0), list(&[]));
}

#[test]
fn a_stale_block_was_written() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(0, 0), block(7));
    let page = *net.servers[0].medium.pages.keys().next().unwrap();
    net.servers[0].medium.rotten.push((page, 0));
    assert!(matches!(net.ask(0, handle, 1, read_at(0), Bytes::new()).body, ReplyBody::BadBlock { .. }));
    assert_eq!(written(&mut net, handle, 0), list(&[0]), "its content is lost, not absent");
}

#[test]
fn one_request_costs_a_bounded_walk_and_says_where_to_go_on() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    let copy = CopyId(100);
    for page in 0..WRITTEN_PAGES as u64 + 3 {
        let key = PageKey { copy, layer: LAYER, page };
        let blocks = BlockStates::absent(16);
        let record = PageRecord { allocated: false, blocks, unsynced: false, pending: true, missed: 0 };
        net.servers[0].medium.pages.insert(key, (record, vec![0; 65536]));
    }
    let reply = written(&mut net, handle, 0);
    assert_eq!(reply, ReplyBody::Written { pages: vec![], next: WRITTEN_PAGES as u64 });
    assert_eq!(written(&mut net, handle, WRITTEN_PAGES as u64), list(&[]));
}

#[test]
fn only_a_member_that_would_serve_a_read_says_what_was_written() {
    let mut net = Net::started(2);
    let handle = net.open(0, 1, 1);
    let syncing = net.map_with_boots(2, |map| {
        map.placements[0].groups[0].members[0].state = MemberState::Syncing;
    });
    net.serve(syncing);
    let body = RequestBody::Written { layer: LAYER, group: 0, from: 0 };
    assert_eq!(net.ask(0, handle, 2, body.clone(), Bytes::new()).body, ReplyBody::NotServing);
    net.serve(net.map_with_boots(3, |_| {}));
    net.fence(0, 4, vec![]);
    assert_eq!(net.ask(0, handle, 3, body, Bytes::new()).body, ReplyBody::Stale { wait_for: Generation(4) });
    let other = RequestBody::Written { layer: LayerId(99), group: 0, from: 0 };
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    assert_eq!(net.ask(0, handle, 1, other, Bytes::new()).body, ReplyBody::NoCopy);
}

#[test]
fn a_survey_under_way_holds_up_the_fence_and_ends_with_its_device() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.servers[0].medium.hold = true;
    net.send(0, handle, 1, RequestBody::Written { layer: LAYER, group: 0, from: 0 }, Bytes::new());
    net.run();
    let fence = Fence { volume: VOLUME, generation: Generation(2), flush: false, unsync: vec![] };
    let call = net.control_later(0, ControlRequest::Fence(fence));
    net.run();
    assert!(!net.answers.contains_key(&call), "H19: the reply tells the state after every request");
    net.fail_device(0);
    assert_eq!(net.replies.pop().unwrap().body, ReplyBody::NotServing, "R3");
    net.servers[0].medium.hold = false;
    net.run();
    assert!(net.replies.is_empty());
}

#[test]
fn a_group_that_is_none_breaks_the_protocol() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.send(0, handle, 1, RequestBody::Written { layer: LAYER, group: 7, from: 0 }, Bytes::new());
    net.run();
    assert_eq!(net.closed, [Violation::Place]);
}
