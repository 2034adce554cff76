//! Sessions, incarnations, connections: under what right the driver acts (H20, R7, R10), and what it reports.

use super::bench::*;
use crate::control::Trouble;
use crate::driver::{Input, OpError};
use crate::ids::{Generation, Incarnation, OpenNumber, ServerId};
use crate::limits::STALL_TIMEOUT_MS;
use crate::map::Standing;
use crate::wire::{ReplyBody, RequestBody, Start};

fn is_open(body: &RequestBody) -> bool {
    matches!(body, RequestBody::Open { .. })
}

fn incarnation(open: &Flying) -> u64 {
    let RequestBody::Open { incarnation, .. } = open.frame.body else { panic!("not an open") };
    incarnation.0
}

fn resuming(highest_in_map: u64) -> Bench {
    let mut bench = Bench::new(Start::Resume);
    let mut first = pair(1);
    first.sessions[0].incarnation = Incarnation(highest_in_map);
    bench.input(Input::Map(first));
    bench.connect_all();
    bench
}

#[test]
fn ended_is_final() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    bench.read(2, PAGE, 4096);
    let write = bench.take_write(1);
    bench.reply(&write, ReplyBody::Ended);
    assert_eq!((bench.result(1), bench.result(2)), (Some(Err(OpError::Io)), Some(Err(OpError::Io))));
    bench.input(Input::Map(pair(2)));
    bench.write(3, 0, 4096);
    assert_eq!(bench.result(3), Some(Err(OpError::Io)), "a later map does not bring it back");
    assert!(bench.driver.has_ended() && !bench.exited);
}

#[test]
fn a_map_that_no_longer_lists_the_session_ends_it() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let mut without = pair(2);
    without.sessions.clear();
    bench.input(Input::Map(without));
    assert_eq!(bench.result(1), Some(Err(OpError::Io)));
}

#[test]
fn a_first_map_from_before_the_session_is_waited_out() {
    let mut bench = Bench::new(Start::Fresh);
    bench.write(1, 0, 4096);
    let mut without = pair(1);
    without.sessions.clear();
    bench.input(Input::Map(without));
    bench.connect_all();
    assert!(bench.flying.is_empty() && !bench.is_done(1));
    bench.input(Input::Map(pair(2)));
    bench.serve_all();
    assert!(bench.is_done(1));
}

#[test]
fn a_held_session_waits() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    bench.flying.clear();
    let mut held = pair(2);
    held.sessions[0].standing = Standing::Held;
    bench.input(Input::Map(held));
    bench.read(2, PAGE, 4096);
    assert!(bench.flying.is_empty() && bench.done.is_empty());
    bench.input(Input::Map(pair(3)));
    bench.serve_all();
    assert!(bench.is_done(1) && bench.is_done(2));
}

/// H20: all members of the map must refuse the older incarnation before anything is served.
#[test]
fn a_successor_serves_nothing_before_all_members_answered() {
    let mut bench = resuming(4);
    let opens = [bench.take(1, is_open).unwrap(), bench.take(2, is_open).unwrap()];
    assert!(opens.iter().all(|open| incarnation(open) == 5));
    bench.serve(&opens[0]);
    assert!(bench.flying.is_empty() && !bench.driver.is_serving() && !bench.driver.owns_device());
    bench.serve(&opens[1]);
    assert!(bench.driver.is_serving() && bench.driver.owns_device());
    bench.read(1, 0, 4096);
    bench.serve_all();
    assert!(!bench.is_done(1), "a write that is given back later comes first");
    bench.input(Input::Replayed);
    bench.serve_all();
    assert!(bench.is_done(1));
}

/// Found by the simulator: a process that had the kernel's requests already, and looked for its incarnation still, took
/// one above that of the process after it and wrote its old data over that one's.
#[test]
#[should_panic(expected = "takes nothing from the kernel before its incarnation is final")]
fn a_successor_takes_nothing_from_the_kernel_before_its_incarnation_is_final() {
    resuming(4).write(1, 0, 4096);
}

#[test]
fn a_newer_map_restarts_a_successors_discovery() {
    let mut bench = resuming(0);
    let first = bench.take(1, is_open).unwrap();
    bench.serve(&first);
    let mut next = map(2, &[&[(1, Active), (2, Active), (3, Active)]]);
    next.sessions[0].incarnation = Incarnation(1);
    bench.input(Input::Map(next));
    bench.connect_all();
    for server in [2, 3] {
        while let Some(open) = bench.take(server, is_open) {
            bench.serve(&open);
        }
    }
    assert!(!bench.driver.is_serving(), "server 1 answered under the older map only");
    bench.open_all();
    assert!(bench.driver.is_serving());
    assert_eq!(bench.driver.incarnation(), Incarnation(1), "its own incarnation in the map is no other's");
}

