//! Volumes against small servers on loopback that speak the wire frames; each test is a guarantee of the runtime. What the
//! driver decides is tested beside it.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::block::Completions;
use fake::{Fake, Serving};
use lamina_protocol::control::Trouble;
use lamina_protocol::driver::Config;
use lamina_protocol::ids::{BootId, CopyId, Incarnation, LayerId, SessionId, VolumeId};
use lamina_protocol::map::{
    AccessMode, Group, Layer, Member, MemberState, Placement, Scheme, ServerEntry, Session, Settle, Standing,
};
use lamina_protocol::wire::Start;
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

mod fake;

const SIZE: u64 = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// One group for each list of servers; server i is at the i-th address.
fn map(generation: u64, addresses: &[String], groups: &[&[u64]]) -> VolumeMap {
    let member = |g: usize, i: usize, server: u64| Member {
        ordinal: i as u8,
        copy: CopyId(u128::from(100 * g as u64 + server)),
        server: ServerId(server.into()),
        boot: BootId(server.into()),
        state: MemberState::Active,
        avoid: false,
        unpromised: false,
    };
    let group = |g: usize, servers: &[u64]| Group {
        members: servers.iter().enumerate().map(|(i, s)| member(g, i, *s)).collect(),
        loss: Generation(0),
        settle: Settle::None,
    };
    let entries = addresses.iter().enumerate();
    let session = Session {
        id: SessionId(8),
        node: "n".into(),
        mode: AccessMode::ReadWrite,
        incarnation: Incarnation(0),
        handled: Generation(1),
        standing: Standing::Admitted,
    };
    let layer = Layer {
        id: LayerId(5),
        size: SIZE,
        page_bytes: 1 << 20,
        scheme: Scheme::Replicate,
        chunk_bytes: 64 << 10,
        placement: 0,
        sealed: None,
    };
    VolumeMap {
        volume: VolumeId(7),
        generation: Generation(generation),
        format: lamina_protocol::map::MAP_FORMAT,
        required_features: 0,
        size: SIZE,
        multi_session: false,
        servers: entries.map(|(i, a)| ServerEntry { id: ServerId(i as u128), addresses: vec![a.clone()] }).collect(),
        placements: vec![Placement { groups: groups.iter().enumerate().map(|(g, s)| group(g, s)).collect() }],
        layers: vec![layer],
        sessions: vec![session],
        revoked: vec![],
    }
}

/// Answers go into a channel.
struct Sink(std_mpsc::Sender<(u64, BlockResult)>);

impl Completions for Sink {
    fn complete(&self, tag: u64, result: BlockResult) {
        let _ = self.0.send((tag, result));
    }
}

struct Bench {
    volume: Volume,
    maps: watch::Sender<Option<VolumeMap>>,
    reports: mpsc::Receiver<DriverReport>,
    exits: std_mpsc::Receiver<()>,
    sink: Arc<Sink>,
    answers: std_mpsc::Receiver<(u64, BlockResult)>,
}

impl Bench {
    fn open(map: Option<VolumeMap>) -> Self {
        let (maps, map_source) = watch::channel(map);
        let (report_sink, reports) = mpsc::channel(64);
        let (exit, exits) = std_mpsc::channel();
        let (answer, answers) = std_mpsc::channel();
        let volume = Volume::open(Options {
            cluster: ClusterId(9),
            driver: Config {
                volume: VolumeId(7),
                session: SessionId(8),
                start: Start::Fresh,
                kept_bytes: lamina_protocol::limits::KEPT_WRITES_BYTES,
            },
            prefer: Vec::new(),
            maps: map_source,
            reports: report_sink,
            on_exit: Box::new(move || exit.send(()).unwrap()),
            clock: Box::<SteadyClock>::default(),
        });
        Self { volume: volume.unwrap(), maps, reports, exits, sink: Arc::new(Sink(answer)), answers }
    }

    fn served(map: VolumeMap) -> Self {
        let bench = Self::open(Some(map));
        bench.wait_for(|status| status.serving);
        bench
    }

    fn wait_for(&self, reached: impl Fn(&Status) -> bool) -> Status {
        let mut status = self.volume.status();
        let reactor = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let wait = async { tokio::time::timeout(PATIENCE, status.wait_for(reached)).await.map(|s| *s.unwrap()) };
        reactor.block_on(wait).expect("the volume gets there")
    }

