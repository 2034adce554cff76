//! Commits: records that carry no data, all or none, in one transaction.
//!
//! Invariant: a commit is applied whole in one go, so that it lies in one transaction; whatever it must wait for (cells,
//! transfers under way, checksums of a suspect page) is waited for before its first record is applied.

use super::{Busy, Core};
use crate::store::record::CatalogChange;
use crate::store::table::{ALL_STALE, Entry, PENDING, UNSYNCED, runs_of};
use lamina_protocol::layer::{BlockState, BlockStates, PageKey};
use lamina_protocol::storage_server::medium::{CopyRecord, MediumAnswer, MediumOp, OpId, Record};

/// What a record takes in a transaction at most, its blob apart.
const RECORD_BYTES: usize = 80;
/// Part of the catalog that copies are not taken in for.
const CATALOG_RESERVE_DIVISOR: u64 = 16;

fn record_bytes(record: &Record) -> usize {
    RECORD_BYTES
        + match record {
            Record::PutVolume { blob, .. } => blob.len(),
            Record::PutCopy(copy) => copy.layers.len() * 28,
            Record::Stale { blocks, .. } => blocks.len() * 16,
            _ => 0,
        }
}

impl Core {
    pub(super) fn commit(&mut self, op: OpId, records: Vec<Record>) -> Option<MediumOp> {
        let bytes: usize = records.iter().map(record_bytes).sum();
        assert!(bytes <= self.bounds.commit, "a commit of {bytes} bytes, at most {}", self.bounds.commit);
        // All of them, so that what each waits for is under way at once.
        let waiting = records.iter().filter(|record| !self.is_ready(record)).count();
        if waiting > 0 {
            return Some(MediumOp::Commit(records));
        }
        if !self.has_room_for(&records) {
            self.answer(op, MediumAnswer::NoSpace);
            return None;
        }
        records.into_iter().for_each(|record| self.apply(record));
        self.gathering.commits.push(op);
        None
    }

    /// Headers and catalog have room for what the records may add. What replaces what is there needs no more room.
    fn has_room_for(&self, records: &[Record]) -> bool {
        let adds_header = |record: &&Record| match record {
            Record::Pending { page, set: true }
            | Record::Missed { page, .. }
            | Record::MarkUnsynced(page)
            | Record::Stale { page, .. } => self.find(*page).is_none(),
            _ => false,
        };
        let adds_bytes = |record: &Record| match record {
            Record::PutVolume { volume, blob } => match self.catalog.blob_bytes(*volume) {
                Some(kept) => blob.len().saturating_sub(kept),
                None => record_bytes(record),
            },
            Record::PutCopy(_) => record_bytes(record),
            _ => 0,
        };
        let bytes: usize = records.iter().map(adds_bytes).sum();
        let headers = records.iter().filter(adds_header).count();
        // Maps of volumes that are there may grow beside the copies that are taken in.
        let takes_in = records.iter().any(|record| matches!(record, Record::PutCopy(_)));
        let reserve = if takes_in { self.geo.catalog_bytes / CATALOG_RESERVE_DIVISOR } else { 0 };
        let catalog_fits =
            bytes == 0 || (self.catalog.encoded_len() + bytes) as u64 + reserve <= self.geo.catalog_bytes;
        let headers_fit = headers == 0 || self.table.used() as usize + headers <= self.geo.entries() as usize;
        catalog_fits && headers_fit
    }

    /// Whether a record can be applied now; starts what it waits for.
    fn is_ready(&mut self, record: &Record) -> bool {
        let idle = |core: &Self, page: &PageKey| core.find(*page).is_none_or(|n| core.busy_on(n) == Busy::default());
        match record {
            Record::DropPage(page) => idle(self, page),
            Record::MarkUnsynced(page) => idle(self, page) && self.is_page_logged(*page),
            Record::Stale { page, .. } => {
                let slot = self.find(*page).and_then(|n| Some((self.table.at(n).home()?, self.page_blocks(n))));
                let held = idle(self, page) && slot.is_none_or(|(home, blocks)| self.hold_cells(home, blocks));
                held && self.is_page_logged(*page)
            }
            Record::Pending { page, set: false } => {
                self.find(*page).is_none_or(|number| self.is_whole_page_verified(number))
            }
            Record::MarkLayerUnsynced { copy, layer } => {
                let stack = self.catalog.stack_of(*copy, *layer).expect("a listed layer");
                self.busy.is_empty() && self.is_layer_logged(stack)
            }
            Record::TrustLayer { .. } | Record::PutCopy(_) | Record::DropCopy(_) => self.busy.is_empty(),
            _ => true,
        }
    }

