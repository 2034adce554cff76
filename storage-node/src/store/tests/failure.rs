//! A disk that says no, a journal that rots, and ten million pages.

use super::cut_disk::{CutDisk, Image};
use crate::store::aligned::AlignedBuf;
use crate::store::core::{Core, Io, IoFailed, IoKind};
use crate::store::device::Identity;
use crate::store::disk::{Access, Disk, FileDisk};
use crate::store::format::{FormatOptions, format_disk};
use crate::store::geometry::{
    ANCHOR_AT, BLOCK, ENTRIES_PER_BLOCK, Geometry, MIN_DEVICE_BYTES, UNITS_PER_SLAB, ZONE_ENTRIES,
};
use crate::store::recovery::{load, make_current};
use crate::store::superblock::Anchor;
use crate::store::table::Entry;
use crate::store::{Damage, DeviceError};
use bytes::Bytes;
use lamina_protocol::ids::*;
use lamina_protocol::layer::{BlockState, PageKey};
use lamina_protocol::storage_server::medium::*;
use std::time::Instant;

const PAGE: PageKey = PageKey { copy: CopyId(1), layer: LayerId(2), page: 0 };

fn options() -> FormatOptions {
    FormatOptions {
        identity: Identity { cluster: ClusterId(1), server: ServerId(1) },
        device: DeviceId(1),
        overwrite: false,
        create_bytes: None,
        journal_bytes: Some(1 << 20),
    }
}

fn copy() -> CopyRecord {
    let layers = vec![LayerRecord { layer: PAGE.layer, page_bytes: 1 << 20, cursor: u64::MAX }];
    CopyRecord { copy: PAGE.copy, volume: VolumeId(3), placement: 0, group: 0, layers }
}

fn core_on(disk: &CutDisk, boot: u128) -> Core {
    let mut loaded = load(disk, true).unwrap();
    make_current(disk, &mut loaded, BootId(boot), false).unwrap();
    Core::new(loaded, false, 64).0
}

fn new_disk() -> CutDisk {
    let disk = CutDisk::new(Image::default(), MIN_DEVICE_BYTES);
    format_disk(&disk, &options()).unwrap();
    disk
}

fn do_io(core: &mut Core, disk: &CutDisk, io: Io) {
    let result = match io.kind {
        IoKind::Read { at, len } => disk.read_new(at, len).map(Some),
        IoKind::Write { at, data } => disk.write(at, data.bytes()).map(|()| None),
        IoKind::Sync => disk.sync().map(|()| None),
        IoKind::WriteSync { at, data } => disk.write(at, data.bytes()).and_then(|()| disk.sync()).map(|()| None),
    };
    core.done(io.id, result.map_err(|_| IoFailed));
}

/// Does the operations one after another; the n-th transfer that changes something fails.
fn run(core: &mut Core, disk: &CutDisk, work: Vec<MediumOp>, fail_at: Option<usize>) -> Vec<MediumEvent> {
    let (mut events, mut changes) = (Vec::new(), 0);
    for (op, what) in (1..).zip(work) {
        core.push(op, what);
        loop {
            core.run();
            events.extend(core.take_events());
            let ios = core.take_ios();
            if ios.is_empty() {
                break;
            }
            for io in ios {
                let before = changes;
                changes += match &io.kind {
                    IoKind::Read { .. } => 0,
                    IoKind::Write { .. } | IoKind::Sync => 1,
                    IoKind::WriteSync { .. } => 2,
                };
                match fail_at.filter(|nth| (before + 1..=changes).contains(nth)) {
                    None => do_io(core, disk, io),
                    Some(nth) => {
                        // Of a write with its sync the second to fail is the sync: the write has arrived.
                        if let IoKind::WriteSync { at, data } = &io.kind
                            && nth == changes
                        {
                            disk.write(*at, data.bytes()).unwrap();
                        }
                        core.done(io.id, Err(IoFailed));
                    }
                }
            }
        }
    }
    events
}

fn some_work() -> Vec<MediumOp> {
    let write = |first, byte| MediumOp::Write { page: PAGE, first, data: Bytes::from(vec![byte; 8192]) };
    let commit = MediumOp::Commit(vec![Record::PutCopy(copy())]);
    vec![commit, write(0, 7), MediumOp::Flush, write(9, 8), MediumOp::Flush]
}

#[test]
fn after_a_failed_write_or_sync_nothing_is_answered_and_nothing_tried_again() {
    let disk = new_disk();
    let mut core = core_on(&disk, 1);
    let all = run(&mut core, &disk, some_work(), None).len();
    assert_eq!(all, 5);
    let mut failures = 0;
    for nth in 1.. {
        let disk = new_disk();
        let mut core = core_on(&disk, 1);
        let events = run(&mut core, &disk, some_work(), Some(nth));
        if events.len() == all && events.last() != Some(&MediumEvent::Failed) {
            break;
        }
        failures += 1;
        assert_eq!(events.last(), Some(&MediumEvent::Failed));
        assert_eq!(events.iter().filter(|event| **event == MediumEvent::Failed).count(), 1);
        assert_eq!(run(&mut core, &disk, vec![MediumOp::Flush], None), vec![]);
    }
    assert!(failures >= 6, "{failures} places to fail");
}

