//! The storage server as a real process on loopback: a leader and a driver that speak its wire, and devices in files.
//!
//! Invariant of every test: what it starts ends with it, also when it fails.
#![allow(clippy::unwrap_used)]

#[path = "serving/counted.rs"]
mod counted;
#[path = "serving/devices.rs"]
mod devices;
#[path = "serving/driven.rs"]
mod driven;
#[path = "serving/generations.rs"]
mod generations;
#[allow(dead_code)] // Shared with the other test program.
#[path = "serving/process.rs"]
mod process;
#[path = "serving/world.rs"]
mod world;

use lamina_protocol::control::{ControlReply, ControlRequest, Fence};
use lamina_protocol::ids::{BootId, Generation};
use lamina_protocol::map::MemberState;
use lamina_protocol::wire::{HEADER_BYTES, ReplyBody, RequestBody};
use process::Process;
use rustix::process::Signal;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use world::{COPIES, Client, Leader, VOLUME, map, place};

const BLOCK: usize = 4096;

/// Serves generation 1 with one copy; the boot id of its device.
async fn one_copy(server: &Process, leader: &mut Leader) -> BootId {
    let boot = leader.first_device().await.boot;
    leader.put_copy(COPIES[0], false).await;
    let map = map(1, &[(server, COPIES[0], leader.server, boot, MemberState::Active)]);
    assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
    boot
}

#[tokio::test]
async fn flushed_writes_survive_kill_9_and_the_restart_has_another_boot_id() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    let old = one_copy(&server, &mut leader).await;
    let mut client = Client::open(&server, leader.server, 1).await;
    for block in 0..8 {
        let reply = client.write(1, block, vec![block as u8 + 1; BLOCK]).await;
        assert_eq!((reply.body, reply.header.boot), (ReplyBody::Done, old));
    }
    assert_eq!(client.ask(1, RequestBody::Flush, vec![]).await.body, ReplyBody::Done);
    let id = leader.server;
    server.kill();

    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    assert_eq!(leader.server, id, "the id is in the superblock");
    let new = leader.first_device().await.boot;
    assert_ne!(new, old, "another opening has another boot id (R3)");
    let mut client = Client::open(&server, id, 2).await;
    let read = RequestBody::Read { place: place(0, 8) };
    assert_eq!(client.ask(1, read.clone(), vec![]).await.body, ReplyBody::NotServing, "the map names the old opening");

    let fence = Fence { volume: VOLUME, generation: Generation(2), flush: false, unsync: vec![] };
    let promised = leader.call(ControlRequest::Fence(fence)).await;
    assert!(matches!(promised, ControlReply::Promised(p) if p.copies[0].boot == new && p.stored == Generation(1)));
    let map = map(2, &[(&server, COPIES[0], id, new, MemberState::Active)]);
    assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
    let data = client.ask(2, read, vec![]).await;
    assert_eq!(data.body, ReplyBody::Data);
    assert!((0..8).all(|block| data.payload[block * BLOCK..][..BLOCK].iter().all(|byte| *byte == block as u8 + 1)));
}

#[tokio::test]
async fn a_stale_request_writes_nothing_is_counted_at_once_and_told_to_the_leader() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    let boot = one_copy(&server, &mut leader).await;
    let mut client = Client::open(&server, leader.server, 1).await;
    let map = map(2, &[(&server, COPIES[0], leader.server, boot, MemberState::Active)]);
    assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
    let reply = client.write(1, 0, vec![9; BLOCK]).await;
    assert_eq!(reply.body, ReplyBody::Stale { wait_for: Generation(2) });
    assert_eq!(server.metric("lamina_storage_stale_requests_total").await, 1.0);
    assert_eq!(server.metric("lamina_storage_refusals_total").await, 1.0);
    let seen = leader.stale_seen().await;
    assert_eq!((seen.volume, seen.had, seen.need), (VOLUME, Generation(1), Generation(2)));
    let data = client.ask(2, RequestBody::Read { place: place(0, 1) }, vec![]).await;
    let nothing = data.payload.iter().all(|byte| *byte == 0);
    assert!(matches!(data.body, ReplyBody::Data | ReplyBody::Below { .. }) && nothing, "{:?}", data.body);
}

