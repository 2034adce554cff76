//! Starting operations: what each of the contract's operations and records does to headers, cells and space.
//!
//! Invariant: everything that is changed here is logged in the transaction being gathered, in the order of the changes;
//! presence of data written in place is the exception and follows at the next flush (core/cycle.rs).

use super::{Busy, Core, Purpose, Unlogged};
use crate::store::catalog::Unseen;
use crate::store::codec::crc32c;
use crate::store::geometry::{BLOCK, UNIT_BLOCKS, UNITS_PER_SLAB, cell_block_of};
use crate::store::record::{CatalogChange, Redo};
use crate::store::space::SizeClass;
use crate::store::table::{ALL_STALE, Entry, runs_of, states_of};
use bytes::Bytes;
use lamina_protocol::layer::{BlockState, BlockStates, PageKey};
use lamina_protocol::storage_server::medium::{MediumAnswer, MediumOp, OpId, PageRecord};
use std::ops::Range;

/// How far ahead cells are fetched for operations that wait.
const LOOK_AHEAD: usize = 64;

/// Why an operation is not started.
pub(super) enum NotNow {
    /// Something under way comes first.
    Wait,
    /// No slot, and none on its way back.
    NoSpace,
}

impl Core {
    pub(super) fn start_operations(&mut self) {
        while !self.failed
            && let Some((op, what)) = self.fifo.pop_front()
        {
            if let Some(later) = self.start(op, what) {
                self.fifo.push_front((op, later));
                self.look_ahead();
                return;
            }
        }
    }

    /// Fetches cells for the operations in line, so that one miss is not paid after the other.
    fn look_ahead(&mut self) {
        let page_of = |(_, what): &(OpId, MediumOp)| match what {
            MediumOp::Load(page) | MediumOp::Read { page, .. } => Some(*page),
            MediumOp::Write { page, .. } | MediumOp::Shape { page, .. } => Some(*page),
            _ => None,
        };
        let pages: Vec<PageKey> = self.fifo.iter().take(LOOK_AHEAD).filter_map(page_of).collect();
        for page in pages {
            if let Some(number) = self.find(page)
                && let Some(home) = self.table.at(number).home()
            {
                let blocks = self.page_blocks(number);
                self.hold_cells(home, blocks);
            }
        }
    }

    /// Starts an operation; hands it back (or what is left of it) if it must wait.
    fn start(&mut self, op: OpId, what: MediumOp) -> Option<MediumOp> {
        let reads = matches!(what, MediumOp::Load(_) | MediumOp::Read { .. } | MediumOp::NextPage { .. });
        let changes = !reads && !matches!(what, MediumOp::Flush);
        if self.is_held() || changes && !self.has_room_for_changes() {
            return Some(what);
        }
        match what {
            MediumOp::Load(page) => self.load(op, page),
            MediumOp::Read { page, blocks } => self.read(op, page, blocks),
            MediumOp::Write { page, first, data } => self.write(op, page, first, data),
            MediumOp::Shape { page, changes } => self.shape(op, page, changes),
            MediumOp::Allocate(pages) => self.allocate(op, pages),
            MediumOp::Release(pages) => {
                pages.iter().for_each(|page| self.give_slot_back(*page));
                self.answer(op, MediumAnswer::Done);
                None
            }
            MediumOp::NextPage { copy, layer, from } => {
                let stack = self.catalog.stack_of(copy, layer);
                let next = stack.and_then(|stack| self.table.next_page(stack, from));
                self.answer(op, MediumAnswer::NextPage(next));
                None
            }
            MediumOp::Commit(records) => self.commit(op, records),
            MediumOp::Flush => {
                self.flushes.push(op);
                None
            }
        }
    }

    fn has_room_for_changes(&mut self) -> bool {
        let crowded = 4 * self.cells.stuck() >= 3 * self.cells.limit();
        let unlogged = self.unlogged.len() + self.logging.len() >= 2 * self.bounds.unlogged;
        self.has_journal_room() && self.has_room_to_gather() && !crowded && !unlogged
    }

