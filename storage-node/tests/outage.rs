//! Everything dies at once under the real driver: all storage servers by SIGKILL, and the operator, of which only its
//! directory stays. The driver lives, as on a node whose cluster went dark, or goes with all else.
//!
//! Invariant: what it starts ends with it, also when it fails.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // Shared with the other test programs.
#[path = "serving/process.rs"]
mod process;

use bytes::Bytes;
use lamina_client::block::{BlockOp, BlockRequest, BlockResult, BlockTarget, Completions};
use lamina_client::runtime::{Options, SteadyClock, Volume};
use lamina_control_api::leader::Leader as _;
use lamina_operator::admin::{self, v1, v1::admin_server::Admin};
use lamina_operator::directory::Directory;
use lamina_operator::front::Front;
use lamina_operator::runtime as operator;
use lamina_protocol::control::DriverReport;
use lamina_protocol::driver::Config;
use lamina_protocol::ids::{ClusterId, VolumeId};
use lamina_protocol::limits::KEPT_WRITES_BYTES;
use lamina_protocol::management::FillBudget;
use lamina_protocol::map::{MemberState, Settle, VolumeMap};
use lamina_protocol::wire::Start;
use process::Process;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tonic::Request;

const CLUSTER: ClusterId = ClusterId(1);
const PATIENCE: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
const WRITERS: u64 = 4;
/// Blocks of each writer; writers side by side, so that every page has blocks of one.
const BLOCKS: u64 = 128;
const ROUNDS: u8 = 8;

/// An operator over a directory; gone without a word when dropped.
struct Operator {
    alone: Option<tokio::runtime::Runtime>,
    admin: admin::Verbs,
    front: Front,
    _stop: watch::Sender<bool>,
}

impl Operator {
    async fn start(folder: &Path) -> Self {
        let alone = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let path = folder.to_owned();
        let (directory, changes) = alone.spawn(async move { Directory::open(path).await.unwrap() }).await.unwrap();
        let (stopping, stop) = watch::channel(false);
        let front = Front::default();
        let metrics = lamina_operator::metrics::Metrics::default();
        let mint = lamina_operator::mint;
        let fill_budget = FillBudget::default();
        let options = operator::Options {
            cluster: CLUSTER,
            mint,
            fill_budget,
            die_at: None,
            metrics,
            front: front.clone(),
            stop,
        };
        alone.spawn(operator::run(options, Arc::new(directory.clone()), changes));
        Self { alone: Some(alone), admin: admin::Verbs::new(directory, mint), front, _stop: stopping }
    }

    async fn create(&self, kind: &str, name: &str, spec: Value, status: Value) {
        let object = json!({
            "apiVersion": "lamina.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec, "status": status,
        });
        let object = v1::Object { kind: kind.to_owned(), json: object.to_string() };
        self.admin.create(Request::new(object)).await.unwrap();
    }

    /// A volume of two groups with two copies each.
    async fn create_all(&self, servers: &[Process; 2]) {
        for (n, server) in servers.iter().enumerate() {
            let status = json!({"addresses": {"control": [server.control.to_string()]}});
            self.create("StorageServer", &format!("s{n}"), json!({}), status).await;
        }
        let spec = json!({"copies": 2, "stripeWidth": 2, "pageSize": "64Ki", "rebuildAfterSeconds": 600});
        self.create("ReplicationPolicy", "two", spec, Value::Null).await;
        self.create("Volume", "v", json!({"size": "16Mi", "policy": "two"}), Value::Null).await;
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.alone.take().into_iter().for_each(tokio::runtime::Runtime::shutdown_background);
    }
}

struct Answers(mpsc::UnboundedSender<BlockResult>);

impl Completions for Answers {
    fn complete(&self, _: u64, result: BlockResult) {
        let _ = self.0.send(result);
    }
}

/// The driver, with every map that it was handed.
struct Attached {
    driver: Volume,
    maps: watch::Sender<Option<VolumeMap>>,
    seen: Mutex<Vec<VolumeMap>>,
    leader: Arc<Mutex<Option<Front>>>,
}

