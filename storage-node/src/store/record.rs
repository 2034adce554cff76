//! Redo records: what a transaction of the journal does, with absolute values.
//!
//! Invariant: replaying all records from the journal's tail on, over metadata that already holds some of their effects,
//! ends in the state after the last one. So blocks may be written home at any time after their records are durable, and
//! a torn write of them does no harm (headers and cells are whole 512-byte sectors or less).
//!
//! ```text
//! 1 header     number 4, header 64          the page's header becomes this
//! 2 slab       slab 4                       the slab was unused: all its cells become absent
//! 3 shape      home 8, blocks 4, state 1    these blocks get this state, checksums stay
//! 4 present    home 8, blocks 4, CRCs       these blocks are present, their data is in place
//! 5 data       home 8, blocks 4, CRCs       the same, their data follows in this transaction
//! 6 copy       copy, volume, placement, group, layers   7 no copy   copy 16
//! 8 volume     volume 16, length 4, blob    9 no volume  volume 16   10 lease number  8
//! 11 cursor    stack 4, cursor 8            12 mark  stack 4, mark 4
//! ```

use crate::store::catalog::{Catalog, page_bytes_fit};
use crate::store::codec::{Garbled, Put, Reader};
use crate::store::table::{ENTRY_BYTES, Entry};
use bytes::Bytes;
use lamina_protocol::ids::{CopyId, LayerId, VolumeId};
use lamina_protocol::layer::BlockState;
use lamina_protocol::limits::MAX_VOLUME_BLOB_BYTES;
use lamina_protocol::storage_server::medium::{CopyRecord, LayerRecord};

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Redo {
    Header { number: u32, entry: Entry, runs: Vec<u16> },
    Slab(u32),
    Shape { home: u64, blocks: u32, state: BlockState },
    Present { home: u64, crcs: Vec<u32> },
    Data { home: u64, crcs: Vec<u32> },
    Catalog(CatalogChange),
}

/// A change of the catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CatalogChange {
    PutCopy(CopyRecord),
    DropCopy(CopyId),
    PutVolume(VolumeId, Bytes),
    DropVolume(VolumeId),
    Lease(u64),
    Cursor { stack: u32, cursor: u64 },
    Mark { stack: u32, mark: u32 },
}

impl CatalogChange {
    /// Does it, and returns the stacks whose pages go.
    pub(crate) fn apply(&self, catalog: &mut Catalog) -> Vec<u32> {
        match self {
            Self::PutCopy(record) => {
                let leaving = catalog.leaving(record);
                catalog.put_copy(record);
                return leaving;
            }
            Self::DropCopy(copy) => {
                let leaving = catalog.stacks_of(*copy);
                catalog.drop_copy(*copy);
                return leaving;
            }
            Self::PutVolume(volume, blob) => catalog.put_volume(*volume, blob.clone()),
            Self::DropVolume(volume) => catalog.drop_volume(*volume),
            Self::Lease(number) => catalog.lease_number = *number,
            Self::Cursor { stack, cursor } => {
                if let Some(stack) = catalog.stack_mut(*stack) {
                    stack.cursor = *cursor;
                }
            }
            Self::Mark { stack, mark } => {
                if let Some(stack) = catalog.stack_mut(*stack) {
                    (stack.mark, stack.cursor) = (*mark, 0);
                }
            }
        }
        Vec::new()
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::PutCopy(record) => encode_copy(record, out),
            Self::DropCopy(copy) => {
                out.u8(7);
                out.u128(copy.0);
            }
            Self::PutVolume(volume, blob) => {
                out.u8(8);
                out.u128(volume.0);
                out.blob(blob);
            }
            Self::DropVolume(volume) => {
                out.u8(9);
                out.u128(volume.0);
            }
            Self::Lease(number) => {
                out.u8(10);
                out.u64(*number);
            }
            Self::Cursor { stack, cursor } => {
                out.u8(11);
                out.u32(*stack);
                out.u64(*cursor);
            }
            Self::Mark { stack, mark } => {
                out.u8(12);
                out.u32(*stack);
                out.u32(*mark);
            }
        }
    }
}

fn encode_copy(record: &CopyRecord, out: &mut Vec<u8>) {
    out.u8(6);
    out.u128(record.copy.0);
    out.u128(record.volume.0);
    out.u32(record.placement);
    out.u32(record.group);
    out.u32(record.layers.len() as u32);
    for layer in &record.layers {
        out.u128(layer.layer.0);
        out.u32(layer.page_bytes);
        out.u64(layer.cursor);
    }
}

fn decode_copy(r: &mut Reader<'_>) -> Result<CopyRecord, Garbled> {
    let (copy, volume) = (CopyId(r.u128()?), VolumeId(r.u128()?));
    let (placement, group) = (r.u32()?, r.u32()?);
    let mut layers = Vec::new();
    for _ in 0..r.count(28)? {
        let layer = LayerRecord { layer: LayerId(r.u128()?), page_bytes: r.u32()?, cursor: r.u64()? };
        if !page_bytes_fit(layer.page_bytes) {
            return Err(Garbled);
        }
        layers.push(layer);
    }
    Ok(CopyRecord { copy, volume, placement, group, layers })
}

