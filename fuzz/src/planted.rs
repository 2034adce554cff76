//! A decoder with a fault that no chance finds: `fuzz/run.sh prove` must find it, or the fuzzer finds nothing.

use lamina_protocol::codec::decode;
use lamina_protocol::control::Fence;
use std::hint::black_box;

/// Panics on one fence in 2^33: by chance that takes days, step by step along the coverage it takes seconds.
pub fn planted(bytes: &[u8]) {
    let Some(rest) = bytes.get(2..) else { return };
    let Ok(Fence { generation, flush, .. }) = decode(rest) else { return };
    for (byte, expected) in generation.0.to_le_bytes().into_iter().zip(*b"here") {
        if black_box(byte) != expected {
            return;
        }
        black_box(reached(expected));
    }
    if !black_box(flush) {
        panic!("the planted fault");
    }
}

/// A step of its own for each byte, as between the fields of a real decoder.
#[inline(never)]
fn reached(byte: u8) -> u8 {
    match byte {
        b'h' => black_box(1),
        b'r' => black_box(2),
        _ => 0,
    }
}
