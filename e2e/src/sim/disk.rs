//! A fake disk: the medium contract's promises 1–6, and exactly no more (`protocol/src/storage_server/medium.rs`).
//!
//! Every block is a list of versions: the durable one and those written since the last flush. Operations take effect
//! when they are answered, in the order of handing in where they touch the same page; a commit never before an earlier
//! one. What a crash leaves of it is decided in `crash`.

use bytes::{Bytes, BytesMut};
use lamina_protocol::ids::{BootId, CopyId, DeviceId, LayerId, VolumeId};
use lamina_protocol::layer::{BLOCK_BYTES, BlockState, BlockStates, PageKey};
use lamina_protocol::mutants::{Mutant, on};
use lamina_protocol::storage_server::medium::{CopyRecord, MediumAnswer, MediumOp, OpId, PageRecord, Record};
use lamina_protocol::storage_server::{VolumeBlob, read_blob};
use std::collections::BTreeMap;

mod crash;
mod records;

pub(super) use crash::Cut;

/// What a block holds, or held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) state: BlockState,
    pub(super) data: Option<Bytes>,
    /// Rotted: a read of it says so.
    pub(super) bad: bool,
    /// It was a hole when it became stale.
    pub(super) was_hole: bool,
}

impl Version {
    const ABSENT: Self = Self { state: BlockState::Absent, data: None, bad: false, was_hole: false };

    /// What it holds stays for a person's force.
    pub(super) fn become_stale(&mut self) {
        if self.state != BlockState::Stale {
            self.was_hole = self.state == BlockState::Hole;
            self.state = BlockState::Stale;
        }
    }

    /// I8: what was kept counts again. Of what was absent nothing was kept: it stays known as bad.
    pub(super) fn trust(&mut self, slot: bool) {
        if self.state == BlockState::Stale {
            self.state = match self.data {
                _ if self.was_hole || !slot => BlockState::Hole,
                Some(_) => BlockState::Present,
                None => BlockState::Stale,
            };
        }
    }
}

/// One block.
#[derive(Clone, Debug)]
struct Cell {
    durable: Version,
    /// Not flushed, oldest first, with the number of the effect.
    later: Vec<(u64, Version)>,
}

impl Cell {
    fn current(&self) -> &Version {
        self.later.last().map_or(&self.durable, |(_, version)| version)
    }

    /// A durable change of state of whatever is there: it holds for every version.
    fn for_all(&mut self, change: impl Fn(&mut Version)) {
        change(&mut self.durable);
        for (_, version) in &mut self.later {
            change(version);
        }
    }
}

/// One page.
#[derive(Clone, Debug)]
struct DiskPage {
    cells: Vec<Cell>,
    slot: bool,
    unsynced: bool,
    pending: bool,
    missed: u16,
}

impl DiskPage {
    fn new(blocks: u32) -> Self {
        let cell = Cell { durable: Version::ABSENT, later: Vec::new() };
        Self { cells: vec![cell; blocks as usize], slot: false, unsynced: false, pending: false, missed: 0 }
    }

    fn has_entry(&self) -> bool {
        let blank = |cell: &Cell| [&cell.durable, cell.current()].iter().all(|version| version.data.is_none());
        if on(Mutant::EntryForgotten) && self.cells.iter().all(blank) {
            return self.pending || self.unsynced;
        }
        self.slot || self.unsynced || self.pending || self.missed != 0 || self.holds_something()
    }

    /// Whether a block of it is, or may be after a crash, other than absent.
    fn holds_something(&self) -> bool {
        let holds =
            |cell: &Cell| cell.current().state != BlockState::Absent || cell.durable.state != BlockState::Absent;
        self.cells.iter().any(holds)
    }
}

/// An operation handed in and not yet answered.
#[derive(Clone, Debug)]
struct Waiting {
    op: OpId,
    what: MediumOp,
    /// For a flush: effects up to here are covered.
    covers: u64,
}

/// One opening.
#[derive(Clone, Debug)]
struct Opening {
    boot: BootId,
    waiting: Vec<Waiting>,
    page_ready: BTreeMap<PageKey, u64>,
    commit_ready: u64,
    all_ready: u64,
    latest: u64,
}

/// Which kind of operation fails next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failing {
    Write,
    Commit,
    Flush,
}

/// One device.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) device: DeviceId,
    pub(super) capacity_bytes: u64,
    copies: BTreeMap<CopyId, CopyRecord>,
    volumes: BTreeMap<VolumeId, Bytes>,
    lease_number: u64,
    pages: BTreeMap<PageKey, DiskPage>,
    effects: u64,
    opening: Option<Opening>,
    pub(super) failing: Option<Failing>,
    /// It was put in place of a used one and was not opened yet.
    pub(super) returns_blank: bool,
    /// It was replaced and is there again: who was sure that its copies are gone forgot them.
    pub(super) was_away: bool,
    /// Every stamp that a write put into a copy, for I1.
    pub(super) written: std::collections::BTreeSet<(CopyId, u64)>,
    /// A page was called synced whose filled blocks a crash would make stale again (H11c).
    pub(super) synced_early: Option<PageKey>,
}

