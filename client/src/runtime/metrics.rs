//! Counters of one volume, for whoever exports them. Plain atomics: written by the volume's thread, read by anyone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a latency histogram: bucket i counts answers within 2^(i+4) microseconds (16 µs to 8.4 s), the last one
/// all others.
pub const LATENCY_BUCKETS: usize = 21;

/// Counters of one kind of request.
#[derive(Debug, Default)]
pub struct OpMetrics {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Of those, with an error.
    pub errors: AtomicU64,
    /// Bytes of those answered without an error.
    pub bytes: AtomicU64,
    /// Sum of all latencies in microseconds.
    pub latency_us: AtomicU64,
    /// Answers by latency, not summed up.
    pub latency: [AtomicU64; LATENCY_BUCKETS],
}

/// Counters of a volume.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Reads.
    pub reads: OpMetrics,
    /// Writes.
    pub writes: OpMetrics,
    /// Discards and write-zeroes.
    pub discards: OpMetrics,
    /// Flushes; a forced write counts as a write only.
    pub flushes: OpMetrics,
    /// Replies that said that a request was of an older generation (seed 002 \[0028\]).
    pub stale: AtomicU64,
    /// Connections made.
    pub connections: AtomicU64,
    /// Connections that broke or could not be made.
    pub broken: AtomicU64,
    /// Reports to the leader that found the channel full.
    pub reports_dropped: AtomicU64,
    /// Requests under way now.
    pub under_way: AtomicU64,
}

impl OpMetrics {
    pub(super) fn count(&self, bytes: u64, failed: bool, took: Duration) {
        let us = took.as_micros() as u64;
        self.requests.fetch_add(1, Ordering::Relaxed);
        if failed {
            self.errors.fetch_add(1, Ordering::Relaxed);
        } else {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.latency_us.fetch_add(us, Ordering::Relaxed);
        self.latency[bucket(us)].fetch_add(1, Ordering::Relaxed);
    }
}

fn bucket(us: u64) -> usize {
    let bits = 64 - us.saturating_sub(1).leading_zeros() as usize;
    bits.saturating_sub(4).min(LATENCY_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_falls_into_the_bucket_of_its_bound() {
        assert_eq!((bucket(0), bucket(16), bucket(17), bucket(32)), (0, 0, 1, 1));
        assert_eq!((bucket(1 << 23), bucket((1 << 23) + 1), bucket(u64::MAX)), (19, 20, 20));
    }
}
