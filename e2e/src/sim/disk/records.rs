//! What each durable record does to the fake disk.

use super::{Cell, Disk, DiskPage, Version};
use lamina_protocol::layer::{BlockState, PageKey};
use lamina_protocol::storage_server::medium::Record;

/// The page that a record is about, if it is about one.
pub(super) fn page_of(record: &Record) -> Option<PageKey> {
    match record {
        Record::Pending { page, .. } | Record::Missed { page, .. } | Record::Stale { page, .. } => Some(*page),
        Record::MarkUnsynced(page) | Record::ClearUnsynced(page) | Record::DropPage(page) => Some(*page),
        _ => None,
    }
}

fn make_stale(page: &mut DiskPage) {
    let stale = |version: &mut Version| {
        if version.state != BlockState::Absent {
            version.become_stale();
        }
    };
    for cell in &mut page.cells {
        cell.for_all(stale);
    }
}

fn trust_stale(page: &mut DiskPage) {
    let slot = page.slot;
    for cell in &mut page.cells {
        cell.for_all(|version| version.trust(slot));
    }
}

impl Disk {
    pub(super) fn commit(&mut self, record: Record) {
        match record {
            Record::Pending { page, set } => self.with_page(page, |p| p.pending = set),
            Record::Missed { page, mask } => self.with_page(page, |p| p.missed = mask),
            Record::MarkUnsynced(page) => self.with_page(page, |p| {
                make_stale(p);
                p.unsynced = true;
            }),
            Record::ClearUnsynced(page) => {
                self.look_at_synced(page);
                self.with_page(page, |p| p.unsynced = false);
            }
            Record::Stale { page, blocks } => self.with_page(page, |p| {
                for block in blocks {
                    p.cells[block as usize].for_all(Version::become_stale);
                }
            }),
            Record::DropPage(page) => {
                self.pages.remove(&page);
            }
            Record::MarkLayerUnsynced { copy, layer } => {
                for (_, page) in self.pages.iter_mut().filter(|(k, _)| k.copy == copy && k.layer == layer) {
                    make_stale(page);
                }
                self.set_cursor(copy, layer, 0);
            }
            Record::TrustLayer { copy, layer } => {
                for (_, page) in self.pages.iter_mut().filter(|(k, _)| k.copy == copy && k.layer == layer) {
                    trust_stale(page);
                }
                self.set_cursor(copy, layer, u64::MAX);
            }
            Record::Cursor { copy, layer, cursor } => {
                let layers = self.copies.get(&copy).into_iter().flat_map(|c| &c.layers);
                let from = layers.filter(|l| l.layer == layer).map(|l| l.cursor).next().unwrap_or(cursor);
                let keys = self.pages.keys().filter(|k| k.copy == copy && k.layer == layer);
                let passed = keys.filter(|k| (from..cursor).contains(&k.page)).copied();
                for page in passed.collect::<Vec<_>>() {
                    self.look_at_synced(page);
                }
                self.set_cursor(copy, layer, cursor);
            }
            Record::PutCopy(mut put) => {
                if let Some(old) = self.copies.get(&put.copy) {
                    for layer in &mut put.layers {
                        if let Some(had) = old.layers.iter().find(|l| l.layer == layer.layer) {
                            layer.cursor = had.cursor;
                        }
                    }
                }
                self.pages.retain(|k, _| k.copy != put.copy || put.layers.iter().any(|l| l.layer == k.layer));
                self.copies.insert(put.copy, put);
            }
            Record::DropCopy(copy) => {
                self.copies.remove(&copy);
                self.pages.retain(|k, _| k.copy != copy);
            }
            Record::PutVolume { volume, blob } => {
                self.volumes.insert(volume, blob);
            }
            Record::DropVolume(volume) => {
                self.volumes.remove(&volume);
            }
            Record::LeaseNumber(number) => self.lease_number = self.lease_number.max(number),
        }
    }

    fn with_page(&mut self, key: PageKey, change: impl FnOnce(&mut DiskPage)) {
        // A record about a page of a copy that was dropped meanwhile has nothing to act on.
        if let Some(page) = self.page_mut(key) {
            change(page);
            if !page.has_entry() {
                self.pages.remove(&key);
            }
        }
    }

    /// H11c: what a fill made of the stale blocks of a page is durable before the page is synced.
    fn look_at_synced(&mut self, key: PageKey) {
        let volatile = |cell: &Cell| cell.durable.state == BlockState::Stale && !cell.later.is_empty();
        if self.pages.get(&key).is_some_and(|page| page.cells.iter().any(volatile)) {
            self.synced_early = Some(key);
        }
    }

    fn set_cursor(&mut self, copy: lamina_protocol::ids::CopyId, layer: lamina_protocol::ids::LayerId, cursor: u64) {
        let layers = self.copies.get_mut(&copy).into_iter().flat_map(|c| &mut c.layers);
        for found in layers.filter(|l| l.layer == layer) {
            found.cursor = cursor;
        }
    }
}

impl Cell {
    /// Keeps one version; the others never were.
    pub(super) fn settle_on(&mut self, pick: usize) {
        if pick < self.later.len() {
            self.durable = self.later.swap_remove(pick).1;
        }
        self.later.clear();
    }
}
