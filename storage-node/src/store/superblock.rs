//! Superblock (what the device is) and anchor (where its journal and catalog are), as they lie on disk.
//!
//! Invariant: both are written whole as one block and one of two places is always good: the superblock is written twice
//! with the same content, the anchor alternates between its places and the valid one with the higher number counts.
//!
//! ```text
//! superblock                                   anchor
//! 0   8  magic "LAMINA\0S"                     0   8  magic "LAMINA\0A"
//! 8   4  CRC-32C of bytes 12 … 4095            8   4  CRC-32C of bytes 12 … 4095
//! 12  4  format version, 1                     12  4  slabs when it was written
//! 16  8  compat feature words                  16  8  number, counts up
//! 24  8  read-only-compat feature words        24 16  device (guards against a stray block)
//! 32  8  incompat feature words                40  8  journal tail: position of the oldest record needed
//! 40 16  cluster                               48  8  its sequence number
//! 56 16  server                                56  4  CRC of the transaction before it
//! 72 16  device                                60  4  page table headers ever used
//! 88  8  bytes of one half of the catalog      64  4  catalog: bytes
//! 96  8  bytes of the journal                  68  4  catalog: CRC-32C
//! 104 8  bytes of the device at format         72  1  catalog: half
//! 112 4  slab bytes                            73  1  1 = data was ever written in place
//!                                              74 16  boot id of the opening, in every transaction from the tail on
//! ```
//! Unknown incompat bits: refused. Unknown read-only-compat bits: refused too, as a store always writes. Unknown compat
//! bits are kept and ignored.

use crate::store::codec::{Garbled, Put, Reader, crc32c};
use crate::store::geometry::{BLOCK, Geometry, SLAB_BYTES};
use lamina_protocol::ids::{BootId, ClusterId, DeviceId, ServerId};

/// Starts every device of Lamina.
pub(crate) const SUPER_MAGIC: &[u8; 8] = b"LAMINA\0S";
const ANCHOR_MAGIC: &[u8; 8] = b"LAMINA\0A";
/// The only format so far.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// What the device is; changes only at format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) version: u32,
    pub(crate) compat: u64,
    pub(crate) ro_compat: u64,
    pub(crate) incompat: u64,
    pub(crate) cluster: ClusterId,
    pub(crate) server: ServerId,
    pub(crate) device: DeviceId,
    pub(crate) catalog_bytes: u64,
    pub(crate) journal_bytes: u64,
    pub(crate) formatted_bytes: u64,
}

fn sealed(magic: &[u8; 8], body: &[u8]) -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    block[..8].copy_from_slice(magic);
    block[12..12 + body.len()].copy_from_slice(body);
    let crc = crc32c(&block[12..]);
    block[8..12].copy_from_slice(&crc.to_le_bytes());
    block
}

fn unsealed<'a>(magic: &[u8; 8], block: &'a [u8]) -> Result<Reader<'a>, Garbled> {
    let mut reader = Reader(block.get(..BLOCK as usize).ok_or(Garbled)?);
    let known = reader.take(8)? == magic;
    let crc = reader.u32()?;
    (known && crc == crc32c(reader.0)).then_some(reader).ok_or(Garbled)
}

impl Superblock {
    pub(crate) fn new(cluster: ClusterId, server: ServerId, device: DeviceId, geo: &Geometry, bytes: u64) -> Self {
        Self {
            version: FORMAT_VERSION,
            compat: 0,
            ro_compat: 0,
            incompat: 0,
            cluster,
            server,
            device,
            catalog_bytes: geo.catalog_bytes,
            journal_bytes: geo.journal_bytes,
            formatted_bytes: bytes,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.u32(self.version);
        body.u64(self.compat);
        body.u64(self.ro_compat);
        body.u64(self.incompat);
        body.u128(self.cluster.0);
        body.u128(self.server.0);
        body.u128(self.device.0);
        body.u64(self.catalog_bytes);
        body.u64(self.journal_bytes);
        body.u64(self.formatted_bytes);
        body.u32(SLAB_BYTES as u32);
        sealed(SUPER_MAGIC, &body)
    }

    pub(crate) fn decode(block: &[u8]) -> Result<Self, Garbled> {
        let mut r = unsealed(SUPER_MAGIC, block)?;
        let found = Self {
            version: r.u32()?,
            compat: r.u64()?,
            ro_compat: r.u64()?,
            incompat: r.u64()?,
            cluster: ClusterId(r.u128()?),
            server: ServerId(r.u128()?),
            device: DeviceId(r.u128()?),
            catalog_bytes: r.u64()?,
            journal_bytes: r.u64()?,
            formatted_bytes: r.u64()?,
        };
        let slab_fits = u64::from(r.u32()?) == SLAB_BYTES;
        let whole = |bytes: u64| (1 << 20..=1 << 40).contains(&bytes) && bytes.is_multiple_of(1 << 20);
        let sane = slab_fits && whole(found.catalog_bytes) && whole(found.journal_bytes);
        // A later version may mean anything by its sizes; the caller refuses it by its version.
        (sane || found.version != FORMAT_VERSION).then_some(found).ok_or(Garbled)
    }

    /// Whether this program may write the device.
    pub(crate) fn is_known(&self) -> bool {
        self.version == FORMAT_VERSION && self.incompat == 0 && self.ro_compat == 0
    }
}

/// Where the journal and the catalog are; written at every checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Anchor {
    pub(crate) slabs: u32,
    pub(crate) number: u64,
    pub(crate) device: DeviceId,
    pub(crate) tail: JournalPoint,
    pub(crate) entries_high: u32,
    pub(crate) catalog_len: u32,
    pub(crate) catalog_crc: u32,
    pub(crate) catalog_half: u8,
    pub(crate) ever_in_place: bool,
    pub(crate) boot: BootId,
}

