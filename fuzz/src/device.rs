//! Devices: a formatted one in memory, changed as the input says, is recovered.
//!
//! Oracles: recovery never panics; it refuses the device or takes only what its checksum fits, read again here by other
//! code from the bytes alone; a device that it took can be made current, and is the same when it is opened again.
//!
//! ```text
//! input: edits, each: kind 1, place 2, length 1 or 2, bytes
//! 0 raw            bytes at block `place` of what matters
//! 1 superblock     over its fields, its checksum made to fit      2 anchor      the same
//! 3 catalog        these bytes, named by the anchor               4 header      number `place`, checksum made to fit
//! 5 cell           number `place`, checksum made to fit
//! 6 transaction    with these records, behind the last            7 write       of one block, its checksum fits or not
//! ```

use crate::store::codec::crc32c;
use crate::store::disk::Disk;
use crate::store::format::format_disk;
use crate::store::geometry::{ANCHOR_AT, BLOCK, ENTRIES_PER_BLOCK, Geometry, MIN_DEVICE_BYTES, SUPER_AT};
use crate::store::journal::{Head, build, placed, transaction_bytes};
use crate::store::record::Redo;
use crate::store::recovery::{Loaded, load, make_current};
use crate::store::superblock::{Anchor, JournalPoint};
use crate::store::table::ENTRY_BYTES;
use crate::store::{FormatOptions, Identity};
use lamina_protocol::ids::{BootId, ClusterId, DeviceId, ServerId};
use memory_disk::MemoryDisk;
use std::sync::OnceLock;

mod accepted;
mod memory_disk;

/// Bytes of the journal: small, so that it wraps and is searched quickly.
const JOURNAL_BYTES: u64 = 1 << 20;
/// Edits of one input.
const MAX_EDITS: usize = 64;

/// Changes a formatted device as the bytes say, then recovers it.
pub fn device(bytes: &[u8]) {
    let mut image = Image::formatted();
    let mut rest = bytes;
    for _ in 0..MAX_EDITS {
        let Some((edit, left)) = Edit::read(rest) else { break };
        image.apply(&edit);
        rest = left;
    }
    recover(&image.disk);
}

struct Edit<'a> {
    kind: u8,
    place: u16,
    bytes: &'a [u8],
}

impl<'a> Edit<'a> {
    fn read(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (head, rest) = bytes.split_at_checked(5)?;
        let length = usize::from(u16::from_le_bytes([head[3], head[4]])).min(rest.len());
        let (bytes, rest) = rest.split_at(length);
        Some((Self { kind: head[0] % 8, place: u16::from_le_bytes([head[1], head[2]]), bytes }, rest))
    }
}

/// A device and the end of its journal.
#[derive(Clone)]
struct Image {
    disk: MemoryDisk,
    geo: Geometry,
    boot: BootId,
    end: JournalPoint,
}

impl Image {
    fn formatted() -> Self {
        static FORMATTED: OnceLock<Vec<(u64, Vec<u8>)>> = OnceLock::new();
        let blocks = FORMATTED.get_or_init(|| {
            let disk = MemoryDisk::new(MIN_DEVICE_BYTES);
            let options = FormatOptions {
                identity: Identity { cluster: ClusterId(1), server: ServerId(2) },
                device: DeviceId(3),
                overwrite: false,
                create_bytes: None,
                journal_bytes: Some(JOURNAL_BYTES),
            };
            format_disk(&disk, &options).expect("a blank device takes it");
            disk.blocks()
        });
        let disk = MemoryDisk::with(MIN_DEVICE_BYTES, blocks);
        let geo = Geometry::for_new(MIN_DEVICE_BYTES, Some(JOURNAL_BYTES)).expect("large enough");
        Self { disk, geo, boot: BootId::NONE, end: JournalPoint { position: 0, sequence: 1, chain: 0 } }
    }

