//! Space by credit (R8): a first write to a page leaves only within what every receiver has reserved.
//!
//! Invariant: ENOSPC comes only out of a `Reserve`, before any frame of the write was sent. Pages are known as allocated,
//! or paid for at the present handles, in one bit each; the driver counts what it has sent per handle, servers say the
//! total that they have reserved since the handle was opened. What the driver counts too much only costs a `Reserve`.

use std::collections::BTreeMap;

/// Pages in a row of the bit map.
const ROW_PAGES: u64 = 512;

/// What one handle has been promised and has used.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Credit {
    total: u64,
    spent: u64,
}

impl Credit {
    /// A new handle was opened with this credit.
    pub(super) fn opened(&mut self, total: u64) {
        *self = Self { total, spent: 0 };
    }

    /// A reply says the total; replies may overtake each other, and it never falls.
    pub(super) fn heard(&mut self, total: u64) {
        self.total = self.total.max(total);
    }

    /// Whether this many pages more are paid for.
    pub(super) fn covers(&self, pages: u64) -> bool {
        self.spent + pages <= self.total
    }

    /// Count pages that are sent.
    pub(super) fn spend(&mut self, pages: u64) {
        self.spent += pages;
    }
}

/// Pages that every writer of their group has, or has been paid for at its present handle.
#[derive(Debug, Default)]
pub(super) struct Allocated {
    rows: BTreeMap<(u32, u64), [u64; (ROW_PAGES / 64) as usize]>,
}

impl Allocated {
    pub(super) fn contains(&self, group: u32, page: u64) -> bool {
        let (word, bit) = place(page);
        self.rows.get(&(group, page / ROW_PAGES)).is_some_and(|row| row[word] & bit != 0)
    }

    pub(super) fn insert(&mut self, group: u32, page: u64) {
        let (word, bit) = place(page);
        self.rows.entry((group, page / ROW_PAGES)).or_default()[word] |= bit;
    }

    /// A discard may free it.
    pub(super) fn remove(&mut self, group: u32, page: u64) {
        let (word, bit) = place(page);
        if let Some(row) = self.rows.get_mut(&(group, page / ROW_PAGES)) {
            row[word] &= !bit;
        }
    }

    /// Other members, or another handle: nothing is known.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
    }
}

fn place(page: u64) -> (usize, u64) {
    let at = page % ROW_PAGES;
    ((at / 64) as usize, 1 << (at % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_known_until_it_is_discarded() {
        let mut pages = Allocated::default();
        pages.insert(1, 1000);
        assert!(pages.contains(1, 1000) && !pages.contains(0, 1000) && !pages.contains(1, 1001));
        pages.remove(1, 1000);
        assert!(!pages.contains(1, 1000));
    }

    #[test]
    fn credit_is_counted_from_the_opening_of_the_handle() {
        let mut credit = Credit::default();
        credit.opened(2);
        credit.spend(2);
        assert!(!credit.covers(1));
        credit.heard(3);
        credit.heard(2);
        assert!(credit.covers(1) && !credit.covers(2));
    }
}