    /// The number of the page's header.
    pub(super) fn find(&self, page: PageKey) -> Option<u32> {
        self.table.find(self.catalog.stack_of(page.copy, page.layer)?, page.page)
    }

    pub(super) fn stack_of(&self, page: PageKey) -> u32 {
        let stack = self.catalog.stack_of(page.copy, page.layer);
        stack.expect("the page logic answers NoCopy for a copy or layer that is not listed")
    }

    pub(super) fn page_bytes(&self, stack: u32) -> u32 {
        self.catalog.stack(stack).expect("a listed stack").page_bytes
    }

    pub(super) fn page_blocks(&self, number: u32) -> u32 {
        self.catalog.stack(self.table.at(number).stack).expect("a listed stack").blocks()
    }

    /// Whether the cells of these blocks are in the cache; fetches those that are not.
    pub(super) fn hold_cells(&mut self, home: u64, blocks: u32) -> bool {
        let mut held = true;
        for block in cell_block_of(home)..=cell_block_of(home + u64::from(blocks) - 1) {
            if self.cells.holds(block) {
                continue;
            }
            held = false;
            if self.loading.insert(block) {
                let kind = super::IoKind::Read { at: self.geo.cell_block_at(block), len: BLOCK as usize };
                self.io(Purpose::Cells(block), kind);
            }
        }
        held
    }

    pub(super) fn busy_on(&self, number: u32) -> Busy {
        self.busy.get(&number).copied().unwrap_or_default()
    }

    pub(super) fn end_read(&mut self, number: u32) {
        let busy = self.busy.get_mut(&number).expect("a read under way");
        busy.reads -= 1;
        if busy.reads + busy.writes == 0 {
            self.busy.remove(&number);
        }
    }

    pub(super) fn end_write(&mut self, number: u32) {
        let busy = self.busy.get_mut(&number).expect("a write under way");
        busy.writes -= 1;
        if busy.reads + busy.writes == 0 {
            self.busy.remove(&number);
        }
    }

    /// What marks say of a page's blocks, whatever their cells say (H7, I8); `None` = the cells are right.
    pub(super) fn unseen(&self, number: u32) -> Option<Unseen> {
        let entry = self.table.at(number);
        let own = (entry.flags & ALL_STALE != 0).then_some(Unseen::Stale);
        self.catalog.stack(entry.stack).expect("a listed stack").unseen(entry.seen).or(own)
    }

    /// The states of all blocks of a page. The cells of a page with a slot must be held.
    pub(super) fn view(&mut self, number: u32) -> BlockStates {
        let (blocks, unseen) = (self.page_blocks(number), self.unseen(number));
        if let Some(home) = self.table.at(number).home() {
            let mut states = BlockStates::absent(blocks);
            (0..blocks).for_each(|block| states.set(block, self.state_under(home + u64::from(block), unseen)));
            return states;
        }
        let mut states = states_of(self.table.runs(number), blocks);
        match unseen {
            Some(Unseen::Stale) => states.make_stale(),
            Some(Unseen::Trusted) => states.trust_stale(false),
            None => {}
        }
        states
    }

    fn load(&mut self, op: OpId, page: PageKey) -> Option<MediumOp> {
        let Some(number) = self.find(page) else {
            let blocks = self.page_bytes(self.stack_of(page)) / BLOCK as u32;
            let blocks = BlockStates::absent(blocks);
            let reserved = self.reserved.contains_key(&page);
            let record = PageRecord { allocated: true, blocks, unsynced: false, pending: false, missed: 0 };
            self.answer(op, MediumAnswer::Page(reserved.then_some(record)));
            return None;
        };
        let home = self.table.at(number).home();
        let blocks = self.page_blocks(number);
        if self.busy_on(number).writes > 0 || home.is_some_and(|home| !self.hold_cells(home, blocks)) {
            return Some(MediumOp::Load(page));
        }
        let blocks = self.view(number);
        let entry = self.table.at(number);
        let record = PageRecord {
            allocated: entry.slot().is_some() || self.reserved.contains_key(&page),
            blocks,
            unsynced: entry.has(crate::store::table::UNSYNCED),
            pending: entry.has(crate::store::table::PENDING),
            missed: entry.missed,
        };
        self.answer(op, MediumAnswer::Page(Some(record)));
        None
    }

