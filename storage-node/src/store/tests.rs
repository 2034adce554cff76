//! Tests of the store as a whole: real devices in files (`device.rs`), and power cuts over a recorded disk
//! (`power_cut.rs`).

#![allow(clippy::unwrap_used)]

mod device;
