//! Opening: superblock, anchor, catalog, page table, then the journal from its tail on.
//!
//! Invariant: reading changes nothing on the device ([`load`]; `inspect` stops there). To serve, [`make_current`] makes
//! durable what was read, brings everything home, and begins an empty journal under the new boot id; a cut anywhere in
//! it leads to the same state again, as all records have absolute values (R11).

use crate::store::aligned::AlignedBuf;
use crate::store::catalog::Catalog;
use crate::store::cells::Cells;
use crate::store::codec::{Garbled, crc32c};
use crate::store::disk::Disk;
use crate::store::geometry::{ANCHOR_AT, BLOCK, ENTRIES_PER_BLOCK, Geometry, SLAB_BLOCKS, ZONE_ENTRIES, cell_block_of};
use crate::store::journal::{FoundHead, placed};
use crate::store::probe;
use crate::store::record::Redo;
use crate::store::space::{SizeClass, Space};
use crate::store::superblock::{Anchor, JournalPoint, Superblock};
use crate::store::table::{ENTRY_BYTES, Entry, Table};
use crate::store::{Damage, DeviceError};
use lamina_protocol::ids::BootId;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Changed blocks of cells that recovery keeps before it writes them home.
const SPILL_CELLS: usize = 4096;

/// A device as it was left.
pub(crate) struct Loaded {
    pub(crate) superblock: Superblock,
    pub(crate) geo: Geometry,
    pub(crate) anchor: Anchor,
    pub(crate) catalog: Catalog,
    pub(crate) table: Table,
    pub(crate) space: Space,
    pub(crate) cells: Cells,
    /// Blocks whose data is still in the journal, with their byte in it.
    pub(crate) overlay: BTreeMap<u64, u64>,
    /// Where the journal ends.
    pub(crate) head: JournalPoint,
}

fn read(disk: &impl Disk, at: u64, len: usize) -> Result<AlignedBuf, DeviceError> {
    disk.read_new(at, len).map_err(|e| DeviceError::io("read the device", e))
}

/// Reads everything that an opening needs and replays the journal in memory. With `spill` cells go home early.
pub(crate) fn load(disk: &impl Disk, spill: bool) -> Result<Loaded, DeviceError> {
    let superblock = probe::superblock(disk)?.ok_or(DeviceError::NotFormatted)?;
    if !superblock.is_known() {
        let Superblock { version, incompat, .. } = superblock;
        return Err(DeviceError::OtherVersion { version, incompat });
    }
    let bytes = disk.bytes().map_err(|e| DeviceError::io("measure the device", e))?;
    let Superblock { catalog_bytes, journal_bytes, .. } = superblock;
    let geo = Geometry { catalog_bytes, journal_bytes, slabs: 0 }.sized(bytes)?;
    let anchor = newest_anchor(disk, &superblock)?;
    if geo.slabs < anchor.slabs {
        return Err(DeviceError::Shrunk { bytes, needed: Geometry { slabs: anchor.slabs, ..geo }.end() });
    }
    let catalog = read_catalog(disk, &geo, &anchor)?;
    let table = read_table(disk, &geo, anchor.entries_high)?;
    let cells = Cells::new(if spill { 2 * SPILL_CELLS } else { usize::MAX });
    let space = Space::new(geo.slabs);
    let overlay = BTreeMap::new();
    let mut loaded = Loaded { superblock, geo, head: anchor.tail, anchor, catalog, table, space, cells, overlay };
    if spill {
        // What the journal's end shows may be in a volatile cache still: nothing goes home before it is durable.
        disk.sync().map_err(|e| DeviceError::io("sync the device", e))?;
    }
    let dropped = replay(disk, &mut loaded, spill)?;
    take_stock(&mut loaded, &dropped)?;
    Ok(loaded)
}

