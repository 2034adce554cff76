//! generation × {read, write, discard, flush, fill, written} × {lower, equal, higher, promised} × {before, after a restart}.

use super::*;

const HANDS: [&str; 6] = ["read", "write", "discard", "flush", "fill", "written"];

fn body(hand: &str) -> (RequestBody, Bytes) {
    let place = Place { layer: LAYER, group: 0, page: 0, offset: 0, length: 4096 };
    match hand {
        "read" => (RequestBody::Read { place }, Bytes::new()),
        "write" => (RequestBody::Write { place }, block(9)),
        "discard" => (RequestBody::Discard { place }, Bytes::new()),
        "flush" => (RequestBody::Flush, Bytes::new()),
        "written" => (RequestBody::Written { layer: LAYER, group: 0, from: 0 }, Bytes::new()),
        _ => (RequestBody::Fill { layer: LAYER, group: 0, page: 0 }, Bytes::new()),
    }
}

/// A server whose stored map is generation 5, and a handle for the hand: a peer's for fills.
fn server(restarted: bool, hand: &str) -> (Net, HandleId) {
    let mut net = Net::started(2);
    net.serve(net.map_with_boots(5, |_| {}));
    if restarted {
        net.restart(0);
        net.serve(net.map_with_boots(6, |_| {}));
    }
    let generation = if restarted { 6 } else { 5 };
    let handle = net.open(0, generation, 1);
    net.ask(0, handle, generation, write_at(0, 0), block(1));
    if hand != "fill" {
        return (net, handle);
    }
    let opener = Opener::Peer { server: ServerId(11) };
    let body = RequestBody::Open {
        volume: VOLUME,
        opener,
        incarnation: Incarnation(0),
        number: OpenNumber(0),
        start: Start::Fresh,
        grant: Bytes::new(),
    };
    match net.ask(0, HandleId(0), generation, body, Bytes::new()).body {
        ReplyBody::Opened { handle, .. } => (net, handle),
        other => panic!("{other:?}"),
    }
}

fn first_block(net: &Net) -> u8 {
    net.servers[0].medium.pages.values().next().expect("written").1[0]
}

#[test]
fn a_request_of_another_generation_is_not_served() {
    for restarted in [false, true] {
        let own = if restarted { 6 } else { 5 };
        for hand in HANDS {
            for (name, generation) in [("lower", own - 1), ("higher", own + 1)] {
                let (mut net, handle) = server(restarted, hand);
                let (body, payload) = body(hand);
                let reply = net.ask(0, handle, generation, body, payload).body;
                let expected = if generation < own {
                    ReplyBody::Stale { wait_for: Generation(own) }
                } else {
                    ReplyBody::Behind { own: Generation(own) }
                };
                assert_eq!(reply, expected, "{hand} at a {name} generation, restarted: {restarted}");
                assert_eq!(first_block(&net), 1, "{hand} at a {name} generation changed a block");
                assert_eq!(net.stale.len(), usize::from(name == "lower"), "counted at once");
            }
        }
    }
}

#[test]
fn a_request_of_the_own_generation_is_served() {
    for restarted in [false, true] {
        for hand in HANDS {
            let (mut net, handle) = server(restarted, hand);
            let (body, payload) = body(hand);
            let reply = net.ask(0, handle, if restarted { 6 } else { 5 }, body, payload).body;
            assert!(reply.is_success(), "{hand}, restarted: {restarted}: {reply:?}");
        }
    }
}

#[test]
fn i1_nothing_is_served_once_a_higher_generation_is_promised() {
    for restarted in [false, true] {
        let own = if restarted { 6 } else { 5 };
        for hand in HANDS {
            let (mut net, handle) = server(restarted, hand);
            net.fence(0, own + 1, vec![]);
            let (body, payload) = body(hand);
            let reply = net.ask(0, handle, own, body, payload).body;
            assert_eq!(reply, ReplyBody::Stale { wait_for: Generation(own + 1) }, "{hand}, restarted: {restarted}");
            assert_eq!(first_block(&net), 1, "{hand} changed a block");
        }
    }
}

#[test]
fn a_session_that_the_map_does_not_list_has_ended_for_good() {
    let (mut net, handle) = server(false, "write");
    net.serve(net.map_with_boots(7, |map| map.sessions.clear()));
    for hand in ["read", "write", "discard", "flush"] {
        let (body, payload) = body(hand);
        assert_eq!(net.ask(0, handle, 5, body, payload).body, ReplyBody::Ended, "{hand}");
    }
    assert_eq!(first_block(&net), 1);
}

#[test]
fn a_held_session_waits_for_a_newer_map() {
    let (mut net, handle) = server(false, "read");
    net.serve(net.map_with_boots(7, |map| map.sessions[0].standing = Standing::Held));
    let (body, payload) = body("read");
    assert_eq!(net.ask(0, handle, 7, body, payload).body, ReplyBody::Stale { wait_for: Generation(8) }, "M5");
}

#[test]
fn failed_members_serve_nothing_and_syncing_ones_are_not_read() {
    let state = |state| move |map: &mut VolumeMap| map.placements[0].groups[0].members[0].state = state;
    for hand in ["read", "write", "discard", "flush"] {
        let (mut net, handle) = server(false, hand);
        net.serve(net.map_with_boots(7, state(MemberState::Failed)));
        let (request, payload) = body(hand);
        assert_eq!(net.ask(0, handle, 7, request.clone(), payload.clone()).body, ReplyBody::NotServing, "{hand}");
        net.serve(net.map_with_boots(8, state(MemberState::Syncing)));
        let served = net.ask(0, handle, 8, request, payload).body.is_success();
        assert_eq!(served, hand != "read", "{hand} on a syncing member");
    }
}

/// A leader makes its next generation higher than any that it hears of: the last number would be the end of a volume.
#[test]
fn a_generation_beyond_all_reach_is_refused_and_not_asked_for() {
    let mut net = Net::started(1);
    let handle = net.open(0, 1, 1);
    for far in [u64::MAX, 1 << 40] {
        assert_eq!(net.ask(0, handle, far, read_at(0), Bytes::new()).body, ReplyBody::Behind { own: Generation(1) });
        assert_eq!(net.try_open(0, far, Incarnation(1), OpenNumber(2)), ReplyBody::Behind { own: Generation(1) });
    }
    net.advance(10_000);
    assert_eq!(net.asked, []);
    net.ask(0, handle, 2, read_at(0), Bytes::new());
    assert_eq!(net.asked, [Generation(2)], "one that there may be is");
}
