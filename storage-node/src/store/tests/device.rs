//! Real devices in files, through the handle and its io_uring.

use crate::store::*;
use bytes::Bytes;
use lamina_protocol::ids::*;
use lamina_protocol::layer::{BlockState, PageKey};
use lamina_protocol::storage_server::medium::*;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const ME: Identity = Identity { cluster: ClusterId(1), server: ServerId(2) };
const COPY: CopyId = CopyId(10);
const LAYER: LayerId = LayerId(20);
const PAGE_BYTES: u32 = 1 << 20;

fn page(number: u64) -> PageKey {
    PageKey { copy: COPY, layer: LAYER, page: number }
}

fn format_options() -> FormatOptions {
    FormatOptions {
        identity: ME,
        device: DeviceId(3),
        overwrite: false,
        create_bytes: Some(MIN_DEVICE_BYTES),
        journal_bytes: None,
    }
}

fn open_options(atomic4k: bool, boot: u128) -> OpenOptions {
    OpenOptions { identity: ME, boot: BootId(boot), atomic4k: Some(atomic4k) }
}

fn new_file() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device");
    format(&path, &format_options()).unwrap();
    (dir, path)
}

/// An open device whose operations are done one by one.
struct Opening {
    device: Device,
    opened: Opened,
    events: Receiver<MediumEvent>,
    next: u64,
}

impl Opening {
    fn of(path: &Path, atomic4k: bool, boot: u128) -> Self {
        let (sender, events) = channel();
        let sink = Box::new(move |event| drop(sender.send(event)));
        let (recovered, opened) = open(path, &open_options(atomic4k, boot)).unwrap();
        let device = recovered.start(sink).unwrap();
        Self { device, opened, events, next: 0 }
    }

    fn answer(&mut self) -> (OpId, MediumAnswer) {
        let begun = Instant::now();
        let event = loop {
            match self.events.try_recv() {
                Ok(event) => break event,
                Err(_) => self.device.turn(true),
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "an answer");
        };
        match event {
            MediumEvent::Answered { op, answer, .. } => (op, answer),
            MediumEvent::Grown { .. } => self.answer(),
            MediumEvent::Failed => panic!("the device failed"),
        }
    }

    fn act(&mut self, what: MediumOp) -> MediumAnswer {
        self.next += 1;
        assert!(self.device.submit_all(vec![(self.next, what)]).is_empty());
        let (op, answer) = self.answer();
        assert_eq!(op, self.next);
        answer
    }

    fn with_copy(mut self) -> Self {
        let layers = vec![LayerRecord { layer: LAYER, page_bytes: PAGE_BYTES, cursor: u64::MAX }];
        let copy = CopyRecord { copy: COPY, volume: VolumeId(5), placement: 1, group: 0, layers };
        assert_eq!(self.act(MediumOp::Commit(vec![Record::PutCopy(copy)])), MediumAnswer::Done);
        self
    }

    fn write(&mut self, number: u64, first: u32, byte: u8, blocks: usize) {
        let data = Bytes::from(vec![byte; blocks * 4096]);
        let pending = Record::Pending { page: page(number), set: true };
        assert_eq!(self.act(MediumOp::Commit(vec![pending])), MediumAnswer::Done);
        let answer = self.act(MediumOp::Write { page: page(number), first, data });
        assert_eq!(answer, MediumAnswer::Done);
    }

    fn flush(&mut self) {
        assert_eq!(self.act(MediumOp::Flush), MediumAnswer::Done);
    }

    fn read(&mut self, number: u64, blocks: std::ops::Range<u32>) -> (Vec<u8>, Vec<u32>) {
        match self.act(MediumOp::Read { page: page(number), blocks }) {
            MediumAnswer::Data { data, bad } => (data.to_vec(), bad),
            other => panic!("{other:?}"),
        }
    }

