//! Missed bits: who lacks what (PROTOCOL.md §5.2; I3, H3b, H8, H9, H11).

use super::*;

fn member(map: &mut VolumeMap, n: usize) -> &mut Member {
    &mut map.placements[0].groups[0].members[n]
}

fn missed(net: &Net, n: usize, page: u64) -> u16 {
    let key = PageKey { copy: CopyId(100 + n as u128), layer: LAYER, page };
    net.servers[n].medium.pages.get(&key).map_or(0, |(record, _)| record.missed)
}

/// Serves the map of a generation in which these servers are in these states, at all servers.
fn serve(net: &mut Net, generation: u64, states: [MemberState; 3]) {
    let map = net.map_with_boots(generation, |map| {
        (0..3).for_each(|n| member(map, n).state = states[n]);
    });
    net.serve(map);
}

use MemberState::{Active, Failed, Syncing};

#[test]
fn i6_a_write_says_durably_and_before_its_data_whom_it_does_not_reach() {
    let mut net = Net::started(3);
    serve(&mut net, 2, [Active, Active, Failed]);
    let handle = net.open(0, 2, 1);
    net.ask(0, handle, 2, write_at(4, 0), block(1));
    assert_eq!(missed(&net, 0, 4), 0b100);
    let log = &net.servers[0].medium.log;
    let says = |op: &MediumOp| matches!(op, MediumOp::Commit(records) if records.iter().any(|r| matches!(r, Record::Missed { mask: 0b100, .. })));
    let data = log.iter().position(|op| matches!(op, MediumOp::Write { .. }));
    assert!(log.iter().position(says).unwrap() < data.unwrap(), "H3");
}

#[test]
fn a_page_that_is_pending_already_still_says_whom_a_later_write_does_not_reach() {
    let mut net = Net::started(3);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(4, 0), block(1));
    net.servers[0].medium.log.clear();
    serve(&mut net, 2, [Active, Active, Failed]);
    net.servers[0].medium.hold = true;
    net.send(0, handle, 2, write_at(4, 4096), block(2));
    net.servers[0].medium.hold = false;
    net.run();
    assert_eq!(missed(&net, 0, 4), 0b100);
}

#[test]
fn h3b_a_new_map_makes_pending_pages_missed_by_all_that_are_not_active_under_an_unchanged_boot_id() {
    let mut net = Net::started(3);
    let handle = net.open(0, 1, 1);
    net.ask(0, handle, 1, write_at(4, 0), block(1));
    let map = net.map_with_boots(2, |map| {
        member(map, 1).boot = BootId(7);
        member(map, 2).state = Failed;
    });
    net.control(0, ControlRequest::Serve { map });
    assert_eq!(missed(&net, 0, 4), 0b110);
    net.confirm(0, handle, 2, Seq(1_000));
    net.advance(1_000);
    assert_eq!((net.pending(0), missed(&net, 0, 4)), (0, 0b100), "H11: what is Active when confirmed clears it has it");
}

#[test]
fn h11_bits_go_with_the_map_that_lists_the_member_as_active_and_not_before() {
    let mut net = Net::started(3);
    serve(&mut net, 2, [Active, Active, Failed]);
    let handle = net.open(0, 2, 1);
    net.ask(0, handle, 2, write_at(4, 0), block(1));
    let last = net.ask(0, handle, 2, write_at(5, 0), block(1)).header.token;
    net.confirm(0, handle, 2, last);
    net.advance(1_000);
    serve(&mut net, 3, [Active, Active, Syncing]);
    net.advance(1_000);
    assert_eq!([4, 5].map(|page| missed(&net, 0, page)), [0b100; 2], "a fill says nothing to the others");
    net.ask(0, handle, 3, write_at(5, 0), block(2));
    serve(&mut net, 4, [Active, Active, Active]);
    net.advance(1_000);
    assert_eq!([4, 5].map(|page| missed(&net, 0, page)), [0, 0b100], "page 5 is pending");
    net.confirm(0, handle, 4, Seq(1_000_000));
    net.advance(1_000);
    net.advance(1_000);
    assert_eq!(missed(&net, 0, 5), 0);
}

#[test]
fn bits_of_an_ordinal_that_no_member_has_any_more_go() {
    let mut net = Net::started(3);
    serve(&mut net, 2, [Active, Active, Failed]);
    let handle = net.open(0, 2, 1);
    net.ask(0, handle, 2, write_at(4, 0), block(1));
    net.confirm(0, handle, 2, Seq(1_000));
    net.advance(1_000);
    let map = net.map_with_boots(3, |map| map.placements[0].groups[0].members.truncate(2));
    net.control(0, ControlRequest::Serve { map });
    net.advance(1_000);
    assert_eq!(missed(&net, 0, 4), 0);
}

#[test]
fn h8_a_fill_brings_what_others_miss_and_the_bits_outlive_a_restart() {
    let mut net = Net::started(3);
    serve(&mut net, 2, [Active, Failed, Failed]);
    let handle = net.open(0, 2, 1);
    net.ask(0, handle, 2, write_at(4, 0), block(1));
    net.fence(0, 3, vec![]);
    net.fence(1, 3, vec![CopyId(101)]);
    serve(&mut net, 3, [Active, Syncing, Failed]);
    net.restart_pulls();
    assert_eq!(missed(&net, 1, 4), 0b100, "not its own bit, but that of the one that is still away");
    net.restart(1);
    let copy = &net.servers[1].machine.volumes[&VOLUME].copies[&CopyId(101)];
    assert_eq!(copy.layers[&LAYER].missed[&4].mask, 0b100);
}