#[tokio::test]
async fn broken_frames_close_their_connection_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    one_copy(&server, &mut leader).await;
    let mut client = Client::open(&server, leader.server, 1).await;
    let hello = Client::hello_bytes(leader.server);
    let mut version = hello.clone();
    version[4] = 9;
    let mut flipped = hello.clone();
    flipped[60] ^= 1;
    let broken = [u32::MAX.to_le_bytes().to_vec(), 3u32.to_le_bytes().to_vec(), vec![0xa5; 300], version, flipped];
    for bytes in broken {
        let mut stream = TcpStream::connect(server.block).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0, "closed without a word");
    }
    assert_eq!(server.metric("lamina_storage_bad_frames_total{reason=\"framing\"}").await, 5.0);
    let mut stream = TcpStream::connect(server.block).await.unwrap();
    stream.write_all(&hello[..HEADER_BYTES - 1]).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(stream.read(&mut [0; 16]).await.unwrap(), 0);
    assert_eq!(server.metric("lamina_storage_bad_frames_total{reason=\"truncated\"}").await, 1.0);
    let mut stream = TcpStream::connect(server.block).await.unwrap();
    stream.write_all(&Client::hello_to(lamina_protocol::ids::ClusterId(9), leader.server)).await.unwrap();
    assert_eq!(stream.read(&mut [0; 16]).await.unwrap(), 0);
    assert_eq!(server.metric("lamina_storage_protocol_violations_total{reason=\"wrong_cluster\"}").await, 1.0);
    assert_eq!(client.write(1, 0, vec![1; BLOCK]).await.body, ReplyBody::Done, "the others notice nothing");
}

#[tokio::test]
async fn the_metrics_page_tells_requests_latency_states_and_fill_of_copies_and_space_and_errors_of_devices() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    one_copy(&server, &mut leader).await;
    let free = server.metric("lamina_storage_device_free_bytes{").await;
    let mut client = Client::open(&server, leader.server, 1).await;
    for block in 0..3 {
        assert_eq!(client.write(1, block, vec![1; BLOCK]).await.body, ReplyBody::Done);
    }
    client.ask(1, RequestBody::Read { place: place(0, 1) }, vec![]).await;
    let (_, page) = server.get("/metrics").await;
    let of_volume = format!("volume=\"{VOLUME}\"");
    let sum = |family: &str, with: &str| -> f64 {
        let series = page.lines().filter(|line| line.starts_with(family) && line.contains(with));
        let values: Vec<f64> = series.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        assert!(!values.is_empty(), "{family} with {with}: {page}");
        values.iter().sum()
    };
    assert_eq!(sum("lamina_storage_requests_total{", &of_volume), 4.0, "operations");
    assert_eq!(sum("lamina_storage_request_bytes_total{", &of_volume), 4.0 * BLOCK as f64);
    assert_eq!(sum("lamina_storage_request_duration_seconds_bucket{", "le=\"+Inf\""), 4.0, "latency");
    assert_eq!(sum("lamina_storage_copy_state{", "state=\"active\""), 1.0);
    assert_eq!(sum("lamina_storage_copy_unsynced_pages{", &of_volume), 0.0);
    assert_eq!(sum("lamina_storage_copy_filled_bytes{", &of_volume), 0.0);
    assert!(sum("lamina_storage_device_capacity_bytes{", "a.img") >= free);
    let taken = free - sum("lamina_storage_device_free_bytes{", "a.img");
    assert!(taken >= f64::from(1 << 20), "a page is taken: {taken}");
    for errors in ["device_failures", "device_bad_blocks"] {
        assert_eq!(sum(&format!("lamina_storage_{errors}{{"), "a.img"), 0.0);
    }
}

