//! What happens to a leader and what it wants done: its contract with the program, the simulator and tests.

use super::condition::{Condition, Event, Veto};
use super::object::{Guard, Status, VolumeObject, WriteKind};
use super::pace::FillBudget;
use crate::control::{ControlReply, ControlRequest, CopyProgress, DriverReport};
use crate::ids::{ClusterId, CopyId, Generation, ServerId, VolumeId};
use crate::limits::{HEARTBEAT_FAILED_MS, HEARTBEAT_MS};
use crate::storage_server::StaleSeen;
use crate::time::Millis;

/// What a leader is started with.
pub struct Config {
    /// Its cluster; a server of another one is refused.
    pub cluster: ClusterId,
    /// Mints ids: random in programs, a seeded counter in the simulator. Never gives the same value twice, never 0.
    pub ids: Box<dyn FnMut() -> u128 + Send>,
    /// Between two heartbeats to one server, milliseconds.
    pub heartbeat_ms: u64,
    /// A server silent for so long has failed, milliseconds.
    pub heartbeat_failed_ms: u64,
    /// What fills of all volumes may take together.
    pub fill_budget: FillBudget,
}

impl Config {
    /// The usual times, no limit on fills but those of policies.
    pub fn new(cluster: ClusterId, ids: Box<dyn FnMut() -> u128 + Send>) -> Self {
        let fill_budget = FillBudget::default();
        Self { cluster, ids, heartbeat_ms: HEARTBEAT_MS, heartbeat_failed_ms: HEARTBEAT_FAILED_MS, fill_budget }
    }
}

/// Names a control call or a write until it is answered. A new leader starts at 1 again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// How an object reached the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From the watch or the list: may be older than what this leader has written since.
    Watched,
    /// The answer to [`Output::Read`]: the object as the store has it now. Believed in any case.
    Read,
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It stands.
    Done,
    /// The guard did not hold; nothing was changed.
    Conflict,
    /// Nobody knows: the store did not answer. The same write may be sent again, its guard makes that harmless.
    Unknown,
}

/// A `StorageServer` object.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ServerObject {
    /// Which.
    pub id: ServerId,
    /// `host:port` of its block listener, in order.
    pub addresses: Vec<String>,
    /// Failure domain; empty = none known, then the server is its own.
    pub zone: String,
    /// The node that it runs on, for locality.
    pub node: String,
    /// May take new copies.
    pub schedulable: bool,
    /// Its copies are to move away.
    pub drain: bool,
}

/// What happens to a leader.
#[allow(clippy::large_enum_variant, reason = "handed over one at a time, never kept in bulk")]
#[derive(Clone, Debug)]
pub enum Input {
    /// Every volume and server that exists was handed in. Nothing is changed before.
    Listed,
    /// A volume's object is new or changed.
    Volume {
        /// It.
        object: VolumeObject,
        /// How it came.
        source: Source,
    },
    /// A volume's object is gone from the store.
    VolumeGone {
        /// Which.
        volume: VolumeId,
    },
    /// A write ended ([`Output::Write`], [`Output::Release`]).
    Written {
        /// Which.
        call: CallId,
        /// How.
        outcome: Written,
    },
    /// A server's object is new or changed. A server's id is known once its first device is formatted; before, there
    /// is nothing to hand in.
    Server(ServerObject),
    /// A server's object is gone.
    ServerGone {
        /// Which.
        server: ServerId,
    },
    /// A server answers.
    Reply {
        /// Who.
        server: ServerId,
        /// Which call.
        call: CallId,
        /// What.
        reply: ControlReply,
    },
    /// A call could not be delivered, or the stream broke before its answer.
    Unreachable {
        /// Who.
        server: ServerId,
        /// Which call.
        call: CallId,
    },
    /// A driver reports trouble with a member.
    Report(DriverReport),
    /// A server that is behind a driver or peer asks for the committed map.
    MapWanted {
        /// Who.
        server: ServerId,
        /// Which volume.
        volume: VolumeId,
        /// At least this new.
        at_least: Generation,
    },
    /// A server answered a request `Stale` or `Ended`.
    Stale {
        /// Who.
        server: ServerId,
        /// What it saw.
        seen: StaleSeen,
    },
    /// The number in the Lease as read or written last (R6); the first one is the number found.
    LeaseNumber(u64),
    /// The time of the last [`Output::WakeAt`] has come.
    Timer,
}

