//! Storage servers as processes under the real driver, with counters between them: what is acknowledged stays, and who
//! speaks to whom.

use super::*;
use bytes::Bytes;
use counted::{CONFIRM, Counted, FLUSH, HANDLED, PING, READ, WRITE};
use lamina_client::block::{BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget, Completions};
use lamina_client::runtime::{Options, SteadyClock, Volume};
use lamina_protocol::control::DriverReport;
use lamina_protocol::driver::Config;
use lamina_protocol::ids::{BootId, CopyId, ServerId};
use lamina_protocol::limits::KEPT_WRITES_BYTES;
use lamina_protocol::map::{Group, VolumeMap};
use lamina_protocol::wire::Start;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use world::{CLUSTER, SESSION};

const PATIENCE: Duration = Duration::from_secs(30);
const CHUNK: u64 = 64 << 10;

struct Answers(mpsc::UnboundedSender<BlockResult>);

impl Completions for Answers {
    fn complete(&self, _: u64, result: BlockResult) {
        let _ = self.0.send(result);
    }
}

/// An attached volume.
struct Attached {
    volume: Volume,
    maps: watch::Sender<Option<VolumeMap>>,
    reports: mpsc::Receiver<DriverReport>,
}

impl Attached {
    fn open(map: Option<VolumeMap>) -> Self {
        let (maps, map_source) = watch::channel(map);
        let (report_sink, reports) = mpsc::channel(64);
        let driver = Config { volume: VOLUME, session: SESSION, start: Start::Fresh, kept_bytes: KEPT_WRITES_BYTES };
        let options = Options {
            cluster: CLUSTER,
            driver,
            prefer: Vec::new(),
            maps: map_source,
            reports: report_sink,
            on_exit: Box::new(|| panic!("nobody takes this device over")),
            clock: Box::<SteadyClock>::default(),
        };
        Self { volume: Volume::open(options).unwrap(), maps, reports }
    }

    async fn served(map: VolumeMap) -> Self {
        let attached = Self::open(Some(map));
        assert!(timeout(PATIENCE, attached.volume.served()).await.unwrap().serving);
        attached
    }

    async fn ask(&self, op: BlockOp) -> BlockResult {
        let (sink, mut answers) = mpsc::unbounded_channel();
        self.volume.submit(BlockRequest { op, tag: 0, completions: Arc::new(Answers(sink)) });
        timeout(PATIENCE, answers.recv()).await.expect("an answer comes").unwrap()
    }

    async fn write(&self, address: u64, payload: Vec<u8>) {
        let done = self.ask(BlockOp::Write { address, payload: payload.into(), fua: false }).await;
        assert_eq!(done, Ok(Bytes::new()), "a write never ends in an error (H22)");
    }

    async fn byte(&self, block: u64) -> u8 {
        let read = self.ask(BlockOp::Read { address: block * BLOCK as u64, length: BLOCK as u32 }).await.unwrap();
        assert!(read.iter().all(|byte| *byte == read[0]), "block {block} is torn");
        read[0]
    }
}

/// Two servers with a copy each.
async fn pair(dir: &std::path::Path) -> ([Process; 2], [Leader; 2], [BootId; 2]) {
    let servers = [Process::start(dir, "a").await, Process::start(dir, "b").await];
    let mut leaders = [Leader::connect(&servers[0]).await, Leader::connect(&servers[1]).await];
    let boots = [leaders[0].first_device().await.boot, leaders[1].first_device().await.boot];
    leaders[0].put_copy(COPIES[0], false).await;
    leaders[1].put_copy(COPIES[1], false).await;
    (servers, leaders, boots)
}

type Row<'a> = (&'a Process, CopyId, ServerId, BootId, MemberState);

fn rows<'a>(servers: &'a [Process; 2], ids: [ServerId; 2], boots: [BootId; 2], second: MemberState) -> [Row<'a>; 2] {
    [
        (&servers[0], COPIES[0], ids[0], boots[0], MemberState::Active),
        (&servers[1], COPIES[1], ids[1], boots[1], second),
    ]
}

