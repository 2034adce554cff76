//! Deliberate mistakes for the simulator's mutation check: each takes one rule of PROTOCOL.md away.
//!
//! Invariant: without the feature `mutants` nothing of this is in a program: [`on`] is a constant `false`. The feature
//! needs debug assertions, so that no release build can have it. One mistake at a time is switched on, per thread. A rule
//! whose removal no oracle sees is not understood (PROTOCOL.md, Counter-examples).

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("deliberate mistakes never go into a release build");

macro_rules! mutants {
    ($($name:ident, $rule:literal, $text:literal;)*) => {
        /// One mistake.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Mutant {
            $(#[doc = $text] $name,)*
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The rule that it breaks.
            pub const fn rule(self) -> &'static str {
                match self { $(Self::$name => $rule,)* }
            }

            /// What goes wrong, in words.
            pub const fn words(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

mutants! {
    ServedAfterFence, "I1", "a member serves the old generation after it promised a new one";
    OlderServed, "I1", "a member does not compare the generation of a request";
    AheadServed, "§2.5", "a member serves a generation that it does not have yet";
    HeldServed, "M5", "a session that is held goes on, and members serve it";
    SettleHoldsNobody, "M5", "sessions are admitted while a settle runs";
    EndedGoesOn, "§2.5", "an ended session goes on under the newer map, and members serve it";
    BootNotCompared, "H2", "a member serves although the map lists another boot id";
    RestartUnseen, "H2", "the plan does not compare the boot id of a fence reply";
    SyncingRead, "§2.2", "a member is read while it is being filled";
    OldHandlesLive, "H1", "lower handles of a session stay alive";
    OpenWithoutSilence, "H1", "an Open is answered while requests of lower handles execute";
    LowerOpenTaken, "R7", "an Open that is not above the highest number is taken";
    AnyAttemptCounts, "H1", "a reply to an earlier attempt counts";
    HandleKept, "M6", "a driver goes on through the handle that it had when its connection broke";
    IncarnationNotCompared, "H20", "a member serves older incarnations";
    IncarnationVolatile, "H20", "an incarnation is not durable before its Open is answered";
    DiscoverySkipped, "H20", "a successor serves when one member has answered";
    ResumeIsFresh, "R2", "a successor takes its device for a fresh one";
    SupersededTellsKernel, "R10", "a superseded driver answers the kernel";
    AdoptBeforeFlush, "§5.1", "a successor adopts before its replay is flushed";
    DeposedObeyed, "§3.3", "a member obeys a command below its promise";
    ProposalNotTested, "H18", "a commit does not test its proposal";
    StoredNotCompared, "R6", "a stored generation above the object's is not noticed";
    FenceWithoutDrain, "H19", "a fence is answered before older requests have finished";
    FenceWithoutFlush, "H11b", "a fence that must flush does not, nor the flush ahead of it";
    PromiseVolatile, "I2", "a promise is not durable before it is answered";
    MapVolatile, "M2", "a map is not durable before it is served";
    UnfencedLeftOut, "§3.2", "a member that lives is left out as soon as one other has answered";
    UnpromisedUnmarked, "M7", "a member left out without its promise is not marked";
    LeaseNotWaited, "R5", "a new session is admitted while a read lease may run";
    CommitBeforeLease, "M7", "a commit for several sessions does not wait for the read lease";
    LeaseIgnored, "R5", "a read is handed over without the lease";
    LeaseFromReply, "M7", "the lease counts from the reply";
    GiveUpTakesBoots, "R13", "a change given up takes boot ids of replies";
    GiveUpRepeatsSettled, "R13", "a change given up says settled again";
    SilentNotWaited, "H13", "restarted members go on without a silent one at once";
    LossNotRaised, "H5", "nobody kept its boot id and the loss stays";
    LossIgnored, "H5", "a driver ignores a raised loss";
    KeptDropped, "H5", "a driver keeps nothing of what is not flushed";
    FlushCoversLater, "H5", "a flush covers what was acknowledged after it was sent";
    HandledBeforeFlush, "R2", "a loss is called handled before the rewrites are flushed";
    SharedLossGoesOn, "H5", "sessions of a shared volume outlive a loss";
    MissedNotSet, "§5.2", "a write does not say which members it does not reach";
    PendingNotMissed, "H3b", "a new map makes nothing missed that is pending";
    RestoredEarly, "H11", "missed bits of a member go that is not Active";
    RestoredUnconfirmed, "H11", "a map that lists all as Active restores pages whose writes nobody confirmed";
    EntryForgotten, "R9", "a device's entry of a page that holds nothing goes while members miss it";
    ReplacementTrusted, "H21", "a replacement begins with all its pages synced";
    DataBeforeMark, "H3", "data is written before the pending mark is durable";
    ConfirmedAcross, "H4", "confirmed clears pending writes of other sessions and incarnations";
    BeforeStartCleared, "H13", "confirmed clears what was pending before the start";
    ConfirmedUnfinished, "§5.1", "confirmed passes writes that have not succeeded";
    ConfirmedUnflushed, "§5.1", "confirmed rises without a flush";
    FlushWithoutDisk, "§5.5", "a member answers a flush without flushing";
    AckOnOneCopy, "§5.1", "a write is acknowledged when one copy has it";
    SyncingNotWritten, "§2.2", "a write is not sent to members that are being filled";
    OverlapsRace, "§4.5", "overlapping writes of a driver are not serialised";
    ReplayReadsEarly, "§4.5", "a successor reads before it has all requests back";
    RestartedReadsEarly, "§4.5", "a restarted read does not wait for overlapping writes after it";
    SentMayRunOut, "R8", "a write that was sent may end with ENOSPC";
    BadIsAbsent, "R12", "a block that cannot be read becomes absent";
    FillOverPresent, "§4.3", "a fill overwrites present blocks";
    FillDropsPending, "H9", "a fill drops the source's pending state";
    FillDropsMissed, "H8", "a fill drops what others miss by its source";
    LateFillApplied, "H6", "a fill goes on over a promise";
    ListBeforeFence, "§5.9", "the list of suspect pages is taken before its source is sent the fence";
    StaleListTaken, "§5.9", "a member rejoins with the list of an earlier attempt";
    OwnListForgotten, "§5.9", "a member that rejoins marks only what its source lists";
    UnsyncedNotMarked, "H7", "a member that rejoins skips pages that are unsynced already";
    ListNotAwaited, "§5.9", "a member rejoins before it has marked what is suspect";
    RejoinKeepsBlocks, "H7", "a member that rejoins keeps its blocks";
    FlagBeforeData, "H11c", "unsynced is cleared before the filled data is durable";
    UnsyncedActive, "I7", "a member becomes Active with unsynced pages";
    SettleUnmarked, "R1", "a settle does not mark its pages pending";
    SettleUnflushed, "R1", "a settle reports pages that are not durable, and the fence that ends it flushes none of them";
    SettleEndsEarly, "M1", "a settle is over when one member has settled";
    AllClearPending, "M1", "any member clears pending at the end of a settle";
    SettleNotNamed, "M3", "settled counts for any settle";
    SettledKept, "M4", "a member that rejoins takes what it once settled for synced";
    SourceKept, "H12", "a settle goes on without its authoritative copy";
    SourceOfSettleFree, "M8", "a settle takes from any Active member";
    WrongAuthority, "H12", "every Active member takes itself for authoritative";
    DeadPendingIgnored, "H12", "the end of a session settles nothing";
    DrainBlind, "R16", "a member that is no longer needed goes although one of those that were to stay has failed";
    CopyForgotten, "R14", "a copy that leaves the map is not retired";
    SameBootAgain, "R3", "a device that failed goes on under the same boot id";
}

#[cfg(feature = "mutants")]
std::thread_local! {
    static ACTIVE: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Switches one mistake on in this thread, and off whichever was on.
#[cfg(feature = "mutants")]
pub fn activate(mutant: Option<Mutant>) {
    ACTIVE.set(mutant);
}

/// Whether this mistake is to be made.
#[cfg(feature = "mutants")]
pub fn on(mutant: Mutant) -> bool {
    ACTIVE.get() == Some(mutant)
}

/// Whether this mistake is to be made: never.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn on(_: Mutant) -> bool {
    false
}
