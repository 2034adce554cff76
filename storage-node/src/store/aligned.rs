//! Memory aligned for O_DIRECT: the only raw allocation of the store.
//!
//! Invariant: a buffer starts at a multiple of [`ALIGN`] and its allocation is a whole number of [`ALIGN`] bytes, so it
//! can go to the kernel as it is. A payload read from a socket straight into an [`AlignedBuf`] and handed on as `Bytes`
//! is written without a copy (data-path.md, Disk).

use bytes::Bytes;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Every O_DIRECT address and length is a multiple of this many bytes.
pub const ALIGN: usize = 4096;

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
    let size = len.max(1).next_multiple_of(ALIGN);
    Layout::from_size_align(size, ALIGN).expect("a length far below isize::MAX")
}

impl AlignedBuf {
    /// `len` zero bytes. Aborts like every allocation when memory is out.
    pub fn zeroed(len: usize) -> Self {
        let layout = layout_of(len);
        // SAFETY: the layout has a size above zero.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw) else { handle_alloc_error(layout) };
        Self { ptr, len }
    }

    /// A copy of these bytes, padded with zeroes to `len`.
    pub fn copy_of(bytes: &[u8], len: usize) -> Self {
        let mut buf = Self::zeroed(len.max(bytes.len()));
        buf[..bytes.len()].copy_from_slice(bytes);
        buf
    }

    /// Hands the memory on without a copy.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the layout of the same length, which never changes.
        unsafe { dealloc(self.ptr.as_ptr(), layout_of(self.len)) }
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