fn newest_anchor(disk: &impl Disk, superblock: &Superblock) -> Result<Anchor, DeviceError> {
    let mut best: Option<Anchor> = None;
    for at in ANCHOR_AT {
        let block = read(disk, at, BLOCK as usize)?;
        let found = Anchor::decode(&block).ok().filter(|anchor| anchor.device == superblock.device);
        best = best.into_iter().chain(found).max_by_key(|anchor| anchor.number);
    }
    best.ok_or(DeviceError::Damaged(Damage::Anchor))
}

fn read_catalog(disk: &impl Disk, geo: &Geometry, anchor: &Anchor) -> Result<Catalog, DeviceError> {
    let len = anchor.catalog_len as usize;
    if len as u64 > geo.catalog_bytes {
        return Err(DeviceError::Damaged(Damage::Catalog));
    }
    let block = read(disk, geo.catalog_at(anchor.catalog_half), len.next_multiple_of(BLOCK as usize))?;
    let bytes = &block[..len];
    if crc32c(bytes) != anchor.catalog_crc {
        return Err(DeviceError::Damaged(Damage::Catalog));
    }
    Catalog::decode(bytes).map_err(|Garbled| DeviceError::Damaged(Damage::Catalog))
}

fn read_table(disk: &impl Disk, geo: &Geometry, high: u32) -> Result<Table, DeviceError> {
    let mut table = Table::default();
    if high > geo.entries() {
        return Err(DeviceError::Damaged(Damage::Anchor));
    }
    for first in (0..high).step_by(ZONE_ENTRIES as usize) {
        let count = (high - first).min(ZONE_ENTRIES);
        let len = (count as usize * ENTRY_BYTES).next_multiple_of(BLOCK as usize);
        let buf = read(disk, geo.table_block_at(first / ENTRIES_PER_BLOCK), len)?;
        for (at, bytes) in buf.chunks(ENTRY_BYTES).take(count as usize).enumerate() {
            let number = first + at as u32;
            let decoded = Entry::decode(number, bytes);
            let (entry, runs) = decoded.map_err(|Garbled| DeviceError::Damaged(Damage::Header(number)))?;
            table.place(number, entry, &runs);
        }
    }
    Ok(table)
}

/// The transaction at this point, if it is whole and follows on.
fn transaction_at(
    disk: &impl Disk,
    loaded: &Loaded,
    position: u64,
) -> Result<Option<(FoundHead, Vec<Redo>, usize)>, DeviceError> {
    let (ring, start) = (loaded.geo.journal_bytes, loaded.geo.journal_at());
    let block = read(disk, start + position % ring, BLOCK as usize)?;
    let expected = |head: &FoundHead| {
        head.position == position
            && head.sequence == loaded.head.sequence
            && head.before == loaded.head.chain
            && head.boot == loaded.anchor.boot
            && placed(position, head.bytes(), ring) == position
    };
    let Some(head) = FoundHead::decode(&block, ring).ok().filter(expected) else { return Ok(None) };
    let whole = read(disk, start + position % ring, head.bytes() as usize)?;
    Ok(head.records(&whole).ok().map(|(records, data_at)| (head, records, data_at)))
}

/// Replays the journal; returns the stacks that went.
fn replay(disk: &impl Disk, loaded: &mut Loaded, spill: bool) -> Result<BTreeSet<u32>, DeviceError> {
    let ring = loaded.geo.journal_bytes;
    let mut dropped = BTreeSet::new();
    loop {
        let here = loaded.head.position;
        let mut found = transaction_at(disk, loaded, here)?;
        if found.is_none() && !here.is_multiple_of(ring) {
            found = transaction_at(disk, loaded, here + ring - here % ring)?;
        }
        let Some((head, records, data_at)) = found else { break };
        let mut data = loaded.geo.journal_at() + head.position % ring + data_at as u64;
        for redo in records {
            let blocks = redo.data_blocks() as u64;
            apply(disk, loaded, redo, data, &mut dropped)
                .map_err(|e| e.unwrap_or(DeviceError::Damaged(Damage::Journal(head.sequence))))?;
            data += blocks * BLOCK;
        }
        loaded.head =
            JournalPoint { position: head.position + head.bytes(), sequence: head.sequence + 1, chain: head.crc };
        if spill && loaded.cells.stuck() > SPILL_CELLS {
            write_cells(disk, loaded).map_err(|e| DeviceError::io("write the device", e))?;
        }
    }
    refuse_rotten_journal(disk, loaded)?;
    Ok(dropped)
}