    fn read(&mut self, op: OpId, page: PageKey, blocks: Range<u32>) -> Option<MediumOp> {
        let count = blocks.end - blocks.start;
        let found = self.find(page).and_then(|number| Some((number, self.table.at(number).home()?)));
        let Some((number, home)) = found else {
            let data = Bytes::from(vec![0; count as usize * BLOCK as usize]);
            self.answer(op, MediumAnswer::Data { data, bad: blocks.collect() });
            return None;
        };
        assert!(blocks.end <= self.page_blocks(number), "a read within its page");
        if !self.hold_cells(home, self.page_blocks(number)) {
            return Some(MediumOp::Read { page, blocks });
        }
        self.start_read(Some(op), number, home, blocks.start, count);
        None
    }

    fn write(&mut self, op: OpId, page: PageKey, first: u32, data: Bytes) -> Option<MediumOp> {
        let number = match self.slotted(page) {
            Ok(number) => number,
            Err(NotNow::Wait) => return Some(MediumOp::Write { page, first, data }),
            Err(NotNow::NoSpace) => {
                self.answer(op, MediumAnswer::NoSpace);
                return None;
            }
        };
        let blocks = (data.len() / BLOCK as usize) as u32;
        assert!(data.len().is_multiple_of(BLOCK as usize) && blocks > 0, "whole blocks");
        assert!(first + blocks <= self.page_blocks(number), "a write within its page");
        let home = self.table.at(number).home().expect("it has a slot") + u64::from(first);
        self.counts.writes += 1;
        self.busy.entry(number).or_default().writes += 1;
        if self.in_place {
            self.counts.write_bytes += data.len() as u64;
            let crcs = data.chunks(BLOCK as usize).map(crc32c).collect();
            self.pin_cells(home, blocks, true);
            let at = self.geo.home_at(home);
            self.write_io(Purpose::InPlace { op, number, home, crcs }, at, data);
            return None;
        }
        let room = self.bounds.data_blocks - self.gathering.data_blocks;
        let mut data = data;
        let part = data.split_to((room * BLOCK as usize).min(data.len()));
        let rest = (!data.is_empty()).then_some(data);
        let taken = self.write_through_journal(number, first, home, part, rest.is_none().then_some(op));
        rest.map(|data| MediumOp::Write { page, first: first + taken, data })
    }

    fn write_through_journal(&mut self, number: u32, first: u32, home: u64, part: Bytes, op: Option<OpId>) -> u32 {
        let blocks = (part.len() / BLOCK as usize) as u32;
        self.counts.write_bytes += part.len() as u64;
        let crcs: Vec<u32> = part.chunks(BLOCK as usize).map(crc32c).collect();
        self.forget_unlogged(home..home + u64::from(blocks));
        self.mark_verified(number, first..first + blocks);
        let lsn = self.lsn();
        (home..).zip(&crcs).for_each(|(at, crc)| self.cells.set(at, BlockState::Present, *crc, lsn));
        self.log(&Redo::Data { home, crcs });
        self.gathering.data.push((home, part));
        self.gathering.data_blocks += blocks as usize;
        self.gathering.writes.push((op, number));
        blocks
    }

