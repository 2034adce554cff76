//! The client side of Lamina: the driver's runtime (connections, timers, kept writes) and the NBD export.
//! Nothing here is Linux-only.
pub mod block;
pub mod merge;
pub mod nbd;
pub mod ram;
pub mod runtime;
