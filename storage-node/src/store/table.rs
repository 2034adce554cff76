//! The page table: one header of 64 bytes per page that has an entry, all of them in memory, and the index over them.
//!
//! Invariant: the index names exactly the headers that are not free; a header in memory is written home only when every
//! change in it is durable in the journal (`dirty` keeps the sequence number of the last one).
//! Costs 24 bytes a header and 13 to 26 in the index (R11's 64 bytes per allocated page).
//!
//! ```text
//! 0   4  CRC-32C of bytes 4 … 63              16  8  page
//! 4   1  0 free, 1 without a slot, 2 with     24  4  slot, in units of 64 KiB
//! 5   1  1 unsynced, 2 pending, 4 all stale   28  4  number of the header (guards against a stray block)
//! 6   2  missed                               32 32  without a slot: 16 runs, each (first block << 2 | state), 0xffff
//! 8   4  stack: copy and layer                          ends; the last run reaches to the end of the page
//! 12  4  layer's mark that the page has seen
//! ```
//! *All stale*: every block that is not absent is stale, whatever its cell says, until the page is next changed; so H7
//! costs one header whatever the size of the page. The same goes for a page that has not seen its layer's latest mark.

use crate::store::codec::{Garbled, Put, Reader, crc32c};
use crate::store::geometry::{BLOCK, ENTRIES_PER_BLOCK, UNIT_BLOCKS};
use lamina_protocol::layer::{BlockState, BlockStates};
use std::collections::{BTreeMap, HashMap};

pub(crate) const ENTRY_BYTES: usize = 64;
/// Runs of equal blocks that a page without a slot can have; one more costs a slot.
pub(crate) const MAX_RUNS: usize = 16;
const NO_SLOT: u32 = u32::MAX;
const CHUNK: usize = 1024;

pub(crate) const UNSYNCED: u8 = 1;
pub(crate) const PENDING: u8 = 2;
pub(crate) const ALL_STALE: u8 = 4;

/// One page's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) page: u64,
    /// Number of (copy, layer) on this device; 0 = the header is free.
    pub(crate) stack: u32,
    slot: u32,
    pub(crate) seen: u32,
    pub(crate) missed: u16,
    pub(crate) flags: u8,
}

impl Entry {
    pub(crate) const FREE: Self = Self { page: 0, stack: 0, slot: NO_SLOT, seen: 0, missed: 0, flags: 0 };

    pub(crate) fn new(stack: u32, page: u64, seen: u32) -> Self {
        Self { page, stack, seen, ..Self::FREE }
    }

    pub(crate) fn is_free(&self) -> bool {
        self.stack == 0
    }

    /// The slot, in units of 64 KiB.
    pub(crate) fn slot(&self) -> Option<u32> {
        (self.slot != NO_SLOT).then_some(self.slot)
    }

    pub(crate) fn with_slot(self, slot: Option<u32>) -> Self {
        Self { slot: slot.unwrap_or(NO_SLOT), ..self }
    }

    /// First home block of the slot.
    pub(crate) fn home(&self) -> Option<u64> {
        self.slot().map(|slot| u64::from(slot) * UNIT_BLOCKS)
    }

    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn set(&mut self, flag: u8, on: bool) {
        self.flags = if on { self.flags | flag } else { self.flags & !flag };
    }

    /// The header as it lies on disk and in the journal.
    pub(crate) fn encode(&self, number: u32, runs: &[u16]) -> [u8; ENTRY_BYTES] {
        let mut out = Vec::with_capacity(ENTRY_BYTES);
        out.u32(0);
        out.u8(if self.is_free() { 0 } else { 1 + u8::from(self.slot().is_some()) });
        out.u8(self.flags);
        out.u16(self.missed);
        out.u32(self.stack);
        out.u32(self.seen);
        out.u64(self.page);
        out.u32(self.slot);
        out.u32(number);
        assert!(runs.len() <= MAX_RUNS, "a page without a slot has few runs");
        for at in 0..MAX_RUNS {
            out.u16(runs.get(at).copied().unwrap_or(0xffff));
        }
        let crc = crc32c(&out[4..]);
        out[..4].copy_from_slice(&crc.to_le_bytes());
        out.try_into().expect("64 bytes were put")
    }

