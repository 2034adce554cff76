//! Writes, discards and flushes: who gets them, when they are answered, what they cost (H1, M6, H5, H22, R8).

use super::bench::*;
use crate::driver::{Input, Op, OpError};
use crate::ids::{Generation, Seq};
use crate::map::{AccessMode, Revocation};
use crate::wire::{ReplyBody, RequestBody, Start};
use bytes::Bytes;

#[test]
fn nothing_is_sent_before_the_first_map() {
    let mut bench = Bench::new(Start::Fresh);
    bench.write(1, 0, 4096);
    bench.wait(20_000);
    assert!(bench.connects.is_empty() && bench.flying.is_empty() && bench.done.is_empty());
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.serve_all();
    assert_eq!(bench.result(1), Some(Ok(Bytes::new())));
}

#[test]
fn i4_a_write_is_answered_only_when_every_active_and_syncing_member_has_it() {
    let mut bench = Bench::serving(map(3, &[&[(1, Active), (2, Syncing), (3, Active), (4, Failed)]]));
    bench.write(1, 0, 4096);
    let frames: Vec<_> = [1, 2, 3].map(|s| bench.take_write(s)).into();
    assert!(bench.flying.is_empty(), "a Failed member receives nothing");
    assert!(frames.iter().all(|f| f.frame.header.generation == Generation(3) && seq(f) == seq(&frames[0])));
    for frame in &frames[..2] {
        bench.serve(frame);
        assert!(!bench.is_done(1));
    }
    bench.serve(&frames[2]);
    assert_eq!(bench.result(1), Some(Ok(Bytes::new())));
}

#[test]
fn sequential_writes_reach_all_stripes_evenly() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)], &[(2, Active)], &[(3, Active)]]));
    bench.write(1, 0, 9 * PAGE);
    for server in [1, 2, 3] {
        assert_eq!(bench.under_way(server), ["write"; 3]);
    }
    bench.serve_all();
    assert!(bench.is_done(1));
}

#[test]
fn a_stale_write_waits_for_the_map_and_restarts_with_a_new_number() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let (a, b) = (bench.take_write(1), bench.take_write(2));
    bench.reply(&a, ReplyBody::Stale { wait_for: Generation(3) });
    bench.serve(&b);
    bench.input(Input::Map(pair(2)));
    assert!(bench.flying.is_empty(), "generation 2 is not as new as asked for");
    bench.input(Input::Map(pair(3)));
    let again = bench.take_write(1);
    assert_eq!(again.frame.header.generation, Generation(3));
    assert!(seq(&again) > seq(&a));
    assert!(!bench.is_done(1), "what was acknowledged for the old attempt does not count");
    bench.serve(&again);
    bench.serve_all();
    assert!(bench.is_done(1));
}

#[test]
fn a_reply_to_an_attempt_given_up_does_not_count() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let old = (bench.take_write(1), bench.take_write(2));
    bench.input(Input::Map(pair(2)));
    let new = (bench.take_write(1), bench.take_write(2));
    bench.serve(&old.0);
    bench.serve(&old.1);
    bench.serve(&new.0);
    assert!(!bench.is_done(1));
    bench.serve(&new.1);
    assert!(bench.is_done(1));
}

#[test]
fn behind_waits_for_that_members_push() {
    let mut bench = Bench::serving(pair(2));
    bench.write(1, 0, 4096);
    let (a, b) = (bench.take_write(1), bench.take_write(2));
    bench.serve(&a);
    bench.reply(&b, ReplyBody::Behind { own: Generation(1) });
    bench.wait(900);
    assert!(bench.take(2, is_write).is_none(), "it never polls");
    bench.push(2, pair(2));
    let (a, b) = (bench.take_write(1), bench.take_write(2));
    bench.serve(&a);
    bench.serve(&b);
    assert!(bench.is_done(1));
}

/// H1, M6: the list of counter-examples.md, with the harm being w1 on m0 after w2.
#[test]
fn a_write_restarts_only_under_a_higher_handle_where_its_frame_was_lost() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let kept_back = bench.take_write(1);
    bench.cut(1, true);
    bench.connect_all();
    assert_eq!(bench.under_way(2), ["write"], "m1 has not answered the attempt yet");
    let frame = bench.take_write(2);
    bench.serve(&frame);
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["open"], vec![]), "first the higher handle");
    bench.open_all();
    let (again, other) = (bench.take_write(1), bench.take_write(2));
    assert!(again.frame.header.handle != kept_back.frame.header.handle && seq(&again) > seq(&kept_back));
    bench.write(2, 0, 4096);
    assert!(bench.flying.is_empty(), "w2 waits for the restarted w1");
    bench.serve(&again);
    bench.serve(&other);
    assert!(bench.is_done(1));
    bench.serve_all();
    assert!(bench.is_done(2));
}

