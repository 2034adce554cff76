//! An open device: the handle that the server holds, and the thread behind it.
//!
//! Invariant: one thread per opening; it ends with the handle, or with [`MediumEvent::Failed`], which is the last event
//! of its opening (R3). Operations wait in a queue of bounded length; no lock is held across I/O.

use crate::store::DeviceError;
use crate::store::core::Core;
use crate::store::disk::{Access, Disk, FileDisk, announces_atomic_4k};
use crate::store::recovery::{load, make_current};
use crate::store::ring::{Ring, Waker, waker};
use lamina_protocol::ids::{BootId, ClusterId, ServerId};
use lamina_protocol::storage_server::medium::{MediumEvent, MediumOp, OpId, Opened};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Operations that wait for the device's thread; one more is [`QueueFull`]. Above all windows of a busy server.
const QUEUE_LIMIT: usize = 64 << 10;
/// Operations that the core keeps in line itself.
const CORE_LINE: usize = 1024;
/// Memory of the cells' cache.
const CACHE_BYTES: usize = 32 << 20;

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

/// The queue of the device's thread is full; the operation comes back.
#[derive(Debug)]
pub struct QueueFull(pub MediumOp);

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

enum Command {
    Op(OpId, MediumOp),
    Measure,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Command>,
    /// The thread sleeps, or is about to, and must be woken.
    asleep: bool,
    stopping: bool,
    stats: Stats,
}

struct Shared {
    queue: Mutex<Queue>,
    waker: Waker,
}

impl Shared {
    /// A panic of another thread while it held the lock leaves the queue as good as it was.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, mut queue: MutexGuard<'_, Queue>) {
        if std::mem::take(&mut queue.asleep) {
            drop(queue);
            self.waker.wake();
        }
    }
}

