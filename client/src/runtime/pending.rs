//! Requests of front ends that the driver has not answered: a table without allocation per request.

use super::Metrics;
use super::metrics::OpMetrics;
use crate::block::{BlockError, BlockOp, BlockRequest, BlockResult, Completions};
use lamina_protocol::driver::{Op, OpError, Tag};
use std::sync::Arc;
use std::time::Instant;

/// What kind of request it is, for the counters.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write,
    Discard,
    Flush,
    /// Whether anything was ever written; no front end asks this, and it is not counted.
    Question,
}

/// One request under way.
struct Pending {
    tag: u64,
    completions: Arc<dyn Completions>,
    since: Instant,
    kind: Kind,
    bytes: u64,
    /// A flush follows before it is answered (FUA).
    flush_after: bool,
}

/// An answer on its way to a front end.
pub(super) struct Answer {
    tag: u64,
    completions: Arc<dyn Completions>,
    result: BlockResult,
}

impl Answer {
    /// Give it to the front end. With no lock held: it may hand requests in.
    pub(super) fn deliver(self) {
        self.completions.complete(self.tag, self.result);
    }
}

/// What became of an answered operation of the driver.
pub(super) enum Next {
    /// The front end is answered.
    Answer(Answer),
    /// The same request goes on with a flush.
    Flush(Tag),
}

/// The table. A tag is a slot; a slot is free when its request is answered.
#[derive(Default)]
pub(super) struct Table {
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
}

impl Table {
    /// Enter a request that has passed the checks: what the driver is to do, under which name. `None` = nothing is left
    /// of it after rounding; then the answer is there already.
    pub(super) fn enter(&mut self, request: BlockRequest, since: Instant) -> Result<(Tag, Op), Answer> {
        let BlockRequest { op, tag, completions } = request;
        let (kind, flush_after, op) = match op {
            BlockOp::Read { address, length } => (Kind::Read, false, Op::Read { address, length: length.into() }),
            BlockOp::Write { address, payload, fua } => (Kind::Write, fua, Op::Write { address, data: payload }),
            BlockOp::WriteZeroes { address, length, fua } => (Kind::Discard, fua, Op::Discard { address, length }),
            BlockOp::Flush => (Kind::Flush, false, Op::Flush),
            BlockOp::Discard { address, length } => {
                let first = address.next_multiple_of(crate::block::BLOCK_BYTES);
                let end = (address + length) / crate::block::BLOCK_BYTES * crate::block::BLOCK_BYTES;
                if first >= end {
                    return Err(Answer { tag, completions, result: Ok(bytes::Bytes::new()) });
                }
                (Kind::Discard, false, Op::Discard { address: first, length: end - first })
            }
        };
        let bytes = match &op {
            Op::Read { length, .. } | Op::Discard { length, .. } => *length,
            Op::Write { data, .. } => data.len() as u64,
            Op::Flush | Op::AskWritten => 0,
        };
        Ok((self.keep(Pending { tag, completions, since, kind, bytes, flush_after }), op))
    }

    /// Enter the question whether anything was ever written.
    pub(super) fn enter_question(&mut self, completions: Arc<dyn Completions>) -> (Tag, Op) {
        let since = Instant::now();
        let pending = Pending { tag: 0, completions, since, kind: Kind::Question, bytes: 0, flush_after: false };
        (self.keep(pending), Op::AskWritten)
    }

    fn keep(&mut self, pending: Pending) -> Tag {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(pending);
        Tag(slot as u64)
    }

    /// The driver has answered an operation.
    pub(super) fn answered(&mut self, tag: Tag, result: Result<bytes::Bytes, OpError>, metrics: &Metrics) -> Next {
        let slot = tag.0 as usize;
        let pending = self.slots[slot].as_mut().expect("the driver answers once");
        if result.is_ok() && std::mem::take(&mut pending.flush_after) {
            return Next::Flush(tag);
        }
        let pending = self.slots[slot].take().expect("just seen");
        self.free.push(slot);
        if let Some(counters) = pending.counters(metrics) {
            counters.count(pending.bytes, result.is_err(), pending.since.elapsed());
        }
        let result = result.map_err(|error| match error {
            OpError::Io => BlockError::Io,
            OpError::NoSpace => BlockError::NoSpace,
            OpError::ReadOnly => BlockError::ReadOnly,
        });
        Next::Answer(Answer { tag: pending.tag, completions: pending.completions, result })
    }

    /// Give up on everything.
    pub(super) fn fail_all(&mut self, error: BlockError) -> Vec<Answer> {
        self.free.clear();
        let left = std::mem::take(&mut self.slots).into_iter().flatten();
        left.map(|p| Answer { tag: p.tag, completions: p.completions, result: Err(error) }).collect()
    }

    /// How many are under way.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

impl Pending {
    fn counters<'m>(&self, metrics: &'m Metrics) -> Option<&'m OpMetrics> {
        match self.kind {
            Kind::Read => Some(&metrics.reads),
            Kind::Write => Some(&metrics.writes),
            Kind::Discard => Some(&metrics.discards),
            Kind::Flush => Some(&metrics.flushes),
            Kind::Question => None,
        }
    }
}
