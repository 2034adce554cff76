//! Transactions: gathering records, writing them, making them durable, answering those who wait.
//!
//! ```text
//! idle ─┬─ flush with new presence ─→ DataSync ─┐
//!       └─ else ────────────────────────────────┴→ Write ─┬→ (someone waits for durability) Sync ─→ idle
//!                                                         ├→ idle
//!                                  (none waits for less) ─┴→ both in one transfer ──────────────────→ idle
//! ```
//! Group commit: whoever comes while a cycle is under way shares the next one.
//! Invariant: a block's presence goes into a transaction only after a sync of its data, unless the block was present
//! before and its page's pending mark stands: then a crash lets the checksum be taken anew (R11).

use super::{Core, IoKind, Purpose, Unlogged};
use crate::store::aligned::Payload;
use crate::store::geometry::{BLOCK, cell_block_of};
use crate::store::journal::{Head, build, placed, transaction_bytes};
use crate::store::record::Redo;
use crate::store::superblock::JournalPoint;
use crate::store::table::PENDING;
use bytes::Bytes;
use lamina_protocol::layer::BlockState;
use lamina_protocol::storage_server::medium::{MediumAnswer, OpId};

/// What the next transaction will hold.
#[derive(Default)]
pub(super) struct Gathering {
    pub(super) records: Vec<u8>,
    /// Data of [`Redo::Data`] records in their order, with the first home block of each.
    pub(super) data: Vec<(u64, Bytes)>,
    pub(super) data_blocks: usize,
    /// Commits, answered when it is durable.
    pub(super) commits: Vec<OpId>,
    /// Writes through the journal, answered when it is written; `Some` for the last part of each.
    pub(super) writes: Vec<(Option<OpId>, u32)>,
    /// Slots that it frees, with their pages' bytes.
    pub(super) freed: Vec<(u32, u32)>,
}

impl Gathering {
    fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

/// A transaction on its way.
pub(super) struct Cycle {
    stage: Stage,
    flushes: Vec<OpId>,
    commits: Vec<OpId>,
    writes: Vec<(Option<OpId>, u32)>,
    /// (first home block, blocks, position in the journal)
    moved: Vec<(u64, u64, u64)>,
    must_sync: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    DataSync,
    Write,
    Sync,
}

impl Core {
    /// Adds a record to the transaction being gathered.
    pub(super) fn log(&mut self, redo: &Redo) {
        redo.encode(&mut self.gathering.records);
    }

    /// Whether more may be gathered: bounded while a transaction is on its way.
    pub(super) fn has_room_to_gather(&self) -> bool {
        self.gathering.records.len() < self.bounds.records && self.gathering.data_blocks < self.bounds.data_blocks
    }

    /// Everything gathered so far is durable.
    pub(super) fn is_quiet(&self) -> bool {
        self.cycle.is_none() && self.gathering.is_empty() && self.durable == self.written
    }

    pub(super) fn go_on_with_cycle(&mut self) {
        if self.cycle.is_some() {
            return;
        }
        let full = self.unlogged.len() >= self.bounds.unlogged || 2 * self.cells.pinned() >= self.cells.limit();
        let flush = !self.flushes.is_empty() || (full || self.spill) && !self.unlogged.is_empty();
        let waited_for = !self.gathering.commits.is_empty() || !self.gathering.writes.is_empty();
        let sync_wanted = self.want_sync && !self.is_quiet();
        if !(flush || waited_for || sync_wanted || !self.has_room_to_gather()) {
            self.want_sync = false;
            return;
        }
        let must_sync = !self.flushes.is_empty() || std::mem::take(&mut self.want_sync);
        self.cycle = Some(Cycle {
            stage: Stage::Write,
            flushes: std::mem::take(&mut self.flushes),
            commits: Vec::new(),
            writes: Vec::new(),
            moved: Vec::new(),
            must_sync,
        });
        if flush && !self.unlogged.is_empty() {
            self.logging = std::mem::take(&mut self.unlogged);
            self.spill = false;
            if self.needs_data_sync() {
                self.set_stage(Stage::DataSync);
                self.io(Purpose::CycleDataSync, IoKind::Sync);
                return;
            }
        }
        self.write_transaction();
    }

    fn set_stage(&mut self, stage: Stage) {
        self.cycle.as_mut().expect("a cycle is under way").stage = stage;
    }

    fn needs_data_sync(&mut self) -> bool {
        let (cells, table) = (&mut self.cells, &self.table);
        self.logging
            .iter()
            .any(|(home, unlogged)| cells.of(*home).0 != BlockState::Present || !table.at(unlogged.number).has(PENDING))
    }

    pub(super) fn data_synced(&mut self) {
        self.write_transaction();
    }

