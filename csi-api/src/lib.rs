//! The two contracts that Kubernetes holds a storage plugin to, CSI 1.12 and the kubelet's plugin registration, and all that
//! the controller's and the node's half of the plugin share: identity, the socket, and the step from the wire's loose maps and
//! numbers to this project's types.
//!
//! Invariants: names, numbers and types of the messages are upstream's (`tests/contract.rs`); no credential reaches a log
//! through `Debug`; what a caller got wrong is answered with the status code that CSI names, and the message says which
//! field or key it was.
//!
//! Design: architecture ("CSI, CRD and wire types are translated at the edge, one domain type per noun"). What is absent: any
//! knowledge of maps, servers or Kubernetes objects.

pub mod capability;
pub mod capacity;
pub mod context;
pub mod fields;
pub mod identity;
pub mod in_flight;
pub mod name;
mod redacted;
pub mod registration;
pub mod socket;
pub mod topology;

/// CSI 1.12 as generated from `proto/csi/v1`.
pub mod v1 {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::large_futures)]
    include!(concat!(env!("OUT_DIR"), "/csi.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/redacted_debug.rs"));
}

/// The kubelet's plugin registration as generated from `proto/pluginregistration`.
pub mod pluginregistration {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::large_futures)]
    include!(concat!(env!("OUT_DIR"), "/pluginregistration.rs"));
}

/// The name of the plugin, as in `CSIDriver`, `StorageClass.provisioner` and `PersistentVolume.spec.csi.driver`.
pub const DRIVER_NAME: &str = "csi.lamina.dev";

/// The version of the plugin as it tells callers.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
