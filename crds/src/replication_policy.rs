//! `ReplicationPolicy`: how volumes are spread over storage servers.
//!
//! Invariant: the shape (copies, stripe, chunk, page, spread) never changes, because the data of every volume lies by it;
//! the operator copies it into the Volume, so a policy deleted and made anew changes no volume either.

// KubeSchema repeats each struct inside a function, where its `pub` reaches nobody.
#![allow(unreachable_pub)]
// Printer columns repeat types and priorities, which clippy takes for mistakes.
#![allow(clippy::duplicated_attributes)]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::schema::{MOST, power_of_two_size, size_between};
use crate::size::Size;

/// How volumes are spread. The shape (copies, stripeWidth, chunk, pageSize, topologySpread) cannot be changed after
/// creation; everything else can, and holds at once for every volume that uses the policy.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "lamina.dev",
    version = "v1alpha1",
    kind = "ReplicationPolicy",
    plural = "replicationpolicies",
    shortname = "repol",
    category = "lamina",
    status = "ReplicationPolicyStatus",
    derive = "PartialEq",
    doc = "How volumes are spread over storage servers: how many copies, over how many servers at once, in which units, and how soon a lost copy is made anew.",
    printcolumn(name = "Copies", type_ = "integer", json_path = ".spec.copies", description = "Copies of everything"),
    printcolumn(
        name = "Stripe",
        type_ = "integer",
        json_path = ".spec.stripeWidth",
        description = "Groups that a volume is striped over"
    ),
    printcolumn(name = "Page", type_ = "string", json_path = ".spec.pageSize", description = "Unit of allocation"),
    printcolumn(
        name = "Spread",
        type_ = "string",
        json_path = ".spec.topologySpread",
        description = "How copies go over zones"
    ),
    printcolumn(
        name = "Volumes",
        type_ = "integer",
        json_path = ".status.volumes",
        description = "Volumes that use it"
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "Since it was created"
    ),
    printcolumn(
        name = "Chunk",
        type_ = "string",
        json_path = ".spec.chunk",
        description = "Unit of striping",
        priority = 1
    ),
    printcolumn(
        name = "Locality",
        type_ = "string",
        json_path = ".spec.locality",
        description = "Whether copies lie near the consumer",
        priority = 1
    ),
    printcolumn(
        name = "Overcommit",
        type_ = "integer",
        json_path = ".spec.overcommitPercent",
        description = "Bytes promised per 100 bytes of capacity",
        priority = 1
    ),
    printcolumn(
        name = "Rebuild-After",
        type_ = "integer",
        json_path = ".spec.rebuildAfterSeconds",
        description = "Seconds after which a lost copy is made anew",
        priority = 1
    )
)]
#[x_kube(
    validation = Rule::new("self.copies == oldSelf.copies && self.stripeWidth == oldSelf.stripeWidth && self.topologySpread == oldSelf.topologySpread && quantity(string(self.chunk)).compareTo(quantity(string(oldSelf.chunk))) == 0 && quantity(string(self.pageSize)).compareTo(quantity(string(oldSelf.pageSize))) == 0").message("copies, stripeWidth, chunk, pageSize and topologySpread cannot be changed: volumes lie by them; make a new ReplicationPolicy instead"),
    validation = Rule::new("!isQuantity(string(self.chunk)) || !isQuantity(string(self.pageSize)) || quantity(string(self.chunk)).compareTo(quantity(string(self.pageSize))) <= 0").message("chunk must not be larger than pageSize: a chunk lies within one page"),
    validation = Rule::new("!has(self.parity)").message("parity is not supported yet: leave it out and use copies")
)]
#[serde(rename_all = "camelCase")]
pub struct ReplicationPolicySpec {
    /// How many storage servers hold each piece of a volume, 1 to 5, always on different servers. With n copies n - 1
    /// servers can be lost without losing data. Cannot be changed.
    #[schemars(range(min = 1, max = 5))]
    pub copies: i32,
    /// Over how many groups of servers a volume is striped, 1 to 16; each group has `copies` members. More groups give
    /// one volume the speed of more disks. Cannot be changed.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 16))]
    pub stripe_width: i32,
    /// Bytes that lie on one group before the next group's turn: a power of two from 64Ki to pageSize. Cannot be changed.
    #[serde(default = "default_chunk")]
    #[schemars(extend("x-kubernetes-validations" = power_of_two_size("chunk")))]
    pub chunk: Size,
    /// Bytes of a page, the unit in which servers allocate space and fill copies: a power of two from 64Ki to 4Mi.
    /// Smaller pages waste less under random writes, larger ones need smaller tables. Cannot be changed.
    #[serde(default = "default_page_size")]
    #[schemars(extend("x-kubernetes-validations" = power_of_two_size("pageSize")))]
    pub page_size: Size,
    /// How the copies of one piece go over zones (`spec.zone` of the StorageServers): PreferZones = over as many zones as
    /// there are; RequireZones = each in a zone of its own, else the volume is not placed. They always lie on different
    /// servers. Cannot be changed.
    #[serde(default)]
    pub topology_spread: TopologySpread,
    /// Reserved for parity groups, not accepted yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parity: Option<Parity>,
    /// PreferLocal = the first copy lies on or near the node of the first consumer, so that reads stay there;
    /// None = anywhere.
    #[serde(default)]
    pub locality: Locality,
    /// Bytes that may be promised to volumes per 100 bytes of a server's capacity, 1 to 10000. 100 = no overcommitment:
    /// space is taken only when written, but a volume never promises what is not there.
    #[serde(default = "hundred")]
    #[schemars(range(min = 1, max = 10_000))]
    pub overcommit_percent: i32,
    /// Seconds that a copy's server may be away before the copy is made anew elsewhere, if there is room; 0 to 604800
    /// (a week). A server that comes back sooner is filled with what it missed.
    #[serde(default = "ten_minutes")]
    #[schemars(range(min = 0, max = 604_800))]
    pub rebuild_after_seconds: i64,
    /// How much of servers and network filling copies may take.
    #[serde(default)]
    pub rebuild_limit: RebuildLimit,
}

