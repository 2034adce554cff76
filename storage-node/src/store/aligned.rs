//! Memory aligned for O_DIRECT: the only raw allocation of the store.
//!
//! Invariant: a buffer starts at a multiple of [`ALIGN`] and its allocation is a whole number of [`ALIGN`] bytes, so it
//! can go to the kernel as it is; all of it was initialised once. Allocations of the usual sizes are kept for the next
//! buffer, up to [`SPARE_BYTES`] in all: zeroes and page faults of fresh ones cost more than the transfer. A payload read
//! from a socket straight into an [`AlignedBuf`] and handed on as `Bytes` is written without a copy (data-path.md, Disk).

use bytes::Bytes;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Every O_DIRECT address and length is a multiple of this many bytes.
pub const ALIGN: usize = 4096;

/// What is kept for the next buffers, at most.
const SPARE_BYTES: usize = 8 << 20;
/// Allocations up to this are kept; larger ones are rare.
const MAX_SPARE: usize = 1 << 20;
/// Sizes that are kept: 4 KiB, 8 KiB, and so on to [`MAX_SPARE`].
const SIZES: usize = (MAX_SPARE / ALIGN).ilog2() as usize + 1;

static SPARE: Mutex<Spare> = Mutex::new(Spare { by_size: [const { Vec::new() }; SIZES], bytes: 0 });

/// Allocations that no buffer uses.
struct Spare {
    by_size: [Vec<Unused>; SIZES],
    bytes: usize,
}

/// The start of an allocation that nobody else refers to.
struct Unused(NonNull<u8>);

// SAFETY: it is the only reference to its memory, which is not bound to a thread.
unsafe impl Send for Unused {}

impl Spare {
    /// No code that can panic runs under this lock.
    fn lock() -> MutexGuard<'static, Self> {
        SPARE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which list allocations of this layout are in.
    fn size(layout: Layout) -> Option<usize> {
        (layout.size() <= MAX_SPARE).then(|| (layout.size() / ALIGN).ilog2() as usize)
    }

    fn take(layout: Layout) -> Option<NonNull<u8>> {
        let size = Self::size(layout)?;
        let mut spare = Self::lock();
        let Unused(ptr) = spare.by_size[size].pop()?;
        spare.bytes -= layout.size();
        Some(ptr)
    }

    /// Whether it was kept.
    fn keep(ptr: NonNull<u8>, layout: Layout) -> bool {
        let Some(size) = Self::size(layout) else { return false };
        let mut spare = Self::lock();
        let fits = spare.bytes + layout.size() <= SPARE_BYTES;
        if fits {
            spare.bytes += layout.size();
            spare.by_size[size].push(Unused(ptr));
        }
        fits
    }
}

/// Owned bytes whose address is a multiple of [`ALIGN`].
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory alone, like a Box<[u8]>; nothing in it is bound to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared references only read.
unsafe impl Sync for AlignedBuf {}

fn layout_of(len: usize) -> Layout {
    let whole = len.max(1).next_multiple_of(ALIGN);
    let size = if whole <= MAX_SPARE { whole.next_power_of_two() } else { whole };
    Layout::from_size_align(size, ALIGN).expect("a length far below isize::MAX")
}

impl AlignedBuf {
    /// `len` zero bytes. Aborts like every allocation when memory is out.
    pub fn zeroed(len: usize) -> Self {
        let mut buf = Self::of_any(len);
        buf.fill(0);
        buf
    }

    /// `len` bytes of any content, for those who fill all of them before anybody reads one.
    pub(crate) fn of_any(len: usize) -> Self {
        let layout = layout_of(len);
        let ptr = Spare::take(layout).unwrap_or_else(|| {
            // SAFETY: the layout has a size above zero.
            let raw = unsafe { alloc_zeroed(layout) };
            NonNull::new(raw).unwrap_or_else(|| handle_alloc_error(layout))
        });
        Self { ptr, len }
    }

    /// A copy of these bytes, padded with zeroes to `len`.
    pub fn copy_of(bytes: &[u8], len: usize) -> Self {
        let mut buf = Self::of_any(len.max(bytes.len()));
        let (copy, padding) = buf.split_at_mut(bytes.len());
        copy.copy_from_slice(bytes);
        padding.fill(0);
        buf
    }

    /// Hands the memory on without a copy.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let layout = layout_of(self.len);
        if !Spare::keep(self.ptr, layout) {
            // SAFETY: allocated in `of_any` with the layout of the same length, which never changes.
            unsafe { dealloc(self.ptr.as_ptr(), layout) }
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes are owned by self.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes are owned by self, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// What a write hands to the kernel.
#[derive(Debug)]
pub(crate) enum Payload {
    /// Memory of the store's own.
    Own(AlignedBuf),
    /// The caller's memory, which happens to be aligned.
    Shared(Bytes),
}

impl Payload {
    /// The caller's bytes as they are if they are aligned, else a copy. Returns how many bytes were copied.
    pub(crate) fn of(data: Bytes) -> (Self, u64) {
        if (data.as_ptr() as usize).is_multiple_of(ALIGN) && data.len().is_multiple_of(ALIGN) {
            return (Self::Shared(data), 0);
        }
        let copied = data.len() as u64;
        (Self::Own(AlignedBuf::copy_of(&data, data.len())), copied)
    }

    /// The bytes to write.
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Own(buf) => buf,
            Self::Shared(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_used_again_is_zeroes_and_copies_are_padded_whatever_it_held() {
        for len in [1, 4096, 5000, 12288, 1 << 20, (1 << 20) + 1] {
            for _ in 0..3 {
                let mut buf = AlignedBuf::zeroed(len);
                assert!(buf.len() == len && buf.iter().all(|byte| *byte == 0));
                buf.fill(7);
                drop(buf);
                let mut copy = AlignedBuf::copy_of(&[5], len);
                assert!(copy[0] == 5 && copy[1..].iter().all(|byte| *byte == 0));
                copy.fill(9);
            }
        }
    }

    #[test]
    fn what_is_kept_for_later_is_bounded() {
        let many: Vec<AlignedBuf> = (0..64).map(|_| AlignedBuf::zeroed(1 << 20)).collect();
        drop(many);
        assert!(Spare::lock().bytes <= SPARE_BYTES);
    }

    #[test]
    fn an_aligned_payload_is_written_without_a_copy() {
        let mut buf = AlignedBuf::zeroed(8192);
        buf[5] = 7;
        let bytes = buf.into_bytes();
        let (payload, copied) = Payload::of(bytes.clone());
        assert_eq!((copied, payload.bytes()[5]), (0, 7));
        let (payload, copied) = Payload::of(bytes.slice(1..4097));
        assert_eq!((copied, payload.bytes()[4]), (4096, 7));
        assert!((payload.bytes().as_ptr() as usize).is_multiple_of(ALIGN));
    }
}