impl Attached {
    async fn open(operator: &Operator, node: &str) -> (Arc<Self>, VolumeId) {
        let request = v1::AttachRequest { volume: "v".to_owned(), node: node.to_owned(), read_only: false };
        let session = operator.admin.attach(Request::new(request)).await.unwrap().into_inner();
        let volume: VolumeId = session.volume_id.parse().unwrap();
        let (maps, map_source) = watch::channel(None);
        let (reports, mut reported) = mpsc::channel::<DriverReport>(64);
        let session = session.session.parse().unwrap();
        let options = Options {
            cluster: CLUSTER,
            driver: Config { volume, session, start: Start::Fresh, kept_bytes: KEPT_WRITES_BYTES },
            prefer: Vec::new(),
            maps: map_source,
            reports,
            on_exit: Box::new(|| panic!("nobody takes this device over")),
            clock: Box::<SteadyClock>::default(),
        };
        let leader = Arc::<Mutex<Option<Front>>>::default();
        let to = leader.clone();
        tokio::spawn(async move {
            while let Some(report) = reported.recv().await {
                // What no leader takes is said again.
                let _ = to.lock().unwrap().as_ref().map(|front| front.report(report));
            }
        });
        let driver = Volume::open(options).unwrap();
        (Arc::new(Self { driver, maps, seen: Mutex::default(), leader }), volume)
    }

