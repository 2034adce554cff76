//! Frames of the block protocol (PROTOCOL.md §8) on an ordered byte stream.
//!
//! A frame is a header of 88 bytes, a body and a payload. All numbers are little endian.
//!
//! | at | bytes | request | reply |
//! |---|---|---|---|
//! | 0 | 4 | length of the whole frame | the same |
//! | 4 | 2 | version | the same |
//! | 6 | 1 | kind ([`RequestBody`]) | kind ([`ReplyBody`]) |
//! | 7 | 1 | flags, 0 | flags, 0 |
//! | 8 | 1 | class: 1 foreground, 2 fill, 3 scrub | as the request |
//! | 9 | 3 | 0 | 0 |
//! | 12 | 4 | length of the body | the same |
//! | 16 | 8 | request id, from 1 | the request's; 0 = not asked for (a pushed map) |
//! | 24 | 8 | handle, 0 before `Open` | the request's |
//! | 32 | 16 | target server (forwarding), 0 = the one connected to | boot id of the copy's device |
//! | 48 | 8 | generation | generation of the map stored at the server |
//! | 56 | 8 | generation of a shared layer, 0 = none | credit: pages reserved for the handle since it was opened |
//! | 64 | 8 | seq of a write attempt, else 0 | token: seq of the write that is acknowledged |
//! | 72 | 8 | confirmed | 0 |
//! | 80 | 4 | CRC-32C of the payload, 0 if there is none | the same |
//! | 84 | 4 | CRC-32C of bytes 0–83 and the body | the same |
//!
//! The body is in the encoding of [`crate::codec`], without the enum's tag (that is the kind). A reader checks both
//! checksums, refuses a frame over [`MAX_FRAME_BYTES`], of another version or with bits set that must be 0, and closes
//! the connection: after a broken frame nothing that follows can be trusted.

use crate::codec::{DecodeError, Reader, Wire, wire_enum, wire_struct};
use crate::ids::{BootId, ClusterId, Generation, Incarnation, LayerId, OpenNumber, Seq, ServerId, SessionId, VolumeId};
use crate::layer::BlockStates;
use crate::limits::MAX_FRAME_BYTES;
use crate::map::VolumeMap;
use bytes::Bytes;

mod frame;

pub use frame::{
    Framing, frame_length, put_reply, put_reply_head, put_request, put_request_head, read_reply, read_request,
};

/// The version that this code speaks. It reads its predecessor too (there is none yet).
pub const WIRE_VERSION: u16 = 1;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 88;

/// Names a request on its connection until it is answered. 0 = none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RequestId(pub u64);

/// Names a handle at one server process. 0 = none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HandleId(pub u64);

/// What a request is for; fills and scrubs yield to foreground I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Class {
    /// Somebody waits for it.
    #[default]
    Foreground,
    /// A fill or a settle.
    Fill,
    /// A check of checksums.
    Scrub,
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RequestHeader {
    /// Names it on the connection.
    pub request: RequestId,
    /// Hence volume, session and incarnation.
    pub handle: HandleId,
    /// What for.
    pub class: Class,
    /// For forwarding; none = the server connected to.
    pub target: ServerId,
    /// The data storage configuration identifier (seed 002 \[0027\]).
    pub generation: Generation,
    /// Of a layer with a map of its own; 0 until snapshots land.
    pub shared_generation: Generation,
    /// The attempt, of requests that change something.
    pub seq: Seq,
    /// Every write up to here is acknowledged and durable on all copies (I3).
    pub confirmed: Seq,
}

/// The header of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ReplyHeader {
    /// The request that is answered; 0 = none was asked.
    pub request: RequestId,
    /// The request's.
    pub handle: HandleId,
    /// The request's.
    pub class: Class,
    /// Opening of the device that answered.
    pub boot: BootId,
    /// Of the stored map.
    pub generation: Generation,
    /// Pages reserved for the handle since it was opened (R8).
    pub credit: u64,
    /// The token of an acknowledged write.
    pub token: Seq,
}

/// A run of blocks of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The layer.
    pub layer: LayerId,
    /// Group of the layer's placement.
    pub group: u32,
    /// Page in the group.
    pub page: u64,
    /// Bytes from the start of the page, whole blocks.
    pub offset: u32,
    /// Bytes, whole blocks, within the page.
    pub length: u32,
}

/// Who opens a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Opener {
    /// A driver.
    Session {
        /// Its session.
        session: SessionId,
    },
    /// A peer; may only fill and settle.
    Peer {
        /// Its server id.
        server: ServerId,
    },
}

/// Whether a process starts a session or takes a device over (H20).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Start {
    /// The first stage of a session.
    Fresh,
    /// The device's kernel side gives back every unanswered request.
    Resume,
}