/// A place in the journal: the transaction that starts here follows one with this CRC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct JournalPoint {
    /// Counts bytes for ever; the ring offset is the remainder by the ring's size.
    pub(crate) position: u64,
    pub(crate) sequence: u64,
    pub(crate) chain: u32,
}

impl Anchor {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.u32(self.slabs);
        body.u64(self.number);
        body.u128(self.device.0);
        body.u64(self.tail.position);
        body.u64(self.tail.sequence);
        body.u32(self.tail.chain);
        body.u32(self.entries_high);
        body.u32(self.catalog_len);
        body.u32(self.catalog_crc);
        body.u8(self.catalog_half);
        body.u8(u8::from(self.ever_in_place));
        body.u128(self.boot.0);
        sealed(ANCHOR_MAGIC, &body)
    }

    pub(crate) fn decode(block: &[u8]) -> Result<Self, Garbled> {
        let mut r = unsealed(ANCHOR_MAGIC, block)?;
        let found = Self {
            slabs: r.u32()?,
            number: r.u64()?,
            device: DeviceId(r.u128()?),
            tail: JournalPoint { position: r.u64()?, sequence: r.u64()?, chain: r.u32()? },
            entries_high: r.u32()?,
            catalog_len: r.u32()?,
            catalog_crc: r.u32()?,
            catalog_half: r.u8()?,
            ever_in_place: r.u8()? != 0,
            boot: BootId(r.u128()?),
        };
        // What counts up from here on never ends.
        let counts = [found.number, found.tail.position, found.tail.sequence].iter().all(|count| *count < 1 << 62);
        let sane =
            found.catalog_half < 2 && found.tail.position.is_multiple_of(BLOCK) && counts && found.tail.sequence > 0;
        sane.then_some(found).ok_or(Garbled)
    }

    /// Which of the two places this anchor belongs to.
    pub(crate) fn place(&self) -> usize {
        (self.number % 2) as usize
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Superblock {
        let geo = Geometry::for_new(1 << 30, None).unwrap();
        Superblock::new(ClusterId(1), ServerId(2), DeviceId(3), &geo, 1 << 30)
    }

    #[test]
    fn a_superblock_reads_back_and_one_flipped_bit_is_noticed() {
        let block = sample().encode();
        assert_eq!(Superblock::decode(&block), Ok(sample()));
        for byte in [0, 9, 15, 40, 100, 4095] {
            let mut bad = block.clone();
            bad[byte] ^= 1;
            assert_eq!(Superblock::decode(&bad), Err(Garbled), "byte {byte}");
        }
    }

    #[test]
    fn a_later_version_is_recognised_but_not_known() {
        let later = Superblock { version: 2, ..sample() };
        assert!(!Superblock::decode(&later.encode()).unwrap().is_known());
        assert!(!Superblock { incompat: 1, ..sample() }.is_known());
        assert!(Superblock { compat: 1, ..sample() }.is_known());
    }

    proptest! {
        #[test]
        fn garbage_is_neither_superblock_nor_anchor(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            prop_assert_eq!(Superblock::decode(&bytes), Err(Garbled));
            prop_assert_eq!(Anchor::decode(&bytes), Err(Garbled));
        }
    }
}
