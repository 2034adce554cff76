//! One storage server as the driver sees it: connection, handle, window, credit, read lease.
//!
//! ```text
//! link    Down --Connect--> Connecting --Connected--> Up --Broken--> Down
//! handle  Closed --Open sent--> Opening --Opened--> Open --link broken, or dead--> Closed
//!                                  '--not now--> Waiting --newer map or push--> Closed
//! ```
//! Invariants: every `Open` has a higher number than all before (H1, R7); what is under way stays within the window of a
//! handle; frames leave in the order in which they were queued.

use super::LinkId;
use super::credit::Credit;
use super::op::OpId;
use crate::ids::{Generation, Incarnation, OpenNumber, Seq, ServerId};
use crate::limits::{READ_LEASE_MS, WINDOW_BYTES, WINDOW_REQUESTS};
use crate::mutants::{Mutant, on};
use crate::time::Millis;
use crate::wire::{Class, HandleId, RequestBody, RequestFrame, RequestHeader, RequestId};
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};

/// The connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Connecting,
    Up(LinkId),
}

/// The handle on the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handle {
    Closed,
    Opening(OpenKey),
    /// The server will not open now: asked again under a newer map, or when it has pushed one.
    Waiting,
    Open(HandleId),
}

/// A read of one part.
#[derive(Clone, Debug)]
pub(super) struct ReadPart {
    pub(super) op: OpId,
    pub(super) attempt: u32,
    /// Where in the volume.
    pub(super) address: u64,
    pub(super) length: u32,
    /// Readers of the group that were asked, one bit each by their place in [`super::view::Route::readers`].
    pub(super) tried: u16,
    /// What a member with bad blocks has given (R12).
    pub(super) partial: Option<Box<Partial>>,
}

/// Data with holes where no member asked so far had a good block.
#[derive(Clone, Debug)]
pub(super) struct Partial {
    pub(super) data: Vec<u8>,
    /// Blocks of the part that are still missing.
    pub(super) missing: Vec<u32>,
}

/// A question for the written pages of one group of one layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct WrittenPart {
    pub(super) op: OpId,
    pub(super) attempt: u32,
    /// Index of the layer in the map.
    pub(super) layer: usize,
    pub(super) group: u32,
    /// Page to begin at.
    pub(super) from: u64,
}

/// Which `Open`: replies to an earlier one say nothing.
pub(super) type OpenKey = (Incarnation, OpenNumber);

/// What a frame is for.
#[derive(Clone, Debug)]
pub(super) enum What {
    Open(OpenKey),
    Ping,
    /// Room that another member lacked is given back (R8): nothing waits for the answer.
    Release,
    Read(ReadPart),
    Written(WrittenPart),
    /// Any other frame of an attempt.
    Part {
        op: OpId,
        attempt: u32,
    },
}

impl What {
    /// The attempt that it belongs to.
    pub(super) fn attempt(&self) -> Option<(OpId, u32)> {
        match self {
            Self::Read(part) => Some((part.op, part.attempt)),
            Self::Written(part) => Some((part.op, part.attempt)),
            Self::Part { op, attempt } => Some((*op, *attempt)),
            Self::Open(_) | Self::Ping | Self::Release => None,
        }
    }
}

/// A frame that waits for the handle or the window.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) what: What,
    pub(super) body: RequestBody,
    pub(super) payload: Bytes,
    pub(super) seq: Seq,
}

/// A frame that was sent and is not answered.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) what: What,
    pub(super) at: Millis,
    pub(super) generation: Generation,
    pub(super) handle: HandleId,
    pub(super) seq: Seq,
    pub(super) bytes: u64,
}

/// What every header says at the moment of sending.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) now: Millis,
    pub(super) generation: Generation,
    pub(super) confirmed: Seq,
}

/// A storage server.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) link: Link,
    pub(super) handle: Handle,
    pub(super) addresses: Vec<String>,
    next_request: u64,
    pub(super) under_way: BTreeMap<RequestId, Sent>,
    under_way_bytes: u64,
    pub(super) queue: VecDeque<Outgoing>,
    /// It has answered this process's `Open` under the current map (H20).
    pub(super) discovered: bool,
    /// It is behind the driver's map: nothing is sent until it has caught up.
    pub(super) behind: bool,
    /// It has promised nothing above this generation at the time of sending (R5).
    lease: (Generation, Millis),
    /// A ping is queued or under way.
    pub(super) pinging: bool,
    /// What the last frame told it of `confirmed`.
    pub(super) told_confirmed: Seq,
    pub(super) credit: Credit,
    /// Since when it owes an answer, or the connection is missing.
    pub(super) owes_since: Option<Millis>,
    /// When an `Open` that it could not take is tried again, should it not push a map before.
    pub(super) retry_open_at: Option<Millis>,
    /// The generation at which it was last reported for not serving.
    pub(super) refused_at: Generation,
    /// The generation at which it last refused a ping: it is not asked again before the next one.
    pub(super) ping_refused_at: Generation,
    /// It has opened a handle for the present incarnation: no other process acts under that one (H20).
    pub(super) vouched: bool,
}

