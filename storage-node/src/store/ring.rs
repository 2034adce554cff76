//! One io_uring for one device: moves the core's bytes, decides nothing.
//!
//! Invariant: a buffer that the kernel may touch is kept in `under_way` until its completion was seen; the ring is
//! drained before anything of it is dropped, also when the core panicked. It sleeps in the kernel when there is nothing
//! to do; an eventfd wakes it.

use crate::store::aligned::{AlignedBuf, Payload};
use crate::store::core::{Io, IoFailed, IoKind, IoResult};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::EventfdFlags;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// Transfers the kernel has at once; the rest waits in the backlog, which the core's bounds keep short.
const ENTRIES: u32 = 256;
const WAKE: u64 = 0;

enum Held {
    Read(AlignedBuf),
    Write(Payload),
    Sync,
}

/// The ring and what it holds for the kernel.
pub(crate) struct Ring {
    ring: IoUring,
    disk: OwnedFd,
    wake: Arc<OwnedFd>,
    wake_count: Box<[u8; 8]>,
    wake_armed: bool,
    backlog: VecDeque<Io>,
    under_way: HashMap<u64, Held>,
}

/// Wakes a ring from another thread.
#[derive(Clone)]
pub(crate) struct Waker(Arc<OwnedFd>);

impl Waker {
    pub(crate) fn wake(&self) {
        // It can only fail when the counter would overflow, and then the ring is awake anyway.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

fn build() -> io::Result<IoUring> {
    let tuned = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(ENTRIES);
    // Kernels before 6.1 do not know these.
    tuned.or_else(|_| IoUring::new(ENTRIES))
}

/// The eventfd that wakes a ring: made before the ring's thread is.
pub(crate) fn waker() -> io::Result<Waker> {
    Ok(Waker(Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?)))
}

impl Ring {
    /// On the thread that will use it.
    pub(crate) fn new(disk: OwnedFd, waker: &Waker) -> io::Result<Self> {
        let ring = build()?;
        Ok(Self {
            ring,
            disk,
            wake: waker.0.clone(),
            wake_count: Box::new([0; 8]),
            wake_armed: false,
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

    /// Hands transfers to the kernel, and waits for one to end, or for the waker, if `wait` is set.
    pub(crate) fn turn(&mut self, wait: bool) -> io::Result<Vec<(u64, IoResult)>> {
        self.fill();
        if !self.wake_armed {
            self.arm_waker();
        }
        match self.ring.submit_and_wait(usize::from(wait)) {
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ResourceBusy) => {}
            Err(e) => return Err(e),
            Ok(_) => {}
        }
        Ok(self.reap())
    }

    fn fill(&mut self) {
        while self.under_way.len() + 1 < ENTRIES as usize
            && let Some(io) = self.backlog.pop_front()
        {
            let (entry, held) = self.entry(io.kind);
            self.under_way.insert(io.id, held);
            self.push(&entry.user_data(io.id));
        }
    }

    fn entry(&self, kind: IoKind) -> (squeue::Entry, Held) {
        let disk = types::Fd(self.disk.as_raw_fd());
        match kind {
            IoKind::Read { at, len } => {
                // Handed on only when the kernel has filled all of it.
                let mut buf = AlignedBuf::of_any(len);
                (opcode::Read::new(disk, buf.as_mut_ptr(), len as u32).offset(at).build(), Held::Read(buf))
            }
            IoKind::Write { at, data } => {
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

    fn arm_waker(&mut self) {
        let fd = types::Fd(self.wake.as_raw_fd());
        let entry = opcode::Read::new(fd, self.wake_count.as_mut_ptr(), 8).build().user_data(WAKE);
        self.push(&entry);
        self.wake_armed = true;
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the memory that the entry points to is kept in `under_way` (or is `wake_count`) until its completion
        // was seen; its address does not change by moving the owner.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("no more entries than the queue has");
    }

    fn reap(&mut self) -> Vec<(u64, IoResult)> {
        let mut ended = Vec::new();
        for completion in self.ring.completion() {
            let id = completion.user_data();
            if id == WAKE {
                self.wake_armed = false;
                continue;
            }
            let result = completion.result();
            let held = self.under_way.remove(&id).expect("only what was handed in ends");
            ended.push((id, judge(held, result)));
        }
        ended
    }

    /// Waits for all transfers under way; nothing new is handed to the kernel.
    pub(crate) fn drain(&mut self) {
        self.backlog.clear();
        while !self.under_way.is_empty() {
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => std::process::abort(),
                _ => drop(self.reap()),
            }
        }
        while self.wake_armed {
            Waker(self.wake.clone()).wake();
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
        Held::Sync if result == 0 => Ok(None),
        Held::Read(_) | Held::Write(_) | Held::Sync => {
            tracing::warn!(result, "a transfer of a device failed");
            Err(IoFailed)
        }
    }
}
