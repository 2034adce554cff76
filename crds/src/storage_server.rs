//! `StorageServer`: a node with disks, what people let it use, and how it is.
//!
//! Written by four: people (or chart values) write `spec`; the storage node writes ids, addresses and devices of its own
//! object; the leader writes state, copies, conditions and summary. Each under its own field manager, so nobody undoes
//! another's word. The object's name is the node's.

// KubeSchema repeats each struct inside a function, where its `pub` reaches nobody.
#![allow(unreachable_pub)]
// Printer columns repeat types and priorities, which clippy takes for mistakes.
#![allow(clippy::duplicated_attributes)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::id::Id;
use crate::schema::{MOST, growing_size_between, host_port, rule};
use crate::size::Size;

/// What people let this server use. Made empty by the storage node itself: no disk is touched before a person, or the
/// chart's values, names it here.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lamina.dev",
    version = "v1alpha1",
    kind = "StorageServer",
    shortname = "lss",
    category = "lamina",
    status = "StorageServerStatus",
    derive = "PartialEq",
    doc = "A node that stores copies of volumes on its disks. Its name is the node's name.",
    selectable = ".spec.zone",
    selectable = ".status.state",
    selectable = ".status.serverId",
    validation = Rule::new("!has(oldSelf.spec.devices) || !has(oldSelf.status) || !has(oldSelf.status.devices) || oldSelf.spec.devices.all(d, (has(self.spec.devices) && self.spec.devices.exists(n, n.path == d.path)) || !oldSelf.status.devices.exists(s, s.path == d.path && has(s.copies) && s.copies > 0))").message("a device that holds copies cannot be taken away: set spec.drain, wait until status.devices shows copies 0, then remove it"),
    printcolumn(name = "State", type_ = "string", json_path = ".status.state", description = "Whether it serves"),
    printcolumn(name = "Zone", type_ = "string", json_path = ".spec.zone", description = "Failure domain"),
    printcolumn(name = "Devices", type_ = "string", json_path = ".status.summary.devices", description = "Devices that are ready, of all"),
    printcolumn(name = "Copies", type_ = "string", json_path = ".status.summary.copies", description = "Copies that serve, of all that lie here"),
    printcolumn(name = "Used", type_ = "string", json_path = ".status.summary.used", description = "Space taken, of all"),
    printcolumn(name = "Doing", type_ = "string", json_path = ".status.summary.doing", description = "What goes on here"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", description = "Since it was created"),
    printcolumn(name = "Filling", type_ = "string", json_path = ".status.summary.filling", description = "Copies that are being filled and how far", priority = 1),
    printcolumn(name = "Schedulable", type_ = "boolean", json_path = ".spec.schedulable", description = "Whether it takes new copies", priority = 1),
    printcolumn(name = "Address", type_ = "string", json_path = ".status.addresses.data[0]", description = "Where it takes block requests", priority = 1),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version", description = "Version of its program", priority = 1),
    printcolumn(name = "Server-ID", type_ = "string", json_path = ".status.serverId", description = "Id in its superblocks", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.summary.message", description = "What is wrong, in plain words", priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct StorageServerSpec {
    /// The disks and files that it may use, at most 32, each by a path that stays the same over restarts. An entry can be
    /// added at any time; it can be taken away only when no copy lies there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["path"]))]
    pub devices: Vec<DeviceSpec>,
    /// The failure domain, such as a rack or a cloud zone; copies of the same piece go over different ones as the policy
    /// says. Empty = the server is a domain of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63), regex(pattern = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"))]
    pub zone: Option<String>,
    /// Whether new copies may be placed here. False leaves those that are here as they are.
    #[serde(default = "yes")]
    pub schedulable: bool,
    /// Move every copy away from here, then show Drained. Volumes that have nowhere else to go refuse, and are named.
    #[serde(default)]
    pub drain: bool,
}

/// A disk or file that a storage server may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    rule("!self.path.startsWith('/dev/') || !has(self.size)", "size is only for files: a block device has its own, so leave it out under /dev/"),
    rule("self.path.startsWith('/dev/') || has(self.size)", "a file needs a size, such as 10Gi; for a disk give its path under /dev/"),
    rule("!has(oldSelf.size) || has(self.size)", "size can only grow: what lies beyond a smaller size would be lost"),
]))]
pub struct DeviceSpec {
    /// Absolute path: a block device by a name that stays the same (under /dev/disk/by-id/, by-path/ or /dev/mapper/), or
    /// a file, made when it is not there.
    #[schemars(length(min = 2, max = 255), regex(pattern = "^/([^/]+/)*[^/]+$"))]
    pub path: String,
    /// Use the device although something is on it: a partition table, filesystem, RAID, LVM or foreign signature, which
    /// is then overwritten. False = such a device is Refused, and its status names what was found.
    #[serde(default)]
    pub format: bool,
    /// Say whether the device writes 4096 bytes whole or not at all even at a power cut, where it does not announce that
    /// itself. True = data is written in place, once; wrongly said, blocks can be torn. Left out = as the device announces;
    /// files count as torn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub atomic4k: Option<bool>,
    /// Bytes of a file, 64Mi to 64Ti, such as 10Gi; taken from its filesystem at once. Only grows. Not for block devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = growing_size_between("size", "64Mi", "64Ti")))]
    pub size: Option<Size>,
}

