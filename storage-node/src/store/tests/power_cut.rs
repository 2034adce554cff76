//! The power-cut test: a mixed trace over a recorded disk, cut at every sampled point, recovered, compared with the
//! oracle; and cut again during the recovery.
//!
//! `LAMINA_POWER_CUTS=all` cuts at every step of the trace, a number at so many; the default samples so that a debug
//! build takes under a minute. `LAMINA_POWER_SEED` makes another trace.

use super::cut_disk::{CutDisk, Dice, FATES, Fate, Image, Step, cut};
use super::oracle::{Effect, Kept, PageOracle, Value};
use crate::store::aligned::AlignedBuf;
use crate::store::core::{Core, Io, IoKind};
use crate::store::device::Identity;
use crate::store::format::{FormatOptions, format_disk};
use crate::store::geometry::{MIN_DEVICE_BYTES, SLAB_BYTES, UNITS_PER_SLAB};
use crate::store::recovery::{load, make_current};
use bytes::Bytes;
use lamina_protocol::ids::*;
use lamina_protocol::layer::{BlockState, PageKey};
use lamina_protocol::storage_server::medium::*;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

mod cuts;
mod moment;

use cuts::*;
use moment::Moment;

const DEVICE_BYTES: u64 = MIN_DEVICE_BYTES;
/// Small, so that the trace wraps it many times.
const JOURNAL_BYTES: u64 = 1 << 20;
const MAIN: CopyId = CopyId(1);
const OTHER: CopyId = CopyId(2);
const MARKED: LayerId = LayerId(1);
const PLAIN: LayerId = LayerId(2);

/// (copy, layer, page, blocks of a page)
fn pages() -> Vec<(PageKey, u32)> {
    let of = |copy, layer, count: u64, blocks: u32| {
        (0..count).map(move |page| (PageKey { copy, layer, page: page * 3 }, blocks))
    };
    of(MAIN, MARKED, 20, 16).chain(of(MAIN, PLAIN, 6, 64)).chain(of(OTHER, PLAIN, 4, 16)).collect()
}

fn copy_record(copy: CopyId) -> Record {
    let layer = |layer, page_bytes| LayerRecord { layer, page_bytes, cursor: u64::MAX };
    let layers = match copy {
        MAIN => vec![layer(MARKED, 64 << 10), layer(PLAIN, 256 << 10)],
        _ => vec![layer(PLAIN, 64 << 10)],
    };
    Record::PutCopy(CopyRecord { copy, volume: VolumeId(7), placement: 0, group: 0, layers })
}

fn trust() -> Record {
    Record::TrustLayer { copy: MAIN, layer: MARKED }
}

/// What was asked of the store.
#[derive(Clone, Debug)]
enum Asked {
    Pages(Vec<(usize, Effect)>),
    Flush,
    /// Volume blob and lease number get this number in one commit.
    Number(u64),
    Read {
        page: usize,
        first: u32,
        expected: Vec<u64>,
    },
}

/// What happened, in order.
enum Event {
    HandedIn(u64),
    Answered(u64),
    WriteBegun(usize),
    WriteDone(usize),
    SyncBegun(u64),
    /// A sync that the device begins once this write has succeeded.
    LinkedSyncBegun(u64, usize),
    SyncDone(u64),
}

struct Trace {
    start: Image,
    asked: BTreeMap<u64, Asked>,
    writes: Vec<(u64, Rc<Vec<u8>>)>,
    events: Vec<Event>,
    data_writes: u64,
    checkpoints: u64,
    journal_bytes: u64,
}

struct Rig {
    core: Core,
    live: Image,
    under_way: Vec<(Io, Option<usize>)>,
    trace: Trace,
    dice: Dice,
    pages: Vec<(PageKey, u32)>,
    now: Vec<Vec<Value>>,
    pending: Vec<bool>,
    busy: BTreeSet<usize>,
    outstanding: BTreeSet<u64>,
    next_op: u64,
    version: u64,
}

fn content(version: u64) -> Vec<u8> {
    version.to_le_bytes().repeat(512)
}