#[test]
fn every_open_has_a_higher_number_than_those_before() {
    let mut bench = Bench::serving(pair(1));
    let mut last = 1;
    for _ in 0..3 {
        bench.cut(1, true);
        bench.connect_all();
        let open = bench.take(1, |b| matches!(b, RequestBody::Open { .. })).unwrap();
        let RequestBody::Open { number, .. } = open.frame.body else { unreachable!() };
        assert!(number.0 > last);
        last = number.0;
        bench.serve(&open);
    }
}

#[test]
fn a_dead_handle_is_replaced_and_the_write_restarted() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let (a, b) = (bench.take_write(1), bench.take_write(2));
    bench.reply(&a, ReplyBody::Superseded { highest: crate::ids::Incarnation(1) });
    bench.serve(&b);
    assert_eq!(bench.under_way(1), ["open"]);
    assert!(!bench.exited, "its own incarnation is no successor");
    bench.serve_all();
    assert!(bench.is_done(1));
}

#[test]
fn not_serving_is_reported_once_and_parks_until_a_newer_map() {
    let mut bench = Bench::serving(pair(1));
    for tag in 1..4 {
        bench.write(tag, tag * PAGE, 4096);
    }
    for _ in 1..4 {
        let (a, b) = (bench.take_write(1), bench.take_write(2));
        bench.reply(&a, ReplyBody::NotServing);
        bench.serve(&b);
    }
    bench.wait(4_000);
    assert!(bench.flying.is_empty());
    assert_eq!(bench.reports, [(1, crate::control::Trouble::NotServing)]);
    bench.input(Input::Map(map(2, &[&[(2, Active)]])));
    bench.serve_all();
    assert!((1..4).all(|tag| bench.is_done(tag)));
}

#[test]
fn r8_a_write_that_finds_no_room_even_in_the_reserve_is_told_as_no_progress_and_tried_again() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    for round in 1..3 {
        let (a, b) = (bench.take_write(1), bench.take_write(2));
        bench.reply(&a, ReplyBody::NoSpace);
        bench.serve(&b);
        assert_eq!(bench.reports, vec![(1, crate::control::Trouble::Stalled); round], "H22: no error, and once");
        bench.wait(4_500);
        assert!(bench.flying.is_empty() && !bench.is_done(1));
        bench.wait(1_000);
    }
    bench.serve_all();
    assert!(bench.is_done(1), "there is room again");
    bench.write(2, 0, 4096);
    let (a, b) = (bench.take_write(1), bench.take_write(2));
    bench.reply(&a, ReplyBody::NoSpace);
    bench.serve(&b);
    bench.input(Input::Map(map(2, &[&[(2, Active)]])));
    bench.serve_all();
    assert!(bench.is_done(2), "the member is left out");
}

/// R8: m1 allocates and applies, m0 answers NoSpace.
#[test]
fn enospc_comes_only_from_a_reserve_before_anything_was_sent() {
    let mut bench = Bench::new(Start::Fresh);
    bench.credit = 1;
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.open_all();
    bench.write(1, 0, 4096);
    bench.serve_all();
    assert!(bench.is_done(1), "within the credit nothing is asked");
    bench.write(2, 0, 8192);
    assert_eq!(bench.under_way(1), ["write"], "the page is paid for");
    bench.serve_all();
    bench.write(3, PAGE, 4096);
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["reserve"], vec!["reserve"]));
    let ask: Vec<_> = std::mem::take(&mut bench.flying);
    bench.reply(&ask[0], ReplyBody::NoSpace);
    assert!(!bench.is_done(3));
    bench.serve(&ask[1]);
    assert_eq!(bench.result(3), Some(Err(OpError::NoSpace)));
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["release"], vec!["release"]), "nothing was sent else");
    bench.write(4, 0, 4096);
    bench.serve_all();
    assert_eq!(bench.result(4), Some(Ok(Bytes::new())), "ENOSPC does not end the session");
}

#[test]
fn r8_room_that_another_write_asks_for_too_is_given_back_only_when_both_were_refused() {
    let mut bench = Bench::new(Start::Fresh);
    bench.credit = 0;
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.open_all();
    bench.write(1, 0, 4096);
    bench.write(2, 4096, PAGE); // The rest of the first page, and a block of the second.
    let ask: Vec<_> = std::mem::take(&mut bench.flying);
    assert_eq!(ask.len(), 4, "each of both");
    let of = |write: usize| ask.iter().filter(move |f| pages_of(f).len() == write);
    of(1).for_each(|frame| bench.reply(frame, ReplyBody::NoSpace));
    assert!(bench.is_done(1) && bench.flying.is_empty(), "the other still wants the first page");
    of(2).for_each(|frame| bench.reply(frame, ReplyBody::NoSpace));
    assert!(bench.is_done(2));
    let given: Vec<_> = bench.flying.iter().map(pages_of).collect();
    assert_eq!(given, [[0, 1], [0, 1]], "to each receiver, by page");
}