    fn apply(&mut self, edit: &Edit<'_>) {
        let Edit { kind, place, bytes } = *edit;
        match kind {
            0 => self.raw(place, bytes),
            1 => self.reseal(SUPER_AT[usize::from(place) % 2], 12, BLOCK as usize, place / 2, bytes),
            2 => self.anchor(place, bytes),
            3 => self.catalog(bytes),
            4 => self.header(u32::from(place), bytes),
            5 => self.cell(u32::from(place), bytes),
            6 => self.transaction(bytes, &[]),
            _ => self.write(place, bytes),
        }
    }

    /// Bytes at one of the places that recovery reads.
    fn raw(&mut self, place: u16, bytes: &[u8]) {
        let nth = u64::from(place / 8) * BLOCK;
        let at = match place % 8 {
            0 => SUPER_AT[usize::from(place / 8) % 2],
            1 => ANCHOR_AT[usize::from(place / 8) % 2],
            2 => self.geo.catalog_at(0),
            3 => self.geo.table_block_at(u32::from(place / 8) % 256),
            4 => self.geo.cell_block_at(u32::from(place / 8) % 28),
            _ => self.geo.journal_at() + nth % JOURNAL_BYTES,
        };
        self.disk.change(at, 0, bytes);
    }

    /// Bytes over a record whose first four, or those at 8, are the checksum of those behind them.
    fn reseal(&mut self, at: u64, from: usize, end: usize, offset: u16, bytes: &[u8]) {
        let room = end - from;
        let offset = usize::from(offset) % room;
        let bytes = &bytes[..bytes.len().min(room - offset)];
        self.disk.change(at, from + offset, bytes);
        let block = self.disk.block(at);
        self.disk.change(at, from - 4, &crc32c(&block[from..end]).to_le_bytes());
    }

    /// Fields of the anchor that counts; where they say that the journal begins, the next transaction goes.
    fn anchor(&mut self, place: u16, bytes: &[u8]) {
        let at = ANCHOR_AT[usize::from(place) % 2];
        if Anchor::decode(&self.disk.block(at)).is_err() {
            let other = self.disk.block(ANCHOR_AT[1 - usize::from(place) % 2]);
            self.disk.change(at, 0, &other);
        }
        self.reseal(at, 12, 90, place / 2, bytes);
        let block = self.disk.block(at);
        self.disk.change(at, 8, &crc32c(&block[12..]).to_le_bytes());
        if let Ok(anchor) = Anchor::decode(&self.disk.block(at)) {
            (self.boot, self.end) = (anchor.boot, anchor.tail);
        }
    }

    fn catalog(&mut self, bytes: &[u8]) {
        for (nth, block) in bytes.chunks(BLOCK as usize).enumerate() {
            self.disk.change(self.geo.catalog_at(0) + nth as u64 * BLOCK, 0, block);
        }
        let mut named = (bytes.len() as u32).to_le_bytes().to_vec();
        named.extend_from_slice(&crc32c(bytes).to_le_bytes());
        // Length and checksum of the catalog stand together, at 64 of the anchor.
        self.anchor(2 * (64 - 12), &named);
        self.anchor(2 * (72 - 12), &[0]);
    }

    fn header(&mut self, number: u32, bytes: &[u8]) {
        let number = number % (2 * ENTRIES_PER_BLOCK);
        let mut header = [0; ENTRY_BYTES];
        let count = bytes.len().min(ENTRY_BYTES - 4);
        header[4..4 + count].copy_from_slice(&bytes[..count]);
        header[28..32].copy_from_slice(&number.to_le_bytes());
        let crc = crc32c(&header[4..]).to_le_bytes();
        header[..4].copy_from_slice(&crc);
        let at = self.geo.table_block_at(number / ENTRIES_PER_BLOCK);
        self.disk.change(at, (number % ENTRIES_PER_BLOCK) as usize * ENTRY_BYTES, &header);
        // Headers that were ever used, at 60 of the anchor.
        self.anchor(2 * (60 - 12), &(2 * ENTRIES_PER_BLOCK).to_le_bytes());
    }

