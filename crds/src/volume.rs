//! `Volume`: a replicated block device.
//!
//! `spec` is what is wanted: people write size, policy and access mode, the CSI controller writes `attachments` under its
//! own field manager. `status` is the leader's alone, and for the protocol it is the truth: `generation`, `map`, `proposed`,
//! `retired` and `ended` are replaced together, by a patch that tests what stood there before (PROTOCOL.md §3, H18).
//! Invariants held by the API server itself: the volume's id never changes, the highest generation that ever stood here
//! never falls, and what a volume's data lies by cannot be changed under it.

// KubeSchema repeats each struct inside a function, where its `pub` reaches nobody.
#![allow(unreachable_pub)]
// Printer columns repeat types and priorities, which clippy takes for mistakes.
#![allow(clippy::duplicated_attributes)]

pub mod map;
pub mod progress;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::id::Id;
use crate::replication_policy::TopologySpread;
use crate::schema::{MOST, growing_size_between, rule};
use crate::size::Size;
use map::{ForcedCopy, Proposal, RetiredCopy, VolumeMap};
use progress::{CopyProgress, VolumeSummary};

/// What is wanted of a volume.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lamina.dev",
    version = "v1alpha1",
    kind = "Volume",
    shortname = "lvol",
    category = "lamina",
    status = "VolumeStatus",
    derive = "PartialEq",
    doc = "A replicated block device. Apply one by hand or through a PersistentVolumeClaim; status.volumeId is the handle that a PersistentVolume names.",
    selectable = ".spec.policy",
    selectable = ".spec.accessMode",
    selectable = ".status.volumeId",
    selectable = ".status.state",
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.volumeId) || (has(self.status) && has(self.status.volumeId) && self.status.volumeId == oldSelf.status.volumeId)").message("status.volumeId is minted once and never changes: PersistentVolumes and disks name the volume by it"),
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.generation) || (has(self.status) && has(self.status.generation) && self.status.generation >= oldSelf.status.generation)").message("status.generation never falls: an older map must not come back"),
    validation = Rule::new("!has(oldSelf.status) || !has(oldSelf.status.proposed) || (has(self.status) && ((has(self.status.proposed) && self.status.proposed.generation >= oldSelf.status.proposed.generation) || (has(self.status.generation) && self.status.generation >= oldSelf.status.proposed.generation)))").message("the number of a proposal is never used again: status.proposed goes only for one at least as high, or when status.generation has reached it"),
    validation = Rule::new("!has(self.status) || !has(self.status.map) || (has(self.status.generation) && self.status.map.generation <= self.status.generation)").message("status.map must not be newer than status.generation: map and generation are committed together"),
    validation = Rule::new("!has(self.status) || !has(self.status.map) || (has(self.status.volumeId) && self.status.map.volume == self.status.volumeId)").message("status.map is the map of another volume"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state", description = "Whether it is healthy"),
    printcolumn(name = "Copies", type_ = "string", json_path = ".status.summary.copies", description = "Copies that serve, of all that are wanted"),
    printcolumn(name = "Size", type_ = "string", json_path = ".spec.size", description = "Size that is wanted"),
    printcolumn(name = "Attached", type_ = "string", json_path = ".status.summary.attached", description = "Nodes that use it"),
    printcolumn(name = "Doing", type_ = "string", json_path = ".status.summary.doing", description = "What goes on"),
    printcolumn(name = "Filled", type_ = "string", json_path = ".status.summary.filled", description = "How far copies are filled"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Since it was created"),
    printcolumn(name = "Where", type_ = "string", json_path = ".status.summary.where", description = "Servers that hold it; ~ is being filled, ! has failed", priority = 1),
    printcolumn(name = "Filling", type_ = "string", json_path = ".status.summary.filling", description = "Copies that are being filled, rate and time left", priority = 1),
    printcolumn(name = "Generation", type_ = "integer", json_path = ".status.generation", description = "Configuration generation", priority = 1),
    printcolumn(name = "Policy", type_ = "string", json_path = ".spec.policy", description = "ReplicationPolicy", priority = 1),
    printcolumn(name = "Access", type_ = "string", json_path = ".spec.accessMode", description = "Who may use it at the same time", priority = 1),
    printcolumn(name = "Volume-ID", type_ = "string", json_path = ".status.volumeId", description = "CSI volume handle", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.summary.message", description = "What is wrong, in plain words", priority = 1)
)]
#[x_kube(
    validation = Rule::new("self.policy == oldSelf.policy").message("policy cannot be changed: the volume's data lies by it; make a new Volume with the other policy and copy"),
    validation = Rule::new("self.accessMode == oldSelf.accessMode").message("accessMode cannot be changed: what is kept for a crash depends on it; make a new Volume"),
    validation = Rule::new("has(self.source) == has(oldSelf.source) && (!has(self.source) || self.source == oldSelf.source)").message("source cannot be changed: it says what the volume was made from"),
    validation = Rule::new("!has(self.source)").message("source is not supported yet: leave it out, the volume starts empty"),
    validation = Rule::new("self.accessMode != 'ReadWriteOnce' || !has(self.attachments) || self.attachments.size() <= 1").message("a ReadWriteOnce volume can be attached to one node only: detach it there first"),
    validation = Rule::new("self.accessMode != 'ReadOnlyMany' || !has(self.attachments) || self.attachments.all(a, a.mode == 'ReadOnly')").message("a ReadOnlyMany volume can only be attached with mode ReadOnly")
)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSpec {
    /// Bytes of the device, 1Mi to 64Ti, such as 10Gi; rounded up to whole blocks of 4096. Only grows; takes no space
    /// until written.
    #[schemars(extend("x-kubernetes-validations" = growing_size_between("size", "1Mi", "64Ti")))]
    pub size: Size,
    /// Name of the ReplicationPolicy that says how it is spread. Cannot be changed.
    #[schemars(length(min = 1, max = 253), regex(pattern = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub policy: String,
    /// Who may use it at the same time: ReadWriteOnce = one node; ReadOnlyMany = many nodes, reading only;
    /// ReadWriteMany = many nodes, as a raw block device for software that shares one. Cannot be changed.
    #[serde(default)]
    pub access_mode: AccessMode,
    /// Reserved: what the volume is made from, a snapshot or another volume. Not accepted yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<VolumeSource>,
    /// Where the first consumer will run, so that the first copies can be placed near it. Written by the CSI controller; by
    /// hand only if you know the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub near: Option<Near>,
    /// Wishes to attach, one per node, oldest first. Written by the CSI controller under its own field manager, not by
    /// hand: taking one away ends the session on that node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["node"]))]
    pub attachments: Vec<AttachmentWish>,
    /// Copies in status.retired that you let go: their disks are gone or will never come back, nobody needs to confirm
    /// that they were deleted. Should such a disk come back all the same, its copies show as orphans.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "set"))]
    pub forget: Vec<Id>,
    /// Only when the condition Diverged asks for it: the generation of the stored map that shall hold from now on. The
    /// condition names those that were found. Left out = nothing is adopted by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MOST))]
    pub adopt_generation: Option<i64>,
    /// Only when the condition Available asks for it, and the copies that it waits for never come back: go on with copies
    /// that are behind. What they lack is lost, every session is ended, and the other copies are kept until you delete
    /// them with deleteCopies. status.forced records it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force: Option<Force>,
    /// Copies in status.retired that are kept because another one was forced, and that shall be deleted now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "set"))]
    pub delete_copies: Vec<Id>,
}