/// One opening of one device.
pub struct Device {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Opens a device, recovers it, and starts its thread. `sink` is called on that thread and must not block.
pub fn open(
    path: &Path,
    options: &OpenOptions,
    sink: Box<dyn FnMut(MediumEvent) + Send>,
) -> Result<(Device, Opened), DeviceError> {
    let disk = FileDisk::open(path, Access::Exclusive)?;
    refuse_others(&disk, options.identity)?;
    let in_place = options.atomic4k.unwrap_or_else(|| announces_atomic_4k(&disk));
    let mut loaded = load(&disk, true)?;
    make_current(&disk, &mut loaded, options.boot, in_place)?;
    let (core, opened) = Core::new(loaded, in_place, CACHE_BYTES / 4096);
    let waker = waker().map_err(|e| DeviceError::io("make an eventfd", e))?;
    let shared = Arc::new(Shared { queue: Mutex::new(Queue::default()), waker });
    publish(&shared, &core, in_place);
    let (started, outcome) = std::sync::mpsc::sync_channel(1);
    let behind = shared.clone();
    let thread = std::thread::Builder::new()
        .name("device".into())
        .spawn(move || match Ring::new(disk.fd, &behind.waker) {
            Ok(ring) => {
                let _ = started.send(Ok(()));
                live(ring, core, &behind, in_place, sink);
            }
            Err(e) => {
                let _ = started.send(Err(e));
            }
        })
        .map_err(|e| DeviceError::io("start the device's thread", e))?;
    let device = Device { shared, thread: Some(thread) };
    match outcome.recv() {
        Ok(Ok(())) => Ok((device, opened)),
        Ok(Err(e)) => Err(DeviceError::io("set up io_uring", e)),
        Err(_) => Err(DeviceError::io("start the device's thread", std::io::ErrorKind::Other)),
    }
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

impl Device {
    /// Hands an operation in. After [`MediumEvent::Failed`] it is swallowed, as nothing is answered any more.
    pub fn submit(&self, op: OpId, what: MediumOp) -> Result<(), QueueFull> {
        let mut queue = self.shared.queue();
        if queue.stopping {
            return Ok(());
        }
        if queue.waiting.len() >= QUEUE_LIMIT {
            return Err(QueueFull(what));
        }
        queue.waiting.push_back(Command::Op(op, what));
        self.shared.wake(queue);
        Ok(())
    }

    /// Hands several operations in with one wake-up. Those that no longer fit come back.
    pub fn submit_all(&self, ops: Vec<(OpId, MediumOp)>) -> Vec<(OpId, MediumOp)> {
        let mut queue = self.shared.queue();
        if queue.stopping {
            return Vec::new();
        }
        let room = QUEUE_LIMIT.saturating_sub(queue.waiting.len());
        let mut ops = ops.into_iter();
        queue.waiting.extend(ops.by_ref().take(room).map(|(op, what)| Command::Op(op, what)));
        self.shared.wake(queue);
        ops.collect()
    }

    /// The device or file below has grown: take its new size. [`MediumEvent::Grown`] says so if there is
    /// more room.
    pub fn grow(&self) {
        let mut queue = self.shared.queue();
        queue.waiting.push_back(Command::Measure);
        self.shared.wake(queue);
    }

    /// Counters and space.
    pub fn stats(&self) -> Stats {
        self.shared.queue().stats
    }
}

impl Drop for Device {
    /// Ends the opening. What was not flushed is as after a crash.
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.stopping = true;
        self.shared.wake(queue);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("stats", &self.stats()).finish()
    }
}

/// The thread: serves until the handle goes or the device fails. A panic of the core is a failure, too.
fn live(mut ring: Ring, mut core: Core, shared: &Shared, in_place: bool, mut sink: Box<dyn FnMut(MediumEvent) + Send>) {
    let ended = catch_unwind(AssertUnwindSafe(|| serve(&mut ring, &mut core, shared, in_place, &mut sink)));
    ring.drain();
    if !matches!(ended, Ok(Ok(()))) {
        tracing::error!("a device's thread broke down; the device is closed");
        sink(MediumEvent::Failed);
    }
    let mut queue = shared.queue();
    queue.stopping = true;
    queue.waiting.clear();
}

fn serve(
    ring: &mut Ring,
    core: &mut Core,
    shared: &Shared,
    in_place: bool,
    sink: &mut dyn FnMut(MediumEvent),
) -> std::io::Result<()> {
    loop {
        let Some(more) = take_commands(ring, core, shared, sink) else { return Ok(()) };
        core.run();
        core.take_events().into_iter().for_each(&mut *sink);
        if core.has_failed() {
            return Ok(());
        }
        ring.add(core.take_ios());
        let may_sleep = if more { !ring.is_idle() } else { fall_asleep(shared) };
        for (id, result) in ring.turn(may_sleep)? {
            core.done(id, result);
        }
        publish(shared, core, in_place);
    }
}

/// Moves commands to the core as far as its line allows. True = more are waiting; `None` = the handle is gone.
fn take_commands(ring: &Ring, core: &mut Core, shared: &Shared, sink: &mut dyn FnMut(MediumEvent)) -> Option<bool> {
    let mut queue = shared.queue();
    queue.asleep = false;
    if queue.stopping {
        return None;
    }
    while core.waiting() < CORE_LINE
        && let Some(command) = queue.waiting.pop_front()
    {
        match command {
            Command::Op(op, what) => core.push(op, what),
            Command::Measure => {
                if let Ok(bytes) = rustix::fs::seek(ring.disk(), rustix::fs::SeekFrom::End(0))
                    && core.grow(bytes)
                {
                    let (capacity_bytes, free_bytes) = core.space();
                    // At once: nothing else may happen on this device for long.
                    (queue.stats.capacity_bytes, queue.stats.free_bytes) = (capacity_bytes, free_bytes);
                    sink(MediumEvent::Grown { capacity_bytes, free_bytes });
                }
            }
        }
    }
    Some(!queue.waiting.is_empty())
}

/// Whether the thread may sleep: nothing came meanwhile. From here on whoever hands something in wakes it.
fn fall_asleep(shared: &Shared) -> bool {
    let mut queue = shared.queue();
    queue.asleep = queue.waiting.is_empty() && !queue.stopping;
    queue.asleep
}

fn publish(shared: &Shared, core: &Core, in_place: bool) {
    let (counts, rotten_cells) = core.counts();
    let (capacity_bytes, free_bytes) = core.space();
    let stats = Stats {
        in_place,
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
    };
    shared.queue().stats = stats;
}
