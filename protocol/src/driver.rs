//! The driver's state machine: block requests of the OS in, frames to storage servers out (seed 002 Fig. 7A, 7B).
//!
//! One driver serves one volume for one session in one process. It holds no socket and no clock: see [`Input`] and
//! [`Output`]. Absent on purpose: polling, retries on a timer without a reason, any word to the operator but reports.

use crate::control::DriverReport;
use crate::ids::{ServerId, SessionId, VolumeId};
use crate::map::VolumeMap;
use crate::time::Millis;
use crate::wire::{ReplyFrame, RequestFrame, Start};
use bytes::Bytes;

/// What a driver is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Its volume.
    pub volume: VolumeId,
    /// Its session.
    pub session: SessionId,
    /// First stage of the session or take-over of a device.
    pub start: Start,
    /// Bytes of unflushed writes that it keeps (H5); default [`crate::limits::KEPT_WRITES_BYTES`].
    pub kept_bytes: u64,
}

/// Names a request of the OS until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// Names one connection to one server; a new connection has a new link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// What the OS asks. Addresses and lengths are whole blocks within the volume; the runtime refuses others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read `length` bytes at `address`.
    Read {
        /// Bytes from the start of the volume.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// Write these bytes at `address`.
    Write {
        /// Bytes from the start of the volume.
        address: u64,
        /// Whole blocks.
        data: Bytes,
    },
    /// Make the range read as zeroes and give its space back (discard and write-zeroes alike).
    Discard {
        /// Bytes from the start of the volume.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// All that was answered before becomes durable on all members.
    Flush,
}

/// Why a request of the OS fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OpError {
    /// EIO: the session is over, or no member has good data.
    Io,
    /// ENOSPC, out of a `Reserve`; nothing was sent.
    NoSpace,
    /// The session may not write.
    ReadOnly,
}

/// What happens to a driver.
#[derive(Clone, Debug)]
pub enum Input {
    /// A committed map, from the watch of the object (the first one comes so) or from a file.
    Map(VolumeMap),
    /// A connection was asked for and is there (its `Hello` is done by the runtime).
    Connected {
        /// To whom.
        server: ServerId,
        /// Its name.
        link: LinkId,
    },
    /// It could not be made, or broke. `None` = it could not be made.
    Broken {
        /// To whom.
        server: ServerId,
        /// Which.
        link: Option<LinkId>,
        /// Refused or reset by the other side (then reported at once), or a time-out or local trouble.
        refused: bool,
    },
    /// A frame came.
    Frame {
        /// Over this connection.
        link: LinkId,
        /// It.
        frame: ReplyFrame,
    },
    /// A request of the OS.
    Submit {
        /// Its name.
        tag: Tag,
        /// It.
        op: Op,
    },
    /// The time of the last [`Output::WakeAt`] has come.
    Timer,
}

/// What a driver wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Connect to a server, trying its addresses in turn; answered by `Connected` or `Broken`. The runtime waits before
    /// a connection that failed lately.
    Connect {
        /// To whom.
        server: ServerId,
        /// `host:port`, in order.
        addresses: Vec<String>,
    },
    /// Close a connection.
    Disconnect {
        /// Which.
        link: LinkId,
    },
    /// Send a frame.
    Send {
        /// Over this connection.
        link: LinkId,
        /// It.
        frame: RequestFrame,
    },
    /// Answer the OS.
    Complete {
        /// Which request.
        tag: Tag,
        /// Data of a read, nothing for the others.
        result: Result<Bytes, OpError>,
    },
    /// Tell the leader.
    Report(DriverReport),
    /// Wake me then; replaces the time set before. `Millis::NEVER` = not at all.
    WakeAt(Millis),
    /// A successor owns the device: answer the kernel nothing more and exit (R10).
    Exit,
}
