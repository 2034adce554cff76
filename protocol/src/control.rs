//! What the operator and the storage servers say to each other, and what drivers report (PROTOCOL.md §3).
//!
//! Every command carries volume, generation and the copy for which it was decided; a server that has stored or promised
//! a higher generation refuses it, so the words of a deposed leader cannot harm. The messages travel as bytes of this
//! encoding inside a gRPC stream that the leader dials; the core knows nothing of that.

mod suspects;

use crate::codec::{wire_enum, wire_struct};
use crate::ids::{
    BootId, ClusterId, CopyId, DeviceId, Generation, Incarnation, LayerId, ServerId, SessionId, VolumeId,
};
use crate::map::VolumeMap;

pub use suspects::{PIECE_PAGES, PageList};

/// What the operator asks of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlRequest {
    /// Are you there? Once a second.
    Heartbeat {
        /// The Lease's number as this leader counts it (R6).
        lease_number: u64,
    },
    /// Make a copy durable before it enters a map, or confirm that it is there with these layers. Nothing is in it; it
    /// is not unsynced (a first map has nothing to fill) unless `unsynced` says so (a replacement).
    PutCopy {
        /// Whose.
        volume: VolumeId,
        /// The proposal for which it was decided.
        generation: Generation,
        /// The copy.
        copy: CopyId,
        /// Which device; the server picks the one with most room for each copy there if this is none.
        device: DeviceId,
        /// Index of the placement.
        placement: u32,
        /// Index of the group.
        group: u32,
        /// Layers with their page size in bytes, top first.
        layers: Vec<(LayerId, u32)>,
        /// Every page of it is to be filled.
        unsynced: bool,
    },
    /// Promise a generation and refuse everything below (step 3 of §3).
    Fence(Fence),
    /// A committed map: store it, serve it, hand it to the open sessions (step 5 of §3).
    Serve {
        /// The map.
        map: VolumeMap,
    },
    /// Flush outside the pause, before a fence that flushes.
    PrepareFlush {
        /// Whose.
        volume: VolumeId,
        /// The committed generation.
        generation: Generation,
    },
    /// Delete a copy with all its pages.
    DeleteCopy {
        /// Whose.
        volume: VolumeId,
        /// Which.
        copy: CopyId,
        /// The committed generation whose object says so.
        generation: Generation,
    },
    /// Everything known of one volume (R6, orphans).
    GetVolume {
        /// Which.
        volume: VolumeId,
    },
    /// Every copy on this server (orphans, R6, R14).
    Inventory,
    /// How much the fill of each copy of this volume may take here, from now on; forgotten with the process. No generation:
    /// it decides nothing but a pace.
    LimitFills {
        /// Whose.
        volume: VolumeId,
        /// How much.
        limit: FillLimit,
    },
    /// Under a fence: which pages of a returning member are suspect, by what this copy knows of itself (PROTOCOL.md §5.9).
    ListSuspects {
        /// Whose.
        volume: VolumeId,
        /// The promised generation.
        generation: Generation,
        /// The copy that is asked, `Active` in the committed map.
        copy: CopyId,
        /// Under this opening.
        boot: BootId,
        /// The ordinal of the returning member.
        towards: u8,
        /// The page from which on.
        from: u64,
    },
    /// Under a fence, to the server of a returning member: what to mark before the last answer (H7).
    Rejoin(Rejoin),
    /// Can you reach that server? Asked about servers that are silent together, when the leader suspects itself.
    Reach {
        /// Which.
        server: ServerId,
        /// `host:port` of its block listener, in order.
        addresses: Vec<String>,
    },
}

/// What the fill of one copy may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FillLimit {
    /// Bytes per second that are pulled; 0 = no limit but that client requests go first.
    pub bytes_per_second: u64,
    /// Pages that are pulled at the same time, 1 to 64; 0 = as the server does by itself.
    pub pages: u32,
}

/// Step 3 of §3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The volume.
    pub volume: VolumeId,
    /// The generation to promise.
    pub generation: Generation,
    /// Flush before answering (H11b): the plan ends a session, seals, ends a settle or makes a member `Active`.
    pub flush: bool,
    /// Copies on this server that rejoin without a list: every page of them is marked unsynced, durably, before the answer
    /// (H7).
    pub unsync: Vec<CopyId>,
}

