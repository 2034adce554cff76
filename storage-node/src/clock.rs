//! The core's time: milliseconds of a clock that runs during suspend (R5).

use lamina_protocol::time::Millis;
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Now, on CLOCK_BOOTTIME.
pub(crate) fn now() -> Millis {
    let now = clock_gettime(ClockId::Boottime);
    Millis(now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000)
}

/// How long until then; `None` = never.
pub(crate) fn until(then: Millis) -> Option<Duration> {
    (then != Millis::NEVER).then(|| Duration::from_millis(then.since(now())))
}
