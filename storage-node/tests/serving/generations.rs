//! generation × {read, write, discard, flush, fill} × {lower, equal, higher, promised} × {before, after a restart}, at a
//! real process; what each request does to the blocks is read back.

use super::*;
use lamina_protocol::ids::ServerId;
use lamina_protocol::map::{ServerEntry, VolumeMap};
use lamina_protocol::wire::Opener;
use world::{LAYER, SESSION};

const HANDS: [&str; 5] = ["read", "write", "discard", "flush", "fill"];
const PEER: ServerId = ServerId(0xbeef);

fn body(hand: &str) -> (RequestBody, Vec<u8>) {
    match hand {
        "read" => (RequestBody::Read { place: place(0, 1) }, vec![]),
        "write" => (RequestBody::Write { place: place(0, 1) }, vec![9; BLOCK]),
        "discard" => (RequestBody::Discard { place: place(0, 1) }, vec![]),
        "flush" => (RequestBody::Flush, vec![]),
        _ => (RequestBody::Fill { layer: LAYER, group: 0, page: 0 }, vec![]),
    }
}

/// One copy, and a peer that may fill from it.
fn map_of(generation: u64, server: &Process, leader: &Leader, boot: BootId) -> VolumeMap {
    let mut map = map(generation, &[(server, COPIES[0], leader.server, boot, MemberState::Active)]);
    map.servers.push(ServerEntry { id: PEER, addresses: vec!["127.0.0.1:1".into()] });
    map
}

struct Hands {
    driver: Client,
    peer: Client,
}

impl Hands {
    async fn open(server: &Process, leader: &Leader, generation: u64) -> Self {
        let driver = Opener::Session { session: SESSION };
        Self {
            driver: Client::open_as(server, leader.server, driver, (generation, generation)).await,
            peer: Client::open_as(server, leader.server, Opener::Peer { server: PEER }, (generation, 0)).await,
        }
    }

    async fn ask(&mut self, hand: &str, generation: u64) -> ReplyBody {
        let (body, payload) = body(hand);
        let client = if hand == "fill" { &mut self.peer } else { &mut self.driver };
        client.ask(generation, body, payload).await.body
    }

    /// The first byte of the block that all hands are on.
    async fn byte(&mut self, generation: u64) -> u8 {
        let read = self.driver.ask(generation, RequestBody::Read { place: place(0, 1) }, vec![]).await;
        assert_eq!(read.body, ReplyBody::Data);
        read.payload[0]
    }
}

/// Every hand at every generation but the own one: refused, counted at once if it is stale, and without a trace.
async fn others_are_refused(server: &Process, hands: &mut Hands, own: u64) {
    for hand in HANDS {
        let stale = server.metric("lamina_storage_stale_requests_total").await;
        let refused = ReplyBody::Stale { wait_for: Generation(own) };
        assert_eq!(hands.ask(hand, own - 1).await, refused, "{hand} at a lower generation");
        assert_eq!(server.metric("lamina_storage_stale_requests_total").await, stale + 1.0, "{hand}: counted at once");
        let behind = ReplyBody::Behind { own: Generation(own) };
        assert_eq!(hands.ask(hand, own + 1).await, behind, "{hand} at a higher generation");
        assert_eq!(hands.byte(own).await, 1, "{hand} at another generation changed a block");
    }
}

async fn the_own_is_served(hands: &mut Hands, own: u64) {
    for (hand, left) in [("read", 1), ("flush", 1), ("fill", 1), ("write", 9)] {
        let reply = hands.ask(hand, own).await;
        assert!(reply.is_success(), "{hand} at the own generation: {reply:?}");
        assert_eq!(hands.byte(own).await, left, "{hand} at the own generation");
    }
    assert_eq!(hands.ask("discard", own).await, ReplyBody::Done);
    let read = hands.driver.ask(own, RequestBody::Read { place: place(0, 1) }, vec![]).await;
    assert!(read.payload.iter().all(|byte| *byte == 0), "discarded");
    assert_eq!(hands.driver.write(own, 0, vec![1; BLOCK]).await.body, ReplyBody::Done);
}

async fn nothing_is_served_after_a_promise(leader: &mut Leader, hands: &mut Hands, own: u64) {
    let fence = Fence { volume: VOLUME, generation: Generation(own + 1), flush: true, unsync: vec![] };
    assert!(matches!(leader.call(ControlRequest::Fence(fence)).await, ControlReply::Promised(_)));
    for hand in HANDS {
        let refused = ReplyBody::Stale { wait_for: Generation(own + 1) };
        assert_eq!(hands.ask(hand, own).await, refused, "{hand} after a promise");
    }
}

#[tokio::test]
async fn i1_only_requests_of_the_own_generation_are_served_before_and_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), "a").await;
    for own in [5, 7] {
        let mut leader = Leader::connect(&server).await;
        let boot = leader.first_device().await.boot;
        if own == 5 {
            leader.put_copy(COPIES[0], false).await;
        }
        let map = map_of(own, &server, &leader, boot);
        assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
        let mut hands = Hands::open(&server, &leader, own).await;
        assert_eq!(hands.driver.write(own, 0, vec![1; BLOCK]).await.body, ReplyBody::Done);
        others_are_refused(&server, &mut hands, own).await;
        the_own_is_served(&mut hands, own).await;
        nothing_is_served_after_a_promise(&mut leader, &mut hands, own).await;
        let map = map_of(own + 1, &server, &leader, boot);
        assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
        assert_eq!(hands.byte(own + 1).await, 1, "nothing of what was refused landed");
        server.kill();
        server = Process::start(dir.path(), "a").await;
    }
}

/// What was promised holds over a restart: nothing older is served, stored or promised.
#[tokio::test]
async fn i2_a_promise_refuses_every_older_request_and_map_after_a_restart_too() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    let boot = leader.first_device().await.boot;
    leader.put_copy(COPIES[0], false).await;
    let map = map_of(5, &server, &leader, boot);
    assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
    let mut hands = Hands::open(&server, &leader, 5).await;
    assert_eq!(hands.driver.write(5, 0, vec![1; BLOCK]).await.body, ReplyBody::Done);
    let promise =
        |generation| Fence { volume: VOLUME, generation: Generation(generation), flush: true, unsync: vec![] };
    assert!(matches!(leader.call(ControlRequest::Fence(promise(9))).await, ControlReply::Promised(_)));
    server.kill();

    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    let boot = leader.first_device().await.boot;
    let mut hands = Hands::open(&server, &leader, 5).await;
    for hand in HANDS {
        let refused = ReplyBody::Stale { wait_for: Generation(9) };
        assert_eq!(hands.ask(hand, 5).await, refused, "{hand} at the stored generation");
        let behind = ReplyBody::Behind { own: Generation(5) };
        assert_eq!(hands.ask(hand, 9).await, behind, "{hand} at the promised one, of which there is no map yet");
    }
    let refused = ControlReply::Refused { promised: Generation(9), stored: Generation(5) };
    let map = map_of(8, &server, &leader, boot);
    assert_eq!(leader.call(ControlRequest::Serve { map }).await, refused, "a map below the promise");
    assert_eq!(leader.call(ControlRequest::Fence(promise(8))).await, refused, "a promise below the promise");
    let map = map_of(9, &server, &leader, boot);
    assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
    assert_eq!(hands.byte(9).await, 1);
}