/// Applies one record. `Err(None)` = it names what the device does not have.
fn apply(
    disk: &impl Disk,
    loaded: &mut Loaded,
    redo: Redo,
    data: u64,
    dropped: &mut BTreeSet<u32>,
) -> Result<(), Option<DeviceError>> {
    let Loaded { geo, cells, table, catalog, overlay, head, .. } = loaded;
    let (lsn, blocks) = (head.sequence, u64::from(geo.slabs) * SLAB_BLOCKS);
    let hold = |cells: &mut Cells, home: u64, count: u64| {
        if home.checked_add(count).is_none_or(|end| end > blocks) || count == 0 {
            return Err(None);
        }
        for block in cell_block_of(home)..=cell_block_of(home + count - 1) {
            if !cells.holds(block) {
                cells.loaded(block, disk.read_new(geo.cell_block_at(block), BLOCK as usize).ok());
            }
        }
        Ok(())
    };
    match redo {
        Redo::Header { number, entry, runs } => {
            if number >= geo.entries() {
                return Err(None);
            }
            // Headers between the last ever used and this one hold anything on the device: they go home, free.
            let skipped = (table.high()..number).step_by(ENTRIES_PER_BLOCK as usize);
            table.place(number, entry, &runs);
            skipped.chain([number]).for_each(|number| table.touch(number, lsn));
        }
        Redo::Slab(slab) => {
            if slab >= geo.slabs {
                return Err(None);
            }
            cells.fresh(2 * slab, lsn);
            cells.fresh(2 * slab + 1, lsn);
        }
        Redo::Shape { home, blocks, state } => {
            hold(cells, home, u64::from(blocks))?;
            (home..home + u64::from(blocks)).for_each(|at| cells.set_state(at, state, lsn));
        }
        Redo::Present { home, crcs } => {
            hold(cells, home, crcs.len() as u64)?;
            (home..).zip(&crcs).for_each(|(at, crc)| cells.set(at, present(), *crc, lsn));
        }
        Redo::Data { home, crcs } => {
            hold(cells, home, crcs.len() as u64)?;
            for (nth, crc) in crcs.iter().enumerate() {
                cells.set(home + nth as u64, present(), *crc, lsn);
                overlay.insert(home + nth as u64, data + nth as u64 * BLOCK);
            }
        }
        Redo::Catalog(change) => dropped.extend(change.apply(catalog)),
    }
    Ok(())
}

fn present() -> lamina_protocol::layer::BlockState {
    lamina_protocol::layer::BlockState::Present
}

/// A transaction further on that knew the missing one to be durable: the journal did not end here, it rotted.
fn refuse_rotten_journal(disk: &impl Disk, loaded: &Loaded) -> Result<(), DeviceError> {
    let (ring, missing) = (loaded.geo.journal_bytes, loaded.head.sequence);
    let chunk = 1 << 20;
    for from in (0..ring).step_by(chunk) {
        let buf = read(disk, loaded.geo.journal_at() + from, chunk.min((ring - from) as usize))?;
        for (nth, block) in buf.chunks(BLOCK as usize).enumerate() {
            let Ok(head) = FoundHead::decode(block, ring) else { continue };
            let here = head.position % ring == from + nth as u64 * BLOCK && head.boot == loaded.anchor.boot;
            let whole = head.meta_len <= BLOCK as usize && crc32c(&block[8..head.meta_len]) == head.crc;
            if here && whole && head.sequence > missing && head.durable >= missing {
                return Err(DeviceError::Damaged(Damage::Journal(missing)));
            }
        }
    }
    Ok(())
}

