//! Reads: from home or from the journal, each block against its checksum.
//!
//! Invariant: a block that is answered as good matched the checksum that the store has for it. On a page that was
//! pending at a crash, a present block that was not written since and does not match gets its checksum from what the
//! disk holds, once (R11); every other one that does not match is bad (R12).

use super::{Core, IoKind, Purpose, Unlogged};
use crate::store::aligned::AlignedBuf;
use crate::store::catalog::Unseen;
use crate::store::codec::crc32c;
use crate::store::geometry::{BLOCK, cell_block_of};
use lamina_protocol::layer::BlockState;
use lamina_protocol::storage_server::medium::{MediumAnswer, OpId};

/// Pages that are verified at once: what is read for that is held in memory, a page at a time.
const MAX_VERIFYING: usize = 16;

/// A read under way, in one or more pieces.
pub(super) struct Reading {
    /// `None` = the store's own, to verify a suspect page.
    op: Option<OpId>,
    number: u32,
    /// First home block, and its number within the page.
    home: u64,
    first: u32,
    /// Per block: what it must match, or nothing for a stale one.
    expected: Vec<Expected>,
    buf: Option<AlignedBuf>,
    bad: Vec<u32>,
    pieces: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    Checksum(u32),
    Anything,
    Nothing,
}

impl Core {
    /// State and checksum of a block as an operation sees it. Its cells must be held.
    pub(super) fn block(&mut self, home: u64) -> (BlockState, u32) {
        match self.unlogged.get(&home).or_else(|| self.logging.get(&home)) {
            Some(unlogged) => (BlockState::Present, unlogged.crc),
            None => self.cells.of(home),
        }
    }

    /// State of a block as an operation sees it, once a mark of the layer counts. Its cells must be held.
    pub(super) fn state_under(&mut self, home: u64, unseen: Option<Unseen>) -> BlockState {
        match (self.block(home).0, unseen) {
            (BlockState::Absent, _) => BlockState::Absent,
            (_, Some(Unseen::Stale)) => BlockState::Stale,
            (BlockState::Stale, Some(Unseen::Trusted)) => self.cells.trusted(home),
            (state, _) => state,
        }
    }

    /// The byte where a block's data is now.
    fn location(&self, home: u64) -> u64 {
        match self.overlay.get(&home) {
            Some(position) => self.geo.journal_at() + position % self.geo.journal_bytes,
            None => self.geo.home_at(home),
        }
    }

    /// Reads blocks of a page with a slot whose cells are held. `home` = its first block.
    pub(super) fn start_read(&mut self, op: Option<OpId>, number: u32, page_home: u64, first: u32, blocks: u32) {
        let home = page_home + u64::from(first);
        // What is verified is what the cells say, whatever a mark makes of it: a force may show it again (I8).
        let unseen = op.and_then(|_| self.unseen(number));
        let expected = (home..home + u64::from(blocks)).map(|at| match self.block(at) {
            (BlockState::Present, _) if unseen == Some(Unseen::Stale) => Expected::Anything,
            (BlockState::Present, crc) => Expected::Checksum(crc),
            (BlockState::Stale, crc) if self.cells.trusted(at) == BlockState::Present => match unseen {
                Some(Unseen::Trusted) => Expected::Checksum(crc),
                _ => Expected::Anything,
            },
            // The slot may hold what its earlier owner left.
            (BlockState::Stale | BlockState::Absent | BlockState::Hole, _) => Expected::Nothing,
        });
        let expected = expected.collect();
        self.pin_cells(home, blocks, true);
        self.busy.entry(number).or_default().reads += 1;
        self.verifying += usize::from(op.is_none());
        let id = self.next_id + 1;
        let reading = Reading { op, number, home, first, expected, buf: None, bad: Vec::new(), pieces: 0 };
        self.readings.insert(id, reading);
        let mut at = 0;
        while at < blocks {
            let from = self.location(home + u64::from(at));
            let follows = |n: &u32| self.location(home + u64::from(at + n)) == from + u64::from(*n) * BLOCK;
            let run = match self.overlay.is_empty() {
                true => blocks,
                false => 1 + (1..blocks - at).take_while(follows).count() as u32,
            };
            self.read_piece(id, at, run, from);
            at += run;
        }
    }

    pub(super) fn pin_cells(&mut self, home: u64, blocks: u32, pin: bool) {
        for block in cell_block_of(home)..=cell_block_of(home + u64::from(blocks) - 1) {
            if pin {
                self.cells.pin(block);
            } else {
                self.cells.unpin(block);
            }
        }
    }

    fn read_piece(&mut self, reading: u64, first: u32, blocks: u32, from: u64) {
        self.readings.get_mut(&reading).expect("a piece of a read under way").pieces += 1;
        self.counts.reads += 1;
        self.counts.read_bytes += u64::from(blocks) * BLOCK;
        let len = blocks as usize * BLOCK as usize;
        self.io(Purpose::Read { reading, first, blocks, from }, IoKind::Read { at: from, len });
    }