/// How an operation ends.
#[derive(Clone, Debug)]
pub(super) enum Ended {
    Answer(MediumAnswer),
    /// The device failed (promise 6).
    Failed,
    /// Of an opening that is over.
    Nothing,
}

impl Disk {
    /// A formatted device with nothing on it.
    pub(super) fn blank(device: DeviceId, capacity_bytes: u64) -> Self {
        Self {
            device,
            capacity_bytes,
            copies: BTreeMap::new(),
            volumes: BTreeMap::new(),
            lease_number: 0,
            pages: BTreeMap::new(),
            effects: 0,
            opening: None,
            failing: None,
            returns_blank: false,
            was_away: false,
            written: Default::default(),
            synced_early: None,
        }
    }

    /// The opening under way.
    pub(super) fn boot(&self) -> Option<BootId> {
        self.opening.as_ref().map(|opening| opening.boot)
    }

    /// A write has been handed in and not answered.
    pub(super) fn is_writing(&self) -> bool {
        let writes = |w: &Waiting| matches!(w.what, MediumOp::Write { .. });
        self.opening.as_ref().is_some_and(|opening| opening.waiting.iter().any(writes))
    }

    fn used_bytes(&self) -> u64 {
        self.pages.values().filter(|p| p.slot).map(|p| p.cells.len() as u64 * u64::from(BLOCK_BYTES)).sum()
    }

    pub(super) fn free_bytes(&self) -> u64 {
        self.capacity_bytes.saturating_sub(self.used_bytes())
    }

    /// Takes an operation; the time at which it ends if the device takes `latency_us` for it.
    pub(super) fn hand_in(&mut self, boot: BootId, op: OpId, what: MediumOp, now: u64, latency_us: u64) -> Option<u64> {
        let covers = self.effects;
        let opening = self.opening.as_mut().filter(|o| o.boot == boot)?;
        let mut ready = (now + latency_us).max(opening.all_ready + 1);
        let (pages, all) = touched(&what);
        for page in &pages {
            ready = ready.max(opening.page_ready.get(page).map_or(0, |at| at + 1));
        }
        if matches!(what, MediumOp::Commit(_)) {
            ready = ready.max(opening.commit_ready + 1);
            opening.commit_ready = ready;
        }
        if all {
            ready = ready.max(opening.latest + 1);
            opening.all_ready = ready;
        }
        for page in pages {
            opening.page_ready.insert(page, ready);
        }
        opening.latest = opening.latest.max(ready);
        opening.waiting.push(Waiting { op, what, covers });
        Some(ready)
    }

    /// The operation takes effect and is answered.
    pub(super) fn complete(&mut self, boot: BootId, op: OpId) -> Ended {
        let Some(opening) = self.opening.as_mut().filter(|o| o.boot == boot) else { return Ended::Nothing };
        let Some(at) = opening.waiting.iter().position(|w| w.op == op) else { return Ended::Nothing };
        let fails = match &opening.waiting[at].what {
            MediumOp::Write { .. } | MediumOp::Shape { .. } => self.failing == Some(Failing::Write),
            MediumOp::Commit(_) => self.failing == Some(Failing::Commit),
            MediumOp::Flush => self.failing == Some(Failing::Flush),
            _ => false,
        };
        if fails {
            return Ended::Failed;
        }
        let Waiting { what, covers, .. } = opening.waiting.remove(at);
        Ended::Answer(self.apply(what, covers))
    }

    fn apply(&mut self, what: MediumOp, covers: u64) -> MediumAnswer {
        match what {
            MediumOp::Load(page) => MediumAnswer::Page(self.record(&page)),
            MediumOp::Commit(records) => {
                for record in records {
                    self.commit(record);
                }
                MediumAnswer::Done
            }
            MediumOp::Read { page, blocks } => self.read(&page, blocks),
            MediumOp::Write { page, first, data } => self.write(page, first, &data),
            MediumOp::Shape { page, changes } => self.shape(page, &changes),
            MediumOp::Allocate(pages) => self.allocate(&pages),
            MediumOp::Release(pages) => self.release(&pages),
            MediumOp::NextPage { copy, layer, from } => {
                let next = self
                    .pages
                    .iter()
                    .find(|(k, p)| k.copy == copy && k.layer == layer && k.page >= from && p.has_entry());
                MediumAnswer::NextPage(next.map(|(key, _)| key.page))
            }
            MediumOp::Flush => {
                self.flush(covers);
                MediumAnswer::Done
            }
        }
    }

