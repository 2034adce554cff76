//! An open device, on its server's thread: operations in, transfers to its ring, events out.
//!
//! ```text
//! open (any thread; may wait for the disk) ─► Recovered ─ start (the server's thread) ─► Device ─ fails or is closed ─►
//! over once the kernel has ended every transfer
//! ```
//! Invariants: a started device stays on its thread, so that a request is taken, handed to the disk and answered without
//! a change of threads (data-path.md, Disk); nothing here waits for the disk but the drop of one that is not over;
//! [`MediumEvent::Failed`] is the last event of an opening (R3); operations wait in a queue of bounded length.

use crate::store::DeviceError;
use crate::store::core::Core;
use crate::store::disk::{Access, Disk, FileDisk, announces_atomic_4k};
use crate::store::recovery::{load, make_current};
use crate::store::ring::{Ready, Ring};
use lamina_protocol::ids::{BootId, ClusterId, ServerId};
use lamina_protocol::storage_server::medium::{MediumEvent, MediumOp, OpId, Opened};
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Operations that wait for the core; more come back. Above all windows of a busy server.
const QUEUE_LIMIT: usize = 64 << 10;
/// Operations that the core keeps in line itself.
const CORE_LINE: usize = 1024;
/// Memory of the cells' cache.
const CACHE_BYTES: usize = 32 << 20;
/// Times that ended transfers are taken in one turn, so that a busy device leaves the thread to others.
const ROUNDS: usize = 16;

/// Whose device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The storage server.
    pub server: ServerId,
}

/// How to open a device.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Who opens it; another cluster's or server's device is refused.
    pub identity: Identity,
    /// Minted for this opening (R3).
    pub boot: BootId,
    /// `spec.devices[].atomic4k`; `None` = what the device announces, false for files (R11).
    pub atomic4k: Option<bool>,
}

/// Counted since the opening, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Whether data is written in place (R11).
    pub in_place: bool,
    /// Bytes for pages in all.
    pub capacity_bytes: u64,
    /// Bytes in slabs that are free.
    pub free_bytes: u64,
    /// Read transfers of data.
    pub reads: u64,
    /// Bytes of them.
    pub read_bytes: u64,
    /// Write operations.
    pub writes: u64,
    /// Bytes of them.
    pub write_bytes: u64,
    /// Payload bytes that had to be copied because they were not aligned, or went through the journal.
    pub copied_bytes: u64,
    /// Transactions of the journal.
    pub transactions: u64,
    /// Bytes of them.
    pub journal_bytes: u64,
    /// Bytes of the journal in use now.
    pub journal_used_bytes: u64,
    /// fdatasync calls.
    pub syncs: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Blocks answered as bad (R12).
    pub bad_blocks: u64,
    /// Checksums taken anew from the disk after a crash (R11).
    pub adopted_checksums: u64,
    /// Blocks of metadata that did not verify.
    pub rotten_cells: u64,
}

/// A device that was opened and recovered; [`Self::start`] makes it serve.
pub struct Recovered {
    disk: FileDisk,
    core: Core,
    in_place: bool,
}

/// Where the events of one opening go. It is called within [`Device::submit_all`] and [`Device::turn`], and must call
/// neither.
pub type Sink = Box<dyn FnMut(MediumEvent)>;

/// One opening of one device.
pub struct Device {
    ring: Ring,
    /// None once it has failed or is closed.
    core: Option<Core>,
    waiting: VecDeque<(OpId, MediumOp)>,
    sink: Sink,
    in_place: bool,
    /// Those of the core at its end.
    last: Stats,
}

/// Opens a device and recovers it. Waits for the disk.
pub fn open(path: &Path, options: &OpenOptions) -> Result<(Recovered, Opened), DeviceError> {
    let disk = FileDisk::open(path, Access::Exclusive)?;
    refuse_others(&disk, options.identity)?;
    let in_place = options.atomic4k.unwrap_or_else(|| announces_atomic_4k(&disk));
    let mut loaded = load(&disk, true)?;
    make_current(&disk, &mut loaded, options.boot, in_place)?;
    let (core, opened) = Core::new(loaded, in_place, CACHE_BYTES / 4096);
    Ok((Recovered { disk, core, in_place }, opened))
}

fn refuse_others(disk: &impl Disk, identity: Identity) -> Result<(), DeviceError> {
    use crate::store::probe::{Found, probe_disk};
    match probe_disk(disk)? {
        Found::Blank => Err(DeviceError::NotFormatted),
        Found::Foreign(foreign) => Err(DeviceError::Foreign(foreign)),
        Found::OtherVersion { version, incompat } => Err(DeviceError::OtherVersion { version, incompat }),
        Found::Ours { cluster, .. } if cluster != identity.cluster => Err(DeviceError::WrongCluster { found: cluster }),
        Found::Ours { server, .. } if server != identity.server => Err(DeviceError::WrongServer { found: server }),
        Found::Ours { .. } => Ok(()),
    }
}