    /// Whether all that was written to the page is in the journal with its checksum; flushes if not. What becomes stale
    /// keeps its content for a force (I8), and content without its checksum is worth nothing.
    pub(super) fn is_page_logged(&mut self, page: PageKey) -> bool {
        let Some(number) = self.find(page) else { return true };
        let Some(home) = self.table.at(number).home() else { return true };
        let range = home..home + u64::from(self.page_blocks(number));
        let open = self.unlogged.range(range.clone()).chain(self.logging.range(range)).next().is_some();
        self.spill |= open;
        !open
    }

    /// The same for all pages of a layer of a copy.
    fn is_layer_logged(&mut self, stack: u32) -> bool {
        let mut open = self.unlogged.values().chain(self.logging.values());
        let open = open.any(|unlogged| self.table.at(unlogged.number).stack == stack);
        self.spill |= open;
        !open
    }

    fn apply(&mut self, record: Record) {
        match record {
            Record::Pending { page, set } => self.set_pending(page, set),
            Record::Missed { page, mask } => self.change_header(page, mask != 0, |entry| entry.missed = mask),
            Record::MarkUnsynced(page) => self.mark_unsynced(page),
            Record::ClearUnsynced(page) => self.change_header(page, false, |entry| entry.set(UNSYNCED, false)),
            Record::MarkLayerUnsynced { copy, layer } => {
                let stack = self.catalog.stack_of(copy, layer).expect("a listed layer");
                self.mark_layer_unsynced(stack);
            }
            Record::TrustLayer { copy, layer } => {
                let stack = self.catalog.stack_of(copy, layer).expect("a listed layer");
                let mark = self.catalog.stack(stack).expect("listed").next_trust();
                self.change_catalog(CatalogChange::Mark { stack, mark });
                self.change_catalog(CatalogChange::Cursor { stack, cursor: u64::MAX });
            }
            Record::Cursor { copy, layer, cursor } => {
                let stack = self.catalog.stack_of(copy, layer).expect("a listed layer");
                self.change_catalog(CatalogChange::Cursor { stack, cursor });
            }
            Record::Stale { page, blocks } => self.make_blocks_stale(page, &blocks),
            Record::DropPage(page) => self.drop_page(page),
            Record::PutCopy(copy) => self.put_copy(copy),
            Record::DropCopy(copy) => {
                let leaving = self.catalog.stacks_of(copy);
                self.let_pages_go(&leaving);
                self.change_catalog(CatalogChange::DropCopy(copy));
            }
            Record::PutVolume { volume, blob } => {
                self.change_catalog(CatalogChange::PutVolume(volume, blob));
            }
            Record::DropVolume(volume) => {
                self.change_catalog(CatalogChange::DropVolume(volume));
            }
            Record::LeaseNumber(number) => {
                self.change_catalog(CatalogChange::Lease(number));
            }
        }
    }

    /// Changes the page's header, made if need be and `make` says so; unchanged headers are not logged again.
    fn change_header(&mut self, page: PageKey, make: bool, change: impl FnOnce(&mut Entry)) {
        let stack = self.stack_of(page);
        let found = self.table.find(stack, page.page);
        if found.is_none() && !make {
            return;
        }
        let mark = self.catalog.stack(stack).expect("listed").mark;
        let before = found.map_or(Entry::new(stack, page.page, mark), |number| *self.table.at(number));
        let mut entry = before;
        change(&mut entry);
        if found.is_some() && entry == before {
            return;
        }
        let number = found.or_else(|| self.table.free_number(self.geo.entries())).expect("room was looked for");
        let runs = if found.is_some() { self.table.runs(number).to_vec() } else { Vec::new() };
        self.put_or_drop(number, entry, &runs);
    }