    fn record(&self, key: &PageKey) -> Option<PageRecord> {
        let page = self.pages.get(key).filter(|p| p.has_entry())?;
        let mut blocks = BlockStates::absent(page.cells.len() as u32);
        for (block, cell) in page.cells.iter().enumerate() {
            blocks.set(block as u32, cell.current().state);
        }
        Some(PageRecord {
            allocated: page.slot,
            blocks,
            unsynced: page.unsynced,
            pending: page.pending,
            missed: page.missed,
        })
    }

    fn read(&self, key: &PageKey, blocks: std::ops::Range<u32>) -> MediumAnswer {
        let mut data = BytesMut::zeroed(blocks.len() * BLOCK_BYTES as usize);
        let mut bad = Vec::new();
        let page = self.pages.get(key).expect("the page logic reads only what is present");
        for (n, block) in blocks.clone().enumerate() {
            let version = page.cells[block as usize].current();
            assert!(
                matches!(version.state, BlockState::Present | BlockState::Stale),
                "the page logic read block {block} of {key:?}, which is {:?}",
                version.state
            );
            match &version.data {
                Some(content) if !version.bad => {
                    data[n * BLOCK_BYTES as usize..(n + 1) * BLOCK_BYTES as usize].copy_from_slice(content);
                }
                _ => bad.push(block - blocks.start),
            }
        }
        MediumAnswer::Data { data: data.freeze(), bad }
    }

    fn page_mut(&mut self, key: PageKey) -> Option<&mut DiskPage> {
        let layers = &self.copies.get(&key.copy)?.layers;
        let blocks = layers.iter().find(|l| l.layer == key.layer)?.page_bytes / BLOCK_BYTES;
        Some(self.pages.entry(key).or_insert_with(|| DiskPage::new(blocks)))
    }

    fn take_slot(&mut self, key: PageKey) -> bool {
        let free = self.free_bytes();
        let page = self.page_mut(key).expect("pages are written in copies that are on the device");
        let fits = page.slot || free >= page.cells.len() as u64 * u64::from(BLOCK_BYTES);
        page.slot |= fits;
        fits
    }

    fn write(&mut self, key: PageKey, first: u32, data: &Bytes) -> MediumAnswer {
        if !self.take_slot(key) {
            return MediumAnswer::NoSpace;
        }
        self.effects += 1;
        let effect = self.effects;
        let blocks = data.len() / BLOCK_BYTES as usize;
        for n in 0..blocks {
            let content = data.slice(n * BLOCK_BYTES as usize..(n + 1) * BLOCK_BYTES as usize);
            self.written.insert((key.copy, super::stamp::first_word(&content)));
            let version = Version { state: BlockState::Present, data: Some(content), bad: false, was_hole: false };
            let page = self.page_mut(key).expect("found above");
            page.cells[first as usize + n].later.push((effect, version));
        }
        MediumAnswer::Done
    }

    fn shape(&mut self, key: PageKey, changes: &[(std::ops::Range<u32>, BlockState)]) -> MediumAnswer {
        self.effects += 1;
        let effect = self.effects;
        let page = self.page_mut(key).expect("pages are changed in copies that are on the device");
        for (blocks, state) in changes {
            for block in blocks.clone() {
                let cell = &mut page.cells[block as usize];
                let mut version = Version { state: *state, ..Version::ABSENT };
                if *state == BlockState::Stale {
                    version = cell.current().clone();
                    version.become_stale();
                }
                cell.later.push((effect, version));
            }
        }
        MediumAnswer::Done
    }

    fn allocate(&mut self, pages: &[PageKey]) -> MediumAnswer {
        let had: Vec<bool> = pages.iter().map(|p| self.pages.get(p).is_some_and(|p| p.slot)).collect();
        for (n, page) in pages.iter().enumerate() {
            if !self.take_slot(*page) {
                for (page, had) in pages[..=n].iter().zip(&had) {
                    if let Some(page) = self.pages.get_mut(page) {
                        page.slot = *had;
                    }
                }
                return MediumAnswer::NoSpace;
            }
        }
        MediumAnswer::Done
    }

    fn release(&mut self, pages: &[PageKey]) -> MediumAnswer {
        for key in pages {
            if let Some(page) = self.pages.get_mut(key) {
                page.slot &= page.holds_something();
            }
        }
        MediumAnswer::Done
    }

    fn flush(&mut self, covers: u64) {
        for cell in self.pages.values_mut().flat_map(|p| &mut p.cells) {
            let flushed = cell.later.partition_point(|(effect, _)| *effect <= covers);
            if flushed > 0 {
                cell.durable = cell.later.drain(..flushed).next_back().expect("at least one").1;
            }
        }
    }