fn recovered(image: Image, boot: u128, in_place: bool) -> (CutDisk, Core, Opened) {
    let disk = CutDisk::new(image, DEVICE_BYTES);
    let mut loaded = load(&disk, true).unwrap_or_else(|e| panic!("a cut leaves a device that opens: {e}"));
    make_current(&disk, &mut loaded, BootId(boot), in_place).unwrap();
    let (core, opened) = Core::new(loaded, in_place, 64);
    (disk, core, opened)
}

fn formatted() -> Image {
    let disk = CutDisk::new(Image::default(), DEVICE_BYTES);
    let options = FormatOptions {
        identity: Identity { cluster: ClusterId(1), server: ServerId(1) },
        device: DeviceId(1),
        overwrite: false,
        create_bytes: None,
        journal_bytes: Some(JOURNAL_BYTES),
    };
    format_disk(&disk, &options).unwrap();
    disk.image.into_inner()
}

impl Rig {
    fn new(in_place: bool, seed: u64) -> Self {
        let (disk, mut core, _) = recovered(formatted(), 1, in_place);
        let first = MediumOp::Commit(vec![copy_record(MAIN), copy_record(OTHER)]);
        assert_eq!(ask(&mut core, &mut disk.image.borrow_mut(), first), MediumAnswer::Done);
        let start = disk.image.into_inner();
        let pages = pages();
        let trace = Trace {
            start: start.clone(),
            asked: BTreeMap::new(),
            writes: Vec::new(),
            events: Vec::new(),
            data_writes: 0,
            checkpoints: 0,
            journal_bytes: 0,
        };
        Self {
            core,
            live: start,
            under_way: Vec::new(),
            trace,
            dice: Dice(seed),
            now: pages.iter().map(|(_, blocks)| vec![Value::Absent; *blocks as usize]).collect(),
            pending: vec![false; pages.len()],
            pages,
            busy: BTreeSet::new(),
            outstanding: BTreeSet::new(),
            next_op: 100,
            version: 0,
        }
    }

    fn hand_in(&mut self, asked: Asked, what: MediumOp) {
        self.next_op += 1;
        if let Asked::Pages(effects) = &asked {
            self.busy.extend(effects.iter().map(|(page, _)| *page));
        }
        if let Asked::Read { page, .. } = &asked {
            self.busy.insert(*page);
        }
        self.trace.asked.insert(self.next_op, asked);
        self.trace.events.push(Event::HandedIn(self.next_op));
        self.outstanding.insert(self.next_op);
        self.core.push(self.next_op, what);
        self.settle();
    }

    /// Lets the core run and notes what it begins and answers.
    fn settle(&mut self) {
        self.core.run();
        for event in self.core.take_events() {
            let MediumEvent::Answered { op, answer, .. } = event else { panic!("the disk never fails here") };
            self.answered(op, &answer);
        }
        for io in self.core.take_ios() {
            let write = match &io.kind {
                IoKind::Write { at, data } | IoKind::WriteSync { at, data } => {
                    let range = *at..*at + data.bytes().len() as u64;
                    self.refuse_overlap(&range);
                    let write = self.trace.writes.len();
                    self.trace.writes.push((*at, Rc::new(data.bytes().to_vec())));
                    self.trace.events.push(Event::WriteBegun(write));
                    if matches!(io.kind, IoKind::WriteSync { .. }) {
                        // The sync is sure to cover its own write and what was done when it was handed in, no more.
                        self.trace.events.push(Event::LinkedSyncBegun(io.id, write));
                    }
                    Some(write)
                }
                IoKind::Sync => {
                    self.trace.events.push(Event::SyncBegun(io.id));
                    None
                }
                IoKind::Read { .. } => None,
            };
            self.under_way.push((io, write));
        }
    }

    fn refuse_overlap(&self, range: &std::ops::Range<u64>) {
        for (io, _) in &self.under_way {
            if let IoKind::Write { at, data } | IoKind::WriteSync { at, data } = &io.kind {
                let end = at + data.bytes().len() as u64;
                assert!(end <= range.start || *at >= range.end, "two writes of one place are never under way at once");
            }
        }
    }