/// What a client or a peer asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestBody {
    /// First frame of a connection. A server that is not the expected one closes: addresses are reused.
    Hello {
        /// Of the cluster.
        cluster: ClusterId,
        /// Who should be there.
        server: ServerId,
        /// Lowest version spoken.
        min_version: u16,
        /// Highest version spoken.
        max_version: u16,
        /// Feature bits offered.
        features: u64,
        /// Longest frame taken, bytes.
        max_frame_bytes: u32,
    },
    /// Makes a handle (H1, R7).
    Open {
        /// The volume.
        volume: VolumeId,
        /// Who.
        opener: Opener,
        /// Which process of the session.
        incarnation: Incarnation,
        /// Higher than any of this (session, incarnation) that this boot has seen.
        number: OpenNumber,
        /// First stage or take-over.
        start: Start,
        /// Opaque, up to 4 KiB, empty until grants land.
        grant: Bytes,
    },
    /// Lets this connection use the handle in the header too.
    Join,
    /// Answered with [`ReplyBody::Data`].
    Read {
        /// Where.
        place: Place,
    },
    /// The payload is the data.
    Write {
        /// Where.
        place: Place,
    },
    /// Makes holes; a write to the masks.
    Discard {
        /// Where.
        place: Place,
    },
    /// All that this boot executed for the session on any handle becomes durable.
    Flush,
    /// Credit for these pages `(layer, (group, page))` (R8).
    Reserve {
        /// Which.
        pages: Vec<(LayerId, (u32, u64))>,
    },
    /// The opener will not write these pages now `(layer, (group, page))`: slots that only a `Reserve` made are free again
    /// (R8).
    Release {
        /// Which.
        pages: Vec<(LayerId, (u32, u64))>,
    },
    /// Answered with [`ReplyBody::Map`].
    GetMap,
    /// Answered if a read would be served (R5).
    Ping,
    /// Only carries `confirmed`.
    Confirm,
    /// The pending writes of an older incarnation count as the opener's own.
    Adopt {
        /// The older one.
        incarnation: Incarnation,
    },
    /// The driver has written again what was lost up to here (R2).
    Handled {
        /// Up to here.
        loss: Generation,
    },
    /// A peer pulls a page to fill its own; answered with [`ReplyBody::Page`].
    Fill {
        /// The layer.
        layer: LayerId,
        /// The group.
        group: u32,
        /// The page.
        page: u64,
    },
    /// A peer reads a page to settle its own; answered with [`ReplyBody::Page`].
    Settle {
        /// The layer.
        layer: LayerId,
        /// The group.
        group: u32,
        /// The page.
        page: u64,
    },
    /// A peer asks the authoritative copy which pages it has pending; answered with [`ReplyBody::Pages`].
    Suspects {
        /// The layer.
        layer: LayerId,
        /// The group.
        group: u32,
    },
    /// Which pages of a group were ever written; answered with [`ReplyBody::Written`], as a read would be.
    Written {
        /// The layer.
        layer: LayerId,
        /// The group.
        group: u32,
        /// Page to begin at.
        from: u64,
    },
}

/// What a server answers. From `Superseded` on these are the numbered replies of the comparator and its kin: values,
/// not errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyBody {
    /// To `Hello`.
    Hello {
        /// Who answers.
        server: ServerId,
        /// The version both speak.
        version: u16,
        /// Feature bits of both.
        features: u64,
        /// Longest frame taken, bytes.
        max_frame_bytes: u32,
        /// Requests that a handle may have under way.
        window_requests: u32,
        /// Payload bytes that a handle may have under way.
        window_bytes: u64,
    },
    /// To `Open`.
    Opened {
        /// The handle.
        handle: HandleId,
        /// Highest incarnation of the session known here, the opener's included.
        incarnation: Incarnation,
        /// Losses handled as known here.
        handled: Generation,
        /// The stored map, if there is one.
        map: Option<VolumeMap>,
    },
    /// It is done; a write's token is in the header.
    Done,
    /// The payload is the data.
    Data,
    /// The stored map: asked for, or pushed after it was stored.
    Map {
        /// It.
        map: VolumeMap,
    },
    /// A page for a fill or a settle. The payload is the data of its present blocks, in order.
    Page {
        /// States of its blocks; all absent if the page has no entry.
        blocks: BlockStates,
        /// Writers of its pending writes at the source, with the last seq of each (H8, H9).
        pending: Vec<(SessionId, (Incarnation, Seq))>,
        /// It was pending on disk when the source's device was opened, and is not settled.
        pending_before_start: bool,
        /// Ordinals that missed a write, at the source.
        missed: u16,
        /// The next page of the layer that has an entry at the source; `u64::MAX` = none.
        next: u64,
    },
    /// To `Suspects`: the pages that the authoritative copy has pending.
    Pages {
        /// Their numbers.
        pages: Vec<u64>,
    },
    /// To `Written`: a piece of the list.
    Written {
        /// Pages with a block that is not absent, rising.
        pages: Vec<u64>,
        /// Page from which to ask on; `u64::MAX` = the list is whole.
        next: u64,
    },
    /// A higher incarnation or handle is open.
    Superseded {
        /// The highest incarnation.
        highest: Incarnation,
    },
    /// The request is of a newer generation than the server's.
    Behind {
        /// The server's.
        own: Generation,
    },
    /// The map does not list the session. Final.
    Ended,
    /// The range is revoked for this session.
    Revoked,
    /// The request is of an older generation, or a higher one is promised, or the session is held.
    Stale {
        /// Park until a map at least as new is there.
        wait_for: Generation,
    },
    /// The map does not list the copy under this boot id in a state that serves this.
    NotServing,
    /// No such copy or layer here.
    NoCopy,
    /// To `Reserve`; to a write that finds no room even in the reserve of the device (R8), which has changed nothing.
    NoSpace,
    /// These blocks of the request, counted from its first, have no good content here (R12). The payload is the data
    /// with zeroes in their place.
    BadBlock {
        /// Which.
        blocks: Vec<u32>,
    },
    /// This server holds nothing from this layer on for some of the range: the driver goes on from there.
    Below {
        /// Where to go on.
        layer: LayerId,
    },
    /// Not known here.
    Unsupported,
    /// The `Open` was not above the highest number seen (R7).
    OpenRefused {
        /// The highest.
        highest: OpenNumber,
    },
}

