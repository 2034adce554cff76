//! What people are told: conditions, events and vetoes as typed values with a text in plain words.

use crate::ids::{CopyId, ServerId, VolumeId};

/// What a condition speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionKind {
    /// Its copies have places.
    Placed,
    /// Every group has an `Active` member that answers.
    Available,
    /// Every group has all wished copies `Active`.
    Healthy,
    /// No group is being settled; while it is, sessions are held.
    Settled,
    /// A device with a copy of it has no room for a new page (R8).
    OutOfSpace,
    /// A server stores a newer committed map than the object, or may (R6). Nothing is changed.
    Diverged,
    /// Deletion is asked for.
    Deleting,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Of what.
    pub kind: ConditionKind,
    /// Whether it holds.
    pub holds: bool,
    /// Why, for programs.
    pub reason: Reason,
    /// Why, for people.
    pub text: String,
}

/// Why a condition is as it is. `Debug` is the CamelCase word that Kubernetes wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// All is as wished.
    AsWished,
    /// Not tried yet.
    Pending,
    /// The policy does not exist.
    UnknownPolicy,
    /// The policy or size is out of range.
    InvalidWish,
    /// More copies than servers that may take one.
    TooFewServers,
    /// More copies than zones, and each must have its own.
    TooFewZones,
    /// Larger than the free space.
    TooLarge,
    /// The size may only grow.
    ShrinkRefused,
    /// A group's last good copies are away.
    WaitingForCopies,
    /// Restarted members wait for a silent one that may hold more (H13).
    WaitingForSilentMember,
    /// Members are filled.
    Filling,
    /// Members are away.
    MembersFailed,
    /// Suspect pages are made equal.
    Settling,
    /// A device has no room for a new page.
    DeviceFull,
    /// Servers must answer first (R6).
    WaitingForServers,
    /// The object's map is not one.
    MapInvalid,
    /// A person must say which map to adopt.
    NewerMapFound,
    /// Sessions are still there.
    InUse,
    /// Holders must confirm that they deleted their copies.
    DeletingCopies,
    /// Not asked for.
    NotAsked,
}

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// To which volume, if to one.
    pub volume: Option<VolumeId>,
    /// At which server, if at one.
    pub server: Option<ServerId>,
    /// What.
    pub reason: EventReason,
    /// In plain words.
    pub text: String,
}

/// What happened. `Debug` is the CamelCase word that Kubernetes wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventReason {
    /// The first map is committed.
    Created,
    /// A session is admitted.
    Attached,
    /// A session is out.
    Detached,
    /// A session was ended although it is wished for.
    SessionEnded,
    /// A member failed.
    MemberFailed,
    /// A member came back and is being filled.
    MemberRejoined,
    /// A replacement is being filled.
    MemberReplaced,
    /// A member is filled and serves.
    MemberActive,
    /// A member was taken out, its copy is to be deleted.
    MemberRemoved,
    /// Unflushed writes may have been lost and are written again (H5).
    LossRaised,
    /// A person forced a copy that is behind (I8).
    Forced,
    /// A settle began.
    SettleBegun,
    /// A settle is over.
    SettleOver,
    /// A planned change was given up and will be tried again.
    ChangeGivenUp,
    /// The volume has grown.
    Grown,
    /// Diverged.
    Diverged,
    /// A diverged volume's map was adopted.
    Adopted,
    /// A session is behind for long, or no longer admitted.
    StaleSession,
    /// A server does not answer.
    ServerFailed,
    /// A server answers again.
    ServerBack,
    /// So many servers are silent that the leader suspects itself.
    SuspectsItself,
    /// A server of another cluster, or another server, answers.
    ForeignServer,
    /// A copy was deleted.
    CopyDeleted,
}

/// Why copies of a volume cannot be taken from a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Veto {
    /// Whose.
    pub volume: VolumeId,
    /// Which.
    pub copy: CopyId,
    /// Why.
    pub reason: VetoReason,
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum VetoReason {
    /// It is the last `Active` copy of its group.
    LastActiveCopy,
    /// No other server has room.
    NoRoomElsewhere,
    /// It moves: another copy is being filled.
    BeingMoved,
}
