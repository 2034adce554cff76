//! The journal: a ring of transactions, each with sequence number, checksum, and the checksum of the one before.
//!
//! Invariant: a transaction counts if it and all before it from the anchor's tail on are whole. The chain and the boot
//! id make sure that what an earlier opening left beyond the end never joins on again.
//!
//! ```text
//! transaction: meta padded to 4 KiB, then its blocks of data. It never wraps: where it does not fit before the end of
//! the ring it starts at the ring's next beginning.
//! 0   4  magic "LJTX"                          40  4  CRC of the transaction before
//! 4   4  CRC-32C of bytes 8 … meta length      44  4  meta length with these 64 bytes
//! 8   8  sequence number                       48  4  blocks of data that follow
//! 16  8  position                              52  4  0
//! 24 16  boot id                               56  8  highest sequence number known durable then
//! 64     records (record.rs)
//! ```
//! Blocks of data are covered by the CRCs in their records. The last field tells a journal that rotted in the middle
//! from one that ends: if a later transaction says that the missing one was durable, the device is refused.

use crate::store::aligned::AlignedBuf;
use crate::store::codec::{Garbled, Put, Reader, crc32c};
use crate::store::geometry::BLOCK;
use crate::store::record::Redo;
use crate::store::superblock::JournalPoint;
use lamina_protocol::ids::BootId;

const MAGIC: u32 = u32::from_le_bytes(*b"LJTX");
const HEAD: usize = 64;

/// One transaction ready to be written.
pub(crate) struct Built {
    pub(crate) buf: AlignedBuf,
    /// Byte of its first block of data, from its start.
    pub(crate) data_at: u64,
    pub(crate) chain: u32,
}

/// What goes into every transaction's head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) point: JournalPoint,
    pub(crate) boot: BootId,
    pub(crate) durable: u64,
}

/// Bytes of a transaction with so many bytes of records and blocks of data.
pub(crate) fn transaction_bytes(records: usize, data_blocks: usize) -> u64 {
    ((HEAD + records) as u64).next_multiple_of(BLOCK) + data_blocks as u64 * BLOCK
}

/// Where a transaction of so many bytes goes that comes after `position`.
pub(crate) fn placed(position: u64, bytes: u64, ring: u64) -> u64 {
    let rest = ring - position % ring;
    if bytes <= rest { position } else { position + rest }
}