async fn serve(leader: &mut Leader, map: &VolumeMap) {
    assert_eq!(leader.call(ControlRequest::Serve { map: map.clone() }).await, ControlReply::Done);
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_a_server_during_writes_loses_no_acknowledged_write_and_both_copies_become_equal() {
    let dir = tempfile::tempdir().unwrap();
    let (servers, mut leaders, boots) = pair(dir.path()).await;
    let ids = [leaders[0].server, leaders[1].server];
    let first = map(1, &rows(&servers, ids, boots, MemberState::Active));
    for leader in &mut leaders {
        serve(leader, &first).await;
    }
    let attached = Arc::new(Attached::served(first).await);
    let acknowledged = Arc::new(AtomicU64::new(0));
    let (writer, counted) = (attached.clone(), acknowledged.clone());
    // Each block is written again and again with a rising byte; at any time one write is not acknowledged.
    let writing = tokio::spawn(async move {
        for nth in 0..2000u64 {
            writer.write(nth % 512 * BLOCK as u64, vec![(nth / 512 + 1) as u8; BLOCK]).await;
            counted.store(nth + 1, Ordering::SeqCst);
        }
    });
    while acknowledged.load(Ordering::SeqCst) < 700 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let [a, b] = servers;
    let b_device = b.device();
    b.kill();
    assert!(acknowledged.load(Ordering::SeqCst) < 2000, "it was killed during the writes");

    // What the operator does: fence the one that is there, leave the other out.
    let fence = |generation| Fence { volume: VOLUME, generation: Generation(generation), flush: true, unsync: vec![] };
    assert!(matches!(leaders[0].call(ControlRequest::Fence(fence(2))).await, ControlReply::Promised(_)));
    let b = Process::start(dir.path(), "b").await;
    let servers = [a, b];
    let alone = map(2, &rows(&servers, ids, boots, MemberState::Failed));
    serve(&mut leaders[0], &alone).await;
    attached.maps.send_replace(Some(alone));
    timeout(PATIENCE, writing).await.expect("writes go on").unwrap();
    for block in 0..512 {
        let last = if block < 2000 % 512 { 4 } else { 3 };
        assert_eq!(attached.byte(block).await, last, "block {block}");
    }

    // It comes back, is filled, and is Active again.
    leaders[1] = Leader::connect(&servers[1]).await;
    let boots = [boots[0], leaders[1].first_device().await.boot];
    assert!(matches!(leaders[0].call(ControlRequest::Fence(fence(3))).await, ControlReply::Promised(_)));
    let rejoin = Fence { unsync: vec![COPIES[1]], ..fence(3) };
    assert!(matches!(leaders[1].call(ControlRequest::Fence(rejoin)).await, ControlReply::Promised(_)));
    let both = map(3, &rows(&servers, ids, boots, MemberState::Syncing));
    for leader in &mut leaders {
        serve(leader, &both).await;
    }
    attached.maps.send_replace(Some(both));
    leaders[1].until_filled().await;
    attached.write(0, vec![77; BLOCK]).await;
    assert_eq!(attached.ask(BlockOp::Flush).await, Ok(Bytes::new()));
    drop(attached);
    let a_device = servers[0].device();
    servers.into_iter().for_each(Process::kill);
    let report = process::inspect(&[&a_device, &b_device], &dir.path().join("out.img"));
    assert!(report.contains(": 0 blocks differ"), "{report}");
    let image = std::fs::read(dir.path().join("out.img")).unwrap();
    for (block, content) in image.chunks(BLOCK).enumerate().take(512) {
        let expected = if block == 0 { 77 } else { 3 + u8::from(block < 2000 % 512) };
        assert!(content.iter().all(|byte| *byte == expected), "block {block}");
    }
}

/// A map of one group on each of two servers, which are reached through the counters.
async fn striped(
    servers: &[Process; 2],
    leaders: &mut [Leader; 2],
    boots: [BootId; 2],
    data: &[Counted; 2],
) -> VolumeMap {
    let ids = [leaders[0].server, leaders[1].server];
    let mut striped = map(1, &rows(servers, ids, boots, MemberState::Active));
    let members = std::mem::take(&mut striped.placements[0].groups[0].members);
    let of = |member| Group { members: vec![member], ..striped.placements[0].groups[0].clone() };
    striped.placements[0].groups = members.into_iter().map(of).collect();
    striped.layers[0].chunk_bytes = CHUNK as u32;
    for (server, counted) in striped.servers.iter_mut().zip(data) {
        server.addresses = vec![counted.address.to_string()];
    }
    // The second server's copy is that of group 1.
    leaders[1].put_copy_of_group(CopyId(0x99), 1).await;
    striped.placements[0].groups[1].members[0].copy = CopyId(0x99);
    striped
}

/// Writes and reads each chunk of the volume, then flushes.
async fn write_and_read_all(attached: &Attached) {
    for chunk in 0..(8 << 20) / CHUNK {
        attached.write(chunk * CHUNK, vec![3; CHUNK as usize]).await;
        let read = BlockOp::Read { address: chunk * CHUNK, length: CHUNK as u32 };
        assert_eq!(attached.ask(read).await.unwrap().len(), CHUNK as usize);
    }
    assert_eq!(attached.ask(BlockOp::Flush).await, Ok(Bytes::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_io_before_the_first_map_then_stripes_evenly_and_nothing_to_the_leader() {
    let dir = tempfile::tempdir().unwrap();
    let (servers, mut leaders, boots) = pair(dir.path()).await;
    let data = [Counted::before(servers[0].block).await, Counted::before(servers[1].block).await];
    let striped = striped(&servers, &mut leaders, boots, &data).await;

    let mut attached = Attached::open(None);
    let write = BlockOp::Write { address: 0, payload: vec![3; CHUNK as usize].into(), fua: false };
    assert_eq!(attached.ask(write).await, Err(BlockError::Invalid), "a volume of no size yet");
    assert!(data.iter().all(|counted| counted.connections() == 0), "nobody was called");

    for leader in &mut leaders {
        serve(leader, &striped).await;
    }
    attached.maps.send_replace(Some(striped));
    assert!(timeout(PATIENCE, attached.volume.served()).await.unwrap().serving);
    let before = [data[0].bytes(), data[1].bytes()];
    let heard = [leaders[0].heard(), leaders[1].heard()];
    write_and_read_all(&attached).await;
    let moved = [data[0].bytes() - before[0], data[1].bytes() - before[1]];
    let (least, most) = (moved[0].min(moved[1]), moved[0].max(moved[1]));
    assert!(least >= 8 << 20, "half of the reads and writes went to each: {moved:?}");
    assert!(most - least <= least / 100, "stripes are even within 1 %: {moved:?}");
    nothing_was_said(&mut attached, &mut leaders, heard).await;
}

/// The driver reported nothing, and the servers said nothing unasked to their leader.
async fn nothing_was_said(attached: &mut Attached, leaders: &mut [Leader; 2], heard: [usize; 2]) {
    assert!(attached.reports.try_recv().is_err(), "the driver has nothing to report");
    // An answer to a last question comes behind whatever else a server said meanwhile.
    for (leader, heard) in leaders.iter_mut().zip(heard) {
        leader.heartbeat().await;
        assert_eq!(leader.heard(), heard, "a server said something to the leader unasked");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn steady_io_is_reads_writes_flushes_confirmations_and_pings_and_handled_is_said_once_for_a_loss() {
    let dir = tempfile::tempdir().unwrap();
    let (servers, mut leaders, boots) = pair(dir.path()).await;
    let data = [Counted::before(servers[0].block).await, Counted::before(servers[1].block).await];
    let first = striped(&servers, &mut leaders, boots, &data).await;
    for leader in &mut leaders {
        serve(leader, &first).await;
    }
    let mut attached = Attached::served(first.clone()).await;
    write_and_read_all(&attached).await;

    // What the operator commits after all members of a group restarted (R2).
    let mut lost = first;
    lost.generation = Generation(2);
    lost.placements[0].groups[0].loss = Generation(2);
    for leader in &mut leaders {
        serve(leader, &lost).await;
    }
    attached.maps.send_replace(Some(lost));
    write_and_read_all(&attached).await;
    let said = data.each_ref().map(|counted| counted.take_kinds().get(&HANDLED).copied());
    assert_eq!(said, [Some(1), Some(1)], "each holder of a copy hears it, once");

    // What was said before: a server that heard of the new map from the driver first asks for it.
    for leader in &mut leaders {
        leader.heartbeat().await;
    }
    let heard = [leaders[0].heard(), leaders[1].heard()];
    for _ in 0..3 {
        write_and_read_all(&attached).await;
        // sleep: an idle driver confirms by itself.
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }
    for counted in &data {
        let kinds = counted.take_kinds();
        assert!(kinds.get(&WRITE).is_some_and(|count| *count >= 3 * 64), "half of the chunks, three times: {kinds:?}");
        // A ping: the first read after idleness asks who still serves (R5).
        let all_steady = kinds.keys().all(|kind| [READ, WRITE, FLUSH, CONFIRM, PING].contains(kind));
        assert!(all_steady, "steady I/O is nothing but this: {kinds:?}");
    }
    nothing_was_said(&mut attached, &mut leaders, heard).await;
}
