//! What happens to a storage server and what it wants done: its contract with the program, the simulator and tests.

use super::medium::{MediumEvent, MediumOp, OpId, Opened};
use crate::control::{ControlReply, ControlRequest};
use crate::ids::{BootId, Generation, ServerId, SessionId, VolumeId};
use crate::layer::PageKey;
use crate::time::Millis;
use crate::wire::{ReplyFrame, RequestFrame};

/// Names a connection that was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// Names a connection to a peer that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u64);

/// Names a control call until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// What happens to a storage server.
#[derive(Clone, Debug)]
pub enum Input {
    /// A device was opened.
    DeviceOpened(Opened),
    /// A device answers, or is gone. Devices are named by the boot id of their opening.
    Device {
        /// Which opening.
        boot: BootId,
        /// What it says.
        event: MediumEvent,
    },
    /// A frame came over an accepted connection (the first one makes it known).
    Frame {
        /// Which connection.
        conn: ConnId,
        /// It.
        frame: RequestFrame,
    },
    /// An accepted connection is gone.
    Closed {
        /// Which.
        conn: ConnId,
    },
    /// The operator asks.
    Control {
        /// Names the call.
        call: CallId,
        /// What.
        request: ControlRequest,
    },
    /// A connection to a peer that was asked for is there (`Hello` is done by the runtime).
    PeerConnected {
        /// Which.
        peer: PeerId,
    },
    /// It could not be made, or broke.
    PeerBroken {
        /// Which.
        peer: PeerId,
    },
    /// A peer answers.
    PeerFrame {
        /// Which.
        peer: PeerId,
        /// It.
        frame: ReplyFrame,
    },
    /// The process was asked to stop: it wants to be left out first (heartbeats say so).
    Leave,
    /// The time of the last [`Output::WakeAt`] has come.
    Timer,
}

/// What a storage server wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Hand an operation to a device.
    Medium {
        /// Which opening.
        boot: BootId,
        /// Names the operation.
        op: OpId,
        /// It.
        what: MediumOp,
    },
    /// Close a device: an operation failed (R3). The runtime may open it anew, under a new boot id.
    CloseDevice {
        /// Which opening.
        boot: BootId,
    },
    /// Send a reply.
    Reply {
        /// Over this connection.
        conn: ConnId,
        /// It.
        frame: ReplyFrame,
    },
    /// Close an accepted connection: the other side broke the protocol, which is logged with this reason.
    Close {
        /// Which.
        conn: ConnId,
        /// What it did.
        why: Violation,
    },
    /// Answer the operator.
    ControlReply {
        /// Which call.
        call: CallId,
        /// The answer.
        reply: ControlReply,
    },
    /// Connect to a peer, trying its addresses in turn.
    PeerConnect {
        /// Names the connection.
        peer: PeerId,
        /// To whom.
        server: ServerId,
        /// `host:port`, in order.
        addresses: Vec<String>,
    },
    /// Send a request to a peer.
    PeerSend {
        /// Which.
        peer: PeerId,
        /// It.
        frame: RequestFrame,
    },
    /// Close a connection to a peer.
    PeerClose {
        /// Which.
        peer: PeerId,
    },
    /// A request was answered `Stale` or `Ended`: counted at once by the runtime, told to the operator.
    StaleSeen(StaleSeen),
    /// Blocks of a page here cannot be trusted any more, or they were brought from another copy (R12): for the log and
    /// the metrics.
    Rot(Rot),
    /// Ask the operator for the committed map of a volume: a request was ahead of this server.
    AskMap {
        /// Which.
        volume: VolumeId,
        /// At least this new.
        at_least: Generation,
    },
    /// Wake me then; replaces the time set before. `Millis::NEVER` = not at all.
    WakeAt(Millis),
}

/// Blocks that the device gave back otherwise than they were written, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rot {
    /// The volume.
    pub volume: VolumeId,
    /// The page of the copy that lies here.
    pub page: PageKey,
    /// Blocks of it that were found bad now; 0 = what another copy has of the bad ones was taken from it, durably.
    pub bad: u32,
}

/// A stale request, for metrics and events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleSeen {
    /// The volume.
    pub volume: VolumeId,
    /// The client; none for a peer.
    pub session: SessionId,
    /// What it had.
    pub had: Generation,
    /// What it needs.
    pub need: Generation,
}

/// How a peer or client broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Violation {
    /// No `Hello` first, or a second one.
    #[error("no Hello first, or a second one")]
    Hello,
    /// Another cluster.
    #[error("the client belongs to another cluster")]
    WrongCluster,
    /// It expected another server here.
    #[error("the client expected another server at this address")]
    WrongServer,
    /// No version in common.
    #[error("no protocol version in common")]
    Version,
    /// More requests or bytes under way than the window allows.
    #[error("more requests under way than the window allows")]
    Window,
    /// A place that is not whole blocks within a page.
    #[error("a place that is not whole blocks within a page")]
    Place,
    /// A handle that this connection may not use.
    #[error("a handle that this connection may not use")]
    Handle,
    /// A write of a session that may only read, or a block request of a peer.
    #[error("a request that this opener may not make")]
    NotAllowed,
}
