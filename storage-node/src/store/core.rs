//! The store's mind: operations in, I/Os out, answers out. Does no I/O itself, knows no time and no thread.
//!
//! ```text
//! operations → fifo → start (core/ops.rs) ─┬─ data in place: I/O → unlogged ─┐
//!                                          ├─ records → gathering ───────────┤
//!                                          └─ reads (core/read.rs)           │
//! cycle (core/cycle.rs), one at a time:  [sync data] → write transaction → [sync] → answers
//! checkpoint (core/checkpoint.rs), one at a time: data, cells, headers, catalog home → sync → anchor and sync
//! ```
//! Operations are started in the order in which they came; one that must wait (for cells, for another under way on its
//! page, for room in the journal) holds up those behind it, so the order of effects is the order of arrival.
//! Invariant: after a failed write or sync nothing is answered any more (R3).

use crate::store::aligned::{AlignedBuf, Payload};
use crate::store::catalog::Catalog;
use crate::store::cells::Cells;
use crate::store::geometry::Geometry;
use crate::store::recovery::Loaded;
use crate::store::space::Space;
use crate::store::superblock::{Anchor, JournalPoint};
use crate::store::table::{PENDING, Table};
use bytes::Bytes;
use lamina_protocol::layer::PageKey;
use lamina_protocol::storage_server::medium::{MediumAnswer, MediumEvent, MediumOp, OpId, Opened};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

mod checkpoint;
mod commit;
mod cycle;
mod ops;
mod read;

use checkpoint::Checkpoint;
use cycle::{Cycle, Gathering};
use read::Reading;

/// One transfer for the ring.
#[derive(Debug)]
pub(crate) struct Io {
    pub(crate) id: u64,
    pub(crate) kind: IoKind,
}

/// What to do.
#[derive(Debug)]
pub(crate) enum IoKind {
    /// Read so many bytes.
    Read { at: u64, len: usize },
    /// Write all of it.
    Write { at: u64, data: Payload },
    /// Make all writes that were done before durable.
    Sync,
    /// Write all of it, and only when that has succeeded make it and all writes that were done before durable: one
    /// transfer that ends once.
    WriteSync { at: u64, data: Payload },
}

/// How it ended: with a buffer for a read.
pub(crate) type IoResult = Result<Option<AlignedBuf>, IoFailed>;

/// The device could not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IoFailed;

/// What an I/O under way is for.
enum Purpose {
    InPlace { op: OpId, number: u32, home: u64, crcs: Vec<u32> },
    Cells(u32),
    Read { reading: u64, first: u32, blocks: u32, from: u64 },
    CycleDataSync,
    CycleWrite,
    CycleSync,
    CycleWriteSync,
    CheckpointRead { home: u64 },
    CheckpointWrite { cells: Option<u32> },
    CheckpointSync,
    CheckpointAnchor,
}

/// Bounds that follow from the journal's size, so that a cycle never finds it full.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Bytes of records after which gathering pauses while a cycle is under way.
    records: usize,
    /// Blocks of data of one transaction.
    data_blocks: usize,
    /// Unlogged blocks after which the store flushes by itself; at twice as many writes wait.
    unlogged: usize,
    /// Bytes of records in one commit.
    commit: usize,
    /// Room in the journal below which nothing new is started.
    reserve: u64,
    /// Bytes of the journal in use that start a checkpoint.
    checkpoint: u64,
}

impl Bounds {
    fn of(ring: u64) -> Self {
        let records = (ring / 32).min(256 << 10) as usize;
        let data_blocks = ((ring / 8).min(1 << 20) / 4096) as usize;
        let commit = ((ring / 8) as usize).min(2 * crate::store::MAX_COMMIT_BYTES);
        let unlogged = (records / 24).min(16 << 10);
        // The largest transaction, once as itself and once as room lost before the ring's end, and a few small ones.
        let largest = (2 * records + commit + data_blocks * 4096 + 2 * unlogged * 24) as u64;
        let reserve = (2 * largest + (64 << 10)).min(ring * 3 / 4);
        Self { records, data_blocks, unlogged, commit, reserve, checkpoint: (ring - reserve) / 2 }
    }
}

/// Counted since the opening.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) reads: u64,
    pub(crate) read_bytes: u64,
    pub(crate) writes: u64,
    pub(crate) write_bytes: u64,
    pub(crate) copied_bytes: u64,
    pub(crate) transactions: u64,
    pub(crate) journal_bytes: u64,
    pub(crate) syncs: u64,
    pub(crate) checkpoints: u64,
    pub(crate) bad_blocks: u64,
    pub(crate) adopted_checksums: u64,
}

/// A checksummed block that is not in the journal yet, and the header of its page.
#[derive(Clone, Copy, Debug)]
struct Unlogged {
    crc: u32,
    number: u32,
}