    fn answered(&mut self, op: u64, answer: &MediumAnswer) {
        assert!(self.outstanding.remove(&op), "answered once");
        match &self.trace.asked[&op] {
            Asked::Pages(effects) => {
                assert_eq!(*answer, MediumAnswer::Done);
                for (page, effect) in effects {
                    self.busy.remove(page);
                    apply(&mut self.now[*page], effect);
                    if let Effect::Pending(set) = effect {
                        self.pending[*page] = *set;
                    }
                    if matches!(effect, Effect::Drop) {
                        self.pending[*page] = false;
                    }
                }
            }
            Asked::Flush | Asked::Number(_) => assert_eq!(*answer, MediumAnswer::Done),
            Asked::Read { page, first, expected } => {
                self.busy.remove(page);
                let MediumAnswer::Data { data, bad } = answer else { panic!("{answer:?}") };
                assert!(bad.is_empty(), "op {op}: page {page} blocks from {first}: bad {bad:?}");
                let want: Vec<u8> = expected.iter().flat_map(|version| content(*version)).collect();
                assert!(*data == want, "what was answered reads back at once");
            }
        }
        self.trace.events.push(Event::Answered(op));
    }

    fn finish_one(&mut self) {
        let nth = self.dice.roll(self.under_way.len() as u64) as usize;
        let (io, write) = self.under_way.swap_remove(nth);
        let result = match io.kind {
            IoKind::Read { at, len } => {
                let mut buf = AlignedBuf::zeroed(len);
                self.live.read(at, &mut buf);
                Some(buf)
            }
            IoKind::Write { at, data } => {
                self.live.write(at, data.bytes());
                self.trace.events.push(Event::WriteDone(write.unwrap()));
                None
            }
            IoKind::WriteSync { at, data } => {
                self.live.write(at, data.bytes());
                // Between the two a cut finds the write done and not synced.
                self.trace.events.push(Event::WriteDone(write.unwrap()));
                self.trace.events.push(Event::SyncDone(io.id));
                None
            }
            IoKind::Sync => {
                self.trace.events.push(Event::SyncDone(io.id));
                None
            }
        };
        self.core.done(io.id, Ok(result));
        self.settle();
    }

    fn drain(&mut self) {
        while !self.outstanding.is_empty() {
            assert!(!self.under_way.is_empty(), "nothing hangs: {:?} wait for nothing", self.outstanding);
            self.finish_one();
        }
    }

    fn run(mut self, data_writes: u64) -> Trace {
        while self.trace.data_writes < data_writes {
            if self.outstanding.len() < 8 && self.dice.roll(3) > 0 {
                self.ask_something();
            } else if !self.under_way.is_empty() {
                self.finish_one();
            } else {
                assert!(self.outstanding.is_empty(), "nothing hangs: {:?} wait for nothing", self.outstanding);
            }
        }
        self.drain();
        let (counts, rotten) = self.core.counts();
        assert_eq!((counts.bad_blocks, rotten), (0, 0));
        self.trace.checkpoints = counts.checkpoints;
        self.trace.journal_bytes = counts.journal_bytes;
        self.trace
    }

    fn ask_something(&mut self) {
        match self.dice.roll(1000) {
            0..=3 => self.confirm_all(),
            4..=5 => self.mark_layer(),
            8..=9 => self.trust_layer(),
            6..=7 => self.replace_other_copy(),
            10..=60 => self.hand_in(Asked::Flush, MediumOp::Flush),
            61..=80 => self.put_number(),
            _ => self.ask_of_a_page(),
        }
    }

    fn put_number(&mut self) {
        self.version += 1;
        let number = self.version;
        let blob = Bytes::from(content(number));
        let records = vec![Record::PutVolume { volume: VolumeId(7), blob }, Record::LeaseNumber(number)];
        self.hand_in(Asked::Number(number), MediumOp::Commit(records));
    }

