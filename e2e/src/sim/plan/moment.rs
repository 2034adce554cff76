//! Moments that trouble can wait for: random times seldom hit what lasts a millisecond (PROTOCOL.md §9).

use lamina_protocol::management::Step;
use std::fmt;

/// Something that happens in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A leader passes a step of a change.
    Leader(Step),
    /// A driver sends a write or discard to one member.
    WriteSent,
    /// One member answers a write or discard.
    WriteDone,
    /// An application's flush is acknowledged.
    FlushDone,
    /// A member answers a fence.
    Promised,
    /// A member hands a page to a peer.
    PageServed,
    /// A successor has the device.
    TookOver,
    /// A successor adopts what the one before left pending.
    Adopted,
    /// A driver says that a loss is handled.
    Handled,
    /// A commit lets a member rejoin, or puts one in its place.
    Rejoined,
    /// A commit makes a filled member `Active`.
    Filled,
    /// A commit begins a settle.
    SettleBegan,
    /// A commit ends one.
    SettleOver,
    /// A commit takes a session out.
    SessionOut,
}

impl Moment {
    /// All but those of leaders.
    pub const OTHERS: [Self; 13] = [
        Self::WriteSent,
        Self::WriteDone,
        Self::FlushDone,
        Self::Promised,
        Self::PageServed,
        Self::TookOver,
        Self::Adopted,
        Self::Handled,
        Self::Rejoined,
        Self::Filled,
        Self::SettleBegan,
        Self::SettleOver,
        Self::SessionOut,
    ];

    /// Whether it comes with every few requests.
    pub fn is_frequent(self) -> bool {
        matches!(self, Self::WriteSent | Self::WriteDone | Self::FlushDone)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self {
            Self::Leader(step) => return write!(f, "a leader passes {step:?}"),
            Self::WriteSent => "a driver sends a write to a member",
            Self::WriteDone => "a member answers a write",
            Self::FlushDone => "a flush is acknowledged",
            Self::Promised => "a member answers a fence",
            Self::PageServed => "a member hands a page to a peer",
            Self::TookOver => "a successor has the device",
            Self::Adopted => "a successor adopts",
            Self::Handled => "a driver says handled",
            Self::Rejoined => "a member rejoins",
            Self::Filled => "a filled member is Active",
            Self::SettleBegan => "a settle begins",
            Self::SettleOver => "a settle is over",
            Self::SessionOut => "a session is out",
        };
        f.write_str(words)
    }
}
