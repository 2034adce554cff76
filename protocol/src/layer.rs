//! Layers, pages and blocks (PROTOCOL.md §4).
//!
//! A page (1 MiB unless the policy says otherwise) is the unit of allocation, a block (4 KiB) the unit of presence.
//! What is absent from a layer is transparent; that one idea carries snapshots, clones, migration, resync and rebuild.

use crate::ids::{CopyId, LayerId};
use std::ops::Range;

/// Bytes of a block: the unit of presence, of checksums and of every wire address and length.
pub const BLOCK_BYTES: u32 = 4096;

/// A page of one layer in one copy, as a device keeps it. Never keyed by volume: clones share layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageKey {
    /// The copy that holds it; it stands for the group too.
    pub copy: CopyId,
    /// The layer.
    pub layer: LayerId,
    /// Number of the page within the group's share of the layer, from 0.
    pub page: u64,
}

/// What a copy knows of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum BlockState {
    /// Not here: look in the layer below (in an unsynced page: unknown, H14).
    #[default]
    Absent = 0,
    /// Here, with a checksum.
    Present = 1,
    /// Discarded here: reads as zeroes and hides what is below.
    Hole = 2,
    /// Content kept but never served; replaced by a write or a fill, used only when a person forces it.
    Stale = 3,
}

impl BlockState {
    /// The state with this number on disk and on the wire, `None` above 3.
    pub fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::Absent,
            1 => Self::Present,
            2 => Self::Hole,
            3 => Self::Stale,
            _ => return None,
        })
    }

    /// Whether a fill may write here: "write the blocks where they are absent or stale".
    pub fn takes_fill(self) -> bool {
        matches!(self, Self::Absent | Self::Stale)
    }
}

/// The states of all blocks of a page: two bits a block, so 64 bytes for 256 blocks.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BlockStates {
    words: Vec<u64>,
    blocks: u32,
}

impl BlockStates {
    /// All absent. `blocks` = page bytes / 4096: 16 (64 KiB) to 1024 (4 MiB).
    pub fn absent(blocks: u32) -> Self {
        Self { words: vec![0; (blocks as usize).div_ceil(32)], blocks }
    }

    /// From the words of [`Self::words`]; `None` if their number does not fit or a bit beyond the last block is set.
    pub fn from_words(blocks: u32, words: &[u64]) -> Option<Self> {
        let rest = blocks % 32;
        let beyond = if rest == 0 { 0 } else { u64::MAX << (2 * rest) };
        let fits = words.len() == (blocks as usize).div_ceil(32) && words.last().is_none_or(|last| last & beyond == 0);
        fits.then(|| Self { words: words.to_vec(), blocks })
    }

    /// Two bits a block, lowest bits first: block b is bits 2(b mod 32) of word b/32.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many blocks the page has.
    pub fn len(&self) -> u32 {
        self.blocks
    }

    /// Whether the page has no blocks at all (it never has).
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The state of one block. Panics beyond the page.
    pub fn of(&self, block: u32) -> BlockState {
        assert!(block < self.blocks, "block {block} of a page of {}", self.blocks);
        let bits = (self.words[block as usize / 32] >> (2 * (block % 32))) & 3;
        BlockState::from_bits(bits as u8).expect("two bits")
    }

    /// Set one block. Panics beyond the page.
    pub fn set(&mut self, block: u32, state: BlockState) {
        assert!(block < self.blocks, "block {block} of a page of {}", self.blocks);
        let word = &mut self.words[block as usize / 32];
        let shift = 2 * (block % 32);
        *word = (*word & !(3 << shift)) | ((state as u64) << shift);
    }

    /// Set every block of a range.
    pub fn set_range(&mut self, blocks: Range<u32>, state: BlockState) {
        for block in blocks {
            self.set(block, state);
        }
    }

    /// The states with their block numbers.
    pub fn iter(&self) -> impl Iterator<Item = (u32, BlockState)> + '_ {
        (0..self.blocks).map(|block| (block, self.of(block)))
    }

    /// Whether every block is in this state.
    pub fn all(&self, state: BlockState) -> bool {
        self.iter().all(|(_, s)| s == state)
    }

    /// Whether any block is in this state.
    pub fn any(&self, state: BlockState) -> bool {
        self.iter().any(|(_, s)| s == state)
    }

    /// Marks the page out of date (H7): every block that is not absent becomes stale.
    pub fn make_stale(&mut self) {
        for block in 0..self.blocks {
            if self.of(block) != BlockState::Absent {
                self.set(block, BlockState::Stale);
            }
        }
    }

    /// A person forces the page (I8): what was kept of stale blocks counts again. Without a slot nothing was kept.
    pub fn trust_stale(&mut self, has_slot: bool) {
        let trusted = if has_slot { BlockState::Present } else { BlockState::Hole };
        for block in 0..self.blocks {
            if self.of(block) == BlockState::Stale {
                self.set(block, trusted);
            }
        }
    }

    /// Maximal runs of blocks in the same state, within a range.
    pub fn runs(&self, blocks: Range<u32>) -> Vec<(Range<u32>, BlockState)> {
        let mut runs: Vec<(Range<u32>, BlockState)> = Vec::new();
        for block in blocks {
            let state = self.of(block);
            match runs.last_mut() {
                Some((run, last)) if *last == state && run.end == block => run.end = block + 1,
                _ => runs.push((block..block + 1, state)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_read_back_and_leave_their_neighbours() {
        let mut states = BlockStates::absent(48);
        states.set(31, BlockState::Stale);
        states.set(32, BlockState::Hole);
        states.set(47, BlockState::Present);
        assert_eq!(
            (states.of(30), states.of(31), states.of(32)),
            (BlockState::Absent, BlockState::Stale, BlockState::Hole)
        );
        assert_eq!(BlockStates::from_words(48, states.words()), Some(states.clone()));
        assert_eq!(BlockStates::from_words(48, &[0, 1 << 40]), None, "a bit beyond the last block");
    }

    #[test]
    fn an_out_of_date_page_keeps_nothing_to_serve() {
        let mut states = BlockStates::absent(16);
        states.set_range(2..4, BlockState::Present);
        states.set(5, BlockState::Hole);
        states.make_stale();
        assert!(!states.any(BlockState::Present) && !states.any(BlockState::Hole));
        assert_eq!(states.of(0), BlockState::Absent);
        assert_eq!(states.runs(0..7).len(), 5);
    }
}
