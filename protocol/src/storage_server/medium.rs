//! What the storage server asks of one device, and what it may rely on: the contract between the page logic and a store.
//!
//! The page logic decides; a store keeps. `storage-node/store` implements this over real devices, the simulator over a
//! fake disk. One [`Medium`] is one opening of one device, so one boot id (R3).
//!
//! ## What a store promises
//! 1. Operations on one page take effect in the order in which they were handed in; the page logic never hands in two
//!    that overlap in blocks and are under way at once, unless both are reads.
//! 2. [`MediumOp::Commit`] is durable when it is answered, all its records or none, and all records of earlier commits
//!    with it. Commits that wait at the same time are made durable together (group commit). The page logic hands in at most
//!    [`MAX_COMMIT_RECORDS`] at once.
//! 3. [`MediumOp::Write`] and [`MediumOp::Shape`] are visible to later operations when they are answered and durable
//!    when a [`MediumOp::Flush`] that was handed in after that answer is answered.
//! 4. After a crash every block is as the last answered flush left it, or as any one later write or shape made it: old
//!    or new, never torn, never another page's content, never zeroes in place of what was lost (R11). A page whose
//!    `pending` mark is durable may get its checksums anew from the disk on a device that keeps 4 KiB whole.
//! 5. What was read once after an opening reads the same until it is written again.
//! 6. An error of a write, a commit or a flush ends the opening: [`MediumEvent::Failed`], and nothing is answered after
//!    it; nothing is tried again on the same opening (R3). Only [`MediumOp::Read`] may report bad blocks and go on (R12).

use crate::ids::{BootId, ClusterId, CopyId, DeviceId, LayerId, ServerId, VolumeId};
use crate::layer::{BlockState, BlockStates, PageKey};
use bytes::Bytes;
use std::ops::Range;

/// Records of one commit, at most.
pub const MAX_COMMIT_RECORDS: usize = 4096;

/// Names one operation until it is answered; chosen by the page logic, unique per opening.
pub type OpId = u64;

/// One thing asked of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MediumOp {
    /// The page's record; answered with [`MediumAnswer::Page`].
    Load(PageKey),
    /// Make records durable; answered with [`MediumAnswer::Done`].
    Commit(Vec<Record>),
    /// Data of blocks that are all present (or stale, when a person forces it). Answered with [`MediumAnswer::Data`].
    Read {
        /// Which page.
        page: PageKey,
        /// Block numbers within the page.
        blocks: Range<u32>,
    },
    /// Write whole blocks from `first` on and make them present. Allocates the page's slot if it has none; answered with
    /// [`MediumAnswer::NoSpace`] if there is none to have, and then nothing was changed.
    Write {
        /// Which page.
        page: PageKey,
        /// Number of the first block within the page.
        first: u32,
        /// Whole blocks.
        data: Bytes,
    },
    /// Give blocks another state without data: hole, absent or stale. Answered with [`MediumAnswer::Done`].
    Shape {
        /// Which page.
        page: PageKey,
        /// Ranges with their new state, never [`BlockState::Present`].
        changes: Vec<(Range<u32>, BlockState)>,
    },
    /// Give each of these pages a slot now, so that a later write cannot fail for space. All or none. The slots live in
    /// memory until the page is written. Answered with [`MediumAnswer::Done`] or [`MediumAnswer::NoSpace`].
    Allocate(Vec<PageKey>),
    /// Take the slots back that only [`MediumOp::Allocate`] made: pages that were written since keep theirs. Answered with
    /// [`MediumAnswer::Done`].
    Release(Vec<PageKey>),
    /// The first page at or after `from` that has an entry (a slot, a block state other than absent, or a flag).
    /// Answered with [`MediumAnswer::NextPage`].
    NextPage {
        /// The copy.
        copy: CopyId,
        /// The layer.
        layer: LayerId,
        /// Page number to start at.
        from: u64,
    },
    /// Everything answered so far becomes durable; answered with [`MediumAnswer::Done`].
    Flush,
}

