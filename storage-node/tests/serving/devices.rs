//! Several devices behind one server: copies spread over them, and one that is missing, broken or cut short costs only what
//! lies on it.

use super::*;
use lamina_protocol::ids::{CopyId, DeviceId};
use lamina_protocol::map::{Group, VolumeMap};
use lamina_protocol::wire::Place;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A volume of two groups, with a copy of each on this one server.
struct Halves {
    server: Process,
    leader: Leader,
    client: Client,
    /// Where each copy lies.
    lie: BTreeMap<CopyId, DeviceId>,
}

fn files(dir: &Path) -> [PathBuf; 2] {
    ["a.img", "b.img"].map(|name| dir.join(name))
}

/// Made when they are not there.
async fn start(dir: &Path) -> Process {
    Process::with_devices(&files(dir).map(|file| format!("{},size=128MiB", file.display()))).await
}

/// Only those that are there.
async fn start_again(dir: &Path) -> Process {
    Process::with_devices(&files(dir).map(|file| file.display().to_string())).await
}

fn of_group(group: u32) -> Place {
    Place { group, ..place(0, 1) }
}

/// The present opening of each copy's device; `BootId::NONE` where it is not open.
async fn boots(leader: &mut Leader, lie: &BTreeMap<CopyId, DeviceId>) -> [BootId; 2] {
    let open = leader.alive().await.devices;
    COPIES.map(|copy| open.iter().find(|d| d.device == lie[&copy]).map_or(BootId::NONE, |d| d.boot))
}

fn halves(generation: u64, server: &Process, leader: &Leader, boots: [BootId; 2]) -> VolumeMap {
    let row = |n: usize| (server, COPIES[n], leader.server, boots[n], MemberState::Active);
    let mut map = map(generation, &[row(0), row(1)]);
    map.servers.truncate(1);
    let whole = map.placements[0].groups.remove(0);
    map.placements[0].groups = whole.members.iter().map(|m| Group { members: vec![*m], ..whole.clone() }).collect();
    map
}

impl Halves {
    /// Both halves hold a flushed block of their number + 1.
    async fn written(dir: &Path) -> Self {
        let server = start(dir).await;
        let mut leader = Leader::connect(&server).await;
        assert_eq!(leader.alive().await.devices.len(), 2);
        for (group, copy) in (0..).zip(COPIES) {
            leader.put_copy_of_group(copy, group).await;
        }
        let lie = leader.inventory().await;
        let boots = boots(&mut leader, &lie).await;
        let map = halves(1, &server, &leader, boots);
        assert_eq!(leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
        let mut client = Client::open(&server, leader.server, 1).await;
        for group in 0..2 {
            let write = RequestBody::Write { place: of_group(group) };
            assert_eq!(client.ask(1, write, vec![group as u8 + 1; BLOCK]).await.body, ReplyBody::Done);
        }
        assert_eq!(client.ask(1, RequestBody::Flush, vec![]).await.body, ReplyBody::Done);
        Self { server, leader, client, lie }
    }

    /// What a leader does after an opening: a fence, then a map with the boot ids as they are.
    async fn serve(&mut self, generation: u64) {
        let fence = Fence { volume: VOLUME, generation: Generation(generation), flush: false, unsync: vec![] };
        assert!(matches!(self.leader.call(ControlRequest::Fence(fence)).await, ControlReply::Promised(_)));
        let boots = boots(&mut self.leader, &self.lie).await;
        let map = halves(generation, &self.server, &self.leader, boots);
        assert_eq!(self.leader.call(ControlRequest::Serve { map }).await, ControlReply::Done);
    }

    /// Another process, and a new session with it.
    async fn follow(&mut self, server: Process) {
        self.server = server;
        self.leader = Leader::connect(&self.server).await;
    }

    async fn read(&mut self, generation: u64, group: u32) -> Result<u8, ReplyBody> {
        let reply = self.client.ask(generation, RequestBody::Read { place: of_group(group) }, vec![]).await;
        if reply.body == ReplyBody::Data { Ok(reply.payload[0]) } else { Err(reply.body) }
    }

    async fn both_are_whole(&mut self, generation: u64) {
        assert_eq!([self.read(generation, 0).await, self.read(generation, 1).await], [Ok(1), Ok(2)]);
    }
}

#[tokio::test]
async fn copies_spread_over_the_devices_of_a_server_and_a_restart_serves_from_both() {
    let dir = tempfile::tempdir().unwrap();
    let mut halves = Halves::written(dir.path()).await;
    assert_ne!(halves.lie[&COPIES[0]], halves.lie[&COPIES[1]], "empty copies spread, too");
    let (id, before) = (halves.leader.server, boots(&mut halves.leader, &halves.lie).await);
    halves.server.end();
    halves.follow(start(dir.path()).await).await;
    assert_eq!((halves.leader.server, halves.leader.inventory().await), (id, halves.lie.clone()));
    let after = boots(&mut halves.leader, &halves.lie).await;
    assert!(after.iter().all(|boot| !boot.is_none() && !before.contains(boot)), "each opening has its own id");
    halves.serve(2).await;
    halves.client = Client::open(&halves.server, id, 2).await;
    halves.both_are_whole(2).await;
}

#[tokio::test]
async fn a_device_that_is_missing_at_start_costs_only_its_copies_and_is_used_once_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut halves = Halves::written(dir.path()).await;
    halves.server.end();
    let [_, file] = files(dir.path());
    let away = dir.path().join("away");
    std::fs::rename(&file, &away).unwrap();