    /// Reads a header; all zeroes is a free one that was never used.
    pub(crate) fn decode(number: u32, bytes: &[u8]) -> Result<(Self, Vec<u16>), Garbled> {
        if bytes.len() == ENTRY_BYTES && bytes.iter().all(|b| *b == 0) {
            return Ok((Self::FREE, Vec::new()));
        }
        let mut r = Reader(bytes);
        let crc = r.u32()?;
        if crc != crc32c(r.0) || r.0.len() != ENTRY_BYTES - 4 {
            return Err(Garbled);
        }
        let kind = r.u8()?;
        let (flags, missed, stack, seen, page) = (r.u8()?, r.u16()?, r.u32()?, r.u32()?, r.u64()?);
        let slot = r.u32()?;
        let found = Self { page, stack, slot, seen, missed, flags };
        let expected_kind = if found.is_free() { 0 } else { 1 + u8::from(found.slot().is_some()) };
        if r.u32()? != number || kind != expected_kind {
            return Err(Garbled);
        }
        let mut runs = Vec::new();
        for _ in 0..MAX_RUNS {
            match r.u16()? {
                0xffff => break,
                run => runs.push(run),
            }
        }
        let rising = runs.windows(2).all(|w| w[0] >> 2 < w[1] >> 2) && runs.first().is_none_or(|r| r >> 2 == 0);
        rising.then_some((found, runs)).ok_or(Garbled)
    }
}

/// The states that these runs stand for; `None` if they do not fit the page.
pub(crate) fn states_of(runs: &[u16], blocks: u32) -> BlockStates {
    let mut states = BlockStates::absent(blocks);
    for (at, run) in runs.iter().enumerate() {
        let end = runs.get(at + 1).map_or(blocks, |next| u32::from(next >> 2)).min(blocks);
        let state = BlockState::from_bits((run & 3) as u8).expect("two bits");
        states.set_range(u32::from(run >> 2).min(end)..end, state);
    }
    states
}

/// The runs for these states, `None` if they are too many for a header. None at all = all absent.
pub(crate) fn runs_of(states: &BlockStates) -> Option<Vec<u16>> {
    let runs = states.runs(0..states.len());
    if runs.len() == 1 && runs[0].1 == BlockState::Absent {
        return Some(Vec::new());
    }
    let short = runs.len() <= MAX_RUNS;
    short.then(|| runs.iter().map(|(range, state)| (range.start as u16) << 2 | *state as u16).collect())
}

/// All headers.
#[derive(Default)]
pub(crate) struct Table {
    chunks: Vec<Box<[Entry; CHUNK]>>,
    /// Runs of the pages without a slot that have any.
    runs: HashMap<u32, Box<[u16]>>,
    index: BTreeMap<u32, BTreeMap<u64, u32>>,
    /// Headers ever used; those above are not read at an opening.
    high: u32,
    used: u32,
    /// No free header lies below.
    free_from: u32,
    /// Blocks of the table that differ from the disk, with the sequence number of the last change.
    dirty: BTreeMap<u32, u64>,
}

impl Table {
    pub(crate) fn high(&self) -> u32 {
        self.high
    }