    /// What a reader of this copy would find now: state and stamp of a block.
    pub(super) fn block(&self, copy: CopyId, layer: LayerId, page: u64, block: u32) -> (BlockState, u64) {
        let Some(found) = self.pages.get(&PageKey { copy, layer, page }) else { return (BlockState::Absent, 0) };
        let version = found.cells[block as usize].current();
        let readable = version.state == BlockState::Present && !version.bad;
        let state = if version.bad { BlockState::Stale } else { version.state };
        (state, version.data.as_ref().filter(|_| readable).map_or(0, |d| super::stamp::first_word(d)))
    }

    /// The durable pending mark of a page.
    pub(super) fn is_pending(&self, copy: CopyId, layer: LayerId, page: u64) -> bool {
        self.pages.get(&PageKey { copy, layer, page }).is_some_and(|p| p.pending)
    }

    /// Ordinals that are durably known to miss a write of a page.
    pub(super) fn missed_by(&self, copy: CopyId, layer: LayerId, page: u64) -> u16 {
        self.pages.get(&PageKey { copy, layer, page }).map_or(0, |p| p.missed)
    }

    /// Whether a page is unsynced, by a flag of its own or by the mark of its layer.
    pub(super) fn is_page_unsynced(&self, copy: CopyId, layer: LayerId, page: u64) -> bool {
        let layers = self.copies.get(&copy).into_iter().flat_map(|c| &c.layers);
        let by_mark = layers.filter(|l| l.layer == layer).any(|l| page >= l.cursor);
        by_mark || self.pages.get(&PageKey { copy, layer, page }).is_some_and(|p| p.unsynced)
    }

    /// Pages of a copy that these ordinals miss a write of.
    pub(super) fn missed_pages(&self, copy: CopyId, ordinals: u16) -> Vec<u64> {
        self.pages.iter().filter(|(k, p)| k.copy == copy && p.missed & ordinals != 0).map(|(k, _)| k.page).collect()
    }

    /// Pages of a copy with the pending mark.
    pub(super) fn pending_pages(&self, copy: CopyId) -> Vec<u64> {
        self.pages.iter().filter(|(k, p)| k.copy == copy && p.pending).map(|(k, _)| k.page).collect()
    }

    /// Whether any page of a copy, of so many per layer, is out of date.
    pub(super) fn is_unsynced(&self, copy: CopyId, pages: u64) -> bool {
        let by_cursor = self.copies.get(&copy).is_some_and(|c| c.layers.iter().any(|l| l.cursor < pages));
        by_cursor || self.pages.iter().any(|(k, p)| k.copy == copy && p.unsynced)
    }

    /// What is durable of a volume.
    pub(super) fn blob(&self, volume: VolumeId) -> Option<VolumeBlob> {
        self.volumes.get(&volume).map(|bytes| read_blob(bytes).expect("a machine wrote it"))
    }

    pub(super) fn has_copy(&self, copy: CopyId) -> bool {
        self.copies.contains_key(&copy)
    }

    pub(super) fn copies(&self) -> impl Iterator<Item = &CopyRecord> {
        self.copies.values()
    }

    /// Rots a block that is present; whether there was one.
    pub(super) fn rot(&mut self, pick: u64) -> bool {
        let present = |cell: &&mut Cell| cell.current().state == BlockState::Present && !cell.current().bad;
        let mut cells: Vec<_> = self.pages.values_mut().flat_map(|p| &mut p.cells).filter(present).collect();
        if cells.is_empty() {
            return false;
        }
        let at = (pick % cells.len() as u64) as usize;
        cells[at].for_all(|version| version.bad = true);
        true
    }
}

/// The pages that an operation's effect is ordered with, and whether with all.
fn touched(what: &MediumOp) -> (Vec<PageKey>, bool) {
    match what {
        MediumOp::Load(page)
        | MediumOp::Read { page, .. }
        | MediumOp::Write { page, .. }
        | MediumOp::Shape { page, .. } => (vec![*page], false),
        MediumOp::Allocate(pages) | MediumOp::Release(pages) => (pages.clone(), false),
        MediumOp::NextPage { .. } | MediumOp::Flush => (Vec::new(), false),
        MediumOp::Commit(records) => {
            let pages: Vec<_> = records.iter().filter_map(records::page_of).collect();
            let whole = |r: &Record| {
                matches!(
                    r,
                    Record::MarkLayerUnsynced { .. }
                        | Record::TrustLayer { .. }
                        | Record::PutCopy(_)
                        | Record::DropCopy(_)
                        | Record::DropVolume(_)
                )
            };
            (pages, records.iter().any(whole))
        }
    }
}