#[tokio::test]
async fn a_server_without_a_usable_device_runs_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    let mut foreign = vec![0; 128 << 20];
    foreign[..4].copy_from_slice(b"XFSB");
    std::fs::write(&path, &foreign).unwrap();
    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect_to_any(&server).await;
    assert!(leader.server.is_none());
    assert!(matches!(leader.heartbeat().await, ControlReply::Alive(alive) if alive.devices.is_empty()));
    server.until_metric("state=\"refused\"").await;
    assert_eq!(server.get("/healthz").await.0, 200);
    assert_eq!(std::fs::read(&path).unwrap(), foreign, "not a byte of it was touched");
}

#[tokio::test]
async fn a_stop_waits_until_the_copies_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Process::start(dir.path(), "a").await;
    let b = Process::start(dir.path(), "b").await;
    let (mut on_a, mut on_b) = (Leader::connect(&a).await, Leader::connect(&b).await);
    let (boot_a, boot_b) = (on_a.first_device().await.boot, on_b.first_device().await.boot);
    on_a.put_copy(COPIES[0], false).await;
    let mut members = [
        (&a, COPIES[0], on_a.server, boot_a, MemberState::Active),
        (&b, COPIES[1], on_b.server, boot_b, MemberState::Active),
    ];
    assert_eq!(on_a.call(ControlRequest::Serve { map: map(1, &members) }).await, ControlReply::Done);
    assert_eq!(a.get("/readyz").await.0, 200, "a leader has spoken and its copy is Active");
    a.terminate();
    while !matches!(on_a.heartbeat().await, ControlReply::Alive(alive) if alive.leaving) {}
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(a.is_running(), "it is still counted on");
    members[0].4 = MemberState::Failed;
    let left_out = map(2, &members);
    on_a.send(ControlRequest::Serve { map: left_out });
    assert_eq!(a.exited().await, Some(0));
}

#[tokio::test]
async fn it_is_ready_only_when_the_leader_has_spoken_to_this_process_and_every_named_copy_is_active_under_its_boot_id()
{
    const ACTIVE: MemberState = MemberState::Active;
    let dir = tempfile::tempdir().unwrap();
    let a = Process::start(dir.path(), "a").await;
    let b = Process::start(dir.path(), "b").await;
    let word = async |process: &Process| {
        let (code, answer) = process.get("/readyz").await;
        (code, answer.lines().last().unwrap_or_default().to_owned())
    };
    let silent = (503, "no leader has spoken to this process yet".to_owned());
    let behind = (503, "1 copies are not Active under their present opening".to_owned());
    let ready = (200, "ready".to_owned());
    assert_eq!(word(&a).await, silent);
    let (mut leader, other) = (Leader::connect(&a).await, Leader::connect(&b).await);
    let boot = leader.first_device().await.boot;
    assert_eq!(word(&a).await, ready, "no map names anything of it");
    leader.put_copy(COPIES[0], false).await;
    let another = BootId(77);
    let of_b = (&b, COPIES[1], other.server, BootId(78), ACTIVE);
    let states = [
        (ACTIVE, boot, &ready),
        (MemberState::Failed, boot, &behind),
        (MemberState::Syncing, boot, &behind),
        (ACTIVE, another, &behind),
        (ACTIVE, boot, &ready),
    ];
    for (generation, (state, boot, expected)) in (1..).zip(states) {
        let map = map(generation, &[(&a, COPIES[0], leader.server, boot, state), of_b]);
        assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
        assert_eq!(word(&a).await, *expected, "{state:?} as {boot}");
    }
    a.kill();
    let a = Process::start(dir.path(), "a").await;
    assert_eq!(word(&a).await, silent, "not to this process");
    let mut leader = Leader::connect(&a).await;
    leader.heartbeat().await;
    assert_eq!(word(&a).await, behind, "Active, but under another boot id");
    let map = map(6, &[of_b]);
    assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
    assert_eq!(word(&a).await, ready, "its copy was given up");
}