    /// As after a flush that all members answered: pages are no longer pending.
    fn confirm_all(&mut self) {
        self.drain();
        self.hand_in(Asked::Flush, MediumOp::Flush);
        self.drain();
        let half: Vec<usize> = (0..self.pages.len()).filter(|page| self.pending[*page] && page % 2 == 0).collect();
        let record = |page: &usize| Record::Pending { page: self.pages[*page].0, set: false };
        let records = half.iter().map(record).collect();
        let effects = half.iter().map(|page| (*page, Effect::Pending(false))).collect();
        self.hand_in(Asked::Pages(effects), MediumOp::Commit(records));
        self.drain();
    }

    fn mark_layer(&mut self) {
        self.drain();
        let of_layer = |page: &usize| self.pages[*page].0.layer == MARKED;
        let effects = (0..self.pages.len()).filter(of_layer).map(|page| (page, Effect::LayerMark)).collect();
        let record = Record::MarkLayerUnsynced { copy: MAIN, layer: MARKED };
        self.hand_in(Asked::Pages(effects), MediumOp::Commit(vec![record]));
    }

    fn trust_layer(&mut self) {
        self.drain();
        let of_layer = |page: &usize| self.pages[*page].0.layer == MARKED;
        let effects = (0..self.pages.len()).filter(of_layer).map(|page| (page, Effect::LayerTrust)).collect();
        self.hand_in(Asked::Pages(effects), MediumOp::Commit(vec![trust()]));
    }

    fn replace_other_copy(&mut self) {
        self.drain();
        let of_copy = |page: &usize| self.pages[*page].0.copy == OTHER;
        let effects = (0..self.pages.len()).filter(of_copy).map(|page| (page, Effect::Drop)).collect();
        let records = vec![Record::DropCopy(OTHER), copy_record(OTHER)];
        self.hand_in(Asked::Pages(effects), MediumOp::Commit(records));
    }

    fn ask_of_a_page(&mut self) {
        let page = self.dice.roll(self.pages.len() as u64) as usize;
        if self.busy.contains(&page) {
            return;
        }
        let (key, blocks) = self.pages[page];
        let first = self.dice.roll(u64::from(blocks)) as u32;
        let count = 1 + self.dice.roll(u64::from(blocks - first).min(8)) as u32;
        let one = |effect| Asked::Pages(vec![(page, effect)]);
        match self.dice.roll(100) {
            0..=54 if !self.pending[page] => {
                let record = Record::Pending { page: key, set: true };
                self.hand_in(one(Effect::Pending(true)), MediumOp::Commit(vec![record]));
            }
            0..=54 => self.write(page, first, count),
            55..=66 => {
                let value = [Value::Hole, Value::Absent, Value::Stale(Kept::Nothing)][self.dice.roll(3) as usize];
                let (first, count) = if self.dice.roll(4) == 0 { (0, blocks) } else { (first, count) };
                let changes = vec![(first..first + count, value.state())];
                self.hand_in(one(Effect::Shape { first, count, value }), MediumOp::Shape { page: key, changes });
            }
            67..=69 => self.hand_in(one(Effect::Mark), MediumOp::Commit(vec![Record::MarkUnsynced(key)])),
            70..=72 => self.hand_in(one(Effect::ClearUnsynced), MediumOp::Commit(vec![Record::ClearUnsynced(key)])),
            73..=75 => self.hand_in(one(Effect::Drop), MediumOp::Commit(vec![Record::DropPage(key)])),
            76..=77 => {
                let blocks: Vec<u32> = (first..first + count).collect();
                let record = Record::Stale { page: key, blocks: blocks.clone() };
                self.hand_in(one(Effect::StaleBlocks(blocks)), MediumOp::Commit(vec![record]));
            }
            _ => self.read(page, first),
        }
    }

    fn write(&mut self, page: usize, first: u32, count: u32) {
        let versions: Vec<u64> = (1..=u64::from(count)).map(|nth| self.version + nth).collect();
        self.version += u64::from(count);
        self.trace.data_writes += 1;
        let data = Bytes::from(versions.iter().flat_map(|version| content(*version)).collect::<Vec<u8>>());
        let effect = Effect::Write { first, versions };
        let what = MediumOp::Write { page: self.pages[page].0, first, data };
        self.hand_in(Asked::Pages(vec![(page, effect)]), what);
    }

