//! Whether any block was ever written: every group says so, under the read lease, or there is no answer (Blank, R5).

use super::bench::*;
use crate::driver::{Input, Op, OpError};
use crate::ids::Generation;
use crate::limits::READ_LEASE_MS;
use crate::wire::{ReplyBody, RequestBody};
use bytes::Bytes;

fn asks(body: &RequestBody) -> bool {
    matches!(body, RequestBody::Written { .. })
}

fn is_ping(body: &RequestBody) -> bool {
    matches!(body, RequestBody::Ping)
}

fn none() -> ReplyBody {
    ReplyBody::Written { pages: Vec::new(), next: u64::MAX }
}

fn two_groups(generation: u64) -> crate::map::VolumeMap {
    map(generation, &[&[(1, Active), (2, Syncing)], &[(3, Active), (4, Active)]])
}

#[test]
fn a_volume_is_blank_only_when_every_group_has_said_so() {
    let mut bench = Bench::serving(two_groups(1));
    bench.submit(1, Op::AskWritten);
    assert!(bench.take(2, asks).is_none(), "a member that is being filled is not asked");
    let (first, second) = (bench.take(1, asks).unwrap(), bench.take(3, asks).unwrap());
    assert!(bench.take(4, asks).is_none(), "one member of a group is enough");
    bench.reply(&first, none());
    assert!(!bench.is_done(1));
    bench.reply(&second, none());
    assert!(!bench.is_done(1), "the other Active member has not said a word (R5)");
    let ping = bench.take(4, is_ping).unwrap();
    bench.serve(&ping);
    assert_eq!(bench.result(1), Some(Ok(Bytes::new())));
}

#[test]
fn a_written_page_is_named_by_its_address() {
    let mut bench = Bench::serving(two_groups(1));
    bench.submit(1, Op::AskWritten);
    let (first, second) = (bench.take(1, asks).unwrap(), bench.take(3, asks).unwrap());
    bench.reply(&second, ReplyBody::Written { pages: vec![5, 9], next: u64::MAX });
    bench.reply(&first, none());
    bench.serve_all();
    let address = 11 * PAGE;
    assert_eq!(bench.result(1), Some(Ok(Bytes::copy_from_slice(&address.to_le_bytes()))));
}

#[test]
fn a_list_that_goes_on_is_followed_to_its_end() {
    let mut bench = Bench::serving(map(1, &[&[(1, Active)]]));
    bench.submit(1, Op::AskWritten);
    let ask = bench.take(1, asks).unwrap();
    bench.reply(&ask, ReplyBody::Written { pages: Vec::new(), next: 64 });
    let ask = bench.take(1, asks).expect("asked on");
    assert!(matches!(ask.frame.body, RequestBody::Written { from: 64, .. }));
    bench.reply(&ask, none());
    assert_eq!(bench.result(1), Some(Ok(Bytes::new())));
}

#[test]
fn a_refused_question_is_asked_again_of_every_group_under_the_newer_map() {
    let mut bench = Bench::serving(two_groups(1));
    bench.submit(1, Op::AskWritten);
    let (first, second) = (bench.take(1, asks).unwrap(), bench.take(3, asks).unwrap());
    bench.reply(&first, none());
    bench.reply(&second, ReplyBody::Stale { wait_for: Generation(2) });
    bench.serve_all();
    assert!(!bench.is_done(1) && bench.flying.is_empty(), "parked, nothing is polled");
    bench.input(Input::Map(two_groups(2)));
    let first = bench.take(1, asks).expect("what was said under the older map does not count");
    bench.reply(&first, none());
    let second = bench.take(3, asks).unwrap();
    bench.reply(&second, none());
    bench.serve_all();
    assert_eq!(bench.result(1), Some(Ok(Bytes::new())));
}

#[test]
fn a_lost_connection_leads_to_another_member_and_a_late_answer_is_no_lease() {
    let mut bench = Bench::serving(pair(1));
    bench.submit(1, Op::AskWritten);
    bench.cut(1, true);
    let ask = bench.take(2, asks).expect("the other Active member");
    bench.now = bench.now.after(READ_LEASE_MS);
    bench.reply(&ask, none());
    assert!(!bench.is_done(1));
}

#[test]
fn an_answer_that_makes_no_sense_closes_the_connection_and_is_not_believed() {
    for nonsense in [
        ReplyBody::Written { pages: Vec::new(), next: 0 },
        ReplyBody::Written { pages: vec![1 << 40], next: u64::MAX },
        ReplyBody::Done,
    ] {
        let mut bench = Bench::serving(map(1, &[&[(1, Active)]]));
        bench.submit(1, Op::AskWritten);
        let ask = bench.take(1, asks).unwrap();
        bench.reply(&ask, nonsense);
        assert!(!bench.is_done(1));
        assert_eq!(bench.disconnects.len(), 1);
    }
}

#[test]
fn an_ended_session_gets_no_answer_to_build_on() {
    let mut bench = Bench::serving(pair(1));
    bench.submit(1, Op::AskWritten);
    let ask = bench.take(1, asks).unwrap();
    bench.reply(&ask, ReplyBody::Ended);
    assert_eq!(bench.result(1), Some(Err(OpError::Io)));
}
