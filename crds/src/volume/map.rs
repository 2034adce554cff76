//! The configuration map, proposals and retired copies as the API shows them (PROTOCOL.md §2 and §3).
//!
//! The same nouns as the protocol's, field by field; translated there and back at the operator's edge, where a map that
//! cannot be one is refused. Lists and the map itself are atomic: they are replaced whole, by one writer.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::AttachMode;
use crate::id::Id;
use crate::schema::{MOST, host_port};

/// The whole configuration of a volume at one generation. Every storage server that holds a copy stores it too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeMap {
    /// The volume's id.
    pub volume: Id,
    /// The configuration generation at which this map was proposed.
    #[schemars(range(min = 1, max = MOST))]
    pub generation: i64,
    /// Format of the map; a program that does not know it serves nothing of this volume.
    #[schemars(range(min = 1, max = 65_535))]
    pub format: i32,
    /// Bits of features that a program must know to serve this volume; 0 = none.
    #[schemars(range(min = 0, max = MOST))]
    pub required_features: i64,
    /// Bytes of the volume, a multiple of 4096.
    #[schemars(range(min = 4096, max = MOST))]
    pub size: i64,
    /// Whether the access mode allows several sessions at once.
    pub multi_session: bool,
    /// Every server that a member names.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub servers: Vec<MapServer>,
    /// Where layers lie; layers name one by its index.
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub placements: Vec<Placement>,
    /// The layers of the volume, top first.
    #[schemars(length(min = 1, max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    pub layers: Vec<Layer>,
    /// Who may send requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub sessions: Vec<Session>,
    /// Sessions that lost a lock and must not use a range any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub revoked: Vec<Revocation>,
}

/// A server and where it listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MapServer {
    /// The server's id.
    pub id: Id,
    /// host:port of its block listener, tried in order.
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic", "items" = host_port()))]
    pub addresses: Vec<String>,
}

/// Where the groups of a layer lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// The groups of the stripe, in order.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub groups: Vec<Group>,
}

/// The members that hold one share of the stripe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Group {
    /// Its members; the first Active one is read first and is authoritative in a settle.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub members: Vec<Member>,
    /// The last generation at which the group went on without any member that was Active before and had not restarted, so
    /// that unflushed writes may have been lost and are written again; 0 = never.
    #[schemars(range(min = 0, max = MOST))]
    pub loss: i64,
    /// Whether pages that may differ between members are being made equal.
    pub settle: Settle,
}

/// The settle of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Settle {
    /// None = nothing was to settle; Running = under way, the volume's sessions may be held; Over = this generation ends it.
    pub state: SettleState,
    /// While Running: the copy whose word counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authoritative: Option<Id>,
    /// While Running: the boot id of that copy's device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Id>,
    /// While Running: the generation that began it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MOST))]
    pub begun: Option<i64>,
}

/// How far a settle is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum SettleState {
    /// Nothing was to settle.
    None,
    /// Under way.
    Running,
    /// This generation ends it.
    Over,
}

/// One copy's place in a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Its bit in the sync bits of the others, 0 to 15, unique in the group.
    #[schemars(range(min = 0, max = 15))]
    pub ordinal: i32,
    /// The copy's id.
    pub copy: Id,
    /// Id of the server that holds it.
    pub server: Id,
    /// Boot id: the opening of its device that this map speaks of. A device opened anew is left out until a newer map.
    pub boot: Id,
    /// Active = holds every acknowledged write, serves; Syncing = receives every write, is being filled, is not read;
    /// Failed = receives and serves nothing.
    pub state: MemberState,
    /// Receives writes, is read only if nothing else can: the server is slow or suspected.
    #[serde(default)]
    pub avoid: bool,
    /// Was left out without its promise; until that is over no new session is admitted.
    #[serde(default)]
    pub unpromised: bool,
}

/// What a member is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum MemberState {
    /// Holds every acknowledged write; serves.
    Active,
    /// Receives every write, is being filled, is not read.
    Syncing,
    /// Stores maps, receives and serves nothing.
    Failed,
}

