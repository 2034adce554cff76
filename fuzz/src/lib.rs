//! What the fuzzer runs: bytes in, a panic out if one of the decoders breaks its word.
//!
//! Every function here takes any bytes at all. None may panic, take memory out of proportion, read what it would not have
//! written, or take a record whose checksum does not fit. `fuzz/run.sh` drives them with libFuzzer, guided by coverage;
//! `tests/corpus.rs` runs the kept inputs through them in every test run, without it.

#![allow(unreachable_pub)] // The store is written for its own crate.

mod control;
mod device;
mod planted;
mod wire;

/// The store, as source: its inner parts are what is fuzzed, and nothing of the server's dependencies must be built.
#[allow(dead_code, unused_imports)]
#[path = "../../storage-node/src"]
mod storage_node {
    pub(crate) mod store;
}

pub use control::control;
pub use device::device;
pub use planted::planted;
pub use wire::wire;

use peak_alloc::PeakAlloc;
use storage_node::store;

/// Takes any bytes; panics if a decoder breaks its word.
pub type Target = fn(&[u8]);

/// What is fuzzed, by the names of the folders of `corpus`.
pub const TARGETS: [(&str, Target); 3] = [("wire", wire), ("control", control), ("device", device)];

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Memory that decoding may take for each byte of input: an element of a list in memory, with room for a few more, is
/// that much larger than its shortest encoding.
const BYTES_PER_BYTE: usize = 64;
/// Memory that decoding may take in any case.
const BYTES_AT_LEAST: usize = 64 << 10;

/// Runs a decoder over an input of so many bytes and holds its memory against that.
fn within_memory<T>(input: usize, decode: impl FnOnce() -> T) -> T {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let decoded = decode();
    let taken = MEMORY.peak_usage().saturating_sub(before);
    assert!(taken <= BYTES_AT_LEAST + BYTES_PER_BYTE * input, "{taken} bytes of memory for {input} bytes of input");
    decoded
}
