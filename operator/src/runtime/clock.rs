//! Time for the core: milliseconds on a clock that runs during suspend (PROTOCOL.md R5).

use std::time::Duration;

use lamina_protocol::time::Millis;

/// Now.
#[must_use]
pub fn now() -> Millis {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let id = rustix::time::ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let id = rustix::time::ClockId::Monotonic;
    let time = rustix::time::clock_gettime(id);
    let (seconds, nanos) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    Millis(seconds * 1000 + nanos / 1_000_000)
}

/// How long until then; a day for never, so that a timer can be set to it.
#[must_use]
pub fn until(then: Millis) -> Duration {
    Duration::from_millis(then.since(now()).min(86_400_000))
}
