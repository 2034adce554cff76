//! What a volume's object holds as the core sees it, and how it may be written (PROTOCOL.md §3, H18, R14).
//!
//! The store (Kubernetes objects or a directory) keeps four things for the protocol: [`Status`]. It replaces them as a
//! whole, and only if generation, proposal and retired copies are still those of the [`Guard`]. Nobody but the leader
//! writes them. Everything else in an object belongs to others.

use crate::control::FillLimit;
use crate::ids::{CopyId, Generation, ServerId, SessionId, VolumeId};
use crate::map::{AccessMode, MemberState, Standing, VolumeMap};
use crate::mutants::{Mutant, on};
use std::collections::BTreeSet;

/// A `Volume` object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeObject {
    /// Its id, minted once; also the CSI volume handle.
    pub id: VolumeId,
    /// Its name, for people: events and conditions name it, nothing is decided by it.
    pub name: String,
    /// The id was minted for this very object and stood nowhere before. Else an object without a map may be an old volume
    /// applied without its status, and every known server is asked before a blank map is made.
    pub id_is_new: bool,
    /// Which of two states of the object is the later one: it grows with every change (Kubernetes: the resource version).
    /// 0 = the store cannot tell, for it hands states over in their order.
    pub version: u64,
    /// What people and the CSI plugin want.
    pub wishes: Wishes,
    /// What the leader wrote last.
    pub status: Status,
}

/// What people and the CSI plugin want of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// Bytes; rounded up to whole blocks. Only grows.
    pub size: u64,
    /// The policy, copied into the volume; `None` = it names one that does not exist.
    pub policy: Option<Policy>,
    /// The access mode allows several sessions at once.
    pub multi_session: bool,
    /// Who wants to attach, oldest wish first.
    pub sessions: Vec<SessionWish>,
    /// The node near which the first copies should lie; empty = anywhere.
    pub near_node: String,
    /// The zone of that node; empty = unknown.
    pub near_zone: String,
    /// The object is being deleted.
    pub deleted: bool,
    /// Retired copies that a person let go: their holders never answer again.
    pub let_go: Vec<CopyId>,
    /// What a person wants adopted of a diverged volume (R6): the generation of a stored map, or of the object's own.
    pub adopt: Option<Generation>,
    /// What a person forces where a group has no `Active` member (I8).
    pub force: Option<Force>,
    /// Kept copies that a person wants deleted now.
    pub delete_kept: Vec<CopyId>,
}

/// A person's word that groups without an `Active` member shall go on with copies that are behind (I8). It holds for one
/// generation, so it can never act on a situation for which it was not given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Force {
    /// The committed generation for which it was given.
    pub generation: Generation,
    /// The copies to go on with, one of each group that waits.
    pub copies: BTreeSet<CopyId>,
}

/// A wish to attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionWish {
    /// Minted with the wish.
    pub id: SessionId,
    /// Name of the node.
    pub node: String,
    /// Read-write or read-only.
    pub mode: AccessMode,
}

/// How a volume is spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Copies of each group, 1–5.
    pub copies: u8,
    /// Groups of the stripe, 1–16.
    pub groups: u8,
    /// Bytes of a chunk.
    pub chunk_bytes: u32,
    /// Bytes of a page.
    pub page_bytes: u32,
    /// How copies go over zones.
    pub zones: ZoneSpread,
    /// First copy on or near the consumer's node.
    pub locality: bool,
    /// Bytes that may be promised per 100 bytes of capacity.
    pub overcommit_percent: u32,
    /// A member away for so long is replaced if there is room, milliseconds.
    pub rebuild_after_ms: u64,
    /// What fills of a volume may take at each server.
    pub fill_limit: FillLimit,
}

/// How the copies of a group go over zones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ZoneSpread {
    /// As many zones as there are.
    #[default]
    Prefer,
    /// Each copy in a zone of its own, or none is placed.
    Require,
}

/// What the store keeps for the protocol.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Status {
    /// The committed generation; 0 = none yet. Never falls.
    pub generation: Generation,
    /// The committed map, of that generation but while the volume is being deleted.
    pub map: Option<VolumeMap>,
    /// What is under way, or was when its leader died.
    pub proposed: Option<Proposal>,
    /// Copies that must still be deleted (R14).
    pub retired: Vec<RetiredCopy>,
    /// Sessions that ended although they are still wished for (a loss on a shared volume): never admitted again.
    pub ended: Vec<SessionId>,
    /// What people forced, oldest first; the last [`MAX_FORCED`] are kept.
    pub forced: Vec<Forced>,
}

/// Forced copies that a status remembers: one of each group, twice.
pub const MAX_FORCED: usize = 32;

