//! What a block device front end (NBD export, FUSE file) and the driver say to each other.
//!
//! A front end hands in [`BlockRequest`]s and gets each answered exactly once through the [`Completions`] it named.
//! Nothing here allocates per request: the data of a read comes back as [`Bytes`], the completion is a tag and a shared
//! sink. Requests may be answered in any order and on any thread; a front end bounds how many it has under way
//! (architecture.md: no unbounded queue, no task per request).

use bytes::Bytes;
use std::sync::Arc;

/// Addresses and lengths of requests are whole blocks of this many bytes, except that [`BlockOp::WriteZeroes`] and
/// [`BlockOp::Discard`] may be any length (a discard rounds inwards; write-zeroes is exact).
pub const BLOCK_BYTES: u64 = 4096;

/// What the kernel or an NBD client asks of a volume. Addresses and lengths are bytes from the start of the volume.
#[derive(Clone, Debug)]
pub enum BlockOp {
    /// Read `length` bytes at `address`, answered with exactly that many.
    Read {
        /// Bytes from the start of the volume.
        address: u64,
        /// Bytes; 1 to [`MAX_REQUEST_BYTES`].
        length: u32,
    },
    /// Write `payload` at `address`.
    Write {
        /// Bytes from the start of the volume.
        address: u64,
        /// The bytes to write; 1 to [`MAX_REQUEST_BYTES`] of them.
        payload: Bytes,
        /// Force unit access: durable on all members before it is answered.
        fua: bool,
    },
    /// Give the space back. Reads as zeroes afterwards as far as it covers whole blocks; the rest is untouched.
    Discard {
        /// Bytes from the start of the volume.
        address: u64,
        /// Bytes; up to 4 GiB - 1.
        length: u64,
    },
    /// Must read back as zeroes in the whole range.
    WriteZeroes {
        /// Bytes from the start of the volume.
        address: u64,
        /// Bytes; up to 4 GiB - 1.
        length: u64,
        /// Durable on all members before it is answered.
        fua: bool,
    },
    /// Everything that was answered before this was handed in is durable on all members when it is answered.
    Flush,
}

/// The longest read or write in one request, in bytes (32 MiB, what NBD clients may assume).
pub const MAX_REQUEST_BYTES: u32 = 32 << 20;

/// Why a request failed, as the kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// EIO: no copy can give the data, or this session has ended for good.
    #[error("input/output error")]
    Io,
    /// ENOSPC: a storage server has no room for the page and nothing was written.
    #[error("no space left on the storage servers")]
    NoSpace,
    /// EROFS: the volume is attached read-only.
    #[error("volume is attached read-only")]
    ReadOnly,
    /// EINVAL: outside the volume, misaligned where that is not allowed, or too long.
    #[error("request outside the volume or misaligned")]
    Invalid,
    /// The process must answer the kernel nothing and exit: a successor owns the device (protocol R10).
    #[error("a successor has taken over this device")]
    Superseded,
}

/// The answer to one request: the bytes of a read, nothing for the others.
pub type BlockResult = Result<Bytes, BlockError>;

/// Where answers go. Implementations must not block.
pub trait Completions: Send + Sync {
    /// The request that carried `tag` is done. Implementations may hand further requests in from here, so a target
    /// calls this with no lock of its own held.
    fn complete(&self, tag: u64, result: BlockResult);
}

/// One request with where its answer goes.
pub struct BlockRequest {
    /// What is asked.
    pub op: BlockOp,
    /// Given back with the answer, free for the front end to choose.
    pub tag: u64,
    /// Gets the answer, exactly once.
    pub completions: Arc<dyn Completions>,
}

/// A volume as a front end sees it.
///
/// Requests that overlap take effect in the order in which they were handed in: a read sees every overlapping write
/// handed in before it (protocol.md §4, Requests). [`crate::merge::Aligned`] builds on this.
pub trait BlockTarget: Send + Sync {
    /// Size in bytes now; grows, never shrinks.
    fn size(&self) -> u64;
    /// Whether writes are refused with [`BlockError::ReadOnly`].
    fn read_only(&self) -> bool;
    /// Hand a request in. Never blocks and never runs the completion on the caller's stack before returning to it
    /// with a lock of the caller held: front ends call it with no lock of their own.
    fn submit(&self, request: BlockRequest);
}