#[tokio::test]
async fn a_second_signal_during_a_planned_leave_ends_the_process_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for (n, (first, second)) in [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::TERM)].into_iter().enumerate() {
        let mut a = Process::start(dir.path(), &format!("a{n}")).await;
        let b = Process::start(dir.path(), &format!("b{n}")).await;
        let (mut on_a, mut on_b) = (Leader::connect(&a).await, Leader::connect(&b).await);
        let (boot_a, boot_b) = (on_a.first_device().await.boot, on_b.first_device().await.boot);
        on_a.put_copy(COPIES[0], false).await;
        let members = [
            (&a, COPIES[0], on_a.server, boot_a, MemberState::Active),
            (&b, COPIES[1], on_b.server, boot_b, MemberState::Active),
        ];
        assert_eq!(on_a.call(ControlRequest::Serve { map: map(1, &members) }).await, ControlReply::Done);
        a.signal(first);
        while !matches!(on_a.heartbeat().await, ControlReply::Alive(alive) if alive.leaving) {}
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(a.is_running(), "it waits to be left out");
        let asked = Instant::now();
        a.signal(second);
        assert_eq!(a.exited().await, Some(0));
        assert!(asked.elapsed() < Duration::from_secs(3), "long before the leader would be given up");
    }
}

#[tokio::test]
async fn a_syncing_copy_is_filled_from_its_peer_and_both_are_equal() {
    let dir = tempfile::tempdir().unwrap();
    let a = Process::start(dir.path(), "a").await;
    let b = Process::start(dir.path(), "b").await;
    let (mut on_a, mut on_b) = (Leader::connect(&a).await, Leader::connect(&b).await);
    let boot_a = one_copy(&a, &mut on_a).await;
    let mut client = Client::open(&a, on_a.server, 1).await;
    for block in (0..1024).step_by(37) {
        assert_eq!(client.write(1, block, vec![block as u8 | 1; BLOCK]).await.body, ReplyBody::Done);
    }
    assert_eq!(client.ask(1, RequestBody::Flush, vec![]).await.body, ReplyBody::Done);
    let boot_b = on_b.first_device().await.boot;
    on_b.put_copy(COPIES[1], true).await;
    let members = [
        (&a, COPIES[0], on_a.server, boot_a, MemberState::Active),
        (&b, COPIES[1], on_b.server, boot_b, MemberState::Syncing),
    ];
    for leader in [&mut on_a, &mut on_b] {
        let map = map(2, &members);
        assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
    }
    on_b.until_filled().await;
    for leader in [&mut on_a, &mut on_b] {
        let flush = ControlRequest::PrepareFlush { volume: VOLUME, generation: Generation(2) };
        assert_eq!(leader.call(flush).await, ControlReply::Done);
    }
    let (path_a, path_b) = (a.device(), b.device());
    a.kill();
    b.kill();
    let report = process::inspect(&[&path_a, &path_b], &dir.path().join("out.img"));
    assert!(report.contains(": 0 blocks differ"), "{report}");
    let bytes = std::fs::read(dir.path().join("out.img")).unwrap();
    for (block, content) in bytes.chunks(BLOCK).enumerate() {
        let expected = if block < 1024 && block % 37 == 0 { block as u8 | 1 } else { 0 };
        assert!(content.iter().all(|byte| *byte == expected), "block {block}");
    }
}

#[tokio::test]
async fn a_blank_device_in_place_of_a_used_one_gives_no_copy_never_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    one_copy(&server, &mut leader).await;
    let mut client = Client::open(&server, leader.server, 1).await;
    assert_eq!(client.write(1, 0, vec![1; BLOCK]).await.body, ReplyBody::Done);
    let device = server.device();
    server.kill();
    std::fs::remove_file(device).unwrap();

    let server = Process::start(dir.path(), "a").await;
    let mut leader = Leader::connect(&server).await;
    let boot = leader.first_device().await.boot;
    let map = map(2, &[(&server, COPIES[0], leader.server, boot, MemberState::Active)]);
    leader.call(ControlRequest::Serve { map }).await;
    assert_eq!(Client::refused(&server, leader.server).await, ReplyBody::NoCopy);
}
