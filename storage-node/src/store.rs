//! The store: keeps pages, records and volume blobs of one device, by the contract of
//! [`lamina_protocol::storage_server::medium`].
//!
//! ```text
//! Device (device.rs)     on the server's thread: operations in, events out
//!   Ring (ring.rs)       one io_uring; moves bytes, decides nothing
//!     Core (core.rs)     decides everything, does no I/O itself: operations in, I/Os out; so the power-cut test drives it
//! recovery.rs            reads superblock, anchor, catalog, page table; replays the journal
//! ```
//! How a write becomes durable, in place (a device that keeps 4 KiB whole): data to its home → answered → at the next
//! flush fdatasync, then one transaction with the new presence and checksums, then fdatasync. Through the journal: one
//! transaction with data and checksums → answered → at the next flush fdatasync → at the next checkpoint home.
//! Invariants: no header, cell or catalog on disk is ahead of the durable journal; a slot is reused only after its
//! freeing is durable; a block's presence is durable only after its data (R11).
//!
//! Limits that callers must keep: a [`MediumOp::Commit`](lamina_protocol::storage_server::medium::MediumOp::Commit) holds
//! at most [`MAX_COMMIT_BYTES`] of records, counted as 80 bytes each plus blobs. A commit that would make the catalog
//! larger than its place is answered `NoSpace`.

// What is `pub(crate)` here is for fuzz/, which takes this module as source.
pub(crate) mod aligned;
mod catalog;
mod cells;
pub(crate) mod codec;
mod core;
mod device;
pub(crate) mod disk;
pub(crate) mod format;
pub(crate) mod geometry;
mod inspect;
pub(crate) mod journal;
mod probe;
pub(crate) mod record;
pub(crate) mod recovery;
mod ring;
mod space;
pub(crate) mod superblock;
pub(crate) mod table;

#[cfg(test)]
mod tests;

pub use aligned::{ALIGN, AlignedBuf};
pub use device::{Device, Identity, OpenOptions, Recovered, Sink, Stats, open};
pub use format::{FormatOptions, format, grow_file};
pub use geometry::MIN_DEVICE_BYTES;
pub use inspect::{Inspected, InspectedPage, inspect};
pub use probe::{Foreign, Found, probe};
pub use ring::Ready;

use lamina_protocol::ids::{ClusterId, ServerId};
use std::io;

/// Records of one commit, in bytes (80 for each and its blob): what one transaction of the smallest journal holds.
pub const MAX_COMMIT_BYTES: usize = 1 << 20;

/// Why a device cannot be used. All are for the `StorageServer`'s device condition; none is retried without a change.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Someone else holds it: a mount, RAID, another server.
    #[error("the device is busy: mounted or held by another program")]
    Busy,
    /// Below [`MIN_DEVICE_BYTES`], or smaller than it was.
    #[error("the device is too small: {bytes} bytes, at least {MIN_DEVICE_BYTES} are needed")]
    TooSmall {
        /// Its size.
        bytes: u64,
    },
    /// The device lost its end.
    #[error("the device shrank: {bytes} bytes, {needed} were in use")]
    Shrunk {
        /// Its size.
        bytes: u64,
        /// What the page table reaches to.
        needed: u64,
    },
    /// Neither a file nor a block device.
    #[error("the path is neither a file nor a block device")]
    NotADevice,
    /// It holds something else; only `format: true` overrides.
    #[error("refused: the device holds {0}; it is only overwritten with `format: true`")]
    Foreign(Foreign),
    /// It is a device of Lamina already; formatting it needs `format: true`.
    #[error("refused: the device belongs to server {server} of cluster {cluster}")]
    InUse {
        /// Its cluster.
        cluster: ClusterId,
        /// Its server.
        server: ServerId,
    },
    /// It carries no superblock.
    #[error("the device is blank")]
    NotFormatted,
    /// Of another cluster.
    #[error("the device belongs to another cluster: {found}")]
    WrongCluster {
        /// The one in its superblock.
        found: ClusterId,
    },
    /// Of another server.
    #[error("the device belongs to another server: {found}")]
    WrongServer {
        /// The one in its superblock.
        found: ServerId,
    },
    /// Written by a later Lamina.
    #[error("the device has format {version} with features {incompat:#x}, which this version does not know")]
    OtherVersion {
        /// Its format.
        version: u32,
        /// Its incompatible features.
        incompat: u64,
    },
    /// What is on it contradicts itself; its copies are lost and must be filled anew.
    #[error("the device is damaged: {0}")]
    Damaged(Damage),
    /// The kernel said no.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Which part of a device contradicts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Neither anchor is whole.
    #[error("no anchor is whole")]
    Anchor,
    /// The catalog does not verify.
    #[error("the catalog does not verify")]
    Catalog,
    /// A header of the page table does not verify.
    #[error("header {0} of the page table does not verify")]
    Header(u32),
    /// Two pages claim one slot, or two headers one page.
    #[error("header {0} of the page table claims what another has")]
    OwnedTwice(u32),
    /// A record of the journal that is known to have been durable does not verify.
    #[error("transaction {0} of the journal rotted")]
    Journal(u64),
}

impl DeviceError {
    pub(crate) fn io(doing: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Io { doing, source: source.into() }
    }
}
