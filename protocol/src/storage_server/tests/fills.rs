//! Fills, settles and repairs between whole servers.

use super::*;

fn member(map: &mut VolumeMap, n: usize) -> &mut Member {
    &mut map.placements[0].groups[0].members[n]
}

pub(super) fn bytes_of(net: &Net, n: usize, page: u64) -> Option<Vec<u8>> {
    let key = PageKey { copy: CopyId(100 + n as u128), layer: LAYER, page };
    let (record, bytes) = net.servers[n].medium.pages.get(&key)?;
    let seen = record.blocks.iter().flat_map(|(b, state)| {
        let data = &bytes[b as usize * 4096..][..4096];
        if state == BlockState::Present { data.to_vec() } else { vec![0; 4096] }
    });
    Some(seen.collect())
}

/// Server 1 is away while pages 0 and 9 are written, then rejoins as `Syncing` at generation 4.
pub(super) fn rejoining() -> (Net, HandleId) {
    let mut net = Net::started(2);
    let handle = net.open(1, 1, 1);
    net.ask(1, handle, 1, write_at(3, 0), block(0xee));
    net.restart(1);
    net.fence(0, 2, vec![]);
    let failed = net.map_with_boots(2, |map| member(map, 1).state = MemberState::Failed);
    net.control(0, ControlRequest::Serve { map: failed });
    let handle = net.open(0, 2, 1);
    for page in [0, 9] {
        net.ask(0, handle, 2, write_at(page, 8192), block(page as u8 + 1));
    }
    net.fence(0, 4, vec![]);
    let promised = net.fence(1, 4, vec![CopyId(101)]);
    assert_eq!(promised.copies[0].unsynced, 16, "H7: every page, before the fence is answered");
    net.cut = true;
    net.serve(net.map_with_boots(4, |map| member(map, 1).state = MemberState::Syncing));
    (net, handle)
}

#[test]
fn a_full_fill_brings_what_was_missed_and_takes_what_the_source_does_not_have() {
    let (mut net, _) = rejoining();
    net.cut = false;
    net.restart_pulls();
    let report = net.fence(1, 5, vec![]);
    assert_eq!(report.copies[0].unsynced, 0, "I7");
    for page in [0, 9] {
        assert_eq!(bytes_of(&net, 1, page), bytes_of(&net, 0, page), "page {page}");
    }
    assert_eq!(bytes_of(&net, 1, 3), Some(vec![0; 65536]), "a write that only the returning member had is gone");
}

#[test]
fn a_clients_write_wins_over_a_fill_in_whatever_order_they_come() {
    let (mut net, first) = rejoining();
    let second = net.open(1, 4, 1);
    for (n, handle) in [(0, first), (1, second)] {
        net.ask(n, handle, 4, write_at(9, 8192), block(0x77));
    }
    net.cut = false;
    net.restart_pulls();
    assert_eq!(bytes_of(&net, 1, 9).unwrap()[8192], 0x77);
    assert_eq!(bytes_of(&net, 1, 9), bytes_of(&net, 0, 9));
}

#[test]
fn a_fill_that_was_under_way_at_a_promise_is_dropped() {
    let (mut net, _) = rejoining();
    net.cut = false;
    net.servers[1].medium.hold = true;
    net.restart_pulls();
    let call = net.control_later(
        1,
        ControlRequest::Fence(Fence { volume: VOLUME, generation: Generation(5), flush: false, unsync: vec![] }),
    );
    net.run();
    net.servers[1].medium.hold = false;
    net.run();
    let ControlReply::Promised(promised) = &net.answers[&call] else { panic!("promised") };
    assert_eq!(promised.copies[0].unsynced, 16, "H6");
}

#[test]
fn what_is_pending_at_the_source_is_pending_at_the_filled_copy() {
    let (mut net, _) = rejoining();
    net.cut = false;
    net.restart_pulls();
    assert_eq!(net.pending(1), 2, "H9: the two pages written and not confirmed");
}

