//! The Kubernetes API of Lamina, group `lamina.dev/v1alpha1`: what people write in `spec`, what the programs write in
//! `status`.
//!
//! Types, the manifests made from them, and their translation from and to the protocol's ([`translate`]): nothing here
//! decides anything, and what the protocol means by a map or a generation is said in PROTOCOL.md. Invariant: whatever
//! a schema or a CEL rule can
//! refuse is refused by the API server, in a sentence that says what to write instead; a reconciler meets only what is
//! well formed. Numbers are `i64` with a range, because unsigned formats draw warnings from the API server.
//!
//! Install [`manifests`], not `Volume::crd()`: kube's derive leaves marks in the schema that the first takes away.

pub mod condition;
pub mod id;
pub mod manifest;
pub mod replication_policy;
pub mod schema;
pub mod size;
pub mod storage_server;
pub mod translate;
pub mod volume;

pub use condition::{Condition, ConditionStatus, set_condition};
pub use id::Id;
pub use manifest::{Manifest, manifests};
pub use replication_policy::{ReplicationPolicy, ReplicationPolicySpec, ReplicationPolicyStatus};
pub use size::{NotASize, Size};
pub use storage_server::{StorageServer, StorageServerSpec, StorageServerStatus};
pub use volume::{Volume, VolumeSpec, VolumeStatus};

/// The API group of every kind.
pub const GROUP: &str = "lamina.dev";
/// The version of every kind.
pub const VERSION: &str = "v1alpha1";
