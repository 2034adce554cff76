//! Requests that are not whole blocks, turned into ones that are.
//!
//! A [`BlockTarget`] takes whole blocks only. [`Aligned`] stands in front of it and takes any address and length: it
//! reads around an unaligned read, reads, merges and writes the edge blocks of an unaligned write or write-zeroes, and
//! rounds a discard inwards. Invariant: from the moment the edge blocks of a merge are read until they are written, no
//! other change of the same blocks reaches the target, so a merge acts as one overlapping request would (protocol.md
//! §4, Requests). It relies on the target's own order of overlapping requests for all that was handed in before.
//!
//! What is whole already costs one short lock (changes) or none (reads, flushes). What waits is bounded by what the
//! front end has under way.

use crate::block::{BLOCK_BYTES, BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget, MAX_REQUEST_BYTES};
use bytes::Bytes;
use std::sync::Arc;

mod edges;
mod order;
mod wide_read;

use order::{Change, Order};

/// A volume that takes requests of any address and length and hands whole blocks to the target behind it.
pub struct Aligned<T: BlockTarget + ?Sized> {
    order: Arc<Order<T>>,
    merges: bool,
}

impl<T: BlockTarget + ?Sized + 'static> Aligned<T> {
    /// Stand in front of `target`. All front ends of one volume must share one `Aligned`.
    pub fn new(target: Arc<T>) -> Self {
        Self { order: Arc::new(Order::new(target)), merges: true }
    }

    /// The same for a volume that other sessions write too: a merge would undo what they write between its read and its
    /// write, so a change that is not whole blocks is [`BlockError::Invalid`].
    pub fn shared(target: Arc<T>) -> Self {
        Self { merges: false, ..Self::new(target) }
    }
}

impl<T: BlockTarget + ?Sized + 'static> BlockTarget for Aligned<T> {
    fn size(&self) -> u64 {
        self.order.target().size()
    }

    fn read_only(&self) -> bool {
        self.order.target().read_only()
    }

    fn submit(&self, request: BlockRequest) {
        let (address, length) = match &request.op {
            BlockOp::Read { address, length } => (*address, u64::from(*length)),
            BlockOp::Write { address, payload, .. } => (*address, payload.len() as u64),
            BlockOp::Discard { address, length } | BlockOp::WriteZeroes { address, length, .. } => (*address, *length),
            BlockOp::Flush => return self.order.target().submit(request),
        };
        if let Err(refusal) = admit(&request.op, address, length, self.size(), self.read_only()) {
            return answer(&request, refusal);
        }
        let whole = is_whole(address) && is_whole(length);
        match request.op {
            BlockOp::Read { .. } if whole => self.order.target().submit(request),
            BlockOp::Read { .. } => wide_read::start(self.order.target(), request, address, length),
            BlockOp::Discard { .. } => self.discard(request, address, length),
            _ if !whole && !self.merges => answer(&request, Err(BlockError::Invalid)),
            _ => self.order.enter(Change { request, first: address, end: address + length, whole }),
        }
    }
}

impl<T: BlockTarget + ?Sized + 'static> Aligned<T> {
    fn discard(&self, mut request: BlockRequest, address: u64, length: u64) {
        let first = address.next_multiple_of(BLOCK_BYTES);
        let end = round_down(address + length);
        if first >= end {
            return answer(&request, Ok(Bytes::new()));
        }
        request.op = BlockOp::Discard { address: first, length: end - first };
        self.order.enter(Change { request, first, end, whole: true });
    }
}

/// Whether the request may go on; `Err` holds its answer, which is a success for a request of nothing.
fn admit(op: &BlockOp, address: u64, length: u64, size: u64, read_only: bool) -> Result<(), BlockResult> {
    let reads = matches!(op, BlockOp::Read { .. });
    let bounded = reads || matches!(op, BlockOp::Write { .. });
    let inside = address.checked_add(length).is_some_and(|end| end <= size);
    if read_only && !reads {
        Err(Err(BlockError::ReadOnly))
    } else if !inside || (bounded && length > u64::from(MAX_REQUEST_BYTES)) {
        Err(Err(BlockError::Invalid))
    } else if length == 0 {
        Err(Ok(Bytes::new()))
    } else {
        Ok(())
    }
}

fn answer(request: &BlockRequest, result: BlockResult) {
    request.completions.complete(request.tag, result);
}

fn is_whole(bytes: u64) -> bool {
    bytes.is_multiple_of(BLOCK_BYTES)
}

fn round_down(bytes: u64) -> u64 {
    bytes - bytes % BLOCK_BYTES
}

#[cfg(test)]
mod tests;