    /// Maps come from this operator, and reports go to it.
    fn follow(self: &Arc<Self>, front: Front, volume: VolumeId) {
        *self.leader.lock().unwrap() = Some(front.clone());
        let this = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut maps = loop {
                match front.maps(volume) {
                    Ok(maps) => break maps,
                    // sleep: it does not lead yet, or has not read the volume.
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            };
            loop {
                let map = maps.borrow_and_update().clone();
                let Some(this) = this.upgrade() else { return };
                this.seen.lock().unwrap().extend(map.clone());
                this.maps.send_replace(map);
                drop(this);
                if maps.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    async fn ask(&self, op: BlockOp) -> BlockResult {
        let (sink, mut answers) = mpsc::unbounded_channel();
        self.driver.submit(BlockRequest { op, tag: 0, completions: Arc::new(Answers(sink)) });
        timeout(PATIENCE, answers.recv()).await.expect("an answer comes").unwrap()
    }

    /// Waits for a map that is so.
    async fn until(&self, holds: impl FnMut(&VolumeMap) -> bool) -> VolumeMap {
        let (mut maps, mut holds) = (self.maps.subscribe(), holds);
        let found = maps.wait_for(|map| map.as_ref().is_some_and(&mut holds));
        timeout(PATIENCE, found).await.expect("it comes to that").unwrap().clone().unwrap()
    }
}

/// What the writers did.
struct Ledger {
    /// What each block may hold at most: handed in last.
    begun: Vec<AtomicU8>,
    /// What each block must hold: written last and acknowledged.
    acknowledged: Vec<AtomicU8>,
    /// What it must hold whatever dies: acknowledged before a flush that was.
    flushed: Vec<AtomicU8>,
    writes: AtomicU64,
    /// Writers begin nothing while this is false.
    go: watch::Sender<bool>,
    /// Writers with nothing under way.
    idle: watch::Sender<u64>,
}

impl Ledger {
    fn new() -> Arc<Self> {
        let bytes = || (0..WRITERS * BLOCKS).map(|_| AtomicU8::new(0)).collect();
        let (go, idle) = (watch::Sender::new(true), watch::Sender::new(0));
        let writes = AtomicU64::new(0);
        Arc::new(Self { begun: bytes(), acknowledged: bytes(), flushed: bytes(), writes, go, idle })
    }

    /// A flush of a writer that has nothing else under way was acknowledged.
    fn flushed_by(&self, writer: u64) {
        let own = (0..BLOCKS).map(|block| (block * WRITERS + writer) as usize);
        own.for_each(|block| {
            self.flushed[block].store(self.acknowledged[block].load(Ordering::SeqCst), Ordering::SeqCst)
        });
    }

    async fn may_go_on(&self) {
        if !*self.go.borrow() {
            self.idle.send_modify(|idle| *idle += 1);
            self.go.subscribe().wait_for(|go| *go).await.unwrap();
        }
    }
}

/// Writes each of its blocks in rounds with a rising byte, and flushes at times.
async fn write_rounds(attached: Arc<Attached>, ledger: Arc<Ledger>, writer: u64) {
    for nth in 0..u64::from(ROUNDS) * BLOCKS {
        ledger.may_go_on().await;
        let (block, byte) = (nth % BLOCKS * WRITERS + writer, (nth / BLOCKS + 1) as u8);
        let write = BlockOp::Write { address: block * BLOCK as u64, payload: vec![byte; BLOCK].into(), fua: false };
        ledger.begun[block as usize].store(byte, Ordering::SeqCst);
        assert_eq!(attached.ask(write).await, Ok(Bytes::new()), "a write never ends in an error (H22)");
        ledger.acknowledged[block as usize].store(byte, Ordering::SeqCst);
        ledger.writes.fetch_add(1, Ordering::SeqCst);
        if nth % 48 == 47 {
            assert_eq!(attached.ask(BlockOp::Flush).await, Ok(Bytes::new()));
            ledger.flushed_by(writer);
        }
    }
}

async fn nothing_is_lost(attached: &Attached, ledger: &Ledger) {
    for (block, byte) in (0..).zip(&ledger.acknowledged) {
        let read = attached.ask(BlockOp::Read { address: block * BLOCK as u64, length: BLOCK as u32 }).await.unwrap();
        let byte = byte.load(Ordering::SeqCst);
        assert!(read.iter().all(|found| *found == byte), "block {block}: {} instead of {byte}", read[0]);
    }
}

async fn nothing_flushed_is_lost(attached: &Attached, ledger: &Ledger) {
    let mut unflushed = 0;
    for block in 0..ledger.flushed.len() {
        let read = BlockOp::Read { address: (block * BLOCK) as u64, length: BLOCK as u32 };
        let read = attached.ask(read).await.unwrap();
        let of = |bytes: &[AtomicU8]| bytes[block].load(Ordering::SeqCst);
        let (flushed, begun) = (of(&ledger.flushed), of(&ledger.begun));
        assert!(read.iter().all(|byte| *byte == read[0]), "block {block} is torn");
        assert!((flushed..=begun).contains(&read[0]), "block {block}: {} and not {flushed} to {begun}", read[0]);
        unflushed += u32::from(flushed < begun);
    }
    assert!(unflushed > 0, "it died in the middle of something");
}

/// Restarts what was killed and waits until the volume is whole again: the loss is told and settled.
async fn come_back(
    mut servers: [Process; 2],
    (attached, volume): (&Arc<Attached>, VolumeId),
    objects: &Path,
) -> ([Process; 2], Operator) {
    let before = attached.until(|_| true).await;
    let maps = attached.seen.lock().unwrap().len();
    servers.iter_mut().for_each(Process::end);
    let servers = servers.map(|server| server.again());
    let operator = Operator::start(objects).await;
    attached.follow(operator.front.clone(), volume);
    let after = attached.until(|map| map.generation > before.generation && is_whole(map)).await;
    for (_, _, group) in after.groups() {
        assert!(group.loss > before.generation, "the loss is told: {group:?}");
    }
    let settles = |map: &VolumeMap| map.groups().all(|(_, _, g)| matches!(g.settle, Settle::Running { .. }));
    assert!(attached.seen.lock().unwrap()[maps..].iter().any(settles), "every group was settled first");
    (servers, operator)
}

fn is_whole(map: &VolumeMap) -> bool {
    map.groups()
        .all(|(_, _, g)| g.in_state(MemberState::Active).count() == 2 && !matches!(g.settle, Settle::Running { .. }))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_wide_kill_9_during_writes_comes_back_with_every_acknowledged_write_and_equal_copies() {
    let (dir, objects) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let servers = [Process::start(dir.path(), "a").await, Process::start(dir.path(), "b").await];
    let operator = Operator::start(objects.path()).await;
    operator.create_all(&servers).await;
    let (attached, volume) = Attached::open(&operator, "n").await;
    attached.follow(operator.front.clone(), volume);
    assert!(timeout(PATIENCE, attached.driver.served()).await.unwrap().serving);
    let ledger = Ledger::new();
    let writing: Vec<_> =
        (0..WRITERS).map(|writer| tokio::spawn(write_rounds(attached.clone(), ledger.clone(), writer))).collect();
    let (mut servers, mut operator) = (servers, operator);
    for writes in [1000, 2500] {
        while ledger.writes.load(Ordering::SeqCst) < writes {
            // sleep: until enough is written.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        servers.iter().for_each(|server| server.signal(Signal::KILL));
        drop(operator);
        // Each writer had something under way, and begins nothing new once that is answered.
        ledger.go.send_replace(false);
        (servers, operator) = come_back(servers, (&attached, volume), objects.path()).await;
        let mut idle = ledger.idle.subscribe();
        timeout(PATIENCE, idle.wait_for(|idle| *idle == WRITERS)).await.expect("all is answered").unwrap();
        nothing_is_lost(&attached, &ledger).await;
        ledger.idle.send_replace(0);
        ledger.go.send_replace(true);
    }
    for task in writing {
        timeout(PATIENCE, task).await.expect("writes go on").unwrap();
    }
    nothing_is_lost(&attached, &ledger).await;
    assert_eq!(attached.ask(BlockOp::Flush).await, Ok(Bytes::new()));
    drop((operator, attached));
    let [a, b] = [servers[0].device(), servers[1].device()];
    servers.into_iter().for_each(Process::kill);
    let report = process::inspect(&[&a, &b], &dir.path().join("out.img"));
    assert!(report.contains(": 0 blocks differ"), "{report}");
    let image = std::fs::read(dir.path().join("out.img")).unwrap();
    for (block, content) in image.chunks(BLOCK).enumerate() {
        let expected = if block < (WRITERS * BLOCKS) as usize { ROUNDS } else { 0 };
        assert!(content.iter().all(|byte| *byte == expected), "block {block}: {}", content[0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i5_a_cluster_wide_kill_9_with_every_driver_comes_back_with_every_flushed_write_and_equal_copies() {
    let (dir, objects) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut servers = [Process::start(dir.path(), "a").await, Process::start(dir.path(), "b").await];
    let operator = Operator::start(objects.path()).await;
    operator.create_all(&servers).await;
    let (attached, volume) = Attached::open(&operator, "n").await;
    attached.follow(operator.front.clone(), volume);
    assert!(timeout(PATIENCE, attached.driver.served()).await.unwrap().serving);
    let ledger = Ledger::new();
    let writing: Vec<_> =
        (0..WRITERS).map(|writer| tokio::spawn(write_rounds(attached.clone(), ledger.clone(), writer))).collect();
    while ledger.writes.load(Ordering::SeqCst) < 1500 {
        // sleep: until enough is written.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    servers.iter().for_each(|server| server.signal(Signal::KILL));
    drop(operator);
    for task in writing {
        task.abort();
        assert!(task.await.is_err_and(|end| end.is_cancelled()), "no writer saw an error");
    }
    drop(attached);

    servers.iter_mut().for_each(Process::end);
    let servers = servers.map(|server| server.again());
    let operator = Operator::start(objects.path()).await;
    let detach = v1::DetachRequest { volume: "v".to_owned(), node: "n".to_owned() };
    timeout(PATIENCE, operator.admin.detach(Request::new(detach))).await.expect("its session ends").unwrap();
    let (attached, volume) = Attached::open(&operator, "m").await;
    attached.follow(operator.front.clone(), volume);
    assert!(timeout(PATIENCE, attached.driver.served()).await.unwrap().serving);
    nothing_flushed_is_lost(&attached, &ledger).await;
    attached.until(is_whole).await;
    assert_eq!(attached.ask(BlockOp::Flush).await, Ok(Bytes::new()));
    drop((operator, attached));
    let [a, b] = [servers[0].device(), servers[1].device()];
    servers.into_iter().for_each(Process::kill);
    let report = process::inspect(&[&a, &b], &dir.path().join("out.img"));
    assert!(report.contains(": 0 blocks differ"), "{report}");
}

/// A page of this volume.
const PAGE: u64 = 64 << 10;

/// Writes one block of each of these pages again and again, and flushes, until told to stop; the last byte written.
async fn write_pages(attached: Arc<Attached>, pages: [u64; 6], mut stop: watch::Receiver<bool>) -> u8 {
    let mut byte = 100;
    loop {
        for page in pages {
            let payload = vec![byte; BLOCK].into();
            let write = BlockOp::Write { address: page * PAGE + BLOCK as u64, payload, fua: false };
            assert_eq!(attached.ask(write).await, Ok(Bytes::new()));
        }
        assert_eq!(attached.ask(BlockOp::Flush).await, Ok(Bytes::new()));
        if *stop.borrow_and_update() {
            return byte;
        }
        byte = if byte == 200 { 100 } else { byte + 1 };
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_killed_during_writes_gets_the_pages_that_it_missed_and_not_the_volume() {
    let (dir, objects) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let servers = [Process::start(dir.path(), "a").await, Process::start(dir.path(), "b").await];
    let operator = Operator::start(objects.path()).await;
    operator.create_all(&servers).await;
    let (attached, volume) = Attached::open(&operator, "n").await;
    attached.follow(operator.front.clone(), volume);
    assert!(timeout(PATIENCE, attached.driver.served()).await.unwrap().serving);
    for page in 0..128 {
        let write = BlockOp::Write { address: page * PAGE, payload: vec![7; PAGE as usize].into(), fua: false };
        assert_eq!(attached.ask(write).await, Ok(Bytes::new()));
    }
    assert_eq!(attached.ask(BlockOp::Flush).await, Ok(Bytes::new()));
    // sleep: an idle volume is clean within a second (PROTOCOL.md §5.1); what is pending at a death counts as missed.
    tokio::time::sleep(Duration::from_millis(1_500)).await;

    let pages = [3, 4, 50, 51, 90, 127];
    let (stopping, stop) = watch::channel(false);
    let writing = tokio::spawn(write_pages(attached.clone(), pages, stop));
    let [a, mut b] = servers;
    b.end();
    let failed = |map: &VolumeMap| map.members().filter(|m| m.state == MemberState::Failed).count() == 2;
    attached.until(failed).await;
    // sleep: for a while it is away under writes.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let b = b.again();
    attached.until(is_whole).await;
    stopping.send_replace(true);
    let last = timeout(PATIENCE, writing).await.expect("writes went on").unwrap();

    let filled = b.metric("lamina_storage_copy_filled_bytes{").await as u64;
    let missed = pages.len() as u64 * PAGE;
    println!(
        "moved {filled} bytes: {} pages of 128 that were written, of a volume of {} bytes",
        pages.len(),
        128 * PAGE
    );
    assert!(filled >= missed, "what was written meanwhile was brought: {filled} of {missed}");
    assert!(filled <= missed + missed / 5, "no more than a fifth beside it: {filled} against {missed}");

    drop((operator, attached));
    let devices = [a.device(), b.device()];
    [a, b].into_iter().for_each(Process::kill);
    let report = process::inspect(&[&devices[0], &devices[1]], &dir.path().join("out.img"));
    assert!(report.contains(": 0 blocks differ"), "{report}");
    let image = std::fs::read(dir.path().join("out.img")).unwrap();
    for (block, content) in image.chunks(BLOCK).take(128 * 16).enumerate() {
        let written = block % 16 == 1 && pages.contains(&(block as u64 / 16));
        assert!(content.iter().all(|byte| *byte == if written { last } else { 7 }), "block {block}: {}", content[0]);
    }
}