#[test]
fn a_successor_takes_a_higher_incarnation_than_any_member_knows() {
    let mut bench = resuming(2);
    let (a, b) = (bench.take(1, is_open).unwrap(), bench.take(2, is_open).unwrap());
    bench.reply(&a, ReplyBody::Superseded { highest: Incarnation(7) });
    bench.serve(&b);
    let again = [bench.take(1, is_open).unwrap(), bench.take(2, is_open).unwrap()];
    assert!(again.iter().all(|open| incarnation(open) == 8));
    bench.open_all();
    again.iter().for_each(|open| bench.serve(open));
    assert!(bench.driver.is_serving() && !bench.exited);
}

/// Two processes must never act as one incarnation: sequence numbers would be given twice.
#[test]
fn a_successor_whose_incarnation_is_taken_goes_higher() {
    let mut bench = resuming(0);
    let (a, b) = (bench.take(1, is_open).unwrap(), bench.take(2, is_open).unwrap());
    bench.serve(&a);
    bench.reply(&b, ReplyBody::OpenRefused { highest: OpenNumber(1) });
    let again = bench.take(2, is_open).unwrap();
    assert_eq!(incarnation(&again), 2);
    // An answer that never came might have been such a refusal.
    bench.cut(2, false);
    bench.connect_all();
    let open = bench.take(2, is_open).unwrap();
    assert_eq!(incarnation(&open), 3);
}

/// R10: the older process answers the kernel nothing.
#[test]
fn a_driver_with_a_successor_answers_nothing_more_and_exits() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    let write = bench.take_write(1);
    bench.reply(&write, ReplyBody::Superseded { highest: Incarnation(2) });
    assert!(bench.exited && bench.done.is_empty());
    bench.write(2, 0, 4096);
    assert!(bench.done.is_empty());
}

#[test]
fn a_map_with_a_higher_incarnation_names_a_successor() {
    let mut bench = Bench::serving(pair(1));
    let mut next = pair(2);
    next.sessions[0].incarnation = Incarnation(2);
    bench.input(Input::Map(next));
    assert!(bench.exited);
}

#[test]
fn a_refused_connection_is_reported_at_once_and_a_silent_one_after_the_stall_timeout() {
    let mut bench = Bench::serving(pair(1));
    bench.cut(1, true);
    assert_eq!(bench.reports, [(1, Trouble::Unreachable)]);
    bench.connect_all();
    bench.open_all();
    bench.reports.clear();
    bench.write(1, 0, 4096);
    let write = bench.take_write(1);
    bench.serve(&write);
    bench.wait(STALL_TIMEOUT_MS - 1);
    assert!(bench.reports.is_empty());
    bench.wait(2);
    assert_eq!(bench.reports, [(2, Trouble::Stalled)]);
    bench.wait(3 * STALL_TIMEOUT_MS);
    assert!(!bench.disconnects.is_empty(), "the silent connection is made anew");
}

#[test]
fn a_connection_that_cannot_be_made_is_asked_for_again() {
    let mut bench = Bench::new(Start::Fresh);
    bench.input(Input::Map(pair(1)));
    bench.connects.clear();
    bench.input(Input::Broken { server: ServerId(1), link: None, refused: true });
    assert_eq!((&bench.connects[..], &bench.reports[..]), (&[1][..], &[(1, Trouble::Unreachable)][..]));
}

#[test]
fn a_server_that_leaves_the_map_is_let_go() {
    let mut bench = Bench::serving(pair(1));
    bench.write(1, 0, 4096);
    bench.input(Input::Map(map(2, &[&[(1, Active), (2, Failed)]])));
    assert_eq!(bench.disconnects.len(), 1);
    bench.serve_all();
    assert!(bench.is_done(1));
}

#[test]
fn an_open_that_a_server_cannot_take_yet_is_tried_again() {
    let mut bench = Bench::new(Start::Fresh);
    bench.input(Input::Map(pair(2)));
    bench.connect_all();
    let open = bench.take(1, is_open).unwrap();
    bench.reply(&open, ReplyBody::Behind { own: Generation(1) });
    bench.open_all();
    assert!(bench.flying.is_empty());
    bench.wait(1_000);
    bench.open_all();
    assert!(bench.driver.is_serving());
}

#[test]
fn an_older_map_changes_nothing() {
    let mut bench = Bench::serving(pair(5));
    let mut old = pair(4);
    old.sessions.clear();
    bench.input(Input::Map(old));
    assert!(bench.driver.is_serving());
    assert_eq!(bench.driver.generation(), Generation(5));
}
