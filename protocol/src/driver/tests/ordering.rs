//! The order of overlapping requests (PROTOCOL.md §4, Requests).

use super::bench::*;
use crate::driver::{Input, Op};
use crate::wire::Start;
use bytes::Bytes;

#[test]
fn overlapping_writes_are_serialised_and_others_are_not() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)]]));
    bench.write(1, 0, 8192);
    bench.write(2, 4096, 8192);
    bench.write(3, 16384, 4096);
    assert_eq!(bench.under_way(1), ["write", "write"]);
    let first = bench.take_write(1);
    bench.serve(&first);
    assert_eq!(bench.under_way(1), ["write", "write"], "the overlapping one follows");
    bench.serve_all();
    assert_eq!(bench.done.len(), 3);
}

#[test]
fn a_read_waits_for_an_overlapping_write_even_if_it_is_restarted() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)]]));
    bench.write(1, 0, 4096);
    bench.read(2, 0, 8192);
    bench.flying.clear();
    bench.input(Input::Map(map(2, &[&[(1, Active)]])));
    assert_eq!(bench.under_way(1), ["write"]);
    bench.serve_all();
    assert_eq!(bench.done.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn a_discard_orders_like_a_write() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)]]));
    bench.submit(1, Op::Discard { address: 0, length: PAGE });
    bench.write(2, 4096, 4096);
    bench.read(3, 0, 4096);
    assert_eq!(bench.under_way(1), ["discard"]);
    bench.serve_all();
    assert_eq!(bench.done.len(), 3);
    assert_eq!(bench.result(2), Some(Ok(Bytes::new())));
}

#[test]
fn requests_of_no_length_are_answered_without_a_word() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)]]));
    bench.write(1, 0, 0);
    assert!(bench.is_done(1) && bench.flying.is_empty());
}

/// Found by the simulator: the process before had the write on one member; its successor, given back the read first, saw
/// it there, and then the node died: the settle took the other member's word, and what was read went back.
#[test]
fn a_successor_reads_only_after_overlapping_writes_that_are_given_back_later() {
    let mut bench = Bench::new(Start::Resume);
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.open_all();
    bench.read(1, 0, 4096);
    bench.write(2, 0, 4096);
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["write"], vec!["write"]), "no read yet");
    bench.input(Input::Replayed);
    assert!(!bench.under_way(1).contains(&"read") && !bench.under_way(2).contains(&"read"), "the write comes first");
    bench.serve_all();
    assert!(matches!(bench.result(1), Some(Ok(_))) && bench.is_done(2));
}

/// Found by the simulator: restarted, it saw the write on one member, and then the node died and the write was undone.
#[test]
fn a_read_that_is_restarted_waits_for_an_overlapping_write_that_came_after_it() {
    let mut bench = Bench::serving(pair(1));
    bench.read(1, 0, 4096);
    bench.write(2, 0, 4096);
    bench.cut(1, true);
    assert!(!bench.under_way(2).contains(&"read"), "the write may be on this member alone");
    bench.connect_all();
    bench.open_all();
    bench.serve_all();
    assert!(bench.is_done(1) && bench.is_done(2));
}