    fn set_pending(&mut self, page: PageKey, set: bool) {
        if !set && let Some(number) = self.find(page) {
            self.suspect.remove(&number);
        }
        self.change_header(page, set, |entry| entry.set(PENDING, set));
    }

    fn mark_unsynced(&mut self, page: PageKey) {
        let slotless = self.find(page).is_some_and(|number| self.table.at(number).slot().is_none());
        let mark = self.catalog.stack(self.stack_of(page)).expect("listed").mark;
        self.change_header(page, true, |entry| {
            // All is stale now, whatever an earlier mark said of it.
            entry.seen = mark;
            entry.set(UNSYNCED, true);
            entry.set(ALL_STALE, entry.slot().is_some() || slotless);
        });
        if slotless && let Some(number) = self.find(page) {
            self.materialise(number);
        }
    }

    fn mark_layer_unsynced(&mut self, stack: u32) {
        let mark = self.catalog.stack(stack).expect("listed").next_mark();
        self.change_catalog(CatalogChange::Mark { stack, mark });
    }

    fn make_blocks_stale(&mut self, page: PageKey, blocks: &[u32]) {
        if let Some(number) = self.find(page)
            && let Some(home) = self.table.at(number).home()
        {
            self.materialise(number);
            for block in blocks {
                self.set_states(home, *block..block + 1, BlockState::Stale);
            }
            return;
        }
        let stack = self.stack_of(page);
        let found = self.table.find(stack, page.page);
        let kept = self.catalog.stack(stack).expect("listed");
        let (mark, count) = (kept.mark, kept.blocks());
        let mut states = found.map_or(BlockStates::absent(count), |number| self.view(number));
        blocks.iter().for_each(|block| states.set(*block, BlockState::Stale));
        // Without a slot there is no content to keep; where the runs do not fit, all that is not absent is stale.
        let runs = runs_of(&states).unwrap_or_else(|| vec![BlockState::Stale as u16]);
        let mut entry = found.map_or(Entry::new(stack, page.page, mark), |number| *self.table.at(number));
        (entry.seen, entry.flags) = (mark, entry.flags & !ALL_STALE);
        let number = found.or_else(|| self.table.free_number(self.geo.entries())).expect("room was looked for");
        self.put_or_drop(number, entry, &runs);
    }

    fn drop_page(&mut self, page: PageKey) {
        self.give_slot_back(page);
        if let Some(number) = self.find(page) {
            self.free_slot(number);
            self.suspect.remove(&number);
            self.put_header(number, Entry::FREE, &[]);
        }
    }

    fn put_copy(&mut self, record: CopyRecord) {
        let leaving = self.catalog.leaving(&record);
        self.let_pages_go(&leaving);
        self.change_catalog(CatalogChange::PutCopy(record));
    }

    /// All pages of these stacks go. Their headers are not logged one by one: the catalog's record says it.
    fn let_pages_go(&mut self, stacks: &[u32]) {
        let lsn = self.lsn();
        for stack in stacks {
            let numbers: Vec<u32> = self.table.pages(*stack).map(|(_, number)| number).collect();
            for number in numbers {
                self.free_slot(number);
                self.suspect.remove(&number);
                self.table.put(number, Entry::FREE, &[], lsn);
            }
            self.table.forget_stack(*stack);
            let kept = self.catalog.stack(*stack).expect("listed");
            let (copy, layer, page_bytes) = (kept.copy, kept.layer, kept.page_bytes);
            let gone = |page: &&PageKey| (page.copy, page.layer) == (copy, layer);
            let reserved: Vec<PageKey> = self.reserved.keys().filter(gone).copied().collect();
            for page in reserved {
                let slot = self.reserved.remove(&page).expect("listed a moment ago");
                self.space.release(slot, crate::store::space::SizeClass::of(page_bytes));
            }
        }
    }
}
