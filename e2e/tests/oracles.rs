//! Each invariant of PROTOCOL.md (I1 to I8) has an oracle in the simulator, and the oracle sees when it is broken: the test
//! named for an invariant breaks a rule that keeps it, and the first thing that is wrong then is that invariant.
//!
//! Invariant: without the mistake the same seeds pass, so that it is the mistake that is seen. Further names of I1 to I8
//! are in the state machines' tests and in those that run processes; `tidy` holds that each has one at all three levels.
#![allow(clippy::unwrap_used)]

use lamina_e2e::sim::{Plan, Tell, quiet_panics, run};
use lamina_protocol::mutants::{Mutant, activate};

/// Plays seeds until this mistake is seen; it must be seen within so many, as a breach of this invariant.
fn is_seen(mistake: Mutant, oracle: &str, within: u64) {
    quiet_panics();
    // A mistake is switched on for one thread; this one is the test's own.
    for seed in 1..=within {
        activate(Some(mistake));
        let failure = run(&Plan::of(seed), Tell::Nothing).failure;
        activate(None);
        let Some(failure) = failure else { continue };
        if failure.oracle.contains(oracle) {
            let sound = run(&Plan::of(seed), Tell::Nothing).failure;
            assert!(sound.is_none(), "seed {seed} fails without the mistake, too: {sound:?}");
            return;
        }
    }
    panic!("{oracle} never saw in {within} seeds that {}", mistake.words());
}

#[test]
fn i1_is_seen_to_be_broken_when_a_member_serves_below_its_promise() {
    is_seen(Mutant::ServedAfterFence, "I1", 100);
}

#[test]
fn i1_is_seen_to_be_broken_when_a_write_is_acknowledged_that_a_member_never_had() {
    is_seen(Mutant::AckOnOneCopy, "I1", 100);
}

#[test]
fn i2_is_seen_to_be_broken_when_a_promise_does_not_outlive_a_restart() {
    is_seen(Mutant::PromiseVolatile, "I2", 100);
}

#[test]
fn i3_is_seen_to_be_broken_when_data_is_acknowledged_before_its_mark_is_durable() {
    is_seen(Mutant::DataBeforeMark, "I3", 100);
}

#[test]
fn i4_i5_are_seen_to_be_broken_when_a_flush_makes_nothing_durable() {
    is_seen(Mutant::FlushWithoutDisk, "I4, I5", 100);
}

#[test]
fn i6_is_seen_to_be_broken_when_pages_are_called_clean_that_no_flush_covered() {
    is_seen(Mutant::ConfirmedUnflushed, "I6", 500);
}

#[test]
fn i7_is_seen_to_be_broken_when_a_member_becomes_active_with_unsynced_pages() {
    is_seen(Mutant::UnsyncedActive, "I7", 100);
}

#[test]
fn i8_is_seen_to_be_broken_when_a_member_is_read_that_is_not_active() {
    is_seen(Mutant::SyncingRead, "I8", 100);
}
