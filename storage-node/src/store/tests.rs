//! Tests of the store as a whole: real devices in files (`device.rs`), a core whose disk fails or rots
//! (`failure.rs`), and power cuts over a recorded disk (`power_cut.rs` with its disk and its oracle).

#![allow(clippy::unwrap_used)]

mod cut_disk;
mod device;
mod failure;
mod golden;
mod oracle;
mod power_cut;
