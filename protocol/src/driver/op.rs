//! Requests under way: those of the OS and the driver's own, with the attempt that runs for each.
//!
//! ```text
//! Blocked --overlapping writes done--> Ready --gate open--> Reserving --granted--> Running --all answered--> gone
//!                                        ^        |                                  |  |
//!                                        |        '-- nothing to reserve ------------'  '--lease missing--> AwaitingLease
//!                                        '------- Parked <--- setback, once every frame is answered or lost
//! ```
//! Every state but `Blocked` and `Ready` falls back to `Ready` when a new map comes. Invariant: a reply counts only for
//! the attempt it answers ([`Attempt::number`]), and an attempt ends only when none of its frames is outstanding, or
//! under a newer map (H1, M6).

use super::{OpError, Tag};
use crate::ids::{Generation, Incarnation, Seq};
use crate::mutants::{Mutant, on};
use bytes::{Bytes, BytesMut};
use std::ops::Range;

/// Names an operation in the driver; rises in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct OpId(pub(super) u64);

/// Who wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The OS.
    Os(Tag),
    /// The driver itself.
    Own(Purpose),
}

/// Why the driver does something by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Idle, or too much is kept: flush.
    Flush,
    /// Hand `confirmed` over while idle.
    Confirm,
    /// Write again what a loss may have taken (R2).
    Rewrite,
    /// The flush after that.
    RewriteFlush,
    /// Say that it is handled.
    SayHandled,
    /// A successor's first flush after the replay.
    ReplayFlush,
    /// Take over the pending writes of the process before.
    Adopt,
}

impl Purpose {
    /// Whether it is a step of the handling of a loss.
    pub(super) fn handles_loss(self) -> bool {
        matches!(self, Self::Rewrite | Self::RewriteFlush | Self::SayHandled)
    }
}

/// What goes to every serving server at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broadcast {
    /// A flush; when all have answered, `confirmed` may rise to `covers` and what was acknowledged as number `acks` or
    /// before need not be kept any longer. Both are taken when it is sent.
    Flush { covers: Seq, acks: u64 },
    /// Losses up to here are handled.
    Handled(Generation),
    /// Pending writes of this incarnation and of those before it count as this one's.
    Adopt(Incarnation),
    /// Only carries `confirmed`.
    Confirm,
}

/// What is asked.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Read {
        address: u64,
        length: u64,
    },
    Write {
        address: u64,
        data: Bytes,
    },
    Discard {
        address: u64,
        length: u64,
    },
    /// Whether any block was ever written.
    Written,
    Broadcast(Broadcast),
}

impl Kind {
    /// The bytes of the volume that it concerns; none where it is about the volume as a whole.
    pub(super) fn range(&self) -> Range<u64> {
        match self {
            Self::Read { address, length } | Self::Discard { address, length } => *address..*address + *length,
            Self::Write { address, data } => *address..*address + data.len() as u64,
            Self::Written | Self::Broadcast(_) => 0..0,
        }
    }

    /// Whether it is about the volume as a whole and waits for no write.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self, Self::Written | Self::Broadcast(_))
    }

    /// Whether it changes blocks.
    pub(super) fn changes_blocks(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard { .. })
    }
}

/// Where an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// An overlapping write that was handed in before is not done.
    Blocked,
    /// May start as soon as the driver may send.
    Ready,
    /// Would keep more than may be kept: waits for a flush (H5).
    AwaitingRoom,
    /// Asks for room for its pages (R8); no frame of the write was sent.
    Reserving,
    /// Frames are out, or wait for a window.
    Running,
    /// The data of a read is there, the read lease is not (R5).
    AwaitingLease,
    /// Waits to be restarted.
    Parked(Hold),
}

/// What a parked operation waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Hold {
    /// A map at least as new.
    pub(super) map: Generation,
    /// A handle that is open at every member concerned, and none of them behind (M6).
    pub(super) handles: bool,
}

/// Why an attempt does not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Setback {
    /// Restart it when this is fulfilled.
    Hold(Hold),
    /// Tell the OS.
    Fail(OpError),
}

impl Setback {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Hold(a), Self::Hold(b)) => {
                Self::Hold(Hold { map: a.map.max(b.map), handles: a.handles || b.handles })
            }
            (fail @ Self::Fail(_), _) | (_, fail @ Self::Fail(_)) => fail,
        }
    }
}

/// What a read has got so far.
#[derive(Debug, Default)]
pub(super) enum Gathered {
    #[default]
    Nothing,
    /// The one frame's payload, not copied.
    Whole(Bytes),
    /// Pieces at their places.
    Pieces(BytesMut),
}

/// One try under one map.
#[derive(Debug, Default)]
pub(super) struct Attempt {
    /// Rises with every try; frames of another one do not count.
    pub(super) number: u32,
    /// Frames handed to peers and not answered.
    pub(super) outstanding: u32,
    /// Where the next part starts: a position in the cutting of `parts`; `None` = all parts are out.
    pub(super) next: Option<u64>,
    /// Groups touched, one bit each.
    pub(super) groups: u16,
    /// The first thing that went wrong, joined with what followed.
    pub(super) setback: Option<Setback>,
    /// Data of a read.
    pub(super) gathered: Gathered,
}

/// One operation.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) origin: Origin,
    pub(super) kind: Kind,
    pub(super) state: State,
    /// Overlapping writes before it that are not done.
    pub(super) blockers: u32,
    /// Operations that it blocks.
    pub(super) waiters: Vec<OpId>,
    /// The first `seq` of its first attempt; `confirmed` stays below it until the write has succeeded.
    pub(super) first_seq: Option<Seq>,
    /// The attempt of a read that has waited for overlapping writes after it: once for each, so none waits for ever.
    pub(super) waited: u32,
    /// Whether a frame that changes blocks may have left: from then on it never ends with ENOSPC (R8).
    pub(super) sent: bool,
    /// Its range was revoked after it was handed in (PROTOCOL.md §7).
    pub(super) revoked: bool,
    /// Bytes counted as kept while it is under way.
    pub(super) kept_bytes: u64,
    pub(super) attempt: Attempt,
}

impl Op {
    pub(super) fn new(origin: Origin, kind: Kind) -> Self {
        let state = State::Ready;
        Self {
            origin,
            kind,
            state,
            blockers: 0,
            waiters: Vec::new(),
            first_seq: None,
            waited: 0,
            sent: false,
            revoked: false,
            kept_bytes: 0,
            attempt: Attempt::default(),
        }
    }

    /// Begin a new attempt; frames of those before do not count any longer.
    pub(super) fn begin(&mut self, state: State) {
        let number = self.attempt.number.wrapping_add(u32::from(!on(Mutant::AnyAttemptCounts)));
        self.attempt = Attempt { number, next: Some(0), ..Attempt::default() };
        self.state = state;
    }

    /// Note that a frame went wrong.
    pub(super) fn set_back(&mut self, setback: Setback) {
        self.attempt.setback = Some(self.attempt.setback.map_or(setback, |before| before.and(setback)));
    }

    pub(super) fn handles_loss(&self) -> bool {
        matches!(self.origin, Origin::Own(purpose) if purpose.handles_loss())
    }
}
