//! Time for the driver: milliseconds that only go forward and count suspended time (R5).

use lamina_protocol::time::Millis;
use std::time::{Duration, Instant, SystemTime};

/// A clock that only goes forward.
pub trait Clock: Send {
    /// The time since an arbitrary start.
    fn now(&mut self) -> Millis;
}

/// A jump of the wall clock beyond this is taken for a suspend; smaller ones are its corrections.
const SUSPEND_JUMP: Duration = Duration::from_millis(500);

/// The monotonic clock, which on some systems stands still during suspend, pushed forward by jumps of the wall clock. A
/// wall clock that is set forward lets a read lease end early, which is safe; one that is set back changes nothing.
#[derive(Debug)]
pub struct SteadyClock {
    elapsed: Duration,
    monotonic: Instant,
    wall: SystemTime,
}

impl Default for SteadyClock {
    fn default() -> Self {
        Self { elapsed: Duration::ZERO, monotonic: Instant::now(), wall: SystemTime::now() }
    }
}

impl SteadyClock {
    fn step(&mut self, monotonic: Instant, wall: SystemTime) -> Millis {
        let ran = monotonic.saturating_duration_since(self.monotonic);
        let passed = wall.duration_since(self.wall).unwrap_or_default();
        self.elapsed += if passed > ran + SUSPEND_JUMP { passed } else { ran };
        (self.monotonic, self.wall) = (monotonic, wall);
        Millis(self.elapsed.as_millis() as u64)
    }
}

impl Clock for SteadyClock {
    fn now(&mut self) -> Millis {
        self.step(Instant::now(), SystemTime::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suspended_time_counts_and_a_clock_set_back_does_not() {
        let mut clock = SteadyClock::default();
        let (start, wall) = (clock.monotonic, clock.wall);
        let ms = Duration::from_millis;
        assert_eq!(clock.step(start + ms(10), wall + ms(10)), Millis(10));
        assert_eq!(clock.step(start + ms(20), wall + ms(60_000)), Millis(60_000));
        assert_eq!(clock.step(start + ms(30), wall - ms(5_000)), Millis(60_010));
        assert_eq!(clock.step(start + ms(40), wall - ms(4_900)), Millis(60_020));
    }
}
