//! Block cells: state and CRC-32C of every block of a slot, through a cache of fixed size.
//!
//! Invariant: a cell in the cache holds only what is in the journal or on its way there; it is written home only when
//! its last change is durable. A block of cells that is changed, being written home, or has unlogged blocks is not evicted.
//!
//! ```text
//! cell (512 bytes, written whole by every device; 64 blocks)
//! 0   4  CRC-32C of bytes 4 … 511
//! 4   4  0
//! 8   8  number of the cell (guards against a stray block)
//! 16 16  state of each block, two bits, lowest first
//! 32 256 CRC-32C of each block (of present ones, and of stale ones with content)
//! 288 16 of each stale block what was kept, two bits, lowest first: 0 the slot's content, 1 a hole, 2 nothing known
//! 304    0
//! ```
//! A cell that does not verify says nothing of its 64 blocks: all count as stale (R12), never absent.
//! A slot holds what its earlier owner left where this page never wrote: only `kept` says whose a stale block's content is,
//! never its checksum, which may be the earlier owner's, too.

use crate::store::aligned::AlignedBuf;
use crate::store::codec::crc32c;
use crate::store::geometry::{BLOCK, CELL_BLOCK_COVERS, HomeBlock, cell_block_of};
use lamina_protocol::layer::BlockState;
use std::collections::HashMap;

const CELL: usize = 512;
const CELL_COVERS: u64 = 64;
const CELLS_PER_BLOCK: u64 = BLOCK / CELL as u64;
const STATES_AT: usize = 16;
const CRCS_AT: usize = 32;
const KEPT_AT: usize = 288;
const KEPT_END: usize = KEPT_AT + (CRCS_AT - STATES_AT);
/// What was kept of a stale block: the slot's content with the cell's checksum.
const KEPT_CONTENT: u8 = 0;
/// It was a hole.
const KEPT_HOLE: u8 = 1;
/// It was absent and then said to be bad (R12), or its cell was lost.
const KEPT_NOTHING: u8 = 2;

struct Frame {
    block: u32,
    buf: AlignedBuf,
    recently_used: bool,
    /// Sequence number of the last change not yet written home; 0 = none.
    dirty: u64,
    pins: u32,
}

/// The cache.
pub(crate) struct Cells {
    frames: Vec<Frame>,
    place: HashMap<u32, usize>,
    limit: usize,
    hand: usize,
    dirty: usize,
    pinned: usize,
    rotten: u64,
}

/// Fills in numbers and checksums before a block of cells goes to disk.
fn seal(block: u32, buf: &mut [u8]) {
    for at in 0..CELLS_PER_BLOCK {
        let cell = &mut buf[at as usize * CELL..(at as usize + 1) * CELL];
        cell[8..16].copy_from_slice(&(u64::from(block) * CELLS_PER_BLOCK + at).to_le_bytes());
        let crc = crc32c(&cell[4..]);
        cell[..4].copy_from_slice(&crc.to_le_bytes());
    }
}

fn verifies(number: u64, cell: &[u8]) -> bool {
    cell[..4] == crc32c(&cell[4..]).to_le_bytes() && cell[8..16] == number.to_le_bytes()
}

fn two_bits(buf: &[u8], at: usize, nth: usize) -> u8 {
    buf[at + nth / 4] >> (2 * (nth % 4)) & 3
}

fn set_two_bits(buf: &mut [u8], at: usize, nth: usize, bits: u8) {
    let byte = &mut buf[at + nth / 4];
    *byte = *byte & !(3 << (2 * (nth % 4))) | bits << (2 * (nth % 4));
}

impl Cells {
    /// A cache of so many blocks of 4 KiB.
    pub(crate) fn new(limit: usize) -> Self {
        Self { frames: Vec::new(), place: HashMap::new(), limit, hand: 0, dirty: 0, pinned: 0, rotten: 0 }
    }

    pub(crate) fn holds(&self, block: u32) -> bool {
        self.place.contains_key(&block)
    }

    /// Cells that did not verify since the opening.
    pub(crate) fn rotten(&self) -> u64 {
        self.rotten
    }

    /// Blocks that cannot be evicted.
    pub(crate) fn stuck(&self) -> usize {
        self.dirty + self.pinned
    }

