//! The catalog: copies with their layers, what is kept of each volume, and the lease number. All of it is in memory.
//!
//! Invariant: a stack number (one layer of one copy) is minted once per device and never reused, so that a header or a
//! record of a copy that went can never be taken for another's. The halves on disk hold the catalog exactly as it was at
//! the journal's tail; the journal's records lead from there to now.
//!
//! ```text
//! 0  4  version, 1        4  8  lease number       12  4  next stack number
//! 4  copies, each: copy 16, volume 16, placement 4, group 4, layers 4, each: layer 16, stack 4, page bytes 4, cursor 8, mark 4
//! 4  volumes, each: volume 16, length 4, blob
//! ```

use crate::store::codec::{Garbled, Put, Reader};
use bytes::Bytes;
use lamina_protocol::ids::{CopyId, LayerId, VolumeId};
use lamina_protocol::limits::{MAX_PAGE_BYTES, MAX_VOLUME_BLOB_BYTES, MIN_PAGE_BYTES};
use lamina_protocol::storage_server::medium::{CopyRecord, LayerRecord};
use std::collections::BTreeMap;

const VERSION: u32 = 1;
/// Stack numbers are never used up; one above this was never minted.
const MAX_STACK: u32 = u32::MAX / 2;
const COPY_BYTES: usize = 44;
const LAYER_BYTES: usize = 36;
const VOLUME_BYTES: usize = 20;

/// One layer of one copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stack {
    pub(crate) copy: CopyId,
    pub(crate) layer: LayerId,
    pub(crate) page_bytes: u32,
    /// First page that is unsynced by the layer's mark.
    pub(crate) cursor: u64,
    /// Counts the marks of the whole layer (H7) and the times a person forced it (I8); [`TRUSTED`] says which was last.
    pub(crate) mark: u32,
}

/// In a stack's mark: the last one was a force (I8). Pages that have not seen it keep what they hold instead of losing it.
const TRUSTED: u32 = 1 << 31;

/// What a layer's mark that a page has not seen does to the blocks of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unseen {
    /// Every block that is not absent is stale (H7).
    Stale,
    /// What is stale is present again (I8).
    Trusted,
}

impl Stack {
    /// The mark that makes every page stale, next after this one.
    pub(crate) fn next_mark(&self) -> u32 {
        (self.mark & !TRUSTED) + 1
    }

    /// The mark that a force leaves.
    pub(crate) fn next_trust(&self) -> u32 {
        self.next_mark() | TRUSTED
    }

    /// What this layer's mark does to a page that has seen `seen` last; `None` = it has seen it.
    pub(crate) fn unseen(&self, seen: u32) -> Option<Unseen> {
        let unseen = if self.mark & TRUSTED == 0 { Unseen::Stale } else { Unseen::Trusted };
        (seen != self.mark).then_some(unseen)
    }

    pub(crate) fn blocks(&self) -> u32 {
        self.page_bytes / lamina_protocol::layer::BLOCK_BYTES
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Copy {
    volume: VolumeId,
    placement: u32,
    group: u32,
    stacks: Vec<u32>,
}

/// Copies, volumes and the lease number.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Catalog {
    copies: BTreeMap<CopyId, Copy>,
    stacks: BTreeMap<u32, Stack>,
    volumes: BTreeMap<VolumeId, Bytes>,
    by_key: BTreeMap<(CopyId, LayerId), u32>,
    pub(crate) lease_number: u64,
    last_stack: u32,
}

impl Catalog {
    pub(crate) fn stack_of(&self, copy: CopyId, layer: LayerId) -> Option<u32> {
        self.by_key.get(&(copy, layer)).copied()
    }

    pub(crate) fn stack(&self, stack: u32) -> Option<&Stack> {
        self.stacks.get(&stack)
    }

    pub(crate) fn stack_mut(&mut self, stack: u32) -> Option<&mut Stack> {
        self.stacks.get_mut(&stack)
    }

