//! Checkpoints: what the journal holds goes home, so that its tail can move.
//!
//! ```text
//! Quiet: nothing new starts until all gathered is durable; then note the journal's end, the catalog, the moved blocks
//!   → Work: moved data, cells, headers and catalog are written home while operations go on
//!   → Held: blocks that change all the time are written while nothing new starts
//!   → Sync → anchor → sync → the tail is where the end was noted
//! ```
//! Invariant: at most one is under way; it never waits for room in the journal (the reserve is there for that); a block
//! is written home only when its last change is durable.

use super::{Core, IoKind, Purpose};
use crate::store::aligned::{AlignedBuf, Payload};
use crate::store::codec::crc32c;
use crate::store::geometry::{ANCHOR_AT, BLOCK, SLAB_BLOCKS};
use crate::store::superblock::{Anchor, JournalPoint};
use std::collections::VecDeque;

/// I/Os of a checkpoint under way at once: enough to keep a disk busy, few enough to let others through.
const MAX_UNDER_WAY: usize = 16;
/// Blocks copied home in one go.
const MAX_COPY_BLOCKS: u64 = 64;

/// A checkpoint under way.
pub(super) struct Checkpoint {
    stage: Stage,
    tail: JournalPoint,
    anchor: Option<Anchor>,
    /// (home, position, blocks): data still in the journal.
    moved: VecDeque<(u64, u64, u64)>,
    cells: VecDeque<u32>,
    headers: VecDeque<u32>,
    catalog: Option<Vec<u8>>,
    /// Blocks that had changed again when their turn came.
    left_cells: VecDeque<u32>,
    left_headers: VecDeque<u32>,
    under_way: usize,
}

/// Where a checkpoint is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Quiet,
    Work,
    Held,
    Sync,
}

impl Checkpoint {
    pub(super) fn stage(&self) -> Stage {
        self.stage
    }
}

impl Core {
    /// Whether new operations must wait for the checkpoint.
    pub(super) fn is_held(&self) -> bool {
        self.checkpoint.as_ref().is_some_and(|c| matches!(c.stage, Stage::Quiet | Stage::Held))
    }

    /// Whether the journal has room for whatever is started now.
    pub(super) fn has_journal_room(&self) -> bool {
        self.geo.journal_bytes - self.journal_used() >= self.bounds.reserve
    }

    pub(super) fn go_on_with_checkpoint(&mut self) {
        if self.checkpoint.is_none() && self.is_checkpoint_due() {
            self.checkpoint = Some(Checkpoint {
                stage: Stage::Quiet,
                tail: self.head,
                anchor: None,
                moved: VecDeque::new(),
                cells: VecDeque::new(),
                headers: VecDeque::new(),
                catalog: None,
                left_cells: VecDeque::new(),
                left_headers: VecDeque::new(),
                under_way: 0,
            });
        }
        match self.checkpoint.as_ref().map(|c| c.stage) {
            Some(Stage::Quiet) if self.is_quiet() => self.begin_work(),
            Some(Stage::Quiet) => self.want_sync = true,
            Some(Stage::Work) => self.work(),
            Some(Stage::Held) if self.is_quiet() => self.work(),
            Some(Stage::Held) => self.want_sync = true,
            Some(Stage::Sync) | None => {}
        }
    }

    fn is_checkpoint_due(&self) -> bool {
        let changed = self.journal_used() > 0 || !self.is_quiet();
        changed && (self.journal_used() >= self.bounds.checkpoint || 2 * self.cells.stuck() >= self.cells.limit())
    }

    fn begin_work(&mut self) {
        let moved = self.moved_runs();
        let (cells, headers) = (self.cells.dirty_blocks().into(), self.table.dirty_blocks().into());
        let catalog = self.catalog_dirty.then(|| self.catalog.encode());
        self.catalog_dirty = false;
        let mut anchor = Anchor {
            slabs: self.geo.slabs,
            number: self.anchor.number + 1,
            tail: self.head,
            entries_high: self.table.high(),
            ..self.anchor
        };
        if let Some(bytes) = &catalog {
            anchor.catalog_len = bytes.len() as u32;
            anchor.catalog_crc = crc32c(bytes);
            anchor.catalog_half = 1 - anchor.catalog_half;
        }
        let checkpoint = self.checkpoint.as_mut().expect("a checkpoint is under way");
        *checkpoint = Checkpoint {
            stage: Stage::Work,
            tail: self.head,
            anchor: Some(anchor),
            moved,
            cells,
            headers,
            catalog,
            left_cells: VecDeque::new(),
            left_headers: VecDeque::new(),
            under_way: 0,
        };
        self.work();
    }

    /// The overlay in runs that are one piece both at home and in the journal.
    fn moved_runs(&self) -> VecDeque<(u64, u64, u64)> {
        let mut runs: VecDeque<(u64, u64, u64)> = VecDeque::new();
        for (home, position) in &self.overlay {
            match runs.back_mut() {
                Some((first, at, blocks))
                    if *first + *blocks == *home
                        && *at + *blocks * BLOCK == *position
                        && *blocks < MAX_COPY_BLOCKS
                        && !home.is_multiple_of(SLAB_BLOCKS) =>
                {
                    *blocks += 1;
                }
                _ => runs.push_back((*home, *position, 1)),
            }
        }
        runs
    }