/// A request as it goes over a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestFrame {
    /// Its header.
    pub header: RequestHeader,
    /// What is asked.
    pub body: RequestBody,
    /// Data of a write.
    pub payload: Bytes,
}

/// A reply as it goes over a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyFrame {
    /// Its header.
    pub header: ReplyHeader,
    /// The answer.
    pub body: ReplyBody,
    /// Data of a read or a page.
    pub payload: Bytes,
}

wire_struct!(Place { layer, group, page, offset, length });
wire_enum!(Opener { 1 = Session { session }, 2 = Peer { server } });
wire_enum!(Start { 1 = Fresh, 2 = Resume });
wire_enum!(Class { 1 = Foreground, 2 = Fill, 3 = Scrub });
wire_enum!(RequestBody {
    1 = Hello { cluster, server, min_version, max_version, features, max_frame_bytes },
    2 = Open { volume, opener, incarnation, number, start, grant },
    3 = Join,
    4 = Read { place },
    5 = Write { place },
    6 = Discard { place },
    7 = Flush,
    8 = Reserve { pages },
    9 = GetMap,
    10 = Ping,
    11 = Confirm,
    12 = Adopt { incarnation },
    13 = Handled { loss },
    14 = Fill { layer, group, page },
    15 = Settle { layer, group, page },
    16 = Suspects { layer, group },
    17 = Written { layer, group, from },
    18 = Release { pages },
});
wire_enum!(ReplyBody {
    1 = Hello { server, version, features, max_frame_bytes, window_requests, window_bytes },
    2 = Opened { handle, incarnation, handled, map },
    3 = Done,
    4 = Data,
    5 = Map { map },
    6 = Page { blocks, pending, pending_before_start, missed, next },
    7 = Pages { pages },
    8 = Written { pages, next },
    32 = Superseded { highest },
    33 = Behind { own },
    34 = Ended,
    35 = Revoked,
    36 = Stale { wait_for },
    37 = NotServing,
    38 = NoCopy,
    39 = NoSpace,
    40 = BadBlock { blocks },
    41 = Below { layer },
    42 = Unsupported,
    43 = OpenRefused { highest },
});

impl Wire for HandleId {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        u64::take(from).map(Self)
    }
}

impl Wire for BlockStates {
    fn put(&self, out: &mut Vec<u8>) {
        self.len().put(out);
        for word in self.words() {
            word.put(out);
        }
    }
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let blocks = u32::take(from)?;
        let out_of_range = DecodeError::OutOfRange { what: "blocks of a page", value: blocks.into() };
        if !(16..=1024).contains(&blocks) {
            return Err(out_of_range);
        }
        let words = (0..blocks.div_ceil(32)).map(|_| u64::take(from)).collect::<Result<Vec<_>, _>>()?;
        Self::from_words(blocks, &words).ok_or(out_of_range)
    }
}

impl RequestBody {
    /// Whether it changes blocks, so that it has a `seq` and must reach every writer.
    pub fn changes_blocks(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard { .. })
    }
}

impl ReplyBody {
    /// Whether the request was done.
    pub fn is_success(&self) -> bool {
        matches!(
            self,
            Self::Hello { .. }
                | Self::Opened { .. }
                | Self::Done
                | Self::Data
                | Self::Map { .. }
                | Self::Page { .. }
                | Self::Pages { .. }
                | Self::Written { .. }
        )
    }
}

impl Place {
    /// Whether it is whole blocks within a page of this size.
    pub fn fits(&self, page_bytes: u32) -> bool {
        let block = crate::layer::BLOCK_BYTES;
        let end = self.offset.checked_add(self.length);
        self.length > 0
            && self.offset.is_multiple_of(block)
            && self.length.is_multiple_of(block)
            && end.is_some_and(|end| end <= page_bytes)
    }

    /// The blocks of the page.
    pub fn blocks(&self) -> std::ops::Range<u32> {
        self.offset / crate::layer::BLOCK_BYTES..(self.offset + self.length) / crate::layer::BLOCK_BYTES
    }
}

const _: () = assert!(MAX_FRAME_BYTES as usize > HEADER_BYTES);