    /// The stacks that [`Self::put_copy`] of this record would let go.
    pub(crate) fn leaving(&self, record: &CopyRecord) -> Vec<u32> {
        let listed = |stack: &u32| record.layers.iter().any(|l| l.layer == self.stacks[stack].layer);
        let kept = self.copies.get(&record.copy).map_or(&[][..], |copy| &copy.stacks);
        kept.iter().copied().filter(|stack| !listed(stack)).collect()
    }

    /// The stacks of a copy.
    pub(crate) fn stacks_of(&self, copy: CopyId) -> Vec<u32> {
        self.copies.get(&copy).map_or(Vec::new(), |copy| copy.stacks.clone())
    }

    pub(crate) fn put_copy(&mut self, record: &CopyRecord) {
        for stack in self.leaving(record) {
            self.drop_stack(stack);
        }
        let stacks = record.layers.iter().map(|layer| self.stack_for(record.copy, layer)).collect();
        let CopyRecord { volume, placement, group, .. } = *record;
        self.copies.insert(record.copy, Copy { volume, placement, group, stacks });
    }

    fn stack_for(&mut self, copy: CopyId, layer: &LayerRecord) -> u32 {
        if let Some(stack) = self.stack_of(copy, layer.layer) {
            return stack;
        }
        self.last_stack += 1;
        let LayerRecord { layer, page_bytes, cursor } = *layer;
        self.stacks.insert(self.last_stack, Stack { copy, layer, page_bytes, cursor, mark: 0 });
        self.by_key.insert((copy, layer), self.last_stack);
        self.last_stack
    }

    fn drop_stack(&mut self, stack: u32) {
        if let Some(gone) = self.stacks.remove(&stack) {
            self.by_key.remove(&(gone.copy, gone.layer));
        }
    }

    pub(crate) fn drop_copy(&mut self, copy: CopyId) {
        for stack in self.stacks_of(copy) {
            self.drop_stack(stack);
        }
        self.copies.remove(&copy);
    }

    pub(crate) fn put_volume(&mut self, volume: VolumeId, blob: Bytes) {
        self.volumes.insert(volume, blob);
    }

    pub(crate) fn drop_volume(&mut self, volume: VolumeId) {
        self.volumes.remove(&volume);
    }

    /// Bytes of what is kept of a volume.
    pub(crate) fn blob_bytes(&self, volume: VolumeId) -> Option<usize> {
        self.volumes.get(&volume).map(Bytes::len)
    }

    pub(crate) fn volumes(&self) -> Vec<(VolumeId, Bytes)> {
        self.volumes.iter().map(|(volume, blob)| (*volume, blob.clone())).collect()
    }

    pub(crate) fn copies(&self) -> Vec<CopyRecord> {
        let layer = |stack: &u32| {
            let Stack { layer, page_bytes, cursor, .. } = self.stacks[stack];
            LayerRecord { layer, page_bytes, cursor }
        };
        self.copies
            .iter()
            .map(|(copy, kept)| CopyRecord {
                copy: *copy,
                volume: kept.volume,
                placement: kept.placement,
                group: kept.group,
                layers: kept.stacks.iter().map(layer).collect(),
            })
            .collect()
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_len());
        out.u32(VERSION);
        out.u64(self.lease_number);
        out.u32(self.last_stack);
        out.u32(self.copies.len() as u32);
        for (copy, kept) in &self.copies {
            out.u128(copy.0);
            out.u128(kept.volume.0);
            out.u32(kept.placement);
            out.u32(kept.group);
            out.u32(kept.stacks.len() as u32);
            for number in &kept.stacks {
                let stack = &self.stacks[number];
                out.u128(stack.layer.0);
                out.u32(*number);
                out.u32(stack.page_bytes);
                out.u64(stack.cursor);
                out.u32(stack.mark);
            }
        }
        out.u32(self.volumes.len() as u32);
        for (volume, blob) in &self.volumes {
            out.u128(volume.0);
            out.blob(blob);
        }
        out
    }