    /// Headers in use.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    pub(crate) fn at(&self, number: u32) -> &Entry {
        &self.chunks[number as usize / CHUNK][number as usize % CHUNK]
    }

    pub(crate) fn runs(&self, number: u32) -> &[u16] {
        self.runs.get(&number).map_or(&[], |runs| runs)
    }

    pub(crate) fn find(&self, stack: u32, page: u64) -> Option<u32> {
        self.index.get(&stack)?.get(&page).copied()
    }

    pub(crate) fn next_page(&self, stack: u32, from: u64) -> Option<u64> {
        self.index.get(&stack)?.range(from..).next().map(|(page, _)| *page)
    }

    /// All pages of a stack with their headers' numbers.
    pub(crate) fn pages(&self, stack: u32) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.index.get(&stack).into_iter().flatten().map(|(page, number)| (*page, *number))
    }

    /// Every header in use.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (u32, &Entry)> + '_ {
        (0..self.high).map(|number| (number, self.at(number))).filter(|(_, entry)| !entry.is_free())
    }

    /// Puts a header without touching the index: while it is being read or replayed.
    pub(crate) fn place(&mut self, number: u32, entry: Entry, runs: &[u16]) {
        while self.chunks.len() * CHUNK <= number as usize {
            self.chunks.push(Box::new([Entry::FREE; CHUNK]));
        }
        self.high = self.high.max(number + 1);
        let kept = &mut self.chunks[number as usize / CHUNK][number as usize % CHUNK];
        self.used = self.used + u32::from(!entry.is_free()) - u32::from(!kept.is_free());
        *kept = entry;
        if runs.is_empty() {
            self.runs.remove(&number);
        } else {
            self.runs.insert(number, runs.into());
        }
    }

    /// Builds the index after [`Self::place`]. Two headers for one page are a broken table.
    pub(crate) fn index_all(&mut self) -> Result<(), Garbled> {
        let mut pages: BTreeMap<u32, Vec<(u64, u32)>> = BTreeMap::new();
        for (number, entry) in self.entries() {
            pages.entry(entry.stack).or_default().push((entry.page, number));
        }
        self.index.clear();
        for (stack, mut list) in pages {
            list.sort_unstable();
            if list.windows(2).any(|pair| pair[0].0 == pair[1].0) {
                return Err(Garbled);
            }
            self.index.insert(stack, list.into_iter().collect());
        }
        self.free_from = 0;
        Ok(())
    }

    /// Changes a header, keeps the index and notes the change.
    pub(crate) fn put(&mut self, number: u32, entry: Entry, runs: &[u16], lsn: u64) {
        let before = if number < self.high { *self.at(number) } else { Entry::FREE };
        if (before.stack, before.page) != (entry.stack, entry.page) {
            if let Some(pages) = self.index.get_mut(&before.stack) {
                pages.remove(&before.page);
            }
            if !entry.is_free() {
                self.index.entry(entry.stack).or_default().insert(entry.page, number);
            }
        }
        if entry.is_free() {
            self.free_from = self.free_from.min(number);
        }
        self.place(number, entry, runs);
        self.touch(number, lsn);
    }

    /// Notes that the header's block differs from the disk.
    pub(crate) fn touch(&mut self, number: u32, lsn: u64) {
        self.dirty.insert(number / ENTRIES_PER_BLOCK, lsn);
    }

    /// The lowest free header, `None` when the table is full.
    pub(crate) fn free_number(&mut self, limit: u32) -> Option<u32> {
        while self.free_from < self.high && !self.at(self.free_from).is_free() {
            self.free_from += 1;
        }
        (self.free_from < limit).then_some(self.free_from)
    }

    /// Forgets the index of a stack that has no page any more.
    pub(crate) fn forget_stack(&mut self, stack: u32) {
        self.index.remove(&stack);
    }

    pub(crate) fn dirty_blocks(&self) -> Vec<u32> {
        self.dirty.keys().copied().collect()
    }

    /// The block as it should lie on disk, if all its changes are durable; it counts as clean then.
    pub(crate) fn take_block(&mut self, block: u32, durable: u64) -> Option<Vec<u8>> {
        self.dirty.get(&block).filter(|lsn| **lsn <= durable)?;
        self.dirty.remove(&block);
        let mut out = Vec::with_capacity(BLOCK as usize);
        for number in block * ENTRIES_PER_BLOCK..(block + 1) * ENTRIES_PER_BLOCK {
            let entry = if number < self.high { *self.at(number) } else { Entry::FREE };
            out.bytes(&entry.encode(number, self.runs(number)));
        }
        Some(out)
    }

    pub(crate) fn is_dirty(&self, block: u32) -> bool {
        self.dirty.contains_key(&block)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_reads_back_and_a_stray_one_is_noticed() {
        let entry = Entry { missed: 5, flags: UNSYNCED | ALL_STALE, ..Entry::new(3, 99, 7) };
        let bytes = entry.encode(12, &[2, 40 << 2 | 3]);
        assert_eq!(Entry::decode(12, &bytes), Ok((entry, vec![2, 40 << 2 | 3])));
        assert_eq!(Entry::decode(13, &bytes), Err(Garbled));
        assert_eq!(Entry::decode(0, &[0; ENTRY_BYTES]), Ok((Entry::FREE, vec![])));
        assert!(std::mem::size_of::<Entry>() <= 24);
    }

    #[test]
    fn runs_stand_for_the_same_states() {
        let mut states = BlockStates::absent(256);
        states.set_range(10..200, BlockState::Hole);
        states.set(255, BlockState::Stale);
        assert_eq!(states_of(&runs_of(&states).unwrap(), 256), states);
        assert_eq!(runs_of(&BlockStates::absent(16)), Some(vec![]));
        for block in (0..256).step_by(4) {
            states.set(block, BlockState::Stale);
        }
        assert_eq!(runs_of(&states), None, "too many runs for a header");
    }

    #[test]
    fn a_freed_header_is_used_again_before_a_new_one() {
        let mut table = Table::default();
        for page in 0..5 {
            let number = table.free_number(100).unwrap();
            table.put(number, Entry::new(1, page, 0), &[], 1);
        }
        table.put(2, Entry::FREE, &[], 2);
        assert_eq!((table.find(1, 2), table.free_number(100), table.next_page(1, 2)), (None, Some(2), Some(3)));
        assert_eq!(table.take_block(0, 1), None, "a change that is not durable stays in memory");
        assert!(table.take_block(0, 2).is_some());
    }

    proptest! {
        #[test]
        fn garbage_is_no_header(bytes in proptest::collection::vec(any::<u8>(), 1..100)) {
            prop_assume!(bytes.iter().any(|b| *b != 0));
            prop_assert_eq!(Entry::decode(0, &bytes), Err(Garbled));
        }
    }
}
