//! The faults that the simulator plays, through the real programs: an operator over a directory, three storage servers and
//! a driver, each in a network namespace of its own, with fio writing and verifying all the while.
//!
//! Invariant: not one wrong byte. fio reads back what it wrote while the fault lasts and after it healed (`verify`), then
//! the whole volume is read, then the servers' devices are compared and the volume's bytes rebuilt from them. A pass of
//! fio writes its own number and the address into every 9 bytes, so that a block of an earlier pass is a wrong one.
//! All that is started ends with the test, however it ends ([`network`]).
#![allow(clippy::unwrap_used)]

#[path = "faults/load.rs"]
mod load;
#[path = "faults/network.rs"]
mod network;
#[path = "faults/stage.rs"]
mod stage;

use load::{HOT, Load};
use network::Spot;
use stage::{Stage, copies_in, is_degraded, is_healthy};
use std::time::{Duration, Instant};

/// How long a fault lasts that nobody but its victims notices.
const BRIEF: Duration = Duration::from_secs(3);

/// A fault that is injected under load, is noticed, heals and leaves the volume whole.
fn survives(test: &str, strike: impl FnOnce(&mut Stage), heal: impl FnOnce(&mut Stage)) {
    let Some(mut stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    strike(&mut stage);
    stage.until("left out", is_degraded);
    load.more_passes(1);
    heal(&mut stage);
    stage.until("whole again", is_healthy);
    load.more_passes(1);
    stage.judge(load.end());
}

#[test]
fn no_wrong_byte_when_nobody_hears_a_server_any_more() {
    survives(
        "no_wrong_byte_when_nobody_hears_a_server_any_more",
        |stage| stage.network.others(Spot::Server(0)).for_each(|to| stage.network.cut(Spot::Server(0), to)),
        |stage| stage.network.heal(),
    );
}

#[test]
fn no_wrong_byte_when_a_server_hears_nobody_any_more() {
    survives(
        "no_wrong_byte_when_a_server_hears_nobody_any_more",
        |stage| stage.network.others(Spot::Server(1)).for_each(|from| stage.network.cut(from, Spot::Server(1))),
        |stage| stage.network.heal(),
    );
}

#[test]
fn no_wrong_byte_when_a_driver_alone_does_not_hear_a_server() {
    let test = "no_wrong_byte_when_a_driver_alone_does_not_hear_a_server";
    let Some(stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    stage.network.cut(Spot::Server(2), Spot::Driver);
    stage.until("left out, as the driver reported it", is_degraded);
    load.more_passes(1);
    stage.network.heal();
    // Its copies are barred for half a minute, which nobody waits for here: those that serve are compared.
    load.more_passes(1);
    stage.judge(load.end());
}

#[test]
fn no_wrong_byte_when_a_driver_is_not_heard_by_a_server_for_a_while() {
    let test = "no_wrong_byte_when_a_driver_is_not_heard_by_a_server_for_a_while";
    let Some(stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    stage.network.cut(Spot::Driver, Spot::Server(0));
    std::thread::sleep(BRIEF);
    stage.network.heal();
    load.more_passes(2);
    stage.until("whole again", is_healthy);
    stage.judge(load.end());
}

#[test]
fn no_wrong_byte_in_a_partition_of_one_server_from_all_others() {
    survives(
        "no_wrong_byte_in_a_partition_of_one_server_from_all_others",
        |stage| stage.network.part(&[Spot::Server(1)]),
        |stage| stage.network.heal(),
    );
}

#[test]
fn no_wrong_byte_in_a_partition_that_leaves_the_driver_with_one_server_and_without_the_operator() {
    let test = "no_wrong_byte_in_a_partition_that_leaves_the_driver_with_one_server_and_without_the_operator";
    let Some(stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    stage.network.part(&[Spot::Driver, Spot::Server(2)]);
    stage.until("left out", is_degraded);
    stage.network.heal();
    stage.until("whole again", is_healthy);
    load.more_passes(1);
    stage.judge(load.end());
}

#[test]
fn no_wrong_byte_and_no_pause_in_a_partition_of_the_operator_alone() {
    let test = "no_wrong_byte_and_no_pause_in_a_partition_of_the_operator_alone";
    let Some(stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    let before = stage.generation();
    stage.network.part(&[Spot::Operator]);
    let begun = Instant::now();
    load.more_passes(1);
    while begun.elapsed() < BRIEF * 2 {
        load.more_passes(1);
    }
    stage.network.heal();
    stage.until("whole", is_healthy);
    assert_eq!(stage.generation(), before, "who reaches nobody changes nothing");
    load.more_passes(1);
    stage.judge(load.end());
}

#[test]
fn no_wrong_byte_when_a_server_stands_still_and_goes_on() {
    survives(
        "no_wrong_byte_when_a_server_stands_still_and_goes_on",
        |stage| stage.cluster.servers[0].stop().unwrap(),
        |stage| stage.cluster.servers[0].go_on().unwrap(),
    );
}

#[test]
fn i4_no_wrong_byte_when_servers_are_killed_one_after_the_other() {
    let test = "i4_no_wrong_byte_when_servers_are_killed_one_after_the_other";
    let Some(mut stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    for victim in 0..3 {
        load.more_passes(1);
        stage.cluster.servers[victim].kill().unwrap();
        stage.until("left out", is_degraded);
        stage.cluster.servers[victim].again().unwrap();
        stage.until("whole again", is_healthy);
    }
    load.more_passes(1);
    stage.judge(load.end());
}

#[test]
fn no_wrong_byte_when_all_servers_are_killed_at_once() {
    let test = "no_wrong_byte_when_all_servers_are_killed_at_once";
    let Some(mut stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    let before = stage.generation();
    stage.cluster.servers.iter().for_each(|server| server.kill().unwrap());
    stage.cluster.servers.iter_mut().for_each(|server| server.again().unwrap());
    stage.until("whole again, of a later map", |volume| {
        is_healthy(volume) && volume["status"]["generation"].as_u64().unwrap() > before
    });
    load.more_passes(2);
    stage.judge(load.end());
}

#[test]
fn i7_no_wrong_byte_when_a_disk_comes_back_blank() {
    let test = "i7_no_wrong_byte_when_a_disk_comes_back_blank";
    let Some(mut stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    let (id, copies) = (stage.cluster.id_of(2).unwrap(), stage.copies());
    stage.cluster.servers[2].kill().unwrap();
    stage.until("left out", is_degraded);
    stage.cluster.servers[2].again_blank(&id).unwrap();
    // The server may be back before a map leaves its copies out: only new ones count.
    stage.until("whole again, with new copies in place of the two that were there", |volume| {
        let kept = copies_in(volume).iter().filter(|copy| copies.contains(copy)).count();
        is_healthy(volume) && kept == copies.len() - 2
    });
    load.more_passes(1);
    stage.judge(load.end());
}

#[test]
fn i3_what_is_under_way_when_all_is_killed_has_its_mark_on_every_disk() {
    let test = "i3_what_is_under_way_when_all_is_killed_has_its_mark_on_every_disk";
    let Some(stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    stage.cluster.servers.iter().for_each(|server| server.kill().unwrap());
    stage.export.program.kill().unwrap();
    load.abandon();
    let report = stage.inspect_the_dead();
    let copies: Vec<&str> = report.lines().filter(|line| line.contains(" of volume ")).collect();
    assert_eq!(copies.len(), 6, "{report}");
    assert!(copies.iter().all(|line| !line.contains(", 0 pending")), "{report}");
}

#[test]
fn i6_a_copy_that_is_left_out_differs_only_in_pages_that_say_so() {
    let test = "i6_a_copy_that_is_left_out_differs_only_in_pages_that_say_so";
    let Some(stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    stage.cluster.servers[2].kill().unwrap();
    stage.until("left out", is_degraded);
    load.more_passes(1);
    let report = stage.judge(load.end());
    let differing = report.lines().filter(|line| line.contains(" differ, ")).count();
    assert_eq!(differing, 2, "both copies of the one that was away are behind: {report}");
}

#[test]
fn i8_nothing_is_served_while_only_a_copy_that_is_behind_is_there() {
    let test = "i8_nothing_is_served_while_only_a_copy_that_is_behind_is_there";
    let Some(mut stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    load.more_passes(1);
    stage.cluster.servers[1].kill().unwrap();
    stage.until("left out", is_degraded);
    load.more_passes(1);
    let passes = load.end();
    stage.cluster.servers[0].kill().unwrap();
    stage.cluster.servers[2].kill().unwrap();
    stage.cluster.servers[1].again().unwrap();
    stage.until("unavailable", |volume| stage::condition_is(volume, "Available", "False"));
    load::gets_no_answer(&stage.export.target);
    stage.cluster.servers[0].again().unwrap();
    stage.cluster.servers[2].again().unwrap();
    stage.until("whole again", is_healthy);
    stage.judge(passes);
}

#[test]
fn no_wrong_byte_when_the_disks_are_full_and_writes_go_on_when_there_is_room_again() {
    let test = "no_wrong_byte_when_the_disks_are_full_and_writes_go_on_when_there_is_room_again";
    let Some(stage) = Stage::set(test) else { return };
    let load = Load::start(&stage.export.target);
    let filler = stage.cluster.export("filler", stage::POLICY, stage::FILLER_BYTES).unwrap();
    let refused = load::write_until_full(&filler.target, stage::FILLER_BYTES);
    assert!(refused > 0, "the filler fits: nothing is full");
    stage.until("out of space", |volume| stage::condition_is(volume, "OutOfSpace", "True"));
    // What has its place goes on; what needs a new page is refused whole.
    load.more_passes(1);
    let refused = load::write_behind(&stage.export.target);
    assert!(refused > 0, "a new page was found on full disks");
    load.more_passes(1);
    stage.let_go(filler);
    stage.until("with room", |volume| stage::condition_is(volume, "OutOfSpace", "False"));
    load::write(&stage.export.target, 2, load::BEHIND).unwrap();
    load::verify(&stage.export.target, 2, load::BEHIND).unwrap();
    load.more_passes(1);
    stage.judge(load.end());
}

#[test]
fn the_check_finds_a_block_of_an_earlier_pass_and_one_of_another_place() {
    let test = "the_check_finds_a_block_of_an_earlier_pass_and_one_of_another_place";
    let Some(stage) = Stage::set(test) else { return };
    let target = &stage.export.target;
    load::verify(target, 1, HOT).unwrap();
    load::write(target, 2, HOT).unwrap();
    load::verify(target, 2, HOT).unwrap();
    let old = load::verify(target, 1, HOT).unwrap_err().to_string();
    assert!(old.contains("bad pattern"), "{old}");
    load::write_displaced(target, 2, HOT).unwrap();
    let displaced = load::verify(target, 2, HOT).unwrap_err().to_string();
    assert!(displaced.contains("bad pattern"), "{displaced}");
}