#[test]
fn what_a_fill_brings_of_confirmed_writers_does_not_stay_pending() {
    let (mut net, _) = rejoining();
    let second = net.open(1, 4, 1);
    net.confirm(1, second, 4, Seq(1_000));
    net.advance(1_000);
    net.cut = false;
    net.restart_pulls();
    assert_eq!(net.pending(0), 2, "the source has not heard it");
    net.advance(1_000);
    assert_eq!(net.pending(1), 0, "no later confirmed comes from an idle driver");
}

#[test]
fn what_a_fill_brings_of_an_adopted_incarnation_does_not_stay_pending() {
    let (mut net, _) = rejoining();
    let successor = net.open_incarnation(1, 4, 2, 1);
    net.ask(1, successor, 4, RequestBody::Adopt { incarnation: Incarnation(1) }, Bytes::new());
    net.advance(1_000);
    net.cut = false;
    net.restart_pulls();
    assert_eq!(net.pending(0), 2, "the source has not heard it");
    net.advance(1_000);
    assert_eq!(net.pending(1), 0);
}

#[test]
fn a_settle_makes_suspect_pages_equal_and_its_end_clears_them() {
    let mut net = Net::started(2);
    let first = net.open(0, 1, 1);
    let second = net.open(1, 1, 1);
    net.ask(0, first, 1, write_at(2, 0), block(1));
    net.ask(1, second, 1, write_at(2, 4096), block(2));
    net.ask(1, second, 1, write_at(5, 0), block(3));
    for n in [0, 1] {
        net.restart(n);
    }
    let begin = net.map_with_boots(3, |map| {
        let source = *member(map, 0);
        let settle = Settle::Running { authoritative: source.copy, boot: source.boot, begun: Generation(3) };
        map.placements[0].groups[0].settle = settle;
        map.sessions[0].standing = Standing::Held;
    });
    net.serve(begin);
    let reports: Vec<_> = (0..2).map(|n| net.fence(n, 4, vec![]).copies[0].clone()).collect();
    assert!(reports.iter().all(|r| r.to_settle == 0 && r.settled_for.is_some()), "{reports:?}");
    assert!(reports.iter().all(|r| r.pending_before_start > 0), "M1: nothing is cleared before the map that says over");
    for page in [2, 5] {
        let zero = || vec![0; 65536];
        assert_eq!(bytes_of(&net, 1, page), bytes_of(&net, 0, page).or_else(|| Some(zero())), "page {page}");
    }
    net.serve(net.map_with_boots(4, |map| map.placements[0].groups[0].settle = Settle::Over));
    assert_eq!((net.pending(0), net.pending(1)), (0, 0));
}

#[test]
fn a_settle_of_another_name_is_not_counted() {
    let mut net = Net::started(2);
    let settle = |source: Member, begun| Settle::Running {
        authoritative: source.copy,
        boot: source.boot,
        begun: Generation(begun),
    };
    net.serve(net.map_with_boots(3, |map| {
        let source = *member(map, 0);
        map.placements[0].groups[0].settle = settle(source, 3);
    }));
    net.cut = true;
    net.serve(net.map_with_boots(4, |map| {
        let source = *member(map, 0);
        map.placements[0].groups[0].settle = settle(source, 4);
    }));
    let report = net.fence(1, 5, vec![]).copies[0].clone();
    assert_ne!(report.to_settle, 0, "M3: what was settled for generation 3 says nothing of the settle begun at 4");
}

#[test]
fn a_rotted_block_is_answered_as_bad_and_repaired_from_the_next_member() {
    let mut net = Net::started(2);
    let handles = [net.open(0, 1, 1), net.open(1, 1, 1)];
    for (n, handle) in handles.into_iter().enumerate() {
        net.ask(n, handle, 1, write_at(0, 0), block(5));
    }
    let key = PageKey { copy: CopyId(100), layer: LAYER, page: 0 };
    net.servers[0].medium.rotten.push((key, 0));
    let reply = net.ask(0, handles[0], 1, read_at(0), Bytes::new());
    assert_eq!(reply.body, ReplyBody::BadBlock { blocks: vec![0] }, "R12");
    assert_eq!(net.ask(0, handles[0], 1, read_at(0), Bytes::new()).payload, block(5), "repaired");
    let told: Vec<_> = net.rot.iter().map(|rot| (rot.volume, rot.page, rot.bad)).collect();
    assert_eq!(told, [(VOLUME, key, 1), (VOLUME, key, 0)], "found, then repaired");
}