    fn cell(&mut self, number: u32, bytes: &[u8]) {
        let (number, mut cell) = (number % 224, [0; 512]);
        let count = bytes.len().min(272);
        cell[16..16 + count].copy_from_slice(&bytes[..count]);
        cell[8..16].copy_from_slice(&u64::from(number).to_le_bytes());
        let crc = crc32c(&cell[4..]).to_le_bytes();
        cell[..4].copy_from_slice(&crc);
        self.disk.change(self.geo.cell_block_at(number / 8), (number % 8) as usize * 512, &cell);
    }

    fn transaction(&mut self, records: &[u8], data: &[u8]) {
        let blocks = data.len() / BLOCK as usize;
        let bytes = transaction_bytes(records.len(), blocks);
        let Some(room) = self.end.position.checked_add(2 * JOURNAL_BYTES) else { return };
        let position = placed(self.end.position, bytes, JOURNAL_BYTES);
        assert!(position < room);
        let head = Head { point: JournalPoint { position, ..self.end }, boot: self.boot, durable: 0 };
        let built = build(head, records, blocks, data.chunks(BLOCK as usize));
        let start = self.geo.journal_at() + position % JOURNAL_BYTES;
        for (nth, block) in built.buf.chunks(BLOCK as usize).enumerate() {
            self.disk.change(start + nth as u64 * BLOCK, 0, block);
        }
        let Some(sequence) = self.end.sequence.checked_add(1) else { return };
        self.end = JournalPoint { position: position + bytes, sequence, chain: built.chain };
    }

    /// A write of one block through the journal. With an odd first byte its checksum is another's.
    fn write(&mut self, place: u16, bytes: &[u8]) {
        let mut block = vec![0; BLOCK as usize];
        block[..bytes.len().min(BLOCK as usize)].copy_from_slice(&bytes[..bytes.len().min(BLOCK as usize)]);
        let wrong = u32::from(bytes.first().is_some_and(|byte| byte % 2 == 1));
        let mut records = Vec::new();
        Redo::Data { home: u64::from(place), crcs: vec![crc32c(&block) ^ wrong] }.encode(&mut records);
        self.transaction(&records, &block);
    }
}

fn recover(disk: &MemoryDisk) {
    let Ok(loaded) = load(disk, false) else { return };
    accepted::nothing_without_its_checksum(disk, &loaded);
    let disk = disk.clone();
    let mut serving = load(&disk, true).expect("it could be read");
    if make_current(&disk, &mut serving, BootId(9), false).is_err() {
        return;
    }
    let again = load(&disk, false).expect("what was made current opens again");
    assert!(again.overlay.is_empty(), "its journal is empty");
    same(&disk, serving, again);
}

/// The catalog, the headers and the blocks of both are the same.
fn same(disk: &MemoryDisk, mut before: Loaded, mut after: Loaded) {
    assert!(before.catalog == after.catalog, "another catalog");
    let headers = |loaded: &Loaded| {
        let entries = loaded.table.entries();
        entries.map(|(number, entry)| (number, *entry, loaded.table.runs(number).to_vec())).collect::<Vec<_>>()
    };
    assert!(headers(&before) == headers(&after), "other headers");
    assert_eq!(before.space.free_bytes(), after.space.free_bytes());
    for block in 0..u32::from(before.geo.slabs as u16) * 2 {
        if !before.cells.holds(block) {
            continue;
        }
        let read = disk.read_new(before.geo.cell_block_at(block), BLOCK as usize).ok();
        after.cells.loaded(block, read);
        for home in u64::from(block) * 512..u64::from(block + 1) * 512 {
            assert_eq!(before.cells.of(home), after.cells.of(home), "block {home}");
        }
    }
}