impl Peer {
    pub(super) fn new(addresses: Vec<String>, now: Millis) -> Self {
        Self {
            link: Link::Connecting,
            handle: Handle::Closed,
            addresses,
            next_request: 0,
            under_way: BTreeMap::new(),
            under_way_bytes: 0,
            queue: VecDeque::new(),
            discovered: false,
            behind: false,
            lease: (Generation(0), Millis(0)),
            pinging: false,
            told_confirmed: Seq(0),
            credit: Credit::default(),
            owes_since: Some(now),
            retry_open_at: None,
            refused_at: Generation(0),
            ping_refused_at: Generation(0),
            vouched: false,
        }
    }

    /// Whether requests can be sent to it.
    pub(super) fn is_open(&self) -> bool {
        matches!((self.handle, self.link), (Handle::Open(_), Link::Up(_))) && !self.behind
    }

    pub(super) fn up(&self) -> Option<LinkId> {
        if let Link::Up(link) = self.link { Some(link) } else { None }
    }

    /// Whether a frame of this many bytes may leave now.
    pub(super) fn may_send(&self, bytes: u64) -> bool {
        self.is_open()
            && self.under_way.len() < WINDOW_REQUESTS as usize
            && (self.under_way_bytes + bytes <= WINDOW_BYTES || self.under_way_bytes == 0)
    }

    /// The frame to send, noted as under way.
    pub(super) fn frame(&mut self, outgoing: Outgoing, stamp: Stamp) -> RequestFrame {
        let Outgoing { what, body, payload, seq } = outgoing;
        let handle = if let Handle::Open(handle) = self.handle { handle } else { HandleId(0) };
        self.next_request += 1;
        let request = RequestId(self.next_request);
        let bytes = frame_bytes(&body);
        let Stamp { now, generation, confirmed } = stamp;
        if !matches!(what, What::Open(_)) {
            self.told_confirmed = confirmed;
        }
        self.under_way.insert(request, Sent { what, at: now, generation, handle, seq, bytes });
        self.under_way_bytes += bytes;
        self.owes_since.get_or_insert(now);
        let header = RequestHeader {
            request,
            handle,
            class: Class::Foreground,
            target: ServerId::NONE,
            generation,
            shared_generation: Generation(0),
            seq,
            confirmed,
        };
        RequestFrame { header, body, payload }
    }

    /// A request was answered. `None` = nobody asked.
    pub(super) fn answered(&mut self, request: RequestId, now: Millis) -> Option<Sent> {
        let sent = self.under_way.remove(&request)?;
        self.under_way_bytes -= sent.bytes;
        let oldest = self.under_way.values().next().map(|oldest| oldest.at);
        self.owes_since = match (oldest, &sent.what) {
            (None, _) if !self.behind => None,
            // A ping is answered without the disk: it is no progress with what else is under way.
            (Some(oldest), What::Ping) => self.owes_since.map(|since| since.max(oldest)),
            _ => Some(now),
        };
        Some(sent)
    }

    /// Whether this request was ever made; it may have been forgotten since.
    pub(super) fn was_sent(&self, request: RequestId) -> bool {
        request.0 <= self.next_request
    }

    /// A handle that is being opened is of no use any longer; a server answers only the latest `Open`.
    pub(super) fn forget_open(&mut self) {
        self.under_way.retain(|_, sent| !matches!(sent.what, What::Open(_)));
        self.handle = Handle::Closed;
        if self.under_way.is_empty() && matches!(self.link, Link::Up(_)) {
            self.owes_since = None;
        }
    }

    /// The connection is gone; what was under way will not be answered.
    pub(super) fn lose(&mut self, now: Millis) -> BTreeMap<RequestId, Sent> {
        self.link = Link::Connecting;
        if !on(Mutant::HandleKept) || !matches!(self.handle, Handle::Open(_)) {
            self.handle = Handle::Closed;
        }
        self.under_way_bytes = 0;
        self.behind = false;
        self.pinging = self.queue.iter().any(|queued| matches!(queued.what, What::Ping));
        self.told_confirmed = Seq(0);
        self.owes_since = Some(now);
        std::mem::take(&mut self.under_way)
    }

    /// It is behind the driver's map; until it has caught up it makes no progress.
    pub(super) fn fall_behind(&mut self, now: Millis) {
        self.behind = true;
        self.owes_since.get_or_insert(now);
    }

    /// It is not behind any longer.
    pub(super) fn catch_up(&mut self) {
        self.behind = false;
        if self.under_way.is_empty() && matches!(self.link, Link::Up(_)) {
            self.owes_since = None;
        }
    }

    /// A request that was sent at `at` was served at this generation (R5).
    pub(super) fn served(&mut self, generation: Generation, at: Millis) {
        self.lease = self.lease.max((generation, at));
    }

    /// How long ago a request that it served at this generation was sent; `None` = never.
    pub(super) fn served_ago(&self, generation: Generation, now: Millis) -> Option<u64> {
        (self.lease.0 == generation).then(|| now.since(self.lease.1))
    }

    /// Whether its word holds for a read that is handed over now.
    pub(super) fn leased(&self, generation: Generation, now: Millis) -> bool {
        self.served_ago(generation, now).is_some_and(|ms| ms < READ_LEASE_MS)
    }
}

/// Payload bytes of a request and its reply, as the window counts them.
pub(super) fn frame_bytes(body: &RequestBody) -> u64 {
    match body {
        RequestBody::Read { place } | RequestBody::Write { place } => place.length.into(),
        _ => 0,
    }
}
