//! The storage server: pages on disk, comparator, sync bits, fills from peers.

pub mod store;
