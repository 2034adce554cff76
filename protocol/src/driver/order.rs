//! The order of overlapping requests (PROTOCOL.md §4, Requests).
//!
//! Invariant: of two overlapping operations of which the first is a write, the second starts only when the first is done,
//! restarted writes included. Kept as segments, each with the last unfinished write that covers it: what overlaps that
//! segment next waits for this write, which itself waits for those before. Finding them costs the logarithm of the number
//! of writes under way.

use super::op::OpId;
use crate::mutants::{Mutant, on};
use std::collections::BTreeMap;
use std::ops::Range;

/// Segments of the volume with the last unfinished write of each.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// start -> (end, owner); no two overlap.
    segments: BTreeMap<u64, (u64, OpId)>,
}

impl Order {
    /// Enter an operation; `before` gets the writes that it has to wait for. A write becomes what others wait for.
    pub(super) fn enter(&mut self, op: OpId, range: &Range<u64>, write: bool, before: &mut Vec<OpId>) {
        if on(Mutant::OverlapsRace) {
            return;
        }
        let first = self.segments.range(..=range.start).next_back().filter(|(_, (end, _))| *end > range.start);
        let from = first.map_or(range.start, |(start, _)| *start);
        let overlapping = self.segments.range(from..range.end);
        for (_, (_, owner)) in overlapping {
            if !before.contains(owner) {
                before.push(*owner);
            }
        }
        if !write {
            return;
        }
        if !before.is_empty() {
            self.carve(from, range);
        }
        self.segments.insert(range.start, (range.end, op));
    }

    /// Make room for a range, leaving what stands out on both sides.
    fn carve(&mut self, from: u64, range: &Range<u64>) {
        let hit: Vec<_> = self.segments.range(from..range.end).map(|(start, (end, op))| (*start, *end, *op)).collect();
        for (start, end, owner) in hit {
            self.segments.remove(&start);
            if start < range.start {
                self.segments.insert(start, (range.start, owner));
            }
            if end > range.end {
                self.segments.insert(range.end, (end, owner));
            }
        }
    }

    /// A write is done.
    pub(super) fn leave(&mut self, op: OpId, range: &Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let Some((&start, &(end, owner))) = self.segments.range(at..range.end).next() else { break };
            if owner == op {
                self.segments.remove(&start);
            }
            at = end;
        }
    }

    /// Nothing is under way any longer.
    pub(super) fn clear(&mut self) {
        self.segments.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entered(order: &mut Order, op: u64, range: Range<u64>, write: bool) -> Vec<u64> {
        let mut before = Vec::new();
        order.enter(OpId(op), &range, write, &mut before);
        before.iter().map(|id| id.0).collect()
    }

    #[test]
    fn a_read_waits_for_every_overlapping_write() {
        let mut order = Order::default();
        assert!(entered(&mut order, 1, 0..8, true).is_empty());
        assert!(entered(&mut order, 2, 8..16, true).is_empty());
        assert_eq!(entered(&mut order, 3, 4..12, false), [1, 2]);
        order.leave(OpId(1), &(0..8));
        assert_eq!(entered(&mut order, 4, 0..9, false), [2]);
    }

    #[test]
    fn a_write_in_the_middle_leaves_both_ends() {
        let mut order = Order::default();
        entered(&mut order, 1, 0..12, true);
        assert_eq!(entered(&mut order, 2, 4..8, true), [1]);
        assert_eq!(entered(&mut order, 3, 0..12, false), [1, 2]);
        order.leave(OpId(1), &(0..12));
        assert_eq!(entered(&mut order, 4, 0..12, false), [2]);
    }

    proptest! {
        #[test]
        fn whatever_overlaps_an_unfinished_write_waits_for_it_or_one_that_does(
            ranges in proptest::collection::vec((0u64..40, 1u64..12, any::<bool>()), 1..40),
        ) {
            let mut order = Order::default();
            // waits[i]: everything that i waits for, directly or through others.
            let mut waits: Vec<Vec<usize>> = Vec::new();
            for (i, (start, length, write)) in ranges.iter().enumerate() {
                let direct = entered(&mut order, i as u64, *start..start + length, *write);
                let mut all: Vec<usize> = direct.iter().flat_map(|d| waits[*d as usize].clone()).collect();
                all.extend(direct.iter().map(|d| *d as usize));
                for (j, (s, l, w)) in ranges[..i].iter().enumerate() {
                    let overlap = *s < start + length && *start < s + l;
                    prop_assert!(!(overlap && *w) || all.contains(&j), "{i} must wait for {j}");
                    prop_assert!(overlap && *w || !direct.contains(&(j as u64)), "{i} need not wait for {j}");
                }
                waits.push(all);
            }
            for (i, (start, length, write)) in ranges.iter().enumerate() {
                if *write {
                    order.leave(OpId(i as u64), &(*start..start + length));
                }
            }
            prop_assert!(order.segments.is_empty());
        }
    }
}