/// How copies go over zones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TopologySpread {
    /// Over as many zones as there are.
    #[default]
    PreferZones,
    /// Each copy in a zone of its own, or none is placed.
    RequireZones,
}

/// Whether copies lie near their consumer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Locality {
    /// Anywhere.
    None,
    /// The first copy on or near the consumer's node.
    #[default]
    PreferLocal,
}

/// The members of a parity group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Parity {
    /// Members that hold the bytes themselves, 1 to 12.
    #[schemars(range(min = 1, max = 12))]
    pub data: i32,
    /// Members that hold parity, 1 to 4: as many may be lost without losing data.
    #[schemars(range(min = 1, max = 4))]
    pub parity: i32,
}

/// How much filling copies may take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RebuildLimit {
    /// Bytes per second that one server pulls for one volume at most, 1Mi to 100Gi, such as 200Mi. Left out = no limit
    /// but that client requests go first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-kubernetes-validations" = size_between("rebuildLimit.bytesPerSecond", "1Mi", "100Gi")))]
    pub bytes_per_second: Option<Size>,
    /// Pages that one server pulls for one volume at the same time, 1 to 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub parallel_pages: Option<i32>,
}

/// What the operator says of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicationPolicyStatus {
    /// Volumes that use this policy now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub volumes: Option<i64>,
    /// The metadata.generation (Kubernetes' own count of changes of spec) that the operator acted on last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = MOST))]
    pub observed_generation: Option<i64>,
    /// What is so and why: Satisfiable (there are servers and zones enough for a new volume).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

fn one() -> i32 {
    1
}

fn hundred() -> i32 {
    100
}

fn ten_minutes() -> i64 {
    600
}

fn default_chunk() -> Size {
    Size::of_bytes(64 << 10)
}

fn default_page_size() -> Size {
    Size::of_bytes(1 << 20)
}