#[test]
fn a_slot_is_not_used_again_before_its_freeing_is_durable() {
    let disk = new_disk();
    let mut loaded = load(&disk, true).unwrap();
    make_current(&disk, &mut loaded, BootId(1), true).unwrap();
    let mut core = Core::new(loaded, true, 64).0;
    let other = PageKey { page: 1, ..PAGE };
    let pending = |page| Record::Pending { page, set: true };
    let write = |page, byte| MediumOp::Write { page, first: 0, data: Bytes::from(vec![byte; 4096]) };
    let commit = MediumOp::Commit(vec![Record::PutCopy(copy()), pending(PAGE), pending(other)]);
    let hole = MediumOp::Shape { page: PAGE, changes: vec![(0..256, BlockState::Hole)] };
    run(&mut core, &disk, vec![commit, write(PAGE, 7), MediumOp::Flush, hole, write(other, 8)], None);
    // A crash now: the hole was not flushed, so the page is as it was or a hole, and never the other's content.
    let mut loaded = load(&disk, true).unwrap();
    make_current(&disk, &mut loaded, BootId(2), true).unwrap();
    let mut core = Core::new(loaded, true, 64).0;
    let events = run(&mut core, &disk, vec![MediumOp::Load(PAGE), MediumOp::Read { page: PAGE, blocks: 0..1 }], None);
    let MediumEvent::Answered { answer: MediumAnswer::Page(Some(record)), .. } = &events[0] else { panic!() };
    if record.blocks.of(0) == BlockState::Present {
        let MediumEvent::Answered { answer: MediumAnswer::Data { data, bad }, .. } = &events[1] else { panic!() };
        assert!(bad.is_empty() && data.iter().all(|byte| *byte == 7), "another page's content");
    } else {
        assert_eq!(record.blocks.of(0), BlockState::Hole);
    }
}

/// Opens the disk as one that keeps 4 KiB whole, after a crash of what was open before.
fn in_place(disk: &CutDisk, boot: u128, cache_blocks: usize) -> Core {
    let mut loaded = load(disk, true).unwrap();
    make_current(disk, &mut loaded, BootId(boot), true).unwrap();
    Core::new(loaded, true, cache_blocks).0
}

/// Whether a commit is answered before so many transfers.
fn is_answered(core: &mut Core, disk: &CutDisk, records: Vec<Record>) -> bool {
    core.push(77, MediumOp::Commit(records));
    for _ in 0..1000 {
        core.run();
        if core.take_events().iter().any(|event| matches!(event, MediumEvent::Answered { op: 77, .. })) {
            return true;
        }
        let ios = core.take_ios();
        let reading = ios.iter().map(|io| if let IoKind::Read { len, .. } = io.kind { len } else { 0 });
        assert!(reading.sum::<usize>() <= 17 << 20, "what is read is held in memory");
        ios.into_iter().for_each(|io| do_io(core, disk, io));
    }
    false
}

#[test]
fn a_page_that_was_stale_and_pending_at_a_crash_can_be_marked_and_cleared_after_it() {
    let layer = Record::MarkLayerUnsynced { copy: PAGE.copy, layer: PAGE.layer };
    for mark in [Record::MarkUnsynced(PAGE), layer] {
        let disk = new_disk();
        let mut core = in_place(&disk, 1, 64);
        let pending = |set| Record::Pending { page: PAGE, set };
        let write = |byte| MediumOp::Write { page: PAGE, first: 0, data: Bytes::from(vec![byte; 8192]) };
        let begin = MediumOp::Commit(vec![Record::PutCopy(copy()), pending(true)]);
        let marked = MediumOp::Commit(vec![mark, pending(false)]);
        // The second write was marked, and not flushed.
        let again = MediumOp::Commit(vec![pending(true)]);
        run(&mut core, &disk, vec![begin, write(7), MediumOp::Flush, marked, again, write(8)], None);
        let mut core = in_place(&disk, 2, 64);
        assert!(is_answered(&mut core, &disk, vec![Record::MarkUnsynced(PAGE), pending(false)]));
        // What was kept is worth something: a person may force it (I8).
        let trust = Record::TrustLayer { copy: PAGE.copy, layer: PAGE.layer };
        let read = MediumOp::Read { page: PAGE, blocks: 0..2 };
        let events = run(&mut core, &disk, vec![MediumOp::Commit(vec![trust]), read], None);
        let MediumEvent::Answered { answer: MediumAnswer::Data { bad, .. }, .. } = &events[1] else { panic!() };
        assert!(bad.is_empty(), "{bad:?}");
    }
}

