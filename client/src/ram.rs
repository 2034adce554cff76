//! A volume in memory: the [`BlockTarget`] that front ends are tested and measured against.
//!
//! It keeps the contract to the letter (whole blocks only, order of overlapping requests, each request answered once)
//! and answers on the caller's stack, which is the hardest case for a front end's own locking.

use crate::block::{BLOCK_BYTES, BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget, MAX_REQUEST_BYTES};
use bytes::Bytes;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A volume whose bytes are lost with the process.
pub struct RamVolume {
    bytes: Mutex<Vec<u8>>,
    read_only: bool,
    flushes: AtomicU64,
    fail_with: Mutex<Option<BlockError>>,
}

impl RamVolume {
    /// A volume of `size` bytes of zeroes, rounded up to whole blocks.
    pub fn new(size: u64) -> Self {
        let bytes = Mutex::new(vec![0; size.next_multiple_of(BLOCK_BYTES) as usize]);
        Self { bytes, read_only: false, flushes: AtomicU64::new(0), fail_with: Mutex::new(None) }
    }

    /// The same volume, refusing changes.
    pub fn into_read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// Grow to `size` bytes, rounded up to whole blocks; a smaller size changes nothing.
    pub fn grow(&self, size: u64) {
        let mut bytes = self.lock();
        let size = size.next_multiple_of(BLOCK_BYTES) as usize;
        if size > bytes.len() {
            bytes.resize(size, 0);
        }
    }

    /// How many flushes and forced writes were answered.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Answer every request from now on with `error`; `None` ends it.
    pub fn fail_with(&self, error: Option<BlockError>) {
        *self.fail_with.lock().expect("nothing panics under this lock") = error;
    }

    /// A copy of `length` bytes at `address`, both inside the volume.
    pub fn bytes_at(&self, address: usize, length: usize) -> Vec<u8> {
        self.lock()[address..address + length].to_vec()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().expect("nothing panics under this lock")
    }

    fn apply(&self, op: &BlockOp) -> BlockResult {
        if let Some(error) = *self.fail_with.lock().expect("nothing panics under this lock") {
            return Err(error);
        }
        if self.read_only && !matches!(op, BlockOp::Read { .. } | BlockOp::Flush) {
            return Err(BlockError::ReadOnly);
        }
        let mut bytes = self.lock();
        match op {
            BlockOp::Read { address, length } => {
                let range = whole_blocks(*address, u64::from(*length), bytes.len())?;
                return Ok(Bytes::copy_from_slice(&bytes[range]));
            }
            BlockOp::Write { address, payload, fua } => {
                let range = whole_blocks(*address, payload.len() as u64, bytes.len())?;
                bytes[range].copy_from_slice(payload);
                self.flushes.fetch_add(u64::from(*fua), Ordering::Relaxed);
            }
            BlockOp::WriteZeroes { address, length, fua } => {
                let range = inside(*address, *length, bytes.len())?;
                bytes[range].fill(0);
                self.flushes.fetch_add(u64::from(*fua), Ordering::Relaxed);
            }
            BlockOp::Discard { address, length } => {
                let range = inside(*address, *length, bytes.len())?;
                let block = BLOCK_BYTES as usize;
                let (first, end) = (range.start.next_multiple_of(block), range.end - range.end % block);
                if first < end {
                    bytes[first..end].fill(0);
                }
            }
            BlockOp::Flush => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(Bytes::new())
    }
}

fn inside(address: u64, length: u64, size: usize) -> Result<std::ops::Range<usize>, BlockError> {
    let end = address.checked_add(length).filter(|end| *end <= size as u64).ok_or(BlockError::Invalid)?;
    Ok(address as usize..end as usize)
}

fn whole_blocks(address: u64, length: u64, size: usize) -> Result<std::ops::Range<usize>, BlockError> {
    let whole = address.is_multiple_of(BLOCK_BYTES) && length.is_multiple_of(BLOCK_BYTES);
    if !whole || length == 0 || length > u64::from(MAX_REQUEST_BYTES) {
        return Err(BlockError::Invalid);
    }
    inside(address, length, size)
}

impl BlockTarget for RamVolume {
    fn size(&self) -> u64 {
        self.lock().len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn submit(&self, request: BlockRequest) {
        let result = self.apply(&request.op);
        request.completions.complete(request.tag, result);
    }
}
