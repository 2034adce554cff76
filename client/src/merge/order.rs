//! Which changes may reach the target now, and which wait for a merge of the same blocks.
//!
//! ```text
//! whole change  --no merge or waiter on its blocks--> entering --handed to the target--> gone
//! unaligned one --nor an entering change on them----> merging  --all parts answered----> gone
//! either        --else-----------------------------> waiting, first come first served per block
//! ```
//! Invariant: a merge begins only when every whole change that was let in before it has reached the target, and until
//! it ends nothing else on its blocks is let in. The lock is never held while the target or a completion is called.

use super::{BLOCK_BYTES, edges, round_down};
use crate::block::{BlockRequest, BlockTarget};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

/// A write, write-zeroes or discard, inside the volume and not empty.
pub(super) struct Change {
    pub(super) request: BlockRequest,
    /// First byte and the byte behind the last.
    pub(super) first: u64,
    pub(super) end: u64,
    /// Both are block boundaries: goes to the target as it is.
    pub(super) whole: bool,
}

/// The blocks that a change touches, in bytes rounded outwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    first: u64,
    end: u64,
}

impl Extent {
    fn of(change: &Change) -> Self {
        Self { first: round_down(change.first), end: change.end.next_multiple_of(BLOCK_BYTES) }
    }

    fn overlaps(self, other: Self) -> bool {
        self.first < other.end && other.first < self.end
    }
}

#[derive(Default)]
struct Admitted {
    merging: Vec<Extent>,
    entering: Vec<Extent>,
    waiting: VecDeque<Change>,
    /// Somebody is letting waiters in and will look again: nobody else needs to, which also bounds recursion.
    draining: bool,
}

impl Admitted {
    /// Whether `change` may go on with the first `ahead` waiters before it; notes it as under way if so.
    fn admit(&mut self, change: &Change, ahead: usize) -> bool {
        let extent = Extent::of(change);
        let clash = |list: &[Extent]| list.iter().any(|other| other.overlaps(extent));
        let queued = self.waiting.iter().take(ahead).any(|waiter| Extent::of(waiter).overlaps(extent));
        if queued || clash(&self.merging) || (!change.whole && clash(&self.entering)) {
            return false;
        }
        if change.whole {
            self.entering.push(extent);
        } else {
            self.merging.push(extent);
        }
        true
    }

    fn next_waiter(&mut self) -> Option<Change> {
        for ahead in 0..self.waiting.len() {
            let change = self.waiting.remove(ahead).expect("index below the length");
            if self.admit(&change, ahead) {
                return Some(change);
            }
            self.waiting.insert(ahead, change);
        }
        None
    }
}

fn remove(list: &mut Vec<Extent>, extent: Extent) {
    let at = list.iter().position(|other| *other == extent).expect("was noted when it was admitted");
    list.swap_remove(at);
}

/// The order of changes of one volume.
pub(super) struct Order<T: BlockTarget + ?Sized> {
    target: Arc<T>,
    admitted: Mutex<Admitted>,
}

impl<T: BlockTarget + ?Sized + 'static> Order<T> {
    pub(super) fn new(target: Arc<T>) -> Self {
        Self { target, admitted: Mutex::default() }
    }

    pub(super) fn target(&self) -> &T {
        &self.target
    }

    /// Hand a change on now, or when what stands before it is done.
    pub(super) fn enter(self: &Arc<Self>, change: Change) {
        let mut admitted = self.lock();
        let ahead = admitted.waiting.len();
        if admitted.admit(&change, ahead) {
            drop(admitted);
            self.run(change);
        } else {
            admitted.waiting.push_back(change);
        }
    }

    /// A merge is over: let in what waited for its blocks.
    pub(super) fn leave(self: &Arc<Self>, extent: Extent) {
        let mut admitted = self.lock();
        remove(&mut admitted.merging, extent);
        self.drain(admitted);
    }

    fn run(self: &Arc<Self>, change: Change) {
        let extent = Extent::of(&change);
        if !change.whole {
            return edges::start(self.clone(), change, extent);
        }
        self.target.submit(change.request);
        let mut admitted = self.lock();
        remove(&mut admitted.entering, extent);
        self.drain(admitted);
    }

    fn drain<'a>(self: &'a Arc<Self>, mut admitted: MutexGuard<'a, Admitted>) {
        if admitted.waiting.is_empty() || admitted.draining {
            return;
        }
        admitted.draining = true;
        while let Some(change) = admitted.next_waiter() {
            drop(admitted);
            self.run(change);
            admitted = self.lock();
        }
        admitted.draining = false;
    }

    fn lock(&self) -> MutexGuard<'_, Admitted> {
        self.admitted.lock().expect("no code that can panic runs under this lock")
    }
}
