//! Reads: whom they ask, the read lease, bad blocks (R5, R12).

use super::bench::*;
use crate::driver::{Input, OpError};
use crate::ids::Generation;
use crate::limits::READ_LEASE_MS;
use crate::wire::{ReplyBody, RequestBody};
use bytes::Bytes;

fn is_read(body: &RequestBody) -> bool {
    matches!(body, RequestBody::Read { .. })
}

fn is_ping(body: &RequestBody) -> bool {
    matches!(body, RequestBody::Ping)
}

#[test]
fn a_syncing_member_is_never_read_and_an_avoided_one_last() {
    let mut layout = map(1, &[&[(1, Syncing), (2, Active), (3, Active)]]);
    layout.placements[0].groups[0].members[1].avoid = true;
    let mut bench = Bench::serving(layout);
    bench.read(1, 0, 4096);
    assert_eq!(bench.flying.iter().filter(|f| is_read(&f.frame.body)).map(|f| f.server).collect::<Vec<_>>(), [3]);
    bench.serve_all();
    assert_eq!(bench.result(1), Some(Ok(Bytes::from(vec![3; 4096]))));
}

/// R5: {node A, m1} cut off from {m0, operator, node B}; A's pod must not read old data from m1.
#[test]
fn a_read_is_handed_over_only_while_every_active_member_has_served_lately() {
    let mut bench = Bench::serving(pair(1));
    bench.read(1, 0, 4096);
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["read"], vec!["ping"]), "the ping goes beside the read");
    let read = bench.take(1, is_read).unwrap();
    bench.serve(&read);
    assert!(!bench.is_done(1), "m1 has not said a word");
    let ping = bench.take(2, is_ping).unwrap();
    bench.serve(&ping);
    assert!(bench.is_done(1));
    bench.read(2, 0, 4096);
    assert!(bench.under_way(2).is_empty(), "its word still holds");
    bench.serve_all();
    assert!(bench.is_done(2));
}

/// M7: a reply delayed for long renews nothing: what counts is when the request was sent.
#[test]
fn a_late_reply_does_not_renew_the_read_lease() {
    let mut bench = Bench::serving(pair(1));
    bench.read(1, 0, 4096);
    let (read, ping) = (bench.take(1, is_read).unwrap(), bench.take(2, is_ping).unwrap());
    bench.now = bench.now.after(READ_LEASE_MS);
    bench.serve(&ping);
    bench.serve(&read);
    assert!(!bench.is_done(1));
    bench.serve_all();
    assert!(bench.is_done(1), "fresh pings are answered");
}

#[test]
fn what_a_member_served_at_an_older_generation_is_no_lease() {
    let mut bench = Bench::serving(pair(1));
    bench.read(1, 0, 4096);
    bench.serve_all();
    bench.input(Input::Map(pair(2)));
    bench.read(2, 0, 4096);
    let read = bench.take(1, is_read).unwrap();
    bench.serve(&read);
    assert!(!bench.is_done(2));
    bench.serve_all();
    assert!(bench.is_done(2));
}

#[test]
fn the_lease_is_needed_in_every_group_that_the_read_touched() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active), (2, Active)], &[(3, Active), (4, Active)]]));
    bench.read(1, PAGE - 4096, 8192);
    for (server, fits) in [(1, is_read as fn(&RequestBody) -> bool), (2, is_ping), (3, is_read)] {
        let frame = bench.take(server, fits).unwrap();
        bench.serve(&frame);
    }
    assert!(!bench.is_done(1));
    bench.serve_all();
    let mut expected = vec![1; 4096];
    expected.extend(vec![3; 4096]);
    assert_eq!(bench.result(1), Some(Ok(Bytes::from(expected))));
}

#[test]
fn a_refused_ping_is_not_repeated_before_a_newer_map() {
    let mut bench = Bench::serving(pair(1));
    bench.read(1, 0, 4096);
    let ping = bench.take(2, is_ping).unwrap();
    bench.reply(&ping, ReplyBody::Stale { wait_for: Generation(2) });
    bench.serve_all();
    assert!(!bench.is_done(1) && bench.flying.is_empty());
    bench.input(Input::Map(map(2, &[&[(1, Active)]])));
    bench.serve_all();
    assert!(bench.is_done(1));
}

#[test]
fn a_read_whose_connection_breaks_goes_to_another_member() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    bench.serve_all();
    bench.read(2, 0, 4096);
    bench.cut(1, true);
    let read = bench.take(2, is_read).expect("the other Active member is asked at once");
    bench.serve(&read);
    assert_eq!(bench.result(2), Some(Ok(Bytes::from(vec![2; 4096]))), "m0's word of before holds");
}

/// R12: bad blocks come from the next member; EIO only if none has them.
#[test]
fn bad_blocks_are_read_from_the_next_member() {
    let mut bench = Bench::serving(pair(1));
    bench.read(1, 0, 3 * 4096);
    let read = bench.take(1, is_read).unwrap();
    bench.reply_with(&read, ReplyBody::BadBlock { blocks: vec![1] }, Bytes::from(vec![1; 3 * 4096]));
    let next = bench.take(2, is_read).unwrap();
    bench.reply_with(&next, ReplyBody::BadBlock { blocks: vec![0] }, Bytes::from(vec![2; 3 * 4096]));
    bench.serve_all();
    let mut expected = vec![1; 4096];
    expected.extend(vec![2; 4096]);
    expected.extend(vec![1; 4096]);
    assert_eq!(bench.result(1), Some(Ok(Bytes::from(expected))));
}

#[test]
fn a_block_that_no_member_has_fails_that_read_only() {
    let mut bench = Bench::serving(pair(1));
    bench.read(1, 0, 4096);
    for server in [1, 2] {
        let read = bench.take(server, is_read).unwrap();
        bench.reply_with(&read, ReplyBody::BadBlock { blocks: vec![0] }, Bytes::from(vec![0; 4096]));
    }
    assert_eq!(bench.result(1), Some(Err(OpError::Io)));
    bench.serve_all();
    bench.write(2, 0, 4096);
    bench.serve_all();
    assert_eq!(bench.result(2), Some(Ok(Bytes::new())), "the session lives");
}

#[test]
fn a_group_without_an_active_member_serves_nothing() {
    let mut bench = Bench::serving(pair(1));
    bench.input(Input::Map(map(2, &[&[(1, Failed), (2, Syncing)]])));
    bench.read(1, 0, 4096);
    bench.write(2, 0, 4096);
    bench.serve_all();
    assert!(bench.done.is_empty());
    bench.input(Input::Map(map(3, &[&[(1, Failed), (2, Active)]])));
    bench.serve_all();
    assert!(bench.is_done(1) && bench.is_done(2));
}

/// The disk of member 2 hangs; its server answers what needs no disk.
#[test]
fn pings_are_no_progress_with_a_member_that_answers_nothing_else() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let first = bench.take_write(1);
    bench.serve(&first);
    let stuck = bench.take_write(2);
    for tag in 10..20 {
        bench.read(tag, PAGE, 4096);
        while let Some(at) = bench.flying.iter().position(|f| is_read(&f.frame.body) || is_ping(&f.frame.body)) {
            let next = bench.flying.remove(at);
            bench.serve(&next);
        }
        assert!(bench.is_done(tag), "reads go on");
        bench.wait(700);
    }
    assert_eq!(bench.reports, [(2, crate::control::Trouble::Stalled)]);
    bench.serve(&stuck);
    assert!(bench.is_done(1));
}
