//! The event queue: by virtual time, ties broken by the seed, so that no order is an accident of the code.

use super::dice::Dice;
use super::event::Event;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

struct Entry {
    at: u64,
    tie: u64,
    number: u64,
    event: Event,
}

impl Entry {
    fn key(&self) -> (u64, u64, u64) {
        (self.at, self.tie, self.number)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}

/// What will happen.
pub(super) struct Queue {
    heap: BinaryHeap<Entry>,
    number: u64,
    ties: Dice,
}

impl Queue {
    pub(super) fn new(seed: u64) -> Self {
        Self { heap: BinaryHeap::new(), number: 0, ties: Dice::new(seed, 1) }
    }

    /// `at` in microseconds.
    pub(super) fn push(&mut self, at: u64, event: Event) {
        self.number += 1;
        self.heap.push(Entry { at, tie: self.ties.next(), number: self.number, event });
    }

    pub(super) fn pop(&mut self) -> Option<(u64, Event)> {
        self.heap.pop().map(|entry| (entry.at, entry.event))
    }
}
