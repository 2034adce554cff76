//! The requests of one connection that are not answered yet, and where their answers arrive.
//!
//! Invariant: a slot is used again only after its answer was taken, so a tag names one request at a time.

use crate::block::{BlockResult, Completions};
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};

/// One request that the target has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) cookie: u64,
    /// What it counts in the window, in bytes.
    pub(super) weight: usize,
    /// A trim with forced access: a flush follows it before it is answered.
    pub(super) then_flush: bool,
}

/// Slots for what is under way.
#[derive(Default)]
pub(super) struct UnderWay {
    slots: Vec<Option<Asked>>,
    free: Vec<usize>,
    bytes: usize,
}

impl UnderWay {
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Note a request; the tag names it until [`Self::finish`].
    pub(super) fn begin(&mut self, asked: Asked) -> u64 {
        self.bytes += asked.weight;
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = Some(asked);
            return slot as u64;
        }
        self.slots.push(Some(asked));
        self.slots.len() as u64 - 1
    }

    pub(super) fn finish(&mut self, tag: u64) -> Asked {
        let asked = self.slots[tag as usize].take().expect("a target answers each request once");
        self.free.push(tag as usize);
        self.bytes -= asked.weight;
        asked
    }

    /// What `tag` names, to change it in place.
    pub(super) fn asked(&mut self, tag: u64) -> &mut Asked {
        self.slots[tag as usize].as_mut().expect("a target answers each request once")
    }
}

#[derive(Default)]
struct Arrived {
    answers: Vec<(u64, BlockResult)>,
    waiting: Option<Waker>,
}

/// Where the target puts answers, on whatever thread.
#[derive(Default)]
pub(super) struct Inbox {
    arrived: Mutex<Arrived>,
}

impl Inbox {
    /// Move what arrived into `answers`, which is empty; pending if there is nothing.
    pub(super) fn poll_take(&self, answers: &mut Vec<(u64, BlockResult)>, cx: &Context<'_>) -> Poll<()> {
        let mut arrived = self.arrived.lock().expect("nothing panics under this lock");
        if arrived.answers.is_empty() {
            arrived.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        }
        std::mem::swap(&mut arrived.answers, answers);
        Poll::Ready(())
    }
}

impl Completions for Inbox {
    fn complete(&self, tag: u64, result: BlockResult) {
        let mut arrived = self.arrived.lock().expect("nothing panics under this lock");
        arrived.answers.push((tag, result));
        let waiting = arrived.waiting.take();
        drop(arrived);
        if let Some(waker) = waiting {
            waker.wake();
        }
    }
}
