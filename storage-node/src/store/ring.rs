//! One io_uring for one device: moves the core's bytes, decides nothing.
//!
//! Invariant: a buffer that the kernel may touch is kept in `under_way` until its completion was seen; the ring is
//! drained before anything of it is dropped, also when the core panicked. An eventfd tells whoever drives it that
//! something has ended. A write with its sync is a chain of two entries under one id: the kernel begins the sync
//! when the write has succeeded in full, and cancels it else; the chain ends once.

use crate::store::aligned::{AlignedBuf, Payload};
use crate::store::core::{Io, IoFailed, IoKind, IoResult};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::EventfdFlags;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Transfers the kernel has at once; the rest waits in the backlog, which the core's bounds keep short.
const ENTRIES: u32 = 256;
/// Marks the first of two chained entries; the second bears the bare id.
const HEAD: u64 = 1 << 63;

enum Held {
    Read(AlignedBuf),
    Write(Payload),
    Sync,
    /// The write of a chain of two.
    Chain(#[expect(dead_code, reason = "kept for the kernel alone")] Payload),
}

/// The ring and what it holds for the kernel.
pub(crate) struct Ring {
    ring: IoUring,
    disk: OwnedFd,
    ready: OwnedFd,
    /// A chain is in the queue of submissions.
    chain_queued: bool,
    /// The kernel says nothing of a chain's head that succeeds.
    silent_heads: bool,
    backlog: VecDeque<Io>,
    under_way: HashMap<u64, Held>,
}

/// Tells when a device has something to do.
pub struct Ready(AsyncFd<OwnedFd>);

impl Ready {
    /// Waits until something has ended since the last time.
    ///
    /// # Errors
    /// The reactor has ended.
    pub async fn came(&self) -> io::Result<()> {
        // Each end is an edge of its own, so the eventfd is never read.
        self.0.readable().await.map(|mut edge| edge.clear_ready())
    }
}

fn build() -> io::Result<IoUring> {
    let mut tuned = IoUring::builder();
    // The flag says that something has ended and is to be taken with a call: without it there is nothing to call for.
    let tuned = tuned.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().build(ENTRIES);
    // Kernels before 6.1 do not know these.
    tuned.or_else(|_| IoUring::new(ENTRIES))
}

impl Ring {
    /// On the thread that will use it.
    pub(crate) fn new(disk: OwnedFd) -> io::Result<Self> {
        let ring = build()?;
        let ready = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(ready.as_raw_fd())?;
        Ok(Self {
            silent_heads: ring.params().is_feature_skip_cqe_on_success(),
            ring,
            disk,
            ready,
            chain_queued: false,
            backlog: VecDeque::new(),
            under_way: HashMap::new(),
        })
    }

    pub(crate) fn disk(&self) -> &OwnedFd {
        &self.disk
    }

    pub(crate) fn add(&mut self, ios: Vec<Io>) {
        self.backlog.extend(ios);
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.backlog.is_empty() && self.under_way.is_empty()
    }

    /// Tells when something has ended, to a task of this thread's reactor.
    pub(crate) fn ready(&self) -> io::Result<Ready> {
        let fd = self.ready.try_clone()?;
        // SAFETY: the descriptor is open, and owned by what is made of it alone, which gives it to nobody.
        let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(Ready(registered.map_err(io::Error::from)?))
    }

    /// Lets whoever waits for [`Ready`] come.
    pub(crate) fn nudge(&self) {
        // It can only fail when the counter would overflow, which takes longer than any process lives.
        let _ = rustix::io::write(&self.ready, &1u64.to_ne_bytes());
    }

    /// What the kernel has not got yet is never handed to it.
    pub(crate) fn give_up(&mut self) {
        self.backlog.clear();
    }

    /// Hands transfers to the kernel and takes what has ended; waits for one to end if `wait` is set and there is one.
    /// Where there is nothing to do the kernel is not called.
    pub(crate) fn turn(&mut self, wait: bool) -> io::Result<Vec<(u64, IoResult)>> {
        self.fill();
        let wait = wait && !self.under_way.is_empty();
        let queue = self.ring.submission();
        let nothing = queue.is_empty() && !queue.taskrun() && !queue.cq_overflow();
        drop(queue);
        if nothing && !wait {
            return Ok(self.reap());
        }
        match self.ring.submit_and_wait(usize::from(wait)) {
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ResourceBusy) => {}
            Err(e) => return Err(e),
            Ok(_) => self.refuse_broken_chain(),
        }
        Ok(self.reap())
    }

    /// A kernel that took only some of the entries, for want of memory, may have parted a sync from its write. Of that
    /// write nobody would hear when it ends, so neither its memory nor the device could ever be used again: for other
    /// bytes, or by an opening whose journal it would be written into. Only the end of the process ends it for sure.
    fn refuse_broken_chain(&mut self) {
        let all_taken = self.ring.submission().is_empty();
        if std::mem::take(&mut self.chain_queued) && !all_taken {
            tracing::error!("the kernel has no memory for transfers: this process ends");
            std::process::abort();
        }
    }

    /// Room is left for the second entries of chains, of which the core has two at a time.
    fn fill(&mut self) {
        while self.under_way.len() + 2 < ENTRIES as usize
            && let Some(io) = self.backlog.pop_front()
        {
            if let IoKind::WriteSync { at, data } = io.kind {
                self.push_chain(io.id, at, data);
                continue;
            }
            let (entry, held) = self.entry(io.kind);
            self.under_way.insert(io.id, held);
            self.push(&entry.user_data(io.id));
        }
    }