/// Builds a transaction; `data` is copied behind the records.
pub(crate) fn build<'a>(head: Head, records: &[u8], data_blocks: usize, data: impl Iterator<Item = &'a [u8]>) -> Built {
    let data_at = transaction_bytes(records.len(), 0);
    let mut buf = AlignedBuf::zeroed((data_at + data_blocks as u64 * BLOCK) as usize);
    let mut meta = Vec::with_capacity(HEAD);
    meta.u32(MAGIC);
    meta.u32(0);
    meta.u64(head.point.sequence);
    meta.u64(head.point.position);
    meta.u128(head.boot.0);
    meta.u32(head.point.chain);
    meta.u32((HEAD + records.len()) as u32);
    meta.u32(data_blocks as u32);
    meta.u32(0);
    meta.u64(head.durable);
    buf[..HEAD].copy_from_slice(&meta);
    buf[HEAD..HEAD + records.len()].copy_from_slice(records);
    let chain = crc32c(&buf[8..HEAD + records.len()]);
    buf[4..8].copy_from_slice(&chain.to_le_bytes());
    let mut at = data_at as usize;
    for part in data {
        buf[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    assert!(at == buf.len(), "as much data as was announced");
    Built { buf, data_at, chain }
}

/// A head that was read, its length not yet trusted beyond the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FoundHead {
    pub(crate) sequence: u64,
    pub(crate) position: u64,
    pub(crate) boot: BootId,
    pub(crate) before: u32,
    pub(crate) crc: u32,
    pub(crate) meta_len: usize,
    pub(crate) data_blocks: usize,
    pub(crate) durable: u64,
}

impl FoundHead {
    /// Reads the first block of what may be a transaction in a ring of so many bytes.
    pub(crate) fn decode(block: &[u8], ring: u64) -> Result<Self, Garbled> {
        let mut r = Reader(block);
        if r.u32()? != MAGIC {
            return Err(Garbled);
        }
        let crc = r.u32()?;
        let (sequence, position, boot, before) = (r.u64()?, r.u64()?, BootId(r.u128()?), r.u32()?);
        let (meta_len, data_blocks) = (r.u32()? as usize, r.u32()? as usize);
        r.u32()?;
        let found = Self { sequence, position, boot, before, crc, meta_len, data_blocks, durable: r.u64()? };
        let fits = meta_len >= HEAD && found.bytes() <= ring;
        fits.then_some(found).ok_or(Garbled)
    }

    /// Bytes of the whole transaction.
    pub(crate) fn bytes(&self) -> u64 {
        (self.meta_len as u64).next_multiple_of(BLOCK) + self.data_blocks as u64 * BLOCK
    }

    /// The records, if the whole transaction verifies. The second value is the byte of the first block of data.
    pub(crate) fn records(&self, whole: &[u8]) -> Result<(Vec<Redo>, usize), Garbled> {
        let meta = whole.get(8..self.meta_len).ok_or(Garbled)?;
        if crc32c(meta) != self.crc {
            return Err(Garbled);
        }
        let mut r = Reader(&meta[HEAD - 8..]);
        let data_at = self.meta_len.next_multiple_of(BLOCK as usize);
        let mut data = Reader(whole.get(data_at..).ok_or(Garbled)?);
        let mut records = Vec::new();
        while let Some(redo) = Redo::decode(&mut r)? {
            if let Redo::Data { crcs, .. } = &redo {
                for crc in crcs {
                    if crc32c(data.take(BLOCK as usize)?) != *crc {
                        return Err(Garbled);
                    }
                }
            }
            records.push(redo);
        }
        let expected: usize = records.iter().map(Redo::data_blocks).sum();
        (expected == self.data_blocks).then_some((records, data_at)).ok_or(Garbled)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Built {
        let head = Head { point: JournalPoint { position: 8192, sequence: 5, chain: 6 }, boot: BootId(7), durable: 4 };
        let block = [9u8; BLOCK as usize];
        let mut records = Vec::new();
        Redo::Data { home: 3, crcs: vec![crc32c(&block)] }.encode(&mut records);
        Redo::Slab(1).encode(&mut records);
        build(head, &records, 1, std::iter::once(&block[..]))
    }

    #[test]
    fn a_transaction_reads_back_and_any_flipped_bit_ends_it() {
        let built = sample();
        let head = FoundHead::decode(&built.buf, 1 << 20).unwrap();
        assert_eq!((head.sequence, head.position, head.crc, head.bytes()), (5, 8192, built.chain, 8192));
        let (records, data_at) = head.records(&built.buf).unwrap();
        assert_eq!((records.len(), data_at as u64), (2, built.data_at));
        for byte in [4, 9, 20, 50, 64, 70, 4096, 8191] {
            let mut bad = built.buf.to_vec();
            bad[byte] ^= 4;
            let found = FoundHead::decode(&bad, 1 << 20).and_then(|h| h.records(&bad));
            assert!(found.is_err(), "byte {byte}");
        }
        assert!(head.records(&built.buf[..4096]).is_err(), "cut off");
    }

    #[test]
    fn a_transaction_never_wraps() {
        assert_eq!(placed(0, 4096, 16384), 0);
        assert_eq!(placed(12288, 4096, 16384), 12288);
        assert_eq!(placed(12288, 8192, 16384), 16384);
    }

    proptest! {
        #[test]
        fn garbage_is_no_transaction(bytes in proptest::collection::vec(any::<u8>(), 0..9000), magic in any::<bool>()) {
            let mut bytes = bytes;
            if magic && bytes.len() >= 4 {
                bytes[..4].copy_from_slice(b"LJTX");
            }
            if let Ok(head) = FoundHead::decode(&bytes, 1 << 20) {
                prop_assert!(head.records(&bytes).is_err());
            }
        }
    }
}
