//! What the oracle allows and what it does not.

use super::*;

const A: SessionId = SessionId(1);
const B: SessionId = SessionId(2);

fn register() -> Register {
    let mut register = Register::new(4, false, false);
    register.committed(&[A], false, false);
    register
}

fn write(register: &mut Register, tag: u64, session: SessionId) -> u64 {
    let stamp = register.ask(tag, session, Ask::Write(0, 1))[0];
    register.done(tag);
    stamp
}

fn read(register: &mut Register, tag: u64, stamp: u64) -> Result<(), Wrong> {
    register.ask(tag, A, Ask::Read(0, 1));
    register.read(tag, &[Some(stamp)])
}

#[test]
fn a_read_sees_the_last_acknowledged_write_and_nothing_older() {
    let mut register = register();
    let old = write(&mut register, 1, A);
    let new = write(&mut register, 2, A);
    assert_eq!(read(&mut register, 3, new), Ok(()));
    assert!(read(&mut register, 4, old).is_err());
    assert!(read(&mut register, 5, 0).is_err());
}

#[test]
fn a_force_may_bring_back_what_was_flushed_over_and_what_is_seen_then_stays() {
    let mut register = register();
    let old = write(&mut register, 1, A);
    let new = write(&mut register, 2, A);
    register.ask(3, A, Ask::Flush);
    register.done(3);
    register.forced(0..4);
    register.committed(&[], true, true);
    register.committed(&[B], false, false);
    register.ask(4, B, Ask::Read(0, 1));
    assert_eq!(register.read(4, &[Some(old)]), Ok(()));
    register.ask(5, B, Ask::Read(0, 1));
    assert!(register.read(5, &[Some(new)]).is_err());
    register.ask(6, B, Ask::Read(1, 1));
    assert!(register.read(6, &[Some(old)]).is_err(), "never another block's content");
}

#[test]
fn what_was_written_is_not_called_blank_and_what_nobody_touched_is_not_called_written() {
    let mut register = register();
    register.ask(1, A, Ask::Blank);
    assert_eq!(register.blank(1, None), Ok(()));
    register.ask(2, A, Ask::Blank);
    assert!(register.blank(2, Some(0..2)).is_err(), "nobody wrote");
    register.ask(3, A, Ask::Blank);
    write(&mut register, 4, A);
    assert_eq!(register.blank(3, None), Ok(()), "asked before the write");
    register.ask(5, A, Ask::Blank);
    assert!(register.blank(5, None).is_err());
    register.ask(6, A, Ask::Blank);
    assert_eq!(register.blank(6, Some(0..2)), Ok(()));
    register.ask(7, A, Ask::Blank);
    assert!(register.blank(7, Some(2..4)).is_err(), "another page");
}

#[test]
fn a_write_in_flight_may_show_and_then_stays() {
    let mut register = register();
    let old = write(&mut register, 1, A);
    let new = register.ask(2, A, Ask::Write(0, 1))[0];
    assert_eq!(read(&mut register, 3, old), Ok(()));
    assert_eq!(read(&mut register, 4, new), Ok(()));
    assert!(read(&mut register, 5, old).is_err(), "it does not go back");
}

#[test]
fn a_loss_takes_nothing_while_the_driver_lives() {
    let mut register = register();
    let old = write(&mut register, 1, A);
    write(&mut register, 2, A);
    register.committed(&[A], true, true);
    assert!(read(&mut register, 3, old).is_err());
}

#[test]
fn a_loss_takes_unflushed_writes_of_a_dead_driver_but_no_flushed_one() {
    let mut register = register();
    let first = write(&mut register, 1, A);
    let flushed = write(&mut register, 2, A);
    register.ask(3, A, Ask::Flush);
    register.done(3);
    write(&mut register, 4, A);
    register.process_died(A);
    register.committed(&[A], true, true);
    register.committed(&[B], false, false);
    assert_eq!(read(&mut register, 5, flushed), Ok(()));
    assert!(read(&mut register, 6, first).is_err());
}

#[test]
fn what_was_read_after_a_recovery_stays() {
    let mut register = register();
    let limbo = register.ask(1, A, Ask::Write(0, 1))[0];
    register.process_died(A);
    register.committed(&[B], false, false);
    assert_eq!(read(&mut register, 2, 0), Ok(()));
    assert!(read(&mut register, 3, limbo).is_err());
}

#[test]
fn what_a_living_driver_wrote_again_is_durable_also_when_it_dies() {
    let mut register = register();
    let old = write(&mut register, 1, A);
    let new = write(&mut register, 2, A);
    register.committed(&[A], true, true);
    register.committed(&[A], false, false);
    assert_eq!(read(&mut register, 3, new), Ok(()), "served under the new map: the loss is handled");
    register.process_died(A);
    register.committed(&[A], true, true);
    assert!(read(&mut register, 4, old).is_err());
    assert!(read(&mut register, 5, 0).is_err());
}

#[test]
fn a_successor_that_adopted_is_a_driver_like_any_other() {
    let mut register = register();
    let old = write(&mut register, 1, A);
    register.process_died(A);
    register.adopted(A);
    write(&mut register, 2, A);
    register.committed(&[A], true, true);
    assert!(read(&mut register, 3, old).is_err());
    register.ask(4, A, Ask::Read(0, 1));
    assert!(register.failed(4, true).is_err(), "the loss is no excuse");
}

#[test]
fn what_was_read_after_a_loss_does_not_go_back_at_the_next() {
    let mut register = register();
    let first = write(&mut register, 1, A);
    let last = write(&mut register, 2, A);
    register.process_died(A);
    register.committed(&[A], true, true);
    register.committed(&[B], false, false);
    register.ask(3, B, Ask::Read(0, 1));
    assert_eq!(register.read(3, &[Some(first)]), Ok(()));
    register.committed(&[B], true, true);
    register.ask(4, B, Ask::Read(0, 1));
    assert!(register.read(4, &[Some(last)]).is_err());
}

#[test]
fn an_error_needs_a_reason() {
    let mut register = register();
    register.ask(1, A, Ask::Write(0, 1));
    assert!(register.failed(1, true).is_err());
    register.ask(2, A, Ask::Write(0, 1));
    assert_eq!(register.failed(2, false), Ok(()));
}
