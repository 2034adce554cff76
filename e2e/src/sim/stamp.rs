//! The content of blocks: each write of each block has a number of its own, repeated over the block, so that content
//! tells which write it is, and a torn or misplaced block shows.

use bytes::{Bytes, BytesMut};
use lamina_protocol::layer::BLOCK_BYTES;

const WORDS: usize = BLOCK_BYTES as usize / 8;

/// The first word of a block: its stamp if the block is whole, 0 for zeroes.
pub(super) fn first_word(block: &[u8]) -> u64 {
    block.first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}

/// Blocks with these stamps.
pub(super) fn content(stamps: impl Iterator<Item = u64>) -> Bytes {
    let mut data = BytesMut::new();
    for stamp in stamps {
        for _ in 0..WORDS {
            data.extend_from_slice(&stamp.to_le_bytes());
        }
    }
    data.freeze()
}

/// The stamp of a whole block; `None` if it is torn: not the same word everywhere.
pub(super) fn read(block: &[u8]) -> Option<u64> {
    let first = first_word(block);
    let word = first.to_le_bytes();
    block.chunks_exact(8).all(|chunk| chunk == word).then_some(first)
}