    fn read(&mut self, page: usize, first: u32) {
        let rest = self.now[page][first as usize..].iter();
        let data = |value: &Value| if let Value::Data(version) = value { Some(*version) } else { None };
        let expected: Vec<u64> = rest.map_while(data).collect();
        if !expected.is_empty() {
            let blocks = first..first + expected.len() as u32;
            let what = MediumOp::Read { page: self.pages[page].0, blocks };
            self.hand_in(Asked::Read { page, first, expected }, what);
        }
    }
}

fn apply(now: &mut [Value], effect: &Effect) {
    match effect {
        Effect::Write { first, versions } => {
            let values = versions.iter().map(|version| Value::Data(*version));
            now[*first as usize..].iter_mut().zip(values).for_each(|(slot, value)| *slot = value);
        }
        Effect::Shape { first, count, value: Value::Stale(_) } => {
            now[*first as usize..(first + count) as usize].iter_mut().for_each(|value| *value = value.stale());
        }
        Effect::Shape { first, count, value } => now[*first as usize..(first + count) as usize].fill(*value),
        Effect::Mark | Effect::LayerMark => {
            now.iter_mut().for_each(|value| *value = value.marked());
        }
        Effect::LayerTrust => now.iter_mut().for_each(|value| *value = value.trusted()),
        Effect::Drop => now.fill(Value::Absent),
        Effect::StaleBlocks(blocks) => {
            blocks.iter().for_each(|block| now[*block as usize] = now[*block as usize].stale())
        }
        Effect::Pending(_) | Effect::ClearUnsynced => {}
    }
}

/// One operation on a core whose transfers all succeed at once.
fn ask(core: &mut Core, disk: &mut Image, what: MediumOp) -> MediumAnswer {
    core.push(1, what);
    for _ in 0..10_000 {
        core.run();
        if let Some(MediumEvent::Answered { answer, .. }) = core.take_events().pop() {
            return answer;
        }
        for io in core.take_ios() {
            let result = match io.kind {
                IoKind::Read { at, len } => {
                    let mut buf = AlignedBuf::zeroed(len);
                    disk.read(at, &mut buf);
                    Some(buf)
                }
                IoKind::Write { at, data } | IoKind::WriteSync { at, data } => {
                    disk.write(at, data.bytes());
                    None
                }
                IoKind::Sync => None,
            };
            core.done(io.id, Ok(result));
        }
    }
    panic!("an operation that hangs");
}

fn number_from(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn survive_power_cuts(in_place: bool) {
    let seed = number_from("LAMINA_POWER_SEED").unwrap_or(0x5eed);
    let trace = Rig::new(in_place, 2 * seed + u64::from(in_place)).run(2_000);
    assert!(trace.data_writes >= 2_000);
    assert!(trace.checkpoints >= 3, "{} checkpoints", trace.checkpoints);
    assert!(trace.journal_bytes > 2 * JOURNAL_BYTES, "the journal wraps: {} bytes", trace.journal_bytes);
    let every = match std::env::var("LAMINA_POWER_CUTS").as_deref() {
        Ok("all") => 1,
        _ => trace.events.len() / number_from("LAMINA_POWER_CUTS").unwrap_or(60) as usize,
    };
    let mut moment = Moment::new(&trace);
    for (at, event) in trace.events.iter().enumerate() {
        moment.pass(&trace, event);
        if at % every == every / 2 {
            cut_here(&trace, &moment, at, in_place);
            kill_here(&trace, &moment, at, in_place);
        }
    }
}

#[test]
fn a_power_cut_leaves_every_block_old_or_new_through_the_journal() {
    survive_power_cuts(false);
}

#[test]
fn a_power_cut_leaves_every_block_old_or_new_in_place() {
    survive_power_cuts(true);
}
