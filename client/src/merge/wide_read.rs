//! One unaligned read: the blocks around it are read and the bytes asked for cut out.
//!
//! No order is needed beyond the target's own. A read of almost [`MAX_REQUEST_BYTES`] may touch one block more than one
//! request can carry; it is then read in two.

use super::{BLOCK_BYTES, round_down};
use crate::block::{BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget, Completions, MAX_REQUEST_BYTES};
use bytes::{Bytes, BytesMut};
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct Parts {
    got: [Bytes; 2],
    left: u8,
    error: Option<BlockError>,
}

struct WideRead {
    skip: usize,
    length: usize,
    tag: u64,
    completions: Arc<dyn Completions>,
    parts: Mutex<Parts>,
}

/// Read `length` bytes at `address`, inside the volume, at most [`MAX_REQUEST_BYTES`].
pub(super) fn start<T: BlockTarget + ?Sized>(target: &T, request: BlockRequest, address: u64, length: u64) {
    let first = round_down(address);
    let around = (address + length).next_multiple_of(BLOCK_BYTES) - first;
    let now = around.min(u64::from(MAX_REQUEST_BYTES));
    let rest = around - now;
    let completions = Arc::new(WideRead {
        skip: (address - first) as usize,
        length: length as usize,
        tag: request.tag,
        completions: request.completions,
        parts: Mutex::new(Parts { left: 1 + u8::from(rest > 0), ..Parts::default() }),
    });
    if rest > 0 {
        let op = BlockOp::Read { address: first + now, length: rest as u32 };
        target.submit(BlockRequest { op, tag: 1, completions: completions.clone() });
    }
    let op = BlockOp::Read { address: first, length: now as u32 };
    target.submit(BlockRequest { op, tag: 0, completions });
}

impl WideRead {
    fn cut(&self, [first, second]: [Bytes; 2]) -> Bytes {
        if second.is_empty() {
            return first.slice(self.skip..self.skip + self.length);
        }
        let mut whole = BytesMut::with_capacity(self.length);
        whole.extend_from_slice(&first[self.skip..]);
        whole.extend_from_slice(&second[..self.length - whole.len()]);
        whole.freeze()
    }
}

impl Completions for WideRead {
    fn complete(&self, tag: u64, result: BlockResult) {
        let mut parts = self.parts.lock().expect("no code that can panic runs under this lock");
        match result {
            Ok(bytes) => parts.got[tag as usize] = bytes,
            Err(BlockError::Superseded) => parts.error = Some(BlockError::Superseded),
            Err(error) => parts.error = parts.error.or(Some(error)),
        }
        parts.left -= 1;
        if parts.left > 0 {
            return;
        }
        let (got, error) = (std::mem::take(&mut parts.got), parts.error);
        drop(parts);
        self.completions.complete(self.tag, error.map_or_else(|| Ok(self.cut(got)), Err));
    }
}
