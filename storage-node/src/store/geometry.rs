//! Where everything lies on a device: constants and address arithmetic, nothing else.
//!
//! ```text
//! byte            what
//! 0               superblock, first copy (4 KiB)
//! 256 KiB         anchor, first place (4 KiB)
//! 512 KiB         superblock, second copy
//! 768 KiB         anchor, second place
//! 1 MiB           catalog, first half    (catalog_bytes)
//!                 catalog, second half   (catalog_bytes)
//!                 journal ring           (journal_bytes)
//! zones_at        zone 0, zone 1, … each ZONE_BYTES long, the last one may end early
//!
//! zone:  0        page table, 16384 headers of 64 bytes
//!        1 MiB    block cells, 4096 of 512 bytes: cell c keeps state and CRC-32C of blocks 64c … 64c+63 of the zone
//!        3 MiB    256 slabs of 4 MiB, each for pages of one size
//! ```
//! Headers are dense (the lowest free number is taken first) and point to slots, so that an opening reads as many
//! headers as there are pages; cells are found by place, so that a block's checksum costs no index.
//! A device that grows gets slabs in its last zone and further zones; nothing moves.

use crate::store::DeviceError;

/// Bytes of a block, also of every metadata write.
pub(crate) const BLOCK: u64 = 4096;
/// Bytes of a slab: the unit in which space is given to a page size.
pub(crate) const SLAB_BYTES: u64 = 4 << 20;
/// Smallest device or file.
pub const MIN_DEVICE_BYTES: u64 = 64 << 20;

pub(crate) const SUPER_AT: [u64; 2] = [0, 512 << 10];
pub(crate) const ANCHOR_AT: [u64; 2] = [256 << 10, 768 << 10];
pub(crate) const CATALOG_AT: u64 = 1 << 20;

pub(crate) const SLAB_BLOCKS: u64 = SLAB_BYTES / BLOCK;
pub(crate) const ZONE_SLABS: u32 = 256;
pub(crate) const ZONE_ENTRIES: u32 = 16384;
const CELLS_IN_ZONE_AT: u64 = 1 << 20;
const SLABS_IN_ZONE_AT: u64 = 3 << 20;
const ZONE_BYTES: u64 = SLABS_IN_ZONE_AT + ZONE_SLABS as u64 * SLAB_BYTES;
/// Smallest slot; slots are numbered in units of it.
pub(crate) const UNIT_BYTES: u64 = 64 << 10;
pub(crate) const UNITS_PER_SLAB: u32 = (SLAB_BYTES / UNIT_BYTES) as u32;
pub(crate) const UNIT_BLOCKS: u64 = UNIT_BYTES / BLOCK;
/// Blocks of data that one block of cells describes.
pub(crate) const CELL_BLOCK_COVERS: u64 = 512;
/// Headers in one block of the page table.
pub(crate) const ENTRIES_PER_BLOCK: u32 = 64;

/// A block of the data area, counted from the first slab on. Its checksum's place follows from the number.
pub(crate) type HomeBlock = u64;

/// Sizes chosen at format, and what the device's present size makes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) catalog_bytes: u64,
    pub(crate) journal_bytes: u64,
    pub(crate) slabs: u32,
}

impl Geometry {
    /// Sizes for a new device of so many bytes.
    pub(crate) fn for_new(device_bytes: u64, journal_bytes: Option<u64>) -> Result<Self, DeviceError> {
        if device_bytes < MIN_DEVICE_BYTES {
            return Err(DeviceError::TooSmall { bytes: device_bytes });
        }
        let catalog_bytes = (device_bytes / 256).clamp(1 << 20, 64 << 20).next_multiple_of(1 << 20);
        let journal_bytes = journal_bytes.unwrap_or((device_bytes / 64).clamp(8 << 20, 256 << 20));
        let journal_bytes = journal_bytes.next_multiple_of(1 << 20);
        Self { catalog_bytes, journal_bytes, slabs: 0 }.sized(device_bytes)
    }

