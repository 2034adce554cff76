//! The store beside raw O_DIRECT writes of the same file: operations per second, microseconds of CPU per operation, and
//! the ratio to the raw device. `cargo bench -p lamina-storage-node --bench store` (`LAMINA_BENCH_DIR` = where the file
//! goes, by default the temporary directory; `LAMINA_BENCH_OPS` = operations per line, by default 20000).

#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use lamina_protocol::ids::*;
use lamina_protocol::layer::PageKey;
use lamina_protocol::storage_server::medium::*;
use lamina_storage_node::store::{AlignedBuf, Device, FormatOptions, Identity, OpenOptions, format, open};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const COPY: CopyId = CopyId(1);
const LAYER: LayerId = LayerId(1);
const PAGES: u64 = 512;
const ME: Identity = Identity { cluster: ClusterId(1), server: ServerId(1) };

struct Bench {
    device: Device,
    events: Receiver<MediumEvent>,
    next: u64,
}

fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

/// Runs so many operations, prints a line, returns operations per second.
fn line(name: &str, ops: u64, work: impl FnOnce()) -> f64 {
    let (begun, cpu) = (Instant::now(), cpu_time());
    work();
    let (took, cpu) = (begun.elapsed().as_secs_f64(), cpu_time() - cpu);
    let rate = ops as f64 / took;
    println!("{name:<44} {rate:>9.0} op/s {:>8.1} us CPU/op", cpu.as_micros() as f64 / ops as f64);
    rate
}

fn page(number: u64) -> PageKey {
    PageKey { copy: COPY, layer: LAYER, page: number }
}

impl Bench {
    fn new(path: &Path, atomic4k: bool, boot: u128) -> Self {
        let (sender, events) = channel();
        let options = OpenOptions { identity: ME, boot: BootId(boot), atomic4k: Some(atomic4k) };
        let (recovered, _) = open(path, &options).unwrap();
        let device = recovered.start(Box::new(move |event| drop(sender.send(event)))).unwrap();
        Self { device, events, next: 0 }
    }

    fn wait(&mut self) {
        let event = loop {
            match self.events.try_recv() {
                Ok(event) => break event,
                Err(_) => self.device.turn(true),
            }
        };
        match event {
            MediumEvent::Answered { answer, .. } => assert!(answer != MediumAnswer::NoSpace),
            MediumEvent::Grown { .. } => panic!("nobody lets it grow"),
            MediumEvent::Failed => panic!("the device failed"),
        }
    }

    fn submit(&mut self, what: MediumOp) {
        self.next += 1;
        assert!(self.device.submit_all(vec![(self.next, what)]).is_empty());
    }

    fn act(&mut self, what: MediumOp) {
        self.submit(what);
        self.wait();
    }

    /// Keeps `depth` operations under way until `ops` were answered.
    fn keep(&mut self, ops: u64, depth: u64, mut what: impl FnMut(u64) -> MediumOp) {
        (0..depth).for_each(|nth| self.submit(what(nth)));
        for nth in depth..ops {
            self.wait();
            self.submit(what(nth));
        }
        (0..depth).for_each(|_| self.wait());
    }

    fn prepare(&mut self) {
        let layers = vec![LayerRecord { layer: LAYER, page_bytes: 1 << 20, cursor: u64::MAX }];
        let copy = CopyRecord { copy: COPY, volume: VolumeId(1), placement: 0, group: 0, layers };
        self.act(MediumOp::Commit(vec![Record::PutCopy(copy)]));
        let marks = (0..PAGES).map(|number| Record::Pending { page: page(number), set: true }).collect();
        self.act(MediumOp::Commit(marks));
        let whole = AlignedBuf::zeroed(1 << 20).into_bytes();
        self.keep(PAGES, 4, |nth| MediumOp::Write { page: page(nth), first: 0, data: whole.clone() });
        self.act(MediumOp::Flush);
    }
}

fn place(nth: u64) -> (u64, u32) {
    let mixed = nth.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
    (mixed % PAGES, (mixed / PAGES % 256) as u32)
}

fn raw(path: &Path, ops: u64) -> f64 {
    use rustix::fs::{Mode, OFlags};
    let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::DIRECT, Mode::empty()).unwrap();
    let block = AlignedBuf::zeroed(4096);
    let at = |nth: u64| (32 << 20) + place(nth).0 * (1 << 20) + u64::from(place(nth).1) * 4096;
    line("raw pwrite 4 KiB, depth 1", ops, || {
        for nth in 0..ops {
            rustix::io::pwrite(&fd, &block, at(nth)).unwrap();
        }
    });
    line("raw pwrite 4 KiB + fdatasync, depth 1", ops / 4, || {
        for nth in 0..ops / 4 {
            rustix::io::pwrite(&fd, &block, at(nth)).unwrap();
            rustix::fs::fdatasync(&fd).unwrap();
        }
    })
}

fn store(path: &Path, atomic4k: bool, ops: u64) -> f64 {
    let mode = if atomic4k { "in place" } else { "journal" };
    let mut bench = Bench::new(path, atomic4k, 1 + u128::from(atomic4k));
    bench.prepare();
    let aligned = AlignedBuf::zeroed(4096).into_bytes();
    let write = |data: &Bytes, nth: u64| {
        let (number, first) = place(nth);
        MediumOp::Write { page: page(number), first, data: data.clone() }
    };
    for depth in [1, 32] {
        line(&format!("{mode}: write 4 KiB, depth {depth}"), ops, || bench.keep(ops, depth, |n| write(&aligned, n)));
    }
    let synced = line(&format!("{mode}: write 4 KiB + flush, depth 1"), ops / 4, || {
        for nth in 0..ops / 4 {
            bench.act(write(&aligned, nth));
            bench.act(MediumOp::Flush);
        }
    });
    for depth in [1, 32] {
        let read = |nth| {
            let (number, first) = place(nth);
            MediumOp::Read { page: page(number), blocks: first..first + 1 }
        };
        line(&format!("{mode}: read 4 KiB, depth {depth}"), ops, || bench.keep(ops, depth, read));
    }
    let mark =
        |nth: u64| MediumOp::Commit(vec![Record::Pending { page: page(nth % PAGES), set: nth.is_multiple_of(2) }]);
    line(&format!("{mode}: commit, depth 32"), ops, || bench.keep(ops, 32, mark));
    println!("{:?}", bench.device.stats());
    synced
}

fn main() {
    let ops = std::env::var("LAMINA_BENCH_OPS").map_or(20_000, |text| text.parse().unwrap());
    let dir = std::env::var_os("LAMINA_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let path = dir.join(format!("lamina-store-bench-{}", std::process::id()));
    let options = FormatOptions {
        identity: ME,
        device: DeviceId(1),
        overwrite: false,
        create_bytes: Some(1 << 30),
        journal_bytes: Some(64 << 20),
    };
    format(&path, &options).unwrap();
    let journal = store(&path, false, ops);
    let in_place = store(&path, true, ops);
    let raw = raw(&path, ops);
    println!(
        "write + flush against raw write + fdatasync: in place {:.2}, journal {:.2}",
        in_place / raw,
        journal / raw
    );
    std::fs::remove_file(&path).unwrap();
}