    /// Blocks that someone needs.
    pub(crate) fn pinned(&self) -> usize {
        self.pinned
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// What was read from the disk; `None` = it could not be read. Cells that do not verify become stale as a whole.
    /// What is held already is newer than the disk: its slab was taken anew while the read was under way.
    pub(crate) fn loaded(&mut self, block: u32, read: Option<AlignedBuf>) {
        if self.holds(block) {
            return;
        }
        let mut buf = read.unwrap_or_else(|| AlignedBuf::zeroed(BLOCK as usize));
        for at in 0..CELLS_PER_BLOCK {
            let cell = &mut buf[at as usize * CELL..(at as usize + 1) * CELL];
            if !verifies(u64::from(block) * CELLS_PER_BLOCK + at, cell) {
                cell.fill(0);
                cell[STATES_AT..CRCS_AT].fill(0xff);
                cell[KEPT_AT..KEPT_END].fill(0b1010_1010);
                self.rotten += 1;
            }
        }
        self.insert(block, buf);
    }

    /// A block of cells of a slab that was unused: all absent, whatever the disk holds.
    pub(crate) fn fresh(&mut self, block: u32, lsn: u64) {
        match self.place.get(&block) {
            Some(at) => self.frames[*at].buf.fill(0),
            None => self.insert(block, AlignedBuf::zeroed(BLOCK as usize)),
        }
        self.mark_dirty(block, lsn);
    }

    fn insert(&mut self, block: u32, buf: AlignedBuf) {
        let frame = Frame { block, buf, recently_used: true, dirty: 0, pins: 0 };
        if self.frames.len() >= self.limit
            && let Some(at) = self.victim()
        {
            self.place.remove(&self.frames[at].block);
            self.place.insert(block, at);
            self.frames[at] = frame;
            return;
        }
        self.place.insert(block, self.frames.len());
        self.frames.push(frame);
    }

    /// Second-chance search; two rounds find every block that may go.
    fn victim(&mut self) -> Option<usize> {
        for _ in 0..2 * self.frames.len() {
            self.hand = (self.hand + 1) % self.frames.len();
            let frame = &mut self.frames[self.hand];
            if frame.dirty != 0 || frame.pins != 0 {
                continue;
            }
            if !std::mem::take(&mut frame.recently_used) {
                return Some(self.hand);
            }
        }
        None
    }

    fn frame(&mut self, block: u32) -> &mut Frame {
        let at = *self.place.get(&block).expect("a block of cells is loaded before it is used");
        let frame = &mut self.frames[at];
        frame.recently_used = true;
        frame
    }

    fn mark_dirty(&mut self, block: u32, lsn: u64) {
        let frame = self.frame(block);
        let was_clean = frame.dirty == 0;
        frame.dirty = lsn;
        self.dirty += usize::from(was_clean);
    }

    /// State and checksum of a block. Its block of cells must be held.
    pub(crate) fn of(&mut self, home: HomeBlock) -> (BlockState, u32) {
        let (cell, within) = Self::place_in(home);
        let buf = &self.frame(cell_block_of(home)).buf;
        let bits = two_bits(buf, cell + STATES_AT, within);
        let at = cell + CRCS_AT + 4 * within;
        let crc = u32::from_le_bytes(buf[at..at + 4].try_into().expect("four bytes"));
        (BlockState::from_bits(bits).expect("two bits"), crc)
    }

    /// What a block is when what was kept counts again (I8): a stale one is present with the cell's checksum, a hole, or
    /// stale still where nothing is known.
    pub(crate) fn trusted(&mut self, home: HomeBlock) -> BlockState {
        match (self.of(home).0, self.kept(home)) {
            (BlockState::Stale, KEPT_CONTENT) => BlockState::Present,
            (BlockState::Stale, KEPT_HOLE) => BlockState::Hole,
            (state, _) => state,
        }
    }

    fn kept(&mut self, home: HomeBlock) -> u8 {
        let (cell, within) = Self::place_in(home);
        two_bits(&self.frame(cell_block_of(home)).buf, cell + KEPT_AT, within)
    }

    /// Changes a block with content of its own; `lsn` is the transaction that makes it durable.
    pub(crate) fn set(&mut self, home: HomeBlock, state: BlockState, crc: u32, lsn: u64) {
        self.put(home, (state, crc, KEPT_CONTENT), lsn);
    }

    fn put(&mut self, home: HomeBlock, (state, crc, kept): (BlockState, u32, u8), lsn: u64) {
        let (cell, within) = Self::place_in(home);
        let block = cell_block_of(home);
        let buf = &mut self.frame(block).buf;
        set_two_bits(buf, cell + STATES_AT, within, state as u8);
        set_two_bits(buf, cell + KEPT_AT, within, kept);
        let at = cell + CRCS_AT + 4 * within;
        buf[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        self.mark_dirty(block, lsn);
    }

    /// Changes the state alone; checksum and what was there stay for a person who forces a stale block. Done again after
    /// a crash it leads to the same: only the last state before the block became stale counts.
    pub(crate) fn set_state(&mut self, home: HomeBlock, state: BlockState, lsn: u64) {
        let (before, crc) = self.of(home);
        let kept = match (state, before) {
            (BlockState::Stale, BlockState::Stale) => self.kept(home),
            (BlockState::Stale, BlockState::Hole) => KEPT_HOLE,
            (BlockState::Stale, BlockState::Absent) => KEPT_NOTHING,
            _ => KEPT_CONTENT,
        };
        self.put(home, (state, crc, kept), lsn);
    }

    fn place_in(home: HomeBlock) -> (usize, usize) {
        let within = home % CELL_BLOCK_COVERS;
        ((within / CELL_COVERS) as usize * CELL, (within % CELL_COVERS) as usize)
    }

    /// Keeps the block in the cache until [`Self::unpin`].
    pub(crate) fn pin(&mut self, block: u32) {
        let frame = self.frame(block);
        frame.pins += 1;
        let first = frame.pins == 1;
        self.pinned += usize::from(first);
    }

    pub(crate) fn unpin(&mut self, block: u32) {
        let frame = self.frame(block);
        frame.pins -= 1;
        let last = frame.pins == 0;
        self.pinned -= usize::from(last);
    }

    pub(crate) fn dirty_blocks(&self) -> Vec<u32> {
        let mut blocks: Vec<u32> = self.frames.iter().filter(|f| f.dirty != 0).map(|f| f.block).collect();
        blocks.sort_unstable();
        blocks
    }

    /// The block as it should lie on disk, if all its changes are durable; it counts as clean then and is pinned until
    /// the write is done, so that it is not read back before.
    pub(crate) fn take_block(&mut self, block: u32, durable: u64) -> Option<AlignedBuf> {
        let at = *self.place.get(&block)?;
        let frame = &mut self.frames[at];
        if frame.dirty == 0 || frame.dirty > durable {
            return None;
        }
        frame.dirty = 0;
        let mut out = AlignedBuf::copy_of(&frame.buf, BLOCK as usize);
        self.dirty -= 1;
        self.pin(block);
        seal(block, &mut out);
        Some(out)
    }

    pub(crate) fn is_dirty(&self, block: u32) -> bool {
        self.place.get(&block).is_some_and(|at| self.frames[*at].dirty != 0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_cell_reads_back_and_a_rotten_one_turns_stale() {
        let mut cells = Cells::new(4);
        cells.fresh(3, 1);
        let first = 3 * CELL_BLOCK_COVERS;
        cells.set(first + 70, BlockState::Present, 0xdead_beef, 2);
        assert!(cells.take_block(3, 1).is_none(), "not durable yet");
        let block = cells.take_block(3, 2).unwrap();
        let mut again = Cells::new(4);
        let mut rotten = AlignedBuf::copy_of(&block, BLOCK as usize);
        again.loaded(3, Some(block));
        assert_eq!(again.of(first + 70), (BlockState::Present, 0xdead_beef));
        assert_eq!((again.of(first + 71).0, again.rotten()), (BlockState::Absent, 0));
        rotten[600] ^= 1;
        let mut again = Cells::new(4);
        again.loaded(3, Some(rotten));
        assert_eq!((again.of(first + 70).0, again.of(first + 1).0), (BlockState::Stale, BlockState::Absent));
        assert_eq!(again.rotten(), 1);
    }

    #[test]
    fn a_stale_block_is_trusted_as_what_it_was_and_never_by_an_earlier_owners_checksum() {
        use BlockState::{Absent, Hole, Present, Stale};
        for (before, trusted) in [(Present, Present), (Hole, Hole), (Absent, Stale)] {
            let mut cells = Cells::new(4);
            cells.fresh(3, 1);
            let home = 3 * CELL_BLOCK_COVERS + 9;
            cells.set(home, Present, 0xdead_beef, 1);
            cells.set_state(home, before, 2);
            // As often as a recovery may repeat it.
            (3..6).for_each(|lsn| cells.set_state(home, Stale, lsn));
            assert_eq!((cells.of(home).0, cells.trusted(home)), (Stale, trusted), "{before:?}");
            let written = cells.take_block(3, 6).unwrap();
            let mut again = Cells::new(4);
            again.loaded(3, Some(written));
            assert_eq!((again.of(home).0, again.trusted(home)), (Stale, trusted), "{before:?} read back");
        }
        let mut rotten = Cells::new(4);
        rotten.loaded(3, None);
        assert_eq!(rotten.trusted(3 * CELL_BLOCK_COVERS), Stale, "nothing is known of it");
    }

    #[test]
    fn a_read_that_comes_late_never_replaces_what_was_made_anew() {
        let mut cells = Cells::new(4);
        cells.fresh(3, 1);
        cells.set(3 * CELL_BLOCK_COVERS, BlockState::Hole, 0, 1);
        cells.loaded(3, None);
        assert_eq!(cells.of(3 * CELL_BLOCK_COVERS).0, BlockState::Hole);
        assert_eq!((cells.stuck(), cells.rotten()), (1, 0));
    }

    #[test]
    fn what_is_dirty_or_pinned_is_not_evicted() {
        let mut cells = Cells::new(3);
        cells.fresh(0, 1);
        cells.loaded(1, None);
        cells.pin(1);
        for block in 2..20 {
            cells.loaded(block, None);
        }
        assert!(cells.holds(0) && cells.holds(1) && cells.holds(19));
        assert!(cells.frames.len() <= 3);
    }
}