fn encode_crcs(kind: u8, home: u64, crcs: &[u32], out: &mut Vec<u8>) {
    out.u8(kind);
    out.u64(home);
    out.u32(crcs.len() as u32);
    crcs.iter().for_each(|crc| out.u32(*crc));
}

fn decode_crcs(r: &mut Reader<'_>) -> Result<(u64, Vec<u32>), Garbled> {
    let home = r.u64()?;
    let crcs = (0..r.count(4)?).map(|_| r.u32()).collect::<Result<_, _>>()?;
    Ok((home, crcs))
}

impl Redo {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Header { number, entry, runs } => {
                out.u8(1);
                out.u32(*number);
                out.bytes(&entry.encode(*number, runs));
            }
            Self::Slab(slab) => {
                out.u8(2);
                out.u32(*slab);
            }
            Self::Shape { home, blocks, state } => {
                out.u8(3);
                out.u64(*home);
                out.u32(*blocks);
                out.u8(*state as u8);
            }
            Self::Present { home, crcs } => encode_crcs(4, *home, crcs, out),
            Self::Data { home, crcs } => encode_crcs(5, *home, crcs, out),
            Self::Catalog(change) => change.encode(out),
        }
    }

    /// The next record, `None` at the end.
    pub(crate) fn decode(r: &mut Reader<'_>) -> Result<Option<Self>, Garbled> {
        if r.0.is_empty() {
            return Ok(None);
        }
        Ok(Some(match r.u8()? {
            1 => {
                let number = r.u32()?;
                let (entry, runs) = Entry::decode(number, r.take(ENTRY_BYTES)?)?;
                Self::Header { number, entry, runs }
            }
            2 => Self::Slab(r.u32()?),
            3 => {
                let (home, blocks) = (r.u64()?, r.u32()?);
                Self::Shape { home, blocks, state: BlockState::from_bits(r.u8()?).ok_or(Garbled)? }
            }
            4 => decode_crcs(r).map(|(home, crcs)| Self::Present { home, crcs })?,
            5 => decode_crcs(r).map(|(home, crcs)| Self::Data { home, crcs })?,
            kind => Self::Catalog(decode_change(kind, r)?),
        }))
    }

    /// Blocks of data that follow in the transaction.
    pub(crate) fn data_blocks(&self) -> usize {
        match self {
            Self::Data { crcs, .. } => crcs.len(),
            _ => 0,
        }
    }
}

fn decode_change(kind: u8, r: &mut Reader<'_>) -> Result<CatalogChange, Garbled> {
    Ok(match kind {
        6 => CatalogChange::PutCopy(decode_copy(r)?),
        7 => CatalogChange::DropCopy(CopyId(r.u128()?)),
        8 => {
            let (volume, blob) = (VolumeId(r.u128()?), r.blob()?);
            if blob.len() > MAX_VOLUME_BLOB_BYTES {
                return Err(Garbled);
            }
            CatalogChange::PutVolume(volume, blob)
        }
        9 => CatalogChange::DropVolume(VolumeId(r.u128()?)),
        10 => CatalogChange::Lease(r.u64()?),
        11 => CatalogChange::Cursor { stack: r.u32()?, cursor: r.u64()? },
        12 => CatalogChange::Mark { stack: r.u32()?, mark: r.u32()? },
        _ => return Err(Garbled),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_record_reads_back() {
        let layer = LayerRecord { layer: LayerId(5), page_bytes: 1 << 16, cursor: 3 };
        let copy = CopyRecord { copy: CopyId(1), volume: VolumeId(2), placement: 3, group: 4, layers: vec![layer] };
        let all = [
            Redo::Header { number: 7, entry: Entry::new(1, 2, 3), runs: vec![2] },
            Redo::Slab(9),
            Redo::Shape { home: 1 << 40, blocks: 3, state: BlockState::Hole },
            Redo::Present { home: 5, crcs: vec![1, 2, 3] },
            Redo::Data { home: 5, crcs: vec![4] },
            Redo::Catalog(CatalogChange::PutCopy(copy)),
            Redo::Catalog(CatalogChange::DropCopy(CopyId(3))),
            Redo::Catalog(CatalogChange::PutVolume(VolumeId(4), Bytes::from_static(b"blob"))),
            Redo::Catalog(CatalogChange::DropVolume(VolumeId(4))),
            Redo::Catalog(CatalogChange::Lease(12)),
            Redo::Catalog(CatalogChange::Cursor { stack: 1, cursor: 9 }),
            Redo::Catalog(CatalogChange::Mark { stack: 1, mark: 2 }),
        ];
        let mut bytes = Vec::new();
        all.iter().for_each(|redo| redo.encode(&mut bytes));
        let mut r = Reader(&bytes);
        for redo in &all {
            assert_eq!(Redo::decode(&mut r).unwrap().as_ref(), Some(redo));
        }
        assert_eq!(Redo::decode(&mut r), Ok(None));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(kind in 0u8..14, bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut input = vec![kind];
            input.extend(bytes);
            let mut r = Reader(&input);
            while let Ok(Some(_)) = Redo::decode(&mut r) {}
        }
    }
}
