//! The node's side of Lamina: block devices for pods, the CSI node service, recovery after a restart.
//!
//! ```text
//! kubelet -> service -> node -> objects (maps), opener (drivers), host (devices, mounts), record (what survives)
//! ```
//! Entry points: [`serve::serve`] is the DaemonSet's program, [`holder`] the device holder's, [`export`] serves a
//! volume over NBD without Kubernetes. Absent on purpose: any decision about maps, members or generations.

pub mod device;
pub mod export;
pub mod holder;
pub mod host;
pub mod leader;
pub mod metrics;
mod near;
pub mod node;
pub mod objects;
pub mod opener;
pub mod record;
pub mod registration;
pub mod serve;
pub mod service;
pub mod sessions;