/// A durable change that carries no data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The page's pending mark (the clearing mask of seed 002 \[0041\], I3).
    Pending {
        /// Which page.
        page: PageKey,
        /// Set or cleared.
        set: bool,
    },
    /// The page's `missed` mask: bit j = the member of ordinal j may lack a write that this copy has (seed 002 \[0040\]).
    Missed {
        /// Which page.
        page: PageKey,
        /// One bit per ordinal.
        mask: u16,
    },
    /// H7: the page is out of date. All its blocks that are not absent become stale and the flag is set, each time.
    MarkUnsynced(PageKey),
    /// The page was filled and its data is durable (H11c).
    ClearUnsynced(PageKey),
    /// H7 for a whole layer of a copy, in one record: every page becomes unsynced, whether it has an entry or not, and
    /// the fill cursor goes back to 0. Costs the same for every size: pages carry the number of the last mark they saw,
    /// and are made stale when they are next loaded.
    MarkLayerUnsynced {
        /// The copy.
        copy: CopyId,
        /// The layer.
        layer: LayerId,
    },
    /// A person forced the copy (I8): every stale block of the layer is again what it was when it became stale, present
    /// with the content that was kept or a hole (a hole also where there is no slot). One that was absent in a page with a
    /// slot stays stale: a slot may hold what its earlier owner left, and that is never shown. No page is unsynced by the
    /// layer's mark, and the cursor is `u64::MAX`. Flags of single pages stay. Costs the same for every size, as the mark does.
    TrustLayer {
        /// The copy.
        copy: CopyId,
        /// The layer.
        layer: LayerId,
    },
    /// Pages below the cursor are no longer unsynced by the layer's mark. `u64::MAX` = the fill of the layer is over.
    Cursor {
        /// The copy.
        copy: CopyId,
        /// The layer.
        layer: LayerId,
        /// First page that still is unsynced by the layer's mark.
        cursor: u64,
    },
    /// Blocks whose content cannot be trusted (R12).
    Stale {
        /// Which page.
        page: PageKey,
        /// Block numbers within the page.
        blocks: Vec<u32>,
    },
    /// The page's entry goes: all its blocks become absent, flags are cleared, the slot is free.
    DropPage(PageKey),
    /// Adds a copy, or gives it another list of layers; pages of a layer that is no longer listed go.
    PutCopy(CopyRecord),
    /// The copy goes with all its pages.
    DropCopy(CopyId),
    /// What the page logic keeps of a volume on this device (promise, map, incarnations, handled), opaque to the store,
    /// up to [`crate::limits::MAX_VOLUME_BLOB_BYTES`].
    PutVolume {
        /// The volume.
        volume: VolumeId,
        /// Replaces what was there.
        blob: Bytes,
    },
    /// Forget a volume, with its last copy.
    DropVolume(VolumeId),
    /// The highest number heard of the operator's Lease (R6).
    LeaseNumber(u64),
}

/// A copy on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyRecord {
    /// Which copy.
    pub copy: CopyId,
    /// Of which volume (for orphans and inspection; pages are not keyed by it).
    pub volume: VolumeId,
    /// Number of the placement in the map.
    pub placement: u32,
    /// Number of the group in the placement.
    pub group: u32,
    /// All layers, top first.
    pub layers: Vec<LayerRecord>,
}

/// A layer of a copy on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRecord {
    /// Which layer.
    pub layer: LayerId,
    /// Bytes of a page: a power of two, 64 KiB to 4 MiB.
    pub page_bytes: u32,
    /// First page that is unsynced by the layer's mark; `u64::MAX` when none is. Ignored in [`Record::PutCopy`] for a
    /// layer that is there already.
    pub cursor: u64,
}

/// The record of one page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRecord {
    /// Whether it has a slot on the device.
    pub allocated: bool,
    /// State of each block; stale already where a layer's mark made it so.
    pub blocks: BlockStates,
    /// The page's own unsynced flag ([`Record::MarkUnsynced`]), the layer's cursor apart.
    pub unsynced: bool,
    /// The durable pending mark.
    pub pending: bool,
    /// Ordinals that missed a write.
    pub missed: u16,
}

/// The answer to one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MediumAnswer {
    /// Done.
    Done,
    /// To [`MediumOp::Load`]; `None` if the page has no entry.
    Page(Option<PageRecord>),
    /// To [`MediumOp::Read`]: the data, with zeroes in place of each block that is in `bad`.
    Data {
        /// As many blocks as were asked for.
        data: Bytes,
        /// Blocks whose checksum failed or that the device could not read.
        bad: Vec<u32>,
    },
    /// To [`MediumOp::NextPage`].
    NextPage(Option<u64>),
    /// No slot is free. Nothing was changed.
    NoSpace,
}

/// What a device says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MediumEvent {
    /// One operation is answered.
    Answered {
        /// Which.
        op: OpId,
        /// With what.
        answer: MediumAnswer,
        /// Bytes that pages of any size can still have, after it.
        free_bytes: u64,
    },
    /// The device has grown.
    Grown {
        /// Bytes for pages in all, from now on.
        capacity_bytes: u64,
        /// Bytes that pages of any size can still have.
        free_bytes: u64,
    },
    /// The opening is over (R3): an operation failed or the device is gone. Nothing is answered after this.
    Failed,
}

/// What was found when the device was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The cluster in the superblock.
    pub cluster: ClusterId,
    /// The server in the superblock.
    pub server: ServerId,
    /// The device.
    pub device: DeviceId,
    /// Minted for this opening.
    pub boot: BootId,
    /// Every copy on it.
    pub copies: Vec<CopyRecord>,
    /// The blobs of [`Record::PutVolume`].
    pub volumes: Vec<(VolumeId, Bytes)>,
    /// Pages whose pending mark is durable: suspect until settled.
    pub pending: Vec<PageKey>,
    /// Pages that some member missed a write of, with the mask of their ordinals, never 0.
    pub missed: Vec<(PageKey, u16)>,
    /// Pages with a flag of their own.
    pub unsynced: Vec<PageKey>,
    /// Highest lease number heard.
    pub lease_number: u64,
    /// Bytes for pages in all.
    pub capacity_bytes: u64,
    /// Bytes that pages of any size can still have: whole free slabs (a store hands out space in slabs of 4 MiB, each
    /// for pages of one size; room left within a slab does not count).
    pub free_bytes: u64,
}