    /// Bytes of [`Self::encode`].
    pub(crate) fn encoded_len(&self) -> usize {
        let blobs: usize = self.volumes.values().map(|blob| VOLUME_BYTES + blob.len()).sum();
        24 + self.copies.len() * COPY_BYTES + self.stacks.len() * LAYER_BYTES + blobs
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Garbled> {
        let mut r = Reader(bytes);
        if r.u32()? != VERSION {
            return Err(Garbled);
        }
        let mut out = Self { lease_number: r.u64()?, last_stack: r.u32()?, ..Self::default() };
        if out.last_stack > MAX_STACK {
            return Err(Garbled);
        }
        for _ in 0..r.count(COPY_BYTES)? {
            out.decode_copy(&mut r)?;
        }
        for _ in 0..r.count(VOLUME_BYTES)? {
            let volume = VolumeId(r.u128()?);
            let blob = r.blob()?;
            if blob.len() > MAX_VOLUME_BLOB_BYTES {
                return Err(Garbled);
            }
            out.volumes.insert(volume, blob);
        }
        Ok(out)
    }

    fn decode_copy(&mut self, r: &mut Reader<'_>) -> Result<(), Garbled> {
        let copy = CopyId(r.u128()?);
        let mut kept = Copy { volume: VolumeId(r.u128()?), placement: r.u32()?, group: r.u32()?, stacks: Vec::new() };
        for _ in 0..r.count(LAYER_BYTES)? {
            let (layer, number) = (LayerId(r.u128()?), r.u32()?);
            let stack = Stack { copy, layer, page_bytes: r.u32()?, cursor: r.u64()?, mark: r.u32()? };
            let fresh = self.by_key.insert((copy, layer), number).is_none();
            let sane = page_bytes_fit(stack.page_bytes) && number != 0 && number <= self.last_stack && fresh;
            if !sane || self.stacks.insert(number, stack).is_some() {
                return Err(Garbled);
            }
            kept.stacks.push(number);
        }
        match self.copies.insert(copy, kept) {
            None => Ok(()),
            Some(_) => Err(Garbled),
        }
    }
}

/// Whether a page may be so large.
pub(crate) fn page_bytes_fit(bytes: u32) -> bool {
    bytes.is_power_of_two() && (MIN_PAGE_BYTES..=MAX_PAGE_BYTES).contains(&bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn record(copy: u128, layers: &[u128]) -> CopyRecord {
        let layer = |l: &u128| LayerRecord { layer: LayerId(*l), page_bytes: 1 << 20, cursor: u64::MAX };
        let layers = layers.iter().map(layer).collect();
        CopyRecord { copy: CopyId(copy), volume: VolumeId(9), placement: 1, group: 2, layers }
    }

    #[test]
    fn a_catalog_reads_back_and_its_stack_numbers_are_never_reused() {
        let mut catalog = Catalog::default();
        catalog.put_copy(&record(1, &[10, 11]));
        catalog.put_copy(&record(2, &[10]));
        let old = catalog.stack_of(CopyId(1), LayerId(10)).unwrap();
        catalog.put_copy(&record(1, &[12, 11]));
        catalog.put_copy(&record(1, &[10, 12, 11]));
        assert_ne!(catalog.stack_of(CopyId(1), LayerId(10)), Some(old));
        catalog.put_volume(VolumeId(9), Bytes::from_static(b"map"));
        catalog.lease_number = 77;
        let bytes = catalog.encode();
        assert_eq!(bytes.len(), catalog.encoded_len());
        assert_eq!(Catalog::decode(&bytes), Ok(catalog.clone()));
        assert_eq!(catalog.copies()[0], record(1, &[10, 12, 11]));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = Catalog::decode(&bytes);
            let mut versioned = vec![1, 0, 0, 0];
            versioned.extend(&bytes);
            let _ = Catalog::decode(&versioned);
        }
    }
}
