//! Where an address of a volume lies: chunk, group, page (PROTOCOL.md, Geometry; seed 002 \[0031\], striping).
//!
//! group = (addr / C) mod G; local = (addr / C / G)·C + addr mod C; page = local / page size. Growing moves no data.
//! Between layers of different geometry everything goes by logical block address. There is no per-page table in the map.

use std::ops::Range;

/// The numbers that decide where a layer's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Groups of the stripe, 1–16.
    pub groups: u32,
    /// Bytes of a chunk: a power of two from 64 KiB to the page size.
    pub chunk_bytes: u32,
    /// Bytes of a page: a power of two, 64 KiB to 4 MiB.
    pub page_bytes: u32,
    /// Bytes of the layer.
    pub size: u64,
}

/// A run of bytes within one page of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Where it starts in the volume, in bytes.
    pub address: u64,
    /// Group of the stripe.
    pub group: u32,
    /// Page within the group.
    pub page: u64,
    /// Bytes from the start of the page.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
}

impl Geometry {
    /// The extents of a byte range, in address order; each lies within one chunk, so neighbours of the same page may
    /// follow each other when there is one group.
    pub fn split(&self, address: u64, length: u64) -> impl Iterator<Item = Extent> + use<> {
        let geometry = *self;
        let end = address + length;
        let mut at = address;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let extent = geometry.extent_at(at, end);
            at += u64::from(extent.length);
            Some(extent)
        })
    }

    fn extent_at(&self, address: u64, end: u64) -> Extent {
        let chunk = u64::from(self.chunk_bytes);
        let page = u64::from(self.page_bytes);
        let number = address / chunk;
        let local = number / u64::from(self.groups) * chunk + address % chunk;
        // With one group chunks follow each other, so a run goes on to the end of the page.
        let run = if self.groups == 1 { page - local % page } else { chunk - address % chunk };
        Extent {
            address,
            group: (number % u64::from(self.groups)) as u32,
            page: local / page,
            offset: (local % page) as u32,
            length: run.min(end - address) as u32,
        }
    }

    /// The address in the volume of a byte of a page: the inverse of [`Self::split`].
    pub fn address_of(&self, group: u32, page: u64, offset: u32) -> u64 {
        let chunk = u64::from(self.chunk_bytes);
        let local = page * u64::from(self.page_bytes) + u64::from(offset);
        (local / chunk * u64::from(self.groups) + u64::from(group)) * chunk + local % chunk
    }

    /// How many pages a group's share has, the last one perhaps in part.
    pub fn pages(&self, group: u32) -> u64 {
        let chunk = u64::from(self.chunk_bytes);
        let groups = u64::from(self.groups);
        let chunks = self.size.div_ceil(chunk);
        let own = chunks / groups + u64::from(u64::from(group) < chunks % groups);
        (own * chunk).div_ceil(u64::from(self.page_bytes))
    }

    /// Blocks of a page.
    pub fn page_blocks(&self) -> u32 {
        self.page_bytes / crate::layer::BLOCK_BYTES
    }
}

impl Extent {
    /// The blocks of the page that it touches.
    pub fn blocks(&self) -> Range<u32> {
        let block = crate::layer::BLOCK_BYTES;
        self.offset / block..(self.offset + self.length).div_ceil(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn chunks_go_round_the_groups() {
        let g = Geometry { groups: 3, chunk_bytes: 65536, page_bytes: 1 << 20, size: 64 * MIB };
        let groups: Vec<_> = g.split(0, 5 * 65536).map(|e| (e.group, e.page, e.offset)).collect();
        assert_eq!(groups, [(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, 65536), (1, 0, 65536)]);
    }

    #[test]
    fn one_group_is_not_cut_at_chunks() {
        let g = Geometry { groups: 1, chunk_bytes: 65536, page_bytes: 1 << 20, size: 64 * MIB };
        assert_eq!(g.split(4096, 2 * MIB).count(), 3);
    }

    proptest! {
        #[test]
        fn every_byte_has_one_place_and_comes_back(
            groups in 1u32..=16, chunk_log in 16u32..=20, page_log in 0u32..=2, address in 0u64..1 << 40, length in 1u64..1 << 22,
        ) {
            let g = Geometry { groups, chunk_bytes: 1 << chunk_log, page_bytes: 1 << (chunk_log + page_log), size: 1 << 41 };
            let mut at = address;
            for e in g.split(address, length) {
                prop_assert_eq!(e.address, at);
                prop_assert!(e.offset + e.length <= g.page_bytes);
                prop_assert_eq!(g.address_of(e.group, e.page, e.offset), at);
                prop_assert_eq!(g.address_of(e.group, e.page, e.offset + e.length - 1), at + u64::from(e.length) - 1);
                prop_assert!(e.page < g.pages(e.group));
                at += u64::from(e.length);
            }
            prop_assert_eq!(at, address + length);
        }

        #[test]
        fn growing_moves_no_data(address in 0u64..1 << 30, groups in 1u32..=16) {
            let small = Geometry { groups, chunk_bytes: 65536, page_bytes: 1 << 20, size: 1 << 31 };
            let large = Geometry { size: 1 << 40, ..small };
            prop_assert_eq!(small.split(address, 4096).next(), large.split(address, 4096).next());
        }
    }
}
