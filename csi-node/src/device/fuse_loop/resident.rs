//! Memory whose pages are always there.
//!
//! The kernel copies a request into a reader's buffer. If it has to bring in a page of it first and the process is
//! being killed, it gives up and fails that request with EIO: an I/O error out of a mere crash of this process, which no
//! successor can undo. So a reader's buffer is brought in and locked before the first read; children that are forked do
//! not share it (a shared page would have to be copied on the next write), and it is never merged into a huge page.

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

pub(super) struct Resident {
    bytes: NonNull<u8>,
    length: usize,
}

// SAFETY: it owns its memory, like a `Box<[u8]>`.
unsafe impl Send for Resident {}

impl Resident {
    /// `length` bytes of zeroes; whole pages are best.
    pub(super) fn new(length: usize) -> rustix::io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let place = unsafe { mmap_anonymous(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        let memory = Self { bytes: NonNull::new(place.cast()).expect("a mapping is not at zero"), length };
        for advice in [Advice::LinuxDontFork, Advice::LinuxNoHugepage] {
            // SAFETY: the range is this mapping, and neither advice changes its content.
            unsafe { madvise(memory.place(), length, advice) }?;
        }
        // SAFETY: the range is this mapping.
        if let Err(error) = unsafe { mlock(memory.place(), length) } {
            tracing::warn!(%error, "a buffer cannot be locked: a crash when memory is short may cost I/O errors");
        }
        Ok(memory)
    }

    fn place(&self) -> *mut c_void {
        self.bytes.as_ptr().cast()
    }
}

impl Deref for Resident {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is that long, initialised by the kernel, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr(), self.length) }
    }
}

impl DerefMut for Resident {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.as_ptr(), self.length) }
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let unmapped = unsafe { munmap(self.place(), self.length) };
        debug_assert_eq!(unmapped, Ok(()), "this mapping is its own");
    }
}
