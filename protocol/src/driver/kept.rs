//! What was acknowledged and is not yet flushed (H5), and the watermark `confirmed` (PROTOCOL.md §5).
//!
//! Invariants: every acknowledged change is kept until a flush that was sent after its acknowledgement has been answered
//! by all members, and what is not flushed lies on a bounded number of pages, for members have those pending; `confirmed`
//! never passes a write that is not acknowledged, or that ended in anything but success on all members.

use crate::ids::Seq;
use crate::limits::MAX_PENDING_PAGES;
use crate::mutants::{Mutant, on};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What an entry costs beside its data, bytes.
const ENTRY_BYTES: u64 = 64;

/// A change that can be written again.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write { address: u64, data: Bytes },
    Discard { address: u64, length: u64 },
}

impl Change {
    /// What keeping it costs, bytes.
    pub(super) fn cost(data_bytes: usize) -> u64 {
        data_bytes as u64 + ENTRY_BYTES
    }

    fn own_cost(&self) -> u64 {
        match self {
            Self::Write { data, .. } => Self::cost(data.len()),
            Self::Discard { .. } => Self::cost(0),
        }
    }
}

/// The log of acknowledged, unflushed changes, in the order of their acknowledgement.
#[derive(Debug)]
pub(super) struct Kept {
    log: VecDeque<(u64, Change)>,
    bytes: u64,
    /// Of writes under way, which will be kept once they are acknowledged.
    under_way: u64,
    limit: u64,
    /// Changes ever acknowledged.
    acks: u64,
    /// Of those, how many are known to be flushed.
    flushed: u64,
    /// Pages, by group and number, with the last acknowledged change of each that is not flushed.
    pages: BTreeMap<(u32, u64), u64>,
}

impl Kept {
    pub(super) fn new(limit: u64) -> Self {
        Self { log: VecDeque::new(), bytes: 0, under_way: 0, limit, acks: 0, flushed: 0, pages: BTreeMap::new() }
    }

    /// Count a write that starts, if there is room; one alone is always let in.
    pub(super) fn admit(&mut self, cost: u64) -> bool {
        let used = self.bytes + self.under_way;
        let few = self.pages.len() < MAX_PENDING_PAGES;
        let fits = used == 0 || used + cost <= self.limit && few;
        if fits {
            self.under_way += cost;
        }
        fits
    }

    /// A write that was admitted ended without acknowledgement.
    pub(super) fn release(&mut self, cost: u64) {
        self.under_way -= cost;
    }

    /// A change that was admitted at this cost is acknowledged; `None` = it need not be written again (H5: volumes of
    /// several sessions).
    pub(super) fn acknowledge(&mut self, cost: u64, change: Option<Change>) {
        self.under_way -= cost;
        self.acks += 1;
        if let Some(change) = change.filter(|_| !on(Mutant::KeptDropped)) {
            self.bytes += change.own_cost();
            self.log.push_back((self.acks, change));
        }
    }

    /// The change that was acknowledged last touched these pages; all beyond the bound are as good as one more.
    pub(super) fn touch(&mut self, pages: impl Iterator<Item = (u32, u64)>) {
        self.pages.extend(pages.take(MAX_PENDING_PAGES).map(|page| (page, self.acks)));
    }

    /// The number of the last acknowledgement: what a flush that is sent now will cover.
    pub(super) fn acks(&self) -> u64 {
        self.acks
    }

    /// A flush that was sent after this many acknowledgements was answered by all.
    pub(super) fn flushed(&mut self, acks: u64) {
        self.flushed = self.flushed.max(acks);
        while let Some((_, change)) = self.log.pop_front_if(|(number, _)| *number <= acks) {
            self.bytes -= change.own_cost();
        }
        self.pages.retain(|_, last| *last > acks);
    }

    /// Whether something acknowledged is not known to be flushed.
    pub(super) fn unflushed(&self) -> bool {
        self.acks > self.flushed
    }