/// How the server is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageServerStatus {
    /// Whether it serves, as the leader sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<ServerState>,
    /// When state last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time", "maxLength" = 40))]
    pub last_transition: Option<Time>,
    /// Its id, minted when its first device was formatted and kept on every device. Nothing that matters goes by names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_id: Option<Id>,
    /// The id of the Lamina installation that its devices belong to; a device of another one is Refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<Id>,
    /// Where it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<ServerAddresses>,
    /// Version of the storage node's program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub version: Option<String>,
    /// Its devices, by the path in spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["path"]))]
    pub devices: Vec<DeviceStatus>,
    /// Bytes of all its open devices; 0 = none is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub capacity_bytes: Option<i64>,
    /// Bytes taken on them by pages, tables and journals. Written at steps of 1 % or after 60 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub used_bytes: Option<i64>,
    /// Bytes promised to the copies that lie here, written or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub provisioned_bytes: Option<i64>,
    /// Copies of committed maps that lie here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<CopyCount>,
    /// Copies on its devices that no Volume names. None is ever deleted by itself; the first 256 are shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["copy"]))]
    pub orphans: Vec<Orphan>,
    /// Why its copies cannot be taken away, if somebody wants that; the first 64 are shown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["copy"]))]
    pub vetoes: Vec<Veto>,
    /// The same in short, for kubectl get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<ServerSummary>,
    /// The metadata.generation (Kubernetes' own count of changes of spec) that was acted on last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub observed_generation: Option<i64>,
    /// What is so and why: Ready, DevicesReady, Drained, SpaceLow.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Whether a server serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ServerState {
    /// The leader has not heard of it yet.
    Unknown,
    /// Answers.
    Ready,
    /// Answers, but has no open device.
    NoDevice,
    /// Silent, but so are so many others that the leader suspects itself.
    Suspected,
    /// Silent: its copies are left out.
    Failed,
    /// Was asked to stop and waits to be left out.
    Leaving,
    /// Its copies are moving away.
    Draining,
    /// No copy lies here any more.
    Drained,
    /// Belongs to another installation or answers under another id: nothing is asked of it.
    Foreign,
}

/// Where a storage server listens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServerAddresses {
    /// host:port of its block listener, tried in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic", "items" = host_port()))]
    pub data: Vec<String>,
    /// host:port of its control service, tried in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic", "items" = host_port()))]
    pub control: Vec<String>,
}

/// How a device is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    /// Its path, as in spec.devices.
    #[schemars(length(min = 2, max = 255))]
    pub path: String,
    /// Whether it serves.
    pub state: DeviceState,
    /// Why it is in that state, in plain words, naming what was found on a refused one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub reason: Option<String>,
    /// Its id, minted when it was formatted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// Boot id: this opening of this device by this process. A new one is a restart for every copy on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Id>,
    /// Bytes of the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub capacity_bytes: Option<i64>,
    /// Bytes taken by pages, tables and the journal. Written at steps of 1 % or after 60 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub used_bytes: Option<i64>,
    /// Bytes set aside for restarted writes, settles, deletes and credits of drivers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub reserved_bytes: Option<i64>,
    /// Copies that lie on it, retired ones included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub copies: Option<i64>,
    /// Reads, writes and flushes that failed since it was opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub errors: Option<i64>,
    /// Whether data is written in place (true) or through the journal, because the device could tear a block (false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place: Option<bool>,
}

/// Whether a device serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum DeviceState {
    /// Being opened: journal and tables are read.
    Opening,
    /// Serves.
    Ready,
    /// Not used: something foreign is on it, or it is too small, busy, or of another server or installation.
    Refused,
    /// There is nothing at this path.
    Missing,
    /// A read, write or flush failed: closed, its copies are left out until it is opened anew.
    Failed,
    /// No longer in spec, though copies lie on it: still served.
    Unlisted,
}

/// Copies of committed maps at a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CopyCount {
    /// That serve under the boot id the server shows.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub serving: i64,
    /// All of them.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub total: i64,
}

/// A copy that no Volume names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Orphan {
    /// Id of the copy.
    pub copy: Id,
    /// Id of the volume that it says it belongs to.
    pub volume: Id,
    /// Generation of the map stored beside it.
    #[schemars(range(min = 0, max = MOST))]
    pub stored: i64,
    /// Whether there is a Volume of that id. If not, the copy may be all that is left of a lost object.
    pub volume_known: bool,
}

/// Why a copy cannot be taken from this server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Veto {
    /// Id of the copy.
    pub copy: Id,
    /// Name of its Volume.
    #[schemars(length(min = 1, max = 253))]
    pub volume: String,
    /// Why: the last good copy, no room elsewhere, or already moving.
    pub reason: VetoReason,
}

/// Why a copy must stay for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum VetoReason {
    /// It is the last good copy of its piece.
    LastActiveCopy,
    /// No other server has room.
    NoRoomElsewhere,
    /// It moves: another copy is being filled.
    BeingMoved,
}

/// The state of a server in short, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServerSummary {
    /// Devices that are ready, of all, such as 2/3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub devices: Option<String>,
    /// Copies that serve, of all that lie here, such as 40/41.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 24))]
    pub copies: Option<String>,
    /// Space taken, of all, such as 1.2Ti/4.0Ti (30%).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 48))]
    pub used: Option<String>,
    /// What goes on here, such as serving, filling 2 copies, or draining.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub doing: Option<String>,
    /// The copies being filled here, with volume and percent, such as db-0 42%, web 7%.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub filling: Option<String>,
    /// What is wrong, in plain words; left out when nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}

fn yes() -> bool {
    true
}