impl Recovered {
    /// Begins to serve on this thread.
    pub fn start(self, sink: Sink) -> Result<Device, DeviceError> {
        let Self { disk, core, in_place } = self;
        let ring = Ring::new(disk.fd).map_err(|e| DeviceError::io("set up io_uring", e))?;
        Ok(Device { ring, core: Some(core), waiting: VecDeque::new(), sink, in_place, last: Stats::default() })
    }
}

impl Device {
    /// Tells a task of this thread's reactor when [`Self::turn`] has something to do.
    pub fn ready(&self) -> Result<Ready, DeviceError> {
        self.ring.ready().map_err(|e| DeviceError::io("wait for the device", e))
    }

    /// Hands operations in, with one call of the kernel. Those that no longer fit come back. After
    /// [`MediumEvent::Failed`] they are swallowed, as nothing is answered any more.
    pub fn submit_all(&mut self, ops: Vec<(OpId, MediumOp)>) -> Vec<(OpId, MediumOp)> {
        if self.core.is_none() {
            return Vec::new();
        }
        let room = QUEUE_LIMIT.saturating_sub(self.waiting.len());
        let mut ops = ops.into_iter();
        self.waiting.extend(ops.by_ref().take(room));
        self.turn(false);
        ops.collect()
    }

    /// Takes what has ended, and goes on with what can go on. `wait` = until a transfer ends, if one is under way.
    pub fn turn(&mut self, wait: bool) {
        // A panic of the core is a failure of its device, too.
        let ended = catch_unwind(AssertUnwindSafe(|| self.go_on(wait)));
        if matches!(ended, Ok(Ok(()))) {
            return;
        }
        assert!(self.core.is_some(), "without its ring the kernel may write into memory that is used for other things");
        tracing::error!("a device broke down; it is closed");
        self.close();
        (self.sink)(MediumEvent::Failed);
    }

    fn go_on(&mut self, wait: bool) -> io::Result<()> {
        for round in 0..ROUNDS {
            self.run_core();
            let ended = self.ring.turn(wait && round == 0)?;
            if ended.is_empty() && (self.waiting.is_empty() || !self.ring.is_idle()) {
                return Ok(());
            }
            if let Some(core) = &mut self.core {
                ended.into_iter().for_each(|(id, result)| core.done(id, result));
            }
        }
        self.ring.nudge();
        Ok(())
    }

    fn run_core(&mut self) {
        let Some(core) = &mut self.core else { return };
        while core.waiting() < CORE_LINE
            && let Some((op, what)) = self.waiting.pop_front()
        {
            core.push(op, what);
        }
        core.run();
        core.take_events().into_iter().for_each(&mut self.sink);
        if core.has_failed() {
            return self.close();
        }
        self.ring.add(core.take_ios());
    }

    /// Ends the opening. What was not flushed is as after a crash. It is over when the kernel has ended every transfer.
    pub fn close(&mut self) {
        self.last = self.stats();
        self.core = None;
        self.waiting.clear();
        self.ring.give_up();
        self.ring.nudge();
    }

    /// Whether it was closed or has failed, and the kernel holds nothing of it: its drop does not wait.
    pub fn is_over(&self) -> bool {
        self.core.is_none() && self.ring.is_idle()
    }

    /// The device or file below has grown: take its new size. [`MediumEvent::Grown`] says so if there is more room.
    pub fn grow(&mut self) {
        if let Some(core) = &mut self.core
            && let Ok(bytes) = rustix::fs::seek(self.ring.disk(), rustix::fs::SeekFrom::End(0))
            && core.grow(bytes)
        {
            let (capacity_bytes, free_bytes) = core.space();
            (self.sink)(MediumEvent::Grown { capacity_bytes, free_bytes });
        }
    }

    /// Counters and space.
    pub fn stats(&self) -> Stats {
        let Some(core) = &self.core else { return self.last };
        let (counts, rotten_cells) = core.counts();
        let (capacity_bytes, free_bytes) = core.space();
        Stats {
            in_place: self.in_place,
            capacity_bytes,
            free_bytes,
            reads: counts.reads,
            read_bytes: counts.read_bytes,
            writes: counts.writes,
            write_bytes: counts.write_bytes,
            copied_bytes: counts.copied_bytes,
            transactions: counts.transactions,
            journal_bytes: counts.journal_bytes,
            journal_used_bytes: core.journal_used(),
            syncs: counts.syncs,
            checkpoints: counts.checkpoints,
            bad_blocks: counts.bad_blocks,
            adopted_checksums: counts.adopted_checksums,
            rotten_cells,
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("stats", &self.stats()).finish()
    }
}