    pub(super) fn in_place_done(&mut self, op: OpId, number: u32, home: u64, crcs: &[u32]) {
        let blocks = crcs.len() as u32;
        let first = (home - self.table.at(number).home().expect("a slot stays while it is written")) as u32;
        self.mark_verified(number, first..first + blocks);
        (home..).zip(crcs).for_each(|(at, crc)| self.note_unlogged(at, Unlogged { crc: *crc, number }));
        self.pin_cells(home, blocks, false);
        self.end_write(number);
        self.answer(op, MediumAnswer::Done);
    }

    /// The page's header with a slot, its cells held and up to its marks; takes a slot if it has none.
    fn slotted(&mut self, page: PageKey) -> Result<u32, NotNow> {
        let stack = self.stack_of(page);
        let blocks = self.catalog.stack(stack).expect("listed").blocks();
        if let Some(number) = self.table.find(stack, page.page)
            && let Some(home) = self.table.at(number).home()
        {
            if !self.hold_cells(home, blocks) {
                return Err(NotNow::Wait);
            }
            self.materialise(number);
            return Ok(number);
        }
        let slot = self.reserve_slot(page, stack)?;
        let home = u64::from(slot) * UNIT_BLOCKS;
        if !self.hold_cells(home, blocks) {
            return Err(NotNow::Wait);
        }
        let number = match self.table.find(stack, page.page) {
            Some(number) => number,
            None => self.table.free_number(self.geo.entries()).ok_or(NotNow::NoSpace)?,
        };
        self.reserved.remove(&page);
        self.give_slot(number, stack, page.page, slot);
        Ok(number)
    }

    /// A slot for the page in memory alone, kept in `reserved`.
    fn reserve_slot(&mut self, page: PageKey, stack: u32) -> Result<u32, NotNow> {
        if let Some(slot) = self.reserved.get(&page) {
            return Ok(*slot);
        }
        let Some(taken) = self.space.take(SizeClass::of(self.page_bytes(stack))) else {
            if self.limbo.is_empty() && self.gathering.freed.is_empty() {
                return Err(NotNow::NoSpace);
            }
            self.want_sync = true;
            return Err(NotNow::Wait);
        };
        if taken.fresh_slab {
            let slab = taken.slot / UNITS_PER_SLAB;
            self.log(&Redo::Slab(slab));
            let lsn = self.lsn();
            self.cells.fresh(2 * slab, lsn);
            self.cells.fresh(2 * slab + 1, lsn);
        }
        self.reserved.insert(page, taken.slot);
        Ok(taken.slot)
    }

    /// Moves the page's states from its header to the cells of its new slot.
    fn give_slot(&mut self, number: u32, stack: u32, page: u64, slot: u32) {
        let kept = self.catalog.stack(stack).expect("listed");
        let (mark, blocks) = (kept.mark, kept.blocks());
        let is_new = self.table.find(stack, page).is_none();
        let states = if is_new { BlockStates::absent(blocks) } else { self.view(number) };
        let mut entry = if is_new { Entry::new(stack, page, mark) } else { *self.table.at(number) };
        (entry.seen, entry.flags) = (mark, entry.flags & !ALL_STALE);
        let home = u64::from(slot) * UNIT_BLOCKS;
        self.set_states(home, 0..blocks, BlockState::Absent);
        for (range, state) in states.runs(0..blocks) {
            if state == BlockState::Stale {
                // Without a slot nothing was kept but holes.
                self.set_states(home, range.clone(), BlockState::Hole);
            }
            if state != BlockState::Absent {
                self.set_states(home, range, state);
            }
        }
        self.put_header(number, entry.with_slot(Some(slot)), &[]);
    }

    pub(super) fn put_header(&mut self, number: u32, entry: Entry, runs: &[u16]) {
        let lsn = self.lsn();
        self.log(&Redo::Header { number, entry, runs: runs.to_vec() });
        self.table.put(number, entry, runs, lsn);
    }

