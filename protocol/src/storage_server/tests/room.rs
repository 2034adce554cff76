//! Slots that a `Reserve` made and no write took (R8): free again when they are given back, or their session is out.

use super::*;

const PAGE: u64 = 65536;

fn named(pages: &[u64]) -> Vec<(LayerId, (u32, u64))> {
    pages.iter().map(|page| (LAYER, (0, *page))).collect()
}

fn reserve(pages: &[u64]) -> RequestBody {
    RequestBody::Reserve { pages: named(pages) }
}

#[test]
fn r8_what_was_reserved_and_given_back_is_free_again_and_what_was_written_stays() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(1, 0), block(1));
    let before = net.servers[0].medium.free;
    assert_eq!(net.ask(0, handle, 1, reserve(&[1, 5, 6, 7]), Bytes::new()).body, ReplyBody::Done);
    assert_eq!(before - net.servers[0].medium.free, 3 * PAGE);
    net.ask(0, handle, 1, write_at(6, 0), block(2));
    let release = RequestBody::Release { pages: named(&[1, 5, 6, 7]) };
    assert_eq!(net.ask(0, handle, 1, release.clone(), Bytes::new()).body, ReplyBody::Done);
    assert_eq!(before - net.servers[0].medium.free, PAGE, "the page that was written");
    let read = RequestBody::Read { place: Place { layer: LAYER, group: 0, page: 6, offset: 0, length: 4096 } };
    assert_eq!(net.ask(0, handle, 1, read, Bytes::new()).payload, block(2));
    assert_eq!(net.ask(0, handle, 1, release, Bytes::new()).body, ReplyBody::Done, "twice");
    assert_eq!(net.ask(0, handle, 1, reserve(&[5]), Bytes::new()).body, ReplyBody::Done);
    assert_eq!(before - net.servers[0].medium.free, 2 * PAGE, "it is there when it is asked for again");
}

#[test]
fn r8_a_session_that_is_out_of_the_map_keeps_nothing_reserved() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    let before = net.servers[0].medium.free;
    assert_eq!(net.ask(0, handle, 1, reserve(&[5, 6]), Bytes::new()).body, ReplyBody::Done);
    net.serve(net.map_with_boots(2, |_| {}));
    assert_eq!(before - net.servers[0].medium.free, 2 * PAGE, "another map, the same session");
    net.serve(net.map_with_boots(3, |map| map.sessions.clear()));
    assert_eq!(net.servers[0].medium.free, before);
}
