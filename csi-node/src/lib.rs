//! The node's side of Lamina: block devices for pods, the CSI node service, recovery after a restart.

pub mod device;
pub mod holder;
