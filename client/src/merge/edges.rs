//! One unaligned write or write-zeroes: its edge blocks are read, changed and written, its whole blocks written beside.
//!
//! ```text
//! head: read block --patch--> write block --+
//! body: write, or write-zeroes -------------+--> all parts done --> answer
//! tail: read block --patch--> write block --+
//! ```
//! The first error of any part is the answer; [`BlockError::Superseded`] outranks the others: the front end must not
//! answer then.

use super::order::{Change, Extent, Order};
use super::{BLOCK_BYTES, is_whole, round_down};
use crate::block::{BlockError, BlockOp, BlockRequest, BlockResult, BlockTarget, Completions};
use bytes::{Bytes, BytesMut};
use std::sync::{Arc, Mutex};

/// What a change puts into its range.
#[derive(Clone)]
enum Content {
    Payload(Bytes),
    Zeroes,
}

/// The parts, also their tags towards the target.
const HEAD_READ: u64 = 0;
const TAIL_READ: u64 = 1;
const PART_WRITTEN: u64 = 2;

struct Progress {
    parts_left: u8,
    error: Option<BlockError>,
}

struct Merge<T: BlockTarget + ?Sized> {
    order: Arc<Order<T>>,
    extent: Extent,
    first: u64,
    end: u64,
    content: Content,
    fua: bool,
    tag: u64,
    completions: Arc<dyn Completions>,
    progress: Mutex<Progress>,
}

/// Begin a change that [`Order`] has admitted as a merge.
pub(super) fn start<T>(order: Arc<Order<T>>, change: Change, extent: Extent)
where
    T: BlockTarget + ?Sized + 'static,
{
    let Change { request: BlockRequest { op, tag, completions }, first, end, .. } = change;
    let (content, fua) = match op {
        BlockOp::Write { payload, fua, .. } => (Content::Payload(payload), fua),
        BlockOp::WriteZeroes { fua, .. } => (Content::Zeroes, fua),
        other => unreachable!("only writes have edges to merge, not {other:?}"),
    };
    let head = !is_whole(first) || end < first + BLOCK_BYTES;
    let tail = !is_whole(end) && (!head || round_down(end) != round_down(first));
    let body = (if head { round_down(first) + BLOCK_BYTES } else { first }, round_down(end));
    let has_body = body.0 < body.1;
    let parts_left = u8::from(head) + u8::from(tail) + u8::from(has_body);
    let progress = Mutex::new(Progress { parts_left, error: None });
    let merge = Arc::new(Merge { order, extent, first, end, content, fua, tag, completions, progress });
    if head {
        merge.submit(HEAD_READ, BlockOp::Read { address: round_down(first), length: BLOCK_BYTES as u32 });
    }
    if tail {
        merge.submit(TAIL_READ, BlockOp::Read { address: round_down(end), length: BLOCK_BYTES as u32 });
    }
    if has_body {
        merge.submit(PART_WRITTEN, merge.body(body.0, body.1));
    }
}

impl<T: BlockTarget + ?Sized + 'static> Merge<T> {
    fn submit(self: &Arc<Self>, tag: u64, op: BlockOp) {
        let completions = Arc::new(Part { merge: self.clone() });
        self.order.target().submit(BlockRequest { op, tag, completions });
    }

    fn body(&self, first: u64, end: u64) -> BlockOp {
        match &self.content {
            Content::Payload(bytes) => {
                let payload = bytes.slice((first - self.first) as usize..(end - self.first) as usize);
                BlockOp::Write { address: first, payload, fua: self.fua }
            }
            Content::Zeroes => BlockOp::WriteZeroes { address: first, length: end - first, fua: self.fua },
        }
    }

    /// The block at `address` as `old` with this change's bytes put in.
    fn patched(&self, address: u64, old: &Bytes) -> Bytes {
        assert_eq!(old.len() as u64, BLOCK_BYTES, "a target answers a read with as many bytes as were asked for");
        let (from, to) = (self.first.max(address), self.end.min(address + BLOCK_BYTES));
        let mut block = BytesMut::from(&old[..]);
        let place = &mut block[(from - address) as usize..(to - address) as usize];
        match &self.content {
            Content::Payload(bytes) => {
                place.copy_from_slice(&bytes[(from - self.first) as usize..(to - self.first) as usize]);
            }
            Content::Zeroes => place.fill(0),
        }
        block.freeze()
    }

    fn edge_was_read(self: &Arc<Self>, address: u64, result: BlockResult) {
        match result {
            Ok(old) => {
                let payload = self.patched(address, &old);
                self.submit(PART_WRITTEN, BlockOp::Write { address, payload, fua: self.fua });
            }
            Err(error) => self.part_done(Err(error)),
        }
    }

    fn part_done(&self, result: Result<(), BlockError>) {
        let mut progress = self.progress.lock().expect("no code that can panic runs under this lock");
        if let Err(error) = result
            && (progress.error.is_none() || error == BlockError::Superseded)
        {
            progress.error = Some(error);
        }
        progress.parts_left -= 1;
        if progress.parts_left > 0 {
            return;
        }
        let result = progress.error.map_or(Ok(Bytes::new()), Err);
        drop(progress);
        self.completions.complete(self.tag, result);
        self.order.leave(self.extent);
    }
}

/// The sink of a merge's parts; a type of its own only because `Completions` is called without the `Arc`.
struct Part<T: BlockTarget + ?Sized> {
    merge: Arc<Merge<T>>,
}

impl<T: BlockTarget + ?Sized + 'static> Completions for Part<T> {
    fn complete(&self, tag: u64, result: BlockResult) {
        match tag {
            HEAD_READ => self.merge.edge_was_read(round_down(self.merge.first), result),
            TAIL_READ => self.merge.edge_was_read(round_down(self.merge.end), result),
            _ => self.merge.part_done(result.map(drop)),
        }
    }
}
