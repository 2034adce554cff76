//! Lists of suspect pages, a bounded piece at a time (PROTOCOL.md §5.9).
//!
//! Invariant: a piece names every page of the list from [`PageList::from`] up to [`PageList::next`], so that pieces of which
//! each begins where the one before ended are the whole list.

use crate::codec::wire_struct;
use crate::ids::LayerId;
use bytes::Bytes;

/// Pages that one piece covers, at most: a bitmap of 32 KiB.
pub const PIECE_PAGES: u64 = 1 << 18;

/// A piece of the list of a layer's suspect pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageList {
    /// Of which layer.
    pub layer: LayerId,
    /// The page from which on it was asked for: none from here up to `first` is on the list.
    pub from: u64,
    /// The page of the first bit.
    pub first: u64,
    /// One bit per page, lowest first.
    pub bits: Bytes,
    /// Where the next piece begins; `u64::MAX` = the list is whole.
    pub next: u64,
}
wire_struct!(PageList { layer, from, first, bits, next });

impl PageList {
    /// The piece from a page on, of rising page numbers.
    pub fn piece(layer: LayerId, from: u64, pages: impl Iterator<Item = u64>) -> Self {
        let mut left = pages.skip_while(|page| *page < from).peekable();
        let first = left.peek().copied().unwrap_or(from);
        let mut bits = Vec::new();
        while let Some(page) = left.next_if(|page| page - first < PIECE_PAGES) {
            let at = page - first;
            bits.resize((at / 8 + 1) as usize, 0u8);
            bits[(at / 8) as usize] |= 1 << (at % 8);
        }
        let next = left.next().unwrap_or(u64::MAX);
        Self { layer, from, first, bits: bits.into(), next }
    }

    /// The pages that it names, rising; none beyond what a piece may cover.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        let covered = self.bits.iter().take((PIECE_PAGES / 8) as usize).enumerate();
        let set =
            covered.flat_map(|(at, byte)| (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| (at, bit)));
        set.filter_map(|(at, bit)| self.first.checked_add(at as u64 * 8 + bit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn pieces_that_follow_each_other_are_the_whole_list(
            pages in proptest::collection::btree_set(0u64..3 * PIECE_PAGES, 0..200),
        ) {
            let mut found = BTreeSet::new();
            let mut from = 0;
            for _ in 0..10 {
                let piece = PageList::piece(LayerId(1), from, pages.iter().copied());
                prop_assert!(piece.bits.len() as u64 <= PIECE_PAGES / 8);
                found.extend(piece.pages());
                from = piece.next;
                if from == u64::MAX {
                    break;
                }
            }
            prop_assert_eq!((found, from), (pages, u64::MAX));
        }

        #[test]
        fn a_piece_of_garbage_names_a_bounded_number_of_pages(
            first in any::<u64>(),
            bits in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let list = PageList { layer: LayerId(1), from: 0, first, bits: bits.clone().into(), next: 0 };
            prop_assert!(list.pages().count() <= bits.len() * 8);
        }
    }
}