/// A piece of the list of suspect pages for a member that returns (PROTOCOL.md §5.9).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejoin {
    /// The volume.
    pub volume: VolumeId,
    /// The generation that was promised.
    pub generation: Generation,
    /// The copy that returns.
    pub copy: CopyId,
    /// The ordinal of the member that the list comes from.
    pub source: u8,
    /// The piece. With the last one all that this copy itself knows to be suspect is marked, too, and the answer is what the
    /// fence would be answered now.
    pub list: PageList,
}

/// What a server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlReply {
    /// To a heartbeat.
    Alive(Alive),
    /// Done, durably.
    Done,
    /// To a fence: everything that the plan may use about this server.
    Promised(Promised),
    /// A higher generation is promised or stored here.
    Refused {
        /// Highest promise.
        promised: Generation,
        /// Generation of the stored map.
        stored: Generation,
    },
    /// This copy is not here.
    NoCopy {
        /// Which.
        copy: CopyId,
    },
    /// No device of this server has room, or none is open.
    NoSpace,
    /// The device of a copy is closed (R3); nothing about it can be promised.
    DeviceClosed,
    /// To `GetVolume`; `None` if nothing is known of it.
    Volume {
        /// What is known.
        volume: Option<VolumeReport>,
    },
    /// To `Inventory`.
    Inventory {
        /// Each copy.
        copies: Vec<CopyInventory>,
    },
    /// To `ListSuspects`.
    Suspects(PageList),
    /// To `Reach`.
    Reached {
        /// Which.
        server: ServerId,
        /// It answered, as that very server.
        reached: bool,
    },
}

/// A server's sign of life. Lists only what is worth telling.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Alive {
    /// Who answers.
    pub server: ServerId,
    /// Of which cluster.
    pub cluster: ClusterId,
    /// Highest number of the Lease ever heard.
    pub lease_number: u64,
    /// It was asked to stop and wants to be left out first.
    pub leaving: bool,
    /// Its devices.
    pub devices: Vec<DeviceReport>,
    /// Copies with work under way, and those whose device is closed.
    pub copies: Vec<CopyProgress>,
    /// Volumes whose promise is above the stored map, or that a driver or peer is ahead of.
    pub behind: Vec<(VolumeId, Generation)>,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// Which.
    pub device: DeviceId,
    /// This opening; none while closed.
    pub boot: BootId,
    /// Bytes for pages.
    pub capacity_bytes: u64,
    /// Bytes that a new page can have.
    pub free_bytes: u64,
}

/// How far a copy's background work is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyProgress {
    /// Whose.
    pub volume: VolumeId,
    /// Which.
    pub copy: CopyId,
    /// Under this opening; none = its device is closed.
    pub boot: BootId,
    /// Generation of the stored map.
    pub stored: Generation,
    /// Pages still unsynced.
    pub unsynced: u64,
    /// Pages in all.
    pub pages: u64,
    /// Suspect pages not yet settled in the settle under way.
    pub to_settle: u64,
    /// Bytes filled since the copy became `Syncing`.
    pub filled_bytes: u64,
}

/// The answer to a fence. H2: all that the plan uses about a member comes from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promised {
    /// Who.
    pub server: ServerId,
    /// What is promised now.
    pub generation: Generation,
    /// Generation of the stored map; 0 = none.
    pub stored: Generation,
    /// Sessions heard of, with their highest incarnation and what they handled.
    pub sessions: Vec<(SessionId, (Incarnation, Generation))>,
    /// Each copy of the volume here.
    pub copies: Vec<CopyReport>,
}