    /// Logs and sets states of a slot's blocks.
    pub(super) fn set_states(&mut self, page_home: u64, blocks: Range<u32>, state: BlockState) {
        let (home, lsn) = (page_home + u64::from(blocks.start), self.lsn());
        let count = blocks.end - blocks.start;
        if count == 0 {
            return;
        }
        self.log(&Redo::Shape { home, blocks: count, state });
        (home..home + u64::from(count)).for_each(|at| self.cells.set_state(at, state, lsn));
    }

    /// Writes into the cells what the marks say (H7), so that the page can change. The cells must be held.
    pub(super) fn materialise(&mut self, number: u32) {
        let Some(unseen) = self.unseen(number) else { return };
        let states = self.view(number);
        let mut entry = *self.table.at(number);
        entry.seen = self.catalog.stack(entry.stack).expect("listed").mark;
        entry.flags &= !ALL_STALE;
        let Some(home) = entry.home() else {
            let runs = runs_of(&states).expect("staleness joins runs, it makes none");
            return self.put_header(number, entry, &runs);
        };
        match unseen {
            Unseen::Stale => {
                for (range, _) in states.runs(0..states.len()).into_iter().filter(|run| run.1 == BlockState::Stale) {
                    self.set_states(home, range, BlockState::Stale);
                }
            }
            // The cells themselves, also of what was written and is not logged yet: a crash may lose that.
            Unseen::Trusted => {
                for block in 0..states.len() {
                    let at = home + u64::from(block);
                    let trusted = self.cells.trusted(at);
                    if trusted != self.cells.of(at).0 {
                        self.set_states(home, block..block + 1, trusted);
                    }
                }
            }
        }
        self.put_header(number, entry, &[]);
    }

    fn shape(&mut self, op: OpId, page: PageKey, changes: Vec<(Range<u32>, BlockState)>) -> Option<MediumOp> {
        let stack = self.stack_of(page);
        let found = self.table.find(stack, page.page);
        if found.is_some_and(|number| self.busy_on(number) != Busy::default()) {
            return Some(MediumOp::Shape { page, changes });
        }
        let slotless = found.is_none_or(|number| self.table.at(number).slot().is_none());
        if slotless && self.shape_header(page, stack, found, &changes) {
            self.answer(op, MediumAnswer::Done);
            return None;
        }
        if changes.iter().any(|(_, state)| *state == BlockState::Stale) && !self.is_page_logged(page) {
            return Some(MediumOp::Shape { page, changes });
        }
        match self.slotted(page) {
            Err(NotNow::Wait) => return Some(MediumOp::Shape { page, changes }),
            Err(NotNow::NoSpace) => self.answer(op, MediumAnswer::NoSpace),
            Ok(number) => {
                self.shape_slot(number, changes);
                self.answer(op, MediumAnswer::Done);
            }
        }
        None
    }

    /// Shapes a page without a slot; false if it needs one now.
    fn shape_header(
        &mut self,
        page: PageKey,
        stack: u32,
        found: Option<u32>,
        changes: &[(Range<u32>, BlockState)],
    ) -> bool {
        let kept = self.catalog.stack(stack).expect("listed");
        let (mark, blocks) = (kept.mark, kept.blocks());
        let mut states = found.map_or(BlockStates::absent(blocks), |number| self.view(number));
        changes.iter().for_each(|(range, state)| states.set_range(range.clone(), *state));
        let Some(runs) = runs_of(&states) else { return false };
        let mut entry = found.map_or(Entry::new(stack, page.page, mark), |number| *self.table.at(number));
        (entry.seen, entry.flags) = (mark, entry.flags & !ALL_STALE);
        match found.or_else(|| self.table.free_number(self.geo.entries())) {
            Some(_) if found.is_none() && runs.is_empty() => true,
            Some(number) => {
                self.put_or_drop(number, entry, &runs);
                true
            }
            None => false,
        }
    }

    /// Puts the header of a page without a slot, or lets it go when it says nothing (R9).
    pub(super) fn put_or_drop(&mut self, number: u32, entry: Entry, runs: &[u16]) {
        let says_nothing = entry.slot().is_none() && runs.is_empty() && entry.flags == 0 && entry.missed == 0;
        let kept = if says_nothing { Entry::FREE } else { entry };
        self.put_header(number, kept, runs);
    }