/// A person's word to go on with copies that are behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    rule("self.othersAreStopped", "force needs othersAreStopped: true: stop the servers that do not answer and the nodes that use the volume first, or they go on with other data"),
]))]
pub struct Force {
    /// status.generation as it is while you decide, named by the condition. The word holds for it alone.
    #[schemars(range(min = 1, max = MOST))]
    pub generation: i64,
    /// Ids of the copies to go on with, one of each group that waits; the condition names them.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "set"))]
    pub copies: Vec<Id>,
    /// You made sure that the servers which do not answer, and every node which uses the volume through them, are stopped
    /// and do not come back with it. Must be true.
    pub others_are_stopped: bool,
}

/// Who may use a volume at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum AccessMode {
    /// One node.
    #[default]
    ReadWriteOnce,
    /// Many nodes, reading only.
    ReadOnlyMany,
    /// Many nodes.
    ReadWriteMany,
}

/// What a volume is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeSource {
    /// What kind of object.
    pub kind: SourceKind,
    /// Name of that object.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// What a volume can be made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum SourceKind {
    /// A snapshot of it.
    Snapshot,
    /// The volume as it is at that moment.
    Volume,
}

/// Where the first consumer will run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Near {
    /// Name of its node; left out = not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// Zone of its node; left out = as the StorageServer of that name says, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub zone: Option<String>,
}

/// A wish to attach the volume to a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttachmentWish {
    /// Name of the node.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// Id of the session, minted with the wish and never used again.
    pub session: Id,
    /// ReadWrite or ReadOnly.
    #[serde(default)]
    pub mode: AttachMode,
    /// Sessions of this attachment that the node had replaced since (after a reboot, a lost device), oldest first: the
    /// VolumeAttachment still names the first. Of a long list only the first and the last are kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic"))]
    pub replaced: Vec<Id>,
}