/// Operations under way on one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Busy {
    reads: u32,
    writes: u32,
}

/// The state of one opening.
pub(crate) struct Core {
    geo: Geometry,
    in_place: bool,
    bounds: Bounds,
    catalog: Catalog,
    catalog_dirty: bool,
    table: Table,
    space: Space,
    cells: Cells,
    anchor: Anchor,
    /// Slots of [`MediumOp::Allocate`], not yet in the page table.
    reserved: HashMap<PageKey, u32>,
    /// Written in place and answered, not yet in the journal.
    unlogged: BTreeMap<u64, Unlogged>,
    /// The same, waiting for the cycle's data sync.
    logging: BTreeMap<u64, Unlogged>,
    /// Home blocks whose data is in the journal, with the position there.
    overlay: BTreeMap<u64, u64>,
    /// Pages whose pending mark was durable at a crash: blocks that verified or were written since, one bit each.
    suspect: HashMap<u32, Vec<u64>>,
    busy: HashMap<u32, Busy>,
    loading: HashSet<u32>,
    readings: HashMap<u64, Reading>,
    /// Of those: the store's own.
    verifying: usize,
    fifo: VecDeque<(OpId, MediumOp)>,
    gathering: Gathering,
    flushes: Vec<OpId>,
    cycle: Option<Cycle>,
    /// Someone waits for everything gathered to be durable.
    want_sync: bool,
    /// Someone waits for what was written in place to be in the journal.
    spill: bool,
    checkpoint: Option<Checkpoint>,
    /// Where the next transaction goes.
    head: JournalPoint,
    /// Highest sequence number written, and the highest durable.
    written: u64,
    durable: u64,
    /// Freed slots whose freeing is written but not durable: (sequence number, slot, page bytes).
    limbo: Vec<(u64, u32, u32)>,
    purposes: HashMap<u64, Purpose>,
    next_id: u64,
    ios: Vec<Io>,
    events: Vec<MediumEvent>,
    failed: bool,
    counts: Counts,
}

impl Core {
    /// Begins to serve what was loaded and made current. `cache_blocks` = blocks of 4 KiB of the cells' cache.
    pub(crate) fn new(loaded: Loaded, in_place: bool, cache_blocks: usize) -> (Self, Opened) {
        let Loaded { superblock, geo, anchor, catalog, table, space, head, .. } = loaded;
        let pages = |flag: u8| -> Vec<PageKey> {
            let of = |(_, e): (u32, &crate::store::table::Entry)| {
                let stack = catalog.stack(e.stack).expect("checked at the opening");
                e.has(flag).then_some(PageKey { copy: stack.copy, layer: stack.layer, page: e.page })
            };
            table.entries().filter_map(of).collect()
        };
        let missed_of = |(_, e): (u32, &crate::store::table::Entry)| {
            let stack = catalog.stack(e.stack).expect("checked at the opening");
            (e.missed != 0).then_some((PageKey { copy: stack.copy, layer: stack.layer, page: e.page }, e.missed))
        };
        let missed = table.entries().filter_map(missed_of).collect();
        let opened = Opened {
            cluster: superblock.cluster,
            server: superblock.server,
            device: superblock.device,
            boot: anchor.boot,
            copies: catalog.copies(),
            volumes: catalog.volumes(),
            pending: pages(PENDING),
            missed,
            unsynced: pages(crate::store::table::UNSYNCED),
            lease_number: catalog.lease_number,
            capacity_bytes: geo.capacity_bytes(),
            free_bytes: space.free_bytes(),
        };
        let written = table.entries().filter(|(_, e)| anchor.ever_in_place && e.has(PENDING));
        let suspect = written.map(|(number, _)| (number, Vec::new())).collect();
        let core = Self {
            geo,
            in_place,
            bounds: Bounds::of(geo.journal_bytes),
            catalog,
            catalog_dirty: false,
            table,
            space,
            cells: Cells::new(cache_blocks),
            anchor,
            reserved: HashMap::new(),
            unlogged: BTreeMap::new(),
            logging: BTreeMap::new(),
            overlay: BTreeMap::new(),
            suspect,
            busy: HashMap::new(),
            loading: HashSet::new(),
            readings: HashMap::new(),
            verifying: 0,
            fifo: VecDeque::new(),
            gathering: Gathering::default(),
            flushes: Vec::new(),
            cycle: None,
            want_sync: false,
            spill: false,
            checkpoint: None,
            head,
            written: head.sequence - 1,
            durable: head.sequence - 1,
            limbo: Vec::new(),
            purposes: HashMap::new(),
            next_id: 0,
            ios: Vec::new(),
            events: Vec::new(),
            failed: false,
            counts: Counts::default(),
        };
        (core, opened)
    }