    fn shape_slot(&mut self, number: u32, changes: Vec<(Range<u32>, BlockState)>) {
        let home = self.table.at(number).home().expect("it has a slot");
        for (range, state) in changes {
            assert!(state != BlockState::Present, "presence comes with data");
            assert!(range.end <= self.page_blocks(number), "a shape within its page");
            let at = home + u64::from(range.start)..home + u64::from(range.end);
            self.forget_unlogged(at.clone());
            if state != BlockState::Stale {
                self.forget_moved(at);
            }
            self.set_states(home, range, state);
        }
        let states = self.view(number);
        let kept = states.any(BlockState::Present) || states.any(BlockState::Stale);
        if let Some(runs) = runs_of(&states).filter(|_| !kept) {
            self.free_slot(number);
            let entry = self.table.at(number).with_slot(None);
            self.put_or_drop(number, entry, &runs);
        }
    }

    /// The slot goes; its header is changed by the caller.
    pub(super) fn free_slot(&mut self, number: u32) {
        let entry = *self.table.at(number);
        let (Some(slot), Some(home)) = (entry.slot(), entry.home()) else { return };
        let page_bytes = self.page_bytes(entry.stack);
        let blocks = home..home + u64::from(page_bytes) / BLOCK;
        self.forget_unlogged(blocks.clone());
        self.forget_moved(blocks);
        self.suspect.remove(&number);
        self.gathering.freed.push((slot, page_bytes));
    }

    pub(super) fn forget_unlogged(&mut self, blocks: Range<u64>) {
        for (home, _) in take_range(&mut self.unlogged, blocks.clone()) {
            self.cells.unpin(cell_block_of(home));
        }
        for (home, _) in take_range(&mut self.logging, blocks) {
            self.cells.unpin(cell_block_of(home));
        }
    }

    fn forget_moved(&mut self, blocks: Range<u64>) {
        take_range(&mut self.overlay, blocks);
    }

    fn allocate(&mut self, op: OpId, pages: Vec<PageKey>) -> Option<MediumOp> {
        let mut taken: Vec<PageKey> = Vec::new();
        for page in &pages {
            let has_slot = self.find(*page).is_some_and(|number| self.table.at(number).slot().is_some());
            if has_slot || self.reserved.contains_key(page) {
                continue;
            }
            let refused = self.reserve_slot(*page, self.stack_of(*page)).err();
            let Some(refused) = refused else {
                taken.push(*page);
                continue;
            };
            taken.into_iter().for_each(|page| self.give_slot_back(page));
            return match refused {
                NotNow::Wait => Some(MediumOp::Allocate(pages)),
                NotNow::NoSpace => {
                    self.answer(op, MediumAnswer::NoSpace);
                    None
                }
            };
        }
        self.answer(op, MediumAnswer::Done);
        None
    }

    /// A slot that is the page's in memory alone is free again.
    pub(super) fn give_slot_back(&mut self, page: PageKey) {
        if let Some(slot) = self.reserved.remove(&page) {
            self.space.release(slot, SizeClass::of(self.page_bytes(self.stack_of(page))));
        }
    }

    pub(super) fn change_catalog(&mut self, change: CatalogChange) -> Vec<u32> {
        self.catalog_dirty = true;
        let leaving = change.apply(&mut self.catalog);
        self.log(&Redo::Catalog(change));
        leaving
    }
}

/// Takes the entries of a range out of a map.
fn take_range<V: Copy>(map: &mut std::collections::BTreeMap<u64, V>, range: Range<u64>) -> Vec<(u64, V)> {
    let taken: Vec<(u64, V)> = map.range(range).map(|(key, value)| (*key, *value)).collect();
    taken.iter().for_each(|(key, _)| {
        map.remove(key);
    });
    taken
}