/// What an attachment may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum AttachMode {
    /// Reads and writes.
    #[default]
    ReadWrite,
    /// Reads.
    ReadOnly,
}

/// What the operator says of a volume. Do not write it: for the programs it is the truth.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeStatus {
    /// The volume's id and CSI volume handle, minted once. Never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_id: Option<Id>,
    /// Configuration generation: counts every change of the map; each block request carries it, and a server that knows a
    /// newer one does not serve it. Never falls. Not metadata.generation, which counts changes of spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub generation: Option<i64>,
    /// The metadata.generation (Kubernetes' own count of changes of spec) that the operator acted on last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub observed_generation: Option<i64>,
    /// The committed map: which servers, copies, layers and sessions make the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-map-type" = "atomic"))]
    pub map: Option<VolumeMap>,
    /// The change under way: written before servers are asked to promise it, gone when it is committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-map-type" = "atomic"))]
    pub proposed: Option<Proposal>,
    /// Copies that no map lists any more and whose holders have not confirmed that they deleted them. The Volume goes only
    /// when this is empty; spec.forget lets one go.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    pub retired: Vec<RetiredCopy>,
    /// Sessions that were ended although they are still wished for. They are never admitted again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024), extend("x-kubernetes-list-type" = "atomic"))]
    pub ended: Vec<Id>,
    /// Copies that people forced, oldest first, with what may be lost by it; the last 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub forced: Vec<ForcedCopy>,
    /// The policy's shape as it was when the volume was placed: what its data lies by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<Shape>,
    /// Whether the volume is healthy, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<VolumeState>,
    /// The filesystem that a node made on it. Left out = none was ever made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<Filesystem>,
    /// How far each attachment is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["session"]))]
    pub attachments: Vec<Attachment>,
    /// Copies with work under way and how far it is. Written at steps of 5 % or after 10 s.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["copy"]))]
    pub progress: Vec<CopyProgress>,
    /// The same in short, for kubectl get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<VolumeSummary>,
    /// What is so and why: Placed, Available, Healthy, Settled, OutOfSpace, Diverged,
    /// Deleting.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Whether a volume is healthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum VolumeState {
    /// No map is committed yet.
    Pending,
    /// Every copy serves.
    Healthy,
    /// It serves, but a copy is away or being filled.
    Degraded,
    /// Some piece has no copy that may serve.
    Unavailable,
    /// It serves, but a write waits for space.
    OutOfSpace,
    /// A server stores a newer map than this object, or may. Nothing is changed until that is cleared up.
    Diverged,
    /// Being deleted.
    Deleting,
}

/// The shape of a policy, copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    rule("self.chunkBytes <= self.pageBytes", "chunkBytes must not be larger than pageBytes"),
]))]
pub struct Shape {
    /// Copies of each group, 1 to 5.
    #[schemars(range(min = 1, max = 5))]
    pub copies: i32,
    /// Groups of the stripe, 1 to 16.
    #[schemars(range(min = 1, max = 16))]
    pub stripe_width: i32,
    /// Bytes of a chunk, 65536 to pageBytes.
    #[schemars(range(min = 65_536, max = 4_194_304))]
    pub chunk_bytes: i32,
    /// Bytes of a page, 65536 to 4194304.
    #[schemars(range(min = 65_536, max = 4_194_304))]
    pub page_bytes: i32,
    /// How copies go over zones.
    pub topology_spread: TopologySpread,
}

/// A filesystem on a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Filesystem {
    /// Its type, such as ext4 or xfs.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 32), regex(pattern = "^[a-z0-9]+$"))]
    pub kind: String,
    /// Formatting = a node has begun to make it and may begin anew; Formatted = it is there, and never made again.
    pub state: FilesystemState,
    /// The session that makes or made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Id>,
}

/// How far a filesystem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum FilesystemState {
    /// Begun.
    Formatting,
    /// Done.
    Formatted,
}

/// How far an attachment is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Id of the session.
    pub session: Id,
    /// Name of the node.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// How far it is. Detached entries go when their wish is gone.
    pub phase: AttachmentPhase,
    /// The configuration generation that admitted or ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub generation: Option<i64>,
    /// What it waits for, or why it was ended, in plain words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}

/// How far an attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum AttachmentPhase {
    /// Wished for, in no committed map yet.
    Waiting,
    /// In the map, but a settle must end first.
    Held,
    /// May use the volume.
    Attached,
    /// No longer wished for, not out of the map yet.
    Detaching,
    /// Out of a committed map that every serving member has promised.
    Detached,
    /// Ended although wished for: its requests fail. Final.
    Ended,
}