#[test]
fn pages_that_were_pending_at_a_crash_are_cleared_whatever_the_cache_holds() {
    let disk = new_disk();
    let mut core = in_place(&disk, 1, 64);
    let pages = || (0..24).map(|page| PageKey { page, ..PAGE });
    let pending = |set| pages().map(move |page| Record::Pending { page, set });
    let begin = MediumOp::Commit([Record::PutCopy(copy())].into_iter().chain(pending(true)).collect());
    let writes = pages().map(|page| MediumOp::Write { page, first: 0, data: Bytes::from(vec![7; 1 << 20]) });
    let work = [begin].into_iter().chain(writes).chain([MediumOp::Flush]).collect();
    run(&mut core, &disk, work, None);
    let mut core = in_place(&disk, 2, 2);
    assert!(is_answered(&mut core, &disk, pending(false).collect()));
}

#[test]
fn a_journal_that_rotted_in_the_middle_is_refused_not_cut_short() {
    let disk = new_disk();
    let mut core = core_on(&disk, 1);
    let numbers = (0..4).map(|number| MediumOp::Commit(vec![Record::LeaseNumber(number)]));
    run(&mut core, &disk, numbers.collect(), None);
    assert_eq!(load(&disk, false).unwrap().catalog.lease_number, 3);
    let start = load(&disk, false).unwrap();
    let second = start.geo.journal_at() + start.anchor.tail.position % start.geo.journal_bytes + BLOCK;
    let mut block = disk.read_new(second, BLOCK as usize).unwrap();
    block[70] ^= 1;
    disk.write(second, &block).unwrap();
    assert!(matches!(load(&disk, false), Err(DeviceError::Damaged(Damage::Journal(_)))));
}

#[test]
fn a_damaged_page_table_is_refused_never_read_as_absent() {
    let disk = new_disk();
    let mut core = core_on(&disk, 1);
    run(&mut core, &disk, some_work(), None);
    drop(core_on(&disk, 2));
    let at = load(&disk, false).unwrap().geo.table_block_at(0);
    let mut block = disk.read_new(at, BLOCK as usize).unwrap();
    block[20] ^= 1;
    disk.write(at, &block).unwrap();
    assert!(matches!(load(&disk, false), Err(DeviceError::Damaged(Damage::Header(0)))));
}

/// Writes the page table of a device with so many allocated pages of 1 MiB into a sparse file.
fn synthetic(disk: &FileDisk, pages: u32) -> Geometry {
    let mut loaded = load(disk, true).unwrap();
    loaded.catalog.put_copy(&copy());
    make_current(disk, &mut loaded, BootId(1), false).unwrap();
    let (geo, stack) = (loaded.geo, loaded.catalog.stack_of(PAGE.copy, PAGE.layer).unwrap());
    let units = UNITS_PER_SLAB / 4;
    for first in (0..pages).step_by(ZONE_ENTRIES as usize) {
        let count = (pages - first).min(ZONE_ENTRIES);
        let mut buf = AlignedBuf::zeroed((count as usize * 64).next_multiple_of(BLOCK as usize));
        for nth in 0..count {
            let number = first + nth;
            let entry = Entry::new(stack, u64::from(number), 0).with_slot(Some(number * units));
            buf[nth as usize * 64..][..64].copy_from_slice(&entry.encode(number, &[]));
        }
        disk.write(geo.table_block_at(first / ENTRIES_PER_BLOCK), &buf).unwrap();
    }
    let anchor = Anchor { number: loaded.anchor.number + 1, entries_high: pages, ..loaded.anchor };
    let block = AlignedBuf::copy_of(&anchor.encode(), BLOCK as usize);
    disk.write(ANCHOR_AT[anchor.place()], &block).unwrap();
    geo
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    status.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

/// `LAMINA_PAGES=10000000 cargo test --release` is the figure of the issue: ready within 5 s, 64 bytes a page.
#[test]
fn a_device_with_many_pages_is_ready_soon_and_small_in_memory() {
    let asked = std::env::var("LAMINA_PAGES");
    let measured = asked.is_ok();
    let pages: u32 = asked.map_or(100_000, |text| text.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    std::fs::File::create(&path).unwrap().set_len(u64::from(pages) * (1 << 20) * 101 / 100 + (1 << 30)).unwrap();
    let disk = FileDisk::open(&path, Access::Exclusive).unwrap();
    format_disk(&disk, &FormatOptions { journal_bytes: None, ..options() }).unwrap();
    synthetic(&disk, pages);
    let (before, begun) = (resident_bytes(), Instant::now());
    let mut loaded = load(&disk, true).unwrap();
    make_current(&disk, &mut loaded, BootId(2), false).unwrap();
    let (_core, opened) = Core::new(loaded, false, 64);
    let (took, grown) = (begun.elapsed(), resident_bytes().saturating_sub(before));
    println!("{pages} pages: ready in {took:?}, {} bytes of memory a page", grown / u64::from(pages));
    assert_eq!(opened.capacity_bytes - opened.free_bytes, u64::from(pages).next_multiple_of(4) << 20);
    assert!(!measured || took.as_secs() < 5, "ready in {took:?}");
    assert!(grown < (64 << 20) + 64 * u64::from(pages), "{grown} bytes");
}