#[test]
fn i8_a_forced_copy_serves_what_it_kept_and_nothing_is_unsynced_any_more() {
    let (mut net, _) = rejoining();
    let settle = |boot| Settle::Running { authoritative: CopyId(101), boot, begun: Generation(6) };
    let promised = net.fence(1, 6, vec![]);
    assert_eq!(promised.copies[0].unsynced, 16, "the fence itself changes nothing: the force may never be committed");
    let boot = net.servers[1].boot;
    let forced = net.map_with_boots(6, |map| {
        let group = &mut map.placements[0].groups[0];
        group.members.remove(0);
        (group.loss, group.settle) = (Generation(6), settle(boot));
    });
    assert_eq!(net.control(1, ControlRequest::Serve { map: forced.clone() }), ControlReply::Done);
    let over = net.fence(1, 7, vec![]);
    assert_eq!((over.copies[0].unsynced, over.copies[0].to_settle), (0, 0));
    let mut over = VolumeMap { generation: Generation(7), ..forced };
    over.placements[0].groups[0].settle = Settle::Over;
    assert_eq!(net.control(1, ControlRequest::Serve { map: over }), ControlReply::Done);
    let handle = net.open(1, 7, 3);

    let read = RequestBody::Read { place: Place { layer: LAYER, group: 0, page: 3, offset: 0, length: 4096 } };
    assert_eq!(net.ask(1, handle, 7, read, Bytes::new()).payload, block(0xee), "stale before, content kept");
    net.restart(1);
    let restarted = net.fence(1, 8, vec![]);
    assert_eq!(restarted.copies[0].unsynced, 0, "durably");
}

#[test]
fn i8_only_a_map_that_raises_the_loss_trusts_what_is_behind() {
    let (mut net, _) = rejoining();
    let wrong = net.map_with_boots(6, |_| {});
    net.fence(1, 6, vec![]);
    assert_eq!(net.control(1, ControlRequest::Serve { map: wrong }), ControlReply::Done);
    assert_eq!(net.fence(1, 7, vec![]).copies[0].unsynced, 16, "a map that a plan never makes trusts nothing");
}

#[test]
fn a_fill_keeps_to_its_pace_and_its_window() {
    let (mut net, first) = rejoining();
    for page in 0..16 {
        net.ask(0, first, 4, write_at(page, 0), vec![7; 65536].into());
    }
    let limit = FillLimit { bytes_per_second: 4 * 65536, pages: 1 };
    assert_eq!(net.control(1, ControlRequest::LimitFills { volume: VOLUME, limit }), ControlReply::Done);
    net.cut = false;
    net.restart_pulls();
    let filled = |net: &Net| {
        let pages = (0..16).filter(|page| bytes_of(net, 1, *page).is_some_and(|bytes| bytes[9000] == 7));
        pages.count()
    };
    let mut counts = vec![filled(&net)];
    for _ in 0..15 {
        net.advance(125);
        counts.push(filled(&net));
        net.advance(125);
        counts.push(filled(&net));
    }
    let paced: Vec<_> = (0..=30).map(|eighth| 1 + eighth / 2).collect();
    assert_eq!(counts, paced, "four pages a second");
    let report = net.fence(1, 5, vec![]);
    assert_eq!(report.copies[0].unsynced, 0);
}

#[test]
fn a_server_says_truly_whether_it_reaches_another_one_and_always_answers() {
    let mut net = Net::started(2);
    let ask = |server| ControlRequest::Reach { server: ServerId(server), addresses: vec!["10.0.0.1:1".into()] };
    let said = |server, reached| ControlReply::Reached { server: ServerId(server), reached };
    assert_eq!(net.control(0, ask(11)), said(11, true));
    let nobody = ControlRequest::Reach { server: ServerId(11), addresses: vec![] };
    assert_eq!(net.control(0, nobody), said(11, false));
    let call = net.silent_peers(|net| net.control_later(0, ask(11)));
    assert!(!net.answers.contains_key(&call));
    net.advance(2_000);
    assert_eq!(net.answers.remove(&call), Some(said(11, false)));
}