/// One translucent layer of pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Layer {
    /// The layer's id.
    pub id: Id,
    /// Bytes of the volume when the layer was sealed; of the top layer the volume's size.
    #[schemars(range(min = 4096, max = MOST))]
    pub size: i64,
    /// Bytes of a page, 65536 to 4194304.
    #[schemars(range(min = 65_536, max = 4_194_304))]
    pub page_bytes: i32,
    /// How blocks go over members. Replicate = each member of a group holds all of the group's share.
    pub scheme: Scheme,
    /// Bytes of a stripe chunk, 65536 to pageBytes.
    #[schemars(range(min = 65_536, max = 4_194_304))]
    pub chunk_bytes: i32,
    /// Index of its placement.
    #[schemars(range(min = 0, max = 63))]
    pub placement: i32,
    /// The generation that sealed it; left out = open, which only the top layer is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MOST))]
    pub sealed: Option<i64>,
}

/// How blocks of a layer go over the members of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Scheme {
    /// Every member holds everything.
    Replicate,
}

/// One attachment of the volume to a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Session {
    /// The session's id.
    pub id: Id,
    /// Name of the node.
    #[schemars(length(max = 253))]
    pub node: String,
    /// ReadWrite or ReadOnly.
    pub mode: AttachMode,
    /// Which process of the session acts: each that takes the device over counts one up.
    #[schemars(range(min = 0, max = MOST))]
    pub incarnation: i64,
    /// Losses up to this generation were made good by writing again.
    #[schemars(range(min = 0, max = MOST))]
    pub handled: i64,
    /// Admitted = its requests are served; Held = they wait for a settle.
    pub standing: Standing,
}

/// Whether a session's requests are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Standing {
    /// Served.
    Admitted,
    /// Waits for a settle.
    Held,
}

/// What a session must not use any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Revocation {
    /// The session that held the lock.
    pub session: Id,
    /// Its requests of an older generation than this are refused in the ranges.
    #[schemars(range(min = 1, max = MOST))]
    pub below: i64,
    /// The ranges; none = the whole volume.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub ranges: Vec<ByteRange>,
}

/// A range of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ByteRange {
    /// First byte.
    #[schemars(range(min = 0, max = MOST))]
    pub start: i64,
    /// How many bytes.
    #[schemars(range(min = 1, max = MOST))]
    pub length: i64,
}

/// The intent of a change, written before any server is asked to promise it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Proposal {
    /// The configuration generation that it will commit: higher than any that ever stood in this object.
    #[schemars(range(min = 1, max = MOST))]
    pub generation: i64,
    /// Id minted with it, which tells it from any other proposal of the same number.
    pub name: Id,
    /// What it is for.
    pub purpose: Purpose,
    /// Copies that are made for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "atomic"))]
    pub copies: Vec<NewCopy>,
}

/// What a change is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
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
    /// A person forces copies that are behind.
    Force,
    /// Retracted before any server was asked; only its number still stands.
    Void,
    /// A person adopted a map: servers may store committed maps up to this number, which are given up.
    Adopted,
}

/// A copy made for a proposal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NewCopy {
    /// The copy's id.
    pub copy: Id,
    /// Id of the server that will hold it.
    pub server: Id,
    /// Index of its placement.
    #[schemars(range(min = 0, max = 63))]
    pub placement: i32,
    /// Index of its group.
    #[schemars(range(min = 0, max = 15))]
    pub group: i32,
    /// Whether all of it must be filled; false only for the copies of a first map.
    pub unsynced: bool,
}

/// A copy that no map lists and whose holder has not confirmed its deletion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetiredCopy {
    /// The copy's id.
    pub copy: Id,
    /// Id of the server that holds it.
    pub server: Id,
    /// The configuration generation that did without it.
    #[schemars(range(min = 0, max = MOST))]
    pub generation: i64,
    /// It may hold what a forced copy lacks: kept until spec.deleteCopies names it or the Volume is deleted.
    #[serde(default)]
    pub kept: bool,
}

/// A copy that a person made the only good one of its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ForcedCopy {
    /// The copy's id.
    pub copy: Id,
    /// Index of its group.
    #[schemars(range(min = 0, max = 15))]
    pub group: i32,
    /// The configuration generation that forced it.
    #[schemars(range(min = 1, max = MOST))]
    pub generation: i64,
    /// What it was before.
    pub was: MemberState,
    /// Pages that were still to be filled.
    #[schemars(range(min = 0, max = MOST))]
    pub pages_behind: i64,
    /// What may be lost, in plain words.
    #[serde(default)]
    #[schemars(length(max = 512), extend("default" = ""))]
    pub may_be_lost: String,
}