    halves.follow(start_again(dir.path()).await).await;
    halves.server.until_metric("b.img\",state=\"missing\"").await;
    let here = halves.leader.inventory().await;
    assert_eq!((here.len(), halves.leader.alive().await.devices.len()), (1, 1));
    halves.serve(2).await;
    halves.client = Client::open(&halves.server, halves.leader.server, 2).await;
    for (group, copy) in (0..).zip(COPIES) {
        let read = halves.read(2, group).await;
        if here.contains_key(&copy) {
            assert_eq!(read, Ok(group as u8 + 1), "the rest serves");
        } else {
            assert_eq!(read, Err(ReplyBody::NoCopy), "never zeroes");
        }
    }

    std::fs::rename(&away, &file).unwrap();
    halves.server.until_metric("b.img\",state=\"ready\"").await;
    assert_eq!(halves.leader.inventory().await, halves.lie, "nobody had to restart it");
    halves.serve(3).await;
    halves.both_are_whole(3).await;
}

#[tokio::test]
async fn a_device_that_fails_is_shown_its_copies_are_closed_and_it_is_opened_anew_when_it_works_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut halves = Halves::written(dir.path()).await;
    let before = boots(&mut halves.leader, &halves.lie).await;
    halves.server.fail_writes(true);
    let write = RequestBody::Write { place: of_group(0) };
    assert_eq!(halves.client.ask(1, write, vec![7; BLOCK]).await.body, ReplyBody::NotServing, "never a success (R3)");
    halves.server.until_metric("state=\"failed\"").await;
    let alive = halves.leader.alive().await;
    assert_eq!((alive.devices.len(), alive.devices[0].boot), (1, before[1]));
    let closed: Vec<_> = alive.copies.iter().filter(|copy| copy.boot.is_none()).map(|copy| copy.copy).collect();
    assert_eq!(closed, [COPIES[0]], "its copy is reported closed");
    halves.server.until_metric("state=\"closed\"").await;
    assert_eq!(halves.read(1, 0).await, Err(ReplyBody::NotServing));
    assert_eq!(halves.read(1, 1).await, Ok(2), "the other device goes on");

    halves.server.fail_writes(false);
    while halves.leader.alive().await.devices.len() < 2 {
        // sleep: the next look at the device is due within seconds.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let after = boots(&mut halves.leader, &halves.lie).await;
    assert!(!before.contains(&after[0]) && after[1] == before[1], "another opening of this one alone");
    halves.serve(2).await;
    assert_eq!(halves.read(2, 1).await, Ok(2));
    assert!(matches!(halves.read(2, 0).await, Ok(1 | 7)), "old or new, as after a crash");
}

#[tokio::test]
async fn a_file_that_was_cut_short_is_refused_and_never_filled_up_with_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let mut halves = Halves::written(dir.path()).await;
    halves.server.end();
    let [_, file] = files(dir.path());
    let whole = std::fs::read(&file).unwrap();
    let cut = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    cut.set_len(64 << 20).unwrap();

    halves.follow(start(dir.path()).await).await;
    halves.server.until_metric("b.img\",state=\"refused\"").await;
    assert_eq!(halves.leader.alive().await.devices.len(), 1, "the other is used");
    assert_eq!(cut.metadata().unwrap().len(), 64 << 20, "not a byte was added");
    halves.server.end();
    std::fs::write(&file, whole).unwrap();
    halves.follow(start(dir.path()).await).await;
    halves.serve(2).await;
    halves.client = Client::open(&halves.server, halves.leader.server, 2).await;
    halves.both_are_whole(2).await;
}