    /// The same with as many slabs as a device of this size has room for.
    pub(crate) fn sized(self, device_bytes: u64) -> Result<Self, DeviceError> {
        let room = device_bytes.saturating_sub(self.zones_at());
        let (whole, rest) = (room / ZONE_BYTES, room % ZONE_BYTES);
        let slabs = whole * u64::from(ZONE_SLABS) + rest.saturating_sub(SLABS_IN_ZONE_AT) / SLAB_BYTES;
        // Slots are numbered with 32 bits in units of 64 KiB: 256 TiB.
        let slabs = slabs.min(u64::from(u32::MAX / UNITS_PER_SLAB)) as u32;
        if slabs == 0 {
            return Err(DeviceError::TooSmall { bytes: device_bytes });
        }
        Ok(Self { slabs, ..self })
    }

    pub(crate) fn catalog_at(&self, half: u8) -> u64 {
        CATALOG_AT + u64::from(half) * self.catalog_bytes
    }

    pub(crate) fn journal_at(&self) -> u64 {
        CATALOG_AT + 2 * self.catalog_bytes
    }

    pub(crate) fn zones_at(&self) -> u64 {
        self.journal_at() + self.journal_bytes
    }

    fn zone_at(&self, zone: u32) -> u64 {
        self.zones_at() + u64::from(zone) * ZONE_BYTES
    }

    /// Where the device must reach at least.
    pub(crate) fn end(&self) -> u64 {
        self.slab_at(self.slabs - 1) + SLAB_BYTES
    }

    /// Headers that the page table has room for.
    pub(crate) fn entries(&self) -> u32 {
        self.slabs.div_ceil(ZONE_SLABS).saturating_mul(ZONE_ENTRIES)
    }

    /// Byte of a block of the page table; block k holds headers 64k … 64k+63.
    pub(crate) fn table_block_at(&self, block: u32) -> u64 {
        let per_zone = ZONE_ENTRIES / ENTRIES_PER_BLOCK;
        self.zone_at(block / per_zone) + u64::from(block % per_zone) * BLOCK
    }

    fn slab_at(&self, slab: u32) -> u64 {
        self.zone_at(slab / ZONE_SLABS) + SLABS_IN_ZONE_AT + u64::from(slab % ZONE_SLABS) * SLAB_BYTES
    }

    /// Byte of a block of data.
    pub(crate) fn home_at(&self, home: HomeBlock) -> u64 {
        self.slab_at((home / SLAB_BLOCKS) as u32) + home % SLAB_BLOCKS * BLOCK
    }

    /// Byte of a block of cells; block k describes home blocks 512k … 512k+511.
    pub(crate) fn cell_block_at(&self, block: u32) -> u64 {
        let per_zone = ZONE_SLABS * 2;
        self.zone_at(block / per_zone) + CELLS_IN_ZONE_AT + u64::from(block % per_zone) * BLOCK
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        u64::from(self.slabs) * SLAB_BYTES
    }
}

/// Which block of cells describes a home block.
pub(crate) fn cell_block_of(home: HomeBlock) -> u32 {
    (home / CELL_BLOCK_COVERS) as u32
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_grown_device_keeps_every_address() {
        let small = Geometry::for_new(MIN_DEVICE_BYTES, None).unwrap();
        let large = small.sized(10 << 40).unwrap();
        assert!(small.slabs >= 10, "most of the smallest device is for data: {small:?}");
        let last = u64::from(small.slabs) * SLAB_BLOCKS - 1;
        assert_eq!(small.home_at(last), large.home_at(last));
        assert_eq!(small.cell_block_at(cell_block_of(last)), large.cell_block_at(cell_block_of(last)));
        assert!(small.end() <= MIN_DEVICE_BYTES);
        assert!(large.entries() > 10_000_000);
        assert!(large.end() <= 10 << 40);
    }

    #[test]
    fn regions_do_not_overlap() {
        let geo = Geometry::for_new(3 << 30, None).unwrap();
        assert!(geo.table_block_at(255) < geo.cell_block_at(0));
        assert_eq!(geo.cell_block_at(511) + BLOCK, geo.home_at(0));
        assert_eq!(geo.table_block_at(256), geo.home_at(256 * SLAB_BLOCKS - 1) + BLOCK);
    }
}