/// The pages that a word about room names.
fn pages_of(flying: &Flying) -> Vec<u64> {
    match &flying.frame.body {
        RequestBody::Reserve { pages } | RequestBody::Release { pages } => pages.iter().map(|(_, (_, p))| *p).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn a_restarted_write_never_asks_for_room() {
    let mut bench = Bench::new(Start::Fresh);
    bench.credit = 0;
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.open_all();
    bench.write(1, 0, 4096);
    let ask: Vec<_> = std::mem::take(&mut bench.flying);
    for frame in &ask {
        bench.serve(frame);
    }
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["write"], vec!["write"]));
    bench.flying.clear();
    bench.input(Input::Map(map(2, &[&[(1, Active), (3, Active)]])));
    bench.connect_all();
    bench.open_all();
    assert_eq!((bench.under_way(1), bench.under_way(3)), (vec!["write"], vec!["write"]));
}

/// Found by the simulator: the process before had sent the write; ENOSPC to its successor would make reads flip.
#[test]
fn a_write_given_back_to_a_successor_never_asks_for_room() {
    let mut bench = Bench::new(Start::Resume);
    bench.credit = 0;
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.open_all();
    bench.write(1, 0, 4096);
    bench.input(Input::Replayed);
    bench.write(2, PAGE, 4096);
    assert_eq!(bench.under_way(1), ["write", "reserve"]);
}

#[test]
fn a_discard_is_one_frame_per_page_and_member_and_frees_its_credit() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)], &[(2, Active)]]));
    bench.submit(1, Op::Discard { address: 4096, length: 4 * PAGE });
    assert_eq!((bench.under_way(1).len(), bench.under_way(2).len()), (3, 2));
    bench.serve_all();
    assert!(bench.is_done(1));
}

#[test]
fn a_huge_discard_never_has_all_its_frames_out_at_once() {
    let mut bench = Bench::serving(pair(1));
    bench.submit(1, Op::Discard { address: 0, length: 64 << 20 });
    assert!(bench.flying.len() <= 130, "{}", bench.flying.len());
    let mut frames = 0;
    while let Some(next) = bench.flying.pop() {
        bench.serve(&next);
        frames += 1;
    }
    assert_eq!((frames, bench.is_done(1)), (2 * (64 << 20) / PAGE, true));
}

#[test]
fn the_window_of_a_handle_is_never_exceeded_and_the_rest_follows_in_order() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)]]));
    for tag in 0..300 {
        bench.write(tag, tag * 4096, 4096);
    }
    assert_eq!(bench.flying.len(), crate::limits::WINDOW_REQUESTS as usize);
    let mut seqs = Vec::new();
    while !bench.flying.is_empty() {
        let next = bench.flying.remove(0);
        seqs.push(seq(&next));
        bench.serve(&next);
        assert!(bench.flying.len() <= crate::limits::WINDOW_REQUESTS as usize);
    }
    assert!(seqs.is_sorted() && (0..300).all(|tag| bench.is_done(tag)));
}

#[test]
fn i5_a_flush_goes_to_all_members_and_confirms_only_what_was_acknowledged_before_it() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active), (2, Syncing)]]));
    bench.write(1, 0, 4096);
    let first = bench.flying[0].frame.header.seq;
    bench.serve_all();
    bench.write(2, PAGE, 4096);
    let (a, b) = (bench.take_write(1), bench.take_write(2));
    bench.submit(3, Op::Flush);
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["flush"], vec!["flush"]));
    bench.serve(&a);
    bench.serve(&b);
    assert!(bench.is_done(2) && !bench.is_done(3));
    let flushes = std::mem::take(&mut bench.flying);
    bench.serve(&flushes[0]);
    assert!(!bench.is_done(3));
    bench.serve(&flushes[1]);
    assert!(bench.is_done(3));
    bench.write(4, 2 * PAGE, 4096);
    assert_eq!(bench.flying[0].frame.header.confirmed, first, "the second write was acknowledged after the flush left");
}

