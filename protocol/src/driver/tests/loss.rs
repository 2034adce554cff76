//! Raised losses (H5, R2).

use super::bench::*;
use crate::driver::{Input, Op, OpError};
use crate::ids::{BootId, Generation};
use crate::map::VolumeMap;
use crate::wire::{RequestBody, Start};
use bytes::Bytes;

/// All members of the pair have restarted: new boot ids, raised loss.
fn restarted(generation: u64) -> VolumeMap {
    let mut map = pair(generation);
    for member in &mut map.placements[0].groups[0].members {
        member.boot = BootId(member.boot.0 + 100 * u128::from(generation));
    }
    map.placements[0].groups[0].loss = Generation(generation);
    map
}

/// H5: w acknowledged by both, unflushed; both restart under a living driver; the flush succeeds, w is nowhere.
#[test]
fn what_was_acknowledged_and_not_flushed_is_written_again_before_anything_else() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    bench.write(2, 0, 4096);
    bench.serve_all();
    bench.submit(3, Op::Discard { address: PAGE, length: PAGE });
    bench.serve_all();
    bench.submit(4, Op::Flush);
    bench.flying.clear();
    bench.input(Input::Map(restarted(2)));
    let mut seen = Vec::new();
    while !bench.flying.is_empty() {
        let next = bench.flying.remove(0);
        if next.server == 1 {
            let first = next.frame.payload.first().copied().unwrap_or(0);
            seen.push((name(&next.frame.body), first));
        }
        assert!(!bench.is_done(4) || seen.len() > 5, "the flush of the OS waits");
        bench.serve(&next);
    }
    let kept = seen[..3].iter().filter(|(name, _)| *name == "write" || *name == "discard").count();
    assert_eq!((kept, &seen[3..]), (3, &[("flush", 0), ("handled", 0), ("flush", 0)][..]), "{seen:?}");
    let writes: Vec<_> = seen.iter().filter(|(name, _)| *name == "write").map(|(_, first)| *first).collect();
    assert_eq!(writes, [1, 2], "overlapping ones in their order");
    assert!(bench.is_done(4));
}

#[test]
fn flushed_writes_are_not_kept() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    bench.serve_all();
    bench.submit(2, Op::Flush);
    bench.serve_all();
    bench.input(Input::Map(restarted(2)));
    assert_eq!(bench.under_way(1), ["flush"]);
}

#[test]
fn a_second_loss_during_the_rewriting_begins_it_anew() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    bench.serve_all();
    bench.input(Input::Map(restarted(2)));
    bench.flying.retain(|f| f.server == 1);
    let first = bench.take_write(1);
    bench.serve(&first);
    bench.input(Input::Map(restarted(3)));
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["write"], vec!["write"]));
    bench.serve_all();
    bench.read(2, 0, 4096);
    bench.serve_all();
    assert!(bench.is_done(2));
}

#[test]
fn handled_is_said_to_all_members_and_covers_the_loss() {
    let mut bench = Bench::serving(pair(1));
    bench.input(Input::Map(restarted(2)));
    let flushes = std::mem::take(&mut bench.flying);
    flushes.iter().for_each(|flush| bench.serve(flush));
    for server in [1, 2] {
        let handled = bench.take(server, |b| matches!(b, RequestBody::Handled { .. })).unwrap();
        assert_eq!(handled.frame.body, RequestBody::Handled { loss: Generation(2) });
        assert!(!bench.driver.is_serving());
        bench.serve(&handled);
    }
    assert!(bench.driver.is_serving());
    bench.input(Input::Map({
        let mut next = restarted(2);
        next.generation = Generation(3);
        next
    }));
    assert!(bench.driver.is_serving(), "a loss is handled once");
}

#[test]
fn on_a_volume_of_several_sessions_nothing_is_rewritten() {
    let shared = |mut map: VolumeMap| {
        map.multi_session = true;
        map
    };
    let mut bench = Bench::serving(shared(pair(1)));
    bench.write(1, 0, 4096);
    bench.serve_all();
    bench.input(Input::Map(shared(restarted(2))));
    assert!(bench.flying.is_empty() && bench.driver.is_serving());
}

/// R2: incarnation 2 sees loss 1 as its first value; the application's fsync must not succeed.
#[test]
fn a_successor_that_meets_a_higher_loss_fails_everything() {
    let mut bench = Bench::new(Start::Resume);
    bench.input(Input::Map(restarted(2)));
    bench.connect_all();
    bench.open_all();
    bench.write(1, 0, 4096);
    assert_eq!(bench.result(1), Some(Err(OpError::Io)));
    bench.submit(2, Op::Flush);
    assert_eq!(bench.result(2), Some(Err(OpError::Io)));
}

#[test]
fn a_successor_meets_a_loss_as_any_driver_once_its_first_flush_is_acknowledged() {
    let mut bench = Bench::new(Start::Resume);
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.open_all();
    bench.write(1, 0, 4096);
    bench.input(Input::Replayed);
    assert_eq!(bench.under_way(1), ["write"], "the flush comes after the replay");
    let (a, b) = (bench.take_write(1), bench.take_write(2));
    bench.serve(&a);
    bench.serve(&b);
    assert_eq!(bench.under_way(1), ["flush"]);
    let flushes = std::mem::take(&mut bench.flying);
    flushes.iter().for_each(|flush| bench.serve(flush));
    assert_eq!(bench.under_way(1), ["adopt"], "then the old incarnation's pending writes are its own");
    bench.serve_all();
    bench.input(Input::Map(restarted(2)));
    bench.serve_all();
    bench.read(2, 0, 4096);
    bench.serve_all();
    assert!(matches!(bench.result(2), Some(Ok(_))));
}

#[test]
fn a_successor_before_its_flush_fails_at_a_loss_that_a_later_map_raises() {
    let mut bench = Bench::new(Start::Resume);
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.open_all();
    bench.write(1, 0, 4096);
    bench.serve_all();
    assert_eq!(bench.result(1), Some(Ok(Bytes::new())));
    bench.input(Input::Map(restarted(2)));
    bench.read(2, 0, 4096);
    assert_eq!(bench.result(2), Some(Err(OpError::Io)));
}
