//! What recovery took, read again from the bytes alone, by other code than recovery's: the byte tables of
//! `superblock.rs`, `table.rs` and `journal.rs`.

use super::memory_disk::MemoryDisk;
use crate::store::codec::{Reader, crc32c};
use crate::store::disk::Disk;
use crate::store::geometry::{BLOCK, ENTRIES_PER_BLOCK, SUPER_AT};
use crate::store::record::Redo;
use crate::store::recovery::Loaded;
use crate::store::table::ENTRY_BYTES;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Panics if anything was taken whose checksum does not fit.
pub(super) fn nothing_without_its_checksum(disk: &MemoryDisk, loaded: &Loaded) {
    let whole = |at: u64| {
        let block = disk.block(at);
        u32_at(&block, 8) == crc32c(&block[12..])
    };
    assert!(SUPER_AT.into_iter().any(whole), "neither superblock is whole");
    let catalog = disk.read_new(loaded.geo.catalog_at(loaded.anchor.catalog_half), 1 << 20).expect("it is there");
    assert_eq!(crc32c(&catalog[..loaded.anchor.catalog_len as usize]), loaded.anchor.catalog_crc);
    for number in 0..loaded.anchor.entries_high {
        let block = disk.block(loaded.geo.table_block_at(number / ENTRIES_PER_BLOCK));
        let header = &block[(number % ENTRIES_PER_BLOCK) as usize * ENTRY_BYTES..][..ENTRY_BYTES];
        let unused = header.iter().all(|byte| *byte == 0);
        assert!(unused || u32_at(header, 0) == crc32c(&header[4..]), "header {number}");
    }
    walk(disk, loaded);
    for (home, at) in &loaded.overlay {
        let data = disk.block(*at);
        let crcs = written(disk, loaded, *home);
        assert_eq!(crcs, Some(crc32c(&data)), "block {home} lies in the journal with another checksum");
    }
}

/// Every transaction that was taken, in turn.
fn taken(disk: &MemoryDisk, loaded: &Loaded) -> Vec<Vec<u8>> {
    let (ring, start) = (loaded.geo.journal_bytes, loaded.geo.journal_at());
    let tail = loaded.anchor.tail;
    let (mut position, mut chain, mut found) = (tail.position, tail.chain, Vec::new());
    for sequence in tail.sequence..loaded.head.sequence {
        let fits = |position: u64| {
            let head = disk.block(start + position % ring);
            let joins = u64_at(&head, 8) == sequence && u64_at(&head, 16) == position && u32_at(&head, 40) == chain;
            joins && &head[..4] == b"LJTX" && head[24..40] == loaded.anchor.boot.0.to_le_bytes()
        };
        if !fits(position) {
            position += ring - position % ring;
        }
        assert!(fits(position), "transaction {sequence} is not there");
        let head = disk.block(start + position % ring);
        let meta = u64::from(u32_at(&head, 44)).next_multiple_of(BLOCK);
        let bytes = meta + u64::from(u32_at(&head, 48)) * BLOCK;
        let whole = disk.read_new(start + position % ring, bytes as usize).expect("within the ring");
        let crc = crc32c(&whole[8..u32_at(&head, 44) as usize]);
        assert_eq!(crc, u32_at(&head, 4), "transaction {sequence} was taken with another checksum");
        (position, chain) = (position + bytes, crc);
        found.push(whole.to_vec());
    }
    assert_eq!((position, chain), (loaded.head.position, loaded.head.chain));
    found
}

fn walk(disk: &MemoryDisk, loaded: &Loaded) {
    for whole in taken(disk, loaded) {
        let mut data = (u32_at(&whole, 44) as usize).next_multiple_of(BLOCK as usize);
        for redo in records(&whole) {
            let Redo::Data { crcs, .. } = redo else { continue };
            for crc in crcs {
                assert_eq!(crc32c(&whole[data..data + BLOCK as usize]), crc, "data was taken with another checksum");
                data += BLOCK as usize;
            }
        }
    }
}

fn records(whole: &[u8]) -> Vec<Redo> {
    let mut reader = Reader(&whole[64..u32_at(whole, 44) as usize]);
    std::iter::from_fn(|| Redo::decode(&mut reader).expect("it was taken")).collect()
}

/// The checksum of the last write of this block through the journal.
fn written(disk: &MemoryDisk, loaded: &Loaded, home: u64) -> Option<u32> {
    let mut last = None;
    for redo in taken(disk, loaded).iter().flat_map(|whole| records(whole)) {
        if let Redo::Data { home: first, crcs } = redo
            && let Some(nth) = home.checked_sub(first)
            && let Some(crc) = crcs.get(nth as usize)
        {
            last = Some(*crc);
        }
    }
    last
}