/// Lets go of the pages of copies that went, builds the index, and finds what is free.
fn take_stock(loaded: &mut Loaded, dropped: &BTreeSet<u32>) -> Result<(), DeviceError> {
    let Loaded { table, catalog, space, head, .. } = loaded;
    let gone: Vec<u32> =
        table.entries().filter(|(_, entry)| dropped.contains(&entry.stack)).map(|(number, _)| number).collect();
    for number in gone {
        table.place(number, Entry::FREE, &[]);
        table.touch(number, head.sequence);
    }
    for (number, entry) in table.entries() {
        let stack = catalog.stack(entry.stack).ok_or(DeviceError::Damaged(Damage::Header(number)))?;
        if let Some(slot) = entry.slot()
            && !space.claim(slot, SizeClass::of(stack.page_bytes))
        {
            return Err(DeviceError::Damaged(Damage::OwnedTwice(number)));
        }
    }
    table.index_all().map_err(|Garbled| DeviceError::Damaged(Damage::OwnedTwice(0)))
}

fn write_cells(disk: &impl Disk, loaded: &mut Loaded) -> io::Result<()> {
    for block in loaded.cells.dirty_blocks() {
        if let Some(buf) = loaded.cells.take_block(block, u64::MAX) {
            disk.write(loaded.geo.cell_block_at(block), &buf)?;
            loaded.cells.unpin(block);
        }
    }
    Ok(())
}

fn write_data_home(disk: &impl Disk, loaded: &Loaded) -> io::Result<()> {
    let mut rest = loaded.overlay.iter().map(|(home, at)| (*home, *at)).peekable();
    while let Some((home, at)) = rest.next() {
        let mut blocks = 1;
        let follows = |next: &(u64, u64), blocks: u64| *next == (home + blocks, at + blocks * BLOCK);
        while blocks < 256 && !(home + blocks).is_multiple_of(SLAB_BLOCKS) {
            if rest.next_if(|next| follows(next, blocks)).is_none() {
                break;
            }
            blocks += 1;
        }
        let data = disk.read_new(at, (blocks * BLOCK) as usize)?;
        disk.write(loaded.geo.home_at(home), &data)?;
    }
    Ok(())
}

/// Brings all that was replayed home and begins an empty journal for this boot.
pub(crate) fn make_current(
    disk: &impl Disk,
    loaded: &mut Loaded,
    boot: BootId,
    in_place: bool,
) -> Result<(), DeviceError> {
    let io = |e| DeviceError::io("bring the journal home", e);
    write_data_home(disk, loaded).map_err(io)?;
    write_cells(disk, loaded).map_err(io)?;
    for block in loaded.table.dirty_blocks() {
        if let Some(bytes) = loaded.table.take_block(block, u64::MAX) {
            let buf = AlignedBuf::copy_of(&bytes, BLOCK as usize);
            disk.write(loaded.geo.table_block_at(block), &buf).map_err(io)?;
        }
    }
    let catalog = loaded.catalog.encode();
    if catalog.len() as u64 > loaded.geo.catalog_bytes {
        return Err(DeviceError::Damaged(Damage::Catalog));
    }
    let half = 1 - loaded.anchor.catalog_half;
    let padded = AlignedBuf::copy_of(&catalog, catalog.len().next_multiple_of(BLOCK as usize));
    disk.write(loaded.geo.catalog_at(half), &padded).map_err(io)?;
    disk.sync().map_err(io)?;
    loaded.anchor = Anchor {
        slabs: loaded.geo.slabs,
        number: loaded.anchor.number + 1,
        device: loaded.superblock.device,
        tail: loaded.head,
        entries_high: loaded.table.high(),
        catalog_len: catalog.len() as u32,
        catalog_crc: crc32c(&catalog),
        catalog_half: half,
        ever_in_place: loaded.anchor.ever_in_place || in_place,
        boot,
    };
    let block = AlignedBuf::copy_of(&loaded.anchor.encode(), BLOCK as usize);
    disk.write(ANCHOR_AT[loaded.anchor.place()], &block).map_err(io)?;
    disk.sync().map_err(io)?;
    loaded.overlay.clear();
    Ok(())
}
