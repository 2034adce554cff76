//! The kernel's requests that the target has, and the way of its answers back to the kernel.
//!
//! An answer is written on the thread that completes the request: one system call that does not block. Invariants: each
//! request is answered once; after `Superseded` nothing is answered any more. The kernel bounds how much is under way
//! (`max_background`, and one request per thread that waits).

use super::abi;
use super::channel::Channel;
use lamina_client::block::{BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget, Completions};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// How much is zeroed in one request to the target, in bytes: the kernel asks for up to 4 GiB at once.
const ZERO_CHUNK_BYTES: u64 = 64 << 20;

/// What answers a request, when the target is done with it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// The bytes that were read.
    Bytes,
    /// That so many were written.
    Written(u32),
    /// Just that.
    Done,
    /// Zeroes are written up to `end`, of which those from `next` on are still to be asked for.
    Zeroing { next: u64, end: u64 },
}

#[derive(Clone, Copy)]
struct Asked {
    unique: u64,
    answer: Answer,
}

#[derive(Default)]
struct Slots {
    slots: Vec<Option<Asked>>,
    free: Vec<usize>,
}

impl Slots {
    fn put(&mut self, asked: Asked) -> u64 {
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = Some(asked);
            return slot as u64;
        }
        self.slots.push(Some(asked));
        self.slots.len() as u64 - 1
    }

    fn take(&mut self, tag: u64) -> Asked {
        let asked = self.slots[tag as usize].take().expect("a target answers each request once");
        self.free.push(tag as usize);
        asked
    }
}

pub(super) struct Replies {
    /// Itself, for requests that follow one that is done.
    me: Weak<Self>,
    channel: Channel,
    target: Arc<dyn BlockTarget>,
    on_superseded: Arc<dyn Fn() + Send + Sync>,
    superseded: AtomicBool,
    /// All consumers may only read, whatever the target would take.
    only_read: AtomicBool,
    slots: Mutex<Slots>,
}

impl Replies {
    pub(super) fn new(
        channel: Channel,
        target: Arc<dyn BlockTarget>,
        on_superseded: Arc<dyn Fn() + Send + Sync>,
    ) -> Arc<Self> {
        let superseded = AtomicBool::new(false);
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            channel,
            target,
            on_superseded,
            superseded,
            only_read: AtomicBool::new(false),
            slots: Mutex::default(),
        })
    }

    pub(super) fn channel(&self) -> &Channel {
        &self.channel
    }

    pub(super) fn target(&self) -> &dyn BlockTarget {
        &*self.target
    }

    /// Whether the kernel must get no more answers from this process.
    pub(super) fn silenced(&self) -> bool {
        self.superseded.load(Ordering::Acquire)
    }

    /// Refuse changes from now on, or take them again.
    pub(super) fn set_only_read(&self, only_read: bool) {
        self.only_read.store(only_read, Ordering::Release);
    }

    /// Whether changes are refused.
    pub(super) fn only_read(&self) -> bool {
        self.only_read.load(Ordering::Acquire)
    }

    /// Ask the target for what the kernel asks as `unique`.
    pub(super) fn ask(&self, unique: u64, op: BlockOp, answer: Answer) {
        let tag = self.lock().put(Asked { unique, answer });
        let completions = self.me.upgrade().expect("whoever calls this holds an `Arc`");
        self.target.submit(BlockRequest { op, tag, completions });
    }

    /// Zero a range, a part at a time.
    pub(super) fn zero(&self, unique: u64, next: u64, end: u64) {
        let length = (end - next).min(ZERO_CHUNK_BYTES);
        let op = BlockOp::WriteZeroes { address: next, length, fua: false };
        self.ask(unique, op, Answer::Zeroing { next: next + length, end });
    }

    fn answer(&self, asked: Asked, result: BlockResult) {
        if self.silenced() {
            return;
        }
        match (result, asked.answer) {
            (Ok(bytes), Answer::Bytes) => self.channel.answer(asked.unique, &bytes),
            (Ok(_), Answer::Written(length)) => self.channel.answer(asked.unique, &abi::write_answer(length)),
            (Ok(_), Answer::Zeroing { next, end }) if next < end => self.zero(asked.unique, next, end),
            (Ok(_), Answer::Done | Answer::Zeroing { .. }) => self.channel.answer(asked.unique, &[]),
            (Err(BlockError::Superseded), _) => self.silence(),
            (Err(error), _) => self.channel.refuse(asked.unique, error_number(error)),
        }
    }

    fn silence(&self) {
        if !self.superseded.swap(true, Ordering::AcqRel) {
            (self.on_superseded)();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().expect("nothing panics under this lock but a broken target")
    }
}

fn error_number(error: BlockError) -> Errno {
    match error {
        BlockError::Io | BlockError::Superseded => Errno::IO,
        BlockError::NoSpace => Errno::NOSPC,
        BlockError::ReadOnly => Errno::ROFS,
        BlockError::Invalid => Errno::INVAL,
    }
}

impl Completions for Replies {
    fn complete(&self, tag: u64, result: BlockResult) {
        let asked = self.lock().take(tag);
        self.answer(asked, result);
    }
}