    /// Whether so much is kept that a flush should make room.
    pub(super) fn presses(&self) -> bool {
        self.bytes >= self.limit / 2 || self.pages.len() >= MAX_PENDING_PAGES / 2
    }

    /// All that must be written again after a loss, in order.
    pub(super) fn changes(&self) -> impl Iterator<Item = &Change> {
        self.log.iter().map(|(_, change)| change)
    }
}

/// The numbers of write attempts and how far they are confirmed.
#[derive(Debug, Default)]
pub(super) struct Seqs {
    last: Seq,
    /// First number of each write that has not succeeded; one that failed stays for ever.
    unresolved: BTreeSet<Seq>,
    confirmed: Seq,
}

impl Seqs {
    /// A new number.
    pub(super) fn take(&mut self) -> Seq {
        self.last = self.last.next();
        self.last
    }

    /// A write has begun with this number.
    pub(super) fn begin(&mut self, first: Seq) {
        self.unresolved.insert(first);
    }

    /// It has succeeded on all members.
    pub(super) fn succeed(&mut self, first: Seq) {
        let known = self.unresolved.remove(&first);
        assert!(known, "a write succeeds once");
    }

    /// All numbers up to this one belong to writes that have succeeded.
    pub(super) fn acknowledged(&self) -> Seq {
        let unresolved = self.unresolved.first().filter(|_| !on(Mutant::ConfirmedUnfinished));
        unresolved.map_or(self.last, |first| Seq(first.0 - 1))
    }

    /// A flush that was sent when [`Self::acknowledged`] was this was answered by all.
    pub(super) fn confirm(&mut self, covers: Seq) {
        self.confirmed = self.confirmed.max(covers);
    }

    /// What every request header carries.
    pub(super) fn confirmed(&self) -> Seq {
        self.confirmed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confirmed_never_passes_a_write_that_did_not_succeed() {
        let mut seqs = Seqs::default();
        let (a, b, c) = (seqs.take(), seqs.take(), seqs.take());
        for seq in [a, b, c] {
            seqs.begin(seq);
        }
        seqs.succeed(a);
        seqs.succeed(c);
        assert_eq!(seqs.acknowledged(), a);
        seqs.succeed(b);
        assert_eq!(seqs.acknowledged(), c);
    }

    #[test]
    fn what_is_acknowledged_after_a_flush_was_sent_stays_kept() {
        let mut kept = Kept::new(1 << 20);
        for address in [0, 4096] {
            assert!(kept.admit(Change::cost(4096)));
            let change = Change::Write { address, data: Bytes::from(vec![1; 4096]) };
            kept.acknowledge(Change::cost(4096), Some(change));
        }
        kept.flushed(1);
        assert_eq!(kept.changes().count(), 1);
        assert!(kept.unflushed());
        kept.flushed(2);
        assert!(!kept.unflushed() && kept.changes().count() == 0 && kept.bytes == 0);
    }

    #[test]
    fn pages_that_members_have_pending_are_bounded_and_those_of_old_writes_go_first() {
        let mut kept = Kept::new(1 << 30);
        for page in 0..MAX_PENDING_PAGES as u64 {
            assert!(kept.admit(1));
            kept.acknowledge(1, None);
            kept.touch([(0, page), (0, 0)].into_iter());
            assert_eq!(kept.presses(), page + 1 >= MAX_PENDING_PAGES as u64 / 2, "half of them: a flush is due");
        }
        assert!(kept.admit(1), "one alone always gets in");
        assert!(!kept.admit(1), "then no other");
        kept.flushed(10);
        assert_eq!(kept.pages.len(), MAX_PENDING_PAGES - 9, "page 0 was written again since");
        assert!(kept.admit(1));
    }

    #[test]
    fn kept_bytes_are_bounded_but_one_write_always_gets_in() {
        let mut kept = Kept::new(8192);
        assert!(kept.admit(Change::cost(1 << 20)));
        assert!(!kept.admit(Change::cost(1)));
        kept.release(Change::cost(1 << 20));
        assert!(kept.admit(Change::cost(1)));
    }
}