    fn push_chain(&mut self, id: u64, at: u64, data: Payload) {
        let (write, Held::Write(data)) = self.entry(IoKind::Write { at, data }) else { unreachable!("a write") };
        let (sync, _) = self.entry(IoKind::Sync);
        let silent = if self.silent_heads { squeue::Flags::SKIP_SUCCESS } else { squeue::Flags::empty() };
        self.under_way.insert(id, Held::Chain(data));
        self.push(&write.flags(squeue::Flags::IO_LINK | silent).user_data(HEAD | id));
        self.push(&sync.user_data(id));
        self.chain_queued = true;
    }

    fn entry(&self, kind: IoKind) -> (squeue::Entry, Held) {
        let disk = types::Fd(self.disk.as_raw_fd());
        match kind {
            IoKind::Read { at, len } => {
                // Handed on only when the kernel has filled all of it.
                let mut buf = AlignedBuf::of_any(len);
                (opcode::Read::new(disk, buf.as_mut_ptr(), len as u32).offset(at).build(), Held::Read(buf))
            }
            IoKind::Write { at, data } | IoKind::WriteSync { at, data } => {
                let bytes = data.bytes();
                let entry = opcode::Write::new(disk, bytes.as_ptr(), bytes.len() as u32).offset(at).build();
                (entry, Held::Write(data))
            }
            IoKind::Sync => {
                let flags = types::FsyncFlags::DATASYNC;
                (opcode::Fsync::new(disk).flags(flags).build(), Held::Sync)
            }
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the memory that the entry points to is kept in `under_way` until its completion was seen; its address
        // does not change by moving the owner.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("no more entries than the queue has");
    }

    fn reap(&mut self) -> Vec<(u64, IoResult)> {
        let mut ended = Vec::new();
        for completion in self.ring.completion() {
            let id = completion.user_data();
            let result = completion.result();
            if id & HEAD != 0 {
                // A silent head speaks up only when it failed, and then its sync ends without a word. Of others the
                // sync's end says all: it was cancelled if the write failed.
                if self.silent_heads {
                    let held = self.under_way.remove(&(id & !HEAD)).expect("only what was handed in ends");
                    ended.push((id & !HEAD, refuse(held, result)));
                }
                continue;
            }
            let held = self.under_way.remove(&id).expect("only what was handed in ends");
            ended.push((id, judge(held, result)));
        }
        ended
    }

    /// Waits for all transfers under way; nothing new is handed to the kernel.
    fn drain(&mut self) {
        self.give_up();
        while !self.under_way.is_empty() {
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => std::process::abort(),
                _ => drop(self.reap()),
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
    }
}

/// A transfer that was cut short failed: aligned direct I/O within a device is never short for another reason.
fn judge(held: Held, result: i32) -> IoResult {
    match held {
        Held::Read(buf) if result == buf.len() as i32 => Ok(Some(buf)),
        Held::Write(data) if result == data.bytes().len() as i32 => Ok(None),
        Held::Sync | Held::Chain(_) if result == 0 => Ok(None),
        held => refuse(held, result),
    }
}

/// It failed; what it held is no longer touched by the kernel.
fn refuse(held: Held, result: i32) -> IoResult {
    tracing::warn!(result, "a transfer of a device failed");
    drop(held);
    Err(IoFailed)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::fs::{MemfdFlags, OFlags, SealFlags};

    fn file(bytes: u64, seals: SealFlags) -> OwnedFd {
        let fd = rustix::fs::memfd_create("ring", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, bytes).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    /// One write of two blocks with its sync: how it ends, with nothing left under way.
    fn chain(disk: OwnedFd) -> IoResult {
        let mut ring = Ring::new(disk).unwrap();
        let data = Payload::Own(AlignedBuf::copy_of(&[7; 8192], 8192));
        ring.add(vec![Io { id: 5, kind: IoKind::WriteSync { at: 0, data } }]);
        let mut ended = Vec::new();
        while !ring.is_idle() {
            ended.extend(ring.turn(true).unwrap());
        }
        assert_eq!(ended.len(), 1, "a write with its sync ends once");
        let (id, result) = ended.pop().unwrap();
        assert_eq!(id, 5);
        result
    }

    #[test]
    fn a_write_with_its_sync_ends_once_when_both_are_done() {
        let disk = file(8192, SealFlags::empty());
        let other = disk.try_clone().unwrap();
        assert!(chain(disk).is_ok());
        let mut read = [0; 8192];
        assert_eq!(rustix::io::pread(&other, &mut read, 0), Ok(8192));
        assert_eq!(read, [7; 8192]);
    }

    #[test]
    fn a_write_that_fails_or_is_cut_short_cancels_its_sync_and_fails() {
        // A file that may not grow takes the first block of two.
        assert_eq!(chain(file(4096, SealFlags::GROW)).unwrap_err(), IoFailed);
        assert_eq!(chain(file(8192, SealFlags::WRITE)).unwrap_err(), IoFailed);
        let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(chain(null).unwrap_err(), IoFailed);
    }

    #[test]
    fn a_sync_that_fails_fails_its_write() {
        // Takes every write, and no sync.
        let null = rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap();
        assert_eq!(chain(null).unwrap_err(), IoFailed);
    }
}