/// A copy that a person made the only `Active` one of its group, and how far behind it was known to be (I8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Forced {
    /// Which.
    pub copy: CopyId,
    /// Index of its group.
    pub group: u32,
    /// The generation that forced it.
    pub generation: Generation,
    /// What it was before.
    pub was: MemberState,
    /// Pages that were still to be filled: what they hold is older, or was never there.
    pub unsynced: u64,
}

/// An intent: step 2 of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// Higher than any that ever stood in `generation` or here.
    pub generation: Generation,
    /// Minted with it; tells this very proposal from any other of the same number (H18).
    pub name: u128,
    /// What it is for.
    pub purpose: Purpose,
    /// Copies that are made for it (R14).
    pub copies: Vec<NewCopy>,
}

/// What a change is for. For people, but for [`Purpose::Void`]: what is committed follows from the map, the wishes and
/// the answers to the fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// The first map.
    Create,
    /// Sessions come or go.
    Sessions,
    /// Members failed, restarted, or leave.
    Failure,
    /// Members come back or are replaced, and are filled from now on.
    Rejoin,
    /// Members are filled, or a settle is over.
    Finish,
    /// Anything else: size, addresses, members that are no longer needed.
    Shape,
    /// A leader found a proposal or a promise that is not its own.
    Recover,
    /// A person forces copies that are behind (I8).
    Force,
    /// Retracted before any fence; only its number still stands.
    Void,
    /// A person adopted a map (R6): servers may store committed maps up to this number, which are given up.
    Adopted,
}

/// A copy made for a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NewCopy {
    /// Which.
    pub copy: CopyId,
    /// Where.
    pub server: ServerId,
    /// Index of the placement.
    pub placement: u32,
    /// Index of the group.
    pub group: u32,
    /// Every page of it is to be filled (all but those of a first map).
    pub unsynced: bool,
}

/// A copy that no map lists and whose holder has not confirmed its deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RetiredCopy {
    /// Which.
    pub copy: CopyId,
    /// Where.
    pub server: ServerId,
    /// The generation that did without it.
    pub generation: Generation,
    /// It may hold what a forced copy lacks (I8): not deleted before a person says so, or deletes the volume.
    pub kept: bool,
}

/// What must stand in the object for a write to happen (H18). The store compares all three fields, exactly, in the same
/// atomic step as the write: as JSON patch `test` operations, or by reading, comparing, and writing under the resource
/// version that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// `status.generation`.
    pub generation: Generation,
    /// Number and name of `status.proposed`; `None` = there must be none.
    pub proposed: Option<(Generation, u128)>,
    /// `status.retired`, as a whole.
    pub retired: Vec<RetiredCopy>,
}

/// Which step a write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WriteKind {
    /// The intent.
    Intent,
    /// The commit point.
    Commit,
    /// A planned change is given up (R13).
    GiveUp,
    /// A proposal that was never fenced is retracted.
    Retract,
    /// Retired copies were deleted.
    Retired,
    /// The volume is being deleted: every copy is retired.
    Delete,
    /// A diverged volume's map is adopted (R6).
    Adopt,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SessionState {
    /// No committed map lists it: not attached, or detached. If it was listed before, every serving member has promised
    /// a generation without it, so another node may attach.
    Out,
    /// Listed, but a settle must end first.
    Held,
    /// Served.
    Admitted,
    /// It was ended although it is still wished for. Final.
    Ended,
}

impl Status {
    /// What a write must find so that it builds on exactly this.
    pub fn guard(&self) -> Guard {
        Guard {
            generation: self.generation,
            proposed: self.proposed.as_ref().map(|p| (p.generation, p.name)),
            retired: self.retired.clone(),
        }
    }

    /// The highest generation that ever stood here.
    pub fn highest(&self) -> Generation {
        self.proposed.as_ref().map_or(self.generation, |p| p.generation.max(self.generation))
    }

    /// How far a session is. Detach succeeds with [`SessionState::Out`], attach with [`SessionState::Admitted`].
    pub fn session(&self, id: SessionId) -> SessionState {
        match self.map.as_ref().and_then(|map| map.session(id)) {
            Some(session) if session.standing == Standing::Held => SessionState::Held,
            Some(_) => SessionState::Admitted,
            None if self.ended.contains(&id) => SessionState::Ended,
            None => SessionState::Out,
        }
    }
}

impl Guard {
    /// Whether a status is the one that the write builds on.
    pub fn holds(&self, status: &Status) -> bool {
        let proposal_only = on(Mutant::ProposalNotTested) && self.generation == status.generation;
        *self == status.guard() || proposal_only
    }
}