    fn work(&mut self) {
        while let Some(checkpoint) = self.checkpoint.as_mut() {
            if checkpoint.under_way >= MAX_UNDER_WAY {
                return;
            }
            if let Some((home, position, blocks)) = checkpoint.moved.pop_front() {
                checkpoint.under_way += 1;
                let at = self.geo.journal_at() + position % self.geo.journal_bytes;
                let len = (blocks * BLOCK) as usize;
                self.io(Purpose::CheckpointRead { home }, IoKind::Read { at, len });
            } else if let Some(block) = checkpoint.cells.pop_front() {
                self.write_cells_home(block);
            } else if let Some(block) = checkpoint.headers.pop_front() {
                self.write_headers_home(block);
            } else if let Some(bytes) = checkpoint.catalog.take() {
                checkpoint.under_way += 1;
                let half = checkpoint.anchor.as_ref().expect("made when the work began").catalog_half;
                let data = AlignedBuf::copy_of(&bytes, bytes.len().next_multiple_of(BLOCK as usize));
                let at = self.geo.catalog_at(half);
                let data = Payload::Own(data);
                self.io(Purpose::CheckpointWrite { cells: None }, IoKind::Write { at, data });
            } else {
                self.all_handed_out();
                return;
            }
        }
    }

    fn write_cells_home(&mut self, block: u32) {
        match self.cells.take_block(block, self.durable) {
            Some(buf) => {
                self.checkpoint.as_mut().expect("a checkpoint is under way").under_way += 1;
                let kind = IoKind::Write { at: self.geo.cell_block_at(block), data: Payload::Own(buf) };
                self.io(Purpose::CheckpointWrite { cells: Some(block) }, kind);
            }
            None if self.cells.is_dirty(block) => self.at_work().left_cells.push_back(block),
            None => {}
        }
    }

    fn write_headers_home(&mut self, block: u32) {
        match self.table.take_block(block, self.durable) {
            Some(bytes) => {
                self.checkpoint.as_mut().expect("a checkpoint is under way").under_way += 1;
                let data = Payload::Own(AlignedBuf::copy_of(&bytes, BLOCK as usize));
                let kind = IoKind::Write { at: self.geo.table_block_at(block), data };
                self.io(Purpose::CheckpointWrite { cells: None }, kind);
            }
            None if self.table.is_dirty(block) => self.at_work().left_headers.push_back(block),
            None => {}
        }
    }

    /// Under way, and at a stage where a block may have changed again.
    fn at_work(&mut self) -> &mut Checkpoint {
        let checkpoint = self.checkpoint.as_mut().expect("a checkpoint is under way");
        assert!(checkpoint.stage == Stage::Work, "when all is quiet every change is durable");
        checkpoint
    }

    fn all_handed_out(&mut self) {
        let checkpoint = self.checkpoint.as_mut().expect("a checkpoint is under way");
        if checkpoint.under_way > 0 {
            return;
        }
        if !checkpoint.left_cells.is_empty() || !checkpoint.left_headers.is_empty() {
            checkpoint.stage = Stage::Held;
            checkpoint.cells = std::mem::take(&mut checkpoint.left_cells);
            checkpoint.headers = std::mem::take(&mut checkpoint.left_headers);
            self.want_sync = true;
            return;
        }
        checkpoint.stage = Stage::Sync;
        self.io(Purpose::CheckpointSync, IoKind::Sync);
    }

    /// Data from the journal goes home.
    pub(super) fn copy_home(&mut self, home: u64, buf: Option<AlignedBuf>) {
        let data = Payload::Own(buf.expect("a read that did not fail has a buffer"));
        let at = self.geo.home_at(home);
        self.io(Purpose::CheckpointWrite { cells: None }, IoKind::Write { at, data });
    }

    pub(super) fn checkpoint_wrote(&mut self, cells: Option<u32>) {
        if let Some(block) = cells {
            self.cells.unpin(block);
        }
        self.checkpoint.as_mut().expect("a checkpoint is under way").under_way -= 1;
    }

    pub(super) fn write_anchor(&mut self) {
        let checkpoint = self.checkpoint.as_ref().expect("a checkpoint is under way");
        let anchor = checkpoint.anchor.expect("made when the work began");
        let data = Payload::Own(AlignedBuf::copy_of(&anchor.encode(), BLOCK as usize));
        self.io(Purpose::CheckpointAnchor, IoKind::WriteSync { at: ANCHOR_AT[anchor.place()], data });
    }

    pub(super) fn checkpoint_over(&mut self) {
        let checkpoint = self.checkpoint.take().expect("a checkpoint is under way");
        self.anchor = checkpoint.anchor.expect("made when the work began");
        let tail = checkpoint.tail.position;
        self.overlay.retain(|_, position| *position >= tail);
        self.counts.checkpoints += 1;
    }
}