    /// The data of these blocks is durable, or need not be: their presence joins the transaction.
    fn log_presence(&mut self) {
        let logging = std::mem::take(&mut self.logging);
        let lsn = self.lsn();
        let mut run: (u64, Vec<u32>) = (0, Vec::new());
        for (home, Unlogged { crc, .. }) in logging {
            self.cells.set(home, BlockState::Present, crc, lsn);
            self.cells.unpin(cell_block_of(home));
            if run.0 + run.1.len() as u64 != home && !run.1.is_empty() {
                let (home, crcs) = std::mem::take(&mut run);
                self.log(&Redo::Present { home, crcs });
            }
            if run.1.is_empty() {
                run.0 = home;
            }
            run.1.push(crc);
        }
        if !run.1.is_empty() {
            self.log(&Redo::Present { home: run.0, crcs: run.1 });
        }
    }

    fn write_transaction(&mut self) {
        self.log_presence();
        let gathered = std::mem::take(&mut self.gathering);
        let cycle = self.cycle.as_mut().expect("a cycle is under way");
        cycle.must_sync |= !gathered.commits.is_empty();
        cycle.commits = gathered.commits;
        cycle.writes = gathered.writes;
        if gathered.records.is_empty() {
            self.sync_or_finish();
            return;
        }
        let bytes = transaction_bytes(gathered.records.len(), gathered.data_blocks);
        let position = placed(self.head.position, bytes, self.geo.journal_bytes);
        let used = position + bytes - self.anchor.tail.position;
        assert!(used <= self.geo.journal_bytes, "the reserve leaves room for every transaction");
        let point = JournalPoint { position, ..self.head };
        let head = Head { point, boot: self.anchor.boot, durable: self.durable };
        let data = gathered.data.iter().map(|(_, bytes)| &bytes[..]);
        let built = build(head, &gathered.records, gathered.data_blocks, data);
        self.counts.transactions += 1;
        self.counts.journal_bytes += bytes;
        self.counts.copied_bytes += gathered.data_blocks as u64 * BLOCK;
        let mut at = position + built.data_at;
        for (home, data) in &gathered.data {
            let blocks = data.len() as u64 / BLOCK;
            cycle.moved.push((*home, blocks, at));
            at += data.len() as u64;
        }
        cycle.stage = Stage::Write;
        let cycle_ends_durable = cycle.must_sync && cycle.writes.is_empty();
        let sequence = self.head.sequence;
        self.limbo.extend(gathered.freed.iter().map(|(slot, page_bytes)| (sequence, *slot, *page_bytes)));
        self.head = JournalPoint { position: position + bytes, sequence: sequence + 1, chain: built.chain };
        let at = self.geo.journal_at() + position % self.geo.journal_bytes;
        let data = Payload::Own(built.buf);
        // Data written through the journal is answered before it is durable: then the write ends by itself.
        if cycle_ends_durable {
            self.io(Purpose::CycleWriteSync, IoKind::WriteSync { at, data });
        } else {
            self.io(Purpose::CycleWrite, IoKind::Write { at, data });
        }
    }

    pub(super) fn transaction_durable(&mut self) {
        self.written = self.head.sequence - 1;
        self.cycle_synced();
    }

    pub(super) fn transaction_written(&mut self) {
        self.written = self.head.sequence - 1;
        let cycle = self.cycle.as_mut().expect("a cycle is under way");
        for (home, blocks, position) in std::mem::take(&mut cycle.moved) {
            for nth in 0..blocks {
                self.overlay.insert(home + nth, position + nth * BLOCK);
            }
        }
        let writes = std::mem::take(&mut cycle.writes);
        for (op, number) in writes {
            self.end_write(number);
            if let Some(op) = op {
                self.answer(op, MediumAnswer::Done);
            }
        }
        self.sync_or_finish();
    }

    fn sync_or_finish(&mut self) {
        let cycle = self.cycle.as_ref().expect("a cycle is under way");
        if cycle.must_sync && self.durable < self.written {
            self.set_stage(Stage::Sync);
            self.io(Purpose::CycleSync, IoKind::Sync);
        } else if cycle.must_sync {
            self.cycle_synced();
        } else {
            self.cycle = None;
        }
    }

    pub(super) fn cycle_synced(&mut self) {
        self.durable = self.written;
        let cycle = self.cycle.take().expect("a cycle is under way");
        let durable = self.durable;
        let (free, kept) = std::mem::take(&mut self.limbo).into_iter().partition(|(lsn, ..)| *lsn <= durable);
        self.limbo = kept;
        let free: Vec<(u64, u32, u32)> = free;
        for (_, slot, page_bytes) in free {
            self.space.release(slot, crate::store::space::SizeClass::of(page_bytes));
        }
        for op in cycle.commits.into_iter().chain(cycle.flushes) {
            self.answer(op, MediumAnswer::Done);
        }
    }
}