/// What a leader wants done.
#[allow(clippy::large_enum_variant, reason = "carried out at once, never kept in bulk")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask a server. Calls to one server are delivered in order. Answered by `Reply` or `Unreachable`, in any order; a
    /// call that takes long is not repeated by the program.
    Control {
        /// Whom.
        server: ServerId,
        /// Names the call.
        call: CallId,
        /// What.
        request: ControlRequest,
    },
    /// Replace the status of a volume if the guard holds, as one compare-and-swap; answered by `Written`.
    Write {
        /// Whose.
        volume: VolumeId,
        /// Names the call.
        call: CallId,
        /// Which step it is.
        kind: WriteKind,
        /// What must stand there now, or nothing is changed.
        guard: Guard,
        /// What stands there afterwards. The map is `None` only before the first commit and after a deletion.
        next: Status,
    },
    /// Nothing is left of a deleted volume: take the finalizer away if the guard holds; answered by `Written`.
    Release {
        /// Which.
        volume: VolumeId,
        /// Names the call.
        call: CallId,
        /// What must stand there now.
        guard: Guard,
    },
    /// Read the object anew, past every cache; answered by `Volume` with [`Source::Read`], or `VolumeGone`.
    Read {
        /// Which.
        volume: VolumeId,
    },
    /// Raise the Lease's number above this (R6); the next `LeaseNumber` tells.
    RaiseLeaseNumber {
        /// The highest heard.
        above: u64,
    },
    /// Tell people, once.
    Event(Event),
    /// The conditions of a volume changed. All of them, each time.
    Conditions {
        /// Whose.
        volume: VolumeId,
        /// In the order of [`ConditionKind`].
        conditions: Vec<Condition>,
    },
    /// How far fills and settles of a volume are: after steps of 5 %, or 10 s.
    Progress {
        /// Whose.
        volume: VolumeId,
        /// Copies with work under way; empty = none any more. Their `pages` are those that there were to do when it began.
        copies: Vec<CopyProgress>,
    },
    /// What the leader thinks of a server changed.
    Server(ServerView),
    /// Copies on a server that no object names; all of them, each time that they change.
    Orphans {
        /// Where.
        server: ServerId,
        /// Which.
        orphans: Vec<Orphan>,
    },
    /// A step of a change is about to be left: a fail point. The program that is told to die here dies before it does
    /// any later output of the same call.
    Passed {
        /// Whose.
        volume: VolumeId,
        /// Of which change.
        generation: Generation,
        /// Which.
        step: Step,
    },
    /// Wake me then; replaces the time set before. `Millis::NEVER` = not at all.
    WakeAt(Millis),
}

/// The named steps of a change (PROTOCOL.md §3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// The intent was written, nothing else is done.
    Intended,
    /// The new copies are durable at their servers.
    CopiesPut,
    /// Serving members flushed ahead of the pause.
    Prepared,
    /// The first server promised.
    FirstPromise,
    /// All servers that must promised.
    Fenced,
    /// The read lease of members left out was waited out (M7).
    LeaseWaited,
    /// The map is committed, nobody serves it.
    Committed,
    /// The first server stored the map.
    FirstServed,
    /// All servers that serve stored it.
    Served,
    /// The change was given up: the old map stands under a new generation (R13).
    GivenUp,
    /// Orders to delete retired copies are confirmed, the object still names them.
    CopiesDeleted,
}

impl Step {
    /// All of them, so that programs and tests can name and count each.
    pub const ALL: [Self; 11] = [
        Self::Intended,
        Self::CopiesPut,
        Self::Prepared,
        Self::FirstPromise,
        Self::Fenced,
        Self::LeaseWaited,
        Self::Committed,
        Self::FirstServed,
        Self::Served,
        Self::GivenUp,
        Self::CopiesDeleted,
    ];
}

/// What the leader thinks of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerView {
    /// Which.
    pub id: ServerId,
    /// Whether it answers.
    pub health: ServerHealth,
    /// It was asked to stop and waits to be left out.
    pub leaving: bool,
    /// Bytes of all its open devices.
    pub capacity_bytes: u64,
    /// Bytes of those that no new page can have. Follows at steps of 1 % of the capacity, or after 60 s.
    pub used_bytes: u64,
    /// Bytes promised to copies that lie there, thin or not.
    pub provisioned_bytes: u64,
    /// Copies of committed maps there: (serving under the boot id that the server shows, all of them).
    pub copies: (u32, u32),
    /// Why its copies cannot be taken away, if somebody wants that (seed 002 \[0030\]); empty = nothing is in the way.
    pub vetoes: Vec<Veto>,
}

/// Whether a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServerHealth {
    /// Not heard of by this leader, which has not waited long enough either.
    Unknown,
    /// Answers.
    Alive,
    /// Silent, but so are so many that the leader suspects itself.
    Suspected,
    /// Silent.
    Failed,
    /// Belongs to another cluster or answers under another id: nothing is asked of it.
    Foreign,
}

/// A copy that no object names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Orphan {
    /// Of which volume.
    pub volume: VolumeId,
    /// Which.
    pub copy: CopyId,
    /// Generation of the map stored beside it.
    pub stored: Generation,
    /// Whether there is an object of that volume at all.
    pub volume_known: bool,
}