    fn load(&mut self, number: u64) -> Option<PageRecord> {
        match self.act(MediumOp::Load(page(number))) {
            MediumAnswer::Page(record) => record,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_was_flushed_is_read_back_after_an_opening() {
    for atomic4k in [false, true] {
        let (_dir, path) = new_file();
        let mut first = Opening::of(&path, atomic4k, 1).with_copy();
        assert_eq!(first.opened.copies, vec![]);
        first.write(7, 3, 0xab, 5);
        first.write(9, 0, 0xcd, 256);
        assert_eq!(first.read(7, 3..8), (vec![0xab; 5 * 4096], vec![]));
        let shape = MediumOp::Shape { page: page(7), changes: vec![(4..5, BlockState::Hole)] };
        assert_eq!(first.act(shape), MediumAnswer::Done);
        first.flush();
        let free = first.device.stats().free_bytes;
        drop(first);
        let mut again = Opening::of(&path, atomic4k, 2);
        assert_eq!(again.opened.boot, BootId(2));
        assert_eq!(again.opened.copies.len(), 1);
        assert_eq!(again.opened.pending, vec![page(7), page(9)]);
        assert_eq!(again.opened.free_bytes, free);
        let record = again.load(7).unwrap();
        assert!(record.pending && record.allocated);
        assert_eq!((record.blocks.of(4), record.blocks.of(5)), (BlockState::Hole, BlockState::Present));
        assert_eq!(again.read(7, 5..8), (vec![0xab; 3 * 4096], vec![]));
        assert_eq!(again.read(9, 0..256), (vec![0xcd; 256 * 4096], vec![]));
        assert_eq!(
            again.act(MediumOp::NextPage { copy: COPY, layer: LAYER, from: 8 }),
            MediumAnswer::NextPage(Some(9))
        );
    }
}

#[test]
fn blank_device_answers_no_copy_never_zeroes() {
    let (_dir, path) = new_file();
    let blank = Opening::of(&path, false, 1);
    assert_eq!(blank.opened.copies, vec![], "a copy that is not listed is NoCopy");
    drop(blank);
    let zeroes = path.with_file_name("zeroes");
    std::fs::File::create(&zeroes).unwrap().set_len(MIN_DEVICE_BYTES).unwrap();
    let refused = open(&zeroes, &open_options(false, 2));
    assert!(matches!(refused, Err(DeviceError::NotFormatted)));
}

#[test]
fn a_device_that_is_not_ours_is_refused_by_name() {
    let (_dir, path) = new_file();
    let other = |cluster, server| {
        let identity = Identity { cluster: ClusterId(cluster), server: ServerId(server) };
        open(&path, &OpenOptions { identity, ..open_options(false, 1) }).err().unwrap()
    };
    assert!(matches!(other(9, 2), DeviceError::WrongCluster { found: ClusterId(1) }));
    assert!(matches!(other(1, 9), DeviceError::WrongServer { found: ServerId(2) }));
    assert!(matches!(format(&path, &format_options()), Err(DeviceError::InUse { .. })));
    let holder = Opening::of(&path, false, 1);
    assert!(matches!(probe(&path), Err(DeviceError::Busy)));
    assert!(matches!(inspect(&path).err(), Some(DeviceError::Busy)));
    drop(holder);
    let over = FormatOptions { overwrite: true, device: DeviceId(4), ..format_options() };
    format(&path, &over).unwrap();
    assert!(matches!(probe(&path), Ok(Found::Ours { device: DeviceId(4), .. })));
}

#[test]
fn foreign_and_small_devices_are_never_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("foreign");
    let mut content = vec![0; MIN_DEVICE_BYTES as usize];
    content[0x438..0x43a].copy_from_slice(b"\x53\xef");
    std::fs::write(&path, &content).unwrap();
    match format(&path, &format_options()) {
        Err(DeviceError::Foreign(found)) => assert_eq!(found.what, "an ext2, ext3 or ext4 filesystem"),
        other => panic!("{other:?}"),
    }
    assert!(std::fs::read(&path).unwrap() == content, "not one byte was written");
    let small = dir.path().join("small");
    let options = FormatOptions { create_bytes: Some(MIN_DEVICE_BYTES - 1), ..format_options() };
    assert!(matches!(format(&small, &options), Err(DeviceError::TooSmall { .. })));
    assert!(!small.exists());
}

#[test]
fn a_full_device_says_no_space_and_takes_writes_again_after_a_drop() {
    let (_dir, path) = new_file();
    let mut opening = Opening::of(&path, true, 1).with_copy();
    let pages = opening.opened.capacity_bytes / u64::from(PAGE_BYTES);
    for number in 0..pages {
        opening.write(number, 0, 1, 1);
    }
    assert_eq!(opening.device.stats().free_bytes, 0);
    let data = Bytes::from(vec![2; 4096]);
    let beyond = MediumOp::Write { page: page(pages), first: 0, data };
    assert_eq!(opening.act(beyond.clone()), MediumAnswer::NoSpace);
    assert_eq!(opening.act(MediumOp::Allocate(vec![page(0), page(pages)])), MediumAnswer::NoSpace);
    assert_eq!(opening.act(MediumOp::Commit(vec![Record::DropPage(page(3))])), MediumAnswer::Done);
    assert_eq!(opening.load(3), None);
    assert_eq!(opening.act(beyond), MediumAnswer::Done);
    assert_eq!(opening.read(pages, 0..1), (vec![2; 4096], vec![]));
    assert_eq!(opening.load(pages).unwrap().blocks.of(1), BlockState::Absent, "nothing of the former page shows");
}

#[test]
fn a_full_page_table_takes_marks_of_pages_that_it_has_and_no_others() {
    let (_dir, path) = new_file();
    let mut opening = Opening::of(&path, true, 1).with_copy();
    let headers = 16_384;
    for first in (0..headers).step_by(MAX_COMMIT_RECORDS) {
        let missed = |number: u64| Record::Missed { page: page(number), mask: 1 };
        let records = (first..first + MAX_COMMIT_RECORDS as u64).map(missed).collect();
        assert_eq!(opening.act(MediumOp::Commit(records)), MediumAnswer::Done);
    }
    let pending = |number| MediumOp::Commit(vec![Record::Pending { page: page(number), set: true }]);
    assert_eq!(opening.act(pending(headers)), MediumAnswer::NoSpace);
    assert_eq!(opening.act(pending(7)), MediumAnswer::Done);
    opening.write(7, 0, 1, 1);
    drop(opening);
    assert_eq!(Opening::of(&path, true, 2).opened.pending, vec![page(7)]);
}

#[test]
fn slots_that_are_given_back_are_free_again_and_written_pages_keep_theirs() {
    let (_dir, path) = new_file();
    let mut opening = Opening::of(&path, true, 1).with_copy();
    let pages = opening.opened.capacity_bytes / u64::from(PAGE_BYTES);
    let slab = u64::from(PAGE_BYTES) * 4;
    (0..pages - 4).for_each(|number| opening.write(number, 0, 1, 1));
    assert_eq!(opening.device.stats().free_bytes, slab);
    let last: Vec<_> = (pages - 4..pages).map(page).collect();
    assert_eq!(opening.act(MediumOp::Allocate(last.clone())), MediumAnswer::Done);
    assert_eq!(opening.device.stats().free_bytes, 0);
    opening.write(pages - 4, 0, 7, 1);
    let all = (0..pages + 1).map(page).collect();
    assert_eq!(opening.act(MediumOp::Release(all)), MediumAnswer::Done);
    assert_eq!(opening.device.stats().free_bytes, 0, "a page of that slab was written");
    assert_eq!((opening.load(0).unwrap().allocated, opening.load(pages - 1)), (true, None));
    assert_eq!(opening.read(pages - 4, 0..1), (vec![7; 4096], vec![]));
    // The three that are free are taken again, and no more.
    assert_eq!(opening.act(MediumOp::Allocate(last)), MediumAnswer::Done);
    assert_eq!(opening.act(MediumOp::Allocate(vec![page(pages)])), MediumAnswer::NoSpace);
    opening.act(MediumOp::Release((pages - 4..pages).map(page).collect()));
    assert_eq!(opening.act(MediumOp::Commit(vec![Record::DropPage(page(pages - 4))])), MediumAnswer::Done);
    opening.flush();
    assert_eq!(opening.device.stats().free_bytes, slab, "and the whole of it when nothing is written there");
}

#[test]
fn a_rotted_block_is_answered_as_bad_and_the_others_are_served() {
    let (_dir, path) = new_file();
    let mut opening = Opening::of(&path, true, 1).with_copy();
    opening.write(0, 0, 0x5a, 4);
    opening.flush();
    let clear = Record::Pending { page: page(0), set: false };
    opening.act(MediumOp::Commit(vec![clear]));
    drop(opening);
    let mut content = std::fs::read(&path).unwrap();
    let found = content.windows(4 * 4096).step_by(1).position(|w| w[0] == 0x5a && w.iter().all(|b| *b == 0x5a));
    content[found.unwrap() + 4096] ^= 1;
    std::fs::write(&path, content).unwrap();
    let mut again = Opening::of(&path, true, 2);
    let (data, bad) = again.read(0, 0..4);
    assert_eq!(bad, vec![1]);
    assert_eq!((data[0], data[4096], data[8192]), (0x5a, 0, 0x5a));
    again.act(MediumOp::Commit(vec![Record::Stale { page: page(0), blocks: vec![1] }]));
    assert_eq!(again.load(0).unwrap().blocks.of(1), BlockState::Stale);
}

#[test]
fn a_marked_layer_is_stale_however_large_and_writes_after_it_are_not() {
    for atomic4k in [false, true] {
        let (_dir, path) = new_file();
        let mut opening = Opening::of(&path, atomic4k, 1).with_copy();
        opening.write(0, 0, 1, 2);
        opening.flush();
        opening.write(1, 0, 1, 2);
        let mark = Record::MarkLayerUnsynced { copy: COPY, layer: LAYER };
        opening.act(MediumOp::Commit(vec![mark, Record::MarkUnsynced(page(5))]));
        opening.write(0, 1, 9, 1);
        opening.flush();
        drop(opening);
        let mut again = Opening::of(&path, atomic4k, 2);
        assert_eq!(again.opened.copies[0].layers[0].cursor, 0);
        assert_eq!(again.opened.unsynced, vec![page(5)]);
        let states = |record: PageRecord| (record.blocks.of(0), record.blocks.of(1), record.blocks.of(2));
        let (stale, present, absent) = (BlockState::Stale, BlockState::Present, BlockState::Absent);
        assert_eq!(states(again.load(0).unwrap()), (stale, present, absent));
        assert_eq!(states(again.load(1).unwrap()), (stale, stale, absent));
        assert_eq!(again.read(0, 1..2).0, vec![9; 4096]);
    }
}

#[test]
fn i8_a_forced_layer_serves_what_it_kept_over_a_restart_and_can_be_marked_again() {
    for atomic4k in [false, true] {
        let (_dir, path) = new_file();
        let mut opening = Opening::of(&path, atomic4k, 1).with_copy();
        opening.write(0, 0, 1, 2);
        opening.write(1, 0, 2, 2);
        opening.act(MediumOp::Shape { page: page(7), changes: vec![(0..4, BlockState::Hole)] });
        opening.flush();
        let mark = || Record::MarkLayerUnsynced { copy: COPY, layer: LAYER };
        opening.act(MediumOp::Commit(vec![mark()]));
        // A page of each kind: never touched since, half filled, and with a bad block of its own.
        opening.write(1, 1, 9, 1);
        opening.flush();
        opening.act(MediumOp::Commit(vec![Record::TrustLayer { copy: COPY, layer: LAYER }]));
        let states = |record: PageRecord| [0, 1, 2].map(|block| record.blocks.of(block));
        let (present, absent) = (BlockState::Present, BlockState::Absent);
        let check = |opening: &mut Opening| {
            assert_eq!(states(opening.load(0).unwrap()), [present, present, absent]);
            assert_eq!(states(opening.load(1).unwrap()), [present, present, absent]);
            assert_eq!(opening.load(7).unwrap().blocks.of(1), BlockState::Hole);
            assert_eq!((opening.read(0, 1..2).0, opening.read(1, 0..1).0), (vec![1; 4096], vec![2; 4096]));
            assert_eq!(opening.read(1, 1..2), (vec![9; 4096], vec![]));
        };
        check(&mut opening);
        drop(opening);
        let mut again = Opening::of(&path, atomic4k, 2);
        assert_eq!(again.opened.copies[0].layers[0].cursor, u64::MAX);
        check(&mut again);
        // Written into: what it kept stays beside what is new.
        again.write(0, 0, 5, 1);
        again.flush();
        assert_eq!((again.read(0, 0..1).0, again.read(0, 1..2).0), (vec![5; 4096], vec![1; 4096]));
        again.act(MediumOp::Commit(vec![Record::MarkUnsynced(page(1)), Record::ClearUnsynced(page(7))]));
        assert_eq!(states(again.load(1).unwrap()), [BlockState::Stale, BlockState::Stale, absent]);
        again.act(MediumOp::Commit(vec![mark()]));
        assert_eq!(states(again.load(0).unwrap()), [BlockState::Stale, BlockState::Stale, absent]);
        again.act(MediumOp::Commit(vec![Record::TrustLayer { copy: COPY, layer: LAYER }]));
        drop(again);
        let mut third = Opening::of(&path, atomic4k, 3);
        assert_eq!((third.read(0, 0..1).0, third.read(1, 1..2).0), (vec![5; 4096], vec![9; 4096]));
    }
}

#[test]
fn i8_a_forced_page_never_shows_what_an_earlier_owner_left_in_its_slot() {
    for atomic4k in [false, true] {
        let (_dir, path) = new_file();
        let mut opening = Opening::of(&path, atomic4k, 1).with_copy();
        (0..8).for_each(|number| opening.write(number, 0, 0xaa, 16));
        opening.flush();
        opening.act(MediumOp::Commit((0..8).map(|number| Record::DropPage(page(number))).collect()));
        opening.flush();
        // Block 0 written, 1 a hole, 2 said to be bad though it is absent, 3 absent, 4 written and not flushed.
        opening.write(20, 0, 1, 1);
        opening.act(MediumOp::Shape { page: page(20), changes: vec![(1..2, BlockState::Hole)] });
        opening.act(MediumOp::Commit(vec![Record::Stale { page: page(20), blocks: vec![2] }]));
        opening.write(20, 4, 4, 1);
        opening.act(MediumOp::Commit(vec![Record::MarkLayerUnsynced { copy: COPY, layer: LAYER }]));
        // One page is changed after the mark, so that its cells say stale; the other is not.
        opening.write(20, 5, 5, 1);
        opening.flush();
        assert_eq!(opening.load(20).unwrap().blocks.of(1), BlockState::Stale);
        let check = |opening: &mut Opening| {
            let record = opening.load(20).unwrap();
            let states = [0, 1, 2, 3, 4, 5].map(|block| record.blocks.of(block));
            use BlockState::{Absent, Hole, Present, Stale};
            assert_eq!(states, [Present, Hole, Stale, Absent, Present, Present]);
            for (block, byte) in [(0, 1), (4, 4), (5, 5)] {
                assert!(opening.read(20, block..block + 1) == (vec![byte; 4096], vec![]), "block {block}");
            }
            for block in [1, 2, 3, 6] {
                assert!(opening.read(20, block..block + 1) == (vec![0; 4096], vec![block]), "block {block}");
            }
        };
        opening.act(MediumOp::Commit(vec![Record::TrustLayer { copy: COPY, layer: LAYER }]));
        check(&mut opening);
        drop(opening);
        let seen = inspect(&path).unwrap().page(page(20)).unwrap().unwrap();
        assert_eq!((seen.record.blocks.of(1), seen.bad), (BlockState::Hole, vec![]));
        assert!(!seen.data.contains(&0xaa), "inspection shows nothing of an earlier owner");
        let mut again = Opening::of(&path, atomic4k, 2);
        check(&mut again);
        // Its cells say it, too, once it is changed.
        again.write(20, 0, 1, 1);
        again.flush();
        check(&mut again);
    }
}

#[test]
fn i8_a_force_holds_over_a_crash_also_for_what_was_written_and_not_flushed() {
    for atomic4k in [false, true] {
        let (_dir, path) = new_file();
        let mut opening = Opening::of(&path, atomic4k, 1).with_copy();
        opening.act(MediumOp::Commit(vec![Record::Pending { page: page(0), set: true }]));
        opening.write(0, 0, 1, 1);
        opening.flush();
        opening.act(MediumOp::Commit(vec![Record::MarkLayerUnsynced { copy: COPY, layer: LAYER }]));
        opening.write(0, 0, 2, 1);
        opening.act(MediumOp::Commit(vec![Record::TrustLayer { copy: COPY, layer: LAYER }]));
        // Changed after the force, so that its cells say what the force made of them.
        opening.write(0, 1, 3, 1);
        opening.act(MediumOp::Commit(vec![Record::LeaseNumber(7)]));
        drop(opening);
        let mut again = Opening::of(&path, atomic4k, 2);
        assert_eq!(again.load(0).unwrap().blocks.of(0), BlockState::Present);
        let (data, bad) = again.read(0, 0..1);
        assert!(bad.is_empty() && (data == [1; 4096] || data == [2; 4096]), "old or new");
    }
}

#[test]
fn a_device_that_grew_has_more_room_at_once() {
    let (_dir, path) = new_file();
    let mut opening = Opening::of(&path, false, 1).with_copy();
    let before = opening.device.stats();
    grow_file(&path, 2 * MIN_DEVICE_BYTES).unwrap();
    opening.device.grow();
    opening.write(0, 0, 1, 1);
    opening.flush();
    let after = opening.device.stats();
    assert_eq!(after.capacity_bytes, before.capacity_bytes + MIN_DEVICE_BYTES);
    drop(opening);
    let again = Opening::of(&path, false, 2);
    assert_eq!(again.opened.capacity_bytes, after.capacity_bytes);
}

#[test]
fn inspection_shows_every_block_and_writes_nothing() {
    for atomic4k in [false, true] {
        let (_dir, path) = new_file();
        let mut opening = Opening::of(&path, atomic4k, 1).with_copy();
        opening
            .act(MediumOp::Commit(vec![Record::PutVolume { volume: VolumeId(5), blob: Bytes::from_static(b"map") }]));
        opening.write(4, 2, 0x77, 3);
        opening.flush();
        drop(opening);
        let before = std::fs::read(&path).unwrap();
        let mut seen = inspect(&path).unwrap();
        assert_eq!(seen.identity(), (ClusterId(1), ServerId(2), DeviceId(3)));
        assert_eq!(seen.volumes(), vec![(VolumeId(5), Bytes::from_static(b"map"))]);
        assert_eq!(seen.pages(COPY, LAYER), vec![4]);
        let found = seen.page(page(4)).unwrap().unwrap();
        assert_eq!((found.record.blocks.of(1), found.record.blocks.of(4)), (BlockState::Absent, BlockState::Present));
        assert_eq!((&found.data[2 * 4096..5 * 4096], found.bad), (&[0x77u8; 3 * 4096][..], vec![]));
        drop(seen);
        assert!(std::fs::read(&path).unwrap() == before);
    }
}

#[test]
fn many_operations_at_once_are_all_answered_while_the_journal_wraps() {
    for atomic4k in [false, true] {
        let (_dir, path) = new_file();
        let mut opening = Opening::of(&path, atomic4k, 1).with_copy();
        let pages: u64 = 16;
        let mut expected = vec![0u8; (pages * 256) as usize];
        for round in 0..24u8 {
            let mut ops = Vec::new();
            let marks = (0..pages).map(|n| Record::Pending { page: page(n), set: true }).collect();
            opening.act(MediumOp::Commit(marks));
            for nth in 0..64u64 {
                let (number, first) = (nth % pages, (nth / pages * 32 + u64::from(round)) as u32);
                let byte = round.wrapping_mul(31).wrapping_add(nth as u8) | 1;
                let data = Bytes::from(vec![byte; 16 * 4096]);
                expected[(number * 256 + u64::from(first)) as usize..][..16].fill(byte);
                ops.push((1 << 32 | nth, MediumOp::Write { page: page(number), first, data }));
            }
            assert!(opening.device.submit_all(ops).is_empty());
            for _ in 0..64 {
                assert_eq!(opening.answer().1, MediumAnswer::Done);
            }
            opening.flush();
        }
        let stats = opening.device.stats();
        assert!(atomic4k || stats.checkpoints >= 2, "{stats:?}");
        drop(opening);
        let mut again = Opening::of(&path, atomic4k, 2);
        for number in 0..pages {
            let want = &expected[(number * 256) as usize..][..256];
            let end = want.iter().rposition(|b| *b != 0).unwrap() as u32 + 1;
            let states = again.load(number).unwrap().blocks;
            for block in (0..end).filter(|block| states.of(*block) == BlockState::Present) {
                let (data, bad) = again.read(number, block..block + 1);
                assert!(bad.is_empty() && data.iter().all(|b| *b == want[block as usize]), "{number}/{block}");
            }
            assert_eq!(
                (0..256).filter(|b| states.of(*b) == BlockState::Present).count(),
                want.iter().filter(|b| **b != 0).count()
            );
        }
    }
}

#[test]
fn shapes_alone_never_fill_the_cache_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    std::fs::File::create(&path).unwrap().set_len(64 << 30).unwrap();
    let options = FormatOptions { create_bytes: None, journal_bytes: Some(64 << 20), ..format_options() };
    format(&path, &options).unwrap();
    let mut opening = Opening::of(&path, true, 1).with_copy();
    // Each takes a slab of its own page: more blocks of cells than the cache holds, and no flush among them.
    let pages: u64 = 4 * 10_000;
    let ops = (0..pages).map(|n| (1 << 40 | n, MediumOp::Allocate(vec![page(n)]))).collect();
    assert!(opening.device.submit_all(ops).is_empty());
    (0..pages).for_each(|_| assert_eq!(opening.answer().1, MediumAnswer::Done));
    opening.flush();
    assert!(opening.device.stats().checkpoints > 0);
}