    pub(super) fn read_done(&mut self, id: u64, first: u32, blocks: u32, from: u64, buf: Option<AlignedBuf>) {
        let mut reading = self.readings.remove(&id).expect("a read under way");
        reading.pieces -= 1;
        let mut again = Vec::new();
        match buf {
            None if blocks > 1 => again.extend(first..first + blocks),
            None => reading.bad.push(first),
            Some(buf) => {
                for nth in 0..blocks {
                    let data = &buf[nth as usize * BLOCK as usize..(nth as usize + 1) * BLOCK as usize];
                    let home = reading.home + u64::from(first + nth);
                    if self.accepts(&mut reading, first + nth, data) {
                        continue;
                    }
                    // A checkpoint may have moved it meanwhile and its place in the journal been used again.
                    if self.location(home) == from + u64::from(nth) * BLOCK {
                        reading.bad.push(first + nth);
                    } else {
                        again.push(first + nth);
                    }
                }
                reading.keep(first, buf);
            }
        }
        let home = reading.home;
        self.readings.insert(id, reading);
        for block in again {
            let from = self.location(home + u64::from(block));
            self.read_piece(id, block, 1, from);
        }
        if self.readings[&id].pieces == 0 {
            self.read_over(id);
        }
    }

    fn accepts(&mut self, reading: &mut Reading, block: u32, data: &[u8]) -> bool {
        let Expected::Checksum(expected) = reading.expected[block as usize] else {
            return reading.expected[block as usize] == Expected::Anything;
        };
        let crc = crc32c(data);
        let (in_page, home) = (reading.first + block, reading.home + u64::from(block));
        if crc == expected {
            self.mark_verified(reading.number, in_page..in_page + 1);
            return true;
        }
        let untouched = self.suspect.contains_key(&reading.number) && !self.is_verified(reading.number, in_page);
        if untouched && self.overlay.is_empty() {
            self.counts.adopted_checksums += 1;
            self.mark_verified(reading.number, in_page..in_page + 1);
            self.note_unlogged(home, Unlogged { crc, number: reading.number });
            return true;
        }
        false
    }

    fn read_over(&mut self, id: u64) {
        let reading = self.readings.remove(&id).expect("a read under way");
        let Reading { op, number, home, first, expected, buf, mut bad, .. } = reading;
        self.pin_cells(home, expected.len() as u32, false);
        self.end_read(number);
        self.verifying -= usize::from(op.is_none());
        self.counts.bad_blocks += bad.len() as u64;
        let mut buf = buf.unwrap_or_else(|| AlignedBuf::zeroed(expected.len() * BLOCK as usize));
        bad.sort_unstable();
        for block in &mut bad {
            let at = *block as usize * BLOCK as usize;
            buf[at..at + BLOCK as usize].fill(0);
            *block += first;
        }
        match op {
            Some(op) => self.answer(op, MediumAnswer::Data { data: buf.into_bytes(), bad }),
            // What could not be read stays bad; the page is verified as far as it goes.
            None => bad.iter().for_each(|block| self.mark_verified(number, *block..*block + 1)),
        }
    }

    pub(super) fn note_unlogged(&mut self, home: u64, unlogged: Unlogged) {
        if self.unlogged.insert(home, unlogged).is_none() {
            self.cells.pin(cell_block_of(home));
        }
    }

    pub(super) fn is_verified(&self, number: u32, block: u32) -> bool {
        let bits = self.suspect.get(&number).and_then(|bits| bits.get(block as usize / 64));
        bits.is_some_and(|bits| bits & 1 << (block % 64) != 0)
    }

    pub(super) fn mark_verified(&mut self, number: u32, blocks: std::ops::Range<u32>) {
        let Some(bits) = self.suspect.get_mut(&number) else { return };
        bits.resize(bits.len().max(blocks.end.div_ceil(64) as usize), 0);
        for block in blocks {
            bits[block as usize / 64] |= 1 << (block % 64);
        }
    }

    /// Whether every present block of a suspect page has a checksum that fits; starts to read if not.
    pub(super) fn is_whole_page_verified(&mut self, number: u32) -> bool {
        let Some(home) = self.table.at(number).home().filter(|_| self.suspect.contains_key(&number)) else {
            return true;
        };
        let blocks = self.page_blocks(number);
        if self.verifying >= MAX_VERIFYING || !self.hold_cells(home, blocks) {
            return false;
        }
        let open = |core: &mut Self, block: u32| {
            core.block(home + u64::from(block)).0 == BlockState::Present && !core.is_verified(number, block)
        };
        let Some(first) = (0..blocks).find(|block| open(self, *block)) else {
            // Nothing of it is left to look at: it stays so when its cells have to make room for those of others.
            self.suspect.remove(&number);
            return true;
        };
        if self.busy.get(&number).is_none_or(|busy| busy.reads == 0) {
            let end = (first..blocks).find(|block| !open(self, *block)).unwrap_or(blocks);
            self.start_read(None, number, home, first, end - first);
        }
        false
    }
}

impl Reading {
    fn keep(&mut self, first: u32, piece: AlignedBuf) {
        let whole = self.expected.len() * BLOCK as usize;
        if piece.len() == whole {
            self.buf = Some(piece);
            return;
        }
        let buf = self.buf.get_or_insert_with(|| AlignedBuf::zeroed(whole));
        let at = first as usize * BLOCK as usize;
        buf[at..at + piece.len()].copy_from_slice(&piece);
    }
}