#[test]
fn confirmed_never_passes_a_write_that_is_not_acknowledged_everywhere() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let held = bench.take_write(1);
    bench.serve_all();
    bench.write(2, PAGE, 4096);
    bench.serve_all();
    bench.submit(3, Op::Flush);
    bench.serve_all();
    bench.write(4, 2 * PAGE, 4096);
    assert_eq!(bench.flying[0].frame.header.confirmed, Seq(seq(&held).0 - 1));
}

#[test]
fn an_idle_driver_flushes_and_confirms_and_then_falls_silent() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let seq = bench.flying[0].frame.header.seq;
    bench.serve_all();
    bench.wait(crate::limits::IDLE_CONFIRM_MS);
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["flush"], vec!["flush"]));
    while let Some(flush) = bench.take(1, |b| matches!(b, RequestBody::Flush)) {
        bench.serve(&flush);
        let other = bench.take(2, |b| matches!(b, RequestBody::Flush)).unwrap();
        bench.serve(&other);
    }
    assert_eq!((bench.under_way(1), bench.under_way(2)), (vec!["confirm"], vec!["confirm"]));
    assert!(bench.flying.iter().all(|f| f.frame.header.confirmed == seq));
    bench.serve_all();
    bench.wait(60_000);
    assert!(bench.flying.is_empty());
    assert_eq!(bench.wake_at, crate::time::Millis::NEVER, "an idle volume sets no timer");
}

#[test]
fn a_full_buffer_of_kept_writes_flushes_by_itself_and_new_writes_wait() {
    let mut bench = Bench::serving(pair(1));
    for tag in 0..80 {
        bench.write(tag, tag * PAGE, PAGE);
    }
    let out = bench.flying.iter().filter(|f| is_write(&f.frame.body)).count();
    assert!(out < 2 * 65, "4 MiB are kept at most: {out}");
    bench.serve_all();
    assert!((0..80).all(|tag| bench.is_done(tag)), "its own flush made room");
}

/// H22: a revoked range fails for its requests only, and other writes go on.
#[test]
fn writes_that_wait_for_room_go_on_when_those_before_them_fail() {
    let mut bench = Bench::new(Start::Fresh);
    bench.credit = 0;
    bench.input(Input::Map(pair(1)));
    bench.connect_all();
    bench.open_all();
    // More than may be kept: the last ones wait for room.
    for tag in 1..=6 {
        bench.write(tag, tag * PAGE * 16, 1 << 20);
    }
    for tag in 1..=6 {
        while !bench.flying.is_empty() {
            let ask = bench.flying.remove(0);
            bench.reply(&ask, ReplyBody::NoSpace);
        }
        assert_eq!(bench.result(tag), Some(Err(OpError::NoSpace)), "write {tag}");
    }
}

#[test]
fn a_revoked_write_fails_alone() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    bench.write(2, PAGE, 4096);
    let mut revoking = pair(2);
    revoking.revoked =
        vec![Revocation { session: super::bench::SESSION, below: Generation(2), ranges: vec![(0, 4096)] }];
    bench.flying.clear();
    bench.input(Input::Map(revoking));
    assert_eq!(bench.result(1), Some(Err(OpError::Io)), "issued before the entry was stored");
    bench.serve_all();
    assert_eq!(bench.result(2), Some(Ok(Bytes::new())));
    bench.write(3, 0, 4096);
    bench.serve_all();
    assert_eq!(bench.result(3), Some(Ok(Bytes::new())), "issued after it");
}

#[test]
fn a_session_that_may_only_read_never_writes() {
    let mut only = pair(1);
    only.sessions[0].mode = AccessMode::ReadOnly;
    let mut bench = Bench::serving(only);
    bench.write(1, 0, 4096);
    assert_eq!(bench.result(1), Some(Err(OpError::ReadOnly)));
    assert!(bench.flying.is_empty() && bench.driver.read_only());
}

#[test]
fn a_volume_that_has_grown_takes_writes_beyond_its_old_end() {
    let mut bench = Bench::serving(pair(1));
    let mut larger = pair(2);
    larger.size = 128 << 20;
    larger.layers[0].size = 128 << 20;
    bench.input(Input::Map(larger));
    assert_eq!(bench.driver.size(), Some(128 << 20));
    bench.write(1, 100 << 20, 4096);
    bench.serve_all();
    assert!(bench.is_done(1));
}

#[test]
fn an_acknowledgement_of_another_write_is_no_acknowledgement() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)]]));
    bench.write(1, 0, 4096);
    let mut frame = bench.take_write(1);
    frame.frame.header.seq = Seq(77);
    bench.serve(&frame);
    assert!(!bench.is_done(1));
    assert_eq!(bench.disconnects.len(), 1, "such a server is not believed");
    bench.connect_all();
    bench.serve_all();
    assert!(bench.is_done(1));
}