    /// Hands an operation in; [`Self::run`] acts on it.
    pub(crate) fn push(&mut self, op: OpId, what: MediumOp) {
        self.fifo.push_back((op, what));
    }

    /// Operations that wait to be started: the queue before the core is filled no further than this allows.
    pub(crate) fn waiting(&self) -> usize {
        self.fifo.len()
    }

    pub(crate) fn counts(&self) -> (Counts, u64) {
        (self.counts, self.cells.rotten())
    }

    pub(crate) fn journal_used(&self) -> u64 {
        self.head.position - self.anchor.tail.position
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed
    }

    /// I/Os to do now.
    pub(crate) fn take_ios(&mut self) -> Vec<Io> {
        std::mem::take(&mut self.ios)
    }

    /// Answers to hand on.
    pub(crate) fn take_events(&mut self) -> Vec<MediumEvent> {
        std::mem::take(&mut self.events)
    }

    /// The device may have become larger; whether it has.
    pub(crate) fn grow(&mut self, device_bytes: u64) -> bool {
        if let Ok(larger) = self.geo.sized(device_bytes)
            && larger.slabs > self.geo.slabs
        {
            self.geo = larger;
            self.space.grow(larger.slabs);
            return true;
        }
        false
    }

    /// Capacity and free bytes now.
    pub(crate) fn space(&self) -> (u64, u64) {
        (self.geo.capacity_bytes(), self.space.free_bytes())
    }

    /// An I/O has ended.
    pub(crate) fn done(&mut self, id: u64, result: IoResult) {
        let Some(purpose) = self.purposes.remove(&id) else { return };
        if self.failed {
            return;
        }
        match (purpose, result) {
            (Purpose::Cells(block), result) => {
                self.loading.remove(&block);
                self.cells.loaded(block, result.unwrap_or(None));
            }
            (Purpose::Read { reading, first, blocks, from }, result) => {
                self.read_done(reading, first, blocks, from, result.unwrap_or(None));
            }
            (_, Err(IoFailed)) => self.fail(),
            (Purpose::InPlace { op, number, home, crcs }, _) => self.in_place_done(op, number, home, &crcs),
            (Purpose::CycleDataSync, _) => self.data_synced(),
            (Purpose::CycleWrite, _) => self.transaction_written(),
            (Purpose::CycleSync, _) => self.cycle_synced(),
            (Purpose::CycleWriteSync, _) => self.transaction_durable(),
            (Purpose::CheckpointRead { home }, buf) => self.copy_home(home, buf.ok().flatten()),
            (Purpose::CheckpointWrite { cells }, _) => self.checkpoint_wrote(cells),
            (Purpose::CheckpointSync, _) => self.write_anchor(),
            (Purpose::CheckpointAnchor, _) => self.checkpoint_over(),
        }
    }

    /// Does all that can be done now.
    pub(crate) fn run(&mut self) {
        while !self.failed {
            let before = self.progress();
            self.start_operations();
            self.go_on_with_checkpoint();
            self.go_on_with_cycle();
            if before == self.progress() {
                return;
            }
        }
    }

    /// Differs whenever something happened that may let something else go on.
    fn progress(&self) -> (usize, u64, usize, bool, bool, Option<checkpoint::Stage>) {
        let stage = self.checkpoint.as_ref().map(Checkpoint::stage);
        (self.fifo.len(), self.next_id, self.events.len(), self.cycle.is_some(), self.want_sync, stage)
    }

    /// R3: the opening is over.
    fn fail(&mut self) {
        self.failed = true;
        self.events.push(MediumEvent::Failed);
        self.fifo.clear();
        self.ios.clear();
    }

    fn io(&mut self, purpose: Purpose, kind: IoKind) {
        self.next_id += 1;
        self.counts.syncs += u64::from(matches!(kind, IoKind::Sync | IoKind::WriteSync { .. }));
        self.purposes.insert(self.next_id, purpose);
        self.ios.push(Io { id: self.next_id, kind });
    }

    fn answer(&mut self, op: OpId, answer: MediumAnswer) {
        let free_bytes = self.space.free_bytes();
        self.events.push(MediumEvent::Answered { op, answer, free_bytes });
    }

    /// The sequence number of the transaction that is being gathered.
    fn lsn(&self) -> u64 {
        self.head.sequence
    }

    fn write_io(&mut self, purpose: Purpose, at: u64, data: Bytes) {
        let (data, copied) = Payload::of(data);
        self.counts.copied_bytes += copied;
        self.io(purpose, IoKind::Write { at, data });
    }
}

#[cfg(test)]
impl Core {
    /// Every slot in use with the number of its header.
    pub(crate) fn owned_slots(&self) -> Vec<(u32, u32)> {
        self.table.entries().filter_map(|(number, e)| e.slot().map(|slot| (slot, number))).collect()
    }
}