/// What a fence reply says of one copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyReport {
    /// Which.
    pub copy: CopyId,
    /// The opening of its device.
    pub boot: BootId,
    /// Pages that a fill must still bring.
    pub unsynced: u64,
    /// Pages with pending writes per living or dead (session, incarnation).
    pub pending: Vec<(SessionId, (Incarnation, u64))>,
    /// Pages that were pending on disk at the start of this opening and are not settled since.
    pub pending_before_start: u64,
    /// The settle this copy worked on: (authoritative copy, its boot id, generation that began it).
    pub settled_for: Option<SettleName>,
    /// Suspect pages not yet settled and durable in that settle. On its authoritative copy: pages with stale blocks that
    /// another member may still have, then [`SETTLE_ANEW`].
    pub to_settle: u64,
    /// Under the promise that this answers every suspect page was marked, by a whole list or by the mark of the whole copy.
    pub listed: bool,
}

/// What the authoritative copy of a settle has still to settle once it took a block that it had stale from another member:
/// that settle can never end, and is to begin anew (PROTOCOL.md §5.8).
pub const SETTLE_ANEW: u64 = u64::MAX;

/// The name of a settle (M3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SettleName {
    /// Whose word counts.
    pub authoritative: CopyId,
    /// Under which boot id.
    pub boot: BootId,
    /// The generation that began it.
    pub begun: Generation,
}

/// What a server stores of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeReport {
    /// Highest promise.
    pub promised: Generation,
    /// The stored committed map.
    pub map: Option<VolumeMap>,
}

/// A copy lying on a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyInventory {
    /// Of which volume.
    pub volume: VolumeId,
    /// Which.
    pub copy: CopyId,
    /// On which device.
    pub device: DeviceId,
    /// Generation of the map stored beside it.
    pub stored: Generation,
}

/// What a driver tells the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverReport {
    /// Its volume.
    pub volume: VolumeId,
    /// Its session.
    pub session: SessionId,
    /// The generation that it works under.
    pub generation: Generation,
    /// The member concerned.
    pub copy: CopyId,
    /// That member's server.
    pub server: ServerId,
    /// What is wrong.
    pub trouble: Trouble,
}

/// What is wrong with a member, as a driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trouble {
    /// The connection was refused or reset.
    Unreachable,
    /// No progress for the stall timeout, or no room even in its reserve (R8).
    Stalled,
    /// It answered `NotServing`: another boot id, or a closed device.
    NotServing,
    /// It answered `NoCopy`.
    NoCopy,
}

wire_enum!(ControlRequest {
    1 = Heartbeat { lease_number },
    2 = PutCopy { volume, generation, copy, device, placement, group, layers, unsynced },
    4 = Serve { map },
    5 = PrepareFlush { volume, generation },
    6 = DeleteCopy { volume, copy, generation },
    7 = GetVolume { volume },
    8 = Inventory,
    9 = LimitFills { volume, limit },
    10 = Reach { server, addresses },
    11 = ListSuspects { volume, generation, copy, boot, towards, from },
    12 = Rejoin(rejoin),
    3 = Fence(fence),
});
wire_struct!(FillLimit { bytes_per_second, pages });
wire_struct!(Fence { volume, generation, flush, unsync });
wire_struct!(Rejoin { volume, generation, copy, source, list });
wire_enum!(ControlReply {
    1 = Alive(alive),
    2 = Done,
    3 = Promised(promised),
    4 = Refused { promised, stored },
    5 = NoCopy { copy },
    6 = NoSpace,
    7 = DeviceClosed,
    8 = Volume { volume },
    9 = Inventory { copies },
    10 = Reached { server, reached },
    11 = Suspects(list),
});
wire_struct!(Alive { server, cluster, lease_number, leaving, devices, copies, behind });
wire_struct!(DeviceReport { device, boot, capacity_bytes, free_bytes });
wire_struct!(CopyProgress { volume, copy, boot, stored, unsynced, pages, to_settle, filled_bytes });
wire_struct!(Promised { server, generation, stored, sessions, copies });
wire_struct!(CopyReport { copy, boot, unsynced, pending, pending_before_start, settled_for, to_settle, listed });
wire_struct!(SettleName { authoritative, boot, begun });
wire_struct!(VolumeReport { promised, map });
wire_struct!(CopyInventory { volume, copy, device, stored });
wire_struct!(DriverReport { volume, session, generation, copy, server, trouble });
wire_enum!(Trouble { 1 = Unreachable, 2 = Stalled, 3 = NotServing, 4 = NoCopy });