    fn submit(&self, tag: u64, op: BlockOp) {
        self.volume.submit(BlockRequest { op, tag, completions: self.sink.clone() });
    }

    fn answer(&self) -> (u64, BlockResult) {
        self.answers.recv_timeout(PATIENCE).expect("an answer")
    }

    fn ask(&self, op: BlockOp) -> BlockResult {
        self.submit(77, op);
        let (tag, result) = self.answer();
        assert_eq!(tag, 77);
        result
    }

    fn written(&self) -> Result<Option<u64>, BlockError> {
        let reactor = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let asked = async { tokio::time::timeout(PATIENCE, self.volume.written()).await };
        reactor.block_on(asked).expect("an answer")
    }

    fn report(&mut self) -> DriverReport {
        let reactor = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let wait = async { tokio::time::timeout(PATIENCE, self.reports.recv()).await };
        reactor.block_on(wait).expect("a report comes").unwrap()
    }
}

fn write(address: u64, payload: Vec<u8>) -> BlockOp {
    BlockOp::Write { address, payload: payload.into(), fua: false }
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn what_is_written_is_on_every_member_and_reads_back() {
    let (a, b) = (Fake::start(0), Fake::start(1));
    let bench = Bench::served(map(1, &[a.address(), b.address()], &[&[0, 1]]));
    assert_eq!(bench.volume.size(), SIZE);
    let data = pattern(1, 3 << 20);
    assert_eq!(bench.ask(write(1 << 19, data.clone())), Ok(Bytes::new()));
    let read = bench.ask(BlockOp::Read { address: 1 << 19, length: 3 << 20 });
    assert_eq!(read, Ok(Bytes::from(data)));
    assert_eq!(bench.ask(BlockOp::WriteZeroes { address: 1 << 19, length: 4096, fua: false }), Ok(Bytes::new()));
    let read = bench.ask(BlockOp::Read { address: 1 << 19, length: 4096 });
    assert_eq!(read, Ok(Bytes::from(vec![0; 4096])));
    assert!(!a.blocks().is_empty() && a.blocks() == b.blocks());
}

#[test]
fn a_volume_is_blank_until_its_first_write_in_whatever_group() {
    let fakes: Vec<_> = (0..3).map(Fake::start).collect();
    let addresses: Vec<_> = fakes.iter().map(Fake::address).collect();
    let bench = Bench::served(map(1, &addresses, &[&[0, 1], &[1, 2], &[2, 0]]));
    assert_eq!(bench.written(), Ok(None));
    let address = 7 << 20;
    assert_eq!(bench.ask(write(address, vec![1; 4096])), Ok(Bytes::new()));
    let found = bench.written().unwrap().expect("written");
    assert_eq!((address / (64 << 10)) % 3, (found / (64 << 10)) % 3, "in the group that was written");
    assert_eq!(bench.volume.metrics().reads.requests.load(Ordering::Relaxed), 0, "it is no request of the kernel");
}

#[test]
fn whether_a_volume_is_blank_is_not_known_without_an_answer() {
    let a = Fake::start(0);
    let bench = Bench::served(map(1, &[a.address()], &[&[0]]));
    a.set(Serving::Silent);
    let reactor = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let asked = async { tokio::time::timeout(Duration::from_millis(300), bench.volume.written()).await };
    assert!(reactor.block_on(asked).is_err(), "it waits, as a read does");
    let Bench { volume, .. } = bench;
    volume.shared.closing.store(true, Ordering::Release);
    assert_eq!(reactor.block_on(volume.written()), Err(BlockError::Io));
}

#[test]
fn large_striped_requests_come_back_whole() {
    let fakes: Vec<_> = (0..4).map(Fake::start).collect();
    let addresses: Vec<_> = fakes.iter().map(Fake::address).collect();
    let bench = Bench::served(map(1, &addresses, &[&[0, 1], &[1, 2], &[2, 3], &[3, 0]]));
    let data = pattern(2, 32 << 20);
    assert_eq!(bench.ask(write(0, data.clone())), Ok(Bytes::new()));
    assert_eq!(bench.ask(BlockOp::Read { address: 0, length: 32 << 20 }), Ok(Bytes::from(data)));
    let held: Vec<_> = fakes.iter().map(|fake| fake.blocks().len()).collect();
    assert!(held.iter().all(|n| *n == 2 * (32 << 20) / 4096 / 4), "{held:?}");
}

#[test]
fn a_forced_write_is_flushed_everywhere_before_it_is_answered() {
    let (a, b) = (Fake::start(0), Fake::start(1));
    let bench = Bench::served(map(1, &[a.address(), b.address()], &[&[0, 1]]));
    let forced = BlockOp::Write { address: 0, payload: vec![1; 4096].into(), fua: true };
    assert_eq!(bench.ask(forced), Ok(Bytes::new()));
    assert!(a.count("flush") >= 1 && b.count("flush") >= 1);
    let (writes, flushes) = (&bench.volume.metrics().writes, &bench.volume.metrics().flushes);
    assert_eq!((writes.requests.load(Ordering::Relaxed), writes.bytes.load(Ordering::Relaxed)), (1, 4096));
    assert_eq!(flushes.requests.load(Ordering::Relaxed), 0);
}

#[test]
fn requests_that_do_not_fit_the_volume_are_refused_and_never_sent() {
    let a = Fake::start(0);
    let bench = Bench::served(map(1, &[a.address()], &[&[0]]));
    let invalid = Err(BlockError::Invalid);
    assert_eq!(bench.ask(BlockOp::Read { address: SIZE, length: 4096 }), invalid);
    assert_eq!(bench.ask(BlockOp::Read { address: 512, length: 4096 }), invalid);
    assert_eq!(bench.ask(BlockOp::Read { address: u64::MAX - 4095, length: 8192 }), invalid);
    assert_eq!(bench.ask(write(4096, vec![0; 100])), invalid);
    assert_eq!(bench.ask(BlockOp::Discard { address: 100, length: 5000 }), Ok(Bytes::new()), "no whole block in it");
    assert_eq!(bench.ask(BlockOp::Discard { address: 0, length: 0 }), Ok(Bytes::new()));
    assert_eq!(a.count("read") + a.count("write") + a.count("discard"), 0);
    assert_eq!(bench.ask(BlockOp::Discard { address: 100, length: 12_000 }), Ok(Bytes::new()));
    assert_eq!(a.count("discard"), 1, "rounded inwards");
}

#[test]
fn a_volume_attached_read_only_refuses_changes() {
    let a = Fake::start(0);
    let mut only = map(1, &[a.address()], &[&[0]]);
    only.sessions[0].mode = AccessMode::ReadOnly;
    let bench = Bench::served(only);
    assert!(bench.volume.read_only());
    assert_eq!(bench.ask(write(0, vec![1; 4096])), Err(BlockError::ReadOnly));
    assert_eq!(bench.ask(BlockOp::Read { address: 0, length: 4096 }), Ok(Bytes::from(vec![0; 4096])));
}

#[test]
fn a_connection_that_breaks_is_made_anew_and_the_write_succeeds() {
    let (mut bench, a, b) = two();
    for round in 0..5 {
        a.break_at_next_write();
        let data = pattern(round, 4096);
        assert_eq!(bench.ask(write(round * 4096, data)), Ok(Bytes::new()));
    }
    assert_eq!(a.blocks(), b.blocks());
    assert_eq!(bench.report().trouble, Trouble::Unreachable);
    assert!(bench.volume.metrics().broken.load(Ordering::Relaxed) >= 5);
}

fn two() -> (Bench, Fake, Fake) {
    let (a, b) = (Fake::start(0), Fake::start(1));
    let bench = Bench::served(map(1, &[a.address(), b.address()], &[&[0, 1]]));
    (bench, a, b)
}

#[test]
fn a_server_that_is_not_there_is_reported_at_once_and_tried_with_pauses() {
    let a = Fake::start(0);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let started = Instant::now();
    let mut bench = Bench::open(Some(map(1, &[a.address(), nobody], &[&[0, 1]])));
    let report = bench.report();
    assert_eq!((report.server, report.trouble), (ServerId(1), Trouble::Unreachable));
    assert!(started.elapsed() < Duration::from_secs(3));
    std::thread::sleep(Duration::from_millis(500)); // As long as pauses are watched.
    let tries = bench.volume.metrics().broken.load(Ordering::Relaxed);
    assert!((2..12).contains(&tries), "{tries} tries in half a second");
    bench.maps.send_replace(Some(map(2, &[a.address()], &[&[0]])));
    bench.wait_for(|status| status.serving && status.generation == Generation(2));
}

#[test]
fn another_server_at_the_address_is_not_used() {
    let imposter = Fake::start(5);
    let mut bench = Bench::open(Some(map(1, &[imposter.address()], &[&[0]])));
    assert_eq!(bench.report().server, ServerId(0));
    assert!(!bench.volume.status().borrow().serving);
    assert_eq!(imposter.count("open"), 0);
}

#[test]
fn a_stale_request_is_counted_and_goes_on_under_the_new_map() {
    let (bench, a, b) = two();
    for fake in [&a, &b] {
        fake.set(Serving::Stale(Generation(2)));
    }
    bench.submit(1, write(0, vec![7; 4096]));
    while bench.volume.metrics().stale.load(Ordering::Relaxed) < 2 {
        std::thread::yield_now();
    }
    assert!(bench.answers.try_recv().is_err());
    for fake in [&a, &b] {
        fake.set(Serving::Yes);
    }
    bench.maps.send_replace(Some(map(2, &[a.address(), b.address()], &[&[0, 1]])));
    assert_eq!(bench.answer(), (1, Ok(Bytes::new())));
}

#[test]
fn a_map_that_a_member_pushes_is_taken() {
    let (bench, a, b) = two();
    a.push(&map(4, &[a.address(), b.address()], &[&[0, 1]]));
    bench.wait_for(|status| status.generation == Generation(4));
}

#[test]
fn garbage_from_a_server_ends_the_connection_and_nothing_else() {
    let (bench, a, _b) = two();
    for _ in 0..3 {
        let before = bench.volume.metrics().connections.load(Ordering::Relaxed);
        a.send_garbage();
        while bench.volume.metrics().connections.load(Ordering::Relaxed) == before {
            std::thread::yield_now();
        }
    }
    assert_eq!(bench.ask(write(0, vec![7; 4096])), Ok(Bytes::new()));
}

#[test]
fn a_superseded_driver_runs_the_exit_callback_and_serves_no_more() {
    let (bench, a, b) = two();
    for fake in [&a, &b] {
        fake.set(Serving::Superseded);
    }
    bench.submit(1, write(0, vec![7; 4096]));
    bench.exits.recv_timeout(PATIENCE).expect("the callback runs");
    assert_eq!(bench.answer(), (1, Err(BlockError::Superseded)));
    assert_eq!(bench.ask(BlockOp::Flush), Err(BlockError::Superseded));
    assert!(bench.volume.status().borrow().superseded);
}

#[test]
fn closing_answers_what_is_unanswered() {
    let (bench, a, _b) = two();
    a.set(Serving::Silent);
    bench.submit(1, write(0, vec![7; 4096]));
    let Bench { volume, answers, .. } = bench;
    drop(volume);
    assert_eq!(answers.recv_timeout(PATIENCE).unwrap(), (1, Err(BlockError::Io)));
}

#[test]
fn many_threads_get_every_request_answered_once() {
    let (bench, a, b) = two();
    let (threads, each) = (4u64, 2_000u64);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (volume, sink) = (&bench.volume, bench.sink.clone());
            scope.spawn(move || {
                for i in 0..each {
                    let tag = thread * each + i;
                    let address = tag % 1024 * 4096;
                    let op = if i % 3 == 0 {
                        BlockOp::Read { address, length: 4096 }
                    } else {
                        write(address, vec![tag as u8; 4096])
                    };
                    volume.submit(BlockRequest { op, tag, completions: sink.clone() });
                }
            });
        }
    });
    let mut answered = vec![0; (threads * each) as usize];
    for _ in 0..threads * each {
        let (tag, result) = bench.answer();
        assert!(result.is_ok());
        answered[tag as usize] += 1;
    }
    assert!(answered.iter().all(|n| *n == 1));
    assert_eq!(a.blocks(), b.blocks());
}
